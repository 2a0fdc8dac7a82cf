"""What went wrong while a regularised model trained, and what to do about it."""

from typing import Any

from torch import nn

from attncongruence.training.outputs import describe


def no_loss(model: nn.Module, output: Any) -> str:
    """The model returned no loss in training mode."""
    return (
        f"{type(model).__name__} ran in training mode and returned no loss ({describe(output)}), and regularize adds "
        "to the loss that the model returns: .loss, ['loss'], the first of a tuple, or a lone number. Pass labels, so "
        "that it returns one; put it in eval() where it is not trained; or, where the loss is computed outside of the "
        "model, add to it there: main + weight * cacr_loss(capture.pop(), n_text=...). transformers' Trainer takes the "
        "labels away from the model when it has a compute_loss_func or a label_smoothing_factor."
    )


def never_ran(model: nn.Module, *, in_eval: bool) -> str:
    """An optimiser steps on the parameters of a model that was never regularised."""
    cause = (
        "it ran in eval mode only, where nothing is added: call model.train() before training"
        if in_eval
        else "no forward pass of it came through here. Either a part of it was called directly, and not the model "
        "itself: regularize what the training loop calls; or the model was compiled and had run before: call "
        "regularize before the first compiled run; or it trains in a copy (another process, copy.deepcopy): call "
        "regularize there"
    )
    return (
        f"an optimiser took a step on the parameters of {type(model).__name__}, which is regularised, and nothing was "
        f"ever added to its loss: {cause}. If that is meant, close() the regularizer until it is needed."
    )


SHARE_UNKNOWN = (
    "num_items_in_batch came, so the main loss is a share of the optimiser step's sum, and into how many micro-batches "
    "this step is divided cannot be told from the labels. With transformers' Trainer, add "
    "attncongruence.integrations.huggingface.CongruenceCallback() to its callbacks; in a loop of your own, set "
    "regularizer.micro_batches to the number of micro-batches of an optimiser step, on all processes together."
)

MANUAL_OPTIMIZATION = (
    "this LightningModule optimises by hand (automatic_optimization=False), so what training_step returns trains "
    "nothing. Regularize the network inside it, if that returns a loss, or add the loss before manual_backward: "
    "main + weight * cacr_loss(capture.pop(), n_text=...)."
)

WHOLE_CHECKPOINTED = (
    "the whole regularised model runs inside torch.utils.checkpoint, which runs it again in backward, without the loss "
    "that was added to it. Checkpoint its layers instead (gradient_checkpointing_enable() in transformers)."
)

NOTHING_TO_COMPARE = (
    "no {} token was found in a batch, so its congruence loss is exactly 0. That is right where there was none. If "
    "there was, look at n_text, or at the id of the image's placeholder."
)

TWICE = (
    "{} is regularised with {} already, and both are added from now on. If a cell or a script was run again, close() "
    "the first: regularizer.close(), or build the model anew."
)

NOT_COPIED = (
    "a Regularizer is hooks on one model in one process and can be neither copied nor pickled. Call regularize on the "
    "copy, or in the process that trains; take state_dict() along for the step."
)

RESUMED = (
    "the optimiser has made {} steps and the regularizer counts {}: was the run resumed without the regularizer's "
    "step? Restore it with load_state_dict (CongruenceCallback does so in Trainer and Lightning, "
    "accelerator.register_for_checkpointing in Accelerate), or set regularizer.step. Otherwise the schedule starts "
    "anew."
)
