"""regularize: adds the congruence loss to a model's own loss, for trainers that cannot be edited."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attncongruence import _compat
from attncongruence._typing import number
from attncongruence.blocks import NText
from attncongruence.capture import CapturedAttention
from attncongruence.capture.session import AttentionCapture, Layers
from attncongruence.capture.watch import uncompiled_hook
from attncongruence.training.shim import ForwardShim, SilentSteps, TrainingStepShim, optimizer_steps
from attncongruence.training.term import (
    Batch,
    CongruenceTerm,
    LossFunction,
    Positives,
    batch_of,
    describe,
    loss_in,
    share_of,
    with_loss,
)
from attncongruence.training.trainer import TrainerSteps, is_trainer

_EVAL_ONLY = "it ran in eval mode only: call model.train() before training"
_NOT_REACHED = (
    "the training loop computes a loss of its own and does not use the one that the model returns. For transformers' "
    "Trainer and its subclasses (TRL's read no model loss from 1.15 on) call regularize(trainer, ...); in a loop of "
    "your own, use the returned loss, or add weight * cacr_loss(capture.pop(), n_text=...) to yours"
)
_NEVER_RAN = (
    "its hooks never ran. If the loop calls a part of it, regularize that; if it was compiled and had run, call "
    "regularize before the first compiled run; if a copy trains (another process, deepcopy), call regularize there"
)


def regularize(
    model: nn.Module | Any,
    loss: LossFunction,
    n_text: NText | Callable[[Batch, CapturedAttention], NText],
    *,
    layers: Layers = -1,
    weight: float | Callable[[int], float] = 1.0,
    positives: Positives | Callable[..., Positives] | None = None,
    mask: str | Callable[[Batch], Tensor] | None = None,
) -> Regularizer:
    """Adds `weight(step) * loss` to the loss that a model returns in training mode, or to each step of a `Trainer`.

        main + weight(step) * mean over layers of loss(captured layer, n_text)

    Trainer, optimizer and model stay as they are. Nothing is added in eval mode, with gradients off or after `close()`.
    A step is one step of any `torch.optim` optimizer that holds parameters of the model, counted from 0, whatever the
    number of micro-batches in it. Where transformers' `Trainer` divides the loss by `num_items_in_batch`, the added
    loss is scaled to match, so that accumulated micro-batches equal one large batch.

    A transformers `Trainer`, or a subclass such as TRL's, may take the place of the model. The term is then added to
    what the trainer differentiates, whatever its `compute_loss` does, as a mean over the micro-batches of a step; the
    step is its `global_step`, and both losses are logged. If a training step runs the model several times with
    gradients on, the mean of these passes counts.

    Functions of the batch get a mapping: what the model was called with, by the names of its parameters. Those for
    `positives` and `mask` describe samples, so they get the batch alone, once for each forward pass.

    Args:
        model: returns its loss as `.loss`, `["loss"]`, the first of a tuple, or alone. Call `regularize` before its
            first compiled run. It may be wrapped later (DDP, FSDP, `torch.compile`, Accelerate, PEFT). For a
            `LightningModule` the loss is added to what `training_step` returns. Or a `Trainer`, before `train()`.
        loss: `CACRLoss(...)`, `IAISLoss(...)`, or a function of `(captured, n_text)` that returns one number.
        n_text: number of text tokens, which come first; a `(batch,)` integer tensor with one such number for each
            sample; a `TokenLayout`; or a function `(batch, captured)` that returns one of these. The function is called
            with both, positionally, once for each captured layer: `functools.partial(token_layout, model)` is one. A
            wrong `n_text` is not detected; check it with the doctor. Each row counts once, also a packed one.
        layers: as in `capture_attention`; the losses of several layers are averaged.
        weight: lambda, a number >= 0 or a schedule: any function step -> weight.
        positives: which samples count: a `(batch,)` bool mask, indices, or a function `(batch)` or `(batch, output)`;
            None: all. Leave out the negatives of image-text matching, also those that the model draws in `forward` and
            tells in its output. If no sample is left, the loss is exactly 0 and has a graph. For labels of 0 and 1 pass
            `labels == 1`: as many zeros and ones as there are samples are refused.
        mask: the mask to pass to the loss: the name of a batch entry, or a function `(batch)`; None: the loss uses what
            the captured layer masks.

    Returns:
        A `Regularizer`. It lives as long as the model, even if you do not keep it.

    Raises:
        ValueError: a `loss` that cannot be called; an `n_text` of another type, or a function that does not take
            `(batch, captured)`; a weight < 0; no such layer. In training: a model that returns no loss, a loss that is
            not one number in a tensor, positives that do not fit the batch.
        TypeError: a weight that is neither a number nor a function.
        RuntimeError: nothing was captured (the message says why); an optimizer steps on a model that was never
            regularized, or whose added loss no backward pass has reached; the micro-batch's weight in the step cannot
            be known; a trainer whose training step calls no `accelerator.backward`.

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
    return Regularizer(model, CongruenceTerm(loss, n_text, positives, mask), layers, weight)


