"""Private parts of torch.distributed, DeepSpeed and others that tell how a model is spread over processes.

As in `_compat`: each says what happens where it is gone, and looking never raises. `tests/test_compat_distributed.py`
holds each entry to its docstring.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from torch import nn
from torch.nn import functional as F

from attncongruence import _compat


def placement(node: Any) -> Any:
    """Of an autograd node that made a plain tensor of a DTensor: how that one lay over processes; else None.

    Its `mesh`, `placements` and (global) `shape`. Gone: None.
    """
    return getattr(node, "dtensor_spec", None) if type(node).__name__ == "_ToTorchTensorBackward" else None


def shows_placements() -> bool:
    """Whether `placement` can be known. Gone: False, and layers with DTensor weights are refused."""
    return _compat.part("distributed.tensor._api._ToTorchTensor") is not None


def collectives() -> dict[str, int]:
    """How many operations this process has taken part in, in each group of processes.

    Gone, or not counted by a backend: no such group. A layer that speaks to other processes is then not refused.
    """
    counts = {}
    for group in list(_compat.part("distributed.distributed_c10d._world.pg_map") or ()):
        with contextlib.suppress(AttributeError, RuntimeError):
            if group.size() > 1:
                counts[group.group_name] = group._get_sequence_number_for_group()
    return counts


def cuts_sequences() -> str:
    """What spreads each sequence over processes at the moment; "" where nothing is known to.

    Gone: "", and a layer is refused only where it is seen to speak to other processes.
    """
    patched = str(getattr(F.scaled_dot_product_attention, "__module__", ""))
    handlers = getattr(_compat.part("distributed.tensor.DTensor._op_dispatcher"), "_custom_op_handlers", {})
    if (
        patched.startswith("torch.distributed.")
        or _compat.part("ops.aten._scaled_dot_product_flash_attention.default") in handlers
    ):
        return "context parallelism of torch (torch.distributed.tensor.experimental.context_parallel)"
    deepspeed = sys.modules.get("deepspeed.runtime.sequence_parallel.parallel_state_sp")
    return "" if getattr(deepspeed, "_SEQUENCE_PARALLEL_GROUP", None) is None else "sequence parallelism of DeepSpeed"


def splits_heads(module: nn.Module) -> str:
    """Which library has split a module over processes and left only a mark; "" where none has.

    Plans of transformers that begin with "local" keep plain parts of weights, as Megatron and DeepSpeed do. Gone: "",
    and a layer is refused only where it is seen to speak to other processes.
    """
    for part in module.modules():
        if type(part).__module__.startswith("deepspeed.sequence"):
            return f"{type(part).__name__} of DeepSpeed"
        if getattr(part, "_hf_tp_plan", "replicate") != "replicate":
            return "the tensor parallel plan of transformers"
    return "tensor parallelism" if any(getattr(p, "tensor_model_parallel", False) for p in module.parameters()) else ""


def fsdp_weights(model: nn.Module) -> set[int]:
    """Ids of the parameters that are whole but for FSDP2, which gathers them to run.

    Gone: none, and a compiled layer under FSDP2 is refused, as is one without gradients.
    """
    found = set()
    with contextlib.suppress(AttributeError):
        for state in (part._get_fsdp_state() for part in model.modules() if hasattr(part, "_get_fsdp_state")):  # type: ignore[operator]
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for weight in (weight for group in groups if group is not None for weight in group.fsdp_params):
                info = weight._module_info
                found |= set() if weight.is_dtensor else {id(getattr(info.module, info.param_name))}
    return found


def zero3(module: nn.Module) -> bool:
    """Whether ZeRO-3 of DeepSpeed gathers a module's weights while it runs. Gone: False, and it is refused."""
    return any(hasattr(p, "ds_id") for p in module.parameters())
