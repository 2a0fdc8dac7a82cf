"""Runs a model again and again under one seed: what is captured, the losses, their gradient and their cost."""

from __future__ import annotations

import dataclasses
import statistics
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from attncongruence import _compat
from attncongruence._typing import Direction
from attncongruence.blocks import NText
from attncongruence.capture import CapturedAttention, capture_attention
from attncongruence.capture.find import named_modules, watch_model
from attncongruence.capture.product import Log
from attncongruence.doctor.report import Captured, Gradient, LossRow, Overhead, ProblemFound, listing, within
from attncongruence.losses import LOSSES, cacr_loss, congruence_loss
from attncongruence.training.term import loss_in

Inputs = Mapping[str, Any] | tuple[Any, ...]  # keyword arguments, or positional ones
_LOSSES = (("cacr", "released"), ("cacr", "printed"), ("cacr", "weighted_mean"), ("singular", "released"))


def call(model: nn.Module, inputs: Inputs) -> Any:
    """One forward pass under a fixed seed, so that dropout and random choices (ViLT's patches) repeat."""
    torch.manual_seed(0)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def attention_of(model: nn.Module, inputs: Inputs) -> tuple[Log, Any]:
    """Every attention operation of one forward pass, in order, and the output."""
    log: Log = []
    with closing(watch_model(model, True, lambda name, part: log.extend(part))):
        output = call(model, inputs)
    return log, output


def in_training(records: list[CapturedAttention]) -> list[int]:
    """Which operations training captures: not those of an inner pass with gradients off, as where negatives are ranked.

    A module that never runs with gradient stays, so that the report can say why it gets none.
    """
    trained = {record.layer for record in records if record.requires_grad}
    return [n for n, record in enumerate(records) if record.requires_grad or record.layer not in trained]


def same(one: Any, other: Any) -> bool:
    """Whether two outputs are bitwise equal."""
    ours, theirs = ([t.nan_to_num() for t in _tensors(output)] for output in (one, other))
    return len(ours) == len(theirs) > 0 and all(map(torch.equal, ours, theirs))


def _tensors(output: Any) -> list[Tensor]:
    """All floating-point tensors of an output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    elif dataclasses.is_dataclass(output):
        output = list(vars(output).values())
    return [t for part in output for t in _tensors(part)] if isinstance(output, list | tuple) else []


def hooks(model: nn.Module) -> int:
    """Number of this library's hooks; others, transformers for one, may add their own in the first forward pass."""
    found = [hook for module in model.modules() for hook in _compat.hooks_of(module)]
    return sum("attncongruence" in f"{type(hook).__module__} {getattr(hook, '__module__', '')}" for hook in found)


