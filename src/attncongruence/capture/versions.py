"""Whether what a layer used is still what it was: a record refers to the model's own tensors and copies nothing."""

import dataclasses

import torch
from torch import Tensor

from attncongruence import _compat
from attncongruence.capture.product import Operation


def kept(operation: Operation) -> Operation:
    """An operation made safe from what the model writes to its tensors later.

    With gradients on, their versions tell. With gradients off, models do write to them (a cache of keys), and inference
    tensors have no versions: they are copied.
    """
    return noted(operation if torch.is_grad_enabled() else operation.apply(_copy))


def noted(operation: Operation) -> Operation:
    """The same operation with the versions that its tensors have now."""
    return dataclasses.replace(operation, versions=tuple((t, _compat.version(t)) for t in operation.tensors))


def changed(operation: Operation) -> list[Tensor]:
    """Those of its tensors that the model has written to since; a version that is not known, NaN, tells nothing."""
    noted_then = zip(operation.tensors, operation.versions, strict=True)
    return [own for own, (then, version) in noted_then if version == version != _compat.version(then)]


def _copy(tensor: Tensor) -> Tensor:
    """A copy that repeats along the dimensions along which the tensor does."""
    once = tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]
    return once.clone().expand(tensor.shape)
