"""Conventions: the choices in which the printed paper and the released codes differ, as values."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, TypeAlias, get_args

from attncongruence._typing import number, one_of

Blocks = Literal["probabilities", "scores"]
Heads = Literal["mean_map", "mean_loss"]
Equivalence = Literal["block", "softmax"]
Rows = Literal["mean", "sum"]


@dataclass(frozen=True)
class Convention:
    """How the four blocks become one loss. Make your own with `dataclasses.replace(RELEASED, rows="sum")`.

    Args:
        blocks: what the loss works on. `"probabilities"`: each block softmaxed by itself, per head; `"scores"`: raw.
        heads: `"mean_map"`: one loss of the head-mean maps; `"mean_loss"`: one loss per head, then their mean.
        equivalence: E of CACR. `"block"`: the cross-modal block itself; `"softmax"`: its softmax, a weighted mean.
        detach_equivalence: whether E of CACR is a constant to the gradient.
        temperature: of the softmax in E, > 0. Towards 0, E becomes the hard alignment of IAIS. Only
            `equivalence="softmax"` uses it.
        target_softmax: whether CACR takes a softmax of m-KL's target (LL, or VV on the vision side). On probabilities
            this is a second softmax.
        iais_target_softmax: the same for IAIS.
        rows: whether a sample's loss is the mean over its rows (a `batchmean`) or their sum (Eq. 4).
        epsilon: added in the second logarithm of each term of IAIS's distributed alignment, > 0.

    Raises:
        ValueError: an unknown word, a temperature or epsilon <= 0, or a target of raw scores without a softmax.
        TypeError: a temperature or epsilon that is not a number, a switch that is not a bool.

    Source:
        CACR (Pandey et al., ACL 2023), Section 3 and released code; IAIS (Ren et al., ACL 2021), released code. The
        table is in `docs/conventions.md`.

    Example:
        >>> from dataclasses import replace
        >>> replace(WEIGHTED_MEAN, temperature=0.1).rows
        'mean'
    """

    blocks: Blocks = "probabilities"
    heads: Heads = "mean_map"
    equivalence: Equivalence = "block"
    detach_equivalence: bool = True
    temperature: float = 1.0
    target_softmax: bool = True
    iais_target_softmax: bool = False
    rows: Rows = "mean"
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        one_of("blocks", self.blocks, get_args(Blocks))
        one_of("heads", self.heads, get_args(Heads))
        one_of("equivalence", self.equivalence, get_args(Equivalence))
        one_of("rows", self.rows, get_args(Rows))
        for name in ("detach_equivalence", "target_softmax", "iais_target_softmax"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r} must be True or False")
        for name in ("temperature", "epsilon"):
            number(name, getattr(self, name))
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be > 0")
        if self.blocks == "scores" and not (self.target_softmax and self.iais_target_softmax):
            raise ValueError(
                "blocks='scores' needs target_softmax=True and iais_target_softmax=True: raw scores are no distribution"
            )

    def __repr__(self) -> str:
        """The name, or the fields in which it differs from `RELEASED`."""
        for name, convention in CONVENTIONS.items():
            if self == convention:
                return name.upper()
        own = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Convention({', '.join(own)})"


RELEASED = Convention()
"""As the authors ran it: what produced CACR's Table 2, and the default."""

PRINTED = Convention(blocks="scores", heads="mean_loss", detach_equivalence=False, iais_target_softmax=True, rows="sum")
"""As CACR prints it: Eq. 3 and 5 on raw scores."""

WEIGHTED_MEAN = Convention(
    blocks="scores", heads="mean_loss", equivalence="softmax", detach_equivalence=False, iais_target_softmax=True
)
"""Ours: Algorithm 1's "weighted mean" taken at its word. `replace(WEIGHTED_MEAN, temperature=...)` sharpens it."""

CONVENTIONS = {"released": RELEASED, "printed": PRINTED, "weighted_mean": WEIGHTED_MEAN}
"""The named conventions. Every function that takes a convention also takes its name."""

ConventionLike: TypeAlias = Convention | str


def as_convention(convention: ConventionLike) -> Convention:
    """The convention itself, or the one with this name.

    Raises:
        ValueError: anything else.
    """
    if isinstance(convention, Convention):
        return convention
    one_of("convention", convention, tuple(CONVENTIONS))
    return CONVENTIONS[convention]