@contextmanager
def as_found(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Training mode with gradients on; afterward modes, gradients, buffers and random numbers are as before."""
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    leaves = [*model.parameters(), *(t for t in values if isinstance(t, Tensor) and t.is_leaf)]
    grads = [(leaf, leaf.grad) for leaf in leaves]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m.named_buffers(recurse=False)]
    for leaf in leaves:
        leaf.grad = None
    if not model.training:  # else parts that are kept in eval mode stay there
        model.train()
    try:
        devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for leaf, grad in grads:
            leaf.grad = grad
        for module, name, buffer, copy in buffers:
            setattr(module, name, buffer)
            if not torch.equal(buffer, copy):
                with torch.no_grad():
                    buffer.copy_(copy)


@torch.no_grad()
def captured(record: CapturedAttention) -> Captured:
    """The record, described."""
    query, allowed = record.query, record.allowed
    mask = "none"
    if allowed is not None:
        by_token = bool((allowed == allowed[:, :1, :1]).all())
        upper = allowed.expand(*allowed.shape[:2], *record.lengths).triu(1)
        mask = "tokens" if by_token else "pairs" if bool(upper.any()) else "causal"
    return Captured(
        shape=(record.batch_size, record.heads, *record.lengths),
        dtype=str((record.scores if query is None else query).dtype).removeprefix("torch."),
        offers_query_key=query is not None,
        streaming=query is not None and mask in ("none", "tokens"),
        mask=mask,
        hidden=0.0 if allowed is None else 1 - allowed.float().mean().item(),
        shifted=query is None and bool((record.scores.amax(-1).abs() < 1e-6).all()),
    )


@torch.no_grad()
def losses(record: CapturedAttention, n_text: NText) -> list[LossRow]:
    """The losses under each convention in each direction, in nats."""
    directions: tuple[Direction, ...] = ("language", "vision", "both")
    rows = []
    for loss, convention in _LOSSES:
        values: dict[str, float | None] = dict.fromkeys(directions)
        why = ""
        for direction in directions:
            try:
                nats = congruence_loss(loss, record, n_text, convention=convention, direction=direction)
                values[direction] = nats.item()
            except ValueError as error:
                why = why or str(error)
        rows.append(LossRow(f"{LOSSES[loss].title}, {convention.upper()}", **values, why=why))
    return rows


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step with the congruence loss (`RELEASED`) of one layer."""

    model: nn.Module
    inputs: Inputs
    layer: str
    number: int  # of the layer's operations before the one that counts
    n_text: NText
    direction: Direction

    def _run(self) -> tuple[Any, Tensor]:
        # For analysis: a layer without gradient raises no error here, `gradient` reports it.
        with capture_attention(self.model, self.layer, analysis=True) as capture:
            output = call(self.model, self.inputs)
            records = capture.pop_all()
        records = [records[index] for index in in_training(records)]
        if self.number >= len(records):
            raise ProblemFound(
                f"{self.layer or 'the model'} attended {self.number + 1} times in one forward pass and {len(records)} "
                "times in the next",
                "a layer that attends equally often in each forward pass",
                "fix the random choices that the model makes in its forward, or name another layer.",
            )
        return output, cacr_loss(records[self.number], self.n_text, direction=self.direction)

    def gradient(self) -> Gradient:
        """Which parameters the congruence loss alone trains; ProblemFound where it trains none."""
        _, congruence = self._run()
        if congruence.requires_grad:
            congruence.backward()
        parameters = {name: p for name, p in self.model.named_parameters() if p.numel()}
        sizes = {name: 0.0 if p.grad is None else p.grad.abs().max().item() for name, p in parameters.items()}
        inside = [name for name in sizes if within(name, self.layer)]
        # The bias of keys only shifts rows: its gradient is a rounding error.
        least = 1e-5 * max((sizes[name] for name in inside), default=0.0)
        frozen = [name for name in inside if not parameters[name].requires_grad]
        reached = [name for name in inside if sizes[name] > least]
        elsewhere = sum(size > 0 for name, size in sizes.items() if name not in inside)
        self.model.zero_grad()
        if not reached and not elsewhere:
            raise self._no_gradient(frozen)
        return Gradient(reached, [name for name in inside if name not in reached + frozen], frozen, elsewhere)

    def _no_gradient(self, frozen: list[str]) -> ProblemFound:
        layer = self.layer or "the model"
        module, checkpointed = self._gradients_off()
        if checkpointed:
            came = f"{module} runs under reentrant checkpointing, which drops the gradient of what is captured."
            remedy = "pass use_reentrant=False; transformers: gradient_checkpointing_kwargs={'use_reentrant': False}."
        elif module:
            came = f"{module} runs with gradients off (torch.no_grad or inference_mode in its forward)."
            remedy = "remove the no_grad() around it, or choose an earlier layer with layers= (--layers)."
        elif frozen:
            came = f"the scores of {layer} get no gradient: {listing(frozen)} are frozen, as is all before them."
            remedy = f"unfreeze the layer, model.get_submodule({self.layer!r}).requires_grad_(True), or train "
            remedy += "something before it (LoRA on its queries or keys is enough)."
        else:
            came = f"the gradient of the scores of {layer} reaches no parameter: the layer detaches its queries and "
            came += "keys, or the congruence loss of this batch has a gradient of exactly 0."
            remedy = "remove the detach(), or try another batch."
        return ProblemFound(came, f"gradient from the scores of {layer} to at least one parameter", remedy)

    def _gradients_off(self) -> tuple[str, bool]:
        """The outermost module around the layer that runs without gradients, and whether checkpointing is why."""
        found = []

        def check(name: str, module: nn.Module, args: Any) -> None:
            if not torch.is_grad_enabled():
                code = [frame.f_code for frame, _ in traceback.walk_stack(None)]
                found.append((name or "the model", CheckpointFunction.forward.__code__ in code))

        with ExitStack() as handles:
            for name, module in named_modules(self.model).items():
                if within(self.layer, name):
                    handles.enter_context(module.register_forward_pre_hook(partial(check, name)))
            call(self.model, self.inputs)
        return found[0] if found else ("", False)

    def overhead(self, rounds: int) -> Overhead:
        """How many times longer a step takes with the loss; each round times a step with and one without."""
        ratios: list[float] = []
        start = time.perf_counter()
        for number in range(-1, rounds):  # the first one warms up
            order = (False, True) if number % 2 else (True, False)
            seconds = {congruence: self._seconds(congruence) for congruence in order}
            if number >= 0:
                ratios.append(seconds[True] / seconds[False])
            if len(ratios) >= 3 and time.perf_counter() - start > 20.0:  # enough
                break
        low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        return Overhead(median, low, high, len(ratios))

    def _seconds(self, congruence: bool) -> float:
        synchronize = torch.cuda.synchronize if any(p.is_cuda for p in self.model.parameters()) else lambda: None
        synchronize()
        start = time.perf_counter()
        output, *losses = self._run() if congruence else (call(self.model, self.inputs),)
        main = loss_in(output)
        if main is not None and main.requires_grad:
            losses.append(main)
        else:  # a substitute that depends on the whole output
            losses += [t.float().square().mean() for t in _tensors(output) if t.requires_grad and t.numel()]
        if losses:
            torch.autograd.backward(losses)
        synchronize()
        seconds = time.perf_counter() - start
        self.model.zero_grad()
        return seconds
