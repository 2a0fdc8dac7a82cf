"""The speed suite: what it counts is so, what it could not run it says, and no file claims what was not measured."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks import correctness, forms, goals, growth, loops, memory, record, report, speed
from benchmarks.__main__ import main, slug_of
from benchmarks.forms import Size, plan_for
from benchmarks.schema import PARTS, check
from benchmarks.tables import tables

pytestmark = pytest.mark.docs

MB = 10**6
SMALL = Size("small", 3, 7, 2)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return main(["--quick", "--out", str(tmp_path_factory.mktemp("results"))])


@pytest.fixture
def content(quick):
    """A result as a full run would have written it."""
    content = json.loads(quick.read_text())
    content["results"]["quick"] = False
    return content


def test_a_run_writes_a_result_its_tables_and_a_plot(quick):
    content = report.read(quick)
    assert quick.name == f"{content['environment']['date']}-cpu-quick.json"
    assert sorted(path.name for path in quick.parent.iterdir()) == [
        quick.with_suffix(end).name for end in (".json", ".md", ".png")
    ]
    assert quick.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    page = quick.with_suffix(".md").read_text()
    assert all(table in page for table in tables(content, "cpu").values())
    assert content["environment"]["command"] == "python -m benchmarks --device cpu --quick"


def test_all_forms_of_a_loss_have_one_value(quick):
    blocks = report.read(quick)["results"]["speed"]
    assert {block["loss"] for block in blocks} == set(forms.LOSSES)
    for block in blocks:
        values = {form: outcome["value"] for form, outcome in block["forms"].items() if form != "yardstick"}
        assert {"dense", "streaming", "auto"} <= set(values)
        assert ("per sample" in values) == (block["loss"] == "RELEASED")
        for form, value in values.items():
            assert value == pytest.approx(values["dense"], rel=1e-4), (block["loss"], form)
            assert value > 0


def test_the_compiled_form_is_a_form_like_the_others():
    plan = replace(plan_for("cpu", quick=True), compiled=("WEIGHTED_MEAN",), backend="aot_eager")
    outcomes = speed.block(plan, SMALL, "WEIGHTED_MEAN", memory.Guard("cpu"))["forms"]
    assert outcomes["compiled"]["value"] == pytest.approx(outcomes["dense"]["value"], rel=1e-5)
    assert outcomes["compiled"]["seconds"]["median"] > 0


def test_what_does_not_compile_says_so():
    def no_compiler(*_):
        raise FileNotFoundError("g++")

    plan = replace(plan_for("cpu", quick=True), compiled=("RELEASED",), backend=no_compiler)
    block = speed.block(plan, SMALL, "RELEASED", memory.Guard("cpu"))
    assert block["forms"]["compiled"] == {"not_run": "does not compile here: FileNotFoundError"}
    assert "compiled / streaming" not in block["ratios"]


def test_what_does_not_fit_on_a_card_says_so(monkeypatch):
    def forms_that_do_not_fit(plan, size, name):
        def dense():
            raise torch.OutOfMemoryError("CUDA out of memory")

        return {**made(plan, size, name), "dense": dense}

    made = speed.forms
    monkeypatch.setattr(speed, "forms", forms_that_do_not_fit)
    plan = plan_for("cpu", quick=True)
    huge = SMALL._replace(n_image=100)
    block = speed.block(plan, huge, "WEIGHTED_MEAN", memory.Guard("cpu"))
    assert block["forms"]["dense"] == {"not_run": "OutOfMemoryError: one map in float32 is 0.0 GB"}
    assert set(block["ratios"]) == {"streaming / yardstick"}


def test_memory_of_known_allocations():
    def run():
        a = torch.empty(25 * MB)  # 100 MB
        b = torch.empty(5 * MB // 4)  # and 5 MB
        del a
        return b, torch.empty(15 * MB)  # 65 MB in all

    kept = torch.ones(1000)
    assert memory.peak(run, "cpu") == 105 * MB
    assert memory.peak(lambda: kept.sum(), "cpu") < 100


def test_memory_counts_the_backward_pass():
    x = torch.ones(MB, requires_grad=True)
    # The result of exp is kept for backward, which makes the gradient of 4 MB beside it.
    assert memory.peak(lambda: torch.autograd.grad(x.exp().sum(), x), "cpu") == pytest.approx(8 * MB, rel=1e-3)


def test_memory_and_clock_of_a_card(monkeypatch):
    """With a card's counters and its queue of work played by hand."""
    state = {"now": 700, "peak": 5000, "waited": 0}
    fakes = {
        "synchronize": lambda: state.update(waited=state["waited"] + 1),
        "reset_peak_memory_stats": lambda: state.update(peak=state["now"]),
        "memory_allocated": lambda: state["now"],
        "max_memory_allocated": lambda: state["peak"],
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    assert memory.peak(lambda: state.update(peak=1000), "cuda") == 300
    waited = state["waited"]
    record.clock("cuda")()
    assert state["waited"] == waited + 1
    record.clock("cpu")()
    assert state["waited"] == waited + 1


@pytest.mark.parametrize(
    ("card", "slug"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Tesla T4", "tesla-t4"),
    ],
)
def test_short_names_of_cards(monkeypatch, card, slug):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card)
    assert slug_of("cuda") == slug
    assert slug_of("cpu") == "cpu"


