"""One attention operation, as a model called it."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# An added number this low hides a pair: -inf, finfo.min, -1e9 and -1e4 (-9984 in bfloat16) are all in use, and no score
# outweighs 5000. A position bias is never this low. Swin's -100 between shifted windows is a bias by this rule.
FLOOR = -5000.0


@dataclass(frozen=True)
class Seen:
    """One attention operation as it was called: `softmax(scale * query @ key.T + sum(masks))`, nothing computed.

    Args:
        query: `(..., length, width)`, or None where only `logits` are known.
        key: `(..., keys, width)`; fewer heads than `query` when queries are grouped.
        scale: factor of the product.
        masks: pairs `(mask, factor)`: a boolean mask says what is allowed (factor 1) or what is not (-1), any other is
            added `factor` times.
        causal: query `i` sees keys `0..i`.
        logits: the tensor given to `softmax`, where the model calls it by itself.
        folded: `(batch, heads)` when the tensors carry both in their first dimension.
        from_product: False for a softmax over something that is no product of two batched tensors.
        cross: queries and keys are known to come from two different streams.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    scale: float = 1.0
    masks: tuple[tuple[Tensor, float], ...] = ()
    causal: bool = False
    logits: Tensor | None = None
    folded: tuple[int, int] | None = None
    from_product: bool = True
    cross: bool = False

    @property
    def main(self) -> Tensor:
        """The tensor that the softmax or the kernel was given first."""
        tensor = self.query if self.logits is None else self.logits
        assert tensor is not None
        return tensor

    @property
    def lengths(self) -> tuple[int, int]:
        """Number of queries and of keys."""
        if self.logits is not None:
            return self.logits.shape[-2], self.logits.shape[-1]
        assert self.query is not None
        assert self.key is not None
        return self.query.shape[-2], self.key.shape[-2]

    def with_fold(self, fold_of: Callable[[int], tuple[int, int] | None]) -> "Seen":
        """The same, knowing the `(batch, heads)` of tensors that carry both in their first dimension."""
        if self.main.ndim == 4:  # parts may still be folded: alibi, or q and k of a bmm
            return dataclasses.replace(self, folded=(self.main.shape[0], self.main.shape[1]))
        return dataclasses.replace(self, folded=fold_of(self.main.shape[0]))

    @property
    def requires_grad(self) -> bool:
        """Whether a loss on the scores can reach the model."""
        return any(t is not None and t.requires_grad for t in (self.query, self.key, self.logits))


def seen_in_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Seen:
    """What a call of `scaled_dot_product_attention` attends with; the signature is torch's own."""
    return Seen(
        query=query,
        key=key,
        scale=1.0 / math.sqrt(query.shape[-1]) if scale is None else scale,
        masks=() if attn_mask is None else ((attn_mask, 1.0),),
        causal=is_causal,
    )
