"""CapturedAttention: what one attention layer computed, as scores that a loss can use."""

import dataclasses
import numbers
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attncongruence import _compat
from attncongruence._typing import at_least_float32, no_autocast
from attncongruence.capture.masks import hidden, seen_in, unmasked
from attncongruence.capture.product import Operation
from attncongruence.capture.versions import changed, noted
from attncongruence.sources import ScoreSource


class CapturedAttention(ScoreSource):
    """The attention of one layer in one forward pass, with gradient.

    `scores = scale * query @ key.T`, plus whatever the model adds before its softmax; nothing is computed until it is
    asked for. Rows are queries, columns keys.

    A pair is *disallowed* where a boolean mask says so, where causal attention hides it, or where a number below
    `-5000` is added to its score (-inf, finfo.min, -1e9 and -1e4 are all in use; no score outweighs 5000), whatever
    the model divides the sum by. NaN disallows nothing.

    It holds what the layer used, not copies. Where the model has written to that since, reading it is a RuntimeError.

    Args:
        layer: dotted name of the module that attended.
        operation: the operation as the model called it.

    Attributes:
        lengths: number of queries and of keys.
        batch_size: number of samples.
        heads: number of heads, of the queries where they are grouped.
        shape: of the scores.
        device: where the layer ran.

    Example:
        >>> from attncongruence.capture.product import Operation
        >>> q, k = torch.tensor([[[[1.0], [2.0]]]]), torch.tensor([[[[3.0], [5.0]]]])
        >>> CapturedAttention("attn", Operation(query=q, key=k, scale=0.5, causal=True)).scores.tolist()
        [[[[1.5, -inf], [3.0, 5.0]]]]
    """

    def __init__(self, layer: str, operation: Operation) -> None:
        self.layer = layer
        operation = operation.four_d()
        # How its tensors were made is told by their axes now. It would keep the pass alive, and no copy could be made.
        operation = dataclasses.replace(operation, product=None, where=None, stages=())
        self._operation = operation = operation if operation.versions else noted(operation)
        self.lengths, self.problem = operation.lengths, operation.problem
        self.batch_size, self.heads = operation.main.shape[:2]
        self.shape = (self.batch_size, self.heads, *self.lengths)
        self.device = operation.main.device
        self._scores: Tensor | None = None

    @property
    def query(self) -> Tensor | None:
        """`(batch, heads, length, width)` after rotary embedding and norms; None where scores are not `scale q k^T`."""
        return self._unwritten().query if self._only_masked else None

    @property
    def key(self) -> Tensor | None:
        """`(batch, heads, length, width)` likewise, repeated over grouped queries."""
        return self._repeated_key() if self._only_masked else None

    @property
    def scale(self) -> float:
        """Factor of `query @ key.T`; 1.0 where those are None."""
        return self._operation.scale if self._only_masked else 1.0

    @property
    def scores(self) -> Tensor:
        """`(batch, heads, length, length)`: what the softmax saw, float32 for half inputs, -inf at disallowed pairs."""
        kept, allowed = self._scores, self.allowed
        # Scores that were first computed under no_grad() would train nothing: they are computed again for a loss.
        if kept is not None and (kept.requires_grad or not (torch.is_grad_enabled() and self.requires_grad)):
            return kept
        operation = self._operation
        for _, tensor, version in operation.versions:
            if _compat.writes(tensor) != version:
                operation = self._unwritten()
        if operation.logits is not None:
            scores = at_least_float32(operation.logits)
        else:
            assert operation.query is not None
            query, key = operation.query, operation.key
            assert key is not None
            key = key if key.shape[1] == query.shape[1] else self._repeated_key()
            query, key = at_least_float32(query), at_least_float32(key)
            with no_autocast(self.device):
                # scale (q k^T), with the scale on q: fewer numbers than the product has
                scores = (operation.scale * query) @ key.mT
                for mask, factor in operation.masks:
                    if mask.dtype != torch.bool:
                        scores = scores + factor * mask
        self._scores = scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))
        return self._scores

    @cached_property
    def allowed(self) -> Tensor | None:
        """Boolean, broadcastable to `scores`: which pairs may attend; None when the layer masks nothing."""
        if self._operation.query is not None and not (self._operation.masks or self._operation.causal):
            return None
        operation = self._unwritten()
        masked = unmasked(operation)
        if operation.query is not None:
            return masked
        return seen_in(operation.main, masked, self.layer)

    @property
    def probs(self) -> Tensor:
        """`softmax(scores)`, what the model used before dropout; all zero in rows where nothing is allowed."""
        scores, allowed = self.scores, self.allowed
        if allowed is None:
            return scores.softmax(-1)
        alive = allowed.any(-1, keepdim=True)
        return scores.masked_fill(~alive, 0.0).softmax(-1).masked_fill(~allowed, 0.0)

    def __getitem__(self, samples: Any) -> "CapturedAttention":
        """The same record for some samples only: an int, slice, list, index tensor or boolean mask over the batch."""
        index = _as_index(samples, self.batch_size)

        def pick(tensor: Tensor) -> Tensor:
            return tensor if tensor.shape[0] == 1 != self.batch_size else tensor[index]

        picked = dataclasses.replace(self._unwritten(), versions=())
        return CapturedAttention(self.layer, picked.apply(pick))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles have tensors of their own, whose versions begin again."""
        return CapturedAttention, (self.layer, dataclasses.replace(self._unwritten(), versions=()))

    def __repr__(self) -> str:
        length, keys = self.lengths
        return f"CapturedAttention({self.layer!r}, batch={self.batch_size}, queries={length}, keys={keys})"

    @property
    def requires_grad(self) -> bool:
        """Whether a loss on this record reaches the model."""
        tensors = (self._operation.query, self._operation.key, self._operation.logits)
        return any(tensor is not None and tensor.requires_grad for tensor in tensors)

    @cached_property
    def _only_masked(self) -> bool:
        """Whether `scale q k^T` gives the scores at all allowed pairs: at most masks were added.

        The values of float masks cost one synchronization, for all of them together.
        """
        masks_alone, operation = None, self._unwritten()
        for (mask, factor), written in zip(operation.masks, operation.as_written, strict=True):
            if mask.requires_grad:
                return False
            if mask.dtype != torch.bool:
                low_or_zero = ((mask == 0) | hidden(mask, factor, written)).all()
                masks_alone = low_or_zero if masks_alone is None else masks_alone & low_or_zero
        return operation.query is not None and (masks_alone is None or bool(masks_alone))

    def _repeated_key(self) -> Tensor:
        query, key = self._unwritten().query, self._unwritten().key
        assert query is not None
        assert key is not None
        groups = query.shape[1] // key.shape[1]
        return key if groups == 1 else key.repeat_interleave(groups, dim=1)

    def _unwritten(self) -> Operation:
        """The operation, if the model has not written to its tensors since."""
        operation = self._operation
        written = changed(operation)
        if written and operation.query is not None and set(written) == {"scores"}:
            # The scores can be computed again.
            self._operation = noted(dataclasses.replace(operation, logits=None))
        elif written:
            raise RuntimeError(
                f"{self.layer or 'the model itself'}: the model has written to the "
                f"{' and '.join(dict.fromkeys(written))} of this record since it attended, so what they were is not "
                "known any more. Let it write to a copy (clone() before the write), or read captured.scores before the "
                "write."
            )
        return self._operation


def _as_index(samples: Any, batch_size: int) -> Any:
    """An index over the batch that keeps its dimension."""
    if isinstance(samples, numbers.Integral) and not isinstance(samples, bool):
        if not -batch_size <= int(samples) < batch_size:
            raise IndexError(f"sample {samples} is not among the {batch_size} of the batch")
        return [int(samples)]
    if isinstance(samples, slice) or samples is Ellipsis:
        return samples
    several = isinstance(samples, Sequence) and not isinstance(samples, str | bytes | tuple)
    if several or hasattr(samples, "__array__"):  # tensors have it, too
        index = torch.as_tensor(samples)
        index = index if index.numel() else index.long()
        integers = not (index.is_floating_point() or index.is_complex() or index.dtype in (torch.bool, torch.uint8))
        if integers and not index.ndim:
            return index.reshape(1)
        if index.ndim == 1 and (integers or index.dtype == torch.bool):
            return index
    what = "it takes an int, a slice, a list or 1-D tensor of integers, or a bool mask over the batch"
    remedy = "n_text is called as (batch, captured)" if isinstance(samples, str) else what
    raise TypeError(f"a record is indexed by samples, not by {samples!r}: {remedy}")
