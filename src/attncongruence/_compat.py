"""Every private part of another library that is used, what it stands for, and what happens where it is gone.

A private part may move with any release. It is looked up here, once, and looking never raises. Most have a plain
replacement; capture cannot be right without the rest, and says so when it is made (`check`), never in a forward pass.
`tests/test_compat.py` holds each entry to its docstring, on every version that is tested.
"""

from __future__ import annotations

import copy
import math
import operator
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

TORCH = "2.6 to 2.15"
"""The versions of torch that this module was held to."""


def _part(path: str) -> Any:
    """A part of torch by its path; None where it is gone."""
    try:
        return operator.attrgetter(path)(torch)
    except AttributeError:
        return None


# torch: the modes that see functions


_get_modes = _part("overrides._get_current_function_mode_stack")


def function_modes() -> list[TorchFunctionMode]:
    """The function modes that are on in this thread, the last one innermost.

    Modes are switched on and off in public (`TorchFunctionMode.__enter__`, `__exit__`), but only the stack tells which
    one an exit would take off: one that an interrupt left behind must not cost the user theirs. Gone: capture is
    refused by `check`.
    """
    return list(_get_modes())


def _without_dispatch(function: Any) -> Any:
    code = getattr(function, "__code__", None)
    if code is None or "has_torch_function" not in code.co_names or "has_torch_function" not in function.__globals__:
        return None
    blind = {**function.__globals__, "has_torch_function": lambda _: False}
    body = types.FunctionType(code, blind, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


mha_body = _without_dispatch(F.multi_head_attention_forward)
"""`F.multi_head_attention_forward` that does not hand itself to a mode before it does anything.

A mode is off inside its own handler, so the handler would see nothing of what attends in there. The same code, with a
`has_torch_function` that says no, runs its body, softmax and all, under the mode. Gone (no Python function, or another
way to dispatch): None, and capture is refused by `check`.
"""


# torch: autograd


_graph_task = _part("_C._current_graph_task_id")


def in_backward() -> bool:
    """Whether this thread runs a backward pass, as checkpointing does when it calls forward again.

    Gone: capture is refused by `check`. Without it a recomputed layer would count twice.
    """
    return bool(_graph_task() >= 0)


_has_version = hasattr(Tensor, "_version")


def version(tensor: Tensor) -> float:
    """How often a tensor was written to in place; inference tensors have no such count, and train nothing: 0.

    Gone: NaN, which equals no other. Every tensor counts as written to since, so scores that a model computes by
    itself are captured as they are, and their queries and keys are not offered.
    """
    if not _has_version:
        return math.nan
    return 0 if tensor.is_inference() else tensor._version


# torch: the streaming form


_is_wrapped, _is_mapped, _unwrapped = (
    _part(f"_C._functorch.{name}") for name in ("is_functorch_wrapped_tensor", "is_batchedtensor", "get_unwrapped")
)
_softmax_grad = _part("ops.aten._softmax_backward_data.out")
_log_softmax_grad = _part("ops.aten._log_softmax_backward_data")


def mapped(x: Tensor) -> bool:
    """Whether `torch.func.vmap` maps this tensor, so that its values cannot be read.

    Gone: False, and reading the values of a mapped tensor raises torch's own error.
    """
    if torch.compiler.is_compiling() or None in (_is_wrapped, _is_mapped, _unwrapped):  # compilers cannot trace it
        return False
    while _is_wrapped(x):
        if _is_mapped(x):
            return True
        x = _unwrapped(x)
    return False


def softmax_grad(grad: Tensor, P: Tensor, out: Tensor) -> Tensor:
    """Gradient of the logits of `P = softmax(logits)` over the last dimension, written to `out`.

    Autograd's own kernel, in one pass over a tile. Gone: the formula, in three.
    """
    if _softmax_grad is None:
        # P_j (g_j - sum_k P_k g_k)
        return torch.mul(P, grad - torch.linalg.vecdot(P, grad)[..., None], out=out)
    result: Tensor = _softmax_grad(grad, P, -1, P.dtype, grad_input=out)
    return result


def log_softmax_grad(grad: Tensor, log_P: Tensor) -> Tensor:
    """Gradient of the logits of `log_P = log_softmax(logits)` over the last dimension. Gone: likewise."""
    if _log_softmax_grad is None:
        # g_j - P_j sum_k g_k
        return grad - log_P.exp() * grad.sum(-1, keepdim=True)
    result: Tensor = _log_softmax_grad(grad, log_P, -1, log_P.dtype)
    return result


# torch: compile


_set_eval_frame = _part("_C._dynamo.eval_frame.set_eval_frame")


def set_compiler(callback: Any) -> Any:
    """Sets what compiles this thread's next frames (None: nothing does), and returns what did before.

    `torch.compiler.set_stance("force_eager")` is public and raises inside of a compiled call, where the pass that
    looks for layers is. Gone: layers by number are refused by `check`, named layers need no such pass.
    """
    return _set_eval_frame(callback)


def skip_frame(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a function that `torch.compile` must neither trace nor compile, though it does what the function calls.

    Gone: `torch.compiler.disable(recursive=False)`. It means the same, but returns another function.
    """
    try:
        from torch._dynamo.decorators import skip
    except ImportError:
        return torch.compiler.disable(function, recursive=False)  # type: ignore[no-any-return]
    skip(function)
    return function


COMPILED = "_orig_mod"
"""Where `torch.compile(module)` keeps the module. Gone: the wrapper is watched like any other model."""

WRAPPERS = (COMPILED, "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names that `torch.compile`, FSDP and checkpoint wrappers put between a model and its modules; nobody types them.

Gone: layers are called by their longer names there. A name without them matches nothing, and the error lists them.
"""

_WHOLE = {
    "torch.nn.parallel.DistributedDataParallel": "module",
    "deepspeed.runtime.engine.DeepSpeedEngine": "module",
    "lightning.fabric.wrappers._FabricModule": "_forward_module",
    "lightning_fabric.wrappers._FabricModule": "_forward_module",
    "peft.PeftModel": "base_model",
    "peft.PeftMixedModel": "base_model",
    "peft.tuners.tuners_utils.BaseTuner": "model",
}


def wrapped_at(module: nn.Module) -> str | None:
    """The name under which a wrapper keeps the module that it wraps; None: it is no wrapper.

    A user's own `base_model` is a part of the user's model: the class decides. Gone: as for `COMPILED` and `WRAPPERS`.
    """
    children = dict(module.named_children())
    for path, name in _WHOLE.items():
        library, _, kind = path.rpartition(".")
        if name in children and isinstance(module, getattr(sys.modules.get(library), kind, ())):
            return name
    return next((name for name in WRAPPERS if name in children), None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's model inside wrappers that call it as a whole: DDP, DeepSpeed, `torch.compile`, Fabric, PEFT."""
    name = wrapped_at(model)
    if name is None or name in WRAPPERS[1:]:  # FSDP gathers parameters for its own module
        return model
    return unwrapped(model.get_submodule(name))


# torch: modules


def is_replica(module: nn.Module) -> bool:
    """Whether `torch.nn.DataParallel` made this module, for one step.

    Gone: False. `capture_attention(DataParallel(model))` is refused all the same; hooks that came first ignore a
    replica of their layer, and `pop()` says that nothing was captured, or that several records wait.
    """
    return bool(getattr(module, "_is_replica", False))


def hooks_of(module: nn.Module) -> list[Any]:
    """A module's forward hooks. Gone: none, and the doctor does not check that its own are off again."""
    return [h for name in ("_forward_hooks", "_forward_pre_hooks") for h in getattr(module, name, {}).values()]


# torch: what cannot be done without


def check(*, by_number: bool = False) -> None:
    """Says that capture cannot work with this torch, before anything runs.

    Args:
        by_number: layers are asked for by number, so that they must be found first.

    Raises:
        RuntimeError: a part that it needs is gone; which one, and which versions have it.
    """
    parts = {
        "torch.overrides._get_current_function_mode_stack": _get_modes,
        "torch._C._current_graph_task_id": _graph_task,
        "the Python body of torch.nn.functional.multi_head_attention_forward": mha_body,
    }
    remedy = ""
    if by_number:
        parts["torch._C._dynamo.eval_frame.set_eval_frame"] = _set_eval_frame
        remedy = "name the layers, layers='...'; or " if all(list(parts.values())[:3]) else ""
    if gone := [name for name, part in parts.items() if part is None]:
        raise RuntimeError(
            f"capture needs {' and '.join(gone)}, and torch {torch.__version__} does not have it. Either {remedy}"
            f"install torch {TORCH}, with which this attncongruence works, or a later attncongruence."
        )


# transformers


_KERNEL = "_attn_implementation_internal"


def kernel_of(config: object) -> str | None:
    """The attention kernel that a configuration of transformers names; None: eager, none named, or no such object.

    `_attn_implementation`, which models read, is a property in front of this. Gone: None, so that hidden kernels
    (flash, flex) stay hidden, and `pop()` says that nothing was captured and which kernels can be seen.
    """
    kernel = getattr(config, "__dict__", {}).get(_KERNEL)
    return kernel if isinstance(kernel, str) else None


def with_kernel(config: Any, kernel: str) -> Any:
    """A copy of a configuration that names another kernel.

    Not through the property, which would also rename the kernel of configurations inside this one. Only for those that
    `kernel_of` knows.
    """
    private = copy.copy(config)
    private.__dict__[_KERNEL] = kernel
    return private


class Kernels(NamedTuple):
    """transformers' tables: attention kernels by name, and how each of them wants its mask."""

    attention: Any
    masks: Any


def kernels() -> Kernels | None:
    """The tables that models look their kernels up in, where transformers is loaded and has both (4.53 and later).

    `AttentionInterface.register` is public, but a kernel that a user has put into the table itself is found there
    alone. Gone: None, and hidden kernels stay hidden, as for `kernel_of`. Before 4.53 there is no mask to go with a
    kernel of another name, and a mask must not be dropped.
    """
    modeling, masking = (sys.modules.get(f"transformers.{name}") for name in ("modeling_utils", "masking_utils"))
    attention = getattr(modeling, "ALL_ATTENTION_FUNCTIONS", None)
    masks = getattr(masking, "ALL_MASK_ATTENTION_FUNCTIONS", None)
    return None if attention is None or masks is None else Kernels(attention, masks)


def exportable_state() -> type:
    """The class whose children's `state()` `Trainer` keeps in checkpoints (transformers 4.42 and later).

    Gone: a class of no meaning. A run that is resumed then goes on at Trainer's own step.
    """
    from transformers import trainer_callback

    return getattr(trainer_callback, "ExportableState", type("NotExported", (), {}))


def trainer_of(callback: object) -> Any:
    """The trainer that calls a callback right now: of all objects on the call stack, the one that has it among its own.

    Trainer passes the model to its callbacks, and not itself. Gone: None, and the callback refuses to train.
    """
    frame = sys._getframe()
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        owner = frame.f_locals.get("self")
        callbacks = getattr(getattr(owner, "callback_handler", None), "callbacks", ())
        if any(one is callback for one in callbacks):
            return owner
    return None
