"""The modes that see attention operations: one for eager code, one inside `torch.compile`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attncongruence import _compat
from attncongruence.capture.product import Trail, function_name
from attncongruence.capture.seen import Seen, seen_in_sdpa
from attncongruence.capture.streams import Streams


class AttentionMode(TorchFunctionMode):
    """Hands every attention operation it sees to `sink`; runs all of them as they are."""

    def __init__(self, sink: Callable[[Seen], None], streams: Streams | None = None) -> None:
        super().__init__()
        self.sink = sink
        self.trail = Trail(streams)

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # a compiled function inside an eager module: nothing here can be traced
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return _compat.mha_body(*args, **kwargs)
        result = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            seen = seen_in_sdpa(*args, **kwargs)
            streams = self.trail.streams
            if streams is not None and seen.query is not None and seen.key is not None:
                seen = dataclasses.replace(seen, cross=streams.differ(seen.query, seen.key))
            self.sink(seen)
        name = function_name(func)
        if name == "softmax":
            logits = _weighed_keys(*args, **kwargs)
            if logits is not None:
                self.sink(self.trail.at_softmax(logits))
        self.trail.follow(name, args, kwargs, result)
        return result


class CompiledMode(TorchFunctionMode):
    """The same inside `torch.compile`, traced once: one object that lives as long as the watch, and one slot.

    A new mode or a growing list at each step would be recompiled at each step. Queries and keys are told apart only in
    `scaled_dot_product_attention` here: a trail of weak references cannot be traced.
    """

    def __init__(self) -> None:
        super().__init__()
        self.slot: tuple[tuple[Any, ...], ...] = ()

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _compat.mha_body(*args, **kwargs)
        if func in (F.scaled_dot_product_attention, F.softmax, torch.softmax, Tensor.softmax):
            self.slot = (*self.slot, (func is F.scaled_dot_product_attention, args, kwargs))
        if func is Tensor.unflatten:  # its super() is more than torch.compile could trace under a mode in torch 2.11
            func = torch.unflatten
        return func(*args, **kwargs)

    def take(self) -> list[Seen]:
        """What the compiled code left, outside of it."""
        taken, self.slot = self.slot, ()
        found = []
        for is_sdpa, args, kwargs in taken:
            logits = None if is_sdpa else _weighed_keys(*args, **kwargs)
            if is_sdpa:
                found.append(seen_in_sdpa(*args, **kwargs))
            elif logits is not None:
                found.append(Seen(logits=logits).with_fold(lambda size: None))
        return found


def _weighed_keys(input: Tensor, dim: int | None = None, *args: object, **kwargs: object) -> Tensor | None:
    """The input of a softmax over the last of three or more dimensions."""
    return input if dim is not None and input.ndim >= 3 and dim in (-1, input.ndim - 1) else None


def push_mode(mode: TorchFunctionMode) -> None:
    """Switches a mode on. Not its own `__enter__`, which may do more when it is the user's."""
    TorchFunctionMode.__enter__(mode)


def pop_mode(mode: TorchFunctionMode) -> None:
    """Switches the innermost mode off."""
    TorchFunctionMode.__exit__(mode, None, None, None)


def remove_mode(mode: TorchFunctionMode) -> None:
    """Takes one mode off the stack, wherever it is, and leaves the others in order."""
    stack = _compat.function_modes()
    place = next((i for i, other in enumerate(stack) if other is mode), None)
    if place is None:
        return
    for other in reversed(stack[place:]):
        pop_mode(other)
    for other in stack[place + 1 :]:
        push_mode(other)
