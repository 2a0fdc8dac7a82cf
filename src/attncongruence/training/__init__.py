"""From a loss to a training run."""