def test_slope_of_known_power_laws():
    x = [576, 1152, 2304, 4608]
    for power in (0.0, 1.0, 2.1):
        assert growth.slope(x, [3e-7 * m**power for m in x]) == pytest.approx(power, abs=1e-12)
    # One of four points twice too high, at the end: log 2 times 1.5 / 5 of a doubling.
    assert growth.slope(x, [1.0, 1.0, 1.0, 2.0]) == pytest.approx(0.3)


def test_what_needs_more_memory_than_there_is_is_not_run(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 60_000)
    plan = plan_for("cpu", quick=True)
    dense, _, _ = growth.of_loss(plan, "RELEASED", ("dense", "streaming", "yardstick"))
    assert dense["n_image"] == [8, 16]
    (why,) = dense["not_run"].values()
    assert set(dense["not_run"]) == {"32"}
    # From (4 + 16)^2 to (4 + 32)^2 entries.
    needed = dense["peak_bytes"][1] * (36 / 20) ** 2
    assert why == f"needs about {needed / 1e9:.1f} GB, 0.0 GB are free"
    assert needed > 0.8 * 60_000 > dense["peak_bytes"][1]
    assert dense["memory_slope"] == pytest.approx(growth.slope([8, 16], dense["peak_bytes"]))


def test_the_guard_goes_by_entries():
    guard = memory.Guard("cpu")
    assert guard.refusal("dense", 10**12) is None  # never seen
    guard.saw("dense", 1, memory.available())
    assert guard.refusal("dense", 10).startswith("needs about ")
    assert guard.refusal("streaming", 10) is None
    guard.saw("dense", 10, 1)
    assert guard.refusal("dense", 20) is None


def test_nothing_is_timed_that_is_off():
    plan = plan_for("cpu", quick=True)
    measured = correctness.measure(plan, seed=1)
    correctness.refuse_if_off(measured)
    assert {row["loss"] for row in measured["rows"]} == set(forms.LOSSES)
    for wrong in (1e-3, math.nan):
        measured["rows"][-1]["streaming"]["gradient"] = wrong
        with pytest.raises(SystemExit, match=r"off from the float64 dense form by more than 1e-04, seed 1"):
            correctness.refuse_if_off(measured)


def test_correctness_sees_an_error(monkeypatch):
    original = correctness.loss_from
    monkeypatch.setattr(
        correctness,
        "loss_from",
        lambda name, n, impl: lambda q, k: original(name, n, impl)(q, k) * (1.001 if impl == "streaming" else 1),
    )
    with pytest.raises(SystemExit):
        correctness.refuse_if_off(correctness.measure(plan_for("cpu", quick=True)))


def test_inputs_of_correctness_are_fresh():
    plan = plan_for("cpu", quick=True)
    assert correctness.measure(plan)["seed"] != correctness.measure(plan)["seed"]
    a, b = (forms.inputs(plan, SMALL, seed)[0] for seed in (1, 2))
    assert not torch.equal(a, b)


