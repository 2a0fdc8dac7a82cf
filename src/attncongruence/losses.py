"""The congruence losses: CACR (soft equivalence) and IAIS (hard and distributed), batched and masked.

Read from top to bottom: the public functions, the formula of each loss in the paper's order, the table of losses, and
`evaluate`, which reads the input, computes one loss for each sample, and reduces. A new loss is one entry in `LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from attncongruence._typing import Alignment, Direction, Impl, Reduction, checked, no_autocast, one_of
from attncongruence.blocks import Attention, AttentionBlocks, NText
from attncongruence.conventions import RELEASED, Convention, ConventionLike, as_convention
from attncongruence.divergence import distributed_kl, m_kl
from attncongruence.layout import Mask
from attncongruence.maps import (
    Maps,
    equivalence,
    fill,
    log_attention_map,
    project,
    project_singular,
    project_weighted,
    read_blocks,
    sides,
    zero_losses,
)
from attncongruence.streaming import forms
from attncongruence.streaming.forms import Form
from attncongruence.streaming.per_sample import SHORTEST, per_sample, streaming_or_dense

DIRECTIONS, REDUCTIONS, IMPLS = ("both", "language", "vision"), ("mean", "sum", "none"), ("auto", "dense", "streaming")


@checked
def cacr_loss(
    attention: Attention,
    n_text: NText | None = None,
    *,
    mask: Mask | None = None,
    convention: ConventionLike = RELEASED,
    direction: Direction = "both",
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Float[Tensor, "..."]:
    r"""Cross-modal attention congruence: m-KL(sigma(E VV E^T), sigma(LL)), and likewise for vision (Eq. 3, 5).

    E, the text-to-image attention, carries the attention among image tokens over to the text tokens (a change of
    basis), where m-KL compares it with theirs. The default, `RELEASED`, is what the authors ran, and nearly flat, since
    it takes the softmax of probabilities; `WEIGHTED_MEAN` takes a weighted mean of scores instead, whose loss and
    gradient are larger (`docs/conventions.md`).

    Args:
        attention: one layer's pre-softmax scores, `(batch, heads, length, length)` or `(batch, length, length)`, a
            captured layer or another `ScoreSource`, or `AttentionBlocks`. With `RELEASED`, `probs.log()` may replace
            the scores, as long as each row of a block keeps some probability.
        n_text: number of text tokens, which come first, as an int or `(batch,)`; or a `TokenLayout`. Only
            `AttentionBlocks` need none.
        mask: `(batch, length)`, True or 1 at real tokens; or which pairs may attend, bool, `(batch, length, length)`
            or broadcastable to `(batch, heads, length, length)`. A bool `(length, length)` with batch = length may be
            either: for tokens pass integers, for pairs `mask[None]`.
        convention: which of the published definitions: `RELEASED`, `PRINTED`, `WEIGHTED_MEAN`, their names as strings
            (`"released"`), or your own `Convention`.
        direction: `"language"` (LL against the projected VV), `"vision"` (VV against the projected LL), or their sum.
        reduction: over the batch: `"mean"` of the samples that have both modalities, `"sum"`, or `"none"`.
        impl: `"dense"`; `"streaming"`, the same numbers in linear memory, from a captured layer or `QueryKey` without a
            mask of pairs; or `"auto"`: streaming where it is possible and faster (`docs/performance.md`), else dense.

    Returns:
        The loss in nats, >= 0: a scalar, or `(batch,)` for `"none"`. A sample without text or without image is exactly
        0, without gradient, and not counted in the mean. So is one whose text may attend to no image token, and with
        `"vision"` one whose image may attend to no text token; with `"both"`, each must see the other. A batch of
        samples whose text sees no image gets a warning. Pairs that may not attend are left out of softmaxes, sums and
        weighted means (`docs/mathematics.md`). A row counts as one sample, also if several are packed into it. Half
        precision is computed in float32, also under autocast (call backward outside of autocast, as PyTorch advises).

        Synchronizations with the device: none for an int boundary, a `TokenLayout` and a token mask; one for a
        `(batch,)` boundary; one for a mask of pairs. A captured layer of 256 positions or more whose mask is added to
        the scores costs one more under `"auto"` and `"streaming"`.

    Raises:
        ValueError: scores that are not square or not floating point, masks or n_text of another shape or dtype, an
            unknown option, a boundary out of range, a layout of another size, tensors on several devices, a direction
            whose cross-modal block does not exist: blocks without VL, or a batch in which text sees images that never
            see text (causal decoders; `direction="language"` works). `torch.compile` checks neither shapes nor values,
            and `torch.func.vmap` no values.

    Source:
        CACR (Pandey et al., ACL 2023), Eq. 3 to 5 and Algorithm 1; `docs/paper-map.md`.

    Example:
        Two text tokens attend to one image token, so E is a column of ones, R is constant and sigma(R) = (1/2, 1/2).
        With LL = (log 3, 0) in both rows, m-KL of (1/2, 1/2) and (3/4, 1/4) is log(3) / 4.

        >>> S = torch.zeros(1, 3, 3)
        >>> S[0, :2, 0] = torch.tensor(3.0).log()
        >>> cacr_loss(S, n_text=2, convention="weighted_mean", direction="language")
        tensor(0.2747)
    """
    return evaluate(LOSSES["cacr"], attention, n_text, mask, convention, direction, reduction, impl)


@checked
def iais_loss(
    attention: Attention,
    n_text: NText | None = None,
    *,
    mask: Mask | None = None,
    alignment: Alignment = "singular",
    convention: ConventionLike = RELEASED,
    direction: Direction = "both",
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Float[Tensor, "..."]:
    """Intra-modal self-attention distance with hard or distributed alignment (IAIS): CACR's ancestor.

    `"singular"`: each text token is replaced by the image token that it attends to most, so that
    `R[i, j] = VV[argmax LV[i], argmax LV[j]]` and the loss is m-KL(sigma(R), A_LL). `"distributed"`: the text
    attention is compared with the way through the image and back, m-KL(A_LL, A_LV A_VL), with an epsilon in the second
    logarithm of each term; it is defined only for conventions on probabilities.

    Args:
        attention: as for `cacr_loss`, and so are all other arguments but
        alignment: `"singular"` or `"distributed"`.

    Returns:
        The loss in nats, a scalar, or `(batch,)` for `reduction="none"`; >= 0 for `"singular"`. The distributed loss
        can fall below 0 by as much as epsilon times the number of columns.

    Raises:
        ValueError: as `cacr_loss`, and for distributed alignment on raw scores.

    Source:
        IAIS (Ren et al., ACL 2021), Section 3 and released code; `docs/paper-map.md`.

    Example:
        As in `cacr_loss`: one image token, so sigma(R) = (1/2, 1/2), and the target is A_LL = (3/4, 1/4) itself.

        >>> S = torch.zeros(1, 3, 3)
        >>> S[0, :2, 0] = torch.tensor(3.0).log()
        >>> iais_loss(S, n_text=2, direction="language")
        tensor(0.2747)
    """
    one_of("alignment", alignment, ("singular", "distributed"))
    return evaluate(LOSSES[alignment], attention, n_text, mask, convention, direction, reduction, impl)


@checked
def congruence_loss(
    loss: str,
    attention: Attention,
    n_text: NText | None = None,
    *,
    mask: Mask | None = None,
    convention: ConventionLike = RELEASED,
    direction: Direction = "both",
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Float[Tensor, "..."]:
    """Any loss by its name in `LOSSES`; all other arguments, errors and the result are those of `cacr_loss`."""
    one_of("loss", loss, tuple(LOSSES))
    return evaluate(LOSSES[loss], attention, n_text, mask, convention, direction, reduction, impl)


class Comparison(NamedTuple):
    """What one side of a loss compares, row by row; all `(batch, heads, N, N)` but the last."""

    projected: Tensor
    """The other modality's attention in this one's terms: logits or probabilities."""
    own: Tensor
    """This modality's own attention, likewise."""
    counted: Tensor | None
    """Which entries are compared, broadcastable; None: all."""
    rows: Tensor
    """The divergence of each row in nats, `(batch, heads, N)`."""


