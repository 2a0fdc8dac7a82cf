"""The share of one micro-batch in an optimiser step, where the main loss comes as a sum and not as a mean.

transformers' `Trainer` hands `num_items_in_batch` to models whose forward takes it: the labels of all micro-batches of
the optimiser step, of all processes. The model divides the sum of its losses by that number, and `Trainer` does not
divide by the number of micro-batches then. A mean over samples must come as a share of the step as well, or it would
count as many times as there are micro-batches.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from attncongruence.training.outputs import Batch

Share = float | Tensor


def share_of(batch: Batch, micro_batches: int | None) -> Share | None:
    """By what a micro-batch's mean is to be multiplied so that those of a whole optimiser step make a mean.

    - Without `num_items_in_batch` the loop divides, as it divides the main loss: 1.
    - Where every sample has as many labels as any other (classes, or a row of scores), the micro-batch's share of the
      labels is its share of the samples, also where micro-batches differ in size or lie on several processes.
    - Otherwise 1 / `micro_batches`, where that is known.
    - Otherwise 1, where this micro-batch is the whole step beyond doubt: Accelerate says that the optimiser steps after
      it, no other process takes part, and its labels are all there are. Costs one wait for the device.

    Args:
        batch: what the model was called with.
        micro_batches: among how many micro-batches, of all processes, the items are shared; None: not known.

    Returns:
        The factor, a tensor where it is computed from labels; None: it can't be known.

    Example:
        Two labels of eight:

        >>> share_of({"num_items_in_batch": 8, "labels": torch.tensor([0, 1])}, None)
        tensor(0.2500)
    """
    items = batch.get("num_items_in_batch")
    if items is None:
        return 1.0
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and (labels.ndim == 1 or labels.is_floating_point()):
        # labels here / labels in the step; -100 marks what does not count, as in Trainer
        return labels.ne(-100).sum() / torch.as_tensor(items, device=labels.device)
    if micro_batches is not None:
        return 1 / micro_batches
    return 1.0 if _last_of_accelerate() and int(items) in _counts(batch) else None


def _last_of_accelerate() -> bool:
    """Whether Accelerate is at work, in one process, and the optimiser will step after this micro-batch."""
    state = sys.modules.get("accelerate.state")
    if state is None or not state.is_initialized():
        return False
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        return False
    return bool(state.GradientState().sync_gradients)


def _counts(batch: Batch) -> list[int]:
    """The labels of a batch as Trainer may count them: as they are, or shifted for a causal model."""
    labels = [batch[name] for name in ("labels", "shift_labels") if isinstance(batch.get(name), Tensor)]
    return [int(x.ne(-100).sum()) for label in labels for x in (label, label[..., 1:])]
