"""The summary as Markdown tables, and the page that holds them: `docs/compositionality.md`.

A table stands between `<!-- compositionality NAME -->` and `<!-- /compositionality -->`, and a test holds it to the
results.
"""

from __future__ import annotations

import re
from typing import Any

from benchmarks.compositionality.grid import LOSSES
from benchmarks.compositionality.train import METHODS

MARKED = re.compile(r"(<!-- compositionality (\w+) -->\n).*?(<!-- /compositionality -->)", re.DOTALL)
NAMES = {
    "none": "none",
    "iais": "IAIS singular",
    "cacr-released": "CACR `RELEASED`",
    "cacr-printed": "CACR `PRINTED`",
    "cacr-weighted-mean": "CACR `WEIGHTED_MEAN`",
}
CHANCE = (25.0, 25.0, 16.67)


def fill(page: str, content: dict[str, Any]) -> str:
    """A page with every table between marks as it is in the results."""
    found = tables(content["results"])
    return MARKED.sub(lambda match: f"{match[1]}\n{found[match[2]]}\n\n{match[3]}", page)


def tables(results: dict[str, Any]) -> dict[str, str]:
    """All tables, by name."""
    made = {"sweep": _sweep(results), "tuning": _tuning(results), "cost": _cost(results)}
    for view in ("regions", "patches"):
        made[f"{view}_scores"] = _scores(results[view])
        made[f"{view}_speed"] = _speed(results[view])
        made[f"{view}_attention"] = _attention(results[view])
        made[f"{view}_congruence"] = _congruence(results[view])
    return made


def _table(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _sweep(results: dict[str, Any]) -> str:
    rows = [
        [f"{float(share):.0%}", ", ".join(f"{group:.1f}" for group in groups)]
        for share, groups in results["sweep"].items()
    ]
    return _table(["swapped negatives", "group score of the plain model, each seed"], rows)


def _tuning(results: dict[str, Any]) -> str:
    rows = []
    for method in LOSSES:
        for schedule in ("constant", "exponential"):
            trials = [one for one in results["tuning"][method] if one["schedule"] == schedule]
            cells = [f"{one['weight']:g}: {one['group']:.1f}" for one in trials]
            cells = [f"**{cell}**" if one["best"] else cell for cell, one in zip(cells, trials, strict=True)]
            rows.append([NAMES[method], schedule, *cells])
    return _table(["", "schedule", *["weight: group"] * (len(rows[0]) - 2)], rows, left=2)


def _scores(view: dict[str, Any]) -> str:
    rows = [["chance", *(f"{chance:g}" for chance in CHANCE), "", "", ""]]
    for method in METHODS:
        one = view[method]
        row = [NAMES[method], *(_interval(one[score]) for score in ("text", "image", "group"))]
        rows.append([*row, *(_difference(one["difference"]) if method != "none" else ["", "", ""])])
    return _table(["", "text", "image", "group", "group minus none", "better : worse", "p (Holm)"], rows)


def _speed(view: dict[str, Any]) -> str:
    rows = []
    for method in METHODS:
        one, half = view[method], view[method]["half"]
        median = f"{half['median']:g}" if half["median"] else "not reached"
        row = [NAMES[method], f"{half['reached']} of {half['runs']}", median]
        rows.append([*row, *(_difference(one["area"]) if method != "none" else ["", "", ""])])
    head = ["", "runs that reach 50%", "median step", "mean along the curve, minus none", "better : worse", "p (Holm)"]
    return _table(head, rows)


def _difference(one: dict[str, Any]) -> list[str]:
    p = f"{one['p']:.3f} ({one['holm']:.3f})"
    return [_interval(one, sign="+"), f"{one['better']} : {one['worse']}", p]


def _attention(view: dict[str, Any]) -> str:
    head = ["", "argmax entropy", "distance `RELEASED`", "distance `WEIGHTED_MEAN`"]
    blocks = ("LL", "LV", "VL", "VV")
    names = ["argmax_entropy", "distance_released", "distance_weighted_mean", *(f"flatness_{b}" for b in blocks)]
    columns = [*head, *(f"flatness {block}" for block in blocks)]
    rows = [["before training", *(_number(view["none"]["attention"]["before"][name]["mean"]) for name in names)]]
    for method in METHODS:
        after = view[method]["attention"]["after"]
        rows.append([NAMES[method], *(_number(after[name]["mean"]) for name in names)])
    return _table(columns, rows)


def _congruence(view: dict[str, Any]) -> str:
    rows = [
        [name.replace("_", " "), _number(one["rho"], "+.2f"), _number(one["p"], ".3f")]
        for name, one in view["congruence"].items()
    ]
    return _table(["after training", "rank correlation with group", "p"], rows)


def _cost(results: dict[str, Any]) -> str:
    cost = results.get("cost")
    if not cost:
        return "Not measured yet: `python -m benchmarks.compositionality.cost`."
    rows = []
    for method in LOSSES:
        both = (cost[view][method] for view in ("regions", "patches"))
        cells = [f"{one['median']:.2f} ({one['lower_quartile']:.2f} to {one['upper_quartile']:.2f})" for one in both]
        rows.append([NAMES[method], *cells])
    return _table(["step with the loss / step without", "regions", "patches"], rows)


def _interval(one: dict[str, Any], sign: str = "") -> str:
    if one["low"] is None:
        return format(one["mean"], f"{sign}.1f")
    return f"{one['mean']:{sign}.1f} ({one['low']:{sign}.1f} to {one['high']:{sign}.1f})"


def _number(value: float | None, form: str = ".3g") -> str:
    if value is None:
        return ""
    return "< 1e-6" if value == 0 and form == ".3g" else format(value, form)  # runs keep six decimals
