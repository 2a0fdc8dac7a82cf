"""Time and memory against the number of image tokens, log-log, one line a form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.forms import YARDSTICK

# Okabe and Ito's colors, told apart by color-blind readers too; markers tell them apart in print.
STYLES = {
    "dense": ("#D55E00", "s", "dense"),
    "compiled": ("#E69F00", "D", "dense, compiled"),
    "streaming": ("#0072B2", "o", "streaming"),
    YARDSTICK: ("#555555", "^", "attention itself"),
}
LOSS = "RELEASED"


def draw(content: dict[str, Any], path: Path) -> None:
    """Write the plot of a result, as PNG."""
    from matplotlib.figure import Figure

    results, setting = content["results"], content["results"]["setting"]
    rows = {row["form"]: row for row in results["growth"] if row["loss"] == LOSS}
    some = rows["streaming"]
    on_cpu, first = setting["device"] == "cpu", some["n_image"][0]
    # On CPU the unit is the yardstick's own time at the smallest size, from the same rounds.
    unit = rows[YARDSTICK]["seconds"][0]["median"] if on_cpu else 1e-3
    figure = Figure(figsize=(9.6, 5.4), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2)
    for form, row in rows.items():
        color, marker, label = STYLES[form]
        style = {"color": color, "marker": marker, "linewidth": 1.8, "markersize": 6}
        times = [[of[key] / unit for of in row["seconds"]] for key in ("median", "lower_quartile", "upper_quartile")]
        slope = row["time_slope"] and row["time_slope"]["median"]
        left.plot(row["n_image"], times[0], label=_label(label, slope, row), **style)
        left.fill_between(row["n_image"], *times[1:], color=color, alpha=0.2, linewidth=0)
        megabytes = [peak / 1e6 for peak in row["peak_bytes"]]
        right.plot(row["n_image"], megabytes, label=_label(label, row["memory_slope"], row), **style)
    left.set_ylabel(f"time; attention itself at M = {first} is 1" if on_cpu else "time, ms")
    right.set_ylabel("peak extra memory, MB")
    ticks = sorted({m for row in rows.values() for m in row["n_image"]})
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(ticks, [str(m) for m in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("image tokens M" + (" (shaded: quartiles)" if axes is left else ""))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axes.yaxis.set_minor_formatter(lambda *_: "")
        axes.grid(which="major", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), frameon=False)
    heads = f"{some['n_text']} text tokens, batch {some['batch']}, {setting['heads']} heads, d = {setting['width']}"
    machine = content["environment"]["machine"]
    where = f"CPU, {machine['threads']} threads" if on_cpu else machine["gpu"]
    figure.suptitle(f"cacr_loss, {LOSS}, forward and backward: {heads}, {setting['dtype']}, {where}", fontsize=11)
    figure.savefig(path, metadata={"Software": None})


def _label(name: str, slope: float | None, row: dict[str, Any]) -> str:
    found = name if slope is None else f"{name}, slope {slope:.2f}"
    return found + "".join(f"\n(M = {m} not run)" for m in row["not_run"])
