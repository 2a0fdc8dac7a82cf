"""The losses as `torch.nn` modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attncongruence._typing import Alignment, Direction, Impl, Reduction, one_of
from attncongruence.blocks import Attention, NText
from attncongruence.conventions import RELEASED, ConventionLike
from attncongruence.layout import Mask
from attncongruence.losses import LOSSES, CongruenceLoss, cacr_loss, check_options, iais_loss


class _LossModule(nn.Module):
    """What the losses as modules share: their options, and how they print them."""

    def __init__(
        self,
        loss: CongruenceLoss,
        convention: ConventionLike,
        direction: Direction,
        reduction: Reduction,
        impl: Impl,
    ) -> None:
        super().__init__()
        self.convention = check_options(loss, convention, direction, reduction, impl)
        self.direction, self.reduction, self.impl = direction, reduction, impl

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("convention", "direction", "reduction", "impl")}

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"direction={self.direction!r}, reduction={self.reduction!r}, convention={self.convention}"


class CACRLoss(_LossModule):
    """`cacr_loss` as a module, for frameworks that want one; options and errors as there.

    Example:
        >>> CACRLoss(direction="language")(torch.zeros(1, 5, 5), n_text=2)
        tensor(0.)
    """

    def __init__(
        self,
        convention: ConventionLike = RELEASED,
        *,
        direction: Direction = "both",
        reduction: Reduction = "mean",
        impl: Impl = "auto",
    ) -> None:
        super().__init__(LOSSES["cacr"], convention, direction, reduction, impl)

    def forward(self, attention: Attention, n_text: NText | None = None, mask: Mask | None = None) -> Tensor:
        """`cacr_loss(attention, n_text, mask=mask)` with the module's options."""
        return cacr_loss(attention, n_text, mask=mask, **self._options())


class IAISLoss(_LossModule):
    """`iais_loss` as a module; options and errors as there."""

    def __init__(
        self,
        convention: ConventionLike = RELEASED,
        *,
        alignment: Alignment = "singular",
        direction: Direction = "both",
        reduction: Reduction = "mean",
        impl: Impl = "auto",
    ) -> None:
        one_of("alignment", alignment, ("singular", "distributed"))
        super().__init__(LOSSES[alignment], convention, direction, reduction, impl)
        self.alignment = alignment

    def forward(self, attention: Attention, n_text: NText | None = None, mask: Mask | None = None) -> Tensor:
        """`iais_loss(attention, n_text, mask=mask)` with the module's options."""
        return iais_loss(attention, n_text, mask=mask, alignment=self.alignment, **self._options())

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"alignment={self.alignment!r}, {super().extra_repr()}"
