"""Training: regularize with whatever is given, and the soak (benchmarks/soak.py) in short."""

import math

import pytest
import torch
from hypothesis import strategies as st

from attncongruence import CACRLoss, capture_attention, regularize
from benchmarks import soak
from tests.helpers.fuzzing import fuzz, outcome
from tests.helpers.models import Tiny
from tests.helpers.problems import randn


@fuzz(7)
def test_regularize(data):
    draw, model = data.draw, Tiny()
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    odd = draw(st.sampled_from(["nothing"] * 4 + ["n_text", "weight", "positives"]))
    n_text = draw(st.sampled_from([length + 1, -1, "1", 1.0, None]) if odd == "n_text" else st.integers(0, length))
    weight = draw(st.sampled_from([math.nan, -1, "1"] if odd == "weight" else [0.5, 0, lambda step: 0.5]))
    one, none, every = torch.tensor([-1]), torch.zeros(0, dtype=torch.long), torch.ones(batch, dtype=torch.bool)
    labels = torch.arange(batch) % 2
    beyond = [torch.tensor([batch]), torch.ones(batch + 1, dtype=torch.bool), one.float(), labels]
    positives = draw(st.sampled_from(beyond if odd == "positives" else [None, one, none, every, ~every]))
    x = randn(batch, length, 4, dtype=torch.float32)
    plain = model(x)["loss"]

    def step():
        with regularize(model, CACRLoss(), n_text=n_text, weight=weight, positives=positives) as regularizer:
            loss = model(x)["loss"]
            return loss, regularizer.last

    found = outcome("regularize", step, valid=odd == "nothing")
    assert not soak.hooks(model)
    assert torch.equal(model(x)["loss"], plain)
    if found is not None:
        loss, last = found
        assert loss.isfinite()
        torch.testing.assert_close(loss, plain + last.weight * last.congruence)
        # What was captured by hand is what was added.
        with capture_attention(model) as capture:
            model(x)
            record = capture.pop() if positives is None else capture.pop()[positives]
            if record.batch_size:
                torch.testing.assert_close(CACRLoss()(record, n_text), last.congruence)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_short_soak():
    results = soak.measure(60)
    counts = results["counts"]
    assert (results["steps"], results["steps_that_the_regularizer_counted"]) == (60, 60)
    assert (results["evaluations"], results["passes_without_grad"], results["raised"]) == (9, 5, 6)
    assert results["not_finite"] == results["hooks_left"] == 0
    assert results["outputs_as_an_untouched_model"]
    assert len(counts) == soak.COUNTS
    assert len({count["hooks"] for count in counts}) == 1
    assert results["tensors_gained_in_the_run"] <= 0
    assert results["memory_growth_per_1000_steps"] < 0.5


def test_the_soak_sees_what_grows():
    # A hook left behind, and growth of one in a thousand steps.
    model = Tiny()
    before = soak.hooks(model)
    model.project.register_forward_hook(lambda *_: None)
    assert soak.hooks(model) == before + 1
    assert soak.slope([1.0, 1.5, 2.0]) == pytest.approx(0.5)
    assert soak.slope([2.0, 2.0, 2.0]) == 0
