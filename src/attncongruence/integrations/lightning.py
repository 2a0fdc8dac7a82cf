"""CongruenceCallback for Lightning: logs, and the step in checkpoints."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from attncongruence.training.regularize import Regularizer, find_regularizer


class CongruenceCallback(Callback):
    """For `regularize` in a Lightning `Trainer`; the loss is added without it too.

    It logs `congruence_loss` and `congruence_weight` after each batch, and saves the schedule's step in checkpoints.

    Args:
        regularizer: what `regularize` returned; None: the one on the `LightningModule` or on a part of it.

    Raises:
        ValueError: when training is set up: no regularizer on the model, or several.

    Example:
        >>> regularizer = regularize(torch.nn.TransformerEncoderLayer(8, 2), CACRLoss(), n_text=2)
        >>> regularizer.step = 7
        >>> CongruenceCallback(regularizer).state_dict()
        {'step': 7}
        >>> regularizer.close()
    """

    def __init__(self, regularizer: Regularizer | None = None) -> None:
        self._regularizer = regularizer

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the regularizer, before a checkpoint is read."""
        if stage == "fit":
            self._regularizer = self._regularizer or find_regularizer(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the parts of the batch's loss."""
        last = None if self._regularizer is None else self._regularizer.last
        if last is not None:
            pl_module.log("congruence_loss", last.congruence)
            pl_module.log("congruence_weight", float(last.weight))

    def state_dict(self) -> dict[str, Any]:
        """The step, for a checkpoint."""
        return {} if self._regularizer is None else dict(self._regularizer.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the step of a checkpoint."""
        if self._regularizer is not None and state_dict:
            self._regularizer.load_state_dict(state_dict)
