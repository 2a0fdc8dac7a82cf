"""Measurements: speed, and what the losses do to a model."""
