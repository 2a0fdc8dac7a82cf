"""CapturedAttention: what one attention layer computed, as scores that a loss can use."""

import dataclasses
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attncongruence._typing import at_least_float32, no_autocast
from attncongruence.capture.seen import FLOOR, Seen
from attncongruence.sources import ScoreSource


class CapturedAttention(ScoreSource):
    """The attention of one layer in one forward pass, with gradient.

    `scores = scale * query @ key.T`, plus whatever the model adds before its softmax; nothing is computed until it is
    asked for. Rows are queries, columns keys.

    A pair is *disallowed* where a boolean mask says so, where causal attention hides it, or where a number below
    `-5000` is added to its score (-inf, finfo.min, -1e9 and -1e4 are all in use; no score outweighs 5000).

    Args:
        layer: dotted name of the module that attended.
        seen: the operation as the model called it.

    Example:
        >>> from attncongruence.capture.seen import Seen
        >>> q, k = torch.tensor([[[[1.0], [2.0]]]]), torch.tensor([[[[3.0], [5.0]]]])
        >>> CapturedAttention("attn", Seen(query=q, key=k, scale=0.5, causal=True)).scores.tolist()
        [[[[1.5, -inf], [3.0, 5.0]]]]
    """

    def __init__(self, layer: str, seen: Seen) -> None:
        self.layer = layer
        self._seen = seen

    @property
    def query(self) -> Tensor | None:
        """`(batch, heads, length, width)` after rotary embedding and norms; None where scores are not `scale q k^T`."""
        return self._wide(self._seen.query) if self._reproducible else None

    @property
    def key(self) -> Tensor | None:
        """`(batch, heads, length, width)` likewise, repeated over grouped queries."""
        return self._repeated_key() if self._reproducible else None

    @property
    def scale(self) -> float:
        """Factor of `query @ key.T`; 1.0 where those are None."""
        return self._seen.scale if self._reproducible else 1.0

    @cached_property
    def scores(self) -> Tensor:
        """`(batch, heads, length, length)`: what the softmax saw, float32 for half inputs, -inf at disallowed pairs."""
        if self._seen.logits is not None:
            scores = at_least_float32(self._wide(self._seen.logits))
        else:
            scores = self._computed_scores()
        return scores if self.allowed is None else scores.masked_fill(~self.allowed, float("-inf"))

    @cached_property
    def allowed(self) -> Tensor | None:
        """Boolean, broadcastable to `scores`: which pairs may attend; None when the layer masks nothing."""
        seen = self._seen
        if seen.logits is not None and seen.query is None:
            return self._wide(seen.logits) > FLOOR
        masks = [_allowed_by(self._wide(mask), factor) for mask, factor in seen.masks]
        if seen.causal:
            length, keys = seen.lengths
            masks.append(torch.ones(1, 1, length, keys, dtype=torch.bool, device=self.device).tril())
        if not masks:
            return None
        allowed = masks[0]
        for mask in masks[1:]:
            allowed = allowed & mask
        return allowed

    @property
    def probs(self) -> Tensor:
        """`softmax(scores)`, what the model used before dropout; all zero in rows where nothing is allowed."""
        scores = self.scores
        if self.allowed is None:
            return scores.softmax(-1)
        alive = self.allowed.any(-1, keepdim=True)
        return scores.masked_fill(~alive, 0.0).softmax(-1).masked_fill(~self.allowed, 0.0)

    def __getitem__(self, samples: Any) -> "CapturedAttention":
        """The same record for some samples only: an int, slice, list, index tensor or boolean mask over the batch."""
        if isinstance(samples, int):
            samples = [samples]
        batch = self.batch_size

        def pick(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            tensor = self._wide(tensor)
            return tensor if tensor.shape[0] == 1 and batch != 1 else tensor[samples]

        seen = self._seen
        masks = tuple((mask, factor) for m, factor in seen.masks if (mask := pick(m)) is not None)
        query, key, logits = pick(seen.query), pick(seen.key), pick(seen.logits)
        part = dataclasses.replace(seen, query=query, key=key, masks=masks, logits=logits, folded=None)
        return CapturedAttention(self.layer, part)

    def __repr__(self) -> str:
        length, keys = self._seen.lengths
        return f"CapturedAttention({self.layer!r}, batch={self.batch_size}, queries={length}, keys={keys})"

    @property
    def lengths(self) -> tuple[int, int]:
        """Number of queries and of keys, without computing the scores."""
        return self._seen.lengths

    @property
    def device(self) -> torch.device:
        """Where the layer ran."""
        return self._seen.main.device

    @property
    def shape(self) -> torch.Size:
        """Shape of `scores`, without computing them."""
        return torch.Size((*self._wide(self._seen.main).shape[:2], *self._seen.lengths))

    @property
    def has_pair_mask(self) -> bool:
        """Whether a causal flag makes `allowed` differ between queries."""
        return self._seen.causal and self._seen.lengths[0] > 1

    @property
    def requires_grad(self) -> bool:
        """Whether a loss on this record reaches the model."""
        return self._seen.requires_grad

    @property
    def batch_size(self) -> int:
        """Number of samples, without computing the scores."""
        return self._wide(self._seen.main).shape[0]

    @property
    def heads(self) -> int:
        """Number of heads, of the queries where they are grouped, without computing the scores."""
        return self._wide(self._seen.main).shape[1]

    @cached_property
    def _reproducible(self) -> bool:
        """Whether `scale q k^T` gives the scores at all allowed pairs: nothing but masks may have been added."""
        if self._seen.query is None or self._seen.key is None:
            return False
        return all(_is_mask(mask * factor) for mask, factor in self._seen.masks if mask.dtype != torch.bool)

    def _computed_scores(self) -> Tensor:
        query, key = self._wide(self._seen.query), self._repeated_key()
        with no_autocast(query.device):
            # scale (q k^T), the scale on the smaller factor
            scores = (self._seen.scale * at_least_float32(query)) @ at_least_float32(key).transpose(-1, -2)
            for mask, factor in self._seen.masks:
                if mask.dtype != torch.bool:
                    scores = scores + factor * self._wide(mask)
        return scores

    def _repeated_key(self) -> Tensor:
        query, key = self._wide(self._seen.query), self._wide(self._seen.key)
        groups = query.shape[1] // key.shape[1]
        return key if groups == 1 else key.repeat_interleave(groups, dim=1)

    def _wide(self, tensor: Tensor | None) -> Tensor:
        """With batch and heads in dimensions of their own: `(batch * heads, ...)` unfolded, missing ones added."""
        assert tensor is not None
        folded = self._seen.folded
        if tensor.ndim == 3 and folded is not None and tensor.shape[0] == folded[0] * folded[1]:
            return tensor.reshape(*folded, *tensor.shape[1:])
        if tensor.ndim == 3 and self._seen.main.ndim == 3:
            return tensor.unsqueeze(1)
        return tensor if tensor.ndim > 3 else tensor[(None,) * (4 - tensor.ndim)]


def _allowed_by(mask: Tensor, factor: float) -> Tensor:
    if mask.dtype == torch.bool:
        return mask if factor > 0 else ~mask
    return mask * factor > FLOOR


def _is_mask(added: Tensor) -> bool:
    return not added.requires_grad and bool(((added == 0) | (added <= FLOOR)).all())
