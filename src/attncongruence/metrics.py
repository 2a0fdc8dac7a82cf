"""What the papers measure: Winoground scores, recall, IAIS's attention distance, CACR's argmax entropy."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.nn import functional as F

from attncongruence._typing import Count, Reduction, checked, same_device, values_of
from attncongruence.blocks import Attention, AttentionBlocks, NText, Quadrants
from attncongruence.conventions import RELEASED, WEIGHTED_MEAN, Convention
from attncongruence.layout import Mask
from attncongruence.losses import LOSSES, check_options, iais_loss, read_blocks
from attncongruence.maps import attention_map, entries, fill


class WinogroundScores(NamedTuple):
    """Per cent of examples that are right. Chance: 25, 25 and 16.67."""

    text: float
    """Both images prefer their own caption."""
    image: float
    """Both captions prefer their own image."""
    group: float
    """Both."""


@checked
def winoground_scores(s: Float[Tensor, "n 2 2"] | Integer[Tensor, "n 2 2"]) -> WinogroundScores:
    """Text, image and group score of Winoground, in per cent.

    With `s(c, i)` the score of caption c and image i, an example is right for

        text:  s(0, 0) > s(1, 0) and s(1, 1) > s(0, 1)
        image: s(0, 0) > s(0, 1) and s(1, 1) > s(1, 0)
        group: all four

    All inequalities are strict: a tie is wrong, so that a model blind to order scores 0.

    Args:
        s: `(examples, captions, images)`, higher means a better match; matched pairs on the diagonal.

    Returns:
        `(text, image, group)` in per cent, each 0 to 100. Scores drawn at random give 25, 25 and 16.67.

    Raises:
        jaxtyping.TypeCheckError: another shape.
        ValueError: no example, or a NaN among the scores.

    Source:
        Thrush et al., CVPR 2022, Section 3; CACR (Pandey et al., ACL 2023), Table 2.

    Example:
        The first example is right; in the second each image prefers its own caption, but caption 0 the wrong image.

        >>> winoground_scores(torch.tensor([[[0.9, 0.1], [0.2, 0.8]], [[0.5, 0.6], [0.4, 0.7]]]))
        WinogroundScores(text=100.0, image=50.0, group=50.0)
    """
    s = _comparable("s", s)
    own_0, own_1, caption_0_image_1, caption_1_image_0 = s[:, 0, 0], s[:, 1, 1], s[:, 0, 1], s[:, 1, 0]
    text = (own_0 > caption_1_image_0) & (own_1 > caption_0_image_1)
    image = (own_0 > caption_0_image_1) & (own_1 > caption_1_image_0)
    right = torch.stack([text, image, text & image], 1)
    return WinogroundScores(*(100 * right.double().mean(0)).tolist())


@checked
def recall_at_k(
    scores: Float[Tensor, "queries candidates"] | Integer[Tensor, "queries candidates"],
    k: Count = 1,
    relevant: Bool[Tensor, "queries candidates"] | Integer[Tensor, " queries"] | None = None,
) -> float:
    """R@k of retrieval: per cent of queries with a relevant candidate among the best k.

    A relevant candidate is among them if fewer than k irrelevant ones score as high or higher: ties count as wrong.

    Args:
        scores: a row for each query, higher means a better match.
        k: how many candidates are looked at, 1 to all.
        relevant: the relevant candidate of each query, or a mask of all that are; None: the diagonal of a square.

    Returns:
        Per cent of the queries, 0 to 100.

    Raises:
        jaxtyping.TypeCheckError: shapes that don't fit.
        ValueError: k out of range, no query, NaN among the scores, a query without a relevant candidate, no `relevant`
            and not square.

    Source:
        As in IAIS (Ren et al., ACL 2021), Section 4, where ties don't come up.

    Example:
        The second query has its own candidate in second place, behind a tie.

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
    # how many irrelevant candidates are as good as the best relevant one
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
    convention: Convention = WEIGHTED_MEAN,
    reduction: Reduction = "mean",
) -> Float[Tensor, "..."]:
    """Intra-modal self-attention distance: m-KL(sigma(R), sigma(LL)) with R[i, j] = VV[a_i, a_j].

    a_i is the region that stands for text token i. With annotated regions this is IAIS's metric of relation
    consistency (ISDa); tokens without a region are left out. Without, it is the region that token i attends to most,
    and the distance is the language side of `iais_loss`, singular alignment, as a number to watch: no gradient.

    Args:
        attention: as for `iais_loss`, and so are `n_text`, `mask`, `reduction`.
        regions: `(batch, text)`: for each text token of a sample, in order, the place of its region among the sample's
            image tokens, counted from 0; -1 for tokens without one. Shorter samples are filled up with -1.
        convention: `WEIGHTED_MEAN` works on scores, head by head, and takes the mean over rows; `PRINTED` their sum.
            `RELEASED` gives the training loss of the released code, which softmaxes R a second time.

    Returns:
        The distance in nats, >= 0, over samples with both modalities and a region. On scores it is 0 if and only if
        text and regions attend alike.

    Raises:
        jaxtyping.TypeCheckError, ValueError: as `iais_loss`, and for regions out of range or of another shape.

    Source:
        IAIS (Ren et al., ACL 2021), Section 3, after its abstract and released loss; `docs/paper-map.md`.

    Example:
        Token 0 attends to the text with (3/4, 1/4), and its region to the regions with (1/2, 1/2); token 1 and its
        region agree. The mean of log(3) / 4 and 0:

        >>> S = torch.zeros(1, 4, 4)
        >>> S[0, 0, 0] = torch.tensor(3.0).log()
        >>> attention_distance(S, n_text=2, regions=torch.tensor([[0, 1]]))
        tensor(0.1373)
    """
    if regions is None:
        return iais_loss(attention, n_text, mask=mask, convention=convention, direction="language", reduction=reduction)
    blocks = _annotated(
        read_blocks(
            LOSSES["singular"],
            attention,
            n_text,
            mask,
            check_options(LOSSES["singular"], convention, "language"),
            "language",
        ),
        regions,
    )
    return iais_loss(blocks, convention=convention, direction="language", reduction=reduction)


