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
    """The same operation with the versions that its tensors have now; inference tensors have none."""
    counted = (_NONE if tensor.is_inference() else tensor for tensor in operation.tensors)
    return dataclasses.replace(operation, versions=tuple((tensor, _compat.writes(tensor)) for tensor in counted))


def changed(operation: Operation) -> list[Tensor]:
    """Those of its tensors that the model has written to since."""
    noted_then = zip(operation.tensors, operation.versions, strict=True)
    return [own for own, (then, version) in noted_then if _compat.writes(then) != version]


_NONE = torch.empty(0)


def _copy(tensor: Tensor) -> Tensor:
    """A copy that repeats along the dimensions along which the tensor does."""
    once = tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]
    return once.clone().expand(tensor.shape)
