"""Schedules: step -> weight of the loss, pure functions of the step, as in both released codes.

Each takes the number of steps T over which the weight is to rise and returns a function of the step t, counted from 0.
Beyond T the weight stays where it is at T.

Source: `training_signal_annealing.py` of both released codes; CACR's runs used the exponential one with T = 5000.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from attncongruence._typing import number

Schedule = Callable[[int], float]
Shape = Callable[[float, float], float]


def exponential_warmup(total_steps: int, scale: float = 5.0) -> Schedule:
    """`exp(scale (t/T - 1))`: from exp(-scale) to 1, most of it at the end.

    Args:
        total_steps: T, >= 1, finite.
        scale: how steep, > 0, finite.

    Raises:
        ValueError: `total_steps` < 1 or `scale` <= 0, NaN or infinity; from the schedule: a negative step.
        TypeError: arguments or steps that are no numbers.

    Example:
        >>> weight = exponential_warmup(total_steps=5000)
        >>> round(weight(0), 6), weight(5000)
        (0.006738, 1.0)
    """
    return _schedule(total_steps, scale, _exponential)


def linear_warmup(total_steps: int) -> Schedule:
    """`t/T`: from 0 to 1. Arguments and errors as `exponential_warmup`.

    Example:
        >>> linear_warmup(total_steps=4)(1)
        0.25
    """
    return _schedule(total_steps, 1.0, _linear)


def logarithmic_warmup(total_steps: int, scale: float = 5.0) -> Schedule:
    """`1 - exp(-scale t/T)`: from 0 to 1 - exp(-scale), most of it at the start. Errors as `exponential_warmup`.

    Example:
        >>> round(logarithmic_warmup(total_steps=5)(1), 6)
        0.632121
    """
    return _schedule(total_steps, scale, _logarithmic)


def constant(total_steps: int | None = None) -> Schedule:
    """1 at every step. `total_steps` is there so that the four can be exchanged for each other, and means nothing.

    Example:
        >>> constant()(123)
        1.0
    """
    return _schedule(1, 1.0, _constant)


def _schedule(total_steps: int, scale: float, shape: Shape) -> Schedule:
    number("total_steps", total_steps)
    number("scale", scale)
    if not 1 <= total_steps < math.inf:
        raise ValueError(
            f"total_steps={total_steps} must be >= 1 and finite: the number of steps over which the weight rises"
        )
    if not 0 < scale < math.inf:
        raise ValueError(f"scale={scale} must be > 0 and finite")
    # Not a closure: what holds a schedule can be pickled along with it.
    return functools.partial(_weight, shape, scale, total_steps)


def _weight(shape: Shape, scale: float, total_steps: int, step: int) -> float:
    number("step", step)
    if not step >= 0:
        raise ValueError(f"step={step} must be >= 0: steps are counted from 0")
    return shape(min(step, total_steps) / total_steps, scale)


def _exponential(progress: float, scale: float) -> float:
    # exp(scale (t/T - 1))
    return math.exp(scale * (progress - 1))


def _linear(progress: float, scale: float) -> float:
    # t/T
    return progress


def _logarithmic(progress: float, scale: float) -> float:
    # 1 - exp(-scale t/T)
    return 1 - math.exp(-scale * progress)


def _constant(progress: float, scale: float) -> float:
    return 1.0
