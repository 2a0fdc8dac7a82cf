"""What goes into a model and what comes out: the batch as a mapping, the loss in an output, the matched pairs."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Any]
Positives = Tensor | Sequence[int] | Sequence[bool]
"""Samples by index, or a mask with True at those that count."""


def batch_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch:
    """What a function was called with, by the names of its parameters.

    The entries of a mapping among the positional arguments are there by their own names too: `model(batch)` and
    `model(**batch)` look the same.

    Args:
        function: what was called; only its signature is looked at.
        args: its positional arguments.
        kwargs: its other arguments.

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


def entry(batch: Batch, name: str, what: str) -> Any:
    """One entry of the batch, or a ValueError that lists those there are."""
    if name not in batch:
        raise ValueError(f"{what}={name!r} names no entry of the batch: the model was called with {sorted(batch)}")
    return batch[name]


def loss_in(output: Any) -> Tensor | None:
    """The loss that a model returned: `.loss`, `["loss"]`, the first of a tuple, or the output itself.

    Args:
        output: whatever the model returned.

    Returns:
        A tensor with one floating-point number, or None where the output has no such thing.

    Example:
        >>> loss_in((torch.tensor(2.0), torch.zeros(3, 4))), loss_in({"logits": torch.zeros(3, 4)})
        (tensor(2.), None)
    """
    loss = output
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif _has_field(output):
        loss = output.loss
    elif isinstance(output, tuple | list):
        loss = output[0] if output else None
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point() else None


def with_loss(output: Any, loss: Tensor) -> Any:
    """The same output with another loss; the model's own object stays as it is.

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
    if _has_field(output):
        if hasattr(output, "_replace"):
            return output._replace(loss=loss)
        if dataclasses.is_dataclass(output) and not isinstance(output, type):
            return dataclasses.replace(output, loss=loss)
        changed = copy.copy(output)
        changed.loss = loss
        return changed
    rest = [loss, *output[1:]]
    return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)


def _has_field(output: Any) -> bool:
    return not isinstance(output, Tensor) and hasattr(output, "loss")


def describe(output: Any) -> str:
    """An output in a few words, for an error message."""
    if isinstance(output, Mapping):
        return f"{type(output).__name__} with {', '.join(map(str, output)) or 'nothing'}"
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    return "None" if output is None else f"a {type(output).__name__}"


def samples(positives: Positives, batch_size: int, device: torch.device) -> Tensor:
    """Matched pairs as an index or a mask that fits the batch.

    Args:
        positives: `(batch,)` bool, or indices of samples.
        batch_size: samples in the batch.
        device: where the record lives.

    Raises:
        ValueError: a mask of another length, an index out of range, or one sample twice: 0 and 1 as an index pick the
            first two samples, and as a mask they have to be bool.

    Example:
        >>> samples([True, False], 2, torch.device("cpu"))
        tensor([ True, False])
    """
    picked = torch.as_tensor(positives, device=device)
    if picked.dtype == torch.bool:
        if picked.shape != (batch_size,):
            raise ValueError(
                f"positives is a mask of shape {tuple(picked.shape)}, and the batch has {batch_size} samples: "
                f"it must have shape ({batch_size},), True at matched pairs"
            )
        return picked
    if picked.numel() == 0:
        return picked.new_zeros(0, dtype=torch.long)
    if picked.is_floating_point() or picked.ndim != 1:
        raise ValueError(
            f"positives is {picked.dtype} of shape {tuple(picked.shape)}: it must be a bool mask or a list of indices. "
            "Labels make a mask with labels == 1"
        )
    indices = picked.tolist()
    in_range = all(-batch_size <= index < batch_size for index in indices)
    if not in_range or len({index % batch_size for index in indices}) < len(indices):
        raise ValueError(
            f"positives={indices} is an index of integers, which must name samples 0 to {batch_size - 1} once "
            "each. Where 1 means matched and 0 not, make it a mask: positives == 1"
        )
    return picked.long()
