"""What every public function does with its input: shapes checked at the call, options checked by name."""

from __future__ import annotations

import functools
import inspect
import itertools
import numbers
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from attncongruence._compat import mapped

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


_SQUARE = (
    "scores are square, (batch, heads, length, length), over the joint sequence of text and image. Cross-attention and "
    "the maps of two streams are put together by AttentionBlocks.from_streams."
)
_ROLES = (
    "the masks of a layout are bool and of one shape, (batch, length). TokenLayout.from_masks takes integers too, and "
    "TokenLayout.from_segments one mask for each of two segments, (batch, n_text) and (batch, n_image)."
)
_BLOCKS = (
    "rows are queries and columns keys: LL is (batch, heads, text, text), LV (.., text, image), VL (.., image, text), "
    "VV (.., image, image)."
)
REMEDIES = {
    "attention": _SQUARE,
    "S": _SQUARE,
    "mask": "a mask covers the joint sequence of text and image, (batch, length), bool or integer. One of the text "
    "alone becomes a layout: n_text=TokenLayout.from_segments(text_mask, image_mask).",
    **dict.fromkeys(("text", "image"), _ROLES),
    **dict.fromkeys(("LL", "LV", "VL", "VV"), _BLOCKS),
}
"""What to do about a wrong shape or dtype, by the argument that has it."""


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Check a function's jaxtyping shapes and dtypes at each call; wrong ones raise `jaxtyping.TypeCheckError`.

    Under `torch.compile` the call goes straight through unchecked: dynamo cannot trace the checker.
    """
    strict = jaxtyped(typechecker=beartype)(function)
    parameters = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        for name, value in itertools.chain(zip(parameters, args, strict=False), kwargs.items()):
            if isinstance(value, torch.Tensor):
                _computable(name, value)
        try:
            return strict(*args, **kwargs)
        except TypeCheckError as error:
            wrong = re.search(r"parameter '(\w+)'", str(error))
            if wrong is None or wrong[1] not in REMEDIES or REMEDIES[wrong[1]] in str(error):
                raise
            raise TypeCheckError(f"{error}\n{wrong[1]}: {REMEDIES[wrong[1]]}") from None

    return call


def _computable(name: str, x: torch.Tensor) -> None:
    """Raise a ValueError for tensors that have a shape and a dtype, but not the operations of dense ones."""
    if x.is_nested or x.layout != torch.strided:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.").lstrip("_")
        raise ValueError(
            f"{name} is a {kind} tensor, and only dense ones can be computed with: pass a padded, dense one"
        )
    if x.is_floating_point() and x.element_size() < 2:
        raise ValueError(f"{name} is {x.dtype}, which has no arithmetic: pass {name}.float()")


def values_of(**tensors: torch.Tensor) -> None:
    """Raise a ValueError for tensors on the meta device, where it is their values that count."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has a shape but no values: pass a tensor that has")


def readable(*tensors: torch.Tensor) -> bool:
    """Whether the host may read these values: not while `torch.compile` traces, under `vmap`, or on the meta device."""
    return not torch.compiler.is_compiling() and not any(x.is_meta or mapped(x) for x in tensors)


def real(name: str, value: object) -> None:
    """Raise a TypeError unless the value is one real number (a tensor of one element is), in the range of floats."""
    one = isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex()
    if not one and not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: it must be a number")
    try:
        float(value)  # type: ignore[arg-type]
    except OverflowError:
        raise ValueError(f"{name} must be a number in the range of floats: 10**308 is, this is not") from None


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
