"""The four blocks of one layer's attention (CACR, Eq. 2): S is cut where a boundary or layout says, with its masks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from attncongruence._typing import REMEDIES, Count, checked, readable, same_device
from attncongruence.layout import (
    Mask,
    Span,
    TokenLayout,
    as_layout,
    as_pairs,
    boundary_error,
    check_mask,
    joined,
    not_ambiguous,
)
from attncongruence.sources import Source, wrong_allowed

T = TypeVar("T")
Places = tuple[Span, Span] | tuple[Tensor, Tensor]
"""Of text and of image: a span of positions, or each sample's own positions `(batch, longest)`."""

Sees = list[int]
"""How many samples have both modalities, a pair of LV that may attend, one of VL, one of each; None: not looked up."""

Scores = Float[Tensor, "batch heads length length"] | Float[Tensor, "batch length length"]
NText = Count | Integer[Tensor, " batch"] | TokenLayout
"""Where the tokens are: the number of text tokens, which come first, for all samples or for each; or a layout."""


class Quadrants(NamedTuple, Generic[T]):
    """One thing for each block: its scores, its map, its mask. Rows are queries: `LV` is text to image."""

    LL: T
    LV: T
    VL: T
    VV: T

    def swap(self) -> Quadrants[T]:
        """L and V exchanged."""
        return Quadrants(LL=self.VV, LV=self.VL, VL=self.LV, VV=self.LL)


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
    _padded: bool = field(default=True, repr=False)
    """False where both masks are known to be True throughout."""
    _sees: Sees | None = field(default=None, repr=False)

    def swap(self) -> AttentionBlocks:
        """L and V exchanged: the vision side of a loss is its language side on swapped blocks."""
        if self.VL is None:
            raise ValueError("these blocks have no VL (image-to-text attention), so there is no vision side")
        allowed = None if self.allowed is None else self.allowed.swap()
        sees = None if self._sees is None else [self._sees[i] for i in (0, 2, 1, 3)]
        return AttentionBlocks(
            self.VV, self.VL, self.LV, self.LL, self.image_mask, self.text_mask, allowed, self._padded, sees
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
        LL: Tensor | Source,
        LV: Tensor | Source,
        VV: Tensor | Source,
        VL: Tensor | Source | None = None,
        text_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> AttentionBlocks:
        """Blocks of a two-stream model, whose four maps come from different layers.

        Args:
            LL: text self-attention, pre-softmax scores or a captured layer, `(batch, heads, N, N)` or `(batch, N, N)`.
            LV: text queries on image keys, `(..., N, M)`.
            VV: image self-attention, `(..., M, M)`.
            VL: image queries on text keys, `(..., M, N)`. Without it only `direction="language"` is defined.
            text_mask: `(batch, N)`, True or 1 at real text tokens; None: those that a captured LL allows, else all.
            image_mask: `(batch, M)`, True or 1 at real image tokens; None: those that a captured VV allows, else all.

        Raises:
            ValueError: blocks or masks whose sizes don't fit each other, blocks of different ranks or dtypes, tensors
                on several devices.

        Example:
            >>> S = torch.zeros
            >>> AttentionBlocks.from_streams(LL=S(1, 2, 2), LV=S(1, 2, 3), VV=S(1, 3, 3)).image_mask.shape
            torch.Size([1, 3])
        """
        scores, pairs = zip(*map(_scores_and_pairs, (LL, LV, VL, VV)), strict=True)
        return _join(*scores, text_mask, image_mask, *pairs)


Attention = Scores | AttentionBlocks | Source


@checked
def split_attention(S: Scores, n_text: NText, *, mask: Mask | None = None) -> AttentionBlocks:
    """Cut one layer's scores into the blocks LL, LV, VL, VV (Eq. 2).

    Where text and image each fill one span of the sequence in the whole batch, as with one boundary, the blocks are
    views of S. A ragged or interleaved layout is gathered without a loop over samples, and padded to the longest text
    and the longest image.

    Args:
        S: pre-softmax scores, `(batch, heads, length, length)` or `(batch, length, length)`; rows are queries.
        n_text: number of text tokens, which come first: one for all samples, or `(batch,)`; or a `TokenLayout`.
        mask: `(batch, length)`, True or 1 at real tokens; or which pairs may attend, bool, `(batch, length, length)`
            or broadcastable to `(batch, heads, length, length)`. A token that no query may attend to is not real.

    Returns:
        `AttentionBlocks`, 3-D where S is.

    Raises:
        ValueError: S not square, of another rank or not floating point; n_text a float or of another length than the
            batch; a mask of another shape; a boundary outside 0..length; a layout of another batch or length; tensors
            on several devices.

    Source:
        CACR (Pandey et al., ACL 2023), Eq. 2.

    Example:
        >>> blocks = split_attention(torch.arange(9.0).view(1, 3, 3), n_text=1)
        >>> blocks.LV.tolist(), blocks.VV.tolist()
        ([[[1.0, 2.0]]], [[[4.0, 5.0], [7.0, 8.0]]])
    """
    return cut(S, locate(S, n_text, mask))


@dataclass(frozen=True, eq=False)
class Located:
    """Where the tokens of a joint sequence are, and which pairs of them may attend."""

    text: Tensor
    """`(batch, length)` bool, True at real text tokens."""
    image: Tensor
    longest: tuple[int, int]
    """The most text and image tokens that a sample can have."""
    places: Places
    """Where text and image lie: spans, if each fills one in every sample, else positions."""
    padded: bool
    """False where both spans are known to be real throughout."""
    allowed: Quadrants[Tensor] | None = None
    """Block by block, where the mask says more than which tokens are real."""
    sees: Sees | None = None


def own_positions(text: Tensor, image: Tensor, longest: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Each sample's own text and image positions, in order, and then some others: `(batch, longest)` each."""
    of_text, of_image = ((~mask).int().argsort(dim=1, stable=True) for mask in (text, image))
    return of_text[:, : longest[0]], of_image[:, : longest[1]]


def locate(
    x: Tensor | Source, n_text: NText | None, mask: Tensor | None = None, source: Source | None = None
) -> Located:
    """Reads a boundary or layout and the masks once.

    Where the values of a mask of pairs must be looked at, that costs one synchronization for three questions: whether
    it says more than which tokens are real, and in how many samples text may attend to the image, and image to text.

    Args:
        x: scores, `(batch, [heads,] length, length)`, or anything with their shape and device.
        n_text: where the tokens are.
        mask: the caller's own.
        source: whose own mask counts too.
    """
    if n_text is None:
        raise ValueError("n_text is missing: pass the number of text tokens (int or tensor) or a TokenLayout")
    shape = x.shape
    if mask is not None:
        not_ambiguous(mask, shape[0], shape[-1])
    allowed = None if source is None else source.allowed
    if allowed is not None:
        if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
            raise wrong_allowed(source, allowed)  # type: ignore[arg-type]
        mask = joined(allowed, mask)
    batch, heads, length = shape[0], shape[1] if len(shape) == 4 else 0, shape[-1]
    if shape[-2] != length:
        raise ValueError(f"attention has {shape[-2]} queries and {length} keys: {REMEDIES['attention']}")
    tensor = n_text.text if isinstance(n_text, TokenLayout) else n_text if isinstance(n_text, Tensor) else None
    pairs = tokens = None
    if mask is not None or tensor is not None:
        same_device(attention=x, mask=mask, n_text=tensor)
    if mask is not None:
        pairs = as_pairs(mask)
        if not heads and len(shape) == 3 and pairs.shape[1] > 1:
            raise ValueError(
                f"the mask is for {pairs.shape[1]} heads, and the scores {tuple(shape)} have none: "
                "pass scores (batch, heads, length, length), or a mask (batch, length, length)"
            )
        check_mask(mask, (batch, heads, length, length))
        tokens = pairs.any(1).any(1).expand(-1, length)
        one_row = all(pairs.shape[dim] == 1 or pairs.stride(dim) == 0 for dim in (1, 2))
        pairs = None if one_row else pairs.expand(batch, -1, length, length)
    if tensor is None:
        boundary = int(n_text)  # type: ignore[arg-type]
        if not 0 <= boundary <= length:
            raise boundary_error(boundary, length)
        is_text = torch.arange(length, device=x.device) < boundary
        text, image = is_text.expand(batch, length), (~is_text).expand(batch, length)
        if tokens is not None:
            text, image = text & tokens, image & tokens
        spans = (0, boundary), (boundary, length)
        where = Located(text, image, (boundary, length - boundary), spans, tokens is not None)
    else:
        layout = as_layout(n_text, tokens, batch, length)  # type: ignore[arg-type]
        text, image = layout.text.expand(batch, length), layout.image.expand(batch, length)
        longest = layout.max_text, layout.max_image
        where = Located(text, image, longest, layout._extent.spans or own_positions(text, image, longest), True)
    return where if pairs is None else _with_pairs(where, pairs)


def cut(S: Tensor, where: Located) -> AttentionBlocks:
    """Eq. 2: S = [[LL, LV], [VL, VV]], as views where text and image fill spans."""
    masks = take(where.text, where.places, 1)[0], take(where.image, where.places, 1)[1]
    return AttentionBlocks(*quadrants(S, where.places), *masks, where.allowed, where.padded, where.sees)


def quadrants(S: Tensor, places: Places) -> Quadrants[Tensor]:
    """The four parts of a square tensor: rows first, then columns."""
    text, image = take(S, places, -2)
    return Quadrants(*take(text, places, -1), *take(image, places, -1))


def take(x: Tensor, places: Places, dim: int) -> tuple[Tensor, Tensor]:
    """Text and image along one dimension: views for spans, gathered for positions."""
    text, image = places
    if isinstance(text, Tensor) or isinstance(image, Tensor):
        return _gather(x, text, dim), _gather(x, image, dim)  # type: ignore[arg-type]
    in_order = text[1] <= image[0]
    (a, b), (c, d) = (text, image) if in_order else (image, text)
    # One split: its backward is one concatenation, while each slice's backward fills a tensor as large as x with zeros.
    _, first, _, second, _ = x.split([a, b - a, c - b, d - c, x.shape[dim] - d], dim)
    return (first, second) if in_order else (second, first)


def _gather(x: Tensor, index: Tensor, dim: int) -> Tensor:
    # Not take_along_dim: with its broadcasting, torch.compile makes a graph for each batch size.
    shape, wide = [index.shape[0]] + [1] * (x.dim() - 1), list(x.shape)
    shape[dim] = wide[dim] = index.shape[1]
    return x.gather(dim, index.view(shape).expand(wide))


def both_modalities(text: Tensor, image: Tensor) -> Tensor:
    """`(batch,)`: samples with at least one token of each modality."""
    return text.any(-1) & image.any(-1)


def outer(rows: Tensor, columns: Tensor) -> Tensor:
    """`(batch, 1, rows, columns)` bool: pairs of real tokens."""
    return rows[:, None, :, None] & columns[:, None, None, :]


def which_see(text: Tensor, image: Tensor, allowed: Quadrants[Tensor]) -> tuple[Tensor, Tensor]:
    """`(batch,)` each: whether any pair of LV may attend, and any of VL."""
    LV, VL = outer(text, image) & allowed.LV, outer(image, text) & allowed.VL
    return LV.flatten(1).any(1), VL.flatten(1).any(1)


def how_many_see(text: Tensor, image: Tensor, allowed: Quadrants[Tensor], *more: Tensor) -> list[int]:
    """`Sees`, and more counts beside it, in one synchronization."""
    LV, VL = which_see(text, image, allowed)
    counts = both_modalities(text, image).sum(), LV.sum(), VL.sum(), (LV & VL).sum(), *more
    return torch.stack(counts).tolist()


def _with_pairs(where: Located, pairs: Tensor) -> Located:
    allowed = quadrants(pairs, where.places)
    sees = None
    if readable(pairs):
        text, image = take(where.text, where.places, 1)[0], take(where.image, where.places, 1)[1]
        *sees, differ = how_many_see(text, image, allowed, (pairs != pairs[:, :1, :1]).sum())
        if not differ:
            return where
    # Not dataclasses.replace, which torch.compile of torch 2.6 cannot trace.
    return Located(where.text, where.image, where.longest, where.places, where.padded, allowed, sees)


def _scores_and_pairs(x: Any) -> tuple[Any, Tensor | None]:
    # `_join` checks what is neither a tensor nor a source.
    return (x.scores, x.allowed) if hasattr(type(x), "scores") else (x, None)


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

    def token_mask(mask: Tensor | None, own: Tensor, block: Tensor) -> Tensor:
        return mask.bool() if mask is not None else own.any(1).any(1).expand(block.shape[0], block.shape[-1])

    masks = token_mask(text_mask, LL_pairs, LL), token_mask(image_mask, VV_pairs, VV)
    allowed = None
    if any(pair is not None for pair in pairs):
        allowed = Quadrants(LL_pairs, LV_pairs, VL_pairs, VV_pairs)
    known = text_mask is None and image_mask is None and allowed is None
    return AttentionBlocks(LL, LV, VL, VV, *masks, allowed, _padded=not known)
