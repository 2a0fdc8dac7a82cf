"""Two pictures of the results: where every run ended, and how the methods got there."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.compositionality.tables import NAMES
from benchmarks.compositionality.train import METHODS

# Okabe and Ito's colors, told apart by color-blind readers too.
COLORS = dict(zip(METHODS, ("#555555", "#009E73", "#D55E00", "#CC79A7", "#0072B2"), strict=True))
TITLES = {"regions": "regions (UNITER-style)", "patches": "patches (ViLT-style)"}
CHANCE = 16.67


def draw(results: dict[str, Any], folder: Path) -> None:
    """Write scores.png and curves.png."""
    for name, panel in (("scores", _scores), ("curves", _curves)):
        figure = Figure(figsize=(9.6, 4.4), layout="constrained", dpi=150, facecolor="white")
        for axes, view in zip(figure.subplots(1, 2, sharey=True), TITLES, strict=True):
            panel(axes, results[view])
            seeds = len(results[view]["none"]["groups"])
            axes.set_title(f"{TITLES[view]}, {seeds} seeds", fontsize=11)
            axes.axhline(CHANCE, color="#999999", linewidth=1, linestyle=":")
            axes.set_ylim(-3, 103)
            axes.grid(axis="y", color="#dddddd", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        figure.axes[0].set_ylabel("group score, percent (dotted: chance)")
        if name == "curves":
            handles, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=len(METHODS), frameon=False)
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})


def _scores(axes: Axes, view: dict[str, Any]) -> None:
    """Every run a point; the bar is the mean, the whisker its 95% interval."""
    rng = random.Random(0)
    for place, method in enumerate(METHODS):
        groups, one = view[method]["groups"], view[method]["group"]
        at = [place - 0.12 + 0.24 * rng.random() for _ in groups]
        axes.plot(at, groups, "o", color=COLORS[method], alpha=0.55, markersize=5, markeredgewidth=0)
        if one["low"] is not None:
            error = [[one["mean"] - one["low"]], [one["high"] - one["mean"]]]
            axes.errorbar(place + 0.28, one["mean"], error, fmt="_", color=COLORS[method], capsize=4, markersize=12)
    axes.set_xticks(range(len(METHODS)), [_name(method).replace(" ", "\n") for method in METHODS], fontsize=8.5)


def _curves(axes: Axes, view: dict[str, Any]) -> None:
    """Mean over seeds on the validation set, with its 95% interval."""
    for method in METHODS:
        curve, color = view[method]["curve"], COLORS[method]
        steps = [point["step"] for point in curve]
        axes.plot(steps, [point["mean"] for point in curve], color=color, linewidth=1.8, label=_name(method))
        if curve[0]["low"] is not None:
            low, high = ([point[key] for point in curve] for key in ("low", "high"))
            axes.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)
    axes.set_xlabel("step")


def _name(method: str) -> str:
    return NAMES[method].replace("`", "")
