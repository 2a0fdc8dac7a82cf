"""From a model to scores: `capture_attention` watches the attention of chosen layers and changes nothing."""

from attncongruence.capture.find import find_attention
from attncongruence.capture.record import CapturedAttention
from attncongruence.capture.session import AttentionCapture, capture_attention

__all__ = ["AttentionCapture", "CapturedAttention", "capture_attention", "find_attention"]