def cacr(maps: Maps, convention: Convention) -> Comparison:
    """CACR's language side, Eq. 3 to 5; with L and V exchanged it is the vision side."""
    E = equivalence(maps.LV, maps.counted.LV, convention)
    if maps.counted.VV is not None and convention.blocks == "scores" and convention.equivalence == "softmax":
        R, counted = project_weighted(E, maps.VV, maps.counted)
    else:
        # R = E VV E^T
        R, counted = project(E, maps.VV), maps.counted.LL
    LL = maps.LL if convention.target_softmax else log_attention_map(maps.scores, maps.mask, convention)
    # m-KL(sigma(R), sigma(LL))
    return Comparison(R, LL, counted, m_kl(R, LL, counted))


def singular(maps: Maps, convention: Convention) -> Comparison:
    """IAIS's singular alignment, language side: E = one_hot(argmax LV)."""
    R, counted = project_singular(maps.LV, maps.VV, maps.counted)
    LL = maps.LL if convention.iais_target_softmax else log_attention_map(maps.scores, maps.mask, convention)
    # m-KL(sigma(R), A_LL)
    return Comparison(R, LL, counted, m_kl(R, LL, counted))


def distributed(maps: Maps, convention: Convention) -> Comparison:
    """IAIS's distributed alignment, language side: from text to image and back."""
    counted = maps.counted.LL
    # P = A_LV A_VL against T = A_LL
    P, T = fill(maps.LV @ maps.VL, counted, 0.0), fill(maps.LL, counted, 0.0)
    return Comparison(P, T, counted, distributed_kl(P, T, convention.epsilon))


