"""What can be measured of one layer: what was captured, the losses, their gradient and what they cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attncongruence._typing import Direction
from attncongruence.capture import CapturedAttention, capture_attention
from attncongruence.conventions import PRINTED, RELEASED, WEIGHTED_MEAN
from attncongruence.doctor import bench
from attncongruence.doctor.bench import Inputs
from attncongruence.doctor.report import Captured, Gradient, LossRow, Overhead
from attncongruence.losses import cacr_loss, iais_loss
from attncongruence.training.term import Where

_LOSSES = (
    ("CACR, RELEASED", cacr_loss, RELEASED),
    ("CACR, PRINTED", cacr_loss, PRINTED),
    ("CACR, WEIGHTED_MEAN", cacr_loss, WEIGHTED_MEAN),
    ("IAIS singular, RELEASED", iais_loss, RELEASED),
)
_DIRECTIONS: tuple[Direction, ...] = ("language", "vision", "both")
_NOISE = 1e-5  # of the layer's largest gradient: a bias of keys moves no softmax, and gets rounding errors


def captured(record: CapturedAttention) -> Captured:
    """What capture took."""
    query, allowed = record.query, record.allowed
    kind, hidden = "none", 0.0
    if allowed is not None:
        hidden = 1 - allowed.float().mean().item()
        spread = allowed.expand(allowed.shape[0], allowed.shape[1], *record.lengths)
        kind = "pairs"
        if not bool((allowed != allowed[:, :1, :1]).any()):
            kind = "tokens"
        elif not bool(spread.triu(1).any()):
            kind = "causal"
    with torch.no_grad():
        shifted = query is None and bool((record.scores.amax(-1).abs() < 1e-6).all())
    return Captured(
        (record.batch_size, record.heads, *record.lengths),
        str((record.scores if query is None else query).dtype).removeprefix("torch."),
        query is not None,
        query is not None and kind in ("none", "tokens"),
        kind,
        hidden,
        shifted,
    )


def share(record: CapturedAttention, rows: Tensor, columns: Tensor) -> float:
    """Share of the pairs (row, column) that may attend; 1 where there is no such pair."""
    pairs = rows[:, None, :, None] & columns[:, None, None, :]
    allowed = pairs if record.allowed is None else pairs & record.allowed
    return (allowed.sum() / pairs.expand(allowed.shape).sum().clamp(min=1)).item() if pairs.any() else 1.0


@torch.no_grad()
def losses(record: CapturedAttention, place: Where) -> list[LossRow]:
    """Every convention in every direction, in nats."""
    rows = []
    for name, loss, convention in _LOSSES:
        values: dict[Direction, float | None] = dict.fromkeys(_DIRECTIONS)
        why = ""
        for direction in _DIRECTIONS:
            try:
                values[direction] = loss(record, place, convention=convention, direction=direction).item()
            except ValueError as error:
                why = why or str(error)
        rows.append(LossRow(name, values["language"], values["vision"], values["both"], why))
    return rows


@dataclass(frozen=True)
class Step:
    """A training step of the model, with and without the congruence loss (`RELEASED`)."""

    model: nn.Module
    batch: Inputs
    layer: str
    number: int
    place: Where
    direction: Direction

    def gradient(self) -> Gradient | None:
        """Which parameters the congruence loss alone trains; None where the layer was captured without gradient."""
        with capture_attention(self.model, self.layer) as capture:
            bench.call(self.model, self.batch)
            try:
                record = capture.pop_all()[self.number]
            except RuntimeError:
                return None
        cacr_loss(record, self.place, direction=self.direction).backward()
        sizes = {
            name: 0.0 if p.grad is None else p.grad.abs().max().item()
            for name, p in self.model.named_parameters()
            if p.numel()
        }
        inside = [name for name in sizes if not self.layer or name.startswith(f"{self.layer}.")]
        frozen = [name for name, p in self.model.named_parameters() if name in inside and not p.requires_grad]
        least = _NOISE * max((sizes[name] for name in inside), default=0.0)
        reached = [name for name in inside if sizes[name] > least]
        elsewhere = sum(size > 0 for name, size in sizes.items() if name not in inside)
        bench.clear(self.model)
        return Gradient(reached, [n for n in inside if n not in reached + frozen], frozen, elsewhere)

    def overhead(self, rounds: int) -> Overhead:
        """How many times longer a step takes with the loss; capture is put on and taken off in each."""

        def plain() -> None:
            main = bench.main_loss(bench.call(self.model, self.batch))
            if main is not None:
                main.backward()

        def full() -> None:
            with capture_attention(self.model, self.layer) as capture:
                main = bench.main_loss(bench.call(self.model, self.batch))
                congruence = cacr_loss(capture.pop_all()[self.number], self.place, direction=self.direction)
            (congruence if main is None else main + congruence).backward()

        return bench.overhead(self.model, plain, full, rounds)
