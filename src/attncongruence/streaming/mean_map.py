"""What the losses need of the head-mean map of one modality, T = mean_h softmax(scale q_h k_h^T), without building it.

One pass over tiles of its rows gives both: the map seen through E, `R = E T E^T`, and its row divergences from a map of
low rank, `F G^T`. Backward computes the tiles again. A tile holds some rows of all heads, so memory is O(heads M).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attncongruence._compat import log_softmax_grad, softmax_grad
from attncongruence._typing import at_least_float32, no_autocast
from attncongruence.streaming.ops import batched, differentiable, kernels
from attncongruence.streaming.tiles import FiveTensors, Target, Tiles, divergence, divergence_grad, groups


def mean_map(
    q: Tensor,
    k: Tensor,
    E: Tensor | None,
    F: Tensor | None,
    G: Tensor | None,
    lengths: Tensor,
    scale: float,
    target: Target = "softmax",
    epsilon: float = 0.0,
) -> tuple[Tensor, Tensor]:
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

    def __init__(self, q: Tensor, k: Tensor, scale: float, log: bool) -> None:
        # Heads in front: one tile of one head after the other stays in the cache.
        self.q, self.k = (at_least_float32(x).transpose(0, 1).contiguous() for x in (q, k))
        self.scale, self.log, self.heads = scale, log, q.shape[1]
        self.tiles = Tiles(q.shape[0], q.shape[2], self.heads + 5, self.q)

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
        """Adds the gradient of a tile of T or log T to dq and dk, `(heads, samples, n, width)`."""
        *of_heads, x = tiles
        dT.div_(self.heads)
        for head, own in enumerate(of_heads):
            if self.log:
                # d log P_h = d log T * P_h / (heads T); then the softmax, as a log-softmax
                torch.sub(own, T, out=x).exp_().mul_(dT)
                ds = log_softmax_grad(x, own)
            else:
                ds = softmax_grad(dT, own, out=x)
            torch.baddbmm(
                dq[head, maps, rows], ds, self.k[head, maps], beta=0, alpha=self.scale, out=dq[head, maps, rows]
            )
            dk[head, maps].baddbmm_(ds.mT, self.q[head, maps, rows], alpha=self.scale)


@torch.library.custom_op(
    "attncongruence::mean_map",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor E, Tensor F, Tensor G, Tensor lengths, float scale, str target, float epsilon)"
    " -> (Tensor, Tensor)",
)
def _forward(
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
    if target != "log" and kernels(q, k):
        from attncongruence.streaming import mean_map_gpu

        return mean_map_gpu.forward(q, k, E, F, G, lengths, scale, target, epsilon)
    R, loss = F.new_zeros(q.shape[0], E.shape[1], E.shape[1]), F.new_zeros(q.shape[0])
    for samples, n in groups(lengths, q.shape[2]):
        rows = Rows(q[samples, :, :n], k[samples, :, :n], scale, target == "log")
        e, f, g = E[samples, :, :n], F[samples, :n], G[samples, :n]
        for maps, row in rows.tiles:
            (*_, x, y, P, Q), T = rows.map(maps, row)
            if E.numel():
                # R = E T E^T, a sum over rows of T
                W = torch.bmm(T.exp() if rows.log else T, e[maps].mT)
                R[samples][maps] += torch.bmm(e[maps, :, row], W)
            if F.numel():
                torch.bmm(f[maps, row], g[maps].mT, out=x)
                loss[samples][maps] += divergence(x, T, (y, P, Q), target, epsilon).sum(-1)
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
    if target != "log" and kernels(q, k):
        from attncongruence.streaming import mean_map_gpu

        return mean_map_gpu.backward(q, k, E, F, G, lengths, dR, dloss, scale, target, epsilon, with_dE)
    dq, dk = (F.new_zeros(x.shape) for x in (q, k))
    dE, dF, dG = (F.new_zeros(x.shape) for x in (E, F, G))
    for samples, n in groups(lengths, q.shape[2]):
        rows = Rows(q[samples, :, :n], k[samples, :, :n], scale, target == "log")
        e, de = (x[samples, :, :n] for x in (E, dE))
        f, g, df, dg = (x[samples, :n] for x in (F, G, dF, dG))
        to_q, to_k = torch.empty_like(rows.q), torch.zeros_like(rows.k)
        for maps, row in rows.tiles:
            (*of_heads, x, y, P, Q), T = rows.map(maps, row)
            dT = Q.zero_()
            if F.numel():
                torch.bmm(f[maps, row], g[maps].mT, out=x)
                weight = dloss[samples][maps, None, None]
                dx, dT = divergence_grad(x, T, (y, P, Q), target, epsilon, weight)
                df[maps, row] = torch.bmm(dx, g[maps])
                dg[maps].baddbmm_(dx.mT, f[maps, row])
            if E.numel():
                # dT = E^T dR E
                left = torch.bmm(e[maps, :, row].mT, dR[samples][maps])
                if rows.log:
                    dT.addcmul_(torch.bmm(left, e[maps], out=x), torch.exp(T, out=y))
                else:
                    dT.baddbmm_(left, e[maps])
                if with_dE:
                    # dE = dR E T^T + dR^T E T
                    linear = y if rows.log else T
                    de[maps, :, row] += torch.bmm(dR[samples][maps], torch.bmm(e[maps], linear.mT))
                    de[maps] += torch.bmm(torch.bmm(dR[samples][maps].mT, e[maps, :, row]), linear)
            rows.grad(maps, row, [*of_heads, x], T, dT, to_q, to_k)
        dq[samples, :, :n], dk[samples, :, :n] = to_q.transpose(0, 1), to_k.transpose(0, 1)
    return dq, dk, dE, dF, dG


@_backward.register_fake
def _(q: Tensor, k: Tensor, E: Tensor, F: Tensor, G: Tensor, *rest: Any) -> FiveTensors:
    dq, dk, dE, dF, dG = (F.new_empty(x.shape) for x in (q, k, E, F, G))
    return dq, dk, dE, dF, dG


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep the inputs, from which backward computes the tiles again."""
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


def _tiles_again(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Computes the tiles again, without a graph: `first_derivative_only` refuses the second derivative."""
    inputs = [x.detach() for x in (*ctx.saved_tensors, *grads)]
    with no_autocast(grads[0].device):
        results = _backward(*inputs, *ctx.options, ctx.needs_input_grad[2])
    return *(d.to(x.dtype) for d, x in zip(results, ctx.saved_tensors[:5], strict=True)), None, None, None, None


batched(_forward, tensors=6)
batched(_backward, tensors=8)
_mean_map = differentiable(_forward, _setup_context, _tiles_again)
