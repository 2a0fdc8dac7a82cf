"""The congruence losses: CACR (soft equivalence) and IAIS (hard and distributed), batched and masked."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from attncongruence._typing import Alignment, Direction, Factor, Impl, Reduction, checked, one_of
from attncongruence.blocks import Attention, NText
from attncongruence.conventions import RELEASED, Convention
from attncongruence.divergence import symmetric_kl, there_and_back
from attncongruence.equivalence import Masks, equivalence, fill, project, project_singular, project_weighted
from attncongruence.locate import Mask
from attncongruence.quadrants import Quadrants
from attncongruence.sides import Compared, Side, check_options, loss_of
from attncongruence.sources import QueryKey


@checked
def cacr_loss(
    attention: Attention,
    n_text: NText = None,
    *,
    mask: Mask | None = None,
    convention: Convention = RELEASED,
    direction: Direction = "both",
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Float[Tensor, "..."]:
    r"""Cross-modal attention congruence: m-KL(sigma(E VV E^T), sigma(LL)), and likewise for vision (Eq. 3, 5).

    The attention among image tokens is carried over to the text tokens by E, the text-to-image attention as a change
    of basis, and held against the attention among text tokens.

    Args:
        attention: one layer's pre-softmax scores, `(batch, heads, length, length)` or `(batch, length, length)`, a
            captured layer, or `AttentionBlocks`. For `RELEASED`, `probs.log()` will do instead of scores, as long as
            each row of a block keeps some probability.
        n_text: number of text tokens, which come first, as an int or `(batch,)`; or a `TokenLayout`. Left out for
            `AttentionBlocks` alone.
        mask: `(batch, length)`, True or 1 at real tokens; or which pairs may attend, bool, `(batch, length, length)`
            or broadcastable to `(batch, heads, length, length)`.
        convention: which of the published definitions: `RELEASED`, `PRINTED`, `WEIGHTED_MEAN`, or your own.
        direction: `"language"` (LL against the projected VV), `"vision"` (VV against the projected LL), or their sum.
        reduction: over the batch: `"mean"` of the samples that have both modalities, `"sum"`, or `"none"`.
        impl: `"dense"`; `"streaming"`, the same numbers in linear memory, from a captured layer or `QueryKey` without a
            mask of pairs; or `"auto"`: streaming where it can and pays (`docs/performance.md`), else dense.

    Returns:
        The loss in nats, >= 0: a scalar, or `(batch,)` for `"none"`. A sample without text or without image is exactly
        0, passes no gradient and is not counted in the mean; one whose pairs none may attend is 0 and counted. Pairs
        that may not attend are left out of softmaxes, sums and weighted means (`docs/mathematics.md`). Computed in
        float32 for half precision, also under autocast (call backward outside of it, as PyTorch advises: inside,
        autocast rounds the gradient). Padding and boundaries cost no wait for the device, a boundary for each sample
        costs one, a mask of pairs two.

    Raises:
        jaxtyping.TypeCheckError: scores not square or not floating point, masks or n_text of another shape or dtype.
        ValueError: an unknown option, a boundary out of range, a layout of another size, tensors on several devices,
            a direction whose cross-modal block does not exist (causal decoders, blocks without VL). Under
            `torch.compile` neither error is raised for what only the values of a tensor can tell, nor for shapes; under
            `torch.func.vmap` none for such values.

    Source:
        CACR (Pandey et al., ACL 2023), Eq. 3 to 5 and Algorithm 1; `docs/paper-map.md`.

    Example:
        Two text tokens look at one image token, so E is a column of ones, R is constant and sigma(R) = (1/2, 1/2). With
        LL = (log 3, 0) in both rows, m-KL of (1/2, 1/2) and (3/4, 1/4) is log(3) / 4.

        >>> S = torch.zeros(1, 3, 3)
        >>> S[0, :2, 0] = torch.tensor(3.0).log()
        >>> cacr_loss(S, n_text=2, convention=WEIGHTED_MEAN, direction="language")
        tensor(0.2747)
    """
    return loss_of(attention, n_text, mask, cacr_side(convention), direction, reduction, impl)


def cacr_side(convention: Convention) -> Side:
    """CACR's language side."""

    def soft(maps: Quadrants[Tensor], target: Tensor, masks: Masks) -> Compared:
        E = equivalence(maps.LV, masks.LV, convention)
        # m-KL(sigma(E VV E^T), sigma(LL))
        if convention.blocks == "scores" and convention.equivalence == "softmax":
            R, counted = project_weighted(E, maps.VV, masks)
            return Compared(R, target, counted)
        return Compared(project(E, maps.VV), target, masks.LL)

    return Side("cacr", soft, symmetric_kl, convention, log_target=not convention.target_softmax)


