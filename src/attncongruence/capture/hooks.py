"""Hook objects: inert in copies of a model, and left alone by `torch.compile` where they must not be traced."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

from attncongruence import _compat


class Hook:
    """A bound method that becomes a function of no effect in a copy or a pickle."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *args: Any) -> Any:  # noqa: D102
        return self.call(*args)

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _inert_hook, ()


@functools.cache
def uncompiled_hook() -> type[Hook]:
    """A hook that `torch.compile` leaves alone. Made late: it imports dynamo, as optimizers do, but torch does not."""
    call = torch.compiler.disable(Hook.__call__)
    return type("UncompiledHook", (Hook,), {"__call__": call})


@functools.cache
def eager_pass_hooks() -> tuple[type[Hook], type[Hook]]:
    """A pair of hooks; the first switches `torch.compile` off for the forward pass it opens, the second on again."""
    compiler = threading.local()

    def open_pass(self: Hook, *args: Any) -> None:
        compiler.callback = _compat.set_compiler(None)
        self.call(*args)

    def close_pass(self: Hook, *args: Any) -> None:
        self.call(*args)
        _compat.set_compiler(getattr(compiler, "callback", None))

    return (
        type("OpensEagerPass", (Hook,), {"__call__": _compat.skip_frame(open_pass)}),
        type("ClosesEagerPass", (Hook,), {"__call__": _compat.skip_frame(close_pass)}),
    )


def _inert_hook() -> Callable[..., None]:
    return nothing


def nothing(*args: object) -> None:
    """Does just that."""
