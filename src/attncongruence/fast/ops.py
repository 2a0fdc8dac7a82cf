"""What the two differentiable operators share: one derivative, not two, and `torch.func.vmap` as a larger batch."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import Function


class Batched(Function):
    """A function whose first `tensors` arguments and all of whose results have the batch in front."""

    tensors: int

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """The mapped dimension is folded into the batch."""
        size, folded = info.batch_size, []
        for x, dim in zip(args[: cls.tensors], in_dims[: cls.tensors], strict=True):
            folded.append((x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1))
        results = cls.apply(*folded, *args[cls.tensors :])
        return tuple(x.unflatten(0, (size, x.shape[0] // size)) for x in results), (0,) * len(results)


def refuse_second_derivative() -> NoReturn:
    """What the backward of a backward pass does."""
    raise RuntimeError(
        "the streaming form has no second derivative (create_graph=True, gradient penalties, Hessians): "
        "use impl='dense', which has"
    )


class Once(Function):
    """A gradient, tied to its input so that a second derivative is refused instead of taken for 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, x: Tensor) -> Tensor:
        """`grad` itself."""
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Refused."""
        refuse_second_derivative()


class FirstDerivativeOnly(Function):
    """`x` itself, whose gradient has no derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """`x` itself."""
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keep what the gradient is tied to."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Once."""
        return Once.apply(*grads, *ctx.saved_tensors)


def first_derivative_only(x: Tensor) -> Tensor:
    """See `FirstDerivativeOnly`."""
    guarded: Tensor = FirstDerivativeOnly.apply(x)
    return guarded


def wants_grad(*tensors: Tensor) -> bool:
    """Whether a gradient may be asked for."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def kernels(*tensors: Tensor) -> bool:
    """Whether the Triton kernels can work on these tensors."""
    if not all(x.is_cuda for x in tensors):
        return False
    try:
        from attncongruence.fast import triton
    except ImportError:  # PyTorch without Triton, as on Windows
        return False
    return triton.supported(*tensors)