@torch.no_grad()
@checked
def argmax_entropy(
    attention: Attention,
    n_text: NText | None = None,
    *,
    mask: Mask | None = None,
    convention: Convention = RELEASED,
    reduction: Reduction = "mean",
) -> Float[Tensor, "..."]:
    """How many image tokens the text looks at: the entropy of where its tokens' attention is highest.

    With `a_i = argmax_k A_LV[i, k]` and `p_k` the share of text tokens with `a_i = k`,

        H = - sum_k p_k log p_k

    0 where all text tokens look at one image token, as they do when attention has collapsed: then hard equivalence
    compares the text with a single region.

    Args:
        attention: as for `cacr_loss`, and so are `n_text`, `mask`, `reduction`.
        convention: whether the maximum is looked for in the heads' mean map (`RELEASED`) or in each head, the heads'
            entropies averaged (`heads="mean_loss"`).

    Returns:
        Entropy in nats, 0 to log(min(text tokens, image tokens)): the mean over samples with both modalities, or as
        `reduction` says. Text tokens that may look at no image token are left out. Of several maxima the first counts.
        NaN where an attention is NaN.

    Raises:
        jaxtyping.TypeCheckError, ValueError: as `cacr_loss`.

    Source:
        After CACR (Pandey et al., ACL 2023), Section 5.2; `docs/paper-map.md`.

    Example:
        Of four tokens two look at image token 0, one at 1 and one at 2: H = log(2) / 2 + log(4) / 2.

        >>> S = torch.zeros(1, 7, 7)
        >>> S[0, torch.arange(4), torch.tensor([4, 4, 5, 6])] = 1.0
        >>> argmax_entropy(S, n_text=4)
        tensor(1.0397)
    """
    convention = check_options(LOSSES["cacr"], convention, "language", reduction)
    blocks = read_blocks(LOSSES["cacr"], attention, n_text, mask, convention, "language")
    masks = entries(blocks)
    batch, heads, _, M = blocks.LV.shape
    counts = blocks.LL.new_zeros(batch, 1 if convention.heads == "mean_map" else heads, M, dtype=torch.float32)
    if blocks.LV.numel():
        LV = attention_map(blocks.LV, masks.LV, convention)
        pairs = torch.ones_like(LV, dtype=torch.bool) if masks.LV is None else masks.LV
        pairs = pairs.any(1, keepdim=True) if LV.shape[1] == 1 else pairs.expand_as(LV)
        # a_i = argmax_k A_LV[i, k]
        counts.scatter_add_(-1, fill(LV, pairs, -torch.inf).argmax(-1), pairs.any(-1).float())
    # H = - sum_k p_k log p_k
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    per_head = torch.special.entr(share).sum(-1)
    if blocks.LV.numel():
        # A NaN has no argmax.
        per_head = per_head.masked_fill(LV.isnan().any(-1).any(-1), torch.nan)
    entropy: Tensor = per_head.mean(-1)
    if reduction == "none":
        return entropy
    present = blocks.text_mask.any(-1) & blocks.image_mask.any(-1)
    return entropy.sum() if reduction == "sum" else entropy.sum() / present.sum().clamp(min=1)


def _annotated(blocks: AttentionBlocks, regions: Tensor) -> AttentionBlocks:
    """The blocks with annotated regions in the place of LV: token i attends to region a_i alone, or to none."""
    same_device(attention=blocks.LL, regions=regions)
    values_of(regions=regions)
    batch, _, N, M = blocks.LV.shape
    if regions.shape != (batch, N):
        raise ValueError(
            f"regions has shape {tuple(regions.shape)}, and the batch has (batch, text tokens) = {(batch, N)}: "
            "give one place for each text token, -1 for tokens without a region"
        )
    regions = regions.long()
    given = regions >= 0
    if bool(((regions >= M) | (given & ~blocks.text_mask)).any()) or bool((regions < -1).any()):
        raise ValueError(f"regions must lie between -1 and {M - 1}, with -1 where a sample has no text token")
    # one_hot knows no range of 0 classes
    one_hot = F.one_hot(regions.clamp(min=0), max(M, 1)).bool()[..., :M] & given[..., None]
    everything = one_hot.new_ones(1, 1, 1, 1)
    allowed = blocks.allowed or Quadrants(everything, everything, everything, everything)
    LV = one_hot[:, None].to(blocks.LL.dtype).expand(-1, blocks.LL.shape[1], -1, -1)
    text_mask = blocks.text_mask & given.any(1, keepdim=True)
    return replace(
        blocks, LV=LV, text_mask=text_mask, allowed=allowed._replace(LV=one_hot[:, None]), _padded=True, _sees=None
    )


def _comparable(name: str, scores: Tensor) -> Tensor:
    """The scores in a dtype that compares without rounding: float64, or int64 for integers."""
    values_of(**{name: scores})
    if not scores.numel():
        raise ValueError(f"{name} of shape {tuple(scores.shape)} is empty: there is nothing to score")
    if scores.dtype == torch.uint64:
        raise ValueError(
            f"{name} is torch.uint64, whose upper half is negative in int64: pass another integer or float"
        )
    if bool(scores.isnan().any()):
        raise ValueError(f"{name} contains NaN, which compares with nothing: look for it in the model's scores")
    return scores.double() if scores.is_floating_point() else scores.long()
