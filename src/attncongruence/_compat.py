"""Every private part of another library that is used here, with what happens where it is gone."""

from __future__ import annotations

import torch
from torch import Tensor


def mapped(x: Tensor) -> bool:
    """Whether `torch.func.vmap` maps this tensor, so that its values cannot be read.

    Stands for `torch._C._functorch`, which has no public counterpart. Where that is gone: False, and reading the values
    of a mapped tensor raises torch's own error.
    """
    if torch.compiler.is_compiling():  # which cannot trace the question
        return False
    try:
        from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
    except ImportError:
        return False
    while is_functorch_wrapped_tensor(x):
        if is_batchedtensor(x):
            return True
        x = get_unwrapped(x)
    return False


def softmax_grad(grad: Tensor, P: Tensor, out: Tensor) -> Tensor:
    """Gradient of the logits of `P = softmax(logits)` over the last dimension, written to `out`.

    Stands for autograd's own kernel, one pass over a tile. Where that is gone: the formula, in three.
    """
    try:
        kernel = torch.ops.aten._softmax_backward_data.out
    except AttributeError:
        # P_j (g_j - sum_k P_k g_k)
        return torch.mul(P, grad - torch.linalg.vecdot(P, grad)[..., None], out=out)
    result: Tensor = kernel(grad, P, -1, P.dtype, grad_input=out)
    return result


def log_softmax_grad(grad: Tensor, log_P: Tensor) -> Tensor:
    """Gradient of the logits of `log_P = log_softmax(logits)` over the last dimension; likewise."""
    try:
        kernel = torch.ops.aten._log_softmax_backward_data
    except AttributeError:
        # g_j - P_j sum_k g_k
        return grad - log_P.exp() * grad.sum(-1, keepdim=True)
    result: Tensor = kernel(grad, log_P, -1, log_P.dtype)
    return result
