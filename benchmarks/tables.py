"""The results of the speed suite as Markdown tables, one name each; on CPU of ratios alone, seconds are a machine's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks import goals, loops
from benchmarks.forms import LOSSES, YARDSTICK
from benchmarks.record import Spread
from benchmarks.schema import PARTS

Content = dict[str, Any]
FORMS = ("dense", "compiled", "per sample", "streaming", YARDSTICK)
MB = 10**6
# The parts of a run that a table shows; without them it is left out.
NEEDS = {"goals": set(PARTS), "headline": set(PARTS), "growth": {"growth"}, "loops": {"loops"}}
NEEDS |= {name: {"speed"} for name in ("time", "milliseconds", "auto", "memory")}


def tables(content: Content | None, device: str) -> dict[str, str]:
    """Every table by its name; without a result, how to get one. A card has `milliseconds` besides."""
    made: dict[str, Callable[[Content], str]] = {
        "machine": machine,
        "goals": goals.table,
        "headline": headline,
        "time": time,
        "auto": auto,
        "memory": memory,
        "growth": growth,
        "loops": lambda content: loops.table(content["results"]["loops"]),
        "correctness": correctness,
    }
    if device != "cpu":
        made["milliseconds"] = milliseconds
    if content is None:
        command = "make bench" if device == "cpu" else "make bench DEVICE=cuda"
        return dict.fromkeys(made, f"| not measured yet |\n| --- |\n| `{command}` |")
    parts = set(content["results"]["parts"])
    return {name: table(content) for name, table in made.items() if NEEDS.get(name, set()) <= parts}


def machine(content: Content) -> str:
    """Where and with what it was measured."""
    environment, setting = content["environment"], content["results"]["setting"]
    of, on_card = environment["machine"], setting["device"] != "cpu"
    what = of["gpu"] if on_card else f"{of['processor']}, {of['threads']} threads of {of['cores']} cores"
    torch = f"PyTorch {environment['versions']['torch']}"
    if on_card and "triton" in environment["versions"]:
        torch += f", Triton {environment['versions']['triton']}"
    inputs = f"{setting['dtype']}, {setting['heads']} heads, d = {setting['width']}"
    cells = (what, torch, inputs, environment["date"], environment["commit"], f"`{environment['command']}`")
    return _table(("machine", "versions", "queries and keys", "date", "commit", "command"), [cells], left=6)


def headline(content: Content) -> str:
    """Three rows for the front page, of the default convention; a quick run, without the goals' size, has fewer."""
    results, loss, rows = content["results"], "RELEASED", []
    for size, of in results["loops"].items():
        if size.startswith("Algorithm 1") and "median" in of[loss]:
            rows.append(
                (size.replace("Algorithm 1 loop", "time: Algorithm 1 as printed"), f"{of[loss]['median']:,.0f}x")
            )
            break
    for block in results["speed"]:
        if (block["n_text"], block["n_image"], block["loss"]) == (64, 2304, loss):
            less = block["forms"]["dense"]["peak_bytes"] / block["forms"]["streaming"]["peak_bytes"]
            rows.append((f"memory: dense / streaming, {_size(block)}", f"{goals.number(less)}x"))
            ratio = _spread(block["ratios"][f"streaming / {YARDSTICK}"])
            rows.append((f"time: streaming / one attention call, {_size(block)}", ratio))
    return _table((f"`cacr_loss`, {loss}, forward and backward", "ratio"), rows, left=1)


def time(content: Content) -> str:
    """How many times longer one form takes than another."""
    wanted = ("dense / streaming", "compiled / streaming", "per sample / dense", f"streaming / {YARDSTICK}")
    rows = [
        (_size(block), block["loss"], *(_spread(block["ratios"].get(name)) for name in wanted))
        for block in content["results"]["speed"]
    ]
    return _table(("text + image tokens", "loss", *wanted), rows, left=2)


def milliseconds(content: Content) -> str:
    """Forward and backward of each form, median."""
    rows = [
        (_size(block), block["loss"], *(_of(block, form, _milliseconds) for form in FORMS))
        for block in content["results"]["speed"]
    ]
    return _table(("text + image tokens, ms", "loss", *FORMS), rows, left=2)


