"""The report of an examination: plain values that print, become JSON; its text, and the code it suggests."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from attncongruence.training.term import loss_in

# A call with its arguments, or a dict: no line of the text breaks inside, so that it can be copied.
_CODE = re.compile(r"[\w.\]]+\((?:[^()]|\([^()]*\))*\)|\{[^{}]*\}")

_NOT_CONFIRMED = "where text and image are is not confirmed"


class ProblemFound(Exception):
    """Ends the examination; its arguments are those of a `Problem`."""


@dataclass(frozen=True)
class Problem:
    """Something that keeps the loss from training this model."""

    came: str  # what was found
    allowed: str  # what is needed
    remedy: str  # what to do


@dataclass(frozen=True)
class AttentionCall:
    """One attention operation of a forward pass."""

    module: str
    kind: str  # "self" or "cross"
    heads: int
    queries: int
    keys: int


@dataclass(frozen=True)
class Captured:
    """What was captured from the examined layer."""

    shape: tuple[int, int, int, int]  # batch, heads, queries, keys
    dtype: str
    offers_query_key: bool  # whether query, key and scale give the scores; otherwise only scores are available
    streaming: bool  # whether the loss can run in linear memory
    mask: str  # "none", "tokens" (padding), "causal" or "pairs"
    hidden: float  # share of pairs that may not attend
    shifted: bool  # whether the model subtracts each row's maximum, so that raw scores have no meaning


@dataclass(frozen=True)
class TokenPlaces:
    """Where text and image are."""

    how: str  # where the layout came from
    guessed: bool
    text: list[int]  # number of text tokens of each sample
    image: list[int]
    seen_by_text: float  # share of pairs (text, image) that may attend: LV
    seen_by_image: float  # share of pairs (image, text): VL
    confirmed: bool | None  # text changes with the words alone, image with the pictures; None: this cannot be tested
    unknown: str = ""  # why it cannot be tested
    constant: str = ""  # image positions that change with neither


@dataclass(frozen=True)
class LossRow:
    """The loss under one convention, in nats. A direction is None where it is not defined; `why` gives the reason."""

    name: str
    language: float | None
    vision: float | None
    both: float | None
    why: str = ""


@dataclass(frozen=True)
class Gradient:
    """Which parameters the congruence loss alone trains."""

    reached: list[str]  # parameters of the layer that get gradient
    untouched: list[str]  # those that get none or rounding errors: values and output do not influence scores
    frozen: list[str]
    elsewhere: int  # number of parameters outside the layer that get gradient


@dataclass(frozen=True)
class Overhead:
    """Time of forward and backward with the loss, relative to the same without it; quartiles of paired rounds."""

    median: float
    lower_quartile: float
    upper_quartile: float
    rounds: int


@dataclass
class Report:
    """All that `examine` found. Parts that could not be examined are None or empty; a problem says why."""

    model: str
    batch_size: int | None = None
    attention: list[AttentionCall] = field(default_factory=list)
    """Every attention operation that ran, in order."""
    unseen: dict[str, str] = field(default_factory=dict)
    """Modules that look like attention but in which none was seen: name to class."""
    default: str | None = None
    """The layer that `capture_attention(model)` takes."""
    layer: str | None = None
    """The layer that was examined."""
    captured: Captured | None = None
    placed: TokenPlaces | None = None
    gradient: Gradient | None = None
    losses: list[LossRow] = field(default_factory=list)
    direction: str | None = None
    """The direction that gradient, overhead and code use."""
    overhead: Overhead | None = None
    unchanged: bool | None = None
    """Whether capture leaves the outputs bitwise unchanged; None: the model does not repeat itself under one seed."""
    restored: bool = False
    """Whether the model was left as it was found."""
    snippet: str | None = None
    """Code for a training loop."""
    one_line: str | None = None
    """The same with `regularize`; None where the model returns no loss."""
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the loss can train this model as it is."""
        return not self.problems


def within(name: str, path: str) -> bool:
    """Whether the module called `name` is the one called `path` or lies inside it."""
    return not path or f"{name}.".startswith(f"{path}.")


