"""From a softmax back to the product that fed it: which q and k made these scores.

A model that calls `matmul` and `softmax` itself never shows its queries and keys to the softmax. They are found by
following the scores forwards instead: every product of two batched tensors starts a trail, scaling it, adding a mask to
it or filling it keeps the trail, and anything else (a soft cap, a shift by the row's maximum) keeps only the knowledge
that the tensor came from a product. A trail is never computed with; only `record.py` does, after the forward pass.
"""

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attncongruence import _compat
from attncongruence.capture.seen import FLOOR, Seen
from attncongruence.capture.streams import Streams, tensors_in

_PRODUCTS = {"matmul", "rmatmul", "bmm", "baddbmm", "einsum"}
_TIMES = {"mul", "rmul", "imul", "multiply"}
_OVER = {"div", "truediv", "itruediv", "idiv", "divide", "true_divide"}
_PLUS = {"add", "radd", "iadd"}
_MINUS = {"sub", "isub", "subtract"}
_FILL = {"masked_fill", "where"}
_FACTORS = ("input", "batch1", "batch2", "mat2", "tensor2", "other")
_OPERANDS = {"other", "mask", "value"}
_SAME = {"to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone", "alias"}
_FOLD = {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze"}


class Trail:
    """Remembers, for one forward pass, how each score-like tensor was made."""

    def __init__(self, streams: Streams | None = None) -> None:
        self.streams = streams
        # Weak, so that the model's intermediate scores are freed as early as they are without us. The version tells a
        # tensor that was written to behind our back (`scores[..., 0] = 0`) from the one that was remembered.
        self._made: dict[int, tuple[weakref.ref[Tensor], float, Seen]] = {}
        self._folds: dict[int, tuple[int, int]] = {}

    def follow(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: object) -> None:
        """Takes note of one torch function after it ran; `name` is its name without underscores."""
        if self.streams is not None:
            self.streams.follow(args, kwargs, result)
        if not isinstance(result, Tensor) or result.ndim < 3:
            return
        if name in _FOLD and args and isinstance(args[0], Tensor):
            self._note_fold(args[0], result)
        seen = self._product(name, args, kwargs) if name in _PRODUCTS else self._derived(name, args, kwargs, result)
        if seen is not None:
            self._made[id(result)] = (weakref.ref(result), _compat.version(result), seen)

    def at_softmax(self, logits: Tensor) -> Seen:
        """What is known about the input of a softmax."""
        seen = self._known(logits, _compat.version(logits))
        if seen is None:
            return Seen(logits=logits, from_product=False)
        return dataclasses.replace(seen, logits=logits)

    def fold_of(self, size: int) -> tuple[int, int] | None:
        """`(batch, heads)` of a first dimension of this size, if a reshape told."""
        return self._folds.get(size)

    def _known(self, tensor: Tensor, version: float) -> Seen | None:
        ref, seen_version, seen = self._made.get(id(tensor), (None, 0, None))
        if ref is None or seen is None or ref() is not tensor:
            return None
        return seen if seen_version == version else Seen(cross=seen.cross, from_product=seen.from_product)

    def _remembers(self, tensor: Tensor) -> bool:
        ref, *_ = self._made.get(id(tensor), (None,))
        return ref is not None and ref() is tensor

    def _note_fold(self, before: Tensor, after: Tensor) -> None:
        wide, flat = (before, after) if before.ndim == 4 else (after, before)
        if wide.ndim == 4 and flat.ndim == 3 and flat.shape == (wide.shape[0] * wide.shape[1], *wide.shape[2:]):
            self._folds.setdefault(flat.shape[0], (wide.shape[0], wide.shape[1]))

    def _product(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Seen | None:
        # baddbmm(alibi, batch1=query, batch2=key), matmul(query, other=key)
        args = (*args, *(kwargs[key] for key in _FACTORS if key in kwargs))
        factors = tensors_in(args)[-2:]
        if any((known := self._known(t, _compat.version(t))) is not None and not known.from_product for t in factors):
            return None  # probabilities times values
        seen = _product(name, args, kwargs)
        if seen is None or self.streams is None:
            return seen
        return dataclasses.replace(seen, cross=self.streams.differ(*factors))

    def _derived(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor) -> Seen | None:
        # By identity, not by id alone: a freed tensor leaves its id to another, which dropout in eval hands through.
        tensor = next((t for t in tensors_in((*args, *kwargs.values())) if self._remembers(t)), None)
        if tensor is None:
            return None
        if tensor is result and self._made[id(tensor)][1] == _compat.version(tensor):
            return self._made[id(tensor)][2]  # nothing to do, like contiguous() of a contiguous tensor
        # In place, the remembered tensor is the result itself, one version on.
        in_place = tensor is result and not result.is_inference()
        seen = self._known(tensor, _compat.version(tensor) - in_place)
        still_scores = (
            tensor.numel() == result.numel()
            or tensor.shape[:-1] == result.shape[:-1]
            or tensor.shape[-2:] == result.shape[-2:]
        )
        if seen is None or not still_scores:
            return None
        opaque = Seen(cross=seen.cross, from_product=seen.from_product and name != "softmax")
        # Transposed scores are for the other stream, longer ones have a sink, wider ones a bias for each head: all are
        # scores, none is scale q k^T.
        same_shape = tensor.shape == result.shape or (name in _FOLD and tensor.shape[-2:] == result.shape[-2:])
        if seen.query is None or not same_shape or name == "softmax":
            return opaque
        operands = [*args, *(value for key, value in kwargs.items() if key in _OPERANDS)]
        return _step(name, seen, tensor, operands) or opaque


def _step(name: str, seen: Seen, scores: Tensor, args: list[Any]) -> Seen | None:
    """The trail after one operation on the scores, or None when they are no longer scale, product and masks."""
    if name in _SAME or name in _FOLD:
        return seen
    first = args[0] is scores
    rest = [a for a in args if a is not scores]
    if (name in _TIMES or (name in _OVER and first)) and len(rest) == 1:
        number = _number(rest[0])
        if not number:
            return None
        factor = 1.0 / number if name in _OVER else number
        masks = tuple((m, f if m.dtype == torch.bool else f * factor) for m, f in seen.masks)
        return dataclasses.replace(seen, scale=seen.scale * factor, masks=masks)
    minus = name in _MINUS
    if (name in _PLUS or (minus and first)) and len(rest) == 1 and isinstance(rest[0], Tensor):
        return dataclasses.replace(seen, masks=(*seen.masks, (rest[0], -1.0 if minus else 1.0)))
    if name in _FILL and len(rest) == 2 and isinstance(rest[0], Tensor) and _is_floor(rest[1]):
        # masked_fill(scores, hidden, floor), where(allowed, scores, floor) or where(hidden, floor, scores)
        hides = name == "masked_fill" or args[-1] is scores
        return dataclasses.replace(seen, masks=(*seen.masks, (rest[0], -1.0 if hides else 1.0)))
    return None


def _product(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Seen | None:
    if name == "einsum":
        return _einsum(*args)
    masks: tuple[tuple[Tensor, float], ...] = ()
    scale = 1.0
    if name == "baddbmm":
        beta, scale = float(kwargs.get("beta", 1.0)), float(kwargs.get("alpha", 1.0))
        masks = ((args[0], beta),) if beta else ()
        args = args[1:]
    if len(args) != 2 or not all(isinstance(a, Tensor) and a.ndim >= 3 for a in args):
        return None
    query, key = args if name != "rmatmul" else args[::-1]
    return Seen(query=query, key=key.transpose(-1, -2), scale=scale, masks=masks)


def _einsum(*args: Any) -> Seen | None:
    """Reads q and k off an equation like `bihd,bjhd->bhij`; None when it is no attention product."""
    operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    if not isinstance(args[0], str) or len(operands) != 2 or "->" not in args[0] or "." in args[0]:
        return None
    left, out = args[0].replace(" ", "").split("->")
    names = left.split(",")
    if len(names) != 2 or len(out) < 3:
        return None
    *batch, row, column = list(out)
    query, key = (0, 1) if row in names[0] else (1, 0)
    summed = (set(names[0]) & set(names[1])) - set(out)
    if len(summed) != 1:
        return None
    (width,) = summed
    if set(names[query]) != {*batch, row, width} or set(names[key]) != {*batch, column, width}:
        return None

    def ordered(which: int, axis: str) -> Tensor:
        tensor: Tensor = operands[which]
        return tensor.permute([names[which].index(a) for a in (*batch, axis, width)])

    return Seen(query=ordered(query, row), key=ordered(key, column))


def _number(value: object) -> float | None:
    """A plain factor; a tensor only if reading it costs no wait for a device and loses no gradient."""
    if isinstance(value, int | float):
        return float(value)
    if torch.compiler.is_compiling():
        return None
    if isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu" and not value.requires_grad:
        return float(value)
    return None


def _is_floor(value: object) -> bool:
    number = _number(value)
    return number is not None and number <= FLOOR


def function_name(func: Callable[..., Any]) -> str:
    """`torch.Tensor.__matmul__`, `torch.matmul` and `Tensor.matmul` are all `matmul`."""
    return str(getattr(func, "__name__", "")).strip("_")
