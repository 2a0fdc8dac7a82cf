"""Cross-modal pooling, E V with E = softmax(scale q k^T), some rows of E at a time, as exact as if E were built.

`scaled_dot_product_attention` makes E again in backward from each row's log-sum-exp. Its rounding error grows with the
logits, so that at low temperatures the rows of E no longer sum to 1. Here each tile's softmax is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from attncongruence._compat import softmax_grad
from attncongruence._typing import at_least_float32, no_autocast
from attncongruence.streaming.operators import Tiles, batched, differentiable, has_kernels


def pool(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v, with its first derivative.

    Args:
        q: `(batch, heads, rows, width)`.
        k: `(batch, heads, columns, width)`, finite beyond a sample's length.
        v: `(batch, heads, columns, any)`, zero beyond a sample's length.
        lengths: `(batch,)`: how many of the columns are a sample's own; where 0, the result has no meaning.
        scale: factor of the product.

    Returns:
        `(batch, heads, rows, any)`.
    """
    if has_kernels(q, k, v) and scale <= 1.01 * q.shape[-1] ** -0.5:
        # The logits are those of an attention layer, small enough for an attention kernel.
        own = torch.arange(k.shape[2], device=q.device) < lengths[:, None]
        mask = (own | (lengths == 0)[:, None])[:, None, None]
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    pooled: Tensor = _pool(at_least_float32(q), at_least_float32(k), at_least_float32(v), lengths, scale)
    return pooled


class Rows:
    """Tiles of E. All tensors are taken as one map for each sample and head, `(maps, rows or columns, width)`."""

    def __init__(self, q: Tensor, k: Tensor, lengths: Tensor, scale: float, buffers: int) -> None:
        self.q, self.k, self.scale = q.flatten(0, 1), k.flatten(0, 1), scale
        beyond = torch.arange(k.shape[2], device=q.device) >= lengths[:, None]
        self.beyond = beyond.repeat_interleave(q.shape[1], 0)[:, None]
        self.tiles = Tiles(self.q.shape[0], q.shape[2], buffers, q, k.shape[2])

    def __iter__(self) -> Iterator[tuple[slice, slice, list[Tensor]]]:
        """Slices of maps and of rows, and tiles, `(maps, rows, columns)`, of which the first is E."""
        for maps, row in self.tiles:
            E, *work = self.tiles.buffers(maps, row)
            torch.baddbmm(E, self.q[maps, row], self.k[maps].mT, beta=0, alpha=self.scale, out=E)
            torch.softmax(E.masked_fill_(self.beyond[maps], torch.finfo(E.dtype).min / 2), -1, out=E)
            yield maps, row, [E, *work]


@torch.library.custom_op(
    "attncongruence::pool",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor lengths, float scale) -> Tensor",
)
def _forward(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    pooled, values = v.new_empty(*q.shape[:-1], v.shape[-1]), v.flatten(0, 1)
    for maps, row, (E,) in Rows(q, k, lengths, scale, 1):
        pooled.view(-1, *pooled.shape[2:])[maps, row] = torch.bmm(E, values[maps])
    return pooled


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    return v.new_empty(*q.shape[:-1], v.shape[-1])


@torch.library.custom_op(
    "attncongruence::pool_grad",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor grad, float scale) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, values, grad = Rows(q, k, lengths, scale, 2), v.flatten(0, 1), grad.flatten(0, 1)
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (rows.q, rows.k, values))
    for maps, row, (E, dS) in rows:
        # dE = grad v^T, dv = E^T grad
        torch.bmm(grad[maps, row], values[maps].mT, out=dS)
        dv[maps].baddbmm_(E.mT, grad[maps, row])
        # dS of E = softmax(S), dq = scale dS k, dk = scale dS^T q
        softmax_grad(dS, E, out=dS)
        dq[maps, row] = torch.bmm(dS, rows.k[maps]).mul_(scale)
        dk[maps].baddbmm_(dS.mT, rows.q[maps, row], alpha=scale)
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


@_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, grad: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the inputs, from which backward computes the tiles again."""
    ctx.save_for_backward(*inputs[:4])
    ctx.scale = inputs[4]


def _tiles_again(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Compute the tiles again, without a graph: `first_derivative_only` refuses the second derivative."""
    with no_autocast(grad.device):
        return *_backward(*(x.detach() for x in (*ctx.saved_tensors, grad)), ctx.scale), None, None


batched(_forward, tensors=4)
batched(_backward, tensors=5)
_pool = differentiable(_forward, _setup_context, _tiles_again)
