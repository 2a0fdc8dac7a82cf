"""The only modules that import a framework; each needs its extra (`hf`, `lightning`)."""
