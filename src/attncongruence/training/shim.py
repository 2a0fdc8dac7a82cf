"""How a regularizer notices what a training loop does: calls of the model's methods, and optimizer steps."""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from attncongruence import _compat


class Shim:
    """An instance attribute that replaces a method of one object and calls it.

    It passes for the method, which is `__wrapped__`: with its name, signature, `__func__` and `__self__`. A copy or a
    pickle of the object gets the method back.
    """

    def __init__(self, module: Any, name: str) -> None:
        self.module, self.name, self.open = module, name, True
        self.replaced = module.__dict__.get(name)
        functools.update_wrapper(self, getattr(module, name), updated=())  # type: ignore[arg-type]
        module.__dict__[name] = self

    def __getattr__(self, name: str) -> Any:
        if name == "__wrapped__":  # of a shim without a method, as copy makes it
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)

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


class CallShim(Shim):
    """Calls `call(method, ...)` instead of `method(...)`."""

    def __init__(self, module: Any, name: str, call: Callable[..., Any]) -> None:
        super().__init__(module, name)
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        return self.call(self.__wrapped__, *args, **kwargs) if self.open else self.__wrapped__(*args, **kwargs)


class OptimizerSteps:
    """Calls `listener.on_optimizer_step(trained, done)` after each step of a torch optimizer or a DeepSpeed engine.

    `trained` has the ids of the parameters that were to change, and `done()` is the number of steps by the optimizer's
    own count. DeepSpeed's optimizers hold copies of the parameters, but its engine knows the model.

    Listeners are held weakly and share one hook: torch iterates over its hooks without a copy, so a hook that the
    garbage collector removes during a step would raise an error there.
    """

    def __init__(self) -> None:
        self.listeners: weakref.WeakSet[Any] = weakref.WeakSet()
        self._handle: RemovableHandle | None = None
        self._engine: EngineStep | None = None

    def add(self, listener: Any) -> None:
        """Tells this listener about each step from now on."""
        self.listeners.add(listener)
        if self._handle is None:
            self._handle = register_optimizer_step_post_hook(torch.compiler.disable(self._after_step))
        self.watch_engines()

    def remove(self, listener: Any) -> None:
        """Stops telling this listener."""
        self.listeners.discard(listener)
        if self._handle is not None and not self.listeners:
            self._handle.remove()
            self._handle = None
            if self._engine is not None:
                self._engine.remove()
                self._engine = None

    def watch_engines(self) -> None:
        """Watches DeepSpeed's engines, if DeepSpeed has been imported; called again in each forward pass."""
        engine = getattr(sys.modules.get("deepspeed.runtime.engine"), "DeepSpeedEngine", None)
        if self._engine is None and engine is not None:
            self._engine = EngineStep(engine, self._after_engine_step)

    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        def done() -> int:
            state: dict[str, Any] = next(iter(optimizer.state.values()), {})
            return int(state.get("step", 0))  # SGD counts none

        self._tell((parameter for group in optimizer.param_groups for parameter in group["params"]), done)

    def _after_engine_step(self, engine: Any) -> None:
        if engine.was_step_applied():  # not between micro-batches, nor after an overflow
            self._tell(engine.module.parameters(), lambda: engine.global_steps - engine.skipped_steps)

    def _tell(self, parameters: Iterable[nn.Parameter], done: Callable[[], int]) -> None:
        trained = {id(parameter) for parameter in parameters}
        for listener in list(self.listeners):
            listener.on_optimizer_step(trained, done)


class EngineStep:
    """Calls a function after each `step()` of all engines of a class."""

    def __init__(self, engine: Any, after: Callable[[Any], None]) -> None:
        self.engine, self.replaced = engine, engine.step
        self.after: Callable[[Any], None] | None = after

        @functools.wraps(engine.step)
        def step(engine: Any, *args: Any, **kwargs: Any) -> Any:
            result = self.replaced(engine, *args, **kwargs)
            if self.after is not None:
                self.after(engine)
            return result

        engine.step = self.step = step

    def remove(self) -> None:
        """Puts the method back. If other code has wrapped it since, ours stays and only calls the method."""
        self.after = None
        if self.engine.step is self.step:
            self.engine.step = self.replaced


class SilentSteps:
    """Warns when parameters have changed and no step was counted: the schedule then stays at its first weight.

    It looks at forward pass 8, 16, 32 and so on, since accumulated micro-batches change nothing. It compares the first
    entries of each parameter, where one synchronization with the device shows a change.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.passes = model, 0
        self.before: list[Tensor] = []

    def after_pass(self, weight: float) -> None:
        """Counts a forward pass, and looks at the parameters if it is time."""
        self.passes += 1
        if self.passes == 1:
            self.before = self._first_entries()
        elif self.passes >= 8 and self.passes.bit_count() == 1 and self._changed():
            self.before = []
            warnings.warn(
                f"the parameters of {type(self.model).__name__} have changed over {self.passes} forward passes, and no "
                f"optimizer step was seen, so the weight stays at {weight:.4g}, that of step 0. Steps are seen of "
                "torch.optim.Optimizer and its subclasses, and of DeepSpeed's engines. For any other optimizer, call "
                "regularizer.count_step() after each step.",
                stacklevel=2,
            )

    def _changed(self) -> bool:
        pairs = zip(self.before, self._first_entries(), strict=False)
        return any(old.shape == new.shape and not torch.equal(old, new) for old, new in pairs)

    def _first_entries(self) -> list[Tensor]:
        # Of sharded parameters, this process's part.
        local = (getattr(p, "to_local", p.detach)() for p in self.model.parameters() if p.requires_grad)
        return [parameter.detach().flatten()[:64].clone() for parameter in local]


optimizer_steps = OptimizerSteps()
