"""Where text and image are: as the user says, or guessed from the batch and borne out by other pictures."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attncongruence.capture.product import Log
from attncongruence.capture.record import CapturedAttention
from attncongruence.doctor.bench import Inputs, watched
from attncongruence.layout import TokenLayout
from attncongruence.locate import locate
from attncongruence.training.outputs import batch_of
from attncongruence.training.term import Where

Given = Where | Callable[..., Where]
"""A boundary, one a sample, a layout, or a function of the batch that returns one of these."""
_ID_NAMES = ("image_token_id", "image_token_index")

BY_HAND = (
    "return it third: (model, batch, where). An int where so many text tokens come first; a (batch,) tensor, one a "
    "sample; a TokenLayout(text, image) of two boolean (batch, length) masks, also from_input_ids, "
    "from_token_type_ids, from_segments; or a function of the batch that returns one of these."
)


@dataclass(frozen=True)
class Answer:
    """Where text and image are in one batch, and how to say so for any batch."""

    value: Where
    how: str
    guessed: bool
    code: str
    """An expression of `batch` (and `captured`), a number, or "" for a function of the user's."""
    wants_record: bool = False
    sure: bool = True
    """False for a guess that counts only where a run with other pictures bears it out."""


def named(model: nn.Module, batch: Inputs) -> Mapping[str, Any]:
    """The batch by the names of the forward's parameters."""
    return batch if isinstance(batch, Mapping) else batch_of(model.forward, batch, {})


def given(where: Given, batch: Mapping[str, Any], record: CapturedAttention) -> Answer:
    """What the user said, for this batch.

    Raises:
        ValueError: a function that returns something else.
    """
    wants_record = False
    value: Any = where
    if callable(where):
        # By name, as regularize does: a default argument of a lambda is never taken for it.
        wants_record = "captured" in inspect.signature(where).parameters
        value = where(batch, captured=record) if wants_record else where(batch)
    if isinstance(value, bool) or not isinstance(value, int | Tensor | TokenLayout):
        raise ValueError(f"the layout is {type(value).__name__}: an int, a (batch,) tensor or a TokenLayout is allowed")
    code = str(value) if isinstance(where, int) else ""
    return Answer(value, "as given", False, code, wants_record)


def guesses(model: nn.Module, batch: Mapping[str, Any], record: CapturedAttention) -> Iterator[Answer]:
    """What the batch and the configuration suggest for a record, best first."""
    length, ids = record.lengths[0], _ids(batch)
    mask = batch.get("attention_mask")
    real = mask if isinstance(mask, Tensor) and mask.shape[1:] == (length,) else None
    mask_code = "" if real is None else ', batch["attention_mask"]'
    if ids is not None and batch[ids].shape[1] == length:
        for name in _ID_NAMES:
            token = getattr(getattr(model, "config", None), name, None)
            if isinstance(token, int) and bool((batch[ids] == token).any()):
                code = f'TokenLayout.from_input_ids(batch["{ids}"], {token}{mask_code})'
                how = f"{ids} holds the placeholder {token}, config.{name}"
                yield Answer(TokenLayout.from_input_ids(batch[ids], token, real), how, True, code, sure=False)
    yield from _known_family(model, batch, record)
    types = batch.get("token_type_ids")
    if isinstance(types, Tensor) and types.shape[1:] == (length,) and types.unique().tolist() == [0, 1]:
        code = f'TokenLayout.from_token_type_ids(batch["token_type_ids"]{mask_code})'
        layout = TokenLayout.from_token_type_ids(types, real)
        yield Answer(layout, "token_type_ids has the joint length, 1 is image", True, code, sure=False)
    if ids is not None and batch[ids].shape[1] < length:
        n_text = batch[ids].shape[1]
        how = f"{ids} has {n_text} positions and the layer {length}, text first"
        yield Answer(n_text, how, True, f'batch["{ids}"].shape[1]', sure=False)


def _ids(batch: Mapping[str, Any]) -> str | None:
    """The entry that holds token ids."""
    whole = [name for name, x in batch.items() if isinstance(x, Tensor) and x.ndim == 2 and x.dtype == torch.long]
    return "input_ids" if "input_ids" in whole else next(iter(whole), None)


def _known_family(model: nn.Module, batch: Mapping[str, Any], record: CapturedAttention) -> Iterator[Answer]:
    if "transformers" not in sys.modules:
        return
    try:
        from attncongruence.integrations.huggingface import token_layout

        layout = token_layout(model, batch, record)
    except (ImportError, ValueError):
        return
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    yield Answer(layout, f"token_layout knows {family}", True, "token_layout(model, batch, captured)", True)


def fits(value: Where, record: CapturedAttention) -> bool:
    """Whether a layout can be that of a record, with text and image in it."""
    batch, length = record.batch_size, record.lengths[0]
    if isinstance(value, int):
        return 0 < value < length
    if isinstance(value, Tensor):
        return value.shape == (batch,) and not value.is_floating_point() and 0 < int(value.max()) <= length
    return value.text.shape[1] == length and value.text.shape[0] in (1, batch)


def masks(value: Where, record: CapturedAttention) -> tuple[Tensor, Tensor]:
    """Real text and image tokens of a record, `(batch, length)` each."""
    like = record.query if record.query is not None else record.scores
    value = value.to(record.device) if isinstance(value, Tensor | TokenLayout) else value
    located = locate(like, value, record.allowed)
    return located.text, located.image


def moved_by_pictures(model: nn.Module, batch: Inputs, log: Log, layer: str) -> Tensor | None:
    """`(batch, length)`: positions that change with the pictures, before the first layer of this kind has mixed them.

    Layers of one kind have one name but for their numbers. None without a picture in the batch, or without queries.
    """
    first = next(number for number, (name, _) in enumerate(log) if kind_of(name) == kind_of(layer))
    torch.manual_seed(1)
    others = other_pictures(batch)
    if others is None:
        return None
    other = watched(model, others)
    if [name for name, _ in other] != [name for name, _ in log]:
        return None
    before, after = (CapturedAttention(*entries[first]).query for entries in (log, other))
    if before is None or after is None or before.shape != after.shape:
        return None
    return (before != after).any(-1).any(1)


def other_pictures(value: Any, name: str = "") -> Any | None:
    """The same batch with noise on its pictures: floating-point tensors that are no mask and no label; None: none."""
    if isinstance(value, Tensor):
        known = value.is_floating_point() and value.ndim >= 2 and "mask" not in name and "label" not in name
        return value + torch.randn_like(value) if known else None
    if isinstance(value, Mapping):
        changed = {key: other_pictures(part, str(key)) for key, part in value.items()}
        kept = {key: value[key] if part is None else part for key, part in changed.items()}
        return kept if any(part is not None for part in changed.values()) else None
    if isinstance(value, tuple):
        parts = [other_pictures(part) for part in value]
        kept_parts = tuple(old if new is None else new for old, new in zip(value, parts, strict=True))
        return kept_parts if any(part is not None for part in parts) else None
    return None


def confirmed(moved: Tensor | None, text: Tensor, image: Tensor) -> bool | None:
    """Whether no text and some image changes with the pictures; None where that cannot be told.

    It cannot where nothing changes (learned queries stand for the image) or everything does (a vision tower, or an
    earlier layer has mixed the two).
    """
    if moved is None or moved.shape != text.shape or not moved.any() or bool(moved[text | image].all()):
        return None
    return not bool((moved & text).any())


def kind_of(name: str) -> str:
    """A layer's name without its numbers."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
