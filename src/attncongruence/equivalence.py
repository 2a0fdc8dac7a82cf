"""From blocks to maps, and E: which image tokens stand for each text token. `docs/mathematics.md`, "A change of basis".

Everything here is written for the language side. The vision side is the same on `blocks.swap()`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attncongruence._precision import at_least_float32
from attncongruence.blocks import AttentionBlocks
from attncongruence.conventions import Convention
from attncongruence.quadrants import Quadrants

Masks = Quadrants[Tensor | None]


def entries(blocks: AttentionBlocks) -> Masks:
    """Which entries of each block count, bool, broadcastable to the blocks; None: all of them.

    Left out are padding, disallowed pairs, and samples without text or without image.
    """
    if not blocks.padded and blocks.allowed is None:
        return Quadrants(None, None, None, None)
    both = blocks.text_mask.any(-1, keepdim=True) & blocks.image_mask.any(-1, keepdim=True)
    text, image = blocks.text_mask & both, blocks.image_mask & both
    LL, LV, VL, VV = _outer(text, text), _outer(text, image), _outer(image, text), _outer(image, image)
    if blocks.allowed is None:
        return Quadrants(LL, LV, VL, VV)
    return Quadrants(*(mask & pairs for mask, pairs in zip((LL, LV, VL, VV), blocks.allowed, strict=True)))


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    return rows[:, None, :, None] & columns[:, None, None, :]


def without_unmatched(masks: Masks) -> Tensor | None:
    """The entries of LL between tokens that may attend to the other modality: the others have no counterpart."""
    if masks.LL is None or masks.LV is None:
        return None
    matched = masks.LV.any(-1)
    return masks.LL & matched[..., :, None] & matched[..., None, :]


def attention_map(block: Tensor, mask: Tensor | None, convention: Convention) -> Tensor:
    """A block in the convention's form, `(batch, heads or 1, rows, columns)`; entries that don't count are 0."""
    block = at_least_float32(block)
    if convention.blocks == "probabilities":
        block = fill(block, mask, torch.finfo(block.dtype).min / 2).softmax(-1)
        if convention.heads == "mean_map" and (mask is None or mask.shape[1] == 1):
            # One mask for all heads: what the softmax left in rows of padding can wait for the mean to be taken.
            return fill(block.mean(1, keepdim=True), mask, 0.0)
    block = fill(block, mask, 0.0)
    # mean_h softmax(S_h), or the heads as they are
    return block.mean(1, keepdim=True) if convention.heads == "mean_map" else block


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


def project_weighted(E: Tensor, VV: Tensor, masks: Masks) -> tuple[Tensor, Tensor | None]:
    """`project` of raw scores by weights, where some pairs of VV may not attend: the weighted mean of those that may.

    Attention leaves open what is added to a whole row of scores. Here too: each score is taken less the log-sum-exp of
    its row, which without disallowed pairs would cancel.

    Returns:
        R, `(batch, heads, N, N)`, and which of its entries count: those with any weight on pairs that may attend.
    """
    if masks.VV is None:
        return project(E, VV), masks.LL
    floor = torch.finfo(VV.dtype).min / 2
    log_map = fill(fill(VV, masks.VV, floor).log_softmax(-1), masks.VV, 0.0)
    # R[i, j] = sum_kp E[i, k] E[j, p] log sigma(VV)[k, p] / sum_kp E[i, k] E[j, p], over the pairs (k, p) allowed
    weight = project(E, masks.VV.to(E.dtype))
    some = weight > 0
    R = fill(project(E, log_map), some, 0.0) / fill(weight, some, 1.0)
    return R, some if masks.LL is None else masks.LL & some


def project_singular(LV: Tensor, VV: Tensor, masks: Masks) -> tuple[Tensor, Tensor | None]:
    """`project` for E = one_hot(argmax LV), by a gather: IAIS's singular alignment.

    Returns:
        R, `(batch, heads, N, N)`, and which of its entries count: those whose image pair may attend.
    """
    best, index = fill(LV, masks.LV, -torch.inf).detach().max(-1)

    def pick(x: Tensor) -> Tensor:
        rows = x.gather(-2, index[..., :, None].expand(-1, -1, -1, x.shape[-1]))
        return rows.gather(-1, index[..., None, :].expand(-1, -1, index.shape[-1], -1))

    # R[i, j] = VV[argmax_k LV[i, k], argmax_p LV[j, p]]
    R, counted = pick(VV), masks.LL
    if masks.LL is not None and masks.VV is not None:
        counted = masks.LL & pick(masks.VV.expand(*R.shape[:2], *VV.shape[-2:]))
    if masks.LV is not None:
        best = fill(best, masks.LV.any(-1), 0.0)
    # A NaN in LV has no argmax, and one in VV may stand where nothing is picked: neither may pass unseen.
    nan_or_0 = 0 * best[..., None] + 0 * VV.detach().amax((-2, -1), keepdim=True)
    return R + nan_or_0, counted


def fill(x: Tensor, mask: Tensor | None, value: float) -> Tensor:
    """`x` where the mask holds, the value elsewhere: NaN and infinities there pass on neither value nor gradient."""
    return x if mask is None else x.masked_fill(~mask, value)
