"""What every public function does with its input: shapes checked at the call, options checked by name."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

import torch
from beartype import beartype
from jaxtyping import jaxtyped

P = ParamSpec("P")
T = TypeVar("T")

# A type checker sees the allowed words; at run time `one_of` says them in a ValueError, which reads better.
# Likewise a count is an int and a factor a float to the checker, and any such number (NumPy's too) at run time.
if TYPE_CHECKING:
    Count = int
    Factor = float
    Direction = Literal["both", "language", "vision"]
    Reduction = Literal["mean", "sum", "none"]
    Alignment = Literal["singular", "distributed"]
    Impl = Literal["auto", "dense", "streaming"]
    Loss = Literal["cacr", "singular", "distributed"]
    OneDirection = Literal["language", "vision"]
    Values = Literal["scores", "probabilities"]
else:
    Count = numbers.Integral
    Factor = numbers.Real
    Direction = Reduction = Alignment = Impl = Loss = OneDirection = Values = str


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Check a function's jaxtyping shapes and dtypes at each call; wrong ones raise `jaxtyping.TypeCheckError`.

    Under `torch.compile` the call goes straight through unchecked: dynamo cannot trace the checker.
    """
    strict = jaxtyped(typechecker=beartype)(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        return strict(*args, **kwargs)

    return call


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise a ValueError that names the argument, what came and what is allowed."""
    if value not in allowed:
        words = ", ".join(repr(word) for word in allowed)
        raise ValueError(f"{name}={value!r} is not known: it must be one of {words}")


def same_device(**tensors: torch.Tensor | None) -> None:
    """Raise a ValueError unless all the named tensors live on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device, got {where}: move them with .to(device)")
