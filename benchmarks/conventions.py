"""What the conventions measure: loss, gradient and flatness on random and on structured attention, by precision.

    python -m benchmarks.conventions

Writes `benchmarks/results/conventions.json` and prints the tables of `docs/conventions.md`, which hold the same
numbers (`tests/test_docs.py` compares them).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attncongruence import PRINTED, RELEASED, WEIGHTED_MEAN, Convention, cacr_loss, iais_loss, split_attention
from attncongruence.maps import attention_map, equivalence, project
from benchmarks.record import committed, write

BATCH, HEADS, TEXT, IMAGE, WIDTH = 16, 12, 20, 36, 64
CONVENTIONS = {"RELEASED": RELEASED, "PRINTED": PRINTED, "WEIGHTED_MEAN": WEIGHTED_MEAN}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Loss = Callable[..., Tensor]


def random_scores() -> Tensor:
    """Scores of random queries and keys: standard normal vectors, scaled, so of standard deviation 1."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, BATCH, HEADS, TEXT + IMAGE, WIDTH, generator=generator, dtype=torch.float64)
    return query @ key.mT / math.sqrt(WIDTH)


def structured_scores(congruent: bool) -> Tensor:
    """Text and image tokens of 8 concepts: across modalities each attends to its own concept (+4); within one by a
    random relation of concepts (standard deviation 2), shared by both modalities if congruent; noise 0.5 on all."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    concept = torch.cat([torch.arange(TEXT) % 8, torch.arange(IMAGE) % 8])
    is_text = torch.arange(TEXT + IMAGE) < TEXT
    relation = 2 * normal(BATCH, 1, 8, 8)
    in_image = relation if congruent else 2 * normal(BATCH, 1, 8, 8)
    within_text, within_image = (r[:, :, concept][:, :, :, concept] for r in (relation, in_image))
    across = 4.0 * (concept[:, None] == concept[None, :])
    scores = torch.where(is_text[:, None] & is_text, within_text, within_image)
    scores = torch.where(is_text[:, None] ^ is_text, across, scores)
    return scores + 0.5 * normal(BATCH, HEADS, TEXT + IMAGE, TEXT + IMAGE)


MAPS = {
    "random": random_scores,
    "structured, congruent": lambda: structured_scores(congruent=True),
    "structured, incongruent": lambda: structured_scores(congruent=False),
}


def _entropy(logits: Tensor) -> float:
    """Mean entropy of the rows' softmax, in nats."""
    log_p = logits.log_softmax(-1)
    return float(-(log_p.exp() * log_p).sum(-1).mean())


def flatness(scores: Tensor, convention: Convention) -> dict[str, float]:
    """Entropy of the projected attention and of its target, language side, as shares of log N (1 is flat)."""
    blocks = split_attention(scores, TEXT)
    LL, LV, VV = (attention_map(block, None, convention) for block in (blocks.LL, blocks.LV, blocks.VV))
    R = project(equivalence(LV, None, convention), VV)
    return {"projected": _entropy(R) / math.log(TEXT), "target": _entropy(LL) / math.log(TEXT)}


def magnitude(loss: Loss, scores: Tensor) -> dict[str, float]:
    """Loss of a sample (both directions, batch mean) and norm of its gradient with respect to the scores."""
    leaf = scores.clone().requires_grad_()
    value = loss(leaf, TEXT)
    (grad,) = torch.autograd.grad(value * BATCH, leaf)
    return {"loss": value.item(), "gradient": grad.flatten(1).norm(dim=1).mean().item()}


def rounding(loss: Loss, scores: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Relative error of the loss on rounded scores, and of an exact loss on the same rounded scores."""
    exact = loss(scores, TEXT, reduction="none")
    error = {
        "own": loss(scores.to(dtype), TEXT, reduction="none"),
        "input": loss(scores.to(dtype).double(), TEXT, reduction="none"),
    }
    return {name: float(((value - exact).norm() / exact.norm()).detach()) for name, value in error.items()}


def measure() -> list[dict[str, Any]]:
    """One row for each kind of map and each loss."""
    rows = []
    for maps, make in MAPS.items():
        scores = make()
        losses: dict[tuple[str, str], Loss] = {}
        for name, convention in CONVENTIONS.items():
            losses["CACR", name] = lambda S, n, c=convention, **k: cacr_loss(S, n, convention=c, **k)
            losses["IAIS singular", name] = lambda S, n, c=convention, **k: iais_loss(S, n, convention=c, **k)
        once = replace(RELEASED, target_softmax=False)
        losses["CACR, target as it is", "RELEASED"] = lambda S, n, c=once, **k: cacr_loss(S, n, convention=c, **k)
        losses["IAIS distributed", "RELEASED"] = lambda S, n, **k: iais_loss(S, n, alignment="distributed", **k)
        for (name, convention), loss in losses.items():
            row: dict[str, Any] = {"maps": maps, "loss_name": name, "convention": convention}
            row |= magnitude(loss, scores)
            row["rounding"] = {short: rounding(loss, scores, dtype) for short, dtype in DTYPES.items()}
            if name == "CACR":
                row["flatness"] = flatness(scores, CONVENTIONS[convention])
            rows.append(row)
    return rows


def tables(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: magnitudes, what congruence is worth, precision."""
    lines = [
        "| maps | loss | convention | loss, nats | gradient norm | entropy of R | entropy of target |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        flat = row.get("flatness")
        entropy = f"{flat['projected']:.3f} | {flat['target']:.3f}" if flat else " | "
        lines.append(f"{_head(row)} {row['loss']:.4g} | {row['gradient']:.3g} | {entropy} |")
    lines += ["", "| loss | convention | incongruent / congruent |", "| --- | --- | ---: |"]
    loss = {(row["maps"], row["loss_name"], row["convention"]): row["loss"] for row in rows}
    for maps, name, convention in loss:
        if maps == "structured, congruent":
            worth = loss["structured, incongruent", name, convention] / loss[maps, name, convention]
            lines.append(f"| {name} | `{convention}` | {worth:.3g} |")
    lines += [
        "",
        "| maps | loss | convention | fp32 | bf16 | bf16, input alone | fp16 | fp16, input alone |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        errors = row["rounding"]
        cells = [errors["fp32"]["own"]] + [errors[d][which] for d in ("bf16", "fp16") for which in ("own", "input")]
        lines.append(f"{_head(row)} " + " | ".join(f"{error:.1e}" for error in cells) + " |")
    return "\n".join(lines)


def _head(row: dict[str, Any]) -> str:
    return f"| {row['maps']} | {row['loss_name']} | `{row['convention']}` |"


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m benchmarks.conventions", description=__doc__.splitlines()[0]).parse_args()
    write("conventions", "benchmarks.conventions", measure())
    print(tables(committed("conventions")))
