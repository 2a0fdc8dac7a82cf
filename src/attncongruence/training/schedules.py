"""Schedules for the weight of the loss: each is a function of the optimizer step.

Source: `utils/training_signal_annealing.py` in both released codes: all three shapes, with scale 5. Both train with the
exponential one; CACR's released configuration sets T = 5000.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from attncongruence._typing import number, one_of


@dataclass(frozen=True)
class Schedule:
    """A weight that rises with the step: `schedule(step)` is a float, and constant from step `total_steps` on.

    `exponential_warmup`, `linear_warmup` and `logarithmic_warmup` make one. It can be compared and pickled. Where the
    library takes a schedule, it takes any other function step -> weight too.

    Args:
        shape: "exponential", "linear" or "logarithmic".
        total_steps: T, the number of steps over which the weight rises, >= 1 and finite.
        scale: how steep the curve is, > 0 and finite; "linear" does not use it.

    Raises:
        ValueError: an unknown shape, `total_steps` < 1, `scale` <= 0, NaN or infinity; from a call: a negative step.
        TypeError: an argument or a step that is not a number.

    Example:
        >>> schedule = Schedule("linear", total_steps=4)
        >>> [schedule(step) for step in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """

    shape: Literal["exponential", "linear", "logarithmic"]
    total_steps: int
    scale: float = 5.0

    def __post_init__(self) -> None:
        one_of("shape", self.shape, ("exponential", "linear", "logarithmic"))
        number("total_steps", self.total_steps)
        number("scale", self.scale)
        if not 1 <= self.total_steps < math.inf:
            over = "the number of steps over which the weight rises"
            raise ValueError(f"total_steps={self.total_steps} must be >= 1 and finite: {over}")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale={self.scale} must be > 0 and finite")

    def __call__(self, step: int) -> float:
        """The weight at an optimizer step, counted from 0."""
        number("step", step)
        if not step >= 0:
            raise ValueError(f"step={step} must be >= 0: steps are counted from 0")
        # t/T
        progress = float(min(step, self.total_steps) / self.total_steps)
        if self.shape == "exponential":
            # exp(scale (t/T - 1))
            return math.exp(self.scale * (progress - 1))
        if self.shape == "logarithmic":
            # 1 - exp(-scale t/T)
            return 1 - math.exp(-self.scale * progress)
        return progress


def exponential_warmup(total_steps: int, scale: float = 5.0) -> Schedule:
    """`exp(scale (t/T - 1))`: from exp(-scale) to 1, rising mostly at the end. Arguments and errors as in `Schedule`.

    Example:
        >>> weight = exponential_warmup(total_steps=5000)
        >>> round(weight(0), 6), weight(5000)
        (0.006738, 1.0)
    """
    return Schedule("exponential", total_steps, scale)


def linear_warmup(total_steps: int) -> Schedule:
    """`t/T`: from 0 to 1. Arguments and errors as in `Schedule`.

    Example:
        >>> linear_warmup(total_steps=4)(1)
        0.25
    """
    return Schedule("linear", total_steps, scale=1.0)


def logarithmic_warmup(total_steps: int, scale: float = 5.0) -> Schedule:
    """`1 - exp(-scale t/T)`: from 0 to 1 - exp(-scale), rising mostly at the start. Arguments as in `Schedule`.

    Example:
        >>> round(logarithmic_warmup(total_steps=5)(1), 6)
        0.632121
    """
    return Schedule("logarithmic", total_steps, scale)
