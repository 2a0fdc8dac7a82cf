"""What is timed: the forms of one loss, and the yardstick, from queries and keys to their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attncongruence import PRINTED, RELEASED, WEIGHTED_MEAN, Convention, QueryKey, cacr_loss, iais_loss
from attncongruence.streaming.per_sample import pays
from benchmarks.released_loop import cacr_per_sample

LOSSES: dict[str, tuple[Callable[..., Tensor], Convention]] = {
    "RELEASED": (cacr_loss, RELEASED),
    "PRINTED": (cacr_loss, PRINTED),
    "WEIGHTED_MEAN": (cacr_loss, WEIGHTED_MEAN),
    "IAIS singular": (iais_loss, RELEASED),
}
YARDSTICK = "yardstick"


class Size(NamedTuple):
    """So many text and image tokens, and samples."""

    name: str
    """Of the model that has it, if there is one."""
    n_text: int
    n_image: int
    batch: int


@dataclass(frozen=True)
class Plan:
    """What one run measures, and how long it may take."""

    device: str
    dtype: torch.dtype
    heads: int
    sizes: tuple[Size, ...]
    compiled: tuple[str, ...]
    """The losses whose compiled form is measured: each size compiles anew."""
    seconds: float
    """To spend on the rounds of one loss at one size."""
    rounds: tuple[int, int]
    """At least and at most so many."""
    width: int = 64
    growth: tuple[int, ...] = (576, 1152, 2304, 4608)
    """Image tokens of the growth, beside as many text tokens as the largest size has."""
    per_sample_up_to: int = 2304
    """Image tokens up to which the released codes' loop is measured."""
    longest_loop: float = 15.0
    """Seconds that a call of Algorithm 1 may take."""
    loop_rounds: int = 3
    threads: int = 2
    """On CPU."""
    backend: str = "inductor"
    quick: bool = False

    def entries(self, size: Size) -> int:
        """Entries of one map of all heads and samples."""
        return size.batch * self.heads * (size.n_text + size.n_image) ** 2


UNITER = Size("UNITER", 20, 36, 8)


def plan_for(device: str, quick: bool = False) -> Plan:
    """The sizes of the models that the losses are for, and larger ones."""
    if quick:
        return Plan(
            device,
            dtype=torch.float32,
            heads=2,
            width=8,
            sizes=(Size("tiny", 3, 5, 2), Size("small", 4, 12, 1)),
            growth=(8, 16, 32),
            compiled=(),
            seconds=0.0,
            rounds=(3, 3),
            longest_loop=0.1,
            threads=1,
            quick=True,
        )
    few, one = (8, 8) if device == "cuda" else (4, 1)
    sizes = (UNITER, Size("ViLT", 40, 185, few), Size("CLIP-L/14 at 336", 64, 576, one))
    sizes += (Size("", 64, 2304, one), Size("", 64, 4096, one))
    if device == "cuda":
        # 138 GB for one map in float32: the largest is out of reach of what builds maps.
        sizes += (Size("", 64, 16384, one),)
        return Plan(device, torch.bfloat16, heads=16, sizes=sizes, compiled=tuple(LOSSES), seconds=2.0, rounds=(5, 50))
    compiled = ("RELEASED", "WEIGHTED_MEAN")
    return Plan(device, torch.float32, heads=12, sizes=sizes, compiled=compiled, seconds=10.0, rounds=(3, 60))


def inputs(plan: Plan, size: Size, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, standard normal, `(batch, heads, length, width)`."""
    generator = torch.Generator(plan.device).manual_seed(seed)
    shape = (3, size.batch, plan.heads, size.n_text + size.n_image, plan.width)
    q, k, v = torch.randn(shape, generator=generator, device=plan.device).to(plan.dtype)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def forward_backward(value: Callable[..., Tensor], *leaves: Tensor) -> Callable[[], Tensor]:
    """Value and gradient of a function; a call returns the value."""

    def run() -> Tensor:
        result = value(*leaves)
        torch.autograd.grad(result, leaves, torch.ones_like(result))
        return result.detach()

    return run


def loss_from(name: str, n_text: int, impl: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss as a function of queries and keys."""
    function, convention = LOSSES[name]
    return lambda q, k: function(QueryKey(q, k), n_text, convention=convention, impl=impl)


def forms(plan: Plan, size: Size, name: str) -> dict[str, Callable[[], Tensor]]:
    """Forward and backward of every form of a loss, by its name in the results."""
    q, k, v = inputs(plan, size)
    dense = loss_from(name, size.n_text, "dense")
    # Next to each other: where auto takes the dense form, neither may have a better neighbor.
    made = {"dense": dense, "auto": loss_from(name, size.n_text, "auto")}
    if name in plan.compiled:
        made["compiled"] = torch.compile(dense, backend=plan.backend, fullgraph=True, dynamic=False)
    made["streaming"] = loss_from(name, size.n_text, "streaming")
    if name == "RELEASED" and size.n_image <= plan.per_sample_up_to:
        made["per sample"] = per_sample_loop(size, plan.device)
    runs = {form: forward_backward(value, q, k) for form, value in made.items()}
    return runs | {YARDSTICK: forward_backward(nn.functional.scaled_dot_product_attention, q, k, v)}


def picked(plan: Plan, size: Size, name: str) -> str:
    """The form that `impl="auto"` takes."""
    q, _, _ = inputs(plan, size)
    return "streaming" if pays(q, (size.n_text, size.n_image), LOSSES[name][1]) else "dense"


def per_sample_loop(size: Size, device: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The released codes' way, one direction a call, one sample after the other."""
    text = (torch.arange(size.n_text + size.n_image, device=device) < size.n_text).expand(size.batch, -1)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        scores = QueryKey(q, k).scores
        language, vision = (cacr_per_sample(scores, text, ~text, size.n_text, d) for d in ("language", "vision"))
        return language + vision

    return loss