def test_loops_that_take_too_long_say_how_long():
    plan = replace(plan_for("cpu", quick=True), sizes=(Size("", 2, 2, 1), Size("", 2, 40, 1)), longest_loop=1e-3)
    results = loops.measure(plan, lambda line: None)
    first, second, _ = results.values()
    assert first["RELEASED"]["median"] > 0
    assert second["RELEASED"]["not_run"].startswith("at least ")
    assert "not run: at least " in loops.table(results)


def test_the_largest_plan_has_the_sizes_of_the_goals():
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        plan = plan_for(device)
        assert plan.dtype == dtype
        assert {(20, 36), (40, 185), (64, 576), (64, 2304), (64, 4096)} <= {size[1:3] for size in plan.sizes}
        assert plan.growth == (576, 1152, 2304, 4608)


def test_a_part_has_a_name_of_its_own(content, tmp_path):
    assert report.name_of(content) == f"{content['environment']['date']}-cpu"
    whole = report.write(content, tmp_path)
    before = whole.read_bytes()
    part = copy.deepcopy(content)
    for name in ("loops", "growth"):
        del part["results"][name]
    part["results"]["parts"] = ["speed"]
    written = report.write(part, tmp_path)
    assert written.stem == f"{whole.stem}-only-speed"
    assert whole.read_bytes() == before
    assert not written.with_suffix(".png").exists()
    page = written.with_suffix(".md").read_text()
    assert "## memory" in page
    assert "## growth" not in page


def test_a_quick_run_must_say_where_to(capsys):
    with pytest.raises(SystemExit):
        main(["--quick"])
    assert "--out" in capsys.readouterr().err


def dated(content, date, slug="cpu", device="cpu", **results):
    changed = copy.deepcopy(content)
    changed["environment"]["date"] = date
    changed["environment"]["machine"]["gpu"] = None if device == "cpu" else slug
    changed["results"]["setting"] |= {"slug": slug, "device": device}
    changed["results"] |= results
    return changed


def test_latest_is_the_newest_full_result(content, tmp_path):
    assert report.latest("cpu", tmp_path) is None
    for one in (
        dated(content, "2027-01-09"),
        dated(content, "2026-12-31"),
        dated(content, "2027-01-08", slug="h200", device="cuda"),
        dated(content, "2027-02-01", quick=True),
        dated(content, "2027-03-01", parts=["speed"], loops={}, growth=[]),
    ):
        report.write(one, tmp_path)
    assert report.latest("cpu", tmp_path)["environment"]["date"] == "2027-01-09"
    assert report.latest("cuda", tmp_path)["environment"]["date"] == "2027-01-08"
    assert report.latest("h200", tmp_path) == report.latest("cuda", tmp_path)
    assert report.latest("a100", tmp_path) is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: r.pop("setting"), r"results\.setting: missing"),
        (lambda r: r.update(color="blue"), r"results\.color: unknown"),
        (lambda r: r.pop("growth"), r"results\.parts"),
        (lambda r: r["speed"][0]["forms"].pop("streaming"), r"speed\[0\]\.streaming: neither run"),
        (lambda r: r["speed"][0]["forms"]["dense"].pop("peak_bytes"), r"speed\[0\]\.forms\['dense'\]|peak_bytes"),
        (lambda r: r["speed"][1]["forms"]["dense"]["seconds"].update(median=0.0), "not a positive number"),
        (lambda r: r["speed"][1]["ratios"]["dense / streaming"].update(median=-1.0), "not a positive number"),
        (lambda r: r["growth"][0].update(memory_slope=math.nan), "nan is not float"),
        (lambda r: r["growth"][0]["time_slope"].update(median="2"), "'2' is not float"),
        (lambda r: r["correctness"].update(seed=1.5), r"1\.5 is not int"),
        (lambda r: r.update(loops=[]), r"results\.parts"),
        (lambda r: r.update(speed=3), "3 holds nothing"),
    ],
)
def test_the_schema_refuses(content, spoil, message):
    check(content)
    spoil(content["results"])
    with pytest.raises(ValueError, match=message):
        check(content)


