"""m-KL, the symmetric divergence of two attention maps (CACR, Eq. 4)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attncongruence._typing import Reduction, at_least_float32, checked, one_of, same_device


@checked
def symmetric_kl(
    a: Float[Tensor, "*rows columns"],
    b: Float[Tensor, "*rows columns"],
    mask: Bool[Tensor, "*#rows #columns"] | None = None,
    *,
    reduction: Reduction = "none",
) -> Float[Tensor, "..."]:
    r"""Symmetric (Jeffreys) KL divergence of two sets of logits, row by row: m-KL, Eq. 4.

    With `P = softmax(a)` and `T = softmax(b)`,

        KL(P || T) + KL(T || P) = sum_j (P_j - T_j) (log P_j - log T_j)

    No term is negative, none takes the log of a probability, and so the value and its gradient are finite wherever
    the logits are, also where a probability underflows to exactly 0.

    Args:
        a: logits `(..., columns)` of any size up to half of the largest finite number (leave -inf to the mask); half
            precision is computed in float32.
        b: logits of the same shape.
        mask: bool, broadcastable to the logits; False entries are left out of both softmaxes and of the sum. A row
            with no entry left has divergence 0.
        reduction: `"none"` (one value a row), `"sum"` or `"mean"` over all rows, rows with no entry left included;
            0 for no rows at all.

    Returns:
        Divergence in nats, >= 0: shape `(...)` for `"none"`, a scalar otherwise. 0 if and only if P = T.

    Raises:
        ValueError: shapes that differ, integer logits, an unknown reduction, tensors on several devices.

    Source:
        CACR (Pandey et al., ACL 2023), Eq. 4.

    Example:
        P = (1/4, 3/4) against T = (1/2, 1/2): (-1/4) log(1/2) + (1/4) log(3/2) = log(3) / 4.

        >>> symmetric_kl(torch.tensor([0.0, 1.0986123]), torch.zeros(2))
        tensor(0.2747)
    """
    one_of("reduction", reduction, ("none", "sum", "mean"))
    same_device(a=a, b=b, mask=mask)
    rows = m_kl(at_least_float32(a), at_least_float32(b), mask)
    if reduction == "none":
        return rows
    return rows.mean() if reduction == "mean" and rows.numel() else rows.sum()


def m_kl(a: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
    """`symmetric_kl` of each row, without checks: Eq. 4."""
    if mask is not None:
        # Finite, so that a row with nothing left gives no NaN, and so low that both softmaxes are 0 there and both
        # logarithms the same: the terms of entries that are left out are 0 (0 - 0).
        floor = torch.finfo(a.dtype).min / 2
        a, b = a.masked_fill(~mask, floor), b.masked_fill(~mask, floor)
    log_p, log_t = a.log_softmax(-1), b.log_softmax(-1)
    # Eq. 4: (P_j - T_j) (log P_j - log T_j)
    return ((log_p.exp() - log_t.exp()) * (log_p - log_t)).sum(-1)


def distributed_kl(P: Tensor, T: Tensor, epsilon: float) -> Tensor:
    """IAIS's divergence of two maps of probabilities, row by row, both directions, epsilon in the second logarithm."""
    # sum_j P_j log(P_j / (T_j + eps)) + T_j log(T_j / (P_j + eps))
    # The floor keeps the gradient of P log P finite at P = 0.
    log_P, log_T = (x.clamp_min(torch.finfo(x.dtype).tiny).log() for x in (P, T))
    return (P * (log_P - (T + epsilon).log()) + T * (log_T - (P + epsilon).log())).sum(-1)


def distributed_kl_grad(P: Tensor, T: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Gradient of each row of `distributed_kl` with respect to P and to T."""

    def of(x: Tensor, other: Tensor) -> Tensor:
        # log P + 1 - log(T + eps) - T / (P + eps)
        tiny = torch.finfo(x.dtype).tiny
        return x.clamp_min(tiny).log() + (x >= tiny) - (other + epsilon).log() - other / (x + epsilon)

    return of(P, T), of(T, P)
