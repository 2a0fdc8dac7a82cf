"""What goes into a model and what comes out: the batch as a mapping, its weight in the step, the loss in an output."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Any]


def batch_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch:
    """The arguments of a call, by the names of the function's parameters.

    The entries of a mapping among the positional arguments are added under their own names, so that `model(batch)` and
    `model(**batch)` give the same.

    Example:
        >>> batch_of(lambda ids, labels=None, **rest: None, (1,), {"labels": 2, "mask": 3})
        {'ids': 1, 'labels': 2, 'mask': 3}
    """
    named: dict[str, Any] = {}
    for value in args:
        if isinstance(value, Mapping):
            named.update(value)
    try:
        signature = inspect.signature(function)
        bound = signature.bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):  # no signature, or one that a wrapper hides
        return {**named, **kwargs}
    for name, value in bound.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    return named


def share_of(batch: Batch, micro_batches: int | None) -> float | Tensor:
    """This micro-batch's weight in the optimizer step: the weighted means of all micro-batches sum to the step's mean.

    transformers' `Trainer` passes `num_items_in_batch`, the number of labels in the whole step on all processes, to
    models that take it. They divide the sum of their losses by it, and `Trainer` does not divide by the number of
    micro-batches. The weight is

    - 1 without `num_items_in_batch`: the loop divides the loss.
    - labels here / labels in the step, if all samples have equally many labels (classes, or a row of scores). This is
      right for micro-batches of different sizes and on several processes.
    - 1 / `micro_batches` otherwise, if that is known.
    - 1 otherwise, if this micro-batch must be the whole step: Accelerate says that the optimizer steps after it, there
      is one process, and the labels here are as many as in the step. This costs one device synchronization.

    If it cannot be known, that is a RuntimeError.

    Example:
        Two labels of eight:

        >>> share_of({"num_items_in_batch": 8, "labels": torch.tensor([0, 1])}, None)
        tensor(0.2500)
    """
    items, labels = batch.get("num_items_in_batch"), batch.get("labels")
    if items is None:
        return 1.0
    if isinstance(labels, Tensor) and (labels.ndim == 1 or labels.is_floating_point()):
        # labels here / labels in the step; -100 marks labels that Trainer does not count
        return labels.ne(-100).sum() / torch.as_tensor(items, device=labels.device)
    if micro_batches is not None:
        return 1 / micro_batches
    if _steps_after_this_batch() and int(items) in _label_counts(batch):
        return 1.0
    raise RuntimeError(
        "num_items_in_batch came, and the labels do not tell how many micro-batches share the optimizer step. With "
        "transformers' Trainer, add attncongruence.integrations.huggingface.CongruenceCallback() to its callbacks; in "
        "your own loop, set regularizer.micro_batches to their number, over all processes."
    )


def _steps_after_this_batch() -> bool:
    """Whether Accelerate is in use, in one process, and the optimizer will step after this micro-batch."""
    state = sys.modules.get("accelerate.state")
    if state is None or not state.is_initialized():
        return False
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        return False
    return bool(state.GradientState().sync_gradients)


def _label_counts(batch: Batch) -> list[int]:
    """The number of labels, as Trainer may count them: all, or without the first one for a causal model."""
    labels = [batch[name] for name in ("labels", "shift_labels") if isinstance(batch.get(name), Tensor)]
    return [int(x.ne(-100).sum()) for label in labels for x in (label, label[..., 1:])]


def loss_in(output: Any) -> Tensor | None:
    """The loss in a model's output: `.loss`, `["loss"]`, the first of a tuple, or the output itself.

    A floating-point tensor of one element; None if the output has none.

    Example:
        >>> loss_in((torch.tensor(2.0), torch.zeros(3, 4))), loss_in({"logits": torch.zeros(3, 4)})
        (tensor(2.), None)
    """
    loss = output
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif isinstance(output, Tensor):
        pass
    elif hasattr(output, "loss"):
        loss = output.loss
    elif isinstance(output, tuple | list):
        loss = output[0] if output else None
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point() else None


def with_loss(output: Any, loss: Tensor) -> Any:
    """A copy of a model's output with another loss.

    Example:
        >>> with_loss((torch.tensor(2.0), "logits"), torch.tensor(3.0))
        (tensor(3.), 'logits')
    """
    if isinstance(output, Tensor):
        return loss
    if isinstance(output, MutableMapping):
        mapping = copy.copy(output)
        mapping["loss"] = loss
        return mapping
    if hasattr(output, "loss"):
        if hasattr(output, "_replace"):
            return output._replace(loss=loss)
        if dataclasses.is_dataclass(output) and not isinstance(output, type):
            return dataclasses.replace(output, loss=loss)
        changed = copy.copy(output)
        changed.loss = loss
        return changed
    rest = [loss, *output[1:]]
    return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)


def describe(output: Any) -> str:
    """An output in a few words, for an error message."""
    if isinstance(output, Mapping):
        return f"{type(output).__name__} with {', '.join(map(str, output)) or 'nothing'}"
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    return "None" if output is None else f"a {type(output).__name__}"
