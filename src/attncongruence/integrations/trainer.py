"""CongruenceCallback for transformers' Trainer: logs, the step in checkpoints, how many micro-batches make a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from attncongruence import _compat
from attncongruence.training.regularize import Regularizer, the_regularizer

if TYPE_CHECKING:
    from transformers import TrainingArguments


class CongruenceCallback(TrainerCallback, _compat.exportable_state()):  # type: ignore[misc]
    """Goes with `regularize` in a `Trainer`; the loss itself is added without it.

    It logs `congruence_loss` (mean since the last log, of this process) and `congruence_weight`, keeps the schedule's
    step in checkpoints, and tells the regularizer how many micro-batches share `num_items_in_batch`, which models with
    labels for each token need under gradient accumulation or on several processes.

    Reporters that stand before it in the list of callbacks do not see what it logs, and Trainer puts its own first:
    `trainer.callback_handler.callbacks.insert(0, CongruenceCallback())` puts it before them.

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
        self._sum: Tensor | None = None
        self._count = self._position = 0
        self.step = 0
        """The regularizer's step when this was last saved or restored."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        if self._regularizer is not None:
            self.step = self._regularizer.step
        return {"args": {}, "attributes": {"step": self.step}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Finds the regularizer, and where a run is resumed, its step."""
        if self._regularizer is None:
            self._regularizer = the_regularizer(model)
        if state.global_step:
            saved = getattr(state, "stateful_callbacks", {}).get(type(self).__name__)
            saved = saved[0] if isinstance(saved, list) else saved
            # A checkpoint from a run without this callback: as many steps as Trainer counts.
            step = saved["attributes"]["step"] if saved else state.global_step
            self._regularizer.load_state_dict({"step": step})

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Where in the epoch training begins: Trainer skips what was done before a checkpoint."""
        steps = _steps_of_epoch(args, train_dataloader)
        self._position = state.global_step % steps if steps and not args.ignore_data_skip else 0

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Among how many micro-batches this step's items are shared."""
        steps, self._position = _steps_of_epoch(args, train_dataloader), self._position + 1
        count = int(args.gradient_accumulation_steps)
        if steps and self._position == steps:  # what is left of the epoch
            count = len(train_dataloader) - (steps - 1) * count
        # Trainer adds up the items of all processes, and multiplies the loss by the number of those that differ.
        processes = args.world_size if getattr(args, "average_tokens_across_devices", False) else 1
        processes //= getattr(model, "tp_size", None) or 1
        self._of_regularizer.micro_batches = count * processes

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After each micro-batch but the last."""
        last = self._of_regularizer.last
        if last is not None:
            self._sum = last.congruence if self._sum is None else self._sum + last.congruence
            self._count += 1

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """After the last one; counts the step where the optimiser is none of torch's (DeepSpeed)."""
        self.on_substep_end(args, state, control)
        if not getattr(optimizer, "step_was_skipped", False):
            self._of_regularizer.count_step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds to the logs of training, and to the history, where Trainer has put them already."""
        last = self._of_regularizer.last
        if logs is None or "loss" not in logs or self._sum is None or last is None:
            return
        ours = {"congruence_loss": float(self._sum) / self._count, "congruence_weight": float(last.weight)}
        logs.update(ours)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(ours)
        self._sum, self._count = None, 0

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A later loop may accumulate otherwise."""
        self._of_regularizer.micro_batches = None

    @property
    def _of_regularizer(self) -> Regularizer:
        assert self._regularizer is not None, "Trainer calls on_train_begin first"
        return self._regularizer


def _steps_of_epoch(args: TrainingArguments, loader: Any) -> int:
    """Optimiser steps of an epoch; 0 where the data have no length."""
    try:
        return -(-len(loader) // int(args.gradient_accumulation_steps))
    except TypeError:
        return 0
