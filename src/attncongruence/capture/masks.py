"""Which pairs of queries and keys may attend, by the masks that a layer added and by the scores that came of them."""

import torch
from torch import Tensor

from attncongruence._typing import at_least_float32, readable
from attncongruence.capture.product import FLOOR, Operation

# exp of less is 0 in float32.
_UNDERFLOW = -104.0
# A score is not this low by itself, and a mask that was not divided is lower (FLOOR).
_UNLIKELY = -300.0


def hidden(mask: Tensor, factor: float, written: float) -> Tensor:
    """Where a mask of numbers hides a pair: bool, False at NaN, which must reach the loss.

    What the model added decides, `written * mask`; a larger factor since then may hide more.
    """
    larger = factor if abs(factor) > abs(written) else written
    return mask * larger <= FLOOR


def unmasked(operation: Operation) -> Tensor | None:
    """Which pairs no mask hides, bool, broadcastable to the scores; None: all."""
    allowed = None
    if operation.causal:
        allowed = torch.ones(1, 1, *operation.lengths, dtype=torch.bool, device=operation.main.device).tril()
    for (mask, factor), written in zip(operation.masks, operation.as_written, strict=True):
        is_bool = mask.dtype == torch.bool
        pairs = ~hidden(mask, factor, written) if not is_bool else mask if factor > 0 else ~mask
        allowed = pairs if allowed is None else allowed & pairs
    return allowed


def seen_in(logits: Tensor, masked: Tensor | None, layer: str) -> Tensor:
    """Which pairs may attend, by the scores alone, of which it is not known how the model made them.

    Args:
        logits: what the softmax got, `(batch, heads, queries, keys)`.
        masked: True at pairs that no mask hides which was seen on the way.
        layer: for the message.

    Raises:
        RuntimeError: scores that may be masked or not.
    """
    logits = at_least_float32(logits.detach())
    low = logits <= FLOOR
    shown = logits if masked is None else logits.masked_fill(~masked, -torch.inf)
    top = shown.amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    none = logits - top < _UNDERFLOW
    if masked is not None:
        # What the model masked and then divided, -1e4 / 8, is still hidden if the softmax gives it exactly 0.
        low = low | ~masked & (none | ~masked.any(-1, keepdim=True))
    if readable(logits) and (none & ~low & (logits <= _UNLIKELY)).all(1).any():
        raise RuntimeError(
            f"{layer or 'the model itself'}: some scores are between {FLOOR:g} and {_UNLIKELY:g}, too high for a mask "
            "and too low for a score, and how the model made them was not seen, as where it writes -1e4 by index and "
            "divides the sum. Whether these pairs may attend is not known: let the model mask with -inf, or after the "
            "division, or use sdpa."
        )
    return ~low
