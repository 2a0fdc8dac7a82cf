"""What the streaming operators share: tiles that fit the cache, the divergences of one tile's rows, and autograd."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function

from attncongruence.divergence import distributed_kl, distributed_kl_grad

Work = tuple[Tensor, Tensor, Tensor]
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
    """How maps of `(maps, n, columns)` are cut: some rows of one map at a time, or all rows of several.

    Args:
        maps: how many maps there are.
        n: rows of each.
        buffers: tiles in use at a time; each gets memory of its own, once.
        like: a tensor of the wanted dtype and device.
        columns: of each; None: as many as rows.
    """

    def __init__(self, maps: int, n: int, buffers: int, like: Tensor, columns: int | None = None) -> None:
        self.maps, self.n, self.columns = maps, n, n if columns is None else columns
        entries = cache_bytes(like.device) // (buffers * like.element_size() * max(self.columns, 1))
        self.rows = max(1, min(n, LONGEST, entries))
        self.together = max(1, min(maps, entries // self.rows))
        self._space = like.new_empty(buffers, self.together * self.rows * self.columns)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Slices of maps and of rows, one pair for each tile."""
        for first in range(0, self.maps, self.together):
            for start in range(0, self.n, self.rows):
                yield slice(first, min(first + self.together, self.maps)), slice(start, min(start + self.rows, self.n))

    def buffers(self, maps: slice, rows: slice) -> list[Tensor]:
        """Uninitialized memory for one tile, `(maps, rows, columns)`, once for each buffer."""
        shape = maps.stop - maps.start, rows.stop - rows.start, self.columns
        return [space[: shape[0] * shape[1] * shape[2]].view(shape) for space in self._space]


def groups(lengths: Tensor, n: int) -> Iterator[tuple[slice, int]]:
    """Runs of samples of one length, and that length. Samples of length 0 are left out."""
    start = 0
    for length, run in itertools.groupby(lengths.tolist()):
        stop = start + len(list(run))
        if length:
            yield slice(start, stop), min(length, n)
        start = stop


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
    return distributed_kl(x, T, epsilon) if target == "distributed" else tile_kl(*_logits(x, T, work, beyond))


def divergence_grad(
    x: Tensor, T: Tensor, work: Work, target: Target, epsilon: float, beyond: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of `divergence`, times `weight`, with respect to x and T."""
    if target == "distributed":
        dx, dT = distributed_kl_grad(x, T, epsilon)
        return dx.mul_(weight), dT.mul_(weight)
    tiles = _logits(x, T, work, beyond)
    dx, minus_dT = tile_kl_grad(*tiles, tile_kl(*tiles))
    return dx.mul_(weight), minus_dT.mul_(-weight)


def _logits(x: Tensor, T: Tensor, work: Work, beyond: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, P, Q = work
    y.copy_(T)
    if beyond is not None:
        floor = torch.finfo(x.dtype).min / 2
        x.masked_fill_(beyond, floor)
        y.masked_fill_(beyond, floor)
    return x, y, P, Q


def tile_kl(x: Tensor, y: Tensor, P: Tensor, T: Tensor) -> Tensor:
    """Per-row m-KL(softmax(x), softmax(y)), Eq. 4, `(maps, rows, n)` to `(maps, rows)`, in these four tiles alone.

    Afterwards `x` is `d - mu`, `y` is `P - T`, and `P` and `T` are the softmaxes: what `tile_kl_grad` needs.
    """
    torch.softmax(x, -1, out=P)
    torch.softmax(y, -1, out=T)
    # d = x - y, mu = sum_j P_j d_j
    d = x.sub_(y)
    d.sub_(torch.linalg.vecdot(P, d)[..., None])
    # sum_j (P_j - T_j) d_j, where a constant in d does not count
    rows: Tensor = torch.linalg.vecdot(torch.sub(P, T, out=y), d)
    return rows


def tile_kl_grad(x: Tensor, y: Tensor, P: Tensor, T: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the rows' losses, from what `tile_kl` left: with respect to x, and minus that with respect to y."""
    d, difference = x, y
    # dx_j = P_j (d_j - mu) + (P_j - T_j)
    P.mul_(d).add_(difference)
    # -dy_j = T_j (d_j - nu) + (P_j - T_j), nu = sum_j T_j d_j = mu - loss
    T.mul_(d.add_(loss[..., None])).add_(difference)
    return P, T


def has_kernels(*tensors: Tensor) -> bool:
    """Whether the Triton kernels can work on these tensors."""
    if not all(x.is_cuda for x in tensors):
        return False
    try:
        from attncongruence.streaming import low_rank_kernels
    except ImportError:  # PyTorch without Triton, as on Windows
        return False
    return low_rank_kernels.supported(*tensors)


def batched(op: Any, tensors: int) -> None:
    """Teach `torch.func.vmap` an operator whose first arguments, so many tensors, and results are all batched.

    The mapped dimension is folded into the batch.
    """

    def fold(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        size, folded = info.batch_size, []
        for x, dim in zip(args[:tensors], in_dims[:tensors], strict=True):
            folded.append((x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1))
        results = op(*folded, *args[tensors:])
        if isinstance(results, Tensor):
            return results.unflatten(0, (size, -1)), 0
        return tuple(x.unflatten(0, (size, x.shape[0] // size)) for x in results), (0,) * len(results)

    op.register_vmap(fold)


def differentiable(op: Any, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Give an operator its gradient, and return what calls it with one.

    Under `torch.compile` it is the operator itself, with the formula registered. In eager mode it is an autograd
    function of the same formula, since `torch.func.grad` knows no formulas of operators.
    """
    op.register_autograd(backward, setup_context=setup_context)
    parts = {"forward": op.__call__, "setup_context": setup_context, "backward": backward}
    methods = {name: staticmethod(part) for name, part in parts.items()}
    eager = type("Differentiable", (Function,), {**methods, "generate_vmap_rule": True})

    def call(*inputs: Any) -> Any:
        return op(*inputs) if torch.compiler.is_compiling() else eager.apply(*inputs)  # type: ignore[attr-defined]

    return call


def first_derivative_only(x: Tensor) -> Tensor:
    """`x`, whose gradient refuses to be differentiated."""
    guarded: Tensor = _FirstDerivativeOnly.apply(x)
    return guarded


class _FirstDerivativeOnly(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _RefuseSecondDerivative.apply(*grads, *ctx.saved_tensors)


class _RefuseSecondDerivative(Function):
    """A gradient, tied to its input so that a second derivative raises an error instead of being 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, x: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "the streaming form has no second derivative (create_graph=True, gradient penalties, Hessians): "
            "use impl='dense', which has one"
        )
