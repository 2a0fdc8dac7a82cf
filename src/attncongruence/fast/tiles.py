"""Maps worked on a tile at a time, as much as the device's cache holds, and the row divergences of a tile."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import torch
from torch import Tensor

# Longer tiles make matrix products no faster (docs/performance.md).
LONGEST = 512


@functools.cache
def cache_bytes(device: torch.device) -> int:
    """What the working set of a tile may fill: half of the last cache level, which all cores share."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    for level in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE"):
        size = os.sysconf(level) if level in getattr(os, "sysconf_names", {}) else 0
        if size > 0:
            # A server reports one cache for all of its cores, of which this process may have few.
            return min(size, 32 * 2**20) // 2
    return 8 * 2**20


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
        """Which maps, which rows."""
        for first in range(0, self.maps, self.together):
            for start in range(0, self.n, self.rows):
                yield slice(first, min(first + self.together, self.maps)), slice(start, min(start + self.rows, self.n))

    def buffers(self, maps: slice, rows: slice) -> list[Tensor]:
        """Uninitialised memory for one tile, `(maps, rows, n)`, as often as it was asked for."""
        shape = maps.stop - maps.start, rows.stop - rows.start, self.n
        return [space[: shape[0] * shape[1] * shape[2]].view(shape) for space in self._space]


def groups(lengths: Tensor, n: int) -> Iterator[tuple[slice, int]]:
    """Samples of one length, next to each other: which samples, how long; samples of length 0 are left out."""
    counts = lengths.tolist() if lengths.numel() else []
    start = 0
    for i in range(1, len(counts) + 1):
        if i == len(counts) or counts[i] != counts[start]:
            if counts[start]:
                yield slice(start, i), min(counts[start], n)
            start = i


def m_kl(x: Tensor, y: Tensor, P: Tensor, T: Tensor) -> Tensor:
    """Rows of m-KL(softmax(x), softmax(y)), Eq. 4, `(maps, rows, n)` to `(maps, rows)`; no tile but these four.

    Afterwards `x` is `d - mu`, `y` is `P - T`, and `P` and `T` are the softmaxes: what `m_kl_grad` wants.
    """
    torch.softmax(x, -1, out=P)
    torch.softmax(y, -1, out=T)
    # d = x - y, mu = sum_j P_j d_j
    d = x.sub_(y)
    d.sub_(torch.linalg.vecdot(P, d)[..., None])
    # sum_j (P_j - T_j) d_j, where a constant in d does not count
    rows: Tensor = torch.linalg.vecdot(torch.sub(P, T, out=y), d)
    return rows


def m_kl_grad(x: Tensor, y: Tensor, P: Tensor, T: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the rows' losses, from what `m_kl` left: with respect to x, and minus that with respect to y."""
    d, difference = x, y
    # dx_j = P_j (d_j - mu) + (P_j - T_j)
    P.mul_(d).add_(difference)
    # -dy_j = T_j (d_j - nu) + (P_j - T_j), nu = sum_j T_j d_j = mu - loss
    T.mul_(d.add_(loss[..., None])).add_(difference)
    return P, T
