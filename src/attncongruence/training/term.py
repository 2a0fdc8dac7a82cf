"""One batch of a training step: its entries by name, its congruence loss, its weight in the step, the model's loss."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import numbers
import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attncongruence._typing import each_warning_once, warn
from attncongruence.blocks import NText
from attncongruence.capture import CapturedAttention
from attncongruence.layout import TokenLayout, not_ambiguous

Batch = Mapping[str, Any]
"""What a model was called with, by the names of its parameters."""
NTextOrFunction = NText | Callable[[Batch, CapturedAttention], NText]
LossFunction = Callable[..., Tensor]
"""Called as `loss(captured, n_text)` or `loss(captured, n_text, mask=mask)`; returns one number."""
Positives = Tensor | Sequence[int] | Sequence[bool]
"""Indices of samples, or a mask that is True at the samples that count."""


def batch_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch:
    """The arguments of a call by the names of the function's parameters, for `model(**batch)` and for `model(batch)`.

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


@dataclasses.dataclass(frozen=True)
class CongruenceTerm:
    """The congruence loss as a function of a batch and its captured layers; arguments as in `regularize`."""

    loss: LossFunction
    n_text: NTextOrFunction
    positives: Positives | Callable[..., Positives] | None
    mask: str | Callable[[Batch], Tensor] | None
    said: set[str] = dataclasses.field(default_factory=set, repr=False)
    """Warnings that were given."""

    def __post_init__(self) -> None:
        if isinstance(self.loss, type):
            name = self.loss.__name__
            raise ValueError(f"loss is the class {name}: pass {name}()")
        if not callable(self.loss):
            came = f"loss={self.loss!r} is a {type(self.loss).__name__}"
            raise ValueError(f"{came}: pass CACRLoss(), IAISLoss() or a function (captured, n_text)")
        if not callable(self.n_text):
            allowed = "an int, a (batch,) integer tensor, a TokenLayout or a function (batch, captured)"
            _check_n_text(f"n_text={self.n_text!r} is", self.n_text, allowed)
        elif not _takes(self.n_text, 2):
            raise ValueError(
                f"n_text={self.n_text!r} must take two positional arguments, since it is called with the batch and a "
                "captured layer: write lambda batch, captured: ..."
            )

    def __call__(self, batch: Batch, layers: list[CapturedAttention], output: Any = None) -> Tensor:
        """The mean of the layers' losses, a scalar in nats; `output` is what the model returned."""
        positives: Any = self.positives
        if callable(positives):
            more = (output,) if not _takes(positives, 1) and _takes(positives, 2) else ()
            positives = _call("positives", positives, batch, *more)
        mask = _call("mask", self.mask, batch) if callable(self.mask) else self.mask
        if isinstance(mask, str):
            if mask not in batch:
                raise ValueError(f"mask={mask!r} is not in the batch: the model was called with {sorted(batch)}")
            mask = batch[mask]
        with each_warning_once(self.said):
            if _LOOKED not in self.said and _packed(batch):  # the first batch tells; it costs one synchronization
                warn(_PACKED)
            self.said.add(_LOOKED)
            losses = [self._layer_loss(batch, captured, positives, mask) for captured in layers]
        # (1 / layers) sum of the layers' losses
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()

    def _layer_loss(
        self, batch: Batch, captured: CapturedAttention, positives: Positives | None, mask: Tensor | None
    ) -> Tensor:
        n_text: Any = self.n_text
        if callable(n_text):
            n_text = _call("n_text", n_text, batch, captured)
            allowed = "an int, a (batch,) integer tensor or a TokenLayout"
            _check_n_text("n_text(batch, captured) returned", n_text, allowed)
        _warn_if_empty(n_text, captured)
        if isinstance(n_text, Tensor | TokenLayout):
            n_text = n_text.to(captured.device)
        mask = None if mask is None else mask.to(captured.device)
        if mask is not None:  # before its rows are chosen
            not_ambiguous(mask, captured.batch_size, captured.lengths[1])
        if positives is not None:
            size = captured.batch_size
            selected = _select(positives, size, captured.device)
            captured = captured[selected]
            if isinstance(n_text, Tensor | TokenLayout):
                n_text = n_text[selected]
            if mask is not None and mask.shape[0] == size:
                mask = mask[selected]
        loss = self.loss(captured, n_text) if mask is None else self.loss(captured, n_text, mask=mask)
        if not isinstance(loss, Tensor):
            kind = type(loss).__name__
            raise ValueError(f"the loss returned a {kind}: it must return one number as a tensor, as CACRLoss() does")
        if loss.ndim:
            shape = tuple(loss.shape)
            raise ValueError(f"the loss has shape {shape}: it must be one number, as reduction='mean' gives")
        return loss


