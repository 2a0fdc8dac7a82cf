"""The oracles: Algorithm 1 of CACR and its hard-aligned ancestor, literal loops over (sample, head, i, j).

Slow on purpose. They share with the losses how input is read and refused, and no mathematics. Each sample is cut to its
own tokens first, so the only masks below say which pairs may attend. Gradients flow.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attncongruence._typing import Alignment, Direction, Impl, Reduction, at_least_float32, checked, one_of, values_of
from attncongruence.blocks import Attention, AttentionBlocks, NText
from attncongruence.conventions import RELEASED, Convention, ConventionLike
from attncongruence.layout import Mask
from attncongruence.losses import LOSSES, check_options
from attncongruence.maps import read_blocks, zero_losses

Maps = dict[str, Tensor]
Rows = Callable[[Maps, Maps, Convention], list[Tensor]]


@checked
def soft_equivalence_loop(
    attention: Attention,
    n_text: NText | None = None,
    *,
    mask: Mask | None = None,
    convention: ConventionLike = RELEASED,
    direction: Direction = "both",
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """CACR by Algorithm 1: same arguments, errors and result as `cacr_loss`, one entry of R after the other.

    Source:
        CACR (Pandey et al., ACL 2023), Algorithm 1: for each pair (i, j) of text tokens, the mean of VV with weights
        E[i] (outer) E[j]; then m-KL (Eq. 4), row by row.
    """

    def rows(maps: Maps, pairs: Maps, convention: Convention) -> list[Tensor]:
        E = maps["LV"]
        if convention.equivalence == "softmax":
            E = _each_row(E / convention.temperature, pairs["LV"])
        E = E.detach() if convention.detach_equivalence else E
        losses = []
        # A weighted mean of the pairs that may attend, of scores less their row's log-sum-exp
        mean = convention.blocks == "scores" and convention.equivalence == "softmax" and not pairs["VV"].all()
        VV = _each_row(maps["VV"], pairs["VV"], torch.log_softmax) if mean else maps["VV"]
        for i in range(E.shape[0]):
            R, counted = [], []
            for j in range(E.shape[0]):
                weights = E[i][:, None] * E[j][None, :]
                counted.append(pairs["LL"][i, j])
                if mean:
                    weights = torch.where(pairs["VV"], weights, 0.0)
                    counted[-1] = counted[-1] & (weights.sum() > 0)
                    weights = weights / weights.sum() if counted[-1] else weights
                # R[i, j] = sum_kp E[i, k] E[j, p] VV[k, p]
                R.append((weights * VV).sum())
            losses.append(_m_kl(torch.stack(R), maps["LL"][i], torch.stack(counted), convention.target_softmax))
        return losses

    return _loop("cacr", attention, n_text, mask, convention, direction, reduction, impl, rows)


@checked
def hard_equivalence_loop(
    attention: Attention,
    n_text: NText | None = None,
    *,
    mask: Mask | None = None,
    alignment: Alignment = "singular",
    convention: ConventionLike = RELEASED,
    direction: Direction = "both",
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """IAIS entry by entry: same arguments, errors and result as `iais_loss`.

    Source:
        IAIS (Ren et al., ACL 2021), Section 3, and its released code.
    """

    def singular(maps: Maps, pairs: Maps, convention: Convention) -> list[Tensor]:
        N, losses = range(maps["LV"].shape[0]), []
        best = [
            int(maps["LV"][i].masked_fill(~pairs["LV"][i], -torch.inf).argmax()) if pairs["LV"][i].any() else 0
            for i in N
        ]
        for i in N:
            R = torch.stack([maps["VV"][best[i], best[j]] for j in N])
            counted = torch.stack([pairs["LL"][i, j] & pairs["VV"][best[i], best[j]] for j in N])
            losses.append(_m_kl(R, maps["LL"][i], counted, convention.iais_target_softmax))
        return losses

    def distributed(maps: Maps, pairs: Maps, convention: Convention) -> list[Tensor]:
        N, eps, losses = range(maps["LV"].shape[0]), convention.epsilon, []
        for i in N:
            loss = maps["LL"].new_zeros(())
            for j in N:
                if pairs["LL"][i, j]:
                    p, t = (maps["LV"][i] * maps["VL"][:, j]).sum(), maps["LL"][i, j]
                    # KL(P || T) + KL(T || P), epsilon inside the second logarithm of each; 0 log 0 = 0
                    for x, y in ((p, t), (t, p)):
                        loss = loss + (x * (x.log() - (y + eps).log()) if x > 0 else 0.0)
            losses.append(loss)
        return losses

    one_of("alignment", alignment, ("singular", "distributed"))
    rows = singular if alignment == "singular" else distributed
    return _loop(alignment, attention, n_text, mask, convention, direction, reduction, impl, rows)


def _loop(
    name: str,
    attention: Attention,
    n_text: NText | None,
    mask: Tensor | None,
    convention: ConventionLike,
    direction: Direction,
    reduction: Reduction,
    impl: Impl,
    rows: Rows,
) -> Tensor:
    """Loop over samples and directions, cut each sample to its own tokens, and reduce."""
    convention = check_options(LOSSES[name], convention, direction, reduction, impl)
    blocks = read_blocks(attention, n_text, mask, LOSSES[name].needs, convention, direction)
    values_of(attention=blocks.LL)
    losses, present = [], 0
    for sample in range(blocks.LL.shape[0]):
        text, image = (m[sample].nonzero()[:, 0] for m in (blocks.text_mask, blocks.image_mask))
        loss = zero_losses(blocks.LV)[sample]
        if len(text) and len(image):
            present += 1
            scores, pairs = _sample(blocks, sample, {"L": text, "V": image})
            if direction in ("both", "language"):
                loss = loss + _one_side(scores, pairs, convention, rows)
            if direction in ("both", "vision"):
                loss = loss + _one_side(_swapped(scores), _swapped(pairs), convention, rows)
        losses.append(loss)
    each = torch.stack(losses) if losses else zero_losses(blocks.LV)
    return {"none": each, "sum": each.sum(), "mean": each.sum() / max(present, 1)}[reduction]


def _sample(blocks: AttentionBlocks, sample: int, tokens: dict[str, Tensor]) -> tuple[Maps, Maps]:
    """One sample's blocks and pairs, `(heads, ., .)`, cut to its own tokens."""
    scores, pairs = {}, {}
    for name in ("LL", "LV", "VL", "VV"):
        block = getattr(blocks, name)
        if block is None:
            continue
        rows, columns = tokens[name[0]], tokens[name[1]]
        allowed = torch.ones_like(block, dtype=torch.bool)
        if blocks.allowed is not None:
            allowed = allowed & getattr(blocks.allowed, name)
        scores[name] = at_least_float32(block[sample][:, rows][:, :, columns])
        pairs[name] = allowed[sample][:, rows][:, :, columns]
    return scores, pairs


