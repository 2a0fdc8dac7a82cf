"""Which layer to examine, and where text and image are in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from attncongruence.capture import CapturedAttention
from attncongruence.capture.find import find_attention, select_modules, self_attention
from attncongruence.capture.messages import nothing_seen
from attncongruence.capture.product import Log
from attncongruence.doctor import where
from attncongruence.doctor.bench import Inputs
from attncongruence.doctor.measure import share
from attncongruence.doctor.report import Placed, Trouble
from attncongruence.doctor.where import Answer, Given

Layer = int | str | nn.Module
_NEED = "one self-attention over text and image"
_NOT_BOTH = "there no position changes with them, or every one does"
_LOOK = "docs/capture.md has a section for each kind of model."
_STREAMS = (
    " This model has cross-attention: where no layer attends over both, put the blocks together with "
    "AttentionBlocks.from_streams (docs/capture.md)."
)


class TroubleFound(Exception):
    """Nothing further can be examined."""

    def __init__(self, came: str, allowed: str, remedy: str) -> None:
        super().__init__(came)
        self.trouble = Trouble(came, allowed, remedy)


@dataclass(frozen=True)
class Candidate:
    """One self-attention of a forward pass."""

    record: CapturedAttention
    number: int
    """How many operations of the same module came before it."""
    layers: str
    """The argument that makes `capture_attention` take it, as code; "" for the default."""


@dataclass(frozen=True)
class Chosen:
    """The layer to examine, and where text and image are in it."""

    candidate: Candidate
    answer: Answer
    placed: Placed


def candidates(model: nn.Module, log: Log, layers: Layer) -> list[Candidate]:
    """The self-attentions to look at, best first.

    Raises:
        TroubleFound: there is none, or the name means several attentions.
        ValueError: no such layer.
    """
    found = self_attention(log)
    if not found and not log:
        raise TroubleFound(f"no attention was seen. {nothing_seen(find_attention(model))}", _NEED, _LOOK)
    if not found:
        remedy = f"put the blocks of a dual-stream model together with AttentionBlocks.from_streams: {_LOOK}"
        raise TroubleFound("only attention between two sequences was seen", _NEED, remedy)
    names = [name for name, _, _ in found]
    every = [
        Candidate(CapturedAttention(name, seen), number, _code(names, index))
        for index, (name, number, seen) in enumerate(found)
    ]
    if layers == -1:
        return every[::-1]
    if isinstance(layers, int):
        if not -len(every) <= layers < len(every):
            raise ValueError(f"layers={layers}, and the forward pass ran {len(every)} self-attentions: {_some(log)}")
        return [every[layers]]
    wanted = select_modules(model, [layers])
    inside = [(name, seen) for name, seen in log if any(not path or within(name, path) for path in wanted)]
    mine = [one for one in every if any(one.record.layer == name for name, _ in inside)]
    if len(inside) != 1 or not mine:
        remedy = f"name one of them. For blocks of several layers, AttentionBlocks.from_streams: {_LOOK}"
        raise TroubleFound(f"layers={layers!r} means: {_some(inside)}", _NEED, remedy)
    return mine


def _code(names: list[str], index: int) -> str:
    if index == len(names) - 1:
        return ""
    return f'"{names[index]}"' if names.count(names[index]) == 1 else str(index - len(names))


def _some(log: Log) -> str:
    seen = [f"{name or 'the model itself'} ({s.lengths[0]} x {s.lengths[1]})" for name, s in log[-6:]]
    return ", ".join(seen) or "no attention"


def within(name: str, path: str) -> bool:
    """Whether a module is another or lies inside it."""
    return f"{name}.".startswith(f"{path}.")


def place(model: nn.Module, batch: Inputs, log: Log, those: list[Candidate], said: Given | None) -> Chosen:
    """The first candidate in which text and image can be told apart.

    Raises:
        TroubleFound: there is none; it says what was wrong with the first.
    """
    moved: dict[str, Tensor | None] = {}
    refused: list[str] = []
    inputs = where.named(model, batch)
    for one in those:
        kind = where.kind_of(one.record.layer)
        if kind not in moved:
            moved[kind] = where.moved_by_pictures(model, batch, log, one.record.layer)
        answers = where.guesses(model, inputs, one.record) if said is None else _said(said, inputs, one, refused)
        for answer in answers:
            placed = _placed(one.record, answer, moved[kind], refused)
            if placed is not None:
                return Chosen(one, answer, placed)
    raise TroubleFound(
        refused[0] if refused else "where text and image are was not said, and the batch does not tell",
        "a layout of the joint sequence that the layer attends over, with text and image in it",
        where.BY_HAND + (_STREAMS if any(seen.lengths[0] != seen.lengths[1] or seen.cross for _, seen in log) else ""),
    )


def _said(said: Given, inputs: Mapping[str, Any], one: Candidate, refused: list[str]) -> list[Answer]:
    layer, length = one.record.layer, one.record.lengths[0]
    try:
        answer = where.given(said, inputs, one.record)
    except Exception as error:  # the user's own function
        refused.append(f"the layout, asked for {layer}, raised {type(error).__name__}: {error}")
        return []
    if where.fits(answer.value, one.record):
        return [answer]
    refused.append(f"the layout does not fit {layer}, which attends over {length} positions")
    return []


def _placed(record: CapturedAttention, answer: Answer, moved: Tensor | None, refused: list[str]) -> Placed | None:
    try:
        text, image = where.masks(answer.value, record)
    except ValueError as error:
        refused.append(str(error))
        return None
    sure = where.confirmed(moved, text, image)
    if sure is False and moved is not None:
        places = moved.any(0).nonzero()[:, 0].tolist()
        refused.append(
            f"in {record.layer} positions that the layout calls text change with the pictures ({answer.how}). "
            f"Those that change: {stretches(places)}"
        )
        return None
    if sure is None and not answer.sure:
        why = "no picture in the batch, or no queries to look at" if moved is None else _NOT_BOTH
        refused.append(f"{record.layer}: {answer.how}, would be a guess, and other pictures do not bear it out: {why}")
        return None
    if not bool((text.any(1) & image.any(1)).any()):
        refused.append(f"no sample has both text and image ({answer.how})")
        return None
    return Placed(
        answer.how,
        answer.guessed,
        text.sum(1).tolist(),
        image.sum(1).tolist(),
        share(record, text, image),
        share(record, image, text),
        sure,
    )


def stretches(numbers: list[int]) -> str:
    """Ascending numbers in a few words.

    Example:
        >>> stretches([0, 1, 2, 7, 9, 10])
        '0 to 2, 7, 9 to 10'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join(" to ".join(map(str, run)) for run in runs)
