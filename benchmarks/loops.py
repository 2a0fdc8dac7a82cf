"""Dense against the loops: Algorithm 1 entry by entry, and one sample after the other as in the released codes.

    python -m benchmarks.loops

Value and gradient of `cacr_loss`, both directions, `RELEASED` and `WEIGHTED_MEAN`, UNITER size (20 text tokens, 36
regions, 12 heads). Writes `benchmarks/results/loops-cpu.json`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attncongruence import RELEASED, WEIGHTED_MEAN, TokenLayout, cacr_loss, soft_equivalence_loop
from benchmarks import record
from benchmarks.record import Results, paired, ratio, write
from benchmarks.released_loop import cacr_per_sample, uniter_batch

N_TEXT = 20


def step(loss: Callable[[Tensor], Tensor], scores: Tensor) -> Callable[[], object]:
    """Forward and backward of a loss."""

    def run() -> object:
        leaf = scores.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)

    return run


def algorithm_1(rounds: int = 3) -> dict[str, dict[str, float]]:
    """Loop over (sample, head, i, j) against the matrix products, batch 8, no padding."""
    scores, _, _ = uniter_batch(8)
    results = {}
    for name, convention in (("RELEASED", RELEASED), ("WEIGHTED_MEAN", WEIGHTED_MEAN)):
        seconds = paired(
            {
                "loop": step(lambda S, c=convention: soft_equivalence_loop(S, N_TEXT, convention=c), scores),
                "dense": step(lambda S, c=convention: cacr_loss(S, N_TEXT, convention=c), scores),
            },
            rounds=rounds,
            warmup=1,
        )
        results[name] = ratio(seconds["loop"], seconds["dense"])
    return results


def per_sample(batch: int, rounds: int = 30) -> dict[str, dict[str, float]]:
    """The released codes' loop, one call a direction, against one dense call for both; ragged batch."""
    scores, text, image = uniter_batch(batch)
    layout, mask = TokenLayout(text, image), text | image

    def loop(S: Tensor) -> Tensor:
        return sum(
            (cacr_per_sample(S, text, image, N_TEXT, direction) for direction in ("language", "vision")),
            S.new_zeros(()),
        )

    seconds = paired(
        {
            "per sample": step(loop, scores),
            "dense, boundary and mask": step(lambda S: cacr_loss(S, N_TEXT, mask=mask), scores),
            "dense, TokenLayout": step(lambda S: cacr_loss(S, layout), scores),
        },
        rounds=rounds,
        warmup=3,
    )
    return {name: ratio(seconds["per sample"], times) for name, times in seconds.items() if name != "per sample"}


def table(results: Results) -> str:
    """The ratios as Markdown."""
    return record.table("time of forward and backward", results, _times)


def _times(value: float) -> str:
    return f"{value:,.0f}x" if value >= 100 else f"{value:.1f}x"


def main() -> None:
    """Measure, print and write."""
    torch.set_num_threads(2)
    results: Results = {
        "Algorithm 1 loop / dense, batch 8, 12 heads, 20 + 36": algorithm_1(),
        "per-sample loop / dense, batch 32, 12 heads, 20 + 36": per_sample(32),
    }
    print(table(results))
    print(f"written to {write('loops-cpu', 'benchmarks.loops', results)}")


if __name__ == "__main__":
    main()
