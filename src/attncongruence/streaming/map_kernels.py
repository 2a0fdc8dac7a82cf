# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""GPU kernels for maps averaged over heads, some rows at a time: T = mean_h softmax(scale q_h k_h^T).

No map of a single head leaves the chip. Sums are in float32, and no two programs write to one place, so a run repeats
bit by bit. The caller repeats grouped keys. The gradient kernels are in `map_grad_kernels`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from triton.language import constexpr

from attncongruence.streaming.kernel_tiles import LN2, LOG2E, NONE, here, product, settings, tile


@triton.jit
def _online(m, l, q, K, factor, columns, count,
            WIDTH: constexpr, PADDED: constexpr, PRECISION: constexpr, MASKED: constexpr):  # fmt: skip
    """One step of the online log-sum-exp over some more columns."""
    s = product(q, tl.trans(tile(K, columns, count, WIDTH, PADDED, MASKED)), PRECISION) * factor
    if MASKED:
        s = tl.where((columns < count)[None, :], s, NONE)
    top = tl.maximum(m, tl.max(s, 1))
    l = l * tl.exp2(m - top) + tl.sum(tl.exp2(s - top[:, None]), 1)
    return top, l


@triton.jit
def _logsumexp_kernel(Q, K, lengths, out, heads, n, scale,
                      WIDTH: constexpr, PADDED: constexpr, ROWS: constexpr, COLUMNS: constexpr,
                      PRECISION: constexpr):  # fmt: skip
    """`(batch, heads, n)`: ROWS rows of one head."""
    index, matrix, count, start, own = here(lengths, heads, n, WIDTH, ROWS)
    K += matrix
    q = tile(Q + matrix, own, count, WIDTH, PADDED, True)
    factor = scale * LOG2E

    m = tl.full([ROWS], NONE, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    whole = count // COLUMNS * COLUMNS
    for j in range(0, tl.where(start < count, whole, 0), COLUMNS):
        m, l = _online(m, l, q, K, factor, j + tl.arange(0, COLUMNS), count, WIDTH, PADDED, PRECISION, False)
    for j in range(whole, tl.where(start < count, count, 0), COLUMNS):
        m, l = _online(m, l, q, K, factor, j + tl.arange(0, COLUMNS), count, WIDTH, PADDED, PRECISION, True)

    own_row = own < count
    lse = (m + tl.log2(tl.where(own_row, l, 1.0))) * LN2
    tl.store(out + index.to(tl.int64) * n + own, tl.where(own_row, lse, 0.0), mask=own < n)


@triton.jit
def _add_head(T, head, Q, K, lse, factor, own, other, n, end, count,
              WIDTH: constexpr, PADDED: constexpr, PRECISION: constexpr, MASKED: constexpr):  # fmt: skip
    """Add one head's tile of P."""
    matrix = head.to(tl.int64) * n * WIDTH
    q = tile(Q + matrix, own, end, WIDTH, PADDED, MASKED)
    k = tile(K + matrix, other, count, WIDTH, PADDED, MASKED)
    lse_row = tl.load(lse + head.to(tl.int64) * n + own, mask=own < end, other=0.0) * LOG2E
    u = product(q, tl.trans(k), PRECISION) * factor - lse_row[:, None]
    if MASKED:
        u = tl.where((own < end)[:, None] & (other < count)[None, :], u, NONE)
    return T + tl.exp2(u)


@triton.jit(do_not_specialize=["start", "stop"])
def _mean_kernel(Q, K, lse, lengths, out, heads, n, start, stop, scale,
                 WIDTH: constexpr, PADDED: constexpr, ROWS: constexpr, COLUMNS: constexpr,
                 PRECISION: constexpr):  # fmt: skip
    """`(batch, stop - start, n)`: one tile of T, over all heads."""
    across = tl.cdiv(n, COLUMNS)
    down = tl.cdiv(stop - start, ROWS)
    sample = tl.program_id(0) // (across * down)
    row = start + tl.program_id(0) // across % down * ROWS
    column = tl.program_id(0) % across * COLUMNS
    own = row + tl.arange(0, ROWS)
    other = column + tl.arange(0, COLUMNS)
    count = tl.load(lengths + sample).to(tl.int32)
    end = tl.minimum(count, stop)
    factor = scale * LOG2E

    T = tl.zeros([ROWS, COLUMNS], tl.float32)
    # A whole tile needs no mask, a tile that is cut off does, and one beyond the sample has no heads.
    whole = (row + ROWS <= end) & (column + COLUMNS <= count)
    some = (row < end) & (column < count)
    for h in range(0, tl.where(whole, heads, 0)):
        T = _add_head(T, sample * heads + h, Q, K, lse, factor, own, other, n, end, count,
                      WIDTH, PADDED, PRECISION, False)  # fmt: skip
    for h in range(tl.where(whole, heads, 0), tl.where(some, heads, 0)):
        T = _add_head(T, sample * heads + h, Q, K, lse, factor, own, other, n, end, count,
                      WIDTH, PADDED, PRECISION, True)  # fmt: skip

    to = (sample * (stop - start) + own - start).to(tl.int64) * n
    inside = (own < stop)[:, None] & (other < n)[None, :]
    tl.store(out + to[:, None] + other[None, :], T * (1.0 / heads), mask=inside)


def row_logsumexp(q: Tensor, k: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Logarithm of each row's sum of `exp(scale q k^T)` over a sample's own columns.

    Args:
        q, k: `(batch, heads, n, width)`; here and below, what stands beyond a sample's length is not looked at, and
            contiguous tensors of one dtype are not copied.
        lengths: int64, `(batch,)`: how many of the n rows and columns are a sample's own.
        scale: factor of the product.

    Returns:
        `(batch, heads, n)`, float32; 0 beyond the length.
    """
    with torch.no_grad(), torch.cuda.device_of(q):
        q, k, own, other, options = ready("statistics", q, k)
        batch, heads, n, _ = q.shape
        lse = torch.empty(batch, heads, n, device=q.device, dtype=torch.float32)
        if q.numel():
            grid = (batch * heads * triton.cdiv(n, own),)
            _logsumexp_kernel[grid](
                q, k, lengths.contiguous(), lse, heads, n, scale, ROWS=own, COLUMNS=other, **options
            )
        return lse


def mean_rows(q: Tensor, k: Tensor, lse: Tensor, lengths: Tensor, scale: float, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of `T = mean_h softmax(scale q_h k_h^T)`.

    Args:
        q, k, lengths, scale: as for `row_logsumexp`.
        lse: what it returned.
        start, stop: which rows, `0 <= start < stop <= n`.

    Returns:
        `(batch, stop - start, n)`, float32; 0 in rows and columns beyond the length.
    """
    with torch.no_grad(), torch.cuda.device_of(q):
        q, k, own, other, options = ready("mean", q, k)
        batch, heads, n, _ = q.shape
        T = torch.empty(batch, stop - start, n, device=q.device, dtype=torch.float32)
        if q.numel():
            grid = (batch * triton.cdiv(stop - start, own) * triton.cdiv(n, other),)
            _mean_kernel[grid](
                q, k, lse, lengths.contiguous(), T, heads, n, start, stop, scale, ROWS=own, COLUMNS=other, **options
            )
        return T


def ready(kernel: str, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, int, int, dict[str, Any]]:
    """Contiguous, of one dtype, with the size of a tile and the options of a kernel."""
    dtype = torch.promote_types(q.dtype, k.dtype)
    q, k = (x.detach().to(dtype).contiguous() for x in (q, k))
    return q, k, *settings(kernel, dtype, q.shape[-1])
