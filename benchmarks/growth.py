"""How time and memory grow with the number of image tokens: the slope of a straight line through their logarithms."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import memory
from benchmarks.forms import LOSSES, YARDSTICK, Plan, Size, forms
from benchmarks.record import spread
from benchmarks.speed import first_call, fresh_start, timed


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent of the power law that fits best, to two points or more: least squares on logarithms."""
    u, v = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    covariance = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True))
    return covariance / sum((a - mean_u) ** 2 for a in u)


def measure(plan: Plan, progress: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Streaming for each loss; for the first, which is plotted, the other forms as well."""
    rows = []
    for number, name in enumerate(LOSSES):
        began = time.perf_counter()
        compiled = ("compiled",) if name in plan.compiled else ()
        rows += of_loss(plan, name, ("streaming",) if number else ("dense", *compiled, "streaming", YARDSTICK))
        progress(f"growth, {name}: {time.perf_counter() - began:.0f} s")
    return rows


def of_loss(plan: Plan, name: str, wanted: tuple[str, ...]) -> list[dict[str, Any]]:
    """One row for each form; all sizes of all forms stand side by side in each round."""
    fresh_start(name in plan.compiled)
    largest = plan.sizes[-1]
    guard = memory.Guard(plan.device)
    runs, first = {}, {}
    for n_image in plan.growth:
        size = Size("growth", largest.n_text, n_image, largest.batch)
        made = forms(plan, size, name)
        for form in wanted:
            first[form, n_image] = first_call((name, form), made[form], plan, plan.entries(size), guard)
            if "not_run" not in first[form, n_image]:
                runs[form, n_image] = made[form]
    seconds = timed(runs, plan)
    return [_row(plan, largest, name, form, first, seconds) for form in wanted]


def _row(
    plan: Plan, size: Size, name: str, form: str, first: dict[Any, Any], seconds: dict[Any, Any]
) -> dict[str, Any]:
    """Points and slopes of one form."""
    ran = [m for m in plan.growth if (form, m) in seconds]
    times = [seconds[form, m] for m in ran]
    peaks = [first[form, m]["peak_bytes"] for m in ran]
    fits = len(ran) > 1
    return {
        "loss": name,
        "form": form,
        "n_text": size.n_text,
        "batch": size.batch,
        "n_image": ran,
        "rounds": len(times[0]),
        "seconds": [spread(values) for values in times],
        "peak_bytes": peaks,
        "time_slope": spread([slope(ran, of_round) for of_round in zip(*times, strict=True)]) if fits else None,
        "memory_slope": slope(ran, peaks) if fits else None,
        "not_run": {str(m): x["not_run"] for m in plan.growth if "not_run" in (x := first[form, m])},
    }
