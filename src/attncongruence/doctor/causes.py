"""Why a layer gets no gradient: what was off when it ran, and from which module on."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

from attncongruence.capture.find import named_modules
from attncongruence.doctor.bench import Inputs, call
from attncongruence.doctor.choose import TroubleFound


@dataclass(frozen=True)
class Off:
    """Gradients were off when a layer ran."""

    module: str
    """The outermost module on the way to the layer that ran so."""
    reentrant: bool
    """Whether reentrant checkpointing was the reason."""


def gradients_off_at(model: nn.Module, batch: Inputs, layer: str) -> Off | None:
    """Where on the way to a layer gradients go off; None if they are on when it runs."""
    found: list[Off] = []
    path = [name for name in named_modules(model) if not name or f"{layer}.".startswith(f"{name}.")]

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: object) -> None:
            if not torch.is_grad_enabled() and not found:
                found.append(Off(name, _inside_reentrant_checkpoint()))

        return hook

    modules = named_modules(model)
    handles = [modules[name].register_forward_pre_hook(look(name)) for name in path]
    try:
        call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _inside_reentrant_checkpoint() -> bool:
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False


def no_gradient(model: nn.Module, layer: str, off: Off | None) -> TroubleFound:
    """The trouble with a layer that a loss cannot reach."""
    named = {name: p for name, p in model.named_parameters() if not layer or name.startswith(f"{layer}.")}
    frozen = [name for name, p in named.items() if not p.requires_grad]
    allowed = f"gradient from the scores of {layer or 'the model'} to at least one parameter"
    if off is not None and off.reentrant:
        return TroubleFound(
            f"{off.module} runs under reentrant checkpointing, which leaves no gradient to take.",
            allowed,
            "pass use_reentrant=False to torch.utils.checkpoint.checkpoint; in transformers: "
            "model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False}).",
        )
    if off is not None:
        return TroubleFound(
            f"{off.module or 'the model'} runs with gradients off (torch.no_grad or inference_mode in its forward).",
            allowed,
            "take the no_grad() away around it, or name an earlier layer with --layers.",
        )
    if frozen:
        return TroubleFound(
            f"nothing trains the scores of {layer or 'the model'}: frozen are {some(frozen)}, and all that comes "
            "before them.",
            allowed,
            f"unfreeze the layer, model.get_submodule({layer!r}).requires_grad_(True), or train something before it "
            "(LoRA on its queries or keys will do).",
        )
    return TroubleFound(
        f"the scores of {layer or 'the model'} have a gradient that reaches no parameter: the layer detaches its "
        "queries and keys, or the congruence loss of this batch has a gradient of exactly 0.",
        allowed,
        "take the detach() away, or try another batch.",
    )


def some(names: list[str], most: int = 6) -> str:
    """The first few of some names."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
