"""Before anything is timed: the streaming form's value and gradient against the dense form in float64."""

from __future__ import annotations

import secrets
from typing import Any

import torch
from torch import Tensor

from benchmarks.forms import LOSSES, Plan, Size, inputs, loss_from

SIZES = (Size("small", 13, 37, 2), Size("odd", 67, 129, 1))
# Relative to the norm of the exact ones. Half precision rounds each entry of the gradient to 1 in 256.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def measure(plan: Plan, seed: int | None = None) -> dict[str, Any]:
    """Relative errors on fresh inputs, the dense form's own in the same precision beside them."""
    seed = secrets.randbelow(2**31) if seed is None else seed
    rows = []
    for size in SIZES:
        q, k, _ = inputs(plan, size, seed)
        for name in LOSSES:
            on_cpu = [x.detach().cpu().double().requires_grad_() for x in (q, k)]
            exact = _value_and_gradient(name, size, "dense", *on_cpu)
            row: dict[str, Any] = {"loss": name, "n_text": size.n_text, "n_image": size.n_image, "batch": size.batch}
            for impl in ("streaming", "dense"):
                found = _value_and_gradient(name, size, impl, q, k)
                row[impl] = {
                    what: float((a - b).norm() / b.norm())
                    for what, a, b in zip(("value", "gradient"), found, exact, strict=True)
                }
            rows.append(row)
    return {"seed": seed, "limit": LIMITS[plan.dtype], "heads": plan.heads, "width": plan.width, "rows": rows}


def refuse_if_off(measured: dict[str, Any]) -> None:
    """Nothing is timed that is off by more than the limit, and by more than three times as much as the dense form."""
    for row in measured["rows"]:
        if not all(error <= max(measured["limit"], 3 * row["dense"][what]) for what, error in row["streaming"].items()):
            raise SystemExit(
                f"not timed: streaming is off from the float64 dense form by more than {measured['limit']:.0e}, "
                f"seed {measured['seed']}: {row}"
            )


def _value_and_gradient(name: str, size: Size, impl: str, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """In float64 on CPU, the gradient of queries and keys as one."""
    value = loss_from(name, size.n_text, impl)(q, k)
    gradient = torch.cat(torch.autograd.grad(value, (q, k)))
    return value.detach().cpu().double(), gradient.cpu().double()
