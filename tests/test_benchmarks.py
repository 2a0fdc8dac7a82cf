"""The benchmarks measure what they say: their yardsticks compute the same losses, and their files say where from."""

import json
import subprocess

import pytest
import torch

from attncongruence import TokenLayout, cacr_loss
from benchmarks import capture_cost, loops, record, report
from benchmarks.released_loop import cacr_per_sample, uniter_batch
from tests.helpers.problems import assert_close, value_and_grad

pytestmark = pytest.mark.docs


@pytest.mark.parametrize("direction", ["language", "vision"])
def test_the_per_sample_loop_is_the_released_loss(direction):
    scores, text, image = uniter_batch(4, heads=3)
    scores = scores.double()
    expected, wanted = value_and_grad(cacr_loss, scores, TokenLayout(text, image), direction=direction)
    value, grad = value_and_grad(lambda S: cacr_per_sample(S, text, image, 20, direction), scores)
    assert_close(value, expected, 1e-12)
    assert_close(grad, wanted, 1e-12)


def test_the_loops_are_timed_against_the_dense_form():
    # A slow machine may not make a test red: that the ratios are above 1 is for the committed file to say.
    ratios = loops.per_sample(4, rounds=2)
    assert set(ratios) == {"dense, boundary and mask", "dense, TokenLayout"}
    assert all(numbers["median"] > 0 for numbers in ratios.values())
    measured = report.latest("cpu")["results"]["loops"]
    ran = [numbers for group in measured.values() for numbers in group.values() if "not_run" not in numbers]
    assert ran
    assert all(numbers["median"] > 1 for numbers in ran)


def test_the_captured_step_trains_on_the_loss_too(monkeypatch):
    for name, value in {"WIDTH": 32, "HEADS": 2, "LAYERS": 12, "TEXT": 12, "IMAGE": 4}.items():
        monkeypatch.setattr(capture_cost, name, value)
    seen = []
    monkeypatch.setattr(capture_cost, "step", lambda model, loss, device: seen.append(float(loss().detach())))
    torch.manual_seed(0)
    capture_cost.timm_steps("cpu")
    plain, again, captured = seen
    assert plain == again < captured
    seen.clear()
    capture_cost.bert_steps("cpu")  # plain, again, captured, and the usual way; dropout is drawn anew in each
    assert len(seen) == 4


def test_added_work_is_one_plus_the_difference(monkeypatch):
    for name, value in {"WIDTH": 32, "HEADS": 2, "TEXT": 12, "IMAGE": 4}.items():
        monkeypatch.setattr(capture_cost, name, value)
    ticks = iter(range(10_000))
    added = capture_cost.added("cpu", 3, lambda: next(ticks), whole=10.0)
    assert {name: numbers["median"] for name, numbers in added.items()} == {"again": 1.0, "captured": 1.0}


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
        assert environment["command"].startswith("python -m benchmarks"), file
        assert environment["versions"]["torch"], file
        assert environment["machine"]["processor"], file
        assert environment["commit"], file
        assert content["results"], file


def test_environment_of_this_run():
    assert record.environment("benchmarks.loops")["versions"]["torch"] == torch.__version__.split("+")[0]


def test_a_result_says_whether_its_code_was_committed(tmp_path, monkeypatch):
    # git read the paths from inside benchmarks/, where there is no src: nothing was ever uncommitted.
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    for file in ("src/code.py", "benchmarks/record.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("1\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(record, "__file__", str(tmp_path / "benchmarks/record.py"))
    assert record.environment("benchmarks.loops")["uncommitted_changes"] is False
    (tmp_path / "src/code.py").write_text("2\n")
    assert record.environment("benchmarks.loops")["uncommitted_changes"] is True
