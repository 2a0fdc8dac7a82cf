# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""GPU kernels for the gradient of maps averaged over heads, some rows at a time, to queries and keys.

P_h = exp(scale q_h k_h^T - lse_h)     c_h = sum_j P_h dT / heads     ds_h = P_h (dT / heads - c_h)
dq_h = scale ds_h k_h                  dk_h = scale ds_h^T q_h
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from triton.language import constexpr

from attncongruence.streaming.kernel_tiles import LOG2E, NONE, product, rounded, tile
from attncongruence.streaming.map_kernels import ready


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


def mean_rows_grad_q(
    q: Tensor, k: Tensor, lse: Tensor, lengths: Tensor, scale: float, start: int, stop: int, dT: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of rows `start` to `stop` of q, from that of the same rows of T.

    Args:
        q, k, lse, lengths, scale, start, stop: as for `mean_rows`.
        dT: `(batch, stop - start, n)`.

    Returns:
        dq, `(batch, heads, stop - start, width)`, and `c = sum_j P dT / heads`, `(batch, heads, stop - start)`, both
        float32; 0 in rows beyond the length.
    """
    with torch.no_grad(), torch.cuda.device_of(q):
        q, k, own, other, options = ready("mean_grad", q, k)
        batch, heads, n, width = q.shape
        dq = torch.empty(batch, heads, stop - start, width, device=q.device, dtype=torch.float32)
        c = torch.empty(batch, heads, stop - start, device=q.device, dtype=torch.float32)
        if q.numel():
            dT, powers = dT.detach().float().contiguous(), _powers(dT, lengths, start, q.dtype)
            grid = (batch * heads * triton.cdiv(stop - start, own),)
            _grad_q_kernel[grid](
                q, k, lse, lengths.contiguous(), dT, powers, dq, c, heads, n, start, stop, scale,
                ROWS=own, COLUMNS=other, **options
            )  # fmt: skip
        return dq, c


def mean_rows_grad_k(
    q: Tensor, k: Tensor, lse: Tensor, lengths: Tensor, scale: float, start: int, stop: int,
    dT: Tensor, c: Tensor, dk: Tensor,
) -> None:  # fmt: skip
    """Add to the gradient of k what comes from rows `start` to `stop` of T.

    Args:
        q, k, lse, lengths, scale, start, stop, dT: as for `mean_rows_grad_q`.
        c: what it returned.
        dk: `(batch, heads, n, width)`, float32, contiguous; changed in place.
    """
    with torch.no_grad(), torch.cuda.device_of(q):
        q, k, own, other, options = ready("mean_grad", q, k)
        batch, heads, n, _ = q.shape
        if q.numel():
            dT, powers = dT.detach().float().contiguous(), _powers(dT, lengths, start, q.dtype)
            grid = (batch * heads * triton.cdiv(n, own),)
            _grad_k_kernel[grid](
                q, k, lse, lengths.contiguous(), dT, powers, c, dk, heads, n, start, stop, scale,
                ROWS=own, COLUMNS=other, **options
            )  # fmt: skip


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
