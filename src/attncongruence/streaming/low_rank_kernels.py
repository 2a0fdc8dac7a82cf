# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The streaming form's GPU kernels: m-KL of two low-rank attention maps, with its gradient, in linear memory.

Per sample and head, `x = scale A B^T`, `y = scale C D^T`, `P = softmax(x)`, `T = softmax(y)`, `d = x - y`, row by row:

    mu = sum_j P_j d_j          nu = sum_j T_j d_j          loss = mu - nu
    dx_j = P_j (d_j - mu) + (P_j - T_j)                     dy_j = -T_j (d_j - nu) - (P_j - T_j)
    dA = scale dx B             dB = scale dx^T A           dC = scale dy D             dD = scale dy^T C

Tiles of x and y are made where they are used and never leave the chip. Inside the kernels logarithms have base 2, and
d is centered: with `u = log2 P`, `v = log2 T`, `u - v` is d less a constant of its row, to which all of the above is
invariant. Sums are in float32, and no two programs write to one place, so a run repeats bit by bit.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from triton.language import constexpr

from attncongruence.streaming.kernel_tiles import INTERPRETED, LN2, LOG2E, NONE, here, launch, product, rounded, tile


@triton.jit
def _sums(m_x, l_x, s_x, m_y, l_y, s_y, a, c, B, D, factor_x, factor_y, columns, count,
          WIDTH: constexpr, PADDED: constexpr, PRECISION: constexpr, MASKED: constexpr):  # fmt: skip
    """One step of the online softmax of x and y over some more columns."""
    x = product(a, tl.trans(tile(B, columns, count, WIDTH, PADDED, MASKED)), PRECISION) * factor_x
    y = product(c, tl.trans(tile(D, columns, count, WIDTH, PADDED, MASKED)), PRECISION) * factor_y
    if MASKED:
        x = tl.where((columns < count)[None, :], x, NONE)
        y = tl.where((columns < count)[None, :], y, NONE)
    top_x = tl.maximum(m_x, tl.max(x, 1))
    top_y = tl.maximum(m_y, tl.max(y, 1))
    # s_x = sum_j exp(x_j - m_x) (d_j - (m_x - m_y)): a maximum that moves rescales the sum and moves its center.
    shift = (top_y - m_y) - (top_x - m_x)
    rescale_x = tl.exp2(m_x - top_x)
    rescale_y = tl.exp2(m_y - top_y)
    u = x - top_x[:, None]
    v = y - top_y[:, None]
    p = tl.exp2(u)
    t = tl.exp2(v)
    s_x = rescale_x * (s_x + l_x * shift) + tl.sum(p * (u - v), 1)
    s_y = rescale_y * (s_y + l_y * shift) + tl.sum(t * (u - v), 1)
    l_x = rescale_x * l_x + tl.sum(p, 1)
    l_y = rescale_y * l_y + tl.sum(t, 1)
    return top_x, l_x, s_x, top_y, l_y, s_y


@triton.jit
def _statistics(A, B, C, D, lengths, factors, statistics, heads, n, scale,
                WIDTH: constexpr, PADDED: constexpr, ROWS: constexpr, COLUMNS: constexpr,
                PRECISION: constexpr):  # fmt: skip
    """`(maps, 4, n)`: log-sum-exp of x and of y, mu and nu (with d centered), of ROWS rows of a map."""
    index, matrix, count, start, own = here(lengths, heads, n, WIDTH, ROWS)
    other = tl.arange(0, COLUMNS)
    B += matrix
    D += matrix
    a = tile(A + matrix, own, count, WIDTH, PADDED, True)
    c = tile(C + matrix, own, count, WIDTH, PADDED, True)
    factor_y = scale * LOG2E
    factor_x = factor_y * tl.load(factors + 5 * index)

    m_x = tl.full([ROWS], NONE, tl.float32)
    m_y = tl.full([ROWS], NONE, tl.float32)
    l_x = tl.zeros([ROWS], tl.float32)
    l_y = tl.zeros([ROWS], tl.float32)
    s_x = tl.zeros([ROWS], tl.float32)
    s_y = tl.zeros([ROWS], tl.float32)
    whole = count // COLUMNS * COLUMNS
    for j in range(0, tl.where(start < count, whole, 0), COLUMNS):
        m_x, l_x, s_x, m_y, l_y, s_y = _sums(m_x, l_x, s_x, m_y, l_y, s_y, a, c, B, D, factor_x, factor_y, j + other,
                                             count, WIDTH, PADDED, PRECISION, False)  # fmt: skip
    for j in range(whole, tl.where(start < count, count, 0), COLUMNS):
        m_x, l_x, s_x, m_y, l_y, s_y = _sums(m_x, l_x, s_x, m_y, l_y, s_y, a, c, B, D, factor_x, factor_y, j + other,
                                             count, WIDTH, PADDED, PRECISION, True)  # fmt: skip

    own_row = own < count
    l_x = tl.where(own_row, l_x, 1.0)
    l_y = tl.where(own_row, l_y, 1.0)
    # sum_j P_j (u_j - v_j), where u - v = d - (m_x - m_y) - (log l_x - log l_y)
    center = tl.log2(l_x) - tl.log2(l_y)
    to = statistics + index.to(tl.int64) * 4 * n + own
    tl.store(to, tl.where(own_row, m_x + tl.log2(l_x), 0.0), mask=own < n)
    tl.store(to + n, tl.where(own_row, m_y + tl.log2(l_y), 0.0), mask=own < n)
    tl.store(to + 2 * n, tl.where(own_row, s_x / l_x - center, 0.0), mask=own < n)
    tl.store(to + 3 * n, tl.where(own_row, s_y / l_y - center, 0.0), mask=own < n)