def auto(content: Content) -> str:
    """`impl="auto"` against the dense form, and what it took."""
    blocks = {(_size(block), block["loss"]): block for block in content["results"]["speed"]}

    def cell(size: str, loss: str) -> str:
        block = blocks[size, loss]
        return f"{block['picked']}: {_spread(block['ratios'].get('auto / dense'))}"

    rows = [(size, *(cell(size, loss) for loss in LOSSES)) for size in dict.fromkeys(size for size, _ in blocks)]
    return _table(("auto / dense", *LOSSES), rows, left=1)


def memory(content: Content) -> str:
    """Peak of what a call takes on top of its inputs."""

    def less(block: dict[str, Any]) -> str:
        peaks = [block["forms"][form].get("peak_bytes") for form in ("dense", "streaming")]
        return f"{goals.number(peaks[0] / peaks[1])}x" if all(peaks) else "–"

    rows = [
        (_size(block), block["loss"], *(_of(block, form, _megabytes) for form in FORMS), less(block))
        for block in content["results"]["speed"]
    ]
    return _table(("text + image tokens, MB", "loss", *FORMS, "dense / streaming"), rows, left=2)


def growth(content: Content) -> str:
    """Time and memory along the number of image tokens, each row's time relative to its first."""
    rows = []
    for row in content["results"]["growth"]:
        times = [of["median"] / row["seconds"][0]["median"] for of in row["seconds"]]
        missing = "".join(f"; {m} not run: {why}" for m, why in row["not_run"].items())
        rows.append(
            (
                row["loss"],
                row["form"],
                ", ".join(str(m) for m in row["n_image"]) + missing,
                ", ".join(goals.number(of) for of in times),
                _slope(row["time_slope"]),
                ", ".join(_megabytes({"peak_bytes": peak}) for peak in row["peak_bytes"]),
                "–" if row["memory_slope"] is None else f"{row['memory_slope']:.2f}",
            )
        )
    return _table(("loss", "form", "M", "time, first = 1", "slope", "memory, MB", "slope"), rows, left=3)


def correctness(content: Content) -> str:
    """Relative errors against the dense form in float64."""
    rows = [
        (
            row["loss"],
            f"{row['n_text']} + {row['n_image']}",
            *(f"{row[form][what]:.1e}" for what in ("value", "gradient") for form in ("streaming", "dense")),
        )
        for row in content["results"]["correctness"]["rows"]
    ]
    heads = (f"{what}, {form}" for what in ("value", "gradient") for form in ("streaming", "dense"))
    return _table(("loss", "text + image tokens", *heads), rows, left=2)


def _table(head: Iterable[str], rows: list[tuple[str, ...]], left: int) -> str:
    """Cells as Markdown; the first columns to the left, numbers to the right."""
    head = tuple(head)
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, tuple(rule), *rows))


def _size(block: dict[str, Any]) -> str:
    name = f"{block['name']}: " if block["name"] else ""
    return f"{name}{block['n_text']} + {block['n_image']}, batch {block['batch']}"


def _spread(ratio: Spread | None) -> str:
    if ratio is None:
        return "–"
    median, low, high = (goals.number(ratio[key]) for key in ("median", "lower_quartile", "upper_quartile"))
    return f"{median}x ({low} to {high})"


def _slope(slope: Spread | None) -> str:
    if slope is None:
        return "–"
    return f"{slope['median']:.2f} ({slope['lower_quartile']:.2f} to {slope['upper_quartile']:.2f})"


def _of(block: dict[str, Any], form: str, show: Callable[[dict[str, Any]], str]) -> str:
    found = block["forms"].get(form)
    if found is None:
        return "–"
    return f"not run: {found['not_run']}" if "not_run" in found else show(found)


def _megabytes(form: dict[str, Any]) -> str:
    return goals.number(form["peak_bytes"] / MB)


def _milliseconds(form: dict[str, Any]) -> str:
    return goals.number(1000 * form["seconds"]["median"])