_LOOKED = "looked for packed rows"
_PACKED = (
    "rows of this batch hold several samples (packing, padding-free batches). The loss compares only tokens that "
    "attention lets see each other, but it is a mean over rows: each row counts once, not each sample. For a mean over "
    "samples, train without packing (packing=False, padding_free=False)."
)


def _packed(batch: Batch) -> bool:
    """Whether a row holds several samples, by `cu_seq_lens` or by positions that start again among its tokens."""
    if batch.get("cu_seq_lens_q") is not None:
        return bool(batch["cu_seq_lens_q"].numel() > 2)
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if not isinstance(positions, Tensor) or positions.ndim not in (2, 3):
        return False
    back = (positions[0] if positions.ndim == 3 else positions).diff(dim=-1) < 0  # three: Qwen-VL's, time first
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[-1] == positions.shape[-1]:
        back = back & mask[:, 1:].bool() & mask[:, :-1].bool()
    return bool(back.any())


def _call(name: str, function: Callable[..., Any], batch: Batch, *more: Any) -> Any:
    """Calls a function of the batch; a KeyError gets a note that lists the batch's entries."""
    try:
        return function(batch, *more)
    except KeyError as error:
        error.add_note(f"in regularize(..., {name}=): the batch, what the model was called with, has {sorted(batch)}")
        raise


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether a function can be called with so many positional arguments."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # no signature
        pass
    return True


def _check_n_text(came: str, n_text: object, allowed: str) -> None:
    if not isinstance(n_text, numbers.Integral | Tensor | TokenLayout):
        raise ValueError(f"{came} a {type(n_text).__name__}: it must be {allowed}")


def _warn_if_empty(n_text: int | Tensor | TokenLayout, captured: CapturedAttention) -> None:
    """Warns where no sample has text, or none an image. A tensor is not checked: that would need a synchronization."""
    if isinstance(n_text, Tensor):
        return
    if isinstance(n_text, TokenLayout):
        text, image = n_text.max_text, n_text.max_image
    else:
        text, image = int(n_text), captured.lengths[0] - int(n_text)
    if 0 in (text, image):
        warn(
            f"a batch has no {'image' if text else 'text'} token, so its congruence loss is exactly 0. If it should "
            "have one, check n_text, or the id of the image placeholder."
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
    if len(indices) == batch_size and set(indices) <= {0, 1}:
        raise ValueError(
            f"positives={indices} may be labels or indices: pass a bool mask such as positives == 1, or leave "
            "positives out if all samples count"
        )
    in_range = all(-batch_size <= index < batch_size for index in indices)
    if not in_range or len({index % batch_size for index in indices}) < len(indices):
        raise ValueError(
            f"positives={indices} are integers, so they are indices and must name samples 0 to {batch_size - 1} once "
            "each. If 1 means matched and 0 not, make it a mask: positives == 1"
        )
    return selected.long()


def share_of(batch: Batch, micro_batches: int | None) -> float | Tensor:
    """This micro-batch's weight in the optimizer step: the weighted means of all micro-batches sum to the step's mean.

    transformers' `Trainer` passes `num_items_in_batch`, the number of labels in the whole step on all processes, to
    models that take it. They divide the sum of their losses by it, and `Trainer` does not divide by the number of
    micro-batches.
    """
    items, labels = batch.get("num_items_in_batch"), batch.get("labels")
    if items is None:  # the loop divides the loss
        return 1.0
    if isinstance(labels, Tensor) and (labels.ndim == 1 or labels.is_floating_point()):
        # Each sample has equally many labels: labels here / labels in the step. Trainer does not count -100.
        return labels.ne(-100).sum() / torch.as_tensor(items, device=labels.device)
    if micro_batches is not None:
        return 1 / micro_batches
    # This micro-batch is the whole step. Comparing the labels costs one device synchronization.
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
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if state is None or not state.is_initialized() or (distributed and torch.distributed.get_world_size() > 1):
        return False
    return bool(state.GradientState().sync_gradients)


def _label_counts(batch: Batch) -> list[int]:
    """The number of labels, as Trainer may count them: all, or without the first one for a causal model."""
    labels = [batch[name] for name in ("labels", "shift_labels") if isinstance(batch.get(name), Tensor)]
    return [int(x.ne(-100).sum()) for label in labels for x in (label, label[..., 1:])]


def loss_in(output: Any) -> Tensor | None:
    """The loss in a model's output: `.loss`, `["loss"]`, the first of a tuple, or the output itself; None: no loss."""
    loss = output
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif hasattr(output, "loss"):
        loss = output.loss
    elif isinstance(output, tuple | list):
        loss = output[0] if output else None
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point() else None


def with_loss(output: Any, loss: Tensor) -> Any:
    """A copy of a model's output with another loss."""
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
