"""What the losses need of the head-mean map of one modality, T = mean_h softmax(scale q_h k_h^T), without building it.

One pass over tiles of its rows gives both: the map seen through E, `R = E T E^T`, and its row divergences from a map of
low rank, `F G^T`. Backward computes the tiles again. A tile holds some rows of all heads, so memory is O(heads M).
On a GPU, Triton kernels do all that concerns single heads; padding is then given by lengths, without synchronization.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attncongruence._compat import log_softmax_grad, softmax_grad
from attncongruence._typing import at_least_float32, no_autocast
from attncongruence.streaming.operators import (
    Target,
    Tiles,
    batched,
    differentiable,
    divergence,
    divergence_grad,
    groups,
    has_kernels,
)

if TYPE_CHECKING:
    from attncongruence.streaming.map_kernels import KernelRows


def mean_map(
    q: Tensor, k: Tensor, E: Tensor | None, F: Tensor | None, G: Tensor | None, lengths: Tensor, scale: float,
    target: Target = "softmax", epsilon: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`E T E^T`, and the divergences of the rows of `F G^T` from those of T, summed.

    Args:
        q, k: `(batch, heads, n, width)`; zero beyond a sample's length.
        E: `(batch, N, n)`, or None: no projection; zero beyond a sample's length.
        F, G: `(batch, n, rank)`, or None: no divergence; likewise.
        lengths: `(batch,)`: how many of the n rows and columns are a sample's own.
        scale: factor of `q k^T`.
        target: how T enters the divergence.
        epsilon: of the distributed formula.

    Returns:
        `(batch, N, N)`, and `(batch,)` in nats; empty where not asked for.
    """
    empty = at_least_float32(q).new_zeros(q.shape[0], 0, 0)
    if E is None and F is None:
        return empty, empty.sum((1, 2))
    E, F, G = (empty if x is None else x for x in (E, F, G))
    R, loss = _mean_map(q, k, E, F, G, lengths, scale, target, epsilon)
    return R, loss


class Rows:
    """Tiles of rows of T, and their gradient with respect to q and k; for samples of one length.

    Args:
        q, k: `(samples, heads, n, width)`.
        scale: factor of `q k^T`.
        log: compute log T instead, finite also where T underflows.
    """

    beyond = None

    def __init__(self, q: Tensor, k: Tensor, scale: float, log: bool) -> None:
        # Heads in front: one tile of one head after the other stays in the cache.
        self.q, self.k = (at_least_float32(x).transpose(0, 1).contiguous() for x in (q, k))
        self.scale, self.log, self.heads, self.n = scale, log, q.shape[1], q.shape[2]
        self.tiles = Tiles(q.shape[0], self.n, self.heads + 5, self.q)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Slices of samples and of rows, one pair for each tile."""
        return iter(self.tiles)

    def map(self, maps: slice, rows: slice) -> tuple[list[Tensor], Tensor]:
        """The softmaxes of all heads and four more tiles to work with, and a tile of T or log T."""
        *of_heads, x, T, y, P, Q = self.tiles.buffers(maps, rows)
        for head, own in enumerate(of_heads):
            torch.baddbmm(x, self.q[head, maps, rows], self.k[head, maps].mT, beta=0, alpha=self.scale, out=x)
            if self.log:
                torch.log_softmax(x, -1, out=own)
                torch.logaddexp(T, own, out=T) if head else T.copy_(own)
            else:
                torch.softmax(x, -1, out=own)
                T.add_(own) if head else T.copy_(own)
        # T = mean_h softmax(scale q_h k_h^T)
        T.sub_(math.log(self.heads)) if self.log else T.div_(self.heads)
        return [*of_heads, x, y, P, Q], T

    def grad(
        self, maps: slice, rows: slice, tiles: list[Tensor], T: Tensor, dT: Tensor, dq: Tensor, dk: Tensor
    ) -> None:
        """Write the gradient of rows of T or log T to the same rows of dq, and add it to dk; both in q's shape."""
        *of_heads, x = tiles
        dT.div_(self.heads)
        for head, own in enumerate(of_heads):
            if self.log:
                # d log P_h = d log T * P_h / (heads T); then the softmax, as a log-softmax
                torch.sub(own, T, out=x).exp_().mul_(dT)
                ds = log_softmax_grad(x, own)
            else:
                ds = softmax_grad(dT, own, out=x)
            to_q = dq[maps, head, rows]
            torch.baddbmm(to_q, ds, self.k[head, maps], beta=0, alpha=self.scale, out=to_q)
            dk[maps, head].baddbmm_(ds.mT, self.q[head, maps, rows], alpha=self.scale)


