"""What Python's call stack alone tells: who called."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from attncongruence import _compat


def calls_around(module: nn.Module) -> list[object] | None:
    """The modules in whose forward this call of `module` was made, innermost first; from a hook of `module`.

    An interrupt (KeyboardInterrupt, SystemExit, GeneratorExit) skips the hooks after forward, so that only Python's
    stack tells a pass that was cut short from one that goes on and has called its module again. Gone: None, and each
    pass counts as cut short when its module is called again, so that only the inner one is recorded.
    """
    calls, frame = [], sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == _compat.FORWARD and "self" in frame.f_locals:
            calls.append(frame.f_locals["self"])
        frame = frame.f_back  # type: ignore[assignment]
    return calls[1:] if calls and calls[0] is module else None


def in_function() -> bool:
    """Whether the forward of a `torch.autograd.Function` runs, as in reentrant checkpointing, which runs layers there.

    Gradients are off in there, but what runs has a backward pass. Gone (no frames): False.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_varnames[:1] not in ((), ("self",)):
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, torch.autograd.function.FunctionCtx):
                return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def trainer_of(callback: object) -> Any:
    """The trainer that calls a callback right now: of all objects on the call stack, the one that has it among its own.

    Trainer passes the model to its callbacks, and not itself. Gone: None, and the callback refuses to train.
    """
    frame = sys._getframe()
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        owner = frame.f_locals.get("self")
        callbacks = getattr(getattr(owner, "callback_handler", None), "callbacks", ())
        if any(one is callback for one in callbacks):
            return owner
    return None
