"""The training steps of transformers' `Trainer` and its subclasses, to each of which a term is added.

Their `compute_loss` may read the model's own loss or not (TRL's do not), and may divide it by the number of
micro-batches or leave that to `training_step`. So the term is added where neither matters: to what is passed to
`accelerator.backward`, as its share of the mean over micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attncongruence.training.shim import CallShim

_NEEDED = ("model", "accelerator", "state", "training_step", "log")


def is_trainer(thing: object) -> bool:
    """Whether it trains as transformers' `Trainer` does; a ValueError for what is neither that nor a model."""
    if isinstance(thing, nn.Module):
        return False
    if missing := [name for name in _NEEDED if not hasattr(thing, name)]:
        raise ValueError(
            f"regularize takes a model (nn.Module) or a transformers Trainer, and a {type(thing).__name__} is neither: "
            f"it has no {', '.join(missing)}. With Lightning, pass the LightningModule"
        )
    return True


class TrainerSteps:
    """Adds a term to each training step of one trainer, and two numbers to what it logs.

    Args:
        trainer: transformers' `Trainer` or a subclass.
        begin: called with the number of optimizer steps, before each training step.
        with_term: called as `(loss, congruence, share)`; returns the loss with the term, and the term's weight.
    """

    def __init__(
        self,
        trainer: Any,
        begin: Callable[[int], None],
        with_term: Callable[[Tensor, Tensor, float], tuple[Tensor, float]],
    ) -> None:
        self.trainer, self.begin, self.with_term, self.model = trainer, begin, with_term, trainer.model
        self.running = False
        self.congruence: list[Tensor] = []
        """Of each forward pass in the training step that runs."""
        self._added: Tensor | None = None
        self._logged: list[tuple[Tensor, float]] = []  # congruence and weight of each step since the last log
        self.shims = CallShim(trainer, "training_step", self._training_step), CallShim(trainer, "log", self._log)

    def remove(self) -> None:
        """The trainer is as it was."""
        for shim in self.shims:
            shim.remove()

    def _training_step(self, method: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if self.trainer.model is not self.model:
            raise RuntimeError(
                f"this {type(self.trainer).__name__} has made another model (model_init) since regularize was called: "
                "call regularize when training begins, as RegularizeCallback does"
            )
        self.begin(int(self.trainer.state.global_step))
        self.running, self.congruence, self._added = True, [], None
        backward = CallShim(self.trainer.accelerator, "backward", self._backward)
        try:
            loss = method(*args, **kwargs)
        finally:
            backward.remove()
            self.running, self.congruence = False, []
        if self._added is None:
            raise RuntimeError(
                f"training_step of {type(self.trainer).__name__} did not call accelerator.backward, so that the "
                "congruence loss trains nothing: add weight * cacr_loss(capture.pop(), n_text=...) to the loss there"
            )
        return loss + self._added.to(loss)

    def _backward(self, method: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._added is not None:  # a training step with several backward passes
            return method(loss, *args, **kwargs)
        if not self.congruence:
            raise RuntimeError(
                f"{type(self.trainer.model).__name__} ran no forward pass with gradients in this training step, so "
                "that there is no attention to regularize: compute_loss calls another model, or a part of this one"
            )
        # The mean over the forward passes, and its share of the mean over the micro-batches of an optimizer step.
        congruence = torch.stack([c.to(loss.device) for c in self.congruence]).mean()
        micro_batches = getattr(self.trainer, "current_gradient_accumulation_steps", None)
        share = 1 / (micro_batches or self.trainer.args.gradient_accumulation_steps)
        total, weight = self.with_term(loss, congruence, share)
        self._added = (total - loss).detach()
        self._logged.append((congruence.detach(), weight))
        return method(total, *args, **kwargs)

    def _log(self, method: Callable[..., Any], logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        if "loss" in logs and self._logged:
            losses, weights = zip(*self._logged, strict=True)
            logs.update(congruence_loss=float(torch.stack(losses).mean()), congruence_weight=float(weights[-1]))
            self._logged = []
        return method(logs, *args, **kwargs)
