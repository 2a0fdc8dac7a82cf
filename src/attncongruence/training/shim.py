"""Stand-ins for a module's own method, gone without a trace when they are removed, and inert in copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attncongruence import _compat


class Shim:
    """An instance attribute in front of a method. `__wrapped__` is the method, for whoever asks for its signature.

    A copy or a pickle of the module has the method itself in this place.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name, self.open = module, name, True
        self.before = module.__dict__.get(name)
        self.__wrapped__ = getattr(module, name)
        module.__dict__[name] = self

    def remove(self) -> None:
        """Puts the method back. Where someone has wrapped the shim meanwhile, it stays there and does nothing."""
        self.open = False
        if self.module.__dict__.get(self.name) is self:
            del self.module.__dict__[self.name]
            if self.before is not None:
                self.module.__dict__[self.name] = self.before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        return self.__wrapped__(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _same, (self.__wrapped__,)


class ForwardShim(Shim):
    """Sends `model.forward(...)` through `model(...)`, whose hooks it would go past: PEFT calls its base model so."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, "forward")
        self.inside = False
        # torch.compile sees the model's own forward, as without it.
        ForwardShim.__call__ = _compat.skip_frame(ForwardShim.__call__)  # type: ignore[method-assign]

    def enter(self, *args: object) -> None:
        """A pre-hook of the module: the next call comes from `model(...)`."""
        self.inside = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        inside, self.inside = self.inside, False
        if inside or not (self.open and torch.is_grad_enabled()):
            return self.__wrapped__(*args, **kwargs)
        return self.module(*args, **kwargs)


class StepShim(Shim):
    """Changes what `training_step` returns: Lightning calls it, and not the module's forward."""

    def __init__(self, module: nn.Module, after: Callable[..., Any]) -> None:
        super().__init__(module, "training_step")
        self.after = torch.compiler.disable(after)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        output = self.__wrapped__(*args, **kwargs)
        return self.after(args, kwargs, output) if self.open else output


class PartsOf(nn.Module):
    """The children of a `LightningModule`, by their names: what capture watches there.

    Under DDP Lightning calls `training_step` in the place of the module's own forward, else it does not; the children
    run in the one case as in the other.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, child)


def _same(value: Any) -> Any:
    return value