def test_committed_results_are_what_they_should_be():
    for path in record.RESULTS.glob("2*.json"):
        content = report.read(path)
        assert path.stem == report.name_of(content)
        assert not content["results"]["quick"]
        assert content["environment"]["commit"]
        assert path.with_suffix(".png").exists()
        page = path.with_suffix(".md").read_text()
        assert all(table in page for table in tables(content, content["results"]["setting"]["device"]).values())


def as_measured(content, device):
    """The quick result with the sizes of the goals."""
    changed = dated(content, "2027-01-09", slug=device, device=device)
    (name, block) = changed["results"]["speed"][0]["loss"], changed["results"]["speed"][0]
    sizes = (576, 2304, 4096)
    changed["results"]["speed"] = [copy.deepcopy(block) | {"n_text": 64, "n_image": m} for m in sizes]
    for block in changed["results"]["speed"]:
        block["ratios"]["compiled / streaming"] = block["ratios"]["dense / streaming"]
        block["ratios"]["auto / dense"]["median"] = 1.2
        block["forms"]["dense"]["peak_bytes"], block["forms"]["streaming"]["peak_bytes"] = 6000, 100
    return changed, name


@pytest.mark.parametrize(("device", "count"), [("cpu", 8), ("cuda", 17)])
def test_the_goals_are_held_to_one_result(content, device, count):
    changed, name = as_measured(content, device)
    lines = goals.table(changed).splitlines()
    assert len(lines) == 2 + count
    assert all(goal.figure(changed, name) is not None for goal in goals.goals_for(device))
    (of_memory,) = (line for line in lines if "peak extra memory, 64 + 2304" in line)
    assert "60.0x |" in of_memory
    (of_auto,) = (line for line in lines if line.startswith("| auto / dense"))
    assert "1.20x, missed" in of_auto


def test_tables_of_a_cpu_show_no_seconds(content):
    on_cpu = tables(content, "cpu")
    assert "milliseconds" not in on_cpu
    assert not any(" ms" in table for table in on_cpu.values())
    on_card = tables(dated(content, "2027-01-09", "h200", "cuda"), "cuda")
    assert set(on_card) - set(on_cpu) == {"milliseconds"}
    assert set(tables(None, "cuda")) == set(on_card)


def test_what_was_not_measured_says_how_to():
    assert "`make bench`" in tables(None, "cpu")["goals"]
    assert "not measured yet" in tables(None, "cuda")["goals"]
    assert "`make bench DEVICE=cuda`" in tables(None, "h200")["time"]


def test_pages_are_filled_with_the_newest_tables(content, tmp_path):
    page = "Before\n\n<!-- bench cpu memory -->\nold\n<!-- /bench -->\n\n"
    page += "<!-- bench cuda time -->\n<!-- /bench -->\nAfter\n"
    report.write(dated(content, "2027-01-09"), tmp_path)
    filled = report.fill(page, tmp_path)
    table = tables(report.latest("cpu", tmp_path), "cpu")["memory"]
    assert filled.startswith(f"Before\n\n<!-- bench cpu memory -->\n{table}\n<!-- /bench -->\n\n")
    assert "not measured yet" in filled
    assert "old" not in filled
    assert filled.endswith("After\n")
    assert report.fill(filled, tmp_path) == filled
    with pytest.raises(KeyError, match="tempo"):
        report.fill("<!-- bench cpu tempo -->\n<!-- /bench -->", tmp_path)


def test_a_commit_that_git_cannot_name(monkeypatch):
    monkeypatch.setattr(record, "_git", lambda *_: "")
    monkeypatch.setenv("BENCH_COMMIT", "abc1234")
    environment = record.environment("benchmarks", [])
    assert (environment["commit"], environment["uncommitted_changes"]) == ("abc1234", None)
    monkeypatch.delenv("BENCH_COMMIT")
    with pytest.raises(SystemExit):
        main([])


def test_all_parts_have_a_measure():
    from benchmarks.__main__ import MEASURES

    assert tuple(MEASURES) == PARTS