@triton.jit
def _of_rows(statistics, n, rows, count, power):
    """The statistics of some rows that both gradients need; 0 beyond the last row."""
    own_row = rows < count
    lse_x = tl.load(statistics + rows, mask=own_row, other=0.0) - power
    lse_y = tl.load(statistics + n + rows, mask=own_row, other=0.0) - power
    mu = tl.load(statistics + 2 * n + rows, mask=own_row, other=0.0)
    nu = tl.load(statistics + 3 * n + rows, mask=own_row, other=0.0)
    return lse_x, lse_y, 1 - mu * LN2, 1 + nu * LN2


@triton.jit
def _sweep(sum_1, sum_2, own_1, own_2, OTHER_1, OTHER_2, lse_x, lse_y, one_mu, one_nu, statistics, n, power,
           factor_x, factor_y, own, other, count, BY_ROW: constexpr,
           WIDTH: constexpr, PADDED: constexpr, PRECISION: constexpr, MASKED: constexpr):  # fmt: skip
    """Add one tile of x and y to the gradients of a program's own rows (or columns)."""
    other_1 = tile(OTHER_1, other, count, WIDTH, PADDED, MASKED)
    other_2 = tile(OTHER_2, other, count, WIDTH, PADDED, MASKED)
    if BY_ROW:
        lse_x, lse_y, one_mu, one_nu = lse_x[:, None], lse_y[:, None], one_mu[:, None], one_nu[:, None]
    else:
        lse_x, lse_y, one_mu, one_nu = _of_rows(statistics, n, other, count, power)
        lse_x, lse_y, one_mu, one_nu = lse_x[None, :], lse_y[None, :], one_mu[None, :], one_nu[None, :]
    # u = log2 P, v = log2 T
    u = product(own_1, tl.trans(other_1), PRECISION) * factor_x - lse_x
    v = product(own_2, tl.trans(other_2), PRECISION) * factor_y - lse_y
    if MASKED:
        own_row = (own < count)[:, None] & (other < count)[None, :]
        u = tl.where(own_row, u, NONE)
        v = tl.where(own_row, v, NONE)
    P = tl.exp2(u)
    T = tl.exp2(v)
    d = (u - v) * LN2
    # dx = P (1 + d - mu) - T, dy = T (1 + nu - d) - P
    dx = P * (one_mu + d) - T
    dy = T * (one_nu - d) - P
    sum_1 += product(rounded(dx, other_1), other_1, PRECISION)
    sum_2 += product(rounded(dy, other_2), other_2, PRECISION)
    return sum_1, sum_2


