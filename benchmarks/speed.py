"""Time and memory of all forms of a loss, side by side, at the sizes of real models."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import memory
from benchmarks.forms import LOSSES, YARDSTICK, Plan, Size, forms, picked
from benchmarks.record import clock, paired, ratio, spread

# numerator, denominator: how many times longer one takes than the other
RATIOS = (
    ("dense", "streaming"),
    ("compiled", "streaming"),
    ("per sample", "streaming"),
    ("per sample", "dense"),
    ("streaming", YARDSTICK),
    ("dense", YARDSTICK),
    ("auto", "dense"),
)
Outcome = dict[str, Any]


def measure(plan: Plan, progress: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """One block for each size and loss."""
    guard = memory.Guard(plan.device)
    blocks = []
    for size in plan.sizes:
        for name in LOSSES:
            began = time.perf_counter()
            blocks.append(block(plan, size, name, guard))
            progress(
                f"{size.n_text} + {size.n_image}, {name}: {time.perf_counter() - began:.0f} s, {_summary(blocks[-1])}"
            )
    return blocks


def block(plan: Plan, size: Size, name: str, guard: memory.Guard) -> dict[str, Any]:
    """All forms of one loss at one size, in the same rounds."""
    fresh_start(name in plan.compiled)
    runs = forms(plan, size, name)
    entries = plan.entries(size)
    outcomes = {form: first_call((name, form), run, plan, entries, guard) for form, run in runs.items()}
    if name == "RELEASED" and "per sample" not in runs:
        outcomes["per sample"] = {
            "not_run": f"left out above {plan.per_sample_up_to} image tokens, where it takes long"
        }
    seconds = timed({form: run for form, run in runs.items() if "not_run" not in outcomes[form]}, plan)
    for form, times in seconds.items():
        outcomes[form]["seconds"] = spread(times)
    return {
        **size._asdict(),
        "loss": name,
        "picked": picked(plan, size, name),
        "rounds": len(seconds[YARDSTICK]),
        "forms": outcomes,
        "ratios": {f"{a} / {b}": ratio(seconds[a], seconds[b]) for a, b in RATIOS if a in seconds and b in seconds},
    }


def fresh_start(compiled: bool) -> None:
    """Nothing left of what was measured before."""
    gc.collect()
    if compiled:
        torch.compiler.reset()


def first_call(
    form: tuple[str, str], run: Callable[[], Tensor], plan: Plan, entries: int, guard: memory.Guard
) -> Outcome:
    """A form's value and peak memory, or why it is not run; warms it up as well."""
    refusal = guard.refusal(form, entries)
    if refusal is not None:
        return {"not_run": refusal}
    values = []
    try:
        if form[1] == "compiled":
            run()
        peak = memory.peak(lambda: values.append(run()), plan.device)
    except torch.OutOfMemoryError as error:
        why = f"{type(error).__name__}: one map in float32 is {4 * entries / memory.GB:.1f} GB"
    except RuntimeError as error:  # those of the compiler are such
        if form[1] != "compiled":
            raise
        why = f"does not compile here: {type(getattr(error, 'inner_exception', error)).__name__}"
    else:
        guard.saw(form, entries, peak)
        outcome: Outcome = {"peak_bytes": peak}
        return outcome if form[1] == YARDSTICK else outcome | {"value": float(values[0])}
    gc.collect()
    if plan.device == "cuda":
        torch.cuda.empty_cache()
    return {"not_run": why}


def timed(runs: dict[Any, Callable[[], object]], plan: Plan) -> dict[Any, list[float]]:
    """As many rounds as the plan has time for, after one that warms up and tells how long a round takes."""
    now = clock(plan.device)
    began = now()
    for run in runs.values():
        run()
    least, most = plan.rounds
    rounds = max(least, min(most, int(plan.seconds / (now() - began))))
    return paired(runs, rounds, warmup=0, clock=now)


def _summary(block: dict[str, Any]) -> str:
    found = [f"{name} {values['median']:.2f}" for name, values in block["ratios"].items()]
    return ", ".join(found + [f"{form}: {x['not_run']}" for form, x in block["forms"].items() if "not_run" in x])
