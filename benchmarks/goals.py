"""What the streaming form was built to reach, and what a result says about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.forms import LOSSES, YARDSTICK

Content = dict[str, Any]
Figure = Callable[[Content, str], float | None]


class Goal(NamedTuple):
    """A figure for each loss that should be at least, or at most, so much."""

    what: str
    figure: Figure
    sign: str
    limit: float
    unit: str = "x"

    def met(self, value: float) -> bool:
        """Whether a value is on the right side."""
        return value >= self.limit if self.sign == ">=" else value <= self.limit


def goals_for(device: str) -> list[Goal]:
    """As they were set before anything was measured."""
    if device == "cpu":
        made = _at(2304, ("dense / streaming", ">=", 3), ("memory", ">=", 8), (f"streaming / {YARDSTICK}", "<=", 3))
        loop = 300
    else:
        of_size = (
            (f"streaming / {YARDSTICK}", "<=", 2),
            ("dense / streaming", ">=", 5),
            ("compiled / streaming", ">=", 2),
            ("memory", ">=", 50),
        )
        made = [goal for n_image in (576, 2304, 4096) for goal in _at(n_image, *of_size)]
        loop = 10_000
    return [
        *made,
        Goal("auto / dense, time, worst size", _auto, "<=", 1.05),
        Goal("slope of streaming's time against M", _time_slope, "<=", 2.1, ""),
        Goal("slope of streaming's memory against M", _memory_slope, "<=", 1.1, ""),
        Goal("Algorithm 1 loop / dense, UNITER", lambda c, loss: _loop(c, loss, 0), ">=", loop),
        Goal("per-sample loop / dense, UNITER", lambda c, loss: _loop(c, loss, -1), ">=", 10),
    ]


def table(content: Content) -> str:
    """The goals as Markdown, what was missed marked as such."""
    lines = [
        "| figure | goal | " + " | ".join(LOSSES) + " |",
        "| --- | ---: | " + " | ".join("---:" for _ in LOSSES) + " |",
    ]
    for goal in goals_for(content["results"]["setting"]["device"]):
        cells = [goal.what, f"{goal.sign} {goal.limit:,}{goal.unit}"]
        for loss in LOSSES:
            value = goal.figure(content, loss)
            missed = "" if value is None or goal.met(value) else ", missed"
            cells.append("–" if value is None else f"{number(value)}{goal.unit}{missed}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def number(value: float) -> str:
    """As many digits as a reader wants: 4,609, 312, 41.6, 3.07, 0.002."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.01 else f"{value:.1g}"


def _at(n_image: int, *wanted: tuple[str, str, float]) -> list[Goal]:
    """Goals for one size."""
    titles = {"memory": "dense / streaming, peak extra memory"}
    return [
        Goal(f"{titles.get(name, f'{name}, time')}, 64 + {n_image}", _of_size(n_image, name), sign, limit)
        for name, sign, limit in wanted
    ]


def _of_size(n_image: int, name: str) -> Figure:
    """A ratio of times, or `"memory"`: that of peaks."""

    def figure(content: Content, loss: str) -> float | None:
        for block in content["results"]["speed"]:
            if block["n_image"] == n_image and block["loss"] == loss:
                if name != "memory":
                    return block["ratios"].get(name, {}).get("median")
                peaks = [block["forms"][form].get("peak_bytes") for form in ("dense", "streaming")]
                return peaks[0] / peaks[1] if all(peaks) else None
        return None

    return figure


def _auto(content: Content, loss: str) -> float | None:
    blocks = [block for block in content["results"]["speed"] if block["loss"] == loss]
    ratios = [block["ratios"]["auto / dense"]["median"] for block in blocks if "auto / dense" in block["ratios"]]
    return max(ratios, default=None)


def _streaming(content: Content, loss: str) -> dict[str, Any] | None:
    rows = [row for row in content["results"]["growth"] if (row["loss"], row["form"]) == (loss, "streaming")]
    return rows[0] if rows else None


def _time_slope(content: Content, loss: str) -> float | None:
    row = _streaming(content, loss)
    return row["time_slope"]["median"] if row and row["time_slope"] else None


def _memory_slope(content: Content, loss: str) -> float | None:
    row = _streaming(content, loss)
    return row["memory_slope"] if row else None


def _loop(content: Content, loss: str, which: int) -> float | None:
    """Of Algorithm 1 (the first block) or of the loop over samples (the last), which is there for one convention."""
    ratios = list(content["results"]["loops"].values())[which]
    if which == -1:
        return min(ratio["median"] for ratio in ratios.values()) if loss == "RELEASED" else None
    return ratios.get(loss, {}).get("median")
