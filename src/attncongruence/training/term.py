"""The congruence loss of one batch: the mean over its captured layers, for the samples that count."""

from __future__ import annotations

import inspect
import numbers
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attncongruence.blocks import NText
from attncongruence.capture import CapturedAttention
from attncongruence.layout import TokenLayout
from attncongruence.training.outputs import Batch

LossFunction = Callable[..., Tensor]
"""Called as `loss(captured, n_text)` or `loss(captured, n_text, mask=mask)`; returns one number."""
Positives = Tensor | Sequence[int] | Sequence[bool]
"""Indices of samples, or a mask that is True at the samples that count."""


@dataclass(frozen=True)
class CongruenceTerm:
    """The congruence loss as a function of a batch and its captured layers; arguments as in `regularize`."""

    loss: LossFunction
    n_text: NText | Callable[[Batch, CapturedAttention], NText]
    positives: Positives | Callable[[Batch], Positives] | None
    mask: str | Callable[[Batch], Tensor] | None

    def __post_init__(self) -> None:
        if not callable(self.n_text):
            _check_n_text(f"n_text={self.n_text!r} is", self.n_text)
        elif not _takes_two(self.n_text):
            raise ValueError(
                f"n_text={self.n_text!r} must take two positional arguments, since it is called with the batch and a "
                "captured layer: write lambda batch, captured: ..."
            )

    def __call__(self, batch: Batch, layers: list[CapturedAttention]) -> Tensor:
        """The mean of the layers' losses, a scalar in nats."""
        positives = _call("positives", self.positives, batch) if callable(self.positives) else self.positives
        mask = _call("mask", self.mask, batch) if callable(self.mask) else self.mask
        if isinstance(mask, str):
            if mask not in batch:
                raise ValueError(f"mask={mask!r} is not in the batch: the model was called with {sorted(batch)}")
            mask = batch[mask]
        losses = [self._layer_loss(batch, captured, positives, mask) for captured in layers]
        # (1 / layers) sum of the layers' losses
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()

    def _layer_loss(
        self, batch: Batch, captured: CapturedAttention, positives: Positives | None, mask: Tensor | None
    ) -> Tensor:
        n_text: Any = self.n_text
        if callable(n_text):
            n_text = _call("n_text", n_text, batch, captured)
            _check_n_text("n_text(batch, captured) returned", n_text)
        _warn_if_empty(n_text, captured)
        if isinstance(n_text, Tensor | TokenLayout):
            n_text = n_text.to(captured.device)
        mask = None if mask is None else mask.to(captured.device)
        if positives is not None:
            size = captured.batch_size
            selected = _select(positives, size, captured.device)
            captured = captured[selected]
            if isinstance(n_text, Tensor | TokenLayout):
                n_text = n_text[selected]
            if mask is not None and mask.shape[0] == size:
                mask = mask[selected]
        loss = self.loss(captured, n_text) if mask is None else self.loss(captured, n_text, mask=mask)
        if loss.ndim:
            raise ValueError(
                f"the loss has shape {tuple(loss.shape)}: it must be one number, as reduction='mean' gives"
            )
        return loss


def _call(name: str, function: Callable[..., Any], batch: Batch, *captured: CapturedAttention) -> Any:
    """Calls a function of the batch; a KeyError gets a note that lists the batch's entries."""
    try:
        return function(batch, *captured)
    except KeyError as error:
        error.add_note(f"in regularize(..., {name}=): the batch, what the model was called with, has {sorted(batch)}")
        raise


def _takes_two(function: Callable[..., Any]) -> bool:
    """Whether a function can be called with two positional arguments; True if its signature is not known."""
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # no signature
        pass
    return True


def _check_n_text(came: str, n_text: object) -> None:
    if not isinstance(n_text, numbers.Integral | Tensor | TokenLayout):
        raise ValueError(
            f"{came} a {type(n_text).__name__}: it must be an int, a (batch,) integer tensor or a TokenLayout"
        )


def _warn_if_empty(n_text: int | Tensor | TokenLayout, captured: CapturedAttention) -> None:
    """Warns where no sample has text, or none an image. A tensor is not checked: that would need a synchronization."""
    if isinstance(n_text, Tensor):
        return
    if isinstance(n_text, TokenLayout):
        text, image = n_text.max_text, n_text.max_image
    else:
        text, image = int(n_text), captured.lengths[0] - int(n_text)
    if 0 in (text, image):
        warnings.warn(
            f"a batch has no {'image' if text else 'text'} token, so its congruence loss is exactly 0. If it should "
            "have one, check n_text, or the id of the image placeholder.",
            stacklevel=2,
        )


def _select(positives: Positives, batch_size: int, device: torch.device) -> Tensor:
    """Matched samples as an index or a boolean mask that fits the batch."""
    selected = torch.as_tensor(positives, device=device)
    if selected.dtype == torch.bool:
        if selected.shape != (batch_size,):
            raise ValueError(
                f"positives is a mask of shape {tuple(selected.shape)}, and the batch has {batch_size} samples: "
                f"it must have shape ({batch_size},), True at matched pairs"
            )
        return selected
    if selected.numel() == 0:
        return selected.new_zeros(0, dtype=torch.long)
    if selected.is_floating_point() or selected.ndim != 1:
        raise ValueError(
            f"positives is {selected.dtype} of shape {tuple(selected.shape)}: it must be a bool mask or a list of "
            "indices. Make a mask of labels with labels == 1"
        )
    indices = selected.tolist()
    in_range = all(-batch_size <= index < batch_size for index in indices)
    if not in_range or len({index % batch_size for index in indices}) < len(indices):
        raise ValueError(
            f"positives={indices} are integers, so they are indices and must name samples 0 to {batch_size - 1} once "
            "each. If 1 means matched and 0 not, make it a mask: positives == 1"
        )
    return selected.long()
