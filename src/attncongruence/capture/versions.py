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
    own = [("queries", operation.query), ("keys", operation.key), ("scores", operation.logits)]
    own += [("masks", mask) for mask, _ in operation.masks]
    counted = [(name, tensor) for name, tensor in own if tensor is not None and not tensor.is_inference()]
    return dataclasses.replace(operation, versions=tuple((name, t, _compat.writes(t)) for name, t in counted))


def changed(operation: Operation) -> list[str]:
    """Which of its tensors the model has written to since."""
    return [name for name, tensor, version in operation.versions if _compat.writes(tensor) != version]


def _copy(tensor: Tensor) -> Tensor:
    """A copy that repeats along the dimensions along which the tensor does."""
    once = tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]
    return once.clone().expand(tensor.shape)
