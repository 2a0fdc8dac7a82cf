"""From what a loss is given to maps, E, and the projection E VV E^T: `docs/mathematics.md`, "A change of basis".

Everything here is written for the language side. The vision side is the same with L and V exchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attncongruence._typing import at_least_float32, readable, warn
from attncongruence.blocks import (
    Attention,
    AttentionBlocks,
    Located,
    NText,
    Quadrants,
    both_modalities,
    cut,
    how_many_see,
    locate,
    outer,
    which_see,
)
from attncongruence.conventions import RELEASED, Convention
from attncongruence.sources import wrong_scores

Masks = Quadrants[Tensor | None]


@dataclass(frozen=True, eq=False)
class Maps:
    """The blocks as one side of a loss sees them, in the convention's form, `(batch, heads or 1, rows, columns)`."""

    LL: Tensor
    LV: Tensor
    VL: Tensor
    VV: Tensor
    counted: Masks
    """Which entries count, bool; None: all. LL: between tokens that have a counterpart; VV: pairs that may attend."""
    scores: Tensor
    """LL before the convention's form, `(batch, heads, N, N)`."""
    mask: Tensor | None
    """Its entries that count, head by head."""


def sides(blocks: AttentionBlocks, convention: Convention, direction: str, *, both_ways: bool) -> list[Maps]:
    """The language side of the blocks, their vision side, or both; each map is made once.

    Args:
        blocks: 4-D.
        convention: the form of the maps.
        direction: `"language"`, `"vision"` or `"both"`.
        both_ways: whether the language side needs VL too, and the vision side LV.
    """
    masked, pairs = blocks._padded or blocks.allowed is not None, blocks.allowed is not None
    masks: Masks = entries(blocks) if masked else Quadrants(None, None, None, None)
    language, vision = direction != "vision", direction != "language"
    empty = blocks.LL.new_empty(0)
    LL = attention_map(blocks.LL, masks.LL, convention)
    VV = attention_map(blocks.VV, masks.VV, convention)
    LV = attention_map(blocks.LV, masks.LV, convention) if language or both_ways else empty
    VL = attention_map(blocks.VL, masks.VL, convention) if blocks.VL is not None and (vision or both_ways) else empty
    found = []
    if language:
        counted = counted_entries(masks, convention, pairs) if masked else masks
        found.append(Maps(LL, LV, VL, VV, counted, blocks.LL, masks.LL))
    if vision:
        counted = counted_entries(masks.swap(), convention, pairs) if masked else masks
        found.append(Maps(VV, VL, LV, LL, counted, blocks.VV, masks.VV))
    return found


def entries(blocks: AttentionBlocks) -> Masks:
    """Which entries of each block count, bool, broadcastable to the blocks; None: all of them.

    Padding, pairs that may not attend, and samples without text or without image do not count.
    """
    if not blocks._padded and blocks.allowed is None:
        return Quadrants(None, None, None, None)
    both = both_modalities(blocks.text_mask, blocks.image_mask)[:, None]
    text, image = blocks.text_mask & both, blocks.image_mask & both
    masks = Quadrants(outer(text, text), outer(text, image), outer(image, text), outer(image, image))
    if blocks.allowed is None:
        return masks  # type: ignore[return-value]
    return Quadrants(*(mask & pairs for mask, pairs in zip(masks, blocks.allowed, strict=True)))


def read_blocks(
    attention: Attention,
    n_text: NText | None,
    mask: Tensor | None,
    needs: tuple[str, ...] | None = None,
    convention: Convention = RELEASED,
    direction: str = "both",
    where: Located | None = None,
) -> AttentionBlocks:
    """The 4-D blocks of what a function was given; a ValueError where a loss that needs certain blocks is not defined.

    A sample in which no pair of a block that the loss needs may attend keeps no token.

    Args:
        attention: and `n_text`, `mask`, `convention`, `direction`: as in `cacr_loss`.
        needs: the cross-modal blocks of the loss's language side; None: no loss, nothing is checked.
        where: the positions, if they were read before.
    """
    if isinstance(attention, AttentionBlocks):
        if n_text is not None or mask is not None:
            raise ValueError("AttentionBlocks carry their own boundary and masks: leave n_text and mask out")
        blocks = attention if attention.LL.dim() == 4 else attention.with_heads()
    else:
        S, source = (attention, None) if isinstance(attention, Tensor) else (attention.scores, attention)
        if source is not None and not (isinstance(S, Tensor) and S.dim() in (3, 4) and S.is_floating_point()):
            raise wrong_scores(source, S)
        where = locate(S, n_text, mask, source) if where is None else where
        blocks = cut(S if S.dim() == 4 else S[:, None], where)
    if needs is None:
        return blocks
    cross = set(needs) if direction == "language" else set(map(_SWAPPED.__getitem__, needs))
    if direction == "both":
        cross |= set(needs)
    heads = []
    for name in ("LL", "VV", *sorted(cross)):
        block = getattr(blocks, name)
        if block is None:
            raise ValueError(f"these blocks have no {name}, which this loss and direction need: {_REMEDY[name]}")
        heads.append(block.shape[1])
    if 0 in heads:
        raise ValueError("the attention has 0 heads, and a loss is a mean over at least one")
    if convention.heads == "mean_loss" and min(heads) < max(heads):
        raise ValueError(
            f"the blocks have different numbers of heads, {sorted(set(heads))}: use a convention with heads='mean_map'"
        )
    return blocks if blocks.allowed is None else _samples_that_count(blocks, cross)


