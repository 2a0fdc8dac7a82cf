"""For transformers: `token_layout`, and the callbacks of `Trainer`."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from attncongruence import _compat, _compat_stack
from attncongruence.integrations.layouts import token_layout
from attncongruence.training.regularize import Regularizer, find_regularizer, regularize
from attncongruence.training.term import LossFunction, NTextOrFunction

__all__ = ["CongruenceCallback", "RegularizeCallback", "token_layout"]


class CongruenceCallback(TrainerCallback, _compat.exportable_state()):  # type: ignore[misc]
    """For `regularize` in a `Trainer`; the loss is added without it too.

    It logs `congruence_loss` (mean since the last log, of this process) and `congruence_weight`, saves the schedule's
    step in checkpoints, and tells the regularizer how many micro-batches share `num_items_in_batch`. Models with a
    label for each token need that under gradient accumulation or on several processes.

    Trainer puts its own reporters before your callbacks, and they do not see what a later callback logs:
    `trainer.callback_handler.callbacks.insert(0, CongruenceCallback())` puts it first.

    Args:
        regularizer: what `regularize` returned; None: the one on Trainer's model.

    Raises:
        ValueError: when training begins: no regularizer on the model, or several.

    Example:
        >>> regularizer = regularize(torch.nn.TransformerEncoderLayer(8, 2), CACRLoss(), n_text=2)
        >>> regularizer.step = 7
        >>> CongruenceCallback(regularizer).state()["attributes"]
        {'step': 7}
        >>> regularizer.close()
    """

    def __init__(self, regularizer: Regularizer | None = None) -> None:
        self._regularizer = regularizer
        self._sum: Tensor | float = 0.0  # since the last log
        self._count = self._step_of_epoch = 0
        self._weight = 0.0
        self.step = 0
        """The regularizer's step when this was last saved or restored."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        if self._regularizer is not None:
            self.step = self._regularizer.step
        return {"args": {}, "attributes": {"step": self.step}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Finds the regularizer, and restores its step if the run is resumed."""
        self._regularizer = self._regularizer or find_regularizer(model)
        if state.global_step:
            saved = getattr(state, "stateful_callbacks", {}).get(type(self).__name__)
            saved = saved[0] if isinstance(saved, list) else saved
            # A checkpoint of a run without this callback: Trainer's own count.
            step = saved["attributes"]["step"] if saved else state.global_step
            self._regularizer.load_state_dict({"step": step})

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Finds where in the epoch training begins: Trainer skips what was done before a checkpoint."""
        steps = _steps_per_epoch(args, train_dataloader)
        self._step_of_epoch = state.global_step % steps if steps and not args.ignore_data_skip else 0

    def on_step_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, model: Any = None, **kwargs: Any
    ) -> None:
        """Sets the number of micro-batches that share this step's items."""
        assert self._regularizer is not None, "Trainer calls on_train_begin first"
        steps, self._step_of_epoch = _steps_per_epoch(args, train_dataloader), self._step_of_epoch + 1
        count = int(args.gradient_accumulation_steps)
        if steps and self._step_of_epoch == steps:  # what is left of the epoch
            count = len(train_dataloader) - (steps - 1) * count
        # Trainer sums the items of all processes, and multiplies the loss by the number of those with other data.
        processes = args.world_size if getattr(args, "average_tokens_across_devices", False) else 1
        processes //= getattr(model, "tp_size", None) or 1
        self._regularizer.micro_batches = count * processes

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds up the losses, after each micro-batch but the last."""
        last = None if self._regularizer is None else self._regularizer.last
        if last is not None:
            self._sum = self._sum + last.congruence
            self._weight = last.weight
            self._count += 1

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """After the last micro-batch; counts the step of an optimizer that is not one of torch's (DeepSpeed)."""
        assert self._regularizer is not None, "Trainer calls on_train_begin first"
        self.on_substep_end(args, state, control)
        if not getattr(optimizer, "step_was_skipped", False):
            self._regularizer.count_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Adds to the logs of training, and to the history, where Trainer has put them already."""
        if logs is None or "loss" not in logs or not self._count:
            return
        ours = {"congruence_loss": float(self._sum) / self._count, "congruence_weight": float(self._weight)}
        logs.update(ours)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(ours)
        self._sum, self._count = 0.0, 0

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forgets the number of micro-batches: a later loop may accumulate in another way."""
        if self._regularizer is not None:
            self._regularizer.micro_batches = None


def _steps_per_epoch(args: Any, loader: Any) -> int:
    """Optimizer steps in an epoch; 0 if the data have no length."""
    try:
        return -(-len(loader) // int(args.gradient_accumulation_steps))
    except TypeError:
        return 0


class RegularizeCallback(TrainerCallback):
    """Calls `regularize(trainer, ...)` when training begins, for tools that build the trainer by themselves.

    Add it to the callbacks of any `Trainer`, also where a configuration file names them (LLaMA-Factory, ms-swift,
    Axolotl). Each call of `train()` regularizes the model that it trains; the loss is taken off when training ends.

    Args:
        loss: as in `regularize`.
        n_text: as in `regularize`; None: `token_layout` of the trainer's model.
        options: all other arguments of `regularize`.

    Raises:
        RuntimeError: when training begins: the trainer that calls this cannot be found.
        ValueError: what `regularize` raises.

    Example:
        >>> from attncongruence import exponential_warmup
        >>> callback = RegularizeCallback(CACRLoss(direction="language"), weight=exponential_warmup(1000))
        >>> callback.regularizer is None
        True
    """

    def __init__(self, loss: LossFunction, n_text: NTextOrFunction | None = None, **options: Any) -> None:
        self._loss, self._n_text, self._options = loss, n_text, options
        self.regularizer: Regularizer | None = None
        """While training runs."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Regularizes the trainer."""
        trainer = _compat_stack.trainer_of(self)
        if trainer is None:
            raise RuntimeError(
                "RegularizeCallback found no trainer that has it among its callbacks: call regularize(trainer, ...) "
                "before trainer.train()"
            )
        self.on_train_end(args, state, control)
        n_text = functools.partial(token_layout, trainer.model) if self._n_text is None else self._n_text
        self.regularizer = regularize(trainer, self._loss, n_text, **self._options)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the loss off."""
        if self.regularizer is not None:
            self.regularizer.close()
        self.regularizer = None
