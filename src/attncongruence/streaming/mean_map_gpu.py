"""`mean_map` on a GPU: chunks of rows of the whole batch, and Triton kernels for all that concerns single heads.

The kernels turn queries and keys into rows of T, `(batch, rows, n)`, and the gradient of these rows into that of
queries and keys. Between them are a few batched products with T. Padding is given by lengths, without
synchronization.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attncongruence.streaming import map_grad_kernels, map_kernels
from attncongruence.streaming.tiles import FiveTensors, Target, Work, cache_bytes, divergence, divergence_grad


def forward(
    q: Tensor,
    k: Tensor,
    E: Tensor,
    F: Tensor,
    G: Tensor,
    lengths: Tensor,
    scale: float,
    target: Target,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """As `mean_map`, for the targets `"softmax"` and `"distributed"`."""
    R, loss = F.new_zeros(q.shape[0], E.shape[1], E.shape[1]), F.new_zeros(q.shape[0])
    lse, beyond = map_kernels.row_logsumexp(q, k, lengths, scale), _beyond(q, lengths)
    for start, stop in _chunks(q):
        T = map_kernels.mean_rows(q, k, lse, lengths, scale, start, stop)
        if E.numel():
            # R = E T E^T, a sum over rows of T
            R.baddbmm_(E[:, :, start:stop], torch.bmm(T, E.mT))
        if F.numel():
            x = torch.bmm(F[:, start:stop], G.mT)
            loss += divergence(x, T, _work(x), target, epsilon, beyond).sum(-1)
    return R, loss


def backward(
    q: Tensor,
    k: Tensor,
    E: Tensor,
    F: Tensor,
    G: Tensor,
    lengths: Tensor,
    dR: Tensor,
    dloss: Tensor,
    scale: float,
    target: Target,
    epsilon: float,
    with_dE: bool,
) -> FiveTensors:
    """Computes the chunks again, and from them the gradients of q, k, E, F, G."""
    dq, dk = (F.new_zeros(x.shape) for x in (q, k))
    dE, dF, dG = (F.new_zeros(x.shape) for x in (E, F, G))
    lse, beyond, weight = map_kernels.row_logsumexp(q, k, lengths, scale), _beyond(q, lengths), dloss[:, None, None]
    for start, stop in _chunks(q):
        T = map_kernels.mean_rows(q, k, lse, lengths, scale, start, stop)
        dT = torch.zeros_like(T)
        if F.numel():
            x = torch.bmm(F[:, start:stop], G.mT)
            dx, dT = divergence_grad(x, T, _work(x), target, epsilon, weight, beyond)
            dF[:, start:stop] = torch.bmm(dx, G)
            dG.baddbmm_(dx.mT, F[:, start:stop])
        if E.numel():
            # dT = E^T dR E
            dT.baddbmm_(torch.bmm(E[:, :, start:stop].mT, dR), E)
            if with_dE:
                # dE = dR E T^T + dR^T E T
                dE[:, :, start:stop] += torch.bmm(dR, torch.bmm(E, T.mT))
                dE.baddbmm_(torch.bmm(dR.mT, E[:, :, start:stop]), T)
        dq[:, :, start:stop], c = map_grad_kernels.mean_rows_grad_q(q, k, lse, lengths, scale, start, stop, dT)
        map_grad_kernels.mean_rows_grad_k(q, k, lse, lengths, scale, start, stop, dT, c, dk)
    return dq, dk, dE, dF, dG


def _chunks(q: Tensor) -> Iterator[tuple[int, int]]:
    """First and last row of each chunk: as many rows as the cache holds of one map."""
    n = q.shape[2]
    rows = max(1, cache_bytes(q.device) // (4 * q.shape[0] * n))
    return ((start, min(start + rows, n)) for start in range(0, n, rows))


def _beyond(q: Tensor, lengths: Tensor) -> Tensor:
    """`(batch, 1, n)`, True at columns beyond a sample's own."""
    return (torch.arange(q.shape[2], device=q.device) >= lengths[:, None])[:, None]


def _work(x: Tensor) -> Work:
    return torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
