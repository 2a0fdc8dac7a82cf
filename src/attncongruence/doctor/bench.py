"""Runs a model again and again under one seed, and leaves it as it was found."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attncongruence import _compat
from attncongruence.capture.find import watch_model
from attncongruence.capture.product import Log
from attncongruence.doctor.report import Overhead
from attncongruence.training.outputs import loss_in

Inputs = Mapping[str, Any] | tuple[Any, ...]
"""Keyword arguments, or positional ones."""
_ENOUGH = 20.0  # seconds after which no further round is timed


def call(model: nn.Module, batch: Inputs) -> Any:
    """One forward pass, always under the same seed: dropout, and ViLT's choice of patches, are part of the input."""
    torch.manual_seed(0)
    return model(**batch) if isinstance(batch, Mapping) else model(*batch)


def watched(model: nn.Module, batch: Inputs) -> Log:
    """Every attention operation of one forward pass, in order."""
    logs: list[Log] = []
    finder = watch_model(model, True, lambda name, log: logs.append(log))
    try:
        call(model, batch)
    finally:
        finder.close()
    return [entry for log in logs for entry in log]


def tensors_of(output: Any) -> list[Tensor]:
    """All floating-point tensors of an output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    elif dataclasses.is_dataclass(output):
        output = list(vars(output).values())
    return [t for part in output for t in tensors_of(part)] if isinstance(output, list | tuple) else []


def same(one: Any, other: Any) -> bool:
    """Whether two outputs are equal bit for bit."""
    pairs = list(zip(tensors_of(one), tensors_of(other), strict=False))
    whole = len(tensors_of(one)) == len(tensors_of(other)) > 0
    return whole and all(a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def main_loss(output: Any) -> Tensor | None:
    """The model's own loss, or a stand-in that reaches all of its output; None where nothing has a gradient."""
    loss = loss_in(output)
    if loss is not None and loss.requires_grad:
        return loss
    parts = [t.float().square().mean() for t in tensors_of(output) if t.requires_grad and t.numel()]
    return torch.stack(parts).sum() if parts else None


def clear(model: nn.Module) -> None:
    """No parameter has a gradient."""
    for parameter in model.parameters():
        parameter.grad = None


def _ours(model: nn.Module) -> int:
    """How many hooks of this library are on a model; others (transformers') come with its first forward pass."""
    hooks = [h for m in model.modules() for h in _compat.hooks_of(m)]
    return sum(f"{type(h).__module__} {getattr(h, '__module__', '')}".find("attncongruence") >= 0 for h in hooks)


@contextmanager
def as_found(model: nn.Module, batch: Inputs) -> Iterator[Callable[[], bool]]:
    """In training mode with gradients on, and afterwards as before: modes, gradients, buffers, random numbers.

    Gives a function that tells, afterwards, whether all of it is so, and hooks too.
    """
    given = batch.values() if isinstance(batch, Mapping) else batch
    leaves = [*model.parameters(), *(t for t in given if isinstance(t, Tensor) and t.is_leaf)]
    grads = [(leaf, leaf.grad, None if leaf.grad is None else leaf.grad.clone()) for leaf in leaves]
    modes = [(module, module.training) for module in model.modules()]
    hooks = _ours(model)
    buffers = [
        (m, name, b, b.clone())
        for m in model.modules()
        for name, b in m.named_buffers(recurse=False, remove_duplicate=False)
    ]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})

    def intact() -> bool:
        return (
            _ours(model) == hooks
            and all(module.training is mode for module, mode in modes)
            and all(leaf.grad is grad for leaf, grad, _ in grads)
            and all(grad is None or copy is None or torch.equal(grad, copy) for _, grad, copy in grads)
            and all(getattr(m, name, None) is b and torch.equal(b, copy) for m, name, b, copy in buffers)
        )

    for leaf in leaves:
        leaf.grad = None
    if not model.training:  # else parts that are kept in eval() stay there
        model.train()
    try:
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            yield intact
    finally:
        for module, mode in modes:
            module.training = mode
        for leaf, grad, _ in grads:
            leaf.grad = grad
        for module, name, buffer, copy in buffers:
            setattr(module, name, buffer)
            if not torch.equal(buffer, copy):
                with torch.no_grad():
                    buffer.copy_(copy)


def overhead(model: nn.Module, plain: Callable[[], None], full: Callable[[], None], rounds: int) -> Overhead:
    """How many times longer `full` takes: both side by side in each round, every other one in reverse order."""
    ratios: list[float] = []
    start = time.perf_counter()
    for number in range(-1, rounds):
        pair = [_seconds(model, run) for run in ((plain, full) if number % 2 else (full, plain))]
        before, after = pair if number % 2 else pair[::-1]
        if number >= 0:
            ratios.append(after / before)
        if len(ratios) >= 3 and time.perf_counter() - start > _ENOUGH:
            break
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Overhead(statistics.median(ratios), low, high, len(ratios))


def _seconds(model: nn.Module, run: Callable[[], None]) -> float:
    def wait() -> None:
        if any(p.is_cuda for p in model.parameters()):
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    run()
    wait()
    seconds = time.perf_counter() - start
    clear(model)
    return seconds