@triton.jit
def _gradients(OWN_1, OWN_2, OTHER_1, OTHER_2, lengths, factors, statistics, out_1, out_2, heads, n, scale,
               BY_ROW: constexpr, WIDTH: constexpr, PADDED: constexpr, ROWS: constexpr, COLUMNS: constexpr,
               PRECISION: constexpr):  # fmt: skip
    """dA and dC of ROWS rows from all columns (BY_ROW), or dB and dD of ROWS columns from all rows."""
    index, matrix, count, start, own = here(lengths, heads, n, WIDTH, ROWS)
    other = tl.arange(0, COLUMNS)
    OTHER_1 += matrix
    OTHER_2 += matrix
    own_1 = tile(OWN_1 + matrix, own, count, WIDTH, PADDED, True)
    own_2 = tile(OWN_2 + matrix, own, count, WIDTH, PADDED, True)
    factor_y = scale * LOG2E
    factor_x = factor_y * tl.load(factors + 5 * index)
    power = tl.load(factors + 5 * index + 4)
    statistics += index.to(tl.int64) * 4 * n
    lse_x, lse_y, one_mu, one_nu = _of_rows(statistics, n, own, count, power)

    sum_1 = tl.zeros([ROWS, PADDED], tl.float32)
    sum_2 = tl.zeros([ROWS, PADDED], tl.float32)
    # Whole tiles need no mask. A tile that is cut off in either direction does.
    whole = tl.where(start + ROWS <= count, count // COLUMNS * COLUMNS, 0)
    for j in range(0, whole, COLUMNS):
        sum_1, sum_2 = _sweep(sum_1, sum_2, own_1, own_2, OTHER_1, OTHER_2, lse_x, lse_y, one_mu, one_nu,
                              statistics, n, power, factor_x, factor_y, own, j + other, count, BY_ROW,
                              WIDTH, PADDED, PRECISION, False)  # fmt: skip
    for j in range(whole, tl.where(start < count, count, 0), COLUMNS):
        sum_1, sum_2 = _sweep(sum_1, sum_2, own_1, own_2, OTHER_1, OTHER_2, lse_x, lse_y, one_mu, one_nu,
                              statistics, n, power, factor_x, factor_y, own, j + other, count, BY_ROW,
                              WIDTH, PADDED, PRECISION, True)  # fmt: skip

    columns = tl.arange(0, PADDED)
    to = matrix + own[:, None] * WIDTH + columns[None, :]
    inside = (own < n)[:, None] & (columns < WIDTH)[None, :]
    factor_1 = tl.load(factors + 5 * index + (1 if BY_ROW else 2))
    factor_2 = tl.load(factors + 5 * index + 3)
    tl.store(out_1 + to, sum_1 * (scale * factor_1), mask=inside)
    tl.store(out_2 + to, sum_2 * (scale * factor_2), mask=inside)


def low_rank_kl(
    A: Tensor, B: Tensor, C: Tensor, D: Tensor, lengths: Tensor, scale: float, with_grad: bool
) -> tuple[Tensor, ...]:
    """`low_rank.low_rank_kl` with its gradient, four empty tensors where that is not wanted; all in float32.

    Products are taken in the dtype of C and D, to which A and B are rounded, and sums in float32. What stands beyond a
    sample's length (int64) is not looked at.
    """
    batch, heads, n, _ = A.shape
    maps, new = batch * heads, partial(torch.empty, device=A.device, dtype=torch.float32)
    dA, dB, dC, dD = (new(A.shape if with_grad else 0) for _ in range(4))
    if A.numel() == 0:
        return new(batch, heads).zero_(), dA, dB, dC, dD
    dtype = torch.promote_types(C.dtype, D.dtype)
    # Each map's own powers of two, all 0 but for float16
    power_a = power_b = power = new(maps).zero_()
    if dtype == torch.float16:
        (A, power_a), (B, power_b) = _within_range(A, lengths), _within_range(B, lengths)
    A, B, C, D = (x.detach().to(dtype).contiguous() for x in (A, B, C, D))
    lengths, statistics = lengths.contiguous(), new(maps, 4, n)
    factors = _factors(power_a, power_b, power)
    launch(_statistics, "statistics", (maps, n, 1), A, B, C, D, lengths, factors, statistics, heads, n, scale)
    # mu - nu, which only rounding can take below 0; from base 2 to nats
    rows = (statistics[:, 2] - statistics[:, 3]).clamp_min_(0).mul_(math.log(2))
    if with_grad:
        if dtype == torch.float16:
            # |dx_j|, |dy_j| <= 2 loss + log n + 1.4, since P_j |log P_j| < 0.4 and
            # P_j |log T_j| <= sum_j P_j |log T_j| = mu + entropy(P) <= loss + log n. Scaled to below 2^15.
            power = 15.0 - torch.frexp(2 * rows.amax(-1) + (math.log(n) + 1.4)).exponent
            factors = _factors(power_a, power_b, power)
        for by_row, inputs, out in ((True, (A, C, B, D), (dA, dC)), (False, (B, D, A, C), (dB, dD))):
            arguments = *inputs, lengths, factors, statistics, *out, heads, n, scale
            launch(_gradients, "gradients", (maps, n, 1), *arguments, BY_ROW=by_row)
    return rows.sum(-1).view(batch, heads), dA, dB, dC, dD


def _within_range(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Each map of `x` times the power of two that takes its largest entry to 2^13 to 2^14, and the power."""
    beyond = torch.arange(x.shape[2], device=x.device) >= lengths[:, None]
    peak = x.float().masked_fill(beyond[:, None, :, None], 0).abs().amax((2, 3))
    power = (14 - torch.frexp(peak).exponent).clamp(-100, 100)
    return x * torch.exp2(power.float())[..., None, None], power.flatten().float()


def _factors(power_a: Tensor, power_b: Tensor, power: Tensor) -> Tensor:
    """What undoes the powers of two, `(maps, 5)`: factors of x, dA, dB, and dC and dD; and the power of P and T."""
    powers = torch.stack((power_a + power_b, power + power_b, power + power_a, power, power), -1)
    powers[:, :4].neg_().exp2_()
    return powers


def supported(*tensors: Tensor) -> bool:
    """Whether the kernels can work on these: float32, bfloat16 or float16, up to 256 wide, on NVIDIA's newer cards."""
    device = tensors[0].device
    # From compute capability 8.0 on, NVIDIA's cards have tensor cores for all three dtypes.
    return (
        INTERPRETED.value
        or (device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0))
    ) and all(x.dtype in (torch.float32, torch.bfloat16, torch.float16) and 0 < x.shape[-1] <= 256 for x in tensors)
