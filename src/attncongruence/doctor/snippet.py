"""What to write in a training loop, for one model: code that runs as it is printed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attncongruence._typing import Direction
from attncongruence.doctor.bench import Inputs
from attncongruence.doctor.where import Answer
from attncongruence.training.outputs import loss_in

_WEIGHT = "weight = exponential_warmup(total_steps=5000)"


def loop(batch: Inputs, names: list[str], output: Any, layers: str, answer: Answer, direction: Direction) -> str:
    """The loop, with `model`, `loader` and `optimizer` as the user has them."""
    keywords = isinstance(batch, Mapping)
    captured = "capture.pop()"
    record = []
    if answer.wants_record:
        captured, record = "captured", ["captured = capture.pop()"]
    inputs, mapping = [], "batch"
    if isinstance(batch, tuple) and isinstance(batch[0], Mapping):
        mapping = "batch[0]"
    elif not keywords and not _is_number(answer):
        inputs, mapping = [f"inputs = dict(zip({tuple(names)!r}, batch))"], "inputs"
    where = _where(answer, mapping)
    way = "" if direction == "both" else f', direction="{direction}"'
    body = [
        *inputs,
        f"out = model({'**' if keywords else '*'}batch)",
        f"main = {_main(output)}",
        *record,
        f"congruence = cacr_loss({captured}, {where}{way})",
        "loss = main + weight(step) * congruence",
        "loss.backward()",
        "optimizer.step()",
        "optimizer.zero_grad()",
    ]
    return "\n".join(
        [
            *_imports(answer, "cacr_loss", "capture_attention", "exponential_warmup"),
            *_define(answer),
            f"capture = capture_attention(model{layers and ', ' + layers})",
            _WEIGHT,
            "for step, batch in enumerate(loader):",
            *("    " + line for line in body),
            "capture.close()",
        ]
    )


def one_line(output: Any, layers: str, answer: Answer, direction: Direction) -> str | None:
    """The same for a trainer that cannot be edited; None where the model returns no loss to add to."""
    if loss_in(output) is None:
        return None
    loss = "CACRLoss()" if direction == "both" else f'CACRLoss(direction="{direction}")'
    where = f"n_text={answer.code}" if _is_number(answer) else "layout=where"
    arguments = ["model", loss, where, *([f"layers={layers}"] if layers else []), "weight=weight"]
    line = f"regularize({', '.join(arguments)})"
    if len(line) > 96:
        line = "\n".join(["regularize(", *(f"    {argument}," for argument in arguments), ")"])
    return "\n".join(
        [
            *_imports(answer, "CACRLoss", "exponential_warmup", "regularize"),
            *_define(answer),
            _WEIGHT,
            line,
        ]
    )


def _is_number(answer: Answer) -> bool:
    return answer.code.isdecimal()


def _where(answer: Answer, mapping: str) -> str:
    if _is_number(answer):
        return f"n_text={answer.code}"
    return f"where({mapping}, captured)" if answer.wants_record else f"where({mapping})"


def _imports(answer: Answer, *names: str) -> list[str]:
    layout = ["TokenLayout"] if answer.code.startswith("TokenLayout") else []
    lines = [f"from attncongruence import {', '.join(sorted([*names, *layout]))}"]
    if answer.code.startswith("token_layout"):
        lines.append("from attncongruence.integrations.huggingface import token_layout")
    return [*lines, ""]


def _define(answer: Answer) -> list[str]:
    if _is_number(answer):
        return []
    if not answer.code:
        return ["# where: your function of the batch, the third that doctor was given", ""]
    arguments = "batch, captured" if answer.wants_record else "batch"
    return ["", f"def where({arguments}):", f"    return {answer.code}", "", ""]


def _main(output: Any) -> str:
    if loss_in(output) is None:
        return "main_loss(out)  # yours"
    if isinstance(output, Tensor):
        return "out"
    if hasattr(output, "loss"):
        return "out.loss"
    return 'out["loss"]' if isinstance(output, Mapping) else "out[0]"
