"""The benchmarks measure what they say: their yardsticks compute the same losses, and their files say where from."""

import json

import pytest
import torch

from attncongruence import TokenLayout, cacr_loss
from benchmarks import loops, record
from benchmarks.released_loop import cacr_per_sample, uniter_batch
from tests.problems import assert_close, value_and_grad


@pytest.mark.parametrize("direction", ["language", "vision"])
def test_the_per_sample_loop_is_the_released_loss(direction):
    scores, text, image = uniter_batch(4, heads=3)
    scores = scores.double()
    expected, wanted = value_and_grad(cacr_loss, scores, TokenLayout(text, image), direction=direction)
    value, grad = value_and_grad(lambda S: cacr_per_sample(S, text, image, 20, direction), scores)
    assert_close(value, expected, 1e-12)
    assert_close(grad, wanted, 1e-12)


def test_dense_beats_the_per_sample_loop():
    ratios = loops.per_sample(8, rounds=3)
    assert all(numbers["median"] > 1 for numbers in ratios.values())


def test_ratio():
    assert record.ratio([2.0, 6.0, 4.0], [1.0, 2.0, 1.0]) == {
        "median": 3.0,
        "lower_quartile": 2.0,
        "upper_quartile": 4.0,
    }


def test_result_files_say_where_they_come_from():
    files = sorted(record.RESULTS.glob("*.json"))
    assert files
    for file in files:
        content = json.loads(file.read_text())
        environment = content["environment"]
        assert environment["command"].startswith("python -m benchmarks."), file
        assert environment["versions"]["torch"], file
        assert environment["machine"]["processor"], file
        assert environment["commit"], file
        assert content["results"], file


def test_environment_of_this_run():
    assert record.environment("benchmarks.loops")["versions"]["torch"] == torch.__version__.split("+")[0]
