"""A long training run, to see whether anything grows, breaks or stays behind: capture, regularize and schedule on ViLT.

    python -m benchmarks.soak [--steps 2000]

A tiny ViLT from its configuration, with batches of 1 to 4 and texts of 2 to 8 tokens that change at every step. Now and
then it is evaluated, runs in training mode without gradients, or is given a batch that makes its forward raise, before
its attention has run or after. Every 20th part of the run counts memory, live tensors and hooks. Writes
`benchmarks/results/soak-cpu.json`: counts, and memory as a ratio to what it was at the first count.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViltConfig, ViltForQuestionAnswering

from attncongruence import CACRLoss, capture_attention, exponential_warmup, iais_loss, regularize
from benchmarks.record import write

LONGEST, WORDS = 8, 50
COUNTS = 20
EVAL_EVERY, RAISE_EVERY, NO_GRAD_EVERY = 7, 11, 13
Batch = dict[str, Tensor]


def tiny_vilt() -> ViltForQuestionAnswering:
    """A ViLT of two small layers: 4 image patches, three answers."""
    config = ViltConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        vocab_size=WORDS,
        max_position_embeddings=LONGEST,
        num_labels=3,
    )
    return ViltForQuestionAnswering(config)


def draw(random: torch.Generator) -> Batch:
    """A batch of another size and text length each time, its last text padded."""
    size, length = (int(torch.randint(low, high, (), generator=random)) for low, high in ((1, 5), (2, LONGEST + 1)))
    mask = torch.ones(size, length, dtype=torch.long)
    mask[-1, length // 2 :] = 0
    return {
        "input_ids": torch.randint(1, WORDS, (size, length), generator=random),
        "attention_mask": mask,
        "pixel_values": torch.randn(size, 3, 16, 16, generator=random),
        "labels": torch.rand(size, 3, generator=random),
    }


def spoiled(batch: Batch, late: bool) -> Batch:
    """A batch that makes forward raise: labels that fit no answer, seen last, or an id that no embedding has."""
    if late:
        return batch | {"labels": batch["labels"][:, :2]}
    return batch | {"input_ids": batch["input_ids"] + WORDS}


def hooks(model: nn.Module) -> int:
    """Hooks on all modules, and forward methods put in the place of their own."""
    kept = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(
        sum(len(getattr(module, name)) for name in kept) + ("forward" in vars(module)) for module in model.modules()
    )


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def slope(values: list[float]) -> float:
    """Least squares: growth from one value to the next."""
    middle, mean = (len(values) - 1) / 2, sum(values) / len(values)
    spread = sum((i - middle) ** 2 for i in range(len(values)))
    return sum((i - middle) * (value - mean) for i, value in enumerate(values)) / spread


def measure(steps: int, seed: int = 0) -> dict[str, Any]:
    """The results that the file holds."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    model = tiny_vilt()
    found, probe = hooks(model), draw(random)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = dict.fromkeys(("steps", "evaluations", "passes_without_grad", "raised", "not_finite"), 0)
    counts: list[dict[str, Any]] = []
    weight = exponential_warmup(total_steps=steps // 2)
    with (
        regularize(
            model, CACRLoss(), n_text=lambda batch, captured: batch["input_ids"].shape[1], weight=weight
        ) as regularizer,
        capture_attention(model, [0, 1]) as capture,
    ):
        for step in range(steps):
            model.train()
            if step % RAISE_EVERY == 1:
                try:
                    model(**spoiled(draw(random), late=bool(step % 2)))
                except (ValueError, IndexError):
                    seen["raised"] += 1
            if step % NO_GRAD_EVERY == 2:
                with torch.no_grad():
                    model(**draw(random))
                seen["passes_without_grad"] += 1
            batch = draw(random)
            loss = model(**batch).loss
            for captured in capture.pop_all():
                loss = loss + 0.1 * iais_loss(captured, batch["input_ids"].shape[1])
            loss.backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            finite = math.isfinite(loss.item()) and all(bool(grad.isfinite().all()) for grad in grads)
            seen["not_finite"] += not finite
            optimizer.step()
            optimizer.zero_grad()
            seen["steps"] += 1
            if step % EVAL_EVERY == 3:
                model.eval()
                with torch.no_grad():
                    model(**draw(random))
                seen["evaluations"] += 1
            del batch, loss, captured, grads
            if (step + 1) % (steps // COUNTS) == 0:
                gc.collect()
                tensors = sum(isinstance(thing, Tensor) for thing in gc.get_objects())
                counts.append({"step": step + 1, "memory": resident(), "tensors": tensors, "hooks": hooks(model)})
        counted = regularizer.step
    model.eval()
    with torch.no_grad():
        as_left = model(**probe).logits
        again = tiny_vilt().eval()
        again.load_state_dict(model.state_dict())
        as_new = again(**probe).logits
    # From the second quarter on: before, allocators and caches fill.
    first, settled = counts[0]["memory"], [count["memory"] for count in counts[COUNTS // 4 :]]
    for count in counts:
        count["memory"] = round(count["memory"] / first, 4)
    return seen | {
        "steps_that_the_regularizer_counted": counted,
        "hooks_left": hooks(model) - found,
        "outputs_as_an_untouched_model": bool(torch.equal(as_left, as_new)),
        "memory_growth_per_1000_steps": round(slope(settled) * 1000 / (steps // COUNTS) / settled[0], 5),
        "most_tensors_gained_between_counts": max(b["tensors"] - a["tensors"] for a, b in pairwise(counts)),
        "tensors_gained_in_the_run": counts[-1]["tensors"] - counts[0]["tensors"],
        "counts": counts,
    }


def table(results: dict[str, Any]) -> str:
    """What `docs/reliability.md` says of them, as Markdown."""
    rows = {
        "training steps": results["steps"],
        "evaluations between them": results["evaluations"],
        "passes in training mode without gradients": results["passes_without_grad"],
        "exceptions raised in forward": results["raised"],
        "steps that the regularizer counted": results["steps_that_the_regularizer_counted"],
        "losses or gradients that were not finite": results["not_finite"],
        "growth of memory per 1,000 steps, after the first quarter": f"{results['memory_growth_per_1000_steps']:.2%}",
        "tensors alive at the last count, more than at the first": results["tensors_gained_in_the_run"],
        "hooks on the model at each count": ", ".join(
            map(str, sorted({count["hooks"] for count in results["counts"]}))
        ),
        "hooks left afterward": results["hooks_left"],
    }
    lines = [f"| {name} | {f'{value:,}' if isinstance(value, int) else value} |" for name, value in rows.items()]
    return "\n".join(["| soak | |", "| --- | ---: |", *lines])


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2000)
    results = measure(parser.parse_args().steps)
    print(table(results))
    print(f"written to {write('soak-cpu', 'benchmarks.soak', results)}")


if __name__ == "__main__":
    main()
