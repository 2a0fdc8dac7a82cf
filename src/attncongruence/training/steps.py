"""Counts the steps of a model's optimisers, whoever calls them: a plain loop, Trainer, Accelerate, Lightning."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle


def holds(optimizer: Optimizer, model: nn.Module) -> bool:
    """Whether an optimiser trains a parameter of the model.

    Asked at each step: FSDP puts other parameters in the place of those that were there.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return any(id(parameter) in held for parameter in model.parameters())


def steps_of(optimizer: Optimizer) -> int:
    """Steps that an optimiser says it has made; 0 for those that keep no count, as SGD."""
    state: dict[str, Any] = next(iter(optimizer.state.values()), {})
    return int(state.get("step", 0))


class Counts(Protocol):
    """What wants to hear of steps."""

    def stepped(self, optimizer: Optimizer) -> None:
        """After a step of any optimiser of torch. The steps that a gradient scaler skips are none."""


class _Listeners:
    """One hook on all optimisers, as long as anyone listens; it keeps nobody alive.

    Not a hook for each: torch goes through its hooks without a copy, so that none may go away during a step, and the
    garbage collector knows no such rule.
    """

    def __init__(self) -> None:
        self.all: weakref.WeakSet[Counts] = weakref.WeakSet()
        self._handle: RemovableHandle | None = None

    def add(self, listener: Counts) -> None:
        self.all.add(listener)
        if self._handle is None:
            self._handle = register_optimizer_step_post_hook(torch.compiler.disable(self._tell))

    def remove(self, listener: Counts) -> None:
        self.all.discard(listener)
        if self._handle is not None and not self.all:
            self._handle.remove()
            self._handle = None

    def _tell(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        for listener in list(self.all):
            listener.stepped(optimizer)


listeners = _Listeners()