@dataclass(frozen=True)
class LossParts:
    """The parts of the loss `main + weight * share * congruence` in one forward pass, detached, for logs."""

    main: Tensor
    """The model's own loss."""
    congruence: Tensor
    """The mean of the layers' losses in nats, before the weight."""
    weight: float
    """The weight at this step."""
    step: int
    """Optimizer steps before this forward pass."""
    share: float | Tensor
    """This micro-batch's weight in the optimizer step; 1 where the training loop averages micro-batches itself."""


class Regularizer:
    """The hooks that `regularize` put on a model, and the count of its optimizer steps.

    Attributes:
        last: `LossParts` of the last forward pass in training; None before the first.
        step: optimizer steps since it was made or loaded; may be set.
        micro_batches: number of micro-batches, over all processes, in one optimizer step; None if not known. Only
            models that divide their loss by `num_items_in_batch` need it, and `CongruenceCallback` sets it.
    """

    def __init__(
        self, trained: Any, term: CongruenceTerm, layers: Layers, weight: float | Callable[[int], float]
    ) -> None:
        if not callable(weight):
            schedule = "or a schedule such as exponential_warmup(5000)"
            try:
                number("weight", weight)
            except TypeError as error:
                raise TypeError(f"{error} {schedule}") from None
            if not 0 <= weight < math.inf:
                raise ValueError(f"weight={weight!r} must be >= 0 and finite, {schedule}")
        self._trainer = TrainerSteps(trained, self._begin_step, self._with_term) if is_trainer(trained) else None
        model: nn.Module = trained if self._trainer is None else trained.model
        self.model = _compat.unwrapped(model)
        self._term, self._weight = term, weight
        if any(str(other._term.loss) == str(term.loss) for other in _open_on({self.model})):
            warnings.warn(
                f"{type(self.model).__name__} is regularized with {term.loss} already, and both are added from now on. "
                "If a cell or a script ran twice, close() the first, regularizer.close(), or build the model again.",
                stacklevel=3,
            )
        self.last: LossParts | None = None
        self.step = 0
        self.micro_batches: int | None = None
        self._passes = 0  # regularized forward passes since the last optimizer step
        self._reached = False  # whether a backward pass has reached one of them
        # Until the first step is counted, and where steps matter.
        self._silent_steps = SilentSteps(self.model) if callable(weight) else None
        self._ran = self._ran_in_eval = self._checked_resume = False
        if self._trainer is None and callable(getattr(self.model, "training_step", None)):
            # Lightning calls training_step, which only under DDP runs as the module's forward. Its children always run.
            watched = nn.Module()
            for name, child in self.model.named_children():
                watched.add_module(name, child)
            self._capture = AttentionCapture(watched, layers)
            undo = [TrainingStepShim(self.model, self._after_training_step).remove]
        else:
            self._capture = AttentionCapture(model, layers)
            hook, shim = uncompiled_hook(), ForwardShim(self.model)
            before = self.model.register_forward_pre_hook(hook(shim.before_forward))
            after = self.model.register_forward_hook(hook(self._after_forward), with_kwargs=True)
            undo = [shim.remove, before.remove, after.remove]
            undo += [] if self._trainer is None else [self._trainer.remove]
        self._undo = [self._capture.close, *undo]
        optimizer_steps.add(self)

    def on_optimizer_step(self, trained: set[int], done: Callable[[], int]) -> None:
        """Counts a step that changed parameters of this model: `trained` has their ids, `done()` counts all steps."""
        # Compared at each step: FSDP replaces the model's parameters.
        if not any(id(parameter) in trained for parameter in self.model.parameters()):
            return
        if not self._ran:
            raise RuntimeError(
                f"an optimizer took a step on the parameters of {type(self.model).__name__}, which is regularized, but "
                f"nothing was ever added to its loss: {_EVAL_ONLY if self._ran_in_eval else _NEVER_RAN}. If this is "
                "intended, close() the regularizer."
            )
        if self._passes and not self._reached:
            raise RuntimeError(
                f"an optimizer took a step, and no backward pass has reached the loss that was added to that of "
                f"{type(self.model).__name__}: {_NOT_REACHED}"
            )
        self.count_step()
        if not self._checked_resume:
            self._checked_resume = True
            if callable(self._weight) and done() > self.step:
                warnings.warn(
                    f"the optimizer has made {done()} steps and the regularizer counts {self.step}, so the schedule "
                    "started again. If the run was resumed, restore the step with load_state_dict (CongruenceCallback "
                    "and accelerator.register_for_checkpointing do so), or set regularizer.step.",
                    stacklevel=2,
                )

    def count_step(self) -> None:
        """Counts one optimizer step, unless the model has not run since the last one.

        Only for steps that are not seen: of optimizers that are neither `torch.optim.Optimizer` nor in a DeepSpeed
        engine. If the step was already counted, this changes nothing.
        """
        if self._passes:
            self.step += 1
            self._silent_steps = None
        self._passes, self._reached = 0, False

    def state_dict(self) -> dict[str, int]:
        """The step, for a checkpoint."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues from the step that `state_dict` returned."""
        self.step, self._passes = int(state["step"]), 0

    def close(self) -> None:
        """Removes all hooks: the model is as it was before `regularize`."""
        while self._undo:
            self._undo.pop()()
        optimizer_steps.remove(self)

    def __enter__(self) -> Regularizer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Regularizer({type(self.model).__name__}, {self._term.loss}, step={self.step})"

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "a Regularizer is the hooks on one model in one process and can be neither copied nor pickled. Call "
            "regularize on the copy, or in the process that trains, and pass the step on with state_dict()."
        )

    def _after_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any | None:  # a forward hook: None leaves the output as it is
        if model is not self.model:  # a shallow copy of the model
            return None
        if _compat.in_backward() and torch.is_grad_enabled() and model.training:
            raise RuntimeError(
                "the whole regularized model runs inside torch.utils.checkpoint, which runs it again in backward "
                "without the added loss. Checkpoint its layers (gradient_checkpointing_enable() in transformers)."
            )
        return self._add_loss(model.forward, args, kwargs, output)

    def _after_training_step(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if output is None:  # Lightning skips this step
            self._capture.forget()
            return None
        if not getattr(self.model, "automatic_optimization", True):
            raise RuntimeError(
                "this LightningModule optimizes by hand (automatic_optimization=False), so the loss that training_step "
                "returns is not used. Regularize the network inside it, if that returns a loss, or add the loss before "
                "manual_backward: main + weight * cacr_loss(capture.pop(), n_text=...)."
            )
        changed = self._add_loss(self.model.training_step, args, kwargs, output)
        return output if changed is None else changed

    def _add_loss(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any | None:
        """The output of a call with the loss added; None if there is nothing to add."""
        optimizer_steps.watch_engines()
        if not torch.is_grad_enabled():  # perhaps inside of a pass that trains, whose records stay
            return None
        try:
            if not self.model.training:
                self._ran_in_eval = True
                return None
            if self._trainer is not None and not self._trainer.running:  # evaluation in training mode, for instance
                return None
            main = loss_in(output)
            if main is None and self._trainer is None:
                raise ValueError(
                    f"{type(self.model).__name__} ran in training mode and returned no loss ({describe(output)}): "
                    "regularize adds to .loss, ['loss'], the first of a tuple, or the output itself. Pass labels, so "
                    "that it returns one; put it in eval() if it is not trained; or, if the loss is computed outside "
                    "of the model, add main + weight * cacr_loss(capture.pop(), n_text=...) there. transformers' "
                    "Trainer does not pass labels if it has a compute_loss_func or a label_smoothing_factor."
                )
            batch = batch_of(function, args, kwargs)
            congruence = self._term(batch, self._capture.pop_all(), output)
            if self._trainer is not None:
                self._trainer.congruence.append(congruence)
                return None
            share = share_of(batch, self.micro_batches)
        finally:
            self._capture.forget()
        assert main is not None
        return with_loss(output, self._with_term(main, congruence, share)[0])

    def _with_term(self, main: Tensor, congruence: Tensor, share: float | Tensor) -> tuple[Tensor, float]:
        """The loss with the term added, and the term's weight."""
        share = share.to(congruence.device) if isinstance(share, Tensor) else share
        weight = self._weight(self.step) if callable(self._weight) else self._weight
        self._passes += 1
        self._ran = True
        if self._silent_steps is not None:
            self._silent_steps.after_pass(weight)
        self.last = LossParts(main.detach(), congruence.detach(), weight, self.step, share)
        # lambda(step) * share * congruence, in the main loss's own dtype
        added = (weight * share * congruence).to(main)
        added.register_hook(self._on_backward)
        return main + added, weight

    def _on_backward(self, grad: Tensor) -> None:
        self._reached = True

    def _begin_step(self, step: int) -> None:
        self.step = step


def _open_on(modules: set[nn.Module]) -> list[Regularizer]:
    """The open regularizers of these modules."""
    return [r for r in optimizer_steps.listeners if isinstance(r, Regularizer) and r.model in modules]


def find_regularizer(model: nn.Module) -> Regularizer:
    """The one open regularizer of a model or of one of its parts, for callbacks."""
    found = _open_on(set(model.modules()))
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} open regularizers, and the callback needs one: call "
            "regularize(model, ...) before training, and pass what it returns to the callback if there are several"
        )
    return found[0]
