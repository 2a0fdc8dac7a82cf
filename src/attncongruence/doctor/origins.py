"""Where the tokens of each layer come from: which positions change with the picture, and which with the words.

The model runs again with another picture, and with other words. What a position holds before text and image mix comes
from one of them, so the positions that change are a fact about the model, whatever the layout says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attncongruence.capture.find import crosses, named_modules
from attncongruence.capture.product import Log, Operation, tensors_in
from attncongruence.doctor.measure import Inputs, attention_of, same
from attncongruence.doctor.report import kind_of, listing

# Functions that pick rows of a table by integers.
_LOOKUPS = {"embedding", "getitem", "index_select", "gather", "take_along_dim"}


@dataclass(frozen=True)
class Origin:
    """What changes in one attention operation, with the picture and with the words."""

    picture: bool  # whether its queries or keys change with the picture
    words: bool
    from_picture: Tensor | None = None  # (batch, length): positions that do; None where positions cannot be told
    from_words: Tensor | None = None  # positions that change with the words alone


@dataclass
class Origins:
    """The origin of every attention operation of a pass; `unknown` says why where it cannot be told."""

    entries: list[Origin] = field(default_factory=list)
    unknown: str = ""
    several: bool = False  # several floating-point inputs: one of them may hold the text

    def of(self, model: nn.Module, log: Log, index: int) -> tuple[Origin | None, str]:
        """The origin of the sequence that one operation attends over, or why it cannot be told.

        It is read where text and image have not mixed yet: in the first layer of the same class, batch and length that
        gets both. A ValueError where the layer gets one of them alone.
        """
        if self.unknown:
            return None, self.unknown
        name, operation = log[index]
        own, modules = self.entries[index], named_modules(model)
        if own.picture and not own.words and self.several:
            return None, f"nothing in {name} changes with the integers of the batch, and it has several other inputs"
        if not (own.picture and own.words):
            alone = "text alone" if own.words else "the image alone" if own.picture else "neither text nor image"
            lacks = [what for what, there in (("picture", own.picture), ("words", own.words)) if not there]
            raise ValueError(
                f"{name} gets {alone}: nothing in it changes with the {' or the '.join(lacks)}, and a loss on it would "
                "mean nothing"
            )
        for (other, seen), origin in zip(log, self.entries, strict=True):
            same = type(modules[other]) is type(modules[name]) and not crosses(seen)
            same = same and (seen.main.shape[0], seen.lengths) == (operation.main.shape[0], operation.lengths)
            if same and origin.picture and origin.words:
                if origin.from_picture is None or origin.from_words is None:
                    return None, f"what each position of {other} holds cannot be read"
                if not origin.from_words.any():
                    return None, f"every position that changes with the words in {other} changes with the picture too"
                if not origin.from_picture.any():
                    return None, f"no position of {other} changes with the picture"
                return origin, ""
        return None, f"{name} is a kind of layer of which none was compared"

    def towers(self, log: Log) -> str:
        """The layers of a model in which no layer gets both text and image; "" for other models."""
        if self.unknown or any(origin.words and origin.picture for origin in self.entries):
            return ""
        named = [(kind_of(name), origin) for (name, _), origin in zip(log, self.entries, strict=True)]
        text = listing(dict.fromkeys(name for name, origin in named if origin.words), 2)
        image = listing(dict.fromkeys(name for name, origin in named if origin.picture), 2)
        other = f"{image} the image alone" if image else "and no attention sees the image"
        return f"{text} see text alone, {other}" if text else ""


def trace(model: nn.Module, inputs: Inputs, log: Log) -> Origins:
    """Runs the model with another picture and with other words; `log` is the pass with the batch as it is."""
    run = partial(_states, model, opaque={name for name, operation in log if operation.query is None})
    leaves = list(_leaves(inputs))
    integers = [t for t in leaves if t.dtype in (torch.int64, torch.int32, torch.int16) and t.ndim]
    floats = [t for t in leaves if t.is_floating_point() and t.ndim > 2]
    before, output = run(inputs)
    again, _ = run(inputs)
    if len(again) != len(before) or any(changed.any for changed in _compare(before, again)):
        return Origins(unknown="the model does not repeat itself under one seed")
    try:
        with_picture, other_output = run(other_pictures(inputs))
        by_picture = _compare(before, with_picture)
        by_words = [_compare(before, run(inputs, words=tensor)[0]) for tensor in integers]
    except Exception as error:  # whatever the model raises for inputs that are no real ones
        return Origins(unknown=f"with another picture or other words the model raised {type(error).__name__}: {error}")
    if not all(len(compared) == len(log) for compared in (by_picture, *by_words)):
        return Origins(unknown="with another picture or other words the layers run otherwise, or over other lengths")
    if not any(changed.any for changed in by_picture) and (not floats or same(output, other_output)):
        return Origins(unknown="nothing changes with the floating-point inputs: the batch has no picture among them")
    if not any(changed.any for compared in by_words for changed in compared):
        return Origins(unknown="no words could be followed: nothing is looked up by an integer tensor of the batch")
    entries = [_origin(*compared) for compared in zip(by_picture, *by_words, strict=True)]
    return Origins(entries, several=len(floats) > 1)


@dataclass(frozen=True)
class _Changed:
    any: bool
    positions: Tensor | None


def _origin(picture: _Changed, *words: _Changed) -> Origin:
    """The origin of one operation from what changes with the picture and with each integer tensor of the batch."""
    some = any(changed.any for changed in words)
    found = [changed.positions for changed in words if changed.positions is not None]
    if picture.positions is None or not found:
        return Origin(picture.any, some)
    # Integers that reach the image's positions too are positions or types of the joint sequence, unless there are no
    # others.
    alone = [positions for positions in found if positions.any() and not (positions & picture.positions).any()]
    from_words = torch.stack(alone or found).any(0) & ~picture.positions
    return Origin(picture.any, some, picture.positions, from_words)


@dataclass(frozen=True)
class _State:
    """What one operation gets in one pass."""

    name: str
    operation: Operation
    rows: Tensor | None  # (batch, length, ...): something that each position holds


def _states(
    model: nn.Module, inputs: Inputs, *, opaque: set[str], words: Tensor | None = None
) -> tuple[list[_State], Any]:
    """The attention of one pass and its output; where queries are not known, with what the modules themselves get."""
    given: dict[str, list[list[Tensor]]] = {name: [] for name in opaque}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tensors = tensors_in((*args, *kwargs.values()))
        given[name].append([t.detach().clone() for t in tensors if t.is_floating_point() and t.ndim == 3])

    with ExitStack() as stack:
        for name in opaque:
            hook = partial(note, name)
            stack.enter_context(named_modules(model)[name].register_forward_pre_hook(hook, with_kwargs=True))
        if words is not None:
            stack.enter_context(_OtherWords(words))
        log, output = attention_of(model, inputs)
    names = [name for name, _ in log]
    calls = {name: iter(seen if len(seen) == names.count(name) else []) for name, seen in given.items()}
    states = [_State(name, o.apply(Tensor.detach), _rows(o, next(calls.get(name, iter(())), []))) for name, o in log]
    return states, output


def _rows(operation: Operation, given: list[Tensor]) -> Tensor | None:
    """What each position holds: its queries, else the hidden states that the module gets."""
    batch, length = operation.main.shape[0], operation.lengths[0]
    if operation.query is not None:
        return operation.query.detach().transpose(1, 2) if operation.query.ndim == 4 else None
    sizes = [(batch, length), (length, batch)] if batch != length else []
    fitting = [t for t in given if tuple(t.shape[:2]) in sizes]
    if not fitting:
        return None
    return fitting[0] if fitting[0].shape[0] == batch else fitting[0].transpose(0, 1)


def _compare(before: list[_State], after: list[_State]) -> list[_Changed]:
    """What differs between two passes, operation by operation; nothing where they are not the same operations."""
    if [(s.name, s.operation.main.shape) for s in before] != [(s.name, s.operation.main.shape) for s in after]:
        return []
    found = []
    for one, two in zip(before, after, strict=True):
        pairs = zip(_parts(one.operation), _parts(two.operation), strict=False)
        some = any(a.shape != b.shape or bool(_differ(a, b).any()) for a, b in pairs)
        positions = None
        if one.rows is not None and two.rows is not None and one.rows.shape == two.rows.shape:
            positions = _differ(one.rows, two.rows).flatten(2).any(-1)
        found.append(_Changed(some, positions))
    return found


def _parts(operation: Operation) -> list[Tensor]:
    parts = (operation.logits,) if operation.query is None else (operation.query, operation.key)
    return [part for part in parts if part is not None]


def _differ(one: Tensor, two: Tensor) -> Tensor:
    return (one != two) & ~(one.isnan() & two.isnan())


class _OtherWords(TorchFunctionMode):
    """Adds noise to whatever is looked up by the values of one integer tensor.

    Ids that are placeholders, padding or the end of a text stay what they are: only what they stand for changes.
    """

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        self._made = {id(ids): ids}  # the tensor, and integers made of it
        self._random = torch.Generator().manual_seed(0)  # the model's own random numbers stay the same

    def __torch_function__(self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if torch.compiler.is_compiling() or not any(id(t) in self._made for t in tensors_in((*args, *kwargs.values()))):
            return result
        name = str(getattr(func, "__name__", "")).strip("_")
        if isinstance(result, Tensor) and result.is_floating_point():
            return _noisy(result, self._random) if name in _LOOKUPS else result
        # A comparison (ids == padding) and a tensor of the same size say nothing about words.
        if not name.endswith("like") and not name.startswith("new_"):
            integers = (t for t in tensors_in((result,)) if t.dtype != torch.bool and not t.is_floating_point())
            self._made.update((id(t), t) for t in integers)
        return result


def _noisy(value: Tensor, random: torch.Generator) -> Tensor:
    """A tensor plus noise of the size of its own spread, at least 1."""
    spread = value.detach().float().std(correction=0).nan_to_num().clamp(min=1.0)
    return value + (torch.randn(value.shape, generator=random).to(spread) * spread).to(value)


def other_pictures(inputs: Inputs) -> Inputs:
    """The same inputs with noise on the pictures: floating-point tensors that are neither masks nor labels."""
    changed: Inputs = _with_noise(inputs, "", torch.Generator().manual_seed(1))
    return changed


def _with_noise(value: Any, name: str, random: torch.Generator) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_noise(part, str(key), random) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_with_noise(part, name, random) for part in value)
    if not isinstance(value, Tensor) or value.ndim < 2 or "mask" in name or "label" in name:
        return value
    if value.dtype == torch.uint8 and value.ndim > 2:
        return 255 - value
    return _noisy(value, random) if value.is_floating_point() else value


def _leaves(value: Any) -> Iterator[Tensor]:
    """All tensors in some inputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(part)


def ranges(positions: Tensor) -> str:
    """Positions that are True in any sample, as ranges, "0 to 4, 7"."""
    numbers: Iterable[int] = positions.any(0).nonzero()[:, 0].tolist()
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
