"""m-KL of two attention maps that are given by their factors: softmax(A B^T) against softmax(C D^T).

Neither map is ever built. Rows are computed a tile at a time. Since a loss is a weighted sum of these divergences, the
gradient of each is computed along with it, from the same tile. Nearest published work: StreamKL (arXiv 2606.20005),
a fused one-way divergence of attention distributions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attncongruence._compat import mapped
from attncongruence._typing import at_least_float32
from attncongruence.streaming.operators import (
    Tiles,
    batched,
    differentiable,
    groups,
    has_kernels,
    tile_kl,
    tile_kl_grad,
)


def low_rank_kl(A: Tensor, B: Tensor, C: Tensor, D: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Sum over rows of m-KL(softmax(scale A B^T), softmax(scale C D^T)), Eq. 4, with its first derivative.

    Args:
        A, B, C, D: `(batch, heads, n, width)`; zero beyond a sample's length.
        lengths: `(batch,)`: how many of the n rows and columns are a sample's own.
        scale: factor of both products.

    Returns:
        `(batch, heads)`, in nats.
    """
    # While compiling, and of mapped tensors, nobody can tell whether a gradient will be needed.
    unknown = torch.compiler.is_compiling() or any(mapped(x) for x in (A, B, C, D))
    with_grad = torch.is_grad_enabled() and (unknown or any(x.requires_grad for x in (A, B, C, D)))
    loss: Tensor = _low_rank_kl(A, B, C, D, lengths, scale, with_grad)[0]
    return loss


@torch.library.custom_op(
    "attncongruence::low_rank_kl",
    mutates_args=(),
    schema="(Tensor A, Tensor B, Tensor C, Tensor D, Tensor lengths, float scale, bool with_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _tiled(
    A: Tensor, B: Tensor, C: Tensor, D: Tensor, lengths: Tensor, scale: float, with_grad: bool
) -> tuple[Tensor, ...]:
    if has_kernels(A, B, C, D):
        from attncongruence.streaming import low_rank_kernels

        return low_rank_kernels.low_rank_kl(A, B, C, D, lengths, scale, with_grad)
    factors = [x.contiguous() for x in (A, B, C, D)]
    loss = A.new_zeros(A.shape[:2])
    dA, dB, dC, dD = ((torch.zeros_like(x) if with_grad else x.new_empty(0)) for x in factors)
    for samples, n in groups(lengths, A.shape[2]):
        # One map a head and sample: (samples heads, n, width)
        a, b, c, d = (x[samples, :, :n].flatten(0, 1) for x in factors)
        rows = a.new_empty(a.shape[:2])
        grads = [torch.zeros_like(x) for x in (a, b, c, d)] if with_grad else []
        tiles = Tiles(a.shape[0], n, 4, a)
        for maps, row in tiles:
            x, y, P, T = tiles.buffers(maps, row)
            torch.baddbmm(x, a[maps, row], b[maps].mT, beta=0, alpha=scale, out=x)
            torch.baddbmm(y, c[maps, row], d[maps].mT, beta=0, alpha=scale, out=y)
            rows[maps, row] = tile_kl(x, y, P, T)
            if grads:
                dx, minus_dy = tile_kl_grad(x, y, P, T, rows[maps, row])
                # dA = scale dx B, dB = scale dx^T A, and C, D likewise
                grads[0][maps, row] = torch.bmm(dx, b[maps])
                grads[1][maps].baddbmm_(dx.mT, a[maps, row])
                grads[2][maps, row] = torch.bmm(minus_dy, d[maps])
                grads[3][maps].baddbmm_(minus_dy.mT, c[maps, row])
        loss[samples] = rows.sum(-1).view(-1, A.shape[1])
        for whole, part, sign in zip((dA, dB, dC, dD), grads, (1, 1, -1, -1), strict=False):
            torch.mul(part.view(-1, A.shape[1], *part.shape[1:]), sign * scale, out=whole[samples, :, :n])
    return loss, dA, dB, dC, dD


@_tiled.register_fake
def _(A: Tensor, B: Tensor, C: Tensor, D: Tensor, lengths: Tensor, scale: float, with_grad: bool) -> tuple[Tensor, ...]:
    work = at_least_float32(A)
    dA, dB, dC, dD = (work.new_empty(x.shape if with_grad else (0,)) for x in (A, B, C, D))
    return work.new_empty(A.shape[:2]), dA, dB, dC, dD


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep each head's gradient, which was computed with its loss."""
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [x.dtype for x in inputs[:4]]
    ctx.mark_non_differentiable(*output[1:])
    # No zeros for the outputs that have no gradient; the vmap of PyTorch 2.6 wants them.
    ctx.set_materialize_grads(mapped(output[0]))


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Scale each head's gradient by that of its loss."""
    if grads[0] is None:
        return (None,) * 7
    weight = grads[0][..., None, None]
    return *((weight * d).to(own) for d, own in zip(ctx.saved_tensors, ctx.dtypes, strict=True)), None, None, None


batched(_tiled, tensors=5)
_low_rank_kl = differentiable(_tiled, _setup_context, _backward)