_SWAPPED = {"LV": "VL", "VL": "LV"}


def _samples_that_count(blocks: AttentionBlocks, cross: set[str]) -> AttentionBlocks:
    """The blocks without the tokens of samples in which no pair of a block that the loss needs may attend."""
    assert blocks.allowed is not None
    sees = blocks._sees
    if sees is None and readable(blocks.LL, *blocks.allowed):
        sees = how_many_see(blocks.text_mask, blocks.image_mask, blocks.allowed)
    if sees is not None:
        some, LV_seen, VL_seen, both_seen = sees
        count = both_seen if len(cross) > 1 else VL_seen if "VL" in cross else LV_seen
        if count == some:
            return blocks
        if not count and LV_seen and "VL" in cross:
            raise ValueError(
                "no pair of VL may attend in any sample whose text sees the image, as in causal decoders: "
                f"{_REMEDY['VL']}. If that is not so in this model, {_WRONG_LAYOUT}"
            )
        if not count:
            warn(
                "in no sample of the batch may text attend to the image (in a causal decoder, text must come after it),"
                f" so the congruence loss is exactly 0: {_REMEDY['LV']}. If that is not so, {_WRONG_LAYOUT}"
            )
    LV, VL = which_see(blocks.text_mask, blocks.image_mask, blocks.allowed)
    counts = (LV & VL if len(cross) > 1 else VL if "VL" in cross else LV)[:, None]
    text, image = blocks.text_mask & counts, blocks.image_mask & counts
    return AttentionBlocks(blocks.LL, blocks.LV, blocks.VL, blocks.VV, text, image, blocks.allowed)


_WRONG_LAYOUT = "n_text or the layout is wrong: where does the image stand?"
_REMEDY = {
    "LV": "text tokens must see image tokens; direction='vision' of cacr_loss or of singular alignment does without",
    "VL": "image tokens must see text tokens; direction='language' of cacr_loss or of singular alignment does without",
}
"""What a loss needs where a cross-modal block is missing or hidden, and what does without it."""


def counted_entries(masks: Masks, convention: Convention, pairs: bool) -> Masks:
    """The entries that count for one side; `pairs` says that pairs are left out, and not only tokens."""
    if convention.heads == "mean_map":
        masks = Quadrants(*(None if mask is None else mask.any(1, keepdim=True) for mask in masks))
    assert masks.LL is not None
    assert masks.LV is not None
    # A token that may attend to no token of the other modality has no counterpart.
    matched = masks.LV.any(-1)
    LL = masks.LL & matched[..., :, None] & matched[..., None, :]
    # Where only tokens are left out, their pairs in VV have no weight in E.
    return Quadrants(LL, masks.LV, masks.VL, masks.VV if pairs else None)


def attention_map(block: Tensor, mask: Tensor | None, convention: Convention) -> Tensor:
    """A block in the convention's form, `(batch, heads or 1, rows, columns)`; entries that don't count are 0."""
    block = at_least_float32(block)
    if mask is not None and convention.blocks == "probabilities":
        block = fill(block, mask, torch.finfo(block.dtype).min / 2)
    if convention.blocks == "probabilities":
        block = block.softmax(-1)
    if mask is not None and mask.shape[1] > 1:
        block = fill(block, mask, 0.0)
    # mean_h softmax(S_h), or the heads as they are
    block = block.mean(1, keepdim=True) if convention.heads == "mean_map" else block
    # With one mask for all heads, entries that don't count are set to 0 after the mean, in one map.
    return fill(block, mask, 0.0) if mask is not None and mask.shape[1] == 1 else block


