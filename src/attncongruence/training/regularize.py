"""regularize: adds the congruence loss to a model's own loss, for trainers that cannot be edited."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from attncongruence import _compat
from attncongruence._typing import real
from attncongruence.capture.session import AttentionCapture, Layers, unwrapped
from attncongruence.capture.watch import uncompiled_hook
from attncongruence.training import reasons
from attncongruence.training.outputs import batch_of, loss_in, with_loss
from attncongruence.training.schedules import Schedule
from attncongruence.training.share import Share, share_of
from attncongruence.training.shim import ForwardShim, PartsOf, StepShim
from attncongruence.training.steps import holds, listeners, steps_of
from attncongruence.training.term import Layout, Loss, PickMask, PickPositives, Term


def regularize(
    model: nn.Module,
    loss: Loss,
    n_text: int | None = None,
    *,
    layout: Layout | None = None,
    layers: Layers = -1,
    weight: Schedule | float = 1.0,
    positives: PickPositives | None = None,
    mask: PickMask | None = None,
) -> Regularizer:
    """Adds `weight(step) * loss` to the loss that the model returns, each time it runs in training mode.

        main + weight(step) * mean over layers of loss(captured layer, n_text)

    Trainer, optimiser and model stay as they are; nothing happens in eval mode, with gradients off or after `close()`.
    A step is one step of any `torch.optim` optimiser that holds parameters of the model, counted from 0, however many
    micro-batches went into it. Losses that transformers' `Trainer` scales by `num_items_in_batch` are met with the
    share that makes accumulated micro-batches equal one large batch.

    Args:
        model: returns its loss as `.loss`, `["loss"]`, the first of a tuple, or alone; best given before it is first
            run compiled. It may be wrapped later (DDP, FSDP, `torch.compile`, Accelerate, PEFT). A `LightningModule`
            is met in its `training_step`.
        loss: `CACRLoss(...)`, `IAISLoss(...)`, or a function of `(captured, n_text)` that returns one number.
        n_text: number of text tokens, which come first. Or else:
        layout: a `TokenLayout`, or a function of the batch that returns one, an int, or a `(batch,)` tensor. The batch
            is a mapping: what the model was called with, by parameter name. A function with a parameter `captured`
            is called for each captured layer, with that, as `token_layout` wants it.
        layers: as in `capture_attention`; the losses of several layers are averaged.
        weight: lambda, a number >= 0 or a schedule, step -> weight.
        positives: which samples count: a `(batch,)` bool mask, indices, or a function of the batch; None: all. Leave
            negatives of image-text matching out. Where none is left the loss is exactly 0, with a graph.
        mask: name of a batch entry or function of the batch that gives the loss its mask; None: what the captured
            layer masks.

    Returns:
        A `Regularizer`; it lives as long as the model, also where nobody keeps it.

    Raises:
        ValueError: not exactly one of `n_text` and `layout`; a weight < 0; no such layer. In training: a model that
            returns no loss, a loss that is not one number, positives that do not fit the batch.
        RuntimeError: nothing was captured (the message says why); an optimiser steps on a model that never ran through
            here; a share that cannot be known.

    Example:
        One text token of score log 3, one of 0, one image token of 0: as in `cacr_loss`, the first row differs by
        log(3) / 4 from (1/2, 1/2) and the second by 0.

        >>> class Tiny(nn.Module):
        ...     def forward(self, x):
        ...         return {"loss": nn.functional.scaled_dot_product_attention(x, x, x).square().sum()}
        >>> model, x = Tiny(), torch.tensor([[[[1.0481471], [0.0], [0.0]]]], requires_grad=True)
        >>> plain = model(x)["loss"]
        >>> with regularize(model, CACRLoss(WEIGHTED_MEAN, direction="language"), n_text=2, weight=0.5) as regularizer:
        ...     added = model(x)["loss"] - plain
        >>> regularizer.last.congruence, added
        (tensor(0.1373), tensor(0.0687, grad_fn=<SubBackward0>))
    """
    return Regularizer(model, Term(loss, n_text, layout, positives, mask), layers, weight)


@dataclass(frozen=True)
class LossParts:
    """What the last forward pass in training was made of, detached, for logs."""

    main: Tensor
    """The model's own loss, as it returned it."""
    congruence: Tensor
    """The mean of the layers' losses in nats, before the weight."""
    weight: float
    step: int
    """Optimiser steps taken before it."""
    share: Share
    """1, or this micro-batch's share of the optimiser step: added was `weight * share * congruence`."""


