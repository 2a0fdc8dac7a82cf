"""Schedules: hand values at the ends and in the middle, monotone, pure."""

import copy
import math
import pickle

import pytest

from attncongruence import Schedule, exponential_warmup, linear_warmup, logarithmic_warmup

SCHEDULES = {
    exponential_warmup: lambda t: math.exp(5 * (t - 1)),
    linear_warmup: lambda t: t,
    logarithmic_warmup: lambda t: 1 - math.exp(-5 * t),
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
    for twin in (pickle.loads(pickle.dumps(weight)), copy.deepcopy(weight)):
        assert twin == weight
        assert twin(3) == weight(3)


def test_schedules_are_values():
    weight = exponential_warmup(8)
    assert weight == Schedule("exponential", total_steps=8, scale=5.0)
    assert hash(weight) == hash(exponential_warmup(8))
    assert weight not in (exponential_warmup(9), exponential_warmup(8, scale=4.0), logarithmic_warmup(8))
    assert repr(weight) == "Schedule(shape='exponential', total_steps=8, scale=5.0)"
    with pytest.raises(AttributeError):
        weight.total_steps = 9


def test_scale():
    assert exponential_warmup(10, scale=2.0)(5) == pytest.approx(math.exp(-1))
    assert logarithmic_warmup(10, scale=2.0)(5) == pytest.approx(1 - math.exp(-1))


def test_rejects_an_unknown_shape():
    with pytest.raises(ValueError, match="shape='cosine' is not known: it must be one of 'exponential', 'linear'"):
        Schedule("cosine", 5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rejects(schedule):
    with pytest.raises(ValueError, match="total_steps=0 must be >= 1"):
        schedule(0)
    with pytest.raises(ValueError, match="step=-1 must be >= 0"):
        schedule(5)(-1)
    if schedule is not linear_warmup:
        with pytest.raises(ValueError, match=r"scale=0\.0 must be > 0"):
            schedule(5, scale=0.0)
