"""A synthetic Winoground: rendered scenes whose captions differ only by who does what to whom."""