@dataclass(frozen=True)
class CongruenceLoss:
    """One loss: everything that is particular to it."""

    name: str
    title: str
    dense: Callable[[Maps, Convention], Comparison]
    """Its language side, all maps built."""
    streaming: Form | None = None
    """Likewise, in linear memory."""
    needs: tuple[str, ...] = ("LV",)
    """The cross-modal blocks of its language side: LV, or LV and VL."""
    on_scores: bool = True
    """Whether it is defined for conventions on raw scores."""
    logits: bool = True
    """Whether it compares logits, of which a softmax is taken; else probabilities."""


LOSSES = {
    loss.name: loss
    for loss in (
        CongruenceLoss("cacr", "CACR", cacr, forms.CACR()),
        CongruenceLoss("singular", "IAIS singular", singular, forms.Singular()),
        CongruenceLoss(
            "distributed",
            "IAIS distributed",
            distributed,
            forms.Distributed(),
            needs=("LV", "VL"),
            on_scores=False,
            logits=False,
        ),
    )
}
"""Every loss by its name."""


def evaluate(
    loss: CongruenceLoss,
    attention: Attention,
    n_text: NText | None,
    mask: Tensor | None,
    convention: ConventionLike,
    direction: Direction,
    reduction: Reduction,
    impl: Impl,
) -> Tensor:
    """A loss over the batch: reads the input once, computes each sample's loss, reduces."""
    convention = check_options(loss, convention, direction, reduction, impl)
    where, streams = None, False
    given = isinstance(attention, (Tensor, AttentionBlocks))  # torch.compile of torch 2.6 cannot trace A | B here
    if impl == "streaming" or (impl == "auto" and not given and attention.shape[-1] >= SHORTEST):  # type: ignore[union-attr]
        where, streams = streaming_or_dense(loss.name, loss.streaming, attention, n_text, mask, convention, impl)
    if streams:
        assert where is not None and loss.streaming is not None  # noqa: PT018
        text, image = where.text, where.image
        losses = per_sample(attention, where, loss.streaming, convention, direction)
    else:
        blocks = read_blocks(attention, n_text, mask, loss.needs, convention, direction, where)
        text, image = blocks.text_mask, blocks.image_mask
        losses = _dense(loss, blocks, convention, direction)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (text.any(-1) & image.any(-1)).sum().clamp(min=1)


def check_options(
    loss: CongruenceLoss, convention: ConventionLike, direction: str, reduction: str = "mean", impl: str = "auto"
) -> Convention:
    """The convention that is meant; a ValueError for unknown words and for a loss that it does not define."""
    if not isinstance(convention, Convention):
        convention = as_convention(convention)
    if direction not in DIRECTIONS or reduction not in REDUCTIONS or impl not in IMPLS:
        one_of("direction", direction, DIRECTIONS)
        one_of("reduction", reduction, REDUCTIONS)
        one_of("impl", impl, IMPLS)
    if convention.blocks == "scores" and not loss.on_scores:
        raise ValueError(
            f"the loss {loss.name!r} is not defined on raw scores: use a convention with blocks='probabilities', "
            "such as RELEASED, or another loss"
        )
    return convention


def _dense(loss: CongruenceLoss, blocks: AttentionBlocks, convention: Convention, direction: str) -> Tensor:
    """The loss of each sample, `(batch,)`, all maps built."""
    if not blocks.LV.numel():
        return zero_losses(blocks.LV)
    losses = None
    with no_autocast(blocks.LL.device):
        for maps in sides(blocks, convention, direction, both_ways="VL" in loss.needs):
            rows, counted = loss.dense(maps, convention).rows, maps.counted.LL
            # sum_i, or the mean over the sample's own rows; then the mean over heads
            per_head = rows.sum(-1)
            if convention.rows == "mean":
                per_head = per_head / (rows.shape[-1] if counted is None else counted.any(-1).sum(-1).clamp(min=1))
            losses = per_head.mean(1) if losses is None else losses + per_head.mean(1)
    assert losses is not None
    return losses
