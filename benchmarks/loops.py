"""Dense against the loops: Algorithm 1 entry by entry, and one sample after the other as in the released codes.

Value and gradient of `cacr_loss`, both directions, float32, from scores. Algorithm 1 runs where a call of it ends in
time; for larger sizes stands how long one would take at least.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from attncongruence import RELEASED, WEIGHTED_MEAN, TokenLayout, cacr_loss, soft_equivalence_loop
from benchmarks import record
from benchmarks.forms import UNITER, Plan, Size, forward_backward
from benchmarks.record import Results, Spread, paired, ratio
from benchmarks.released_loop import cacr_per_sample, uniter_batch

HEADS = 12
TINY = Size("tiny", 3, 4, 1)
CONVENTIONS = {"RELEASED": RELEASED, "WEIGHTED_MEAN": WEIGHTED_MEAN}


def step(loss: Callable[[Tensor], Tensor], scores: Tensor) -> Callable[[], object]:
    """Forward and backward of a loss."""
    return forward_backward(loss, scores.detach().requires_grad_())


def algorithm_1(size: Size, name: str, rounds: int = 3, device: str = "cpu") -> tuple[Spread, float]:
    """Loop over (sample, head, i, j) against the matrix products, no padding; and the loop's seconds for an entry."""

    def steps(size: Size) -> dict[str, Callable[[], object]]:
        length, convention = size.n_text + size.n_image, CONVENTIONS[name]
        scores = torch.randn(size.batch, HEADS, length, length, generator=torch.Generator().manual_seed(0)).to(device)
        return {
            "loop": step(lambda S: soft_equivalence_loop(S, size.n_text, convention=convention), scores),
            "dense": step(lambda S: cacr_loss(S, size.n_text, convention=convention), scores),
        }

    # A loop of thousands of equal steps is warm after a few; the dense form warms up at its own size.
    runs = steps(size)
    steps(TINY)["loop"]()
    paired({"dense": runs["dense"]}, rounds=0)
    seconds = paired(runs, rounds, warmup=0, clock=record.clock(device))
    return ratio(seconds["loop"], seconds["dense"]), min(seconds["loop"]) / entries(size, name)


def entries(size: Size, name: str) -> int:
    """How many entries of R, of both directions, the loop computes."""
    maps = HEADS if CONVENTIONS[name].heads == "mean_loss" else 1
    return size.batch * maps * (size.n_text**2 + size.n_image**2)


def per_sample(batch: int, rounds: int = 30, device: str = "cpu") -> dict[str, Spread]:
    """The released codes' loop, one call a direction, against one dense call for both; ragged batch."""
    scores, text, image = (x.to(device) for x in uniter_batch(batch, UNITER.n_text, UNITER.n_image, HEADS))
    layout, mask = TokenLayout(text, image), text | image

    def loop(S: Tensor) -> Tensor:
        return sum(
            (cacr_per_sample(S, text, image, UNITER.n_text, direction) for direction in ("language", "vision")),
            S.new_zeros(()),
        )

    seconds = paired(
        {
            "per sample": step(loop, scores),
            "dense, boundary and mask": step(lambda S: cacr_loss(S, UNITER.n_text, mask=mask), scores),
            "dense, TokenLayout": step(lambda S: cacr_loss(S, layout), scores),
        },
        rounds=rounds,
        warmup=3,
        clock=record.clock(device),
    )
    return {name: ratio(seconds["per sample"], times) for name, times in seconds.items() if name != "per sample"}


def measure(plan: Plan, progress: Callable[[str], None] = print) -> Results:
    """Algorithm 1 at one size after the other, as long as a call stays short, then the loop over samples."""
    results: Results = {}
    an_entry = dict.fromkeys(CONVENTIONS, 0.0)
    for number, size in enumerate(plan.sizes):
        # UNITER's batch is the one to compare with; above, one sample shows as much.
        one = size if number == 0 else size._replace(batch=1)
        what = f"Algorithm 1 loop / dense, batch {one.batch}, {HEADS} heads, {one.n_text} + {one.n_image}"
        results[what] = {}
        for name in CONVENTIONS:
            began, expected = time.perf_counter(), an_entry[name] * entries(one, name)
            if number and expected > plan.longest_loop:
                results[what][name] = {"not_run": f"at least {_duration(expected)} a call"}
                continue
            results[what][name], an_entry[name] = algorithm_1(one, name, plan.loop_rounds, plan.device)
            progress(f"{what}, {name}: {time.perf_counter() - began:.0f} s, {results[what][name]['median']:.0f}")
    batch = 2 if plan.quick else 32
    what = f"per-sample loop / dense, batch {batch}, {HEADS} heads, {UNITER.n_text} + {UNITER.n_image}"
    results[what] = per_sample(batch, plan.loop_rounds * 10, plan.device)
    return results


def table(results: Results) -> str:
    """The ratios as Markdown."""
    return record.table("time of forward and backward", results, _times)


def _times(value: float) -> str:
    return f"{value:,.0f}x" if value >= 100 else f"{value:.1f}x"


def _duration(seconds: float) -> str:
    units = ((3600, "h"), (60, "min"), (1, "s"))
    return next((f"{seconds / length:.0f} {unit}" for length, unit in units if seconds >= length), f"{seconds:.1g} s")