def log_attention_map(block: Tensor, mask: Tensor | None, convention: Convention) -> Tensor:
    """Logarithm of `attention_map` of probabilities, finite also where a probability underflows to 0."""
    block = at_least_float32(block)
    floor = torch.finfo(block.dtype).min / 2
    log_map = fill(fill(block, mask, floor).log_softmax(-1), mask, floor)
    if convention.heads == "mean_map":
        # log mean_h exp(log softmax(S_h))
        log_map = log_map.logsumexp(1, keepdim=True) - math.log(block.shape[1])
    return log_map


def equivalence(LV: Tensor, mask: Tensor | None, convention: Convention) -> Tensor:
    """E of CACR from a map of text on image, `(batch, heads, N, M)`: a row for each text token."""
    E = LV
    if convention.equivalence == "softmax":
        # E = softmax(LV / tau)
        E = fill(LV / convention.temperature, mask, torch.finfo(LV.dtype).min / 2).softmax(-1)
    return E.detach() if convention.detach_equivalence else E


def project(E: Tensor, VV: Tensor) -> Tensor:
    """The vision attention seen in the language basis, `(batch, heads, N, N)`: Eq. 3 and 5, Algorithm 1."""
    # R = E VV E^T
    return E @ VV @ E.mT


def project_weighted(E: Tensor, VV: Tensor, counted: Masks) -> tuple[Tensor, Tensor | None]:
    """`project` of raw scores by weights, as the weighted mean over those pairs of VV that may attend.

    Softmax is invariant to row shifts, and this mean shall be, too: from each score it takes the log-sum-exp of its
    row. Where all pairs may attend, that cancels.

    Returns:
        R, `(batch, heads, N, N)`, and which of its entries count: those with any weight on pairs that may attend.
    """
    assert counted.VV is not None
    floor = torch.finfo(VV.dtype).min / 2
    log_map = fill(fill(VV, counted.VV, floor).log_softmax(-1), counted.VV, 0.0)
    # R[i, j] = sum_kp E[i, k] E[j, p] log sigma(VV)[k, p] / sum_kp E[i, k] E[j, p], over the pairs (k, p) allowed
    weight = project(E, counted.VV.to(E.dtype))
    some = ~(weight <= 0)  # NaN counts
    R = fill(project(E, log_map), some, 0.0) / fill(weight, some, 1.0)
    return R, some if counted.LL is None else counted.LL & some


def project_singular(LV: Tensor, VV: Tensor, counted: Masks) -> tuple[Tensor, Tensor | None]:
    """`project` for E = one_hot(argmax LV), by a gather: IAIS's singular alignment.

    Returns:
        R, `(batch, heads, N, N)`, and which of its entries count: those whose image pair may attend.
    """
    best, index = fill(LV, counted.LV, -torch.inf).detach().max(-1)
    # R[i, j] = VV[argmax_k LV[i, k], argmax_p LV[j, p]]
    R, compared = _pick(VV, index), counted.LL
    if counted.LL is not None and counted.VV is not None:
        compared = counted.LL & _pick(counted.VV.expand(*R.shape[:2], *VV.shape[-2:]), index)
    if counted.LV is not None:
        best = fill(best, counted.LV.any(-1), 0.0)
    # A NaN in LV has no argmax, and one in VV may not be picked: neither may get lost.
    nan_or_0 = 0 * best[..., None] + 0 * VV.detach().amax((-2, -1), keepdim=True)
    return R + nan_or_0, compared


def _pick(x: Tensor, index: Tensor) -> Tensor:
    rows = x.gather(-2, index[..., :, None].expand(-1, -1, -1, x.shape[-1]))
    return rows.gather(-1, index[..., None, :].expand(-1, -1, index.shape[-1], -1))


def fill(x: Tensor, mask: Tensor | None, value: float) -> Tensor:
    """`x` where the mask holds, the value elsewhere: NaN and infinities there pass on neither value nor gradient."""
    return x if mask is None else x.masked_fill(~mask, value)


def zero_losses(x: Tensor) -> Tensor:
    """`(batch,)` losses of samples without entries, from a 4-D tensor: exactly 0, with a gradient of exactly 0."""
    return at_least_float32(x)[..., :0].sum((1, 2, 3))