def _passes(
    q: Tensor, k: Tensor, lengths: Tensor, scale: float, target: Target
) -> Iterator[tuple[slice, Rows | KernelRows]]:
    """The whole batch for the kernels, which know no log T; else each run of samples of one length."""
    if target != "log" and has_kernels(q, k):
        from attncongruence.streaming.map_kernels import KernelRows

        yield slice(0, q.shape[0]), KernelRows(q, k, lengths, scale)
        return
    for samples, n in groups(lengths, q.shape[2]):
        yield samples, Rows(q[samples, :, :n], k[samples, :, :n], scale, target == "log")


@torch.library.custom_op(
    "attncongruence::mean_map",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor E, Tensor F, Tensor G, Tensor lengths, float scale, str target, float epsilon)"
    " -> (Tensor, Tensor)",
)
def _forward(
    q: Tensor, k: Tensor, E: Tensor, F: Tensor, G: Tensor, lengths: Tensor, scale: float, target: Target, epsilon: float
) -> tuple[Tensor, Tensor]:
    R, loss = F.new_zeros(q.shape[0], E.shape[1], E.shape[1]), F.new_zeros(q.shape[0])
    for samples, tiles in _passes(q, k, lengths, scale, target):
        e, f, g = E[samples, :, : tiles.n], F[samples, : tiles.n], G[samples, : tiles.n]
        for maps, row in tiles:
            (*_, x, y, P, Q), T = tiles.map(maps, row)
            if E.numel():
                # R = E T E^T, a sum over rows of T
                R[samples][maps].baddbmm_(e[maps, :, row], torch.bmm(T.exp() if tiles.log else T, e[maps].mT))
            if F.numel():
                torch.bmm(f[maps, row], g[maps].mT, out=x)
                loss[samples][maps] += divergence(x, T, (y, P, Q), target, epsilon, tiles.beyond).sum(-1)
    return R, loss


@_forward.register_fake
def _(q: Tensor, k: Tensor, E: Tensor, F: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return F.new_empty(q.shape[0], E.shape[1], E.shape[1]), F.new_empty(q.shape[0])


@torch.library.custom_op(
    "attncongruence::mean_map_grad",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor E, Tensor F, Tensor G, Tensor lengths, Tensor dR, Tensor dloss, float scale,"
    " str target, float epsilon, bool with_dE) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    q: Tensor, k: Tensor, E: Tensor, F: Tensor, G: Tensor, lengths: Tensor, dR: Tensor, dloss: Tensor,
    scale: float, target: Target, epsilon: float, with_dE: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    dq, dk, dE, dF, dG = (F.new_zeros(x.shape) for x in (q, k, E, F, G))
    for samples, tiles in _passes(q, k, lengths, scale, target):
        to_q, to_k, e, de = (x[samples, :, : tiles.n] for x in (dq, dk, E, dE))
        f, g, df, dg = (x[samples, : tiles.n] for x in (F, G, dF, dG))
        for maps, row in tiles:
            (*of_heads, x, y, P, Q), T = tiles.map(maps, row)
            dT = Q.zero_()
            if F.numel():
                torch.bmm(f[maps, row], g[maps].mT, out=x)
                weight = dloss[samples][maps, None, None]
                dx, dT = divergence_grad(x, T, (y, P, Q), target, epsilon, tiles.beyond, weight)
                df[maps, row] = torch.bmm(dx, g[maps])
                dg[maps].baddbmm_(dx.mT, f[maps, row])
            if E.numel():
                # dT = E^T dR E
                own, whole, d = e[maps, :, row], e[maps], dR[samples][maps]
                left = torch.bmm(own.mT, d)
                if tiles.log:
                    dT.addcmul_(torch.bmm(left, whole, out=x), torch.exp(T, out=y))
                else:
                    dT.baddbmm_(left, whole)
                if with_dE:
                    # dE = dR E T^T + dR^T E T
                    linear = y if tiles.log else T
                    de[maps, :, row] += torch.bmm(d, torch.bmm(whole, linear.mT))
                    de[maps].baddbmm_(torch.bmm(d.mT, own), linear)
            tiles.grad(maps, row, [*of_heads, x], T, dT, to_q, to_k)
    return dq, dk, dE, dF, dG


@_backward.register_fake
def _(q: Tensor, k: Tensor, E: Tensor, F: Tensor, G: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dq, dk, dE, dF, dG = (F.new_empty(x.shape) for x in (q, k, E, F, G))
    return dq, dk, dE, dF, dG


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep the inputs, from which backward computes the tiles again."""
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


def _tiles_again(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Compute the tiles again, without a graph: `first_derivative_only` refuses the second derivative."""
    inputs = [x.detach() for x in (*ctx.saved_tensors, *grads)]
    with no_autocast(grads[0].device):
        results = _backward(*inputs, *ctx.options, ctx.needs_input_grad[2])
    return *(d.to(x.dtype) for d, x in zip(results, ctx.saved_tensors[:5], strict=True)), None, None, None, None


batched(_forward, tensors=6)
batched(_backward, tensors=8)
_mean_map = differentiable(_forward, _setup_context, _tiles_again)
