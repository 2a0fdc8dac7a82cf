"""Which layer to examine, and which positions of its sequence are text and image."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attncongruence.blocks import NText, both_modalities, locate, outer
from attncongruence.capture import CapturedAttention
from attncongruence.capture.find import crosses, nothing_seen, operations, select_modules, self_attention
from attncongruence.capture.product import Log
from attncongruence.doctor.origins import Origins, ranges
from attncongruence.doctor.report import ProblemFound, TokenPlaces, within
from attncongruence.layout import TokenLayout
from attncongruence.training.term import Batch, NTextOrFunction

Layer = int | str | nn.Module

_NEED = "one self-attention over text and image"
_DOCS = "docs/capture.md has a section for each kind of model."
_STREAMS = f"build the blocks of several layers with AttentionBlocks.from_streams. {_DOCS}"
_TOWERS = "name a model with a joint sequence, or cross-attention with AttentionBlocks.from_streams."
_N_TEXT = (
    "pass n_text, the third value of a factory: an int where that many text tokens come first; a (batch,) tensor, one "
    "int per sample; a TokenLayout; or a function of (batch, captured) that returns one of these."
)


@dataclass(frozen=True)
class Candidate:
    """One self-attention of a forward pass."""

    record: CapturedAttention
    number: int  # how many operations of the same module ran before it
    index: int  # in the log
    code: str  # Python for the `layers` that selects it; "" for the default


@dataclass(frozen=True)
class Proposal:
    """A value of `n_text` for one batch, and Python that computes it for any batch."""

    n_text: NText
    how: str  # where it comes from
    code: str  # a number, an expression of `batch` and `captured`, or "" for a function of the user
    guessed: bool = True
    certain: bool = False  # whether it may be used where other pictures do not confirm it


def candidates(model: nn.Module, log: Log, layers: Layer) -> list[Candidate]:
    """The self-attentions that `layers` allows, best first; a ValueError where there is no such layer."""
    found = self_attention(log)
    if not log:
        raise ProblemFound(f"no attention was seen. {nothing_seen(model)}", _NEED, _DOCS)
    if not found:
        raise ProblemFound("only attention between two sequences was seen", _NEED, _STREAMS)
    names = [name for name, _, _ in found]
    places = {id(seen): place for place, (_, seen) in enumerate(log)}
    every = []
    for index, (name, number, seen) in enumerate(found, -len(found)):
        code = "" if index == -1 else f'"{name}"' if names.count(name) == 1 else str(index)
        every.append(Candidate(CapturedAttention(name, seen), number, places[id(seen)], code))
    if layers == -1:
        return every[::-1]
    if isinstance(layers, int):
        if not -len(every) <= layers < len(every):
            ran = f"{len(every)} self-attentions: {operations(log)}"
            raise ValueError(f"layers={layers}, and the forward pass ran {ran}")
        return [every[layers]]
    paths = select_modules(model, [layers])
    inside = [(name, seen) for name, seen in log if any(within(name, path) for path in paths)]
    selected = [one for one in every if any(one.record.layer == name for name, _ in inside)]
    if len(inside) != 1 or not selected:
        raise ProblemFound(f"layers={layers!r} means: {operations(inside)}", _NEED, f"name one of them, or {_STREAMS}")
    return selected


def choose(
    model: nn.Module, batch: Batch, log: Log, origins: Origins, found: list[Candidate], n_text: NTextOrFunction | None
) -> tuple[Candidate, Proposal, TokenPlaces]:
    """The first candidate whose text and image positions are known."""
    if towers := origins.towers(log):
        raise ProblemFound(f"no layer of this model sees both text and image: {towers}", _NEED, _TOWERS)
    refused: list[str] = []
    for candidate in found:
        record = candidate.record
        try:
            proposals = list(_guesses(model, batch, record)) if n_text is None else [_given(n_text, batch, record)]
        except Exception as error:  # of the user's own function
            refused.append(f"n_text raised {type(error).__name__} for {record.layer}: {error}")
            continue
        for proposal in proposals:
            try:
                return candidate, proposal, _places(model, log, origins, candidate, proposal)
            except ValueError as error:
                refused.append(str(error))
    raise ProblemFound(
        refused[0] if refused else "n_text was not given, and cannot be guessed from the batch",
        "a layout of the joint sequence that the layer attends over, with text and image in it",
        _N_TEXT + (f" If no layer attends over both, {_STREAMS}" if any(crosses(seen) for _, seen in log) else ""),
    )


def _given(n_text: Any, batch: Batch, record: CapturedAttention) -> Proposal:
    value = n_text(batch, record) if callable(n_text) else n_text
    if isinstance(value, bool) or not isinstance(value, int | Tensor | TokenLayout):
        raise TypeError(f"it is a {type(value).__name__}, and must be an int, a (batch,) tensor or a TokenLayout")
    return Proposal(value, "as given", str(n_text) if isinstance(n_text, int) else "", guessed=False, certain=True)


def _guesses(model: nn.Module, batch: Batch, record: CapturedAttention) -> Iterator[Proposal]:
    """What the configuration and the batch suggest, best first."""
    length = record.lengths[0]
    if "transformers" in sys.modules:
        with suppress(ImportError, ValueError):
            from attncongruence.integrations.huggingface import token_layout

            layout = token_layout(model, batch, record)
            family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
            yield Proposal(layout, f"token_layout knows {family}", "token_layout(model, batch, captured)", certain=True)
    tensors = {name: x for name, x in batch.items() if isinstance(x, Tensor)}
    joint = {name: x for name, x in tensors.items() if x.shape[1:] == (length,)}
    types, mask = joint.get("token_type_ids"), joint.get("attention_mask")
    if types is not None and types.unique().tolist() == [0, 1]:
        masked = "" if mask is None else ', batch["attention_mask"]'
        code = f'TokenLayout.from_token_type_ids(batch["token_type_ids"]{masked})'
        how = "token_type_ids has the joint length, 1 is image"
        yield Proposal(TokenLayout.from_token_type_ids(types, mask), how, code)
    sizes = {name: x.shape[1] for name, x in tensors.items() if x.ndim == 2 and x.dtype == torch.long}
    name = "input_ids" if "input_ids" in sizes else next(iter(sizes), "")
    if sizes.get(name, length) < length:
        how = f"{name} has {sizes[name]} positions and the layer {length}, text first"
        yield Proposal(sizes[name], how, f'batch["{name}"].shape[1]')


def _places(model: nn.Module, log: Log, origins: Origins, candidate: Candidate, proposal: Proposal) -> TokenPlaces:
    """Where a proposal puts text and image; a ValueError where that is wrong, or a guess that nothing confirms."""
    record = candidate.record
    try:
        where = locate(record, proposal.n_text, source=record)
    except ValueError as error:
        size = f"{record.layer}, which attends over {record.lengths[0]} positions"
        raise ValueError(f"n_text does not fit {size}: {error}") from error
    text, image = where.text, where.image
    if not bool(both_modalities(text, image).any()):
        raise ValueError(f"no sample has both text and image ({proposal.how})")
    origin, unknown = origins.of(model, log, candidate.index)
    constant = torch.zeros_like(image)
    if origin is not None:
        picture, words = origin.from_picture, origin.from_words
        assert picture is not None
        assert words is not None
        for wrong, those, positions in (
            ("text change with the pictures", "change", text & picture),
            ("image change with the words", "change", image & words),
            ("text change neither with the words nor with the pictures", "do not", text & ~words),
        ):
            if bool(positions.any()):
                raise ValueError(
                    f"in {record.layer} positions that n_text calls {wrong} ({proposal.how}). "
                    f"Those that {those}: {ranges(positions)}. "
                    f"The words reach {ranges(words)}, the pictures {ranges(picture)}"
                )
        constant = image & ~picture
        if not bool((image & picture).any(1)[both_modalities(text, image)].all()):
            unknown = "the image of a sample does not change with the pictures"
    if unknown and not proposal.certain:
        raise ValueError(
            f"{record.layer}: {proposal.how}. This guess is not used, as it cannot be confirmed: {unknown}"
        )
    counts = text.sum(1).tolist(), image.sum(1).tolist()
    shares = _share(record, text, image), _share(record, image, text)
    return TokenPlaces(
        proposal.how, proposal.guessed, *counts, *shares, None if unknown else True, unknown, ranges(constant)
    )


def _share(record: CapturedAttention, rows: Tensor, columns: Tensor) -> float:
    """Share of the pairs (row, column) that may attend."""
    pairs = outer(rows, columns)
    if record.allowed is None or not pairs.any():
        return 1.0
    allowed = pairs & record.allowed
    return (allowed.sum() / pairs.expand(allowed.shape).sum()).item()
