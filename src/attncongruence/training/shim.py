"""How a regularizer notices what a training loop does: calls of the model's methods, and optimizer steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from attncongruence import _compat


class Shim:
    """An instance attribute that replaces a method of one module and calls it.

    `__wrapped__` is the method; `inspect.signature` follows it. A copy or a pickle of the module gets the method back.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name, self.open = module, name, True
        self.replaced = module.__dict__.get(name)
        self.__wrapped__ = getattr(module, name)
        module.__dict__[name] = self

    def remove(self) -> None:
        """Puts the method back. If other code has wrapped the shim since, the shim stays and only calls the method."""
        self.open = False
        if self.module.__dict__.get(self.name) is self:
            del self.module.__dict__[self.name]
            if self.replaced is not None:
                self.module.__dict__[self.name] = self.replaced

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _method_itself, (self.__wrapped__,)


def _method_itself(method: Any) -> Any:
    return method


class ForwardShim(Shim):
    """Turns `model.forward(...)` into `model(...)`, so that its hooks run: PEFT calls its base model this way."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, "forward")
        self.called_by_module = False
        # torch.compile traces the model's own forward, as it does without the shim.
        ForwardShim.__call__ = _compat.skip_frame(ForwardShim.__call__)  # type: ignore[method-assign]

    def before_forward(self, *args: object) -> None:
        """A forward pre-hook of the module: the next call of forward comes from `model(...)`."""
        self.called_by_module = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        called_by_module, self.called_by_module = self.called_by_module, False
        if called_by_module or not (self.open and torch.is_grad_enabled()):
            return self.__wrapped__(*args, **kwargs)
        return self.module(*args, **kwargs)


class TrainingStepShim(Shim):
    """Passes what `training_step` returns through a function: Lightning does not call the module's forward."""

    def __init__(self, module: nn.Module, after: Callable[..., Any]) -> None:
        super().__init__(module, "training_step")
        self.after = torch.compiler.disable(after)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        output = self.__wrapped__(*args, **kwargs)
        return self.after(args, kwargs, output) if self.open else output


class OptimizerSteps:
    """Calls `listener.on_optimizer_step(optimizer)` after each step of any torch optimizer.

    Listeners are held weakly and share one hook: torch iterates over its hooks without a copy, so a hook that the
    garbage collector removes during a step would raise an error there.
    """

    def __init__(self) -> None:
        self.listeners: weakref.WeakSet[Any] = weakref.WeakSet()
        self._handle: RemovableHandle | None = None

    def add(self, listener: Any) -> None:
        """Tells this listener about each step from now on."""
        self.listeners.add(listener)
        if self._handle is None:
            self._handle = register_optimizer_step_post_hook(torch.compiler.disable(self._after_step))

    def remove(self, listener: Any) -> None:
        """Stops telling this listener."""
        self.listeners.discard(listener)
        if self._handle is not None and not self.listeners:
            self._handle.remove()
            self._handle = None

    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        for listener in list(self.listeners):
            listener.on_optimizer_step(optimizer)


optimizer_steps = OptimizerSteps()
