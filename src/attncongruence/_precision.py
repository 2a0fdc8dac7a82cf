"""Half precision is computed in float32, also under autocast."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision in float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Autocast would run matrix products in half precision."""
    # A compiled graph cannot ask what is available; all that is compiled for has autocast.
    if torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def zeros(x: Tensor) -> Tensor:
    """`(batch,)` sums of nothing of a 4-D tensor: exactly 0, with a gradient of exactly 0."""
    return at_least_float32(x)[..., :0].sum((1, 2, 3))
