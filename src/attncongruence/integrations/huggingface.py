"""For transformers: `token_layout`, which positions are text and which are image, and `Trainer`'s `CongruenceCallback`.

The only place in the library that knows models by name. Capture does not need it; `token_layout` saves you from writing
two masks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback

from attncongruence import _compat
from attncongruence.capture.record import CapturedAttention
from attncongruence.layout import TokenLayout
from attncongruence.training.regularize import Regularizer, find_regularizer, regularize
from attncongruence.training.term import LossFunction, NTextOrFunction

__all__ = ["CongruenceCallback", "RegularizeCallback", "token_layout"]

# Encoders that join a caption and an image: positions before both that are neither, and whether the image starts with
# its own [CLS].
_TEXT_FIRST = {"vilt": (0, True), "visual_bert": (0, False), "layoutlmv3": (0, True)}
_IMAGE_FIRST = {"flava": (1, True), "git": (0, True), "blip-2": (0, False), "instructblip": (0, False)}
_BY_HAND = (
    "Build it by hand: TokenLayout(text, image) takes two boolean (batch, length) masks over the joint sequence, and "
    "TokenLayout.from_n_text, from_segments and from_input_ids the common cases."
)


def token_layout(
    model: nn.Module,
    inputs: Mapping[str, Any],
    captured: CapturedAttention | None = None,
    *,
    special: Iterable[int] = (),
) -> TokenLayout:
    """The layout of a batch, for known model families.

    Known are models whose `input_ids` hold a placeholder for each image token (LLaVA, Qwen-VL, Gemma 3, PaliGemma,
    InternVL, Idefics 3, BLIP-2 and all others with an `image_token_id` in their configuration; Kosmos-2), text-first
    encoders (ViLT, VisualBERT, LayoutLMv3) and image-first ones (FLAVA, GIT, the Q-Former of BLIP-2).

    Args:
        model: the model, also inside DDP or compiled.
        inputs: the model's arguments: `input_ids`, `attention_mask`, and masks of the image if it has them.
        captured: a captured layer of this batch. It gives the length of the joint sequence and its padding; encoders
            that add the image themselves need it.
        special: token ids that are not words, for instance `tokenizer.all_special_ids`: those positions are left out,
            and the image's own [CLS] too. Image placeholders stay.

    Returns:
        The layout over the joint sequence.

    Raises:
        ValueError: a model that is not known or has no joint sequence, inputs without `input_ids`, or a captured layer
            of another length. The message says how to build the layout by hand.

    Example:
        A LLaVA whose placeholder is 5, with two image tokens and a word, then padding:

        >>> from types import SimpleNamespace
        >>> llava = nn.Identity()
        >>> llava.config = SimpleNamespace(model_type="llava", image_token_id=5)
        >>> inputs = {"input_ids": torch.tensor([[1, 5, 5, 9, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}
        >>> layout = token_layout(llava, inputs, special=[1])
        >>> layout.text.int().tolist(), layout.image.int().tolist()
        ([[0, 0, 0, 1, 0]], [[0, 1, 1, 0, 0]])
    """
    config = getattr(_compat.unwrapped(model), "config", None)
    family = str(getattr(config, "model_type", type(model).__name__))
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor):
        raise ValueError(f"token_layout needs inputs['input_ids'], got {sorted(inputs)}. {_BY_HAND}")
    mask = inputs.get("attention_mask")
    token_mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    left_out = torch.tensor(tuple(special), dtype=ids.dtype, device=ids.device)
    text = token_mask & ~torch.isin(ids, left_out)

    placeholders = _placeholders(config, family, inputs, ids)
    if placeholders is not None:
        layout = TokenLayout(text & ~placeholders, token_mask & placeholders)
    elif captured is not None and captured.lengths == ids.shape[1:] * 2:
        raise ValueError(
            f"{captured.layer} attends over {ids.shape[1]} positions, as many as input_ids has: it sees only text. "
            f"Capture another layer, or: {_BY_HAND}"
        )
    elif family in _TEXT_FIRST or family in _IMAGE_FIRST:
        layout = _joined(family, inputs, text, captured, drop_cls=left_out.numel() > 0)
    else:
        raise ValueError(f"token_layout does not know where {family!r} puts text and image. {_BY_HAND}")
    length = layout.text.shape[1]
    if captured is not None and captured.lengths != (length, length):
        queries, keys = captured.lengths
        raise ValueError(
            f"the layout has {length} positions, but {captured.layer} attends with {queries} queries over {keys} keys: "
            f"it is not the joint sequence of these inputs. Capture another layer, or: {_BY_HAND}"
        )
    return layout


def _placeholders(config: Any, family: str, inputs: Mapping[str, Any], ids: Tensor) -> Tensor | None:
    """Where `input_ids` hold an image placeholder; None for families without placeholders."""
    positions = inputs.get("image_embeds_position_mask")
    if isinstance(positions, Tensor):  # Kosmos-2
        return positions.bool()
    if getattr(getattr(config, "text_config", None), "cross_attention_layers", None):
        raise ValueError(
            f"{family!r} looks at the image through cross-attention: there is no joint sequence to lay out. Capture "
            "its layers by name and use AttentionBlocks.from_streams."
        )
    for holder in (config, getattr(config, "vision_config", None)):
        for name in ("image_token_id", "image_token_index"):
            token = getattr(holder, name, None)
            if isinstance(token, int):
                return ids == token
    return None


def _joined(
    family: str, inputs: Mapping[str, Any], text: Tensor, captured: CapturedAttention | None, *, drop_cls: bool
) -> TokenLayout:
    """The layout of an encoder that adds the image to the sequence itself, after the text or before it."""
    text_first, n_text = family in _TEXT_FIRST, text.shape[1]
    before, has_cls = (_TEXT_FIRST if text_first else _IMAGE_FIRST)[family]
    image = inputs.get("visual_attention_mask") if text_first else None
    if not isinstance(image, Tensor):
        if captured is None:
            raise ValueError(
                f"{family!r} adds the image to the sequence itself, so its length is known only from a captured layer: "
                "pass it as captured, or build the layout by hand."
            )
        keys = torch.ones(1, captured.lengths[1], dtype=torch.bool, device=captured.device)
        if captured.allowed is not None:  # some query may attend to the key
            keys = keys & captured.allowed.any(2).any(1)
        image = keys[:, n_text:] if text_first else keys[:, :-n_text]
    image = image.bool().expand(len(text), -1)
    image = image & (torch.arange(image.shape[1], device=image.device) >= before + (has_cls and drop_cls))
    if text_first:
        return TokenLayout.from_segments(text, image)
    return TokenLayout(F.pad(text, (image.shape[1], 0)), F.pad(image, (0, n_text)))


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
        trainer = _compat.trainer_of(self)
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
