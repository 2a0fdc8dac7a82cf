"""The doctor: whether the loss can train a model, and what to write in its training loop. `examine`, and a command."""

from attncongruence.doctor.examine import examine
from attncongruence.doctor.report import Report

__all__ = ["Report", "examine"]
