"""Schedules: hand values at the ends and in the middle, monotone, pure."""

import math
import pickle

import pytest

from attncongruence import constant, exponential_warmup, linear_warmup, logarithmic_warmup

SCHEDULES = {
    exponential_warmup: lambda t: math.exp(5 * (t - 1)),
    linear_warmup: lambda t: t,
    logarithmic_warmup: lambda t: 1 - math.exp(-5 * t),
    constant: lambda t: 1.0,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_formula(schedule):
    weight = schedule(total_steps=8)
    weights = [weight(step) for step in range(9)]
    assert weights == pytest.approx([SCHEDULES[schedule](step / 8) for step in range(9)], abs=1e-15)
    assert weights == sorted(weights)
    # Past the end it stays; and asking again gives the same.
    assert weight(100) == weight(8)
    assert [weight(step) for step in range(9)] == weights


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_can_be_pickled(schedule):
    weight = schedule(total_steps=8)
    assert pickle.loads(pickle.dumps(weight))(3) == weight(3)


def test_scale():
    assert exponential_warmup(10, scale=2.0)(5) == pytest.approx(math.exp(-1))
    assert logarithmic_warmup(10, scale=2.0)(5) == pytest.approx(1 - math.exp(-1))


@pytest.mark.parametrize("schedule", [exponential_warmup, linear_warmup, logarithmic_warmup])
def test_rejects(schedule):
    with pytest.raises(ValueError, match="total_steps=0 must be >= 1"):
        schedule(0)
    with pytest.raises(ValueError, match="step=-1 must be >= 0"):
        schedule(5)(-1)
    if schedule is not linear_warmup:
        with pytest.raises(ValueError, match=r"scale=0\.0 must be > 0"):
            schedule(5, scale=0.0)
