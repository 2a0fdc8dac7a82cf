"""Random inputs of the losses, drawn by hypothesis, and the ways in which tests call and compare them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attncongruence import (
    PRINTED,
    RELEASED,
    WEIGHTED_MEAN,
    TokenLayout,
    cacr_loss,
    hard_equivalence_loop,
    iais_loss,
    soft_equivalence_loop,
)
from attncongruence.streaming import forms, operators, per_sample


def pairwise(*choices: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Combinations in which any two values of two choices meet at least once: far fewer than all combinations.

    Each step takes the combination with the most pairs that were not met yet; the order of the values breaks ties.
    """
    values = [list(choice) for choice in choices]
    positions = list(itertools.product(*(range(len(choice)) for choice in values)))
    pairs = {at: set(itertools.combinations(enumerate(at), 2)) for at in positions}
    open_pairs, taken = set().union(*pairs.values()), []
    while open_pairs:
        best = max(positions, key=lambda at: len(pairs[at] & open_pairs))
        open_pairs -= pairs[best]
        taken.append(tuple(choice[i] for choice, i in zip(values, best, strict=True)))
    return taken


CONVENTIONS = {"RELEASED": RELEASED, "PRINTED": PRINTED, "WEIGHTED_MEAN": WEIGHTED_MEAN}
DIRECTIONS = ("language", "vision", "both")
KINDS = ("int", "ragged", "interleaved")

# name -> (loss, its oracle, the alignment if it has one, the conventions under which it is defined)
LOSSES = {
    "cacr": (cacr_loss, soft_equivalence_loop, {}, tuple(CONVENTIONS)),
    "singular": (iais_loss, hard_equivalence_loop, {"alignment": "singular"}, tuple(CONVENTIONS)),
    "distributed": (iais_loss, hard_equivalence_loop, {"alignment": "distributed"}, ("RELEASED",)),
}
CASES = [(name, convention) for name, (_, _, _, defined) in LOSSES.items() for convention in defined]


def fast(name: str, *args: object, convention: str = "RELEASED", **kwargs: object) -> Tensor:
    """One of the losses by name."""
    loss, _, extra, _ = LOSSES[name]
    return loss(*args, convention=CONVENTIONS[convention], **extra, **kwargs)


def slow(name: str, *args: object, convention: str = "RELEASED", **kwargs: object) -> Tensor:
    """Its oracle."""
    _, oracle, extra, _ = LOSSES[name]
    return oracle(*args, convention=CONVENTIONS[convention], **extra, **kwargs)


@dataclass
class Problem:
    """Scores, and one of the ways to say where text and image are."""

    S: Tensor
    n_text: int | Tensor | TokenLayout
    mask: Tensor | None
    text: Tensor
    image: Tensor


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_problem(
    kind: str, rank: int, seed: int, batch: int = 2, heads: int = 2, n: int = 4, m: int = 5, scale: float = 1.0
) -> Problem:
    """A problem of up to n text and m image tokens a sample: int, ragged or interleaved layout, 3-D or 4-D scores."""
    generator = torch.Generator().manual_seed(seed)
    length = n + m
    shape = (batch, length, length) if rank == 3 else (batch, heads, length, length)
    S = randn(*shape, seed=seed) * scale
    position = torch.arange(length)
    if kind == "int":
        mask = torch.rand(batch, length, generator=generator) < 0.8 if seed % 2 else None
        real = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
        # A square bool mask could be one of pairs.
        given = mask.long() if mask is not None and batch == length else mask
        return Problem(S, n, given, (position < n) & real, (position >= n) & real)
    if kind == "ragged":
        n_text = torch.randint(0, n + 1, (batch,), generator=generator)
        mask = position < (n_text + torch.randint(0, m + 1, (batch,), generator=generator))[:, None]
        is_text = position < n_text[:, None]
        given = mask.long() if seed % 2 or batch == mask.shape[1] else mask
        return Problem(S, n_text, given, is_text & mask, ~is_text & mask)
    kinds = torch.randint(0, 3, (batch, length), generator=generator)
    text, image = kinds == 0, kinds == 1
    return Problem(S, TokenLayout(text, image), None, text, image)


@st.composite
def problems(draw: st.DrawFn, kind: str, rank: int) -> Problem:
    """Problems of 1 to 9 tokens a side."""
    return make_problem(
        kind,
        rank,
        seed=draw(st.integers(0, 2**20)),
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 2)),
        n=draw(st.integers(1, 9)),
        m=draw(st.integers(1, 9)),
        scale=draw(st.sampled_from([0.3, 1.0, 3.0])),
    )


def set_tiles(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """The streaming form as on a machine with a cache of that many bytes."""
    for module in (operators, forms, per_sample):
        monkeypatch.setattr(module, "cache_bytes", lambda device: size)


def value_and_grad(loss: object, S: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    """A loss and its gradient with respect to the scores, each sample with a weight of its own where there are many."""
    S = S.detach().clone().requires_grad_()
    value = loss(S, *args, **kwargs)  # type: ignore[operator]
    weights = torch.linspace(1.0, 2.0, value.numel(), dtype=value.dtype).view_as(value)
    (grad,) = torch.autograd.grad((value * weights).sum(), S)
    return value.detach(), grad


def assert_close(a: Tensor, b: Tensor, tolerance: float) -> None:
    """Equal to a tolerance relative to the largest entry (or to 1, where all are smaller)."""
    assert a.shape == b.shape
    scale = max(1.0, float(b.detach().abs().max())) if b.numel() else 1.0
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


class Synchronizations(TorchFunctionMode):
    """Counts what makes the host wait for a device: reading values of tensors."""

    READS = ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "nonzero", "cpu", "numpy", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    @property
    def count(self) -> int:
        """How often the host waited."""
        return len(self.names)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.READS:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))