@checked
def cacr_loss_qk(
    query: Float[Tensor, "batch heads length width"],
    key: Float[Tensor, "batch groups length width"],
    n_text: NText,
    *,
    scale: Factor | None = None,
    mask: Mask | None = None,
    convention: Convention = RELEASED,
    direction: Direction = "both",
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Float[Tensor, "..."]:
    """`cacr_loss(QueryKey(query, key, scale), n_text, ...)`: from queries and keys, so that no map need be built.

    Args:
        query: `(batch, heads, length, width)`, as they enter the product: after rotary embedding and norms.
        key: `(batch, groups, length, width)`, where heads is a multiple of groups.
        n_text: and all that follows: as for `cacr_loss`, but
        scale: factor of `query key^T`; None: 1 / sqrt(width).

    Returns, Raises:
        As `cacr_loss`, and as `QueryKey` for queries and keys that don't fit each other.

    Example:
        >>> cacr_loss_qk(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), n_text=2)
        tensor(0.)
    """
    source = QueryKey(query, key, scale)
    return cacr_loss(
        source, n_text, mask=mask, convention=convention, direction=direction, reduction=reduction, impl=impl
    )


@checked
def iais_loss(
    attention: Attention,
    n_text: NText = None,
    *,
    mask: Mask | None = None,
    alignment: Alignment = "singular",
    convention: Convention = RELEASED,
    direction: Direction = "both",
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Float[Tensor, "..."]:
    """Intra-modal self-attention distance with hard or distributed alignment (IAIS): CACR's ancestor.

    `"singular"`: each text token is stood for by the one image token that it attends to most, so that
    `R[i, j] = VV[argmax LV[i], argmax LV[j]]` and the loss is m-KL(sigma(R), A_LL). `"distributed"`: the text
    attention is held against the way through the image and back, m-KL(A_LL, A_LV A_VL), with an epsilon inside the
    logarithms; defined for conventions on probabilities alone.

    Args:
        attention: as for `cacr_loss`, and so are all other arguments but
        alignment: `"singular"` or `"distributed"`.

    Returns:
        The loss in nats, a scalar, or `(batch,)` for `reduction="none"`; >= 0 for `"singular"`. The distributed loss
        can fall below 0 by as much as epsilon times the number of columns.

    Raises:
        jaxtyping.TypeCheckError, ValueError: as `cacr_loss`, and for distributed alignment on raw scores.

    Source:
        IAIS (Ren et al., ACL 2021), Section 3 and released code; `docs/paper-map.md`.

    Example:
        As in `cacr_loss`: one image token, so sigma(R) = (1/2, 1/2), and the target is A_LL = (3/4, 1/4) itself.

        >>> S = torch.zeros(1, 3, 3)
        >>> S[0, :2, 0] = torch.tensor(3.0).log()
        >>> iais_loss(S, n_text=2, direction="language")
        tensor(0.2747)
    """
    return loss_of(attention, n_text, mask, iais_side(alignment, convention), direction, reduction, impl)


def iais_side(alignment: Alignment, convention: Convention) -> Side:
    """IAIS's language side."""
    one_of("alignment", alignment, ("singular", "distributed"))

    def singular(maps: Quadrants[Tensor], target: Tensor, masks: Masks) -> Compared:
        R, counted = project_singular(maps.LV, maps.VV, masks)
        return Compared(R, target, counted)

    def distributed(maps: Quadrants[Tensor], target: Tensor, masks: Masks) -> Compared:
        # P = A_LV A_VL against T = A_LL
        return Compared(fill(maps.LV @ maps.VL, masks.LL, 0.0), fill(target, masks.LL, 0.0), masks.LL)

    def through_the_image(P: Tensor, T: Tensor, counted: Tensor | None) -> Tensor:
        return there_and_back(P, T, convention.epsilon)

    if alignment == "singular":
        return Side("singular", singular, symmetric_kl, convention, log_target=not convention.iais_target_softmax)
    return Side("distributed", distributed, through_the_image, convention)


class CACRLoss(nn.Module):
    """`cacr_loss` as a module, for frameworks that want one; options and errors as there.

    Example:
        >>> CACRLoss(direction="language")(torch.zeros(1, 5, 5), n_text=2)
        tensor(0.)
    """

    def __init__(
        self,
        convention: Convention = RELEASED,
        *,
        direction: Direction = "both",
        reduction: Reduction = "mean",
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_options(convention, direction, reduction, impl)
        self.convention, self.direction, self.reduction, self.impl = convention, direction, reduction, impl

    def forward(self, attention: Attention, n_text: NText = None, mask: Mask | None = None) -> Tensor:
        """`cacr_loss(attention, n_text, mask=mask)` with the module's options."""
        return cacr_loss(
            attention,
            n_text,
            mask=mask,
            convention=self.convention,
            direction=self.direction,
            reduction=self.reduction,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"direction={self.direction!r}, reduction={self.reduction!r}, convention={self.convention}"


class IAISLoss(CACRLoss):
    """`iais_loss` as a module; options and errors as there."""

    def __init__(
        self,
        convention: Convention = RELEASED,
        *,
        alignment: Alignment = "singular",
        direction: Direction = "both",
        reduction: Reduction = "mean",
        impl: Impl = "auto",
    ) -> None:
        super().__init__(convention, direction=direction, reduction=reduction, impl=impl)
        one_of("alignment", alignment, ("singular", "distributed"))
        self.alignment = alignment

    def forward(self, attention: Attention, n_text: NText = None, mask: Mask | None = None) -> Tensor:
        """`iais_loss(attention, n_text, mask=mask)` with the module's options."""
        return iais_loss(
            attention,
            n_text,
            mask=mask,
            alignment=self.alignment,
            convention=self.convention,
            direction=self.direction,
            reduction=self.reduction,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"alignment={self.alignment!r}, {super().extra_repr()}"
