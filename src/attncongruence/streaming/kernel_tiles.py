# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What the GPU kernels share: loading a tile, multiplying two, how large they are, and their launch."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from triton.language import constexpr

LOG2E, LN2 = constexpr(math.log2(math.e)), constexpr(math.log(2))
# Below any score, yet finite, so that the difference of two is not NaN.
NONE = constexpr(-1e30)


@triton.jit
def tile(matrix, rows, count, WIDTH: constexpr, PADDED: constexpr, MASKED: constexpr):
    """Some rows of a matrix `(count, WIDTH)` as `(rows, PADDED)`, filled up with zeros."""
    columns = tl.arange(0, PADDED)
    pointers = matrix + rows[:, None] * WIDTH + columns[None, :]
    if MASKED:
        values = tl.load(pointers, mask=(rows < count)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    elif WIDTH < PADDED:
        values = tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        values = tl.load(pointers)
    return values


# Under TRITON_INTERPRET=1 kernels run in Python, on any device.
INTERPRETED = constexpr(not isinstance(tile, triton.JITFunction))


@triton.jit
def rounded(x, like):
    """A float32 tile in another one's dtype, to the nearest."""
    if INTERPRETED and like.dtype == tl.bfloat16:
        # The interpreter rounds toward 0. Carry half a unit into the first 16 bits, ties to even, and drop the others.
        bits = x.to(tl.int32, bitcast=True)
        x = (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).to(tl.float32, bitcast=True)
    return x.to(like.dtype)


@triton.jit
def here(lengths, heads, n, WIDTH: constexpr, ROWS: constexpr):
    """A program's map: its number, offset, and count of the sample's own rows. Then the first and all of its ROWS."""
    index = tl.program_id(0) // tl.cdiv(n, ROWS)
    start = tl.program_id(0) % tl.cdiv(n, ROWS) * ROWS
    count = tl.load(lengths + index // heads).to(tl.int32)
    return index, index.to(tl.int64) * n * WIDTH, count, start, start + tl.arange(0, ROWS)


@triton.jit
def product(a, b, PRECISION: constexpr):
    """`a @ b` in float32."""
    if INTERPRETED and a.dtype != tl.float32:
        # The interpreter reads bfloat16 as 16-bit integers, and its sums come from a BLAS whose order depends on CPU,
        # shape and which side is transposed. Two kernels would get different scores (by 0.1 where a score is 1e6),
        # and a softmax a wrong normalizer. In float64 the order does not matter.
        x = a.to(tl.float32).to(tl.float64)[:, :, None] * b.to(tl.float32).to(tl.float64)[None, :, :]
        c = tl.sum(x, 1).to(tl.float32)
    else:
        c = tl.dot(a, b, input_precision=PRECISION)
    return c


# Rows of a program by columns of a step, warps, stages, for each kind of kernel, precision and padded width. Chosen by
# what the compiler reports for sm_80 and sm_90: shared memory within 99 KB, which all cards from Ampere on have, and
# registers that suffice (at worst 200 bytes of a thread spill over). Gradients of narrow maps spend as long on
# exponentials as on products, and with 4 warps there is room for two programs that overlap them.
BLOCKS = {
    ("statistics", "half"): {32: (128, 64, 8, 3), 64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (32, 32, 8, 2)},
    ("statistics", "tf32"): {32: (64, 32, 4, 2), 64: (64, 32, 4, 2), 128: (32, 32, 4, 2), 256: (16, 16, 4, 1)},
    ("statistics", "ieee"): {32: (32, 32, 4, 2), 64: (32, 32, 4, 2), 128: (32, 16, 4, 2), 256: (16, 16, 8, 2)},
    ("gradients", "half"): {32: (64, 64, 4, 3), 64: (64, 64, 4, 3), 128: (128, 32, 8, 2), 256: (32, 32, 8, 2)},
    ("gradients", "tf32"): {32: (64, 32, 4, 2), 64: (64, 32, 4, 2), 128: (32, 32, 4, 2), 256: (16, 16, 4, 1)},
    ("gradients", "ieee"): {32: (32, 32, 4, 2), 64: (32, 32, 4, 2), 128: (32, 16, 4, 2), 256: (16, 16, 8, 2)},
    ("mean", "half"): {32: (128, 128, 8, 3), 64: (128, 128, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 4, 2)},
    ("mean", "tf32"): {32: (64, 32, 4, 2), 64: (64, 32, 4, 2), 128: (32, 32, 4, 2), 256: (16, 16, 4, 1)},
    ("mean", "ieee"): {32: (32, 32, 4, 2), 64: (32, 32, 4, 2), 128: (32, 16, 4, 2), 256: (16, 16, 8, 2)},
    ("mean_grad", "half"): {32: (64, 32, 4, 3), 64: (128, 32, 8, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 2)},
    ("mean_grad", "tf32"): {32: (64, 32, 4, 2), 64: (64, 32, 4, 2), 128: (32, 32, 8, 2), 256: (16, 16, 4, 1)},
    ("mean_grad", "ieee"): {32: (32, 16, 4, 2), 64: (32, 16, 4, 2), 128: (16, 16, 4, 2), 256: (16, 16, 8, 2)},
}


def settings(kernel: str, dtype: torch.dtype, width: int) -> tuple[int, int, dict[str, Any]]:
    """Rows and columns of a tile, and the options of a kernel."""
    matmul = torch.backends.cuda.matmul
    # Newer PyTorch has another switch, and once that was set, reading this one raises.
    switch = getattr(matmul, "fp32_precision", None)
    precision = "tf32" if (matmul.allow_tf32 if switch is None else switch == "tf32") else "ieee"
    padded = max(16, triton.next_power_of_2(width))
    own, other, warps, stages = BLOCKS[kernel, precision if dtype == torch.float32 else "half"][max(32, padded)]
    options = {"WIDTH": width, "PADDED": padded, "PRECISION": precision, "num_warps": warps, "num_stages": stages}
    # Without fused multiply-adds (the default of a later Triton) the kernels would be slower and no more exact.
    return own, other, {**options, "enable_fp_fusion": True}


def launch(kernel: Any, kind: str, grid: tuple[int, int, int], first: Tensor, *rest: Any, **more: Any) -> None:
    """Run a kernel, with the settings of its kind, over so many maps of so many rows and columns."""
    maps, n_rows, n_columns = grid
    rows, columns, options = settings(kind, first.dtype, first.shape[-1])
    programs = maps * triton.cdiv(n_rows, rows) * triton.cdiv(n_columns, columns)
    if programs:
        with torch.cuda.device_of(first):
            kernel[(programs,)](first, *rest, ROWS=rows, COLUMNS=columns, **more, **options)
