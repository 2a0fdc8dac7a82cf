"""Metrics of the papers: Winoground scores, recall, IAIS's attention distance, CACR's argmax entropy.

`docs/metrics.md` shows how to accumulate them over batches and processes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.nn import functional as F

from attncongruence._typing import Count, OneDirection, Reduction, checked, one_of, same_device, values_of
from attncongruence.blocks import Attention, AttentionBlocks, NText, Quadrants, both_modalities
from attncongruence.conventions import WEIGHTED_MEAN, ConventionLike
from attncongruence.layout import Mask
from attncongruence.losses import LOSSES, check_options, iais_loss
from attncongruence.maps import attention_map, entries, fill, read_blocks


class WinogroundScores(NamedTuple):
    """Percentage of examples that are right. Chance: 25, 25 and 16.67."""

    text: float
    """Both images prefer their own caption."""
    image: float
    """Both captions prefer their own image."""
    group: float
    """Both of these."""


@checked
def winoground_scores(s: Float[Tensor, "n 2 2"] | Integer[Tensor, "n 2 2"]) -> WinogroundScores:
    """Text, image and group score of Winoground, in percent.

    With `s(c, i)` the score of caption c and image i, an example is right for

        text:  s(0, 0) > s(1, 0) and s(1, 1) > s(0, 1)
        image: s(0, 0) > s(0, 1) and s(1, 1) > s(1, 0)
        group: all four

    All inequalities are strict: a tie is wrong, so that a model blind to word order scores 0.

    Args:
        s: `(examples, captions, images)`, higher for a better match; matched pairs are on the diagonal.

    Returns:
        `(text, image, group)` in percent, each 0 to 100; random scores give 25, 25 and 16.67.

    Raises:
        ValueError: another shape, no example, NaN in the scores.

    Source:
        Thrush et al., CVPR 2022, Section 3; CACR (Pandey et al., ACL 2023), Table 2.

    Example:
        The first example is right. In the second, each image prefers its own caption, but caption 0 the wrong image.

        >>> winoground_scores(torch.tensor([[[0.9, 0.1], [0.2, 0.8]], [[0.5, 0.6], [0.4, 0.7]]]))
        WinogroundScores(text=100.0, image=50.0, group=50.0)
    """
    s = _comparable("s", s)
    text = (s[:, 0, 0] > s[:, 1, 0]) & (s[:, 1, 1] > s[:, 0, 1])
    image = (s[:, 0, 0] > s[:, 0, 1]) & (s[:, 1, 1] > s[:, 1, 0])
    right = torch.stack([text, image, text & image], 1)
    return WinogroundScores(*(100 * right.double().mean(0)).tolist())


@checked
def recall_at_k(
    scores: Float[Tensor, "queries candidates"] | Integer[Tensor, "queries candidates"],
    k: Count = 1,
    relevant: Bool[Tensor, "queries candidates"] | Integer[Tensor, " queries"] | None = None,
) -> float:
    """R@k of retrieval: percentage of queries with a relevant candidate among the best k.

    A query counts if fewer than k irrelevant candidates score as high as its best relevant one or higher: ties count
    as wrong.

    Args:
        scores: one row for each query, higher for a better match.
        k: number of candidates that are looked at, 1 to all.
        relevant: index of the relevant candidate of each query, or a mask of all relevant ones; None: the diagonal of
            square scores.

    Returns:
        Percentage of the queries, 0 to 100.

    Raises:
        ValueError: shapes that don't match, k out of range, no query, NaN in the scores, a query without a relevant
            candidate, no `relevant` for scores that are not square.

    Source:
        As in IAIS (Ren et al., ACL 2021), Section 4. The rule for ties is ours.

    Example:
        The second query has its own candidate in second place, because of a tie.

        >>> scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
        >>> round(recall_at_k(scores, 1), 2), recall_at_k(scores, 2)
        (66.67, 100.0)
    """
    scores = _comparable("scores", scores)
    queries, candidates = scores.shape
    if not 1 <= k <= candidates:
        raise ValueError(f"k={k} is out of range: {candidates} candidates allow 1 to {candidates}")
    if relevant is None:
        if queries != candidates:
            raise ValueError(
                f"scores has {queries} queries and {candidates} candidates: without relevant= it must be square, with "
                "each query's own candidate on the diagonal"
            )
        relevant = torch.arange(queries, device=scores.device)
    same_device(scores=scores, relevant=relevant)
    values_of(relevant=relevant)
    if relevant.dtype != torch.bool:
        relevant = relevant.long()
        if bool(((relevant < 0) | (relevant >= candidates)).any()):
            raise ValueError(f"relevant must name candidates 0 to {candidates - 1}, got {relevant.tolist()}")
        relevant = F.one_hot(relevant, candidates).bool()
    if not bool(relevant.any(1).all()):
        raise ValueError("every query needs a relevant candidate: leave the others out")
    least = -torch.inf if scores.is_floating_point() else torch.iinfo(scores.dtype).min
    best = fill(scores, relevant, least).amax(1, keepdim=True)
    # number of irrelevant candidates that are as good as the best relevant one
    ahead = ((scores >= best) & ~relevant).sum(1)
    return float(100 * (ahead < k).double().mean())


@torch.no_grad()
@checked
def attention_distance(
    attention: Attention,
    n_text: NText | None = None,
    *,
    mask: Mask | None = None,
    regions: Integer[Tensor, "batch text"] | None = None,
    convention: ConventionLike = WEIGHTED_MEAN,
    reduction: Reduction = "mean",
) -> Float[Tensor, "..."]:
    """Intra-modal self-attention distance: m-KL(sigma(R), sigma(LL)) with R[i, j] = VV[a_i, a_j].

    a_i is the region that belongs to text token i. With annotated regions this is IAIS's metric of relation consistency
    (ISDa); tokens without a region are left out. Without annotation, a_i is the region that token i attends to most,
    and the distance is the language side of `iais_loss` with singular alignment, without gradient.

    Args:
        attention: as in `iais_loss`, like `n_text`, `mask` and `reduction`.
        regions: `(batch, text)`: for each text token of a sample, in order, the index of its region among the sample's
            image tokens; -1 for a token without region, and after the tokens of shorter samples.
        convention: `WEIGHTED_MEAN` compares scores in each head and takes the mean over rows and heads; `PRINTED` takes
            the sum over rows. `RELEASED` is the training loss of the released code. It softmaxes R a second time, so it
            is not 0 where text and regions attend alike.

    Returns:
        The distance in nats, >= 0; for `"mean"`, over samples with both modalities and a region. For conventions on
        scores it is 0 if and only if text and regions attend alike.

    Raises:
        ValueError: as `iais_loss`, and for regions out of range or of another shape.

    Source:
        IAIS (Ren et al., ACL 2021), Section 3, after its abstract and released loss; `docs/paper-map.md`.

    Example:
        Token 0 attends to the text with (3/4, 1/4), and its region attends to the regions with (1/2, 1/2); token 1 and
        its region agree. The distance is the mean of log(3) / 4 and 0.

        >>> S = torch.zeros(1, 4, 4)
        >>> S[0, 0, 0] = torch.tensor(3.0).log()
        >>> attention_distance(S, n_text=2, regions=torch.tensor([[0, 1]]))
        tensor(0.1373)
    """
    if regions is not None:
        attention, n_text, mask = _annotated(read_blocks(attention, n_text, mask), regions), None, None
    return iais_loss(attention, n_text, mask=mask, convention=convention, direction="language", reduction=reduction)


@torch.no_grad()
@checked
def argmax_entropy(
    attention: Attention,
    n_text: NText | None = None,
    *,
    mask: Mask | None = None,
    convention: ConventionLike = WEIGHTED_MEAN,
    direction: OneDirection = "language",
    reduction: Reduction = "mean",
) -> Float[Tensor, "..."]:
    """How many image tokens the text attends to: the entropy of the places of its highest attention.

    With `a_i = argmax_k A_LV[i, k]` and `p_k` the share of text tokens with `a_i = k`,

        H = - sum_k p_k log p_k

    It is 0 if all text tokens attend to one image token, as they do when attention has collapsed; hard equivalence then
    compares the text with a single region. For `direction="vision"` it says how many text tokens the image attends to,
    from A_VL.

    Args:
        attention: as in `cacr_loss`, like `n_text`, `mask` and `reduction`.
        convention: `WEIGHTED_MEAN` takes the maximum in each head and the mean of the heads' entropies, like any
            convention with `heads="mean_loss"`; `RELEASED` takes the maximum in the mean map of the heads.
        direction: `"language"`: where text tokens look in the image; `"vision"`: where image tokens look in the text.

    Returns:
        Entropy in nats, 0 to log(min(text tokens, image tokens)); for `"mean"`, over samples with both modalities.
        Tokens that may not attend to the other modality are left out. The first of several maxima counts. It is NaN if
        an attention is NaN.

    Raises:
        ValueError: as `cacr_loss`.

    Source:
        After CACR (Pandey et al., ACL 2023), Section 5.2; `docs/paper-map.md`.

    Example:
        Of four tokens, two attend to image token 0 most, one at 1 and one at 2: H = log(2) / 2 + log(4) / 2.

        >>> S = torch.zeros(1, 7, 7)
        >>> S[0, torch.arange(4), torch.tensor([4, 4, 5, 6])] = 1.0
        >>> argmax_entropy(S, n_text=4)
        tensor(1.0397)
    """
    one_of("direction", direction, ("language", "vision"))
    loss = LOSSES["cacr"]
    convention = check_options(loss, convention, direction, reduction)
    blocks = read_blocks(attention, n_text, mask, loss.needs, convention, direction)
    masks = entries(blocks)
    if direction == "vision":
        blocks, masks = blocks.swap(), masks.swap()
    batch, heads, _, M = blocks.LV.shape
    counts = blocks.LL.new_zeros(batch, 1 if convention.heads == "mean_map" else heads, M, dtype=torch.float32)
    if blocks.LV.numel():
        LV = attention_map(blocks.LV, masks.LV, convention)
        pairs = torch.ones_like(LV, dtype=torch.bool) if masks.LV is None else masks.LV
        pairs = pairs.any(1, keepdim=True) if LV.shape[1] == 1 else pairs.expand_as(LV)
        # a_i = argmax_k A_LV[i, k]; a row with NaN has none
        counted = pairs.any(-1).float().masked_fill(LV.isnan().any(-1), torch.nan)
        counts.scatter_add_(-1, fill(LV, pairs, -torch.inf).argmax(-1), counted)
    # H = - sum_k p_k log p_k
    per_head = torch.special.entr(counts / counts.sum(-1, keepdim=True).clamp(min=1)).sum(-1)
    entropy: Tensor = per_head.mean(-1)
    if reduction == "none":
        return entropy
    present = both_modalities(blocks.text_mask, blocks.image_mask)
    return entropy.sum() if reduction == "sum" else entropy.sum() / present.sum().clamp(min=1)


def _annotated(blocks: AttentionBlocks, regions: Tensor) -> AttentionBlocks:
    """The blocks with the annotation as LV: token i attends to region a_i alone, or to none."""
    same_device(attention=blocks.LL, regions=regions)
    values_of(regions=regions)
    batch, _, N, M = blocks.LV.shape
    if regions.shape != (batch, N):
        raise ValueError(
            f"regions has shape {tuple(regions.shape)}, and the batch has (batch, text tokens) = {(batch, N)}: "
            "give one index for each text token, -1 for tokens without a region"
        )
    regions = regions.long()
    given = regions >= 0
    if bool(((regions >= M) | (given & ~blocks.text_mask)).any()) or bool((regions < -1).any()):
        raise ValueError(f"regions must lie between -1 and {M - 1}, with -1 where a sample has no text token")
    # one_hot needs at least one class
    one_hot = F.one_hot(regions.clamp(min=0), max(M, 1)).bool()[..., :M] & given[..., None]
    everything = one_hot.new_ones(1, 1, 1, 1)
    allowed = blocks.allowed or Quadrants(everything, everything, everything, everything)
    LV = one_hot[:, None].to(blocks.LL.dtype).expand(-1, blocks.LL.shape[1], -1, -1)
    text_mask = blocks.text_mask & given.any(1, keepdim=True)
    return replace(
        blocks, LV=LV, text_mask=text_mask, allowed=allowed._replace(LV=one_hot[:, None]), _padded=True, _sees=None
    )


def _comparable(name: str, scores: Tensor) -> Tensor:
    """The scores as float64, or int64 for integers, to compare them without rounding."""
    values_of(**{name: scores})
    if not scores.numel():
        raise ValueError(f"{name} of shape {tuple(scores.shape)} is empty: there is nothing to score")
    if scores.dtype == torch.uint64:
        raise ValueError(f"{name} is torch.uint64, whose upper half is negative in int64: pass int64 or floats")
    if bool(scores.isnan().any()):
        raise ValueError(f"{name} contains NaN, which compares with nothing: look for it in the model's scores")
    return scores.double() if scores.is_floating_point() else scores.long()
