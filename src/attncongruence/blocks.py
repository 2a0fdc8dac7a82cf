"""The four blocks of one layer's attention (CACR, Eq. 2) and the masks that go with them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from attncongruence._typing import Count, checked, same_device
from attncongruence.layout import TokenLayout
from attncongruence.locate import Mask, joined, locate
from attncongruence.quadrants import Quadrants, first_positions, quadrants, take
from attncongruence.sources import ScoreSource

Scores = Float[Tensor, "batch heads length length"] | Float[Tensor, "batch length length"]


@dataclass(frozen=True, eq=False)
class AttentionBlocks:
    """The four blocks of S and the masks of their real tokens; made by `split_attention` or `from_streams`.

    Attributes:
        LL: text to text, `(batch, heads, N, N)`, or without the head axis where S had none.
        LV: text to image, `(batch, heads, N, M)`.
        VL: image to text, `(batch, heads, M, N)`; None where the model has no such attention.
        VV: image to image, `(batch, heads, M, M)`.
        text_mask: `(batch, N)` bool, True at real text tokens.
        image_mask: `(batch, M)` bool, True at real image tokens.
        allowed: which pairs may attend, block by block, 4-D and broadcastable; None: all pairs of real tokens.
        padded: False where both masks are known to be True throughout; trusted.

    Source:
        CACR (Pandey et al., ACL 2023), Eq. 2.
    """

    LL: Float[Tensor, "..."]
    LV: Float[Tensor, "..."]
    VL: Float[Tensor, "..."] | None
    VV: Float[Tensor, "..."]
    text_mask: Bool[Tensor, "batch text"]
    image_mask: Bool[Tensor, "batch image"]
    allowed: Quadrants[Tensor] | None = None
    padded: bool = True

    def swap(self) -> AttentionBlocks:
        """L and V exchanged: the vision side of a loss is its language side on swapped blocks."""
        if self.VL is None:
            raise ValueError("these blocks have no VL (image-to-text attention), so there is no vision side")
        allowed = None if self.allowed is None else self.allowed.swap()
        return AttentionBlocks(
            self.VV, self.VL, self.LV, self.LL, self.image_mask, self.text_mask, allowed, self.padded
        )

    def with_heads(self) -> AttentionBlocks:
        """The same blocks with a head axis, in 4-D."""
        if self.LL.dim() == 4:
            return self
        VL = None if self.VL is None else self.VL[:, None]
        return replace(self, LL=self.LL[:, None], LV=self.LV[:, None], VL=VL, VV=self.VV[:, None])

    @staticmethod
    def from_streams(
        *,
        LL: Tensor | ScoreSource,
        LV: Tensor | ScoreSource,
        VV: Tensor | ScoreSource,
        VL: Tensor | ScoreSource | None = None,
        text_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> AttentionBlocks:
        """Blocks of a dual-stream model, whose four maps come from different layers.

        Args:
            LL: text self-attention, pre-softmax scores or a captured layer, `(batch, heads, N, N)` or `(batch, N, N)`.
            LV: text queries on image keys, `(..., N, M)`.
            VV: image self-attention, `(..., M, M)`.
            VL: image queries on text keys, `(..., M, N)`; without it only `direction="language"` has a meaning.
            text_mask: `(batch, N)`, True or 1 at real text tokens; None: those that a captured LL allows, else all.
            image_mask: `(batch, M)`, True or 1 at real image tokens; None: those that a captured VV allows, else all.

        Raises:
            jaxtyping.TypeCheckError: blocks or masks whose sizes don't fit each other.
            ValueError: blocks of different ranks or dtypes, tensors on several devices.

        Example:
            >>> S = torch.zeros
            >>> AttentionBlocks.from_streams(LL=S(1, 2, 2), LV=S(1, 2, 3), VV=S(1, 3, 3)).image_mask.shape
            torch.Size([1, 3])
        """
        scores, pairs = zip(
            *((None, None) if source is None else _scores_and_pairs(source) for source in (LL, LV, VL, VV)), strict=True
        )
        return _join(*scores, text_mask, image_mask, *pairs)


Attention = Scores | AttentionBlocks | ScoreSource
NText = Count | Integer[Tensor, " batch"] | TokenLayout | None


@checked
def split_attention(
    S: Scores, n_text: Count | Integer[Tensor, " batch"] | TokenLayout, *, mask: Mask | None = None
) -> AttentionBlocks:
    """Cut one layer's scores into the blocks LL, LV, VL, VV (Eq. 2).

    Where text and image each fill one stretch of the sequence for the whole batch (one boundary, say), the blocks are
    views of S, no copy. A ragged or interleaved layout is gathered, padded to the longest text and the longest image,
    without a loop over samples.

    Args:
        S: pre-softmax scores, `(batch, heads, length, length)` or `(batch, length, length)`; rows are queries.
        n_text: text first, then image: one boundary, or `(batch,)`, one a sample; or a `TokenLayout`.
        mask: `(batch, length)`, True or 1 at real tokens; or which pairs may attend, bool, `(batch, length, length)`
            or broadcastable to `(batch, heads, length, length)`. A token that no query may attend to is not real.

    Returns:
        `AttentionBlocks`, 3-D where S is.

    Raises:
        jaxtyping.TypeCheckError: S not square, of another rank or not floating point; n_text a float or of another
            length than the batch; a mask of another shape.
        ValueError: a boundary outside 0..length, a layout of another batch or length, tensors on several devices.

    Source:
        CACR (Pandey et al., ACL 2023), Eq. 2.

    Example:
        >>> blocks = split_attention(torch.arange(9.0).view(1, 3, 3), n_text=1)
        >>> blocks.LV.tolist(), blocks.VV.tolist()
        ([[[1.0, 2.0]]], [[[4.0, 5.0], [7.0, 8.0]]])
    """
    batch, length = S.shape[0], S.shape[-1]
    if S.dim() == 3 and mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
        raise ValueError(
            f"the mask is for {mask.shape[1]} heads, and the scores {tuple(S.shape)} have none: "
            "pass scores (batch, heads, length, length), or a mask (batch, length, length)"
        )
    text, image, (n, m), spans, pairs, padded = locate(S, n_text, mask)
    where = spans or (first_positions(text, n), first_positions(image, m))
    masks = take(text, where[0], where[1], 1)[0], take(image, where[0], where[1], 1)[1]
    allowed = None if pairs is None else quadrants(pairs.expand(batch, -1, length, length), *where)
    return AttentionBlocks(*quadrants(S, *where), *masks, allowed, padded)


def as_blocks(
    attention: Tensor | AttentionBlocks | ScoreSource, n_text: int | Tensor | TokenLayout | None, mask: Tensor | None
) -> AttentionBlocks:
    """4-D blocks from whatever a loss was given."""
    if isinstance(attention, AttentionBlocks):
        if n_text is not None or mask is not None:
            raise ValueError("AttentionBlocks carry their own boundary and masks: leave n_text and mask out")
        return attention.with_heads()
    if n_text is None:
        raise ValueError("n_text is missing: pass the number of text tokens (int or tensor) or a TokenLayout")
    scores, pairs = _scores_and_pairs(attention)
    return split_attention(scores, n_text, mask=joined(pairs, mask)).with_heads()


def one_sample(blocks: AttentionBlocks, sample: int, head: int | None = None) -> AttentionBlocks:
    """One sample of 4-D blocks, cut to its real tokens, with all its heads or one: what a picture shows.

    Raises:
        ValueError: no such sample or head, or a sample without text or without image.
    """
    given = [block for block in (blocks.LL, blocks.LV, blocks.VL, blocks.VV) if block is not None]
    for name, value, count in (
        ("sample", sample, len(blocks.LL)),
        ("head", head or 0, min(block.shape[1] for block in given)),
    ):
        if not 0 <= value < count:
            raise ValueError(f"{name}={value} is out of range: {count} {name}(s) allow 0 to {count - 1}")
    text, image = blocks.text_mask[sample].nonzero()[:, 0], blocks.image_mask[sample].nonzero()[:, 0]
    if not (len(text) and len(image)):
        raise ValueError(
            f"sample {sample} has {len(text)} text tokens and {len(image)} image tokens: choose one that has both"
        )
    samples, heads = text.new_tensor([sample]), None if head is None else text.new_tensor([head])

    def cut(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        for dim, places in enumerate((samples, heads, rows, columns)):
            if places is not None and x.shape[dim] > 1:  # pairs may be broadcast
                x = x.index_select(dim, places)
        return x

    allowed = blocks.allowed
    if allowed is not None:
        LL, LV, VL, VV = allowed
        allowed = Quadrants(cut(LL, text, text), cut(LV, text, image), cut(VL, image, text), cut(VV, image, image))
    return AttentionBlocks(
        LL=cut(blocks.LL, text, text),
        LV=cut(blocks.LV, text, image),
        VL=None if blocks.VL is None else cut(blocks.VL, image, text),
        VV=cut(blocks.VV, image, image),
        text_mask=torch.ones_like(text, dtype=torch.bool)[None],
        image_mask=torch.ones_like(image, dtype=torch.bool)[None],
        allowed=allowed,
        padded=False,
    )


def _scores_and_pairs(source: Tensor | ScoreSource) -> tuple[Tensor, Tensor | None]:
    # What is neither goes on to the checker of shapes, which says what it should have been.
    return (source.scores, source.allowed) if isinstance(source, ScoreSource) else (source, None)


@checked
def _join(
    LL: Float[Tensor, "batch ... text text"],
    LV: Float[Tensor, "batch ... text image"],
    VL: Float[Tensor, "batch ... image text"] | None,
    VV: Float[Tensor, "batch ... image image"],
    text_mask: Bool[Tensor, "batch text"] | Integer[Tensor, "batch text"] | None,
    image_mask: Bool[Tensor, "batch image"] | Integer[Tensor, "batch image"] | None,
    *pairs: Bool[Tensor, "..."] | None,
) -> AttentionBlocks:
    """Blocks from four maps and the pairs that each one's own layer allows."""
    same_device(LL=LL, LV=LV, VL=VL, VV=VV, text_mask=text_mask, image_mask=image_mask)
    given = {name: block for name, block in (("LL", LL), ("LV", LV), ("VL", VL), ("VV", VV)) if block is not None}
    if {block.dim() for block in given.values()} not in ({3}, {4}) or len({x.dtype for x in given.values()}) > 1:
        what = ", ".join(f"{name} {tuple(block.shape)} {block.dtype}" for name, block in given.items())
        raise ValueError(
            f"the blocks must be all (batch, heads, ., .) or all (batch, ., .), of one dtype; these are {what}"
        )
    everything = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=LL.device)
    LL_pairs, LV_pairs, VL_pairs, VV_pairs = (everything if pair is None else pair for pair in pairs)

    def real(mask: Tensor | None, own: Tensor, block: Tensor) -> Tensor:
        return mask.bool() if mask is not None else own.any(1).any(1).expand(block.shape[0], block.shape[-1])

    masks = real(text_mask, LL_pairs, LL), real(image_mask, VV_pairs, VV)
    allowed = None
    if any(pair is not None for pair in pairs):
        allowed = Quadrants(LL_pairs, LV_pairs, VL_pairs, VV_pairs)
    known = text_mask is None and image_mask is None and allowed is None
    return AttentionBlocks(LL, LV, VL, VV, *masks, allowed, padded=not known)
