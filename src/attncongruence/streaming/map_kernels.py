# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""GPU kernels for maps averaged over heads, some rows at a time, and their gradient to queries and keys.

    P_h = exp(scale q_h k_h^T - lse_h)     T = mean_h P_h
    c_h = sum_j P_h dT / heads             ds_h = P_h (dT / heads - c_h)
    dq_h = scale ds_h k_h                  dk_h = scale ds_h^T q_h

No map of a single head leaves the chip. Sums are in float32, and no two programs write to one place, so a run repeats
bit by bit. The caller repeats grouped keys.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from triton.language import constexpr

from attncongruence.streaming.kernel_tiles import LN2, LOG2E, NONE, here, launch, product, rounded, tile
from attncongruence.streaming.operators import cache_bytes


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


@triton.jit
def _add_columns(sum_dT, sum_Pk, c, q, K, lse, dT, factor, weight, own, other, end, count,
                 WIDTH: constexpr, PADDED: constexpr, PRECISION: constexpr, MASKED: constexpr):  # fmt: skip
    """Add some more columns to the gradient of rows of q."""
    k = tile(K, other, count, WIDTH, PADDED, MASKED)
    u = product(q, tl.trans(k), PRECISION) * factor - lse[:, None]
    if MASKED:
        inside = (own < end)[:, None] & (other < count)[None, :]
        u = tl.where(inside, u, NONE)
        d = tl.load(dT[:, None] + other[None, :], mask=inside, other=0.0)
    else:
        d = tl.load(dT[:, None] + other[None, :])
    P = tl.exp2(u)
    d = P * (d * weight)
    # sum_j P dT k, sum_j P k, sum_j P dT
    sum_dT += product(rounded(d, k), k, PRECISION)
    sum_Pk += product(rounded(P, k), k, PRECISION)
    return sum_dT, sum_Pk, c + tl.sum(d, 1)


