"""Conventions: the table of the paper's two readings, and what a convention refuses."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest

from attncongruence import CONVENTIONS, PRINTED, RELEASED, WEIGHTED_MEAN, Convention


def test_the_table():
    # blocks, heads, E, E detached, temperature, sigma on the target: CACR, IAIS; rows, epsilon
    table = {
        RELEASED: ("probabilities", "mean_map", "block", True, 1.0, True, False, "mean", 1e-6),
        PRINTED: ("scores", "mean_loss", "block", False, 1.0, True, True, "sum", 1e-6),
        WEIGHTED_MEAN: ("scores", "mean_loss", "softmax", False, 1.0, True, True, "mean", 1e-6),
    }
    for convention, row in table.items():
        assert tuple(getattr(convention, field.name) for field in fields(Convention)) == row


def test_is_a_value():
    assert replace(WEIGHTED_MEAN, temperature=1.0) == WEIGHTED_MEAN
    assert replace(WEIGHTED_MEAN, temperature=0.5).temperature == 0.5
    assert len({RELEASED, PRINTED, WEIGHTED_MEAN, Convention()}) == 3
    with pytest.raises(FrozenInstanceError):
        RELEASED.rows = "sum"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": "logits"}, "blocks='logits' is not known: it must be one of 'probabilities', 'scores'"),
        ({"heads": "all"}, "heads='all' is not known"),
        ({"equivalence": "argmax"}, "equivalence='argmax' is not known"),
        ({"rows": "max"}, "rows='max' is not known"),
        ({"temperature": 0.0}, "temperature=0.0 must be > 0"),
        ({"temperature": float("nan")}, "temperature=nan must be > 0"),
        ({"epsilon": -1.0}, "epsilon=-1.0 must be > 0"),
        ({"blocks": "scores"}, "raw scores are no distribution"),
    ],
)
def test_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        replace(RELEASED, **change)


def test_a_convention_prints_as_its_name_or_as_what_makes_it():
    assert [repr(c) for c in CONVENTIONS.values()] == ["RELEASED", "PRINTED", "WEIGHTED_MEAN"]
    own = replace(WEIGHTED_MEAN, temperature=0.1)
    assert eval(repr(own), {"Convention": Convention}) == own
    assert repr(replace(RELEASED, rows="sum")) == "Convention(rows='sum')"
