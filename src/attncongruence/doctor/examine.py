"""examine: looks at a model as a training step would, and says what the congruence loss finds there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from attncongruence._typing import Direction, one_of
from attncongruence.capture import CapturedAttention, capture_attention, find_attention
from attncongruence.capture.session import unwrapped
from attncongruence.doctor import bench, causes, choose, measure, snippet, where
from attncongruence.doctor.bench import Inputs
from attncongruence.doctor.choose import Chosen, Layer, TroubleFound
from attncongruence.doctor.report import Attending, Report, Trouble
from attncongruence.doctor.where import Given


def examine(
    model: nn.Module,
    batch: Inputs,
    n_text: Given | None = None,
    *,
    layers: Layer = -1,
    direction: Direction | None = None,
    rounds: int = 7,
) -> Report:
    """Examines a model with one batch: what is captured, where text is, what the loss is, trains and costs.

    The model runs some ten times and twice a round, in training mode with gradients on and always under one seed. It is
    left as it was found: modes, gradients, buffers, hooks, random numbers.

    Args:
        model: as the training loop calls it; examined without a wrapper of `torch.compile` or DDP.
        batch: a mapping of keyword arguments, or a tuple of positional ones.
        n_text: where text and image are: an int, a `(batch,)` tensor, a `TokenLayout`, or a function of the batch that
            returns one of these, with a parameter `captured` if it wants the record. None: guessed, and the report says
            how.
        layers: one self-attention, as in `capture_attention`. At -1 the last one that the layout fits.
        direction: of the loss in gradient, overhead and snippets. None: `"both"` where all image tokens may look at all
            text, else `"language"`.
        rounds: of timing, >= 1.

    Returns:
        A `Report`. What is wrong with the model is among its `troubles`.

    Raises:
        TypeError: a model or a batch of another type.
        ValueError: an unknown direction, no such layer, no round.

    Example:
        >>> from attncongruence.doctor import examine
        >>> encoder = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> report = examine(encoder, (torch.randn(3, 5, 8),), n_text=2)
        >>> report.ok, report.layer, report.captured.shape
        (True, 'self_attn', (3, 2, 5, 5))
    """
    _check(model, batch, direction, rounds)
    inner = unwrapped(model)
    report = Report(type(inner).__name__)
    if inner is not model:
        report.notes.append(
            f"Examined without its {type(model).__name__}. Call capture_attention before the first compiled run."
        )
    try:
        capture_attention(inner).close()
    except RuntimeError as error:  # torch.nn.DataParallel
        report.troubles.append(Trouble(str(error), "a model on one device", "examine model.module."))
        return report
    with bench.as_found(inner, batch) as intact:
        try:
            _examine(inner, batch, report, n_text, layers, direction, rounds)
        except TroubleFound as found:
            report.troubles.append(found.trouble)
    report.restored = intact()
    if not report.restored:
        came = "the model's own forward pass changed its modes or buffers for good"
        report.troubles.append(Trouble(came, "a forward pass that can be repeated", "look at what it changes."))
    return report


def _check(model: object, batch: object, direction: str | None, rounds: int) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}: it must be a torch.nn.Module")
    if not isinstance(batch, Mapping | tuple):
        raise TypeError(
            f"batch is of type {type(batch).__name__}: it must be a mapping of keyword arguments or a tuple of "
            "positional ones. Put a lone tensor into a tuple: (tensor,)"
        )
    if direction is not None:
        one_of("direction", direction, ("both", "language", "vision"))
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be >= 1")


def _raised(error: Exception) -> TroubleFound:
    return TroubleFound(
        f"the model raised {type(error).__name__}: {error}",
        "a model and a batch that make a training step",
        "check both where the factory makes them: shapes, devices, labels.",
    )


def _examine(
    model: nn.Module,
    batch: Inputs,
    report: Report,
    said: Given | None,
    layers: Layer,
    direction: Direction | None,
    rounds: int,
) -> None:
    try:
        plain, again = bench.call(model, batch), bench.call(model, batch)
        log = bench.watched(model, batch)
    except Exception as error:  # whatever a stranger's model raises is to be told
        raise _raised(error) from error
    report.attention = [_attending(name, seen) for name, seen in log]
    report.unseen = {
        name: kind
        for name, kind in find_attention(model).items()
        if not any(not name or choose.within(ran, name) or choose.within(name, ran) for ran, _ in log)
    }
    those = choose.candidates(model, log, layers)
    _take(report, those[0])
    report.default = choose.candidates(model, log, -1)[0].record.layer
    chosen = choose.place(model, batch, log, those, said)
    _take(report, chosen.candidate)
    report.placed = chosen.placed
    if layers == -1 and report.layer != report.default:
        report.notes.append(
            f"capture_attention(model) would take {report.default}, whose sequence is not that of text and image: "
            "name the layer, as the snippets do."
        )
    report.losses = measure.losses(chosen.candidate.record, chosen.answer.value)
    _compare(model, batch, report, plain, again)
    report.direction = way = _direction(report, direction)
    _train(model, batch, report, chosen, way, rounds)
    parts = batch, list(where.named(model, batch)), plain, chosen.candidate.layers, chosen.answer, way
    report.snippet, report.one_line = snippet.loop(*parts), snippet.one_line(*parts[2:])


def _attending(name: str, seen: Any) -> Attending:
    cross = seen.cross or seen.lengths[0] != seen.lengths[1]
    return Attending(name, "cross" if cross else "self", CapturedAttention(name, seen).heads, *seen.lengths)


def _take(report: Report, candidate: choose.Candidate) -> None:
    record = candidate.record
    report.layer, report.batch_size = record.layer, record.batch_size
    report.captured = measure.captured(record)


def _compare(model: nn.Module, batch: Inputs, report: Report, plain: Any, again: Any) -> None:
    if not bench.same(plain, again):
        report.notes.append("The model does not repeat itself under one seed, so its outputs can't be compared.")
        return
    assert report.layer is not None
    with capture_attention(model, report.layer, analysis=True):
        report.unchanged = bench.same(plain, bench.call(model, batch))
    if not report.unchanged:
        raise TroubleFound("the output changes when the layer is captured", "the same output", "report this model.")


def _direction(report: Report, wanted: Direction | None) -> Direction:
    """What was asked for, or both sides where the model shows both all of the other."""
    released, placed = report.losses[0], report.placed
    assert placed is not None
    way: Direction = "both" if placed.seen_by_image == placed.seen_by_text == 1 else "language"
    if wanted is None and way == "language" and released.language is None:
        way = "vision"
    way = wanted or way
    if getattr(released, way) is None:
        raise TroubleFound(f"direction={way!r} is not defined here", "a direction that is", released.why)
    if wanted is None and way == "language" and released.vision is not None:
        report.notes.append(
            f"Image tokens see {placed.seen_by_image:.0%} of the text: vision is defined and means little, so the "
            "snippets take language alone."
        )
    return way


def _train(model: nn.Module, batch: Inputs, report: Report, chosen: Chosen, way: Direction, rounds: int) -> None:
    """What the loss alone trains, and what a step with it costs."""
    layer, number = chosen.candidate.record.layer, chosen.candidate.number
    step = measure.Step(model, batch, layer, number, chosen.answer.value, way)
    report.gradient = step.gradient()
    if report.gradient is None or not (report.gradient.reached or report.gradient.elsewhere):
        raise causes.no_gradient(model, layer, causes.gradients_off_at(model, batch, layer))
    if report.gradient.frozen and not report.gradient.reached:
        report.notes.append(f"{layer} is frozen: the loss trains {report.gradient.elsewhere} parameters before it.")
    report.overhead = step.overhead(rounds)
