"""What the operators share: a first derivative but no second one, and `torch.func.vmap` as a larger batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from attncongruence._compat import mapped


def batched(op: Any, tensors: int) -> None:
    """Teach `torch.func.vmap` an operator: the mapped dimension is folded into the batch.

    Args:
        op: of `torch.library.custom_op`; all its results are batched.
        tensors: how many of its arguments, the first ones, are batched.
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


class RefuseSecondDerivative(Function):
    """A gradient, tied to its input so that a second derivative raises an error instead of being 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, x: Tensor) -> Tensor:
        """`grad` itself."""
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keeps no tensors."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Raises: this is the backward pass of a backward pass."""
        raise RuntimeError(
            "the streaming form has no second derivative (create_graph=True, gradient penalties, Hessians): "
            "use impl='dense', which has one"
        )


class FirstDerivativeOnly(Function):
    """`x` itself, whose gradient has no derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """`x` itself."""
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keeps the input, to tie the gradient to it."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradient, whose own derivative is refused."""
        return RefuseSecondDerivative.apply(*grads, *ctx.saved_tensors)


def first_derivative_only(x: Tensor) -> Tensor:
    """`x`, whose gradient refuses to be differentiated."""
    guarded: Tensor = FirstDerivativeOnly.apply(x)
    return guarded


def wants_grad(*tensors: Tensor) -> bool:
    """Whether a gradient may be needed; True where a mapped tensor or a compiler cannot tell."""
    compiling = torch.compiler.is_compiling()
    return torch.is_grad_enabled() and (compiling or any(x.requires_grad or mapped(x) for x in tensors))


def kernels(*tensors: Tensor) -> bool:
    """Whether the Triton kernels can work on these tensors."""
    if not all(x.is_cuda for x in tensors):
        return False
    try:
        from attncongruence.streaming import low_rank_kernels
    except ImportError:  # PyTorch without Triton, as on Windows
        return False
    return low_rank_kernels.supported(*tensors)