class Regularizer:
    """What `regularize` put on a model.

    Attributes:
        last: `LossParts` of the last forward pass in training; None before.
        step: optimiser steps since it was made or loaded; may be set.
        micro_batches: among how many micro-batches, of all processes, one optimiser step shares `num_items_in_batch`;
            None where it is not known. `CongruenceCallback` sets it. Only losses scaled by that number need it.
    """

    def __init__(self, model: nn.Module, term: Term, layers: Layers, weight: Schedule | float) -> None:
        if not callable(weight):
            real("weight", weight)
            if not 0 <= weight < math.inf:
                raise ValueError(
                    f"weight={weight!r} must be >= 0 and finite, or a schedule such as exponential_warmup(5000)"
                )
        self.model = unwrapped(model)
        self._term, self._weight = term, weight
        if any(str(other._term.loss) == str(term.loss) for other in _open_on({self.model})):
            warnings.warn(reasons.TWICE.format(type(self.model).__name__, term.loss), stacklevel=4)
        self.last: LossParts | None = None
        self.step = 0
        self.micro_batches: int | None = None
        self._forwards = 0  # regularised ones since the last optimiser step
        self._ran = self._ran_in_eval = self._checked_resume = False
        in_step = callable(getattr(self.model, "training_step", None))
        self._capture = AttentionCapture(PartsOf(self.model) if in_step else model, layers)
        self._undo = [self._capture.close, *self._attach(in_step)]
        listeners.add(self)

    def _attach(self, in_step: bool) -> list[Callable[[], None]]:
        if in_step:
            return [StepShim(self.model, self._after_training_step).remove]
        hook, shim = uncompiled_hook(), ForwardShim(self.model)
        before = self.model.register_forward_pre_hook(hook(shim.enter))
        after = self.model.register_forward_hook(hook(self._after_forward), with_kwargs=True)
        return [shim.remove, before.remove, after.remove]

    def stepped(self, optimizer: Optimizer) -> None:
        """After a step of any optimiser of torch: counts it, if it trains this model."""
        if not holds(optimizer, self.model):
            return
        if not self._ran:
            raise RuntimeError(reasons.never_ran(self.model, in_eval=self._ran_in_eval))
        self.count_step()
        if not self._checked_resume:
            self._checked_resume = True
            done = steps_of(optimizer)
            if done > self.step and callable(self._weight):
                warnings.warn(reasons.RESUMED.format(done, self.step), stacklevel=2)

    def count_step(self) -> None:
        """Counts one optimiser step, unless the model has not run since the last one.

        Only for optimisers that no hook of `torch.optim` sees: those that hold copies of the parameters, as DeepSpeed's
        do. Where the step was seen, calling this as well changes nothing.
        """
        if self._forwards:
            self.step += 1
        self._forwards = 0

    def state_dict(self) -> dict[str, int]:
        """The step, for a checkpoint."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on where `state_dict` was taken."""
        self.step, self._forwards = int(state["step"]), 0

    def close(self) -> None:
        """Takes everything off: the model is as it was found."""
        while self._undo:
            self._undo.pop()()
        listeners.remove(self)

    def __enter__(self) -> Regularizer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Regularizer({type(self.model).__name__}, {self._term.loss}, step={self.step})"

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(reasons.NOT_COPIED)

    def _after_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:  # a hook: None leaves the output as it is
        if model is not self.model:  # a shallow copy
            return None
        if _compat.in_backward() and torch.is_grad_enabled() and model.training:
            raise RuntimeError(reasons.WHOLE_CHECKPOINTED)
        return self._regularized(model.forward, args, kwargs, output)

    def _after_training_step(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if output is None:  # Lightning skips this step
            self._capture.forget()
            return None
        if not getattr(self.model, "automatic_optimization", True):
            raise RuntimeError(reasons.MANUAL_OPTIMIZATION)
        changed = self._regularized(self.model.training_step, args, kwargs, output)
        return output if changed is None else changed

    def _regularized(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any | None:
        """The output with the loss added; None where nothing is to be done."""
        try:
            if not torch.is_grad_enabled():
                return None
            if not self.model.training:
                self._ran_in_eval = True
                return None
            main = loss_in(output)
            if main is None:
                raise ValueError(reasons.no_loss(self.model, output))
            batch = batch_of(function, args, kwargs)
            congruence = self._term(batch, self._capture.pop_all())
            share = share_of(batch, self.micro_batches)
            if share is None:
                raise RuntimeError(reasons.SHARE_UNKNOWN)
        finally:
            self._capture.forget()
        share = share.to(congruence.device) if isinstance(share, Tensor) else share
        weight = self._weight(self.step) if callable(self._weight) else self._weight
        self._forwards += 1
        self._ran = True
        self.last = LossParts(main.detach(), congruence.detach(), weight, self.step, share)
        # main + lambda(step) * share * congruence, in the main loss's own dtype
        return with_loss(output, main + (weight * share * congruence).to(main))


def _open_on(modules: set[nn.Module]) -> list[Regularizer]:
    return [open for open in listeners.all if isinstance(open, Regularizer) and open.model in modules]


def the_regularizer(model: nn.Module) -> Regularizer:
    """The open regularizer of a model or of one of its parts, for callbacks.

    Raises:
        ValueError: there is none, or there are several.
    """
    found = _open_on(set(model.modules()))
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} open regularizers, and the callback goes with one: call "
            "regularize(model, ...) before training, and pass what it returns to the callback where there are several"
        )
    return found[0]