@triton.jit(do_not_specialize=["start", "stop"])
def _grad_q_kernel(Q, K, lse, lengths, dT, powers, out, out_c, heads, n, start, stop, scale,
                   WIDTH: constexpr, PADDED: constexpr, ROWS: constexpr, COLUMNS: constexpr,
                   PRECISION: constexpr):  # fmt: skip
    """dq, `(batch, heads, stop - start, WIDTH)`, and c, `(batch, heads, stop - start)`: ROWS rows of one head."""
    # Programs for the heads of the same rows run together, since they read the same dT.
    down = tl.cdiv(stop - start, ROWS)
    sample = tl.program_id(0) // (heads * down)
    head = (sample * heads + tl.program_id(0) % heads).to(tl.int64)
    row = start + tl.program_id(0) // heads % down * ROWS
    own = row + tl.arange(0, ROWS)
    count = tl.load(lengths + sample).to(tl.int32)
    end = tl.minimum(count, stop)
    K += head * n * WIDTH
    dT += (sample * (stop - start) + own - start).to(tl.int64) * n
    q = tile(Q + head * n * WIDTH, own, end, WIDTH, PADDED, True)
    factor = scale * LOG2E
    weight = tl.load(powers + 4 * sample)
    lift = tl.load(powers + 4 * sample + 1)
    lse_row = tl.load(lse + head * n + own, mask=own < end, other=0.0) * LOG2E - lift

    sum_dT = tl.zeros([ROWS, PADDED], tl.float32)
    sum_Pk = tl.zeros([ROWS, PADDED], tl.float32)
    c = tl.zeros([ROWS], tl.float32)
    # Whole tiles need no mask. A tile that is cut off in either direction does.
    whole = tl.where(row + ROWS <= end, count // COLUMNS * COLUMNS, 0)
    for j in range(0, whole, COLUMNS):
        sum_dT, sum_Pk, c = _add_columns(sum_dT, sum_Pk, c, q, K, lse_row, dT, factor, weight, own,
                                         j + tl.arange(0, COLUMNS), end, count,
                                         WIDTH, PADDED, PRECISION, False)  # fmt: skip
    for j in range(whole, tl.where(row < end, count, 0), COLUMNS):
        sum_dT, sum_Pk, c = _add_columns(sum_dT, sum_Pk, c, q, K, lse_row, dT, factor, weight, own,
                                         j + tl.arange(0, COLUMNS), end, count,
                                         WIDTH, PADDED, PRECISION, True)  # fmt: skip

    # c = sum_j P dT / heads, dq = scale (sum_j P dT k / heads - c sum_j P k)
    lower = tl.load(powers + 4 * sample + 2) / heads
    c *= lower
    dq = sum_dT * lower - c[:, None] * (sum_Pk * tl.load(powers + 4 * sample + 3))
    columns = tl.arange(0, PADDED)
    to = head * (stop - start) + own - start
    tl.store(out_c + to, c, mask=own < stop)
    inside = (own < stop)[:, None] & (columns < WIDTH)[None, :]
    tl.store(out + to[:, None] * WIDTH + columns[None, :], scale * dq, mask=inside)


@triton.jit
def _add_rows(sum_k, k, Q, lse, dT, C, factor, weight, lift, heads, own, other, start, end, count, n,
              WIDTH: constexpr, PADDED: constexpr, PRECISION: constexpr, MASKED: constexpr):  # fmt: skip
    """Add some more rows to the gradient of rows of k."""
    q = tile(Q, other, end, WIDTH, PADDED, MASKED)
    lse_row = tl.load(lse + other, mask=other < end, other=0.0) * LOG2E - lift
    c = tl.load(C + (other - start), mask=other < end, other=0.0) * (heads * weight)
    # Transposed: own columns of P are rows here.
    u = product(k, tl.trans(q), PRECISION) * factor - lse_row[None, :]
    pointers = dT + own[:, None] + ((other - start).to(tl.int64) * n)[None, :]
    if MASKED:
        inside = (own < count)[:, None] & (other < end)[None, :]
        u = tl.where(inside, u, NONE)
        d = tl.load(pointers, mask=inside, other=0.0)
    else:
        d = tl.load(pointers)
    # ds = P (dT - heads c) / heads
    ds = tl.exp2(u) * (d * weight - c[None, :])
    return sum_k + product(rounded(ds, q), q, PRECISION)


@triton.jit(do_not_specialize=["start", "stop"])
def _grad_k_kernel(Q, K, lse, lengths, dT, powers, C, out, heads, n, start, stop, scale,
                   WIDTH: constexpr, PADDED: constexpr, ROWS: constexpr, COLUMNS: constexpr,
                   PRECISION: constexpr):  # fmt: skip
    """Add to dk, `(batch, heads, n, WIDTH)`, in place: ROWS rows of one head."""
    down = tl.cdiv(n, ROWS)
    sample = tl.program_id(0) // (heads * down)
    head = (sample * heads + tl.program_id(0) % heads).to(tl.int64)
    row = tl.program_id(0) // heads % down * ROWS
    own = row + tl.arange(0, ROWS)
    count = tl.load(lengths + sample).to(tl.int32)
    end = tl.minimum(count, stop)
    Q += head * n * WIDTH
    lse += head * n
    dT += sample.to(tl.int64) * (stop - start) * n
    C += head * (stop - start)
    k = tile(K + head * n * WIDTH, own, count, WIDTH, PADDED, True)
    factor = scale * LOG2E
    weight = tl.load(powers + 4 * sample)
    lift = tl.load(powers + 4 * sample + 1)

    sum_k = tl.zeros([ROWS, PADDED], tl.float32)
    rows = tl.maximum(end - start, 0)
    whole = start + tl.where(row + ROWS <= count, rows // COLUMNS * COLUMNS, 0)
    for i in range(start, whole, COLUMNS):
        sum_k = _add_rows(sum_k, k, Q, lse, dT, C, factor, weight, lift, heads, own, i + tl.arange(0, COLUMNS),
                          start, end, count, n, WIDTH, PADDED, PRECISION, False)  # fmt: skip
    for i in range(whole, tl.where(row < count, end, 0), COLUMNS):
        sum_k = _add_rows(sum_k, k, Q, lse, dT, C, factor, weight, lift, heads, own, i + tl.arange(0, COLUMNS),
                          start, end, count, n, WIDTH, PADDED, PRECISION, True)  # fmt: skip

    columns = tl.arange(0, PADDED)
    to = out + head * n * WIDTH + own[:, None] * WIDTH + columns[None, :]
    inside = (own < count)[:, None] & (columns < WIDTH)[None, :]
    # dk += scale ds^T q
    share = sum_k * (scale * tl.load(powers + 4 * sample + 2) / heads)
    tl.store(to, tl.load(to, mask=inside, other=0.0) + share, mask=inside)


class KernelRows:
    """As `mean_map.Rows`, by kernels: chunks of rows of T of a whole batch, as many as the cache holds of one map.

    What stands beyond a sample's length (int64) is not looked at; contiguous tensors of one dtype are not copied.
    """

    log = False

    def __init__(self, q: Tensor, k: Tensor, lengths: Tensor, scale: float) -> None:
        self.dtype = torch.promote_types(q.dtype, k.dtype)
        self.q, self.k = (x.detach().to(self.dtype).contiguous() for x in (q, k))
        self.lengths, self.scale = lengths.contiguous(), scale
        self.batch, self.heads, self.n, _ = q.shape
        self.beyond = (torch.arange(self.n, device=q.device) >= lengths[:, None])[:, None]
        # Logarithm of each row's sum of exp(scale q k^T), (batch, heads, n); 0 beyond the length
        self.lse = torch.empty(q.shape[:3], device=q.device, dtype=torch.float32)
        arguments = self.q, self.k, self.lengths, self.lse, self.heads, self.n, scale
        launch(_logsumexp_kernel, "statistics", (self.batch * self.heads, self.n, 1), *arguments)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """The whole batch, and each chunk of its rows."""
        rows = max(1, cache_bytes(self.q.device) // (4 * self.batch * self.n))
        return ((slice(0, self.batch), slice(i, min(i + rows, self.n))) for i in range(0, self.n, rows))

    def map(self, maps: slice, rows: slice) -> tuple[list[Tensor], Tensor]:
        """Four tiles to work with, and rows of T, `(batch, rows, n)`, float32; 0 beyond the length."""
        count = rows.stop - rows.start
        T = torch.empty(self.batch, count, self.n, device=self.q.device, dtype=torch.float32)
        arguments = self.q, self.k, self.lse, self.lengths, T, self.heads, self.n, rows.start, rows.stop, self.scale
        launch(_mean_kernel, "mean", (self.batch, count, self.n), *arguments)
        return [torch.empty_like(T) for _ in range(4)], T

    def grad(
        self, maps: slice, rows: slice, tiles: list[Tensor], T: Tensor, dT: Tensor, dq: Tensor, dk: Tensor
    ) -> None:
        """Write the gradient of rows of T to the same rows of dq, and add it to dk, contiguous and float32."""
        count, all_heads = rows.stop - rows.start, self.batch * self.heads
        part, c = dq.new_empty(dq[:, :, rows].shape), dq.new_empty(self.batch, self.heads, count)
        dT = dT.float().contiguous()
        inputs = self.q, self.k, self.lse, self.lengths, dT, _powers(dT, self.lengths, rows.start, self.dtype)
        size = self.heads, self.n, rows.start, rows.stop, self.scale
        launch(_grad_q_kernel, "mean_grad", (all_heads, count, 1), *inputs, part, c, *size)
        launch(_grad_k_kernel, "mean_grad", (all_heads, self.n, 1), *inputs, c, dk, *size)
        dq[:, :, rows] = part


def _powers(dT: Tensor, lengths: Tensor, start: int, dtype: torch.dtype) -> Tensor:
    """Powers of two that keep P and P dT within float16, `(batch, 4)`: for dT, for P, and the inverses for both, for P.

    P is lifted to at most 2^14 and dT brought below 1, so that `P (dT - heads c)` is at most 2^15.
    """
    batch, rows, n = dT.shape
    power = lift = torch.zeros(batch, device=dT.device, dtype=torch.float32)
    if dtype == torch.float16:
        own = torch.arange(n, device=dT.device) < lengths[:, None]
        peak = torch.where(own[:, start : start + rows, None] & own[:, None, :], dT, 0).abs().amax((1, 2))
        power, lift = torch.frexp(peak.float()).exponent.clamp(-100, 100).float(), lift + 14
    return torch.stack((torch.exp2(-power), lift, torch.exp2(power - lift), torch.exp2(-lift)), -1)
