"""A report for the terminal: plain ASCII, aligned, narrower than 100 columns."""

from __future__ import annotations

import textwrap
from itertools import groupby

from attncongruence.doctor.causes import some
from attncongruence.doctor.report import Attending, LossRow, Report
from attncongruence.doctor.where import kind_of

_WIDTH, _KEY, _NAME = 96, 13, 54
_MASKS = {
    "none": "none",
    "tokens": "of tokens (padding)",
    "causal": "causal, so of pairs",
    "pairs": "of pairs",
}


def as_text(report: Report) -> str:
    """All of a report, section by section; parts that could not be looked at are left out."""
    size = "" if report.batch_size is None else f", a batch of {report.batch_size}"
    parts = [f"{report.model}{size}, in training mode", _attention(report), _captured(report), _placed(report)]
    parts += [_losses(report), _gradient(report), _state(report), _code(report)]
    parts += [_block("notes", [_wrapped("-", note, 2) for note in report.notes])]
    for number, trouble in enumerate(report.troubles, 1):
        lines = [("came", trouble.came), ("allowed", trouble.allowed), ("do", trouble.remedy)]
        parts.append(_block(f"TROUBLE {number}", [_wrapped(key, value) for key, value in lines]))
    parts.append("All fine." if report.ok else f"Trouble: {len(report.troubles)}.")
    text = "\n\n".join(part for part in parts if part)
    return text.encode("ascii", "backslashreplace").decode()


def _block(title: str, lines: list[str]) -> str:
    return "\n".join([title.upper(), *lines]) if lines else ""


def _wrapped(key: str, value: str, width: int = _KEY) -> str:
    first = f"  {key:<{width - 1}} "
    return textwrap.fill(
        value, _WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False
    )


def _shape(one: Attending) -> tuple[str, str, int, int, int]:
    return kind_of(one.module), one.kind, one.heads, one.queries, one.keys


def _attention(report: Report) -> str:
    """What attended, in order; layers of one kind that follow each other on one line."""
    groups = [list(group) for _, group in groupby(report.attention, key=_shape)]
    lines = [
        f"  {_fitted(group):<{_NAME}} {one.kind:<5} {one.heads:>3} heads {one.queries:>5} x {one.keys:<5}"
        + (f" {len(group):>3} times" if len(group) > 1 else "")
        for group in groups
        for one in group[:1]
    ]
    if report.unseen:
        lines.append(_wrapped("not seen", some([f"{name} ({kind})" for name, kind in report.unseen.items()])))
    if report.default is not None:
        lines.append(_wrapped("default", f"{report.default or 'the model itself'}, the last self-attention that runs"))
    if report.layer is not None:
        which = "the default" if report.layer == report.default else report.layer
        lines.append(_wrapped("examined", which))
    return _block("attention, queries x keys", lines)


def _fitted(group: list[Attending]) -> str:
    """The name of some layers, in the width there is."""
    name = (group[0].module if len(group) == 1 else kind_of(group[0].module)) or "the model itself"
    return name if len(name) <= _NAME else f"...{name[3 - _NAME :]}"


def _captured(report: Report) -> str:
    found = report.captured
    if found is None:
        return ""
    batch, heads, queries, keys = found.shape
    offers = "yes" if found.offers_query_key else "no, scores alone: the model adds a bias, caps or shifts them"
    streaming = "yes, impl='streaming' is possible" if found.streaming else "no, the dense form"
    if found.offers_query_key and not found.streaming:
        streaming += ": a mask of pairs"
    mask = _MASKS[found.mask] + (f", {found.hidden:.0%} of all pairs hidden" if found.hidden else "")
    lines = [
        ("scores", f"batch {batch}, heads {heads}, queries {queries}, keys {keys}, from {found.dtype}"),
        ("q, k, scale", offers),
        ("streaming", streaming),
        ("mask", mask),
    ]
    if found.shifted:
        lines.append(("shifted", "by the row's maximum: PRINTED, which weighs with raw scores, means nothing here"))
    return _block("captured", [_wrapped(*line) for line in lines])


def _placed(report: Report) -> str:
    placed = report.placed
    if placed is None:
        return ""
    lines = [
        ("from", f"A GUESS: {placed.how}" if placed.guessed else placed.how),
        ("text tokens", _counts(placed.text)),
        ("image tokens", _counts(placed.image)),
        ("text sees", f"{placed.seen_by_text:.0%} of the image (LV)"),
        ("image sees", f"{placed.seen_by_image:.0%} of the text (VL)"),
        ("confirmed", _CONFIRMED[placed.confirmed]),
    ]
    return _block("text and image", [_wrapped(*line) for line in lines])


_CONFIRMED = {
    True: "yes: with other pictures no position called text changes",
    False: "no",
    None: "not possible here: run with other pictures, no position of this kind of layer changes, or all do",
}


def _counts(counts: list[int]) -> str:
    return some([str(count) for count in counts], 16) + " in each sample"


def _losses(report: Report) -> str:
    if not report.losses:
        return ""
    lines = [f"  {'nats':<25}{'language':>12}{'vision':>12}{'both':>12}"]
    for row in report.losses:
        lines.append(f"  {row.name:<25}" + "".join(f"{_number(value):>12}" for value in _values(row)))
    for why in dict.fromkeys(row.why for row in report.losses if row.why):
        lines.append(_wrapped("-", why, 2))
    return _block("loss", lines)


def _values(row: LossRow) -> tuple[float | None, ...]:
    return row.language, row.vision, row.both


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _gradient(report: Report) -> str:
    found = report.gradient
    if found is None:
        return ""
    start = f"{report.layer}."
    lines = [
        (key, some([name.removeprefix(start) for name in names], 12))
        for key, names in (("reached", found.reached), ("untouched", found.untouched), ("frozen", found.frozen))
        if names
    ]
    lines.append(("before it", f"{found.elsewhere} parameters of other modules"))
    return _block(f"gradient of the loss alone, {report.direction}", [_wrapped(*line) for line in lines])


def _state(report: Report) -> str:
    lines = []
    if report.unchanged is not None:
        lines.append(("outputs", "bitwise unchanged by capture" if report.unchanged else "changed by capture"))
    if report.overhead is not None:
        cost = report.overhead
        lines.append(
            (
                "overhead",
                f"a step takes {cost.median:.2f} times as long (quartiles {cost.lower_quartile:.2f} to "
                f"{cost.upper_quartile:.2f}, {cost.rounds} rounds)",
            )
        )
    if report.restored:
        lines.append(("left", "as found: mode, gradients, buffers, no hook"))
    return _block("the model", [_wrapped(*line) for line in lines])


def _code(report: Report) -> str:
    if report.snippet is None:
        return ""
    line = report.one_line or "# regularize adds to the loss that a model returns: this one returned none."
    return f"WRITE IN THE TRAINING LOOP\n\n{report.snippet}\n\nOR, FOR A TRAINER THAT CAN'T BE EDITED\n\n{line}"
