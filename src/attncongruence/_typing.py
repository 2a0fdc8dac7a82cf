"""What every public function does with its input: shapes checked once at the call, options checked by name."""

from __future__ import annotations

import contextlib
import functools
import inspect
import numbers
import re
import types
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from attncongruence._compat import mapped

P = ParamSpec("P")
T = TypeVar("T")

# A static type checker sees the allowed words. At run time `one_of` lists them in a ValueError, which reads better.
# A count is an int to the static checker and any integer, NumPy's too, at run time.
if TYPE_CHECKING:
    Count = int
    Direction = Literal["both", "language", "vision"]
    Reduction = Literal["mean", "sum", "none"]
    Alignment = Literal["singular", "distributed"]
    Impl = Literal["auto", "dense", "streaming"]
    OneDirection = Literal["language", "vision"]
    Values = Literal["scores", "probabilities"]
    CrossBlock = Literal["LV", "VL"]
else:
    Count = numbers.Integral
    Direction = Reduction = Alignment = Impl = OneDirection = Values = CrossBlock = str


_SQUARE = (
    "scores are square, (batch, heads, length, length), over the joint sequence of text and image. For cross-attention "
    "and two-stream models, put the four maps together with AttentionBlocks.from_streams."
)
_ROLES = (
    "the masks of a layout are bool and of one shape, (batch, length). TokenLayout.from_masks also takes integers, and "
    "TokenLayout.from_segments takes one mask for each of two segments, (batch, n_text) and (batch, n_image)."
)
_BLOCKS = (
    "rows are queries and columns keys: LL is (batch, heads, text, text), LV (.., text, image), VL (.., image, text), "
    "VV (.., image, image)."
)
REMEDIES = {
    "attention": f"{_SQUARE} Fewer queries than keys come of a key/value cache or a prefix: run the model without "
    "(use_cache=False). Of a capture, pass capture.pop().",
    "S": _SQUARE,
    "mask": "a mask is bool or integer and covers the joint sequence of text and image, (batch, length); one of pairs "
    "is bool, (1, length, length) if all samples share it; of an additive mask, pass mask > -5000. For a mask of the "
    "text alone, pass a layout: n_text=TokenLayout.from_segments(text_mask, image_mask).",
    "n_text": "pass an int, a (batch,) integer tensor or a TokenLayout.",
    **dict.fromkeys(("text", "image"), _ROLES),
    **dict.fromkeys(("LL", "LV", "VL", "VV"), _BLOCKS),
}
"""What to do about a wrong shape or dtype, by the argument that has it."""


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Check the shapes and dtypes of a function's arguments at each call, and raise a ValueError of one line.

    jaxtyping and beartype do the checking. Under `torch.compile`, which cannot trace them, nothing is checked.
    """
    assert not hasattr(function, "__wrapped__"), "the annotations of a wrapped function are not those of its code"
    arguments_only = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    arguments_only.__kwdefaults__ = function.__kwdefaults__
    arguments_only.__annotations__ = {k: v for k, v in function.__annotations__.items() if k != "return"}
    arguments_only.__module__, arguments_only.__qualname__ = function.__module__, function.__qualname__
    strict = jaxtyped(typechecker=beartype)(arguments_only)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and not _has_arithmetic(value):
                _refuse_without_arithmetic(signature.bind(*args, **kwargs).arguments)
        try:
            return strict(*args, **kwargs)  # type: ignore[no-any-return]
        except TypeCheckError as error:
            if f"{function.__module__}.{function.__qualname__}" not in str(error):  # raised inside of the function
                raise
            raise ValueError(_one_line(str(error))) from None

    return call


def _one_line(error: str) -> str:
    """Which argument, what came, what was expected, what to do: from the report of jaxtyping."""
    found = re.search(r"parameter '(\w+)'.\nActual value: (.*?)\nExpected type: (.*?)\.?\n-", error, re.DOTALL)
    if found is None:
        return " ".join(error.split())
    name, came, expected = (" ".join(part.split()) for part in found.groups())
    came = came if len(came) < 80 else f"{came[:60]}..."
    others = re.findall(r"\n  '(\w+)': (\w+\[[\d,]*\])\(torch\)", error)
    beside = ", ".join(f"{other} {shape}" for other, shape in others if other != name)
    expected = re.sub(r"\b(jaxtyping|attncongruence(\.\w+)*)\.", "", expected)
    expected = re.sub(r"<class '(.*)'>", r"\1", expected)
    expected = re.sub(r"\bSource\b", "ScoreSource", expected).replace("numbers.Integral", "int")
    line = f"{name} is {came.removesuffix('(torch)')}; expected {expected}" + (f", beside {beside}" if beside else "")
    return f"{line}: {REMEDIES[name]}" if name in REMEDIES else line


def _has_arithmetic(x: torch.Tensor) -> bool:
    dense = x.layout == torch.strided and not x.is_nested
    return dense and not (x.element_size() < 2 and x.is_floating_point())


def _refuse_without_arithmetic(arguments: dict[str, object]) -> None:
    """Raise a ValueError for the tensor that has a shape and a dtype, but not the operations of dense ones."""
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor) and (x.is_nested or x.layout != torch.strided):
            kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.").lstrip("_")
            raise ValueError(f"{name} is a {kind} tensor, and only dense ones are supported: pass a padded, dense one")
        if isinstance(x, torch.Tensor) and not _has_arithmetic(x):
            raise ValueError(f"{name} is {x.dtype}, which has no arithmetic: pass {name}.float()")


def values_of(**tensors: torch.Tensor) -> None:
    """Raise a ValueError for tensors on the meta device, which have no values."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has a shape but no values: pass a tensor that has")


def readable(*tensors: torch.Tensor) -> bool:
    """Whether the host may read these values: not while `torch.compile` traces, under `vmap`, or on the meta device."""
    return not torch.compiler.is_compiling() and not any(x.is_meta or mapped(x) for x in tensors)


def number(name: str, value: object) -> None:
    """Raise a TypeError unless the value is one real number (a tensor of one element is), in the range of floats."""
    one = isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex()
    if not one and not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: it must be a number")
    try:
        float(value.detach() if isinstance(value, torch.Tensor) else value)  # type: ignore[arg-type]
    except OverflowError:
        raise ValueError(f"{name} must be a number in the range of floats: 10**308 is, this is not") from None


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise a ValueError that names the argument, what came and what is allowed."""
    if not (isinstance(value, str) and value in allowed):
        words = ", ".join(repr(word) for word in allowed)
        raise ValueError(f"{name}={value!r} is not known: it must be one of {words}")


_said: ContextVar[set[str] | None] = ContextVar("said", default=None)


@contextlib.contextmanager
def each_warning_once(said: set[str]) -> Iterator[None]:
    """Within it, `warn` says nothing that the set holds, and adds what it says."""
    token = _said.set(said)
    try:
        yield
    finally:
        _said.reset(token)


def warn(text: str) -> None:
    """A UserWarning, which Python shows once and `each_warning_once` lets through once."""
    said = _said.get()
    if said is None or text not in said:
        warnings.warn(text, stacklevel=2)
    if said is not None:
        said.add(text)


def same_device(**tensors: Any) -> None:
    """Raise a ValueError unless all the named tensors live on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device, got {where}: move them with .to(device)")


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Half precision in float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Switches autocast off, which would run matrix products in half precision."""
    # A compiled graph cannot ask whether autocast is available; every device that is compiled for has it.
    if torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