def kind_of(name: str) -> str:
    """A layer's name with `*` for its numbers: layers of one kind share it."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def listing(items: Iterable[object], most: int = 6) -> str:
    """The first few of some items, and how many more there are."""
    words = [str(item) for item in items]
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def as_text(report: Report) -> str:
    """The report for a terminal: ASCII, without the parts that could not be examined.

    Lines are narrower than 100 columns, unless one name or one piece of code is longer.
    """
    size = "" if report.batch_size is None else f", a batch of {report.batch_size}"
    parts = [f"{report.model}{size}, in training mode", _attention(report)]
    parts.append(_captured(report.captured) if report.captured else "")
    placed = report.placed
    parts.append(_placed(placed) if placed else "")
    parts.append(_losses(report.losses))
    parts.append(_gradient(report.gradient, report.layer, report.direction) if report.gradient else "")
    parts.append(_model(report))
    if report.snippet is not None:
        one_line = report.one_line or "# regularize adds to the loss that a model returns: this model returned none."
        parts += ["CODE FOR YOUR TRAINING LOOP", report.snippet, "OR, FOR A TRAINER THAT YOU CANNOT EDIT", one_line]
    parts.append(_section("notes", [("-", note) for note in report.notes]))
    for number, problem in enumerate(report.problems, 1):
        lines = [("found", problem.came), ("needed", problem.allowed), ("do", problem.remedy)]
        parts.append(_section(f"problem {number}", lines))
    fine = "All fine." if placed is None or placed.confirmed else f"No problem found, but {_NOT_CONFIRMED}."
    parts.append(fine if report.ok else f"Problems: {len(report.problems)}.")
    return "\n\n".join(part for part in parts if part).encode("ascii", "backslashreplace").decode()


def _section(title: str, lines: list[tuple[str, str]], table: Iterable[str] = ()) -> str:
    """A title, the lines of a table, then keys with their values, those that have one; "" where nothing follows."""
    parts = [title.upper(), *table]
    for key, value in lines:
        start = "  - " if key == "-" else f"  {key:<13}"
        if value:
            whole = _CODE.sub(lambda code: code[0].replace(" ", "\0"), value)
            indent = " " * len(start)
            filled = textwrap.fill(
                start + whole, 96, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
            )
            parts.append(filled.replace("\0", " "))
    return "\n".join(parts) if len(parts) > 1 else ""


def _attention(report: Report) -> str:
    table, width = [], 54
    # Consecutive layers of one kind and size share a line.
    for (kind, call), group in groupby(report.attention, key=lambda a: (kind_of(a.module), replace(a, module=""))):
        names = [one.module for one in group]
        name = (kind if len(names) > 1 else names[0]) or "the model itself"
        name = name if len(name) <= width else f"...{name[3 - width :]}"
        times = f"{len(names):>3} times" if len(names) > 1 else ""
        size = f"{call.kind:<5} {call.heads:>3} heads {call.queries:>5} x {call.keys:<5}"
        table.append(f"  {name:<{width}} {size} {times}".rstrip())
    layer, default = report.layer, report.default
    lines = [
        ("not seen", listing(f"{name} ({kind})" for name, kind in report.unseen.items())),
        ("default", "" if default is None else f"{default or 'the model itself'}, the last self-attention that runs"),
        ("examined", "" if layer is None else "the default" if layer == default else layer),
    ]
    return _section("attention, queries x keys", lines, table)


def _captured(found: Captured) -> str:
    offers = "yes" if found.offers_query_key else "no, only scores: the model adds a bias to them, caps or shifts them"
    dense = "no, only the dense form" + (": there is an attention mask" if found.offers_query_key else "")
    masks = {"tokens": "token mask (padding)", "causal": "attention mask, causal", "pairs": "attention mask"}
    hidden = f", {found.hidden:.0%} of all pairs hidden" if found.hidden else ""
    shifted = "by each row's maximum: do not use PRINTED, which weighs with raw scores"
    lines = [
        ("scores", "batch {}, heads {}, queries {}, keys {}, from {}".format(*found.shape, found.dtype)),
        ("q, k, scale", offers),
        ("streaming", "yes, impl='streaming' is possible" if found.streaming else dense),
        ("mask", masks.get(found.mask, "none") + hidden),
        ("shifted", shifted if found.shifted else ""),
    ]
    return _section("captured", lines)


def _placed(placed: TokenPlaces) -> str:
    learned = f"image positions {placed.constant} do not change (learned tokens, such as the image's own [CLS])"
    yes = "yes: text positions change with the words alone, image positions with the pictures"
    lines = [
        ("from", f"A GUESS: {placed.how}" if placed.guessed else placed.how),
        ("text tokens", f"{listing(placed.text, 16)} in each sample"),
        ("image tokens", f"{listing(placed.image, 16)} in each sample"),
        ("text sees", f"{placed.seen_by_text:.0%} of the image (LV)"),
        ("image sees", f"{placed.seen_by_image:.0%} of the text (VL)"),
        (
            "confirmed",
            yes if placed.confirmed else f"no: {placed.unknown}. Compare the numbers of tokens with what you expect",
        ),
        ("constant", learned if placed.constant else ""),
    ]
    return _section("text and image", lines)


def _losses(rows: list[LossRow]) -> str:
    table = [f"  {'nats':<25}{'language':>12}{'vision':>12}{'both':>12}"] if rows else []
    for row in rows:
        values = ["-" if value is None else f"{value:.4g}" for value in (row.language, row.vision, row.both)]
        table.append(f"  {row.name:<25}" + "".join(f"{value:>12}" for value in values))
    reasons = dict.fromkeys(row.why for row in rows if row.why)
    return _section("loss", [("-", why) for why in reasons], table)


def _gradient(found: Gradient, layer: str | None, direction: str | None) -> str:
    groups = [("reached", found.reached), ("untouched", found.untouched), ("frozen", found.frozen)]
    lines = [(key, listing([name.removeprefix(f"{layer}.") for name in names], 12)) for key, names in groups]
    lines.append(("elsewhere", f"{found.elsewhere} parameters of other modules"))
    return _section(f"gradient of the loss alone, {direction}", lines)


def _model(report: Report) -> str:
    outputs = {True: "bitwise unchanged by capture", False: "changed by capture", None: ""}[report.unchanged]
    overhead = ""
    if (cost := report.overhead) is not None:
        quartiles = f"{cost.lower_quartile:.2f} to {cost.upper_quartile:.2f}, {cost.rounds} rounds"
        overhead = f"a step takes {cost.median:.2f} times as long (quartiles {quartiles})"
    restored = "yes: modes, gradients, buffers; no hook is left" if report.restored else ""
    return _section("the model", [("outputs", outputs), ("overhead", overhead), ("restored", restored)])


def suggest_code(report: Report, names: list[str], inputs: Any, output: Any, code: str, layers: str) -> None:
    """Adds code for a training loop to a report, as `snippet` and `one_line`.

    `code` is Python for `n_text`: a number, an expression of `batch` and `captured`, or "" for a function of the user.
    `layers` is Python for `layers`, "" for the default. `names` are those of the parameters that got the inputs.
    """
    number, main, stars, inputs_line, source = code.isdecimal(), loss_in(output), "*", "", "batch"
    if isinstance(inputs, Mapping):
        stars = "**"
    elif isinstance(inputs[0], Mapping):
        source = "batch[0]"
    elif not number:
        inputs_line, source = f"    inputs = dict(zip({tuple(names)!r}, batch))\n", "inputs"
    accessor = ".loss" if hasattr(output, "loss") else '["loss"]' if isinstance(output, Mapping) else "[0]"
    main_line = "main_loss(out)  # yours" if main is None else "out" if main is output else f"out{accessor}"
    imports = "from attncongruence.integrations.huggingface import token_layout\n" if "token_layout" in code else ""
    define = "" if number else f"{imports}\n\ndef n_text(batch, captured):\n    return {code}\n\n"
    if not code:
        define = "\n# n_text: your function of (batch, captured), as given to the doctor\n"
    layout = "TokenLayout, " if code.startswith("TokenLayout") else ""
    way = "" if report.direction == "both" else f'direction="{report.direction}"'
    arguments = ["captured", f"n_text={code}" if number else f"n_text({source}, captured)", way]
    report.snippet = f"""\
from attncongruence import {layout}cacr_loss, capture_attention, exponential_warmup
{define}
capture = capture_attention({", ".join(filter(None, ["model", layers]))})
weight = exponential_warmup(total_steps=5000)
for step, batch in enumerate(loader):
{inputs_line}    out = model({stars}batch)
    main = {main_line}
    captured = capture.pop()
    congruence = cacr_loss({", ".join(filter(None, arguments))})
    loss = main + weight(step) * congruence
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
capture.close()"""
    arguments = ["model", f"CACRLoss({way})", f"n_text={code if number else 'n_text'}", layers and f"layers={layers}"]
    if main is not None:
        report.one_line = f"""\
from attncongruence import CACRLoss, {layout}exponential_warmup, regularize
{define}
weight = exponential_warmup(total_steps=5000)
regularize({", ".join(filter(None, arguments))}, weight=weight)"""
