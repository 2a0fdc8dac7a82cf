"""Maps are computed in tiles that fit the device's cache. Here: the tiles, and the row divergences of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from attncongruence.divergence import distributed_kl, distributed_kl_grad

FiveTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Target = Literal["softmax", "log", "distributed"]
"""What F G^T is compared with: softmax(T), T itself as a distribution, or T by IAIS's distributed formula."""
# Longer tiles make matrix products no faster (docs/performance.md).
LONGEST = 512


def _cache_of_cpu() -> int:
    for level in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE"):
        size = os.sysconf(level) if level in getattr(os, "sysconf_names", {}) else 0
        if size > 0:
            # A server reports one cache for all of its cores, of which this process may have few.
            return min(size, 32 * 2**20) // 2
    return 8 * 2**20


_CACHE_OF_CPU = _cache_of_cpu()


def cache_bytes(device: torch.device) -> int:
    """How large the working set of a tile may be: half of the last cache level, which all cores share."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return _CACHE_OF_CPU


class Tiles:
    """How maps of `(maps, n, n)` are cut: some rows of one map at a time, or all rows of several.

    Args:
        maps: how many maps there are.
        n: rows and columns of each.
        buffers: tiles in use at a time; each gets memory of its own, once.
        like: a tensor of the wanted dtype and device.
    """

    def __init__(self, maps: int, n: int, buffers: int, like: Tensor) -> None:
        self.maps, self.n = maps, n
        entries = cache_bytes(like.device) // (buffers * like.element_size() * max(n, 1))
        self.rows = max(1, min(n, LONGEST, entries))
        self.together = max(1, min(maps, entries // self.rows))
        self._space = like.new_empty(buffers, self.together * self.rows * n)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Slices of maps and of rows, one pair for each tile."""
        for first in range(0, self.maps, self.together):
            for start in range(0, self.n, self.rows):
                yield slice(first, min(first + self.together, self.maps)), slice(start, min(start + self.rows, self.n))

    def buffers(self, maps: slice, rows: slice) -> list[Tensor]:
        """Uninitialized memory for one tile, `(maps, rows, n)`, once for each buffer."""
        shape = maps.stop - maps.start, rows.stop - rows.start, self.n
        return [space[: shape[0] * shape[1] * shape[2]].view(shape) for space in self._space]


def groups(lengths: Tensor, n: int) -> Iterator[tuple[slice, int]]:
    """Runs of samples of one length, and that length. Samples of length 0 are left out."""
    counts = lengths.tolist() if lengths.numel() else []
    start = 0
    for i in range(1, len(counts) + 1):
        if i == len(counts) or counts[i] != counts[start]:
            if counts[start]:
                yield slice(start, i), min(counts[start], n)
            start = i


Work = tuple[Tensor, Tensor, Tensor]


def divergence(
    x: Tensor, T: Tensor, work: Work, target: Target, epsilon: float, beyond: Tensor | None = None
) -> Tensor:
    """Per-row divergence of `x = F G^T` from T, `(maps, rows, n)` to `(maps, rows)`; overwrites x, keeps T.

    Args:
        x: rows of F G^T; T: the same rows of the head-mean map.
        work: three more tiles.
        target: the formula, with its epsilon.
        beyond: True at columns beyond a sample's own; None: there are none.
    """
    return distributed_kl(x, T, epsilon) if target == "distributed" else tile_m_kl(*_logits(x, T, work, beyond))


def divergence_grad(
    x: Tensor, T: Tensor, work: Work, target: Target, epsilon: float, weight: Tensor, beyond: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient of `divergence`, times `weight`, with respect to x and T."""
    if target == "distributed":
        dx, dT = distributed_kl_grad(x, T, epsilon)
        return dx.mul_(weight), dT.mul_(weight)
    tiles = _logits(x, T, work, beyond)
    dx, minus_dT = tile_m_kl_grad(*tiles, tile_m_kl(*tiles))
    return dx.mul_(weight), minus_dT.mul_(-weight)


def _logits(x: Tensor, T: Tensor, work: Work, beyond: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, P, Q = work
    y.copy_(T)
    if beyond is not None:
        floor = torch.finfo(x.dtype).min / 2
        x.masked_fill_(beyond, floor)
        y.masked_fill_(beyond, floor)
    return x, y, P, Q


def tile_m_kl(x: Tensor, y: Tensor, P: Tensor, T: Tensor) -> Tensor:
    """Per-row m-KL(softmax(x), softmax(y)), Eq. 4, `(maps, rows, n)` to `(maps, rows)`, in these four tiles alone.

    Afterwards `x` is `d - mu`, `y` is `P - T`, and `P` and `T` are the softmaxes, which is `tile_m_kl_grad` needs.
    """
    torch.softmax(x, -1, out=P)
    torch.softmax(y, -1, out=T)
    # d = x - y, mu = sum_j P_j d_j
    d = x.sub_(y)
    d.sub_(torch.linalg.vecdot(P, d)[..., None])
    # sum_j (P_j - T_j) d_j, where a constant in d does not count
    rows: Tensor = torch.linalg.vecdot(torch.sub(P, T, out=y), d)
    return rows


def tile_m_kl_grad(x: Tensor, y: Tensor, P: Tensor, T: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the rows' losses, from what `tile_m_kl` left: with respect to x, and minus that with respect to y."""
    d, difference = x, y
    # dx_j = P_j (d_j - mu) + (P_j - T_j)
    P.mul_(d).add_(difference)
    # -dy_j = T_j (d_j - nu) + (P_j - T_j), nu = sum_j T_j d_j = mu - loss
    T.mul_(d.add_(loss[..., None])).add_(difference)
    return P, T
