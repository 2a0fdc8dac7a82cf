"""The loss of a batch's captured layers: where text and image are, which samples count, layers averaged."""

from __future__ import annotations

import functools
import numbers
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from attncongruence.capture import CapturedAttention
from attncongruence.layout import TokenLayout
from attncongruence.training.outputs import Batch, Positives, entry, samples
from attncongruence.training.reasons import NOTHING_TO_COMPARE

Loss = Callable[..., Tensor]
"""Called as `loss(captured, n_text)` or `loss(captured, n_text, mask=mask)`; returns one number."""
Where = int | Tensor | TokenLayout
"""A boundary for all samples, one for each, or a layout."""
Layout = TokenLayout | Callable[..., Where]
PickPositives = Positives | Callable[[Batch], Positives]
PickMask = str | Callable[[Batch], Tensor]


def ask(name: str, function: Callable[..., Any], batch: Batch, **more: CapturedAttention) -> Any:
    """What a function of the batch returns; a KeyError of it is told what the batch holds."""
    try:
        return function(batch, **more)
    except KeyError as error:
        error.add_note(f"in regularize(..., {name}=): the batch, what the model was called with, has {sorted(batch)}")
        raise


@dataclass(frozen=True)
class Term:
    """The congruence loss as a function of batch and records; arguments as in `regularize`."""

    loss: Loss
    n_text: int | None
    layout: Layout | None
    positives: PickPositives | None
    mask: PickMask | None

    def __post_init__(self) -> None:
        if callable(self.n_text):
            raise ValueError("n_text is a function: pass it as layout=, which takes functions of the batch")
        if (self.n_text is None) == (self.layout is None):
            came = "neither n_text nor layout" if self.n_text is None else "both n_text and layout"
            raise ValueError(
                f"regularize got {came}: give n_text where the same number of text tokens comes first in every sample, "
                "or else layout, a TokenLayout or a function of the batch"
            )

    def __call__(self, batch: Batch, records: list[CapturedAttention]) -> Tensor:
        """The mean of the layers' losses, a scalar in nats."""
        mask: Tensor | None = None
        if self.mask is not None:
            mask = ask("mask", self.mask, batch) if callable(self.mask) else entry(batch, self.mask, "mask")
        positives = ask("positives", self.positives, batch) if callable(self.positives) else self.positives
        if self._wants_record:  # a model that runs its layers several times puts the tokens in other places each time
            each = [self._where(batch, record) for record in records]
        else:
            each = [self._where(batch, records[0])] * len(records)
        losses = [self._of_layer(*pair, mask, positives) for pair in zip(records, each, strict=True)]
        # (1 / layers) sum of the layers' losses
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()

    @functools.cached_property
    def _wants_record(self) -> bool:
        # By name, so that a default argument of a lambda is never taken for it.
        return callable(self.layout) and "captured" in signature(self.layout).parameters

    def _where(self, batch: Batch, record: CapturedAttention) -> Where:
        where: Where | Layout | None = self.n_text if self.layout is None else self.layout
        if callable(where):
            where = ask("layout", where, batch, **({"captured": record} if self._wants_record else {}))
        if not isinstance(where, numbers.Integral | Tensor | TokenLayout):
            raise TypeError(
                f"layout(batch) returned a {type(where).__name__}: it must return a TokenLayout, an int or a (batch,) "
                "tensor of boundaries"
            )
        if isinstance(where, TokenLayout):
            text, image = where.max_text, where.max_image
        elif isinstance(where, Tensor):
            return where  # its values are the device's
        else:
            text, image = int(where), record.lengths[0] - int(where)
        if 0 in (text, image):
            warnings.warn(NOTHING_TO_COMPARE.format("image" if text else "text"), stacklevel=2)
        return where

    def _of_layer(
        self, record: CapturedAttention, where: Where, mask: Tensor | None, positives: Positives | None
    ) -> Tensor:
        size, device = record.batch_size, record.device
        where = where.to(device) if isinstance(where, Tensor | TokenLayout) else where
        mask = mask if mask is None else mask.to(device)
        if positives is not None:
            picked = samples(positives, size, device)
            record = record[picked]
            where = where[picked] if isinstance(where, Tensor | TokenLayout) else where
            mask = mask if mask is None or mask.shape[0] != size else mask[picked]
        loss = self.loss(record, where) if mask is None else self.loss(record, where, mask=mask)
        if loss.ndim:
            raise ValueError(
                f"the loss has shape {tuple(loss.shape)}: it must be one number, as reduction='mean' gives"
            )
        return loss
