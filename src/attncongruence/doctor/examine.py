"""examine: runs a model as a training step would, and reports what the congruence loss finds there."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from attncongruence import _compat
from attncongruence._typing import Direction, one_of
from attncongruence.capture import CapturedAttention, capture_attention, find_attention
from attncongruence.capture.find import crosses
from attncongruence.doctor import measure
from attncongruence.doctor.choose import Layer, candidates, choose
from attncongruence.doctor.origins import trace
from attncongruence.doctor.report import (
    AttentionCall,
    Problem,
    ProblemFound,
    Report,
    kind_of,
    listing,
    suggest_code,
    within,
)
from attncongruence.training.term import NTextOrFunction, batch_of


def examine(
    model: nn.Module,
    batch: measure.Inputs,
    n_text: NTextOrFunction | None = None,
    *,
    layers: Layer = -1,
    direction: Direction | None = None,
    rounds: int = 7,
) -> Report:
    """Examines a model with one batch: what is captured, where text and image are, the loss, its gradient and cost.

    The model runs about ten times and twice per round, in training mode with gradients on and under one seed. It is
    left as it was found: modes, gradients, buffers, hooks, random numbers.

    Args:
        model: as the training loop calls it; examined without a wrapper of `torch.compile` or DDP.
        batch: a mapping of keyword arguments, or a tuple of positional ones.
        n_text: where text and image are: an int, a `(batch,)` integer tensor, a `TokenLayout`, or a function of
            `(batch, captured)` that returns one of these; `batch` is a mapping by parameter name. None: guessed, and
            the report says how.
        layers: one self-attention, as in `capture_attention`. At -1 the last one that `n_text` fits.
        direction: of the loss in gradient, overhead and code. None: `"both"` where all image tokens may attend to all
            text, else `"language"`.
        rounds: number of timed rounds, >= 1.

    Returns:
        A `Report`. What is wrong with the model is among its `problems`.

    Raises:
        ValueError: a model or a batch of another type, an unknown direction, no such layer, no round.

    Example:
        >>> from attncongruence.doctor import examine
        >>> encoder = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> report = examine(encoder, (torch.randn(3, 5, 8),), n_text=2)
        >>> report.ok, report.layer, report.captured.shape
        (True, 'self_attn', (3, 2, 5, 5))
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is of type {type(model).__name__}: it must be a torch.nn.Module")
    if not isinstance(batch, Mapping | tuple):
        raise ValueError(
            f"batch is of type {type(batch).__name__}: it must be a mapping of keyword arguments or a tuple of "
            "positional ones. Put a lone tensor into a tuple: (tensor,)"
        )
    if direction is not None:
        one_of("direction", direction, ("both", "language", "vision"))
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be >= 1")
    inner = _compat.unwrapped(model)
    report = Report(type(inner).__name__)
    if inner is not model:
        note = f"Examined without its {type(model).__name__}. Call capture_attention before the first compiled run."
        report.notes.append(note)
    hooks = measure.hooks(inner)
    with measure.as_found(inner, batch):
        try:
            _examine(inner, batch, report, n_text, layers, direction, rounds)
        except ProblemFound as found:
            report.problems.append(Problem(*found.args))
    report.restored = measure.hooks(inner) == hooks
    if not report.restored:
        report.problems.append(Problem("hooks are left on the model", "a model without them", "report this model."))
    return report


def _examine(
    model: nn.Module,
    inputs: measure.Inputs,
    report: Report,
    n_text: NTextOrFunction | None,
    layers: Layer,
    direction: Direction | None,
    rounds: int,
) -> None:
    try:
        capture_attention(model).close()  # raises for torch.nn.DataParallel
        plain, again = measure.call(model, inputs), measure.call(model, inputs)
        log, _ = measure.attention_of(model, inputs)
    except Exception as error:  # whatever the model raises
        came = f"the model raised {type(error).__name__}: {error}"
        remedy = "check both where the factory makes them: shapes, devices, labels."
        if isinstance(model, nn.DataParallel):
            remedy = "examine model.module."
        raise ProblemFound(came, "a model and a batch that make a training step", remedy) from error
    records = [CapturedAttention(*entry) for entry in log]
    for (name, seen), record in zip(log, records, strict=True):
        kind = "cross" if crosses(seen) else "self"
        report.attention.append(AttentionCall(name, kind, record.heads, *seen.lengths))
    for name, kind in find_attention(model).items():
        if not any(within(ran, name) or within(name, ran) for ran, _ in log):
            report.unseen[name] = kind
    origins, counted = trace(model, inputs, log), measure.in_training(records)
    if len(counted) < len(log):
        origins.entries = [origin for n, origin in enumerate(origins.entries) if n in counted]
        report.notes.append(
            f"{len(log) - len(counted)} of {len(log)} attention operations run in an inner pass with gradients off "
            f"({listing(dict.fromkeys(kind_of(records[n].layer) for n in range(len(log)) if n not in counted))}): the "
            "loss does not see those."
        )
        log = [log[n] for n in counted]
    found = candidates(model, log, layers)
    _add_layer(report, found[0].record)
    report.default = candidates(model, log, -1)[0].record.layer
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    batch = batch_of(model.forward, args, kwargs)
    chosen, proposal, report.placed = choose(model, batch, log, origins, found, n_text)
    _add_layer(report, chosen.record)
    if layers == -1 and report.layer != report.default:
        report.notes.append(
            f"capture_attention(model) takes {report.default}, whose sequence is not that of text and image: name the "
            "layer, as the code below does."
        )
    report.losses = measure.losses(chosen.record, proposal.n_text)

    if measure.same(plain, again):
        with capture_attention(model, chosen.record.layer, analysis=True):
            report.unchanged = measure.same(plain, measure.call(model, inputs))
        if not report.unchanged:
            raise ProblemFound("the output changes when the layer is captured", "the same output", "report this model.")
    else:
        report.notes.append("The model does not repeat itself under one seed, so its outputs cannot be compared.")

    report.direction = way = _direction(report, direction)
    step = measure.Step(model, inputs, chosen.record.layer, chosen.number, proposal.n_text, way)
    report.gradient = gradient = step.gradient()
    if gradient.frozen and not gradient.reached:
        report.notes.append(f"{report.layer} is frozen: the loss trains {gradient.elsewhere} parameters before it.")
    report.overhead = step.overhead(rounds)
    suggest_code(report, list(batch), inputs, plain, proposal.code, chosen.code)


def _add_layer(report: Report, record: CapturedAttention) -> None:
    report.layer, report.batch_size, report.captured = record.layer, record.batch_size, measure.captured(record)


def _direction(report: Report, wanted: Direction | None) -> Direction:
    """The direction that was asked for; else both, or one where text and image do not see all of each other."""
    released, placed = report.losses[0], report.placed
    assert placed is not None
    all_pairs = placed.seen_by_image == placed.seen_by_text == 1
    way = wanted or ("both" if all_pairs else "vision" if released.language is None else "language")
    if getattr(released, way) is None:
        raise ProblemFound(f"direction={way!r} is not defined here", "a direction that is defined", released.why)
    if wanted is None and way == "language" and released.vision is not None:
        report.notes.append(
            f"Image tokens see {placed.seen_by_image:.0%} of the text: vision is defined but means little, so the "
            "code below uses language alone."
        )
    return way