def _swapped(maps: Maps) -> Maps:
    """L and V exchanged."""
    return {name.translate(str.maketrans("LV", "VL")): block for name, block in maps.items()}


def _one_side(scores: Maps, pairs: Maps, convention: Convention, rows: Rows) -> Tensor:
    """The language side of one sample, averaged over its heads or on the mean of its maps."""
    each_map = {
        name: [_map(scores[name][h], pairs[name][h], convention) for h in range(len(scores[name]))] for name in scores
    }
    maps: list[Maps]
    if convention.heads == "mean_map":
        maps = [{name: torch.stack(each_map[name]).mean(0) for name in scores}]
        each_pairs: list[Maps] = [{name: pairs[name].any(0) for name in pairs}]
    else:
        heads = range(len(scores["LL"]))
        maps = [{name: each_map[name][h] for name in scores} for h in heads]
        each_pairs = [{name: pairs[name][h] for name in pairs} for h in heads]
    losses = []
    for own_maps, own_pairs in zip(maps, each_pairs, strict=True):
        # A token that may attend to none of the other modality has no counterpart.
        matched = own_pairs["LV"].any(-1)
        own_pairs = own_pairs | {"LL": own_pairs["LL"] & matched[:, None] & matched[None, :]}
        row_losses = torch.stack(rows(own_maps, own_pairs, convention))
        counted = int(own_pairs["LL"].any(-1).sum())
        losses.append(row_losses.sum() / (max(counted, 1) if convention.rows == "mean" else 1))
    return torch.stack(losses).mean()


def _map(block: Tensor, pairs: Tensor, convention: Convention) -> Tensor:
    """One head's block in the convention's form; 0 where no pair may attend."""
    if convention.blocks == "probabilities":
        return _each_row(block, pairs)
    return torch.where(pairs, block, 0.0)


def _each_row(block: Tensor, pairs: Tensor, softmax: Callable[[Tensor, int], Tensor] = torch.softmax) -> Tensor:
    """Softmax, or its logarithm, of each row over the pairs that may attend; 0 at the others."""
    result = torch.zeros_like(block)
    for i in range(block.shape[0]):
        if pairs[i].any():
            result[i, pairs[i]] = softmax(block[i, pairs[i]], -1)
    return result


def _m_kl(a: Tensor, b: Tensor, counted: Tensor, softmax_target: bool) -> Tensor:
    """Eq. 4 for one row, over the entries that count: KL(P || T) + KL(T || P), a logits, b logits or probabilities."""
    log_p = a[counted].log_softmax(-1)
    log_t = b[counted].log_softmax(-1) if softmax_target else b[counted].log().log_softmax(-1)
    return (log_p.exp() * (log_p - log_t)).sum() + (log_t.exp() * (log_t - log_p)).sum()
