"""Kernels that no torch function shows (flash, flex): seen where transformers calls them, in its AttentionInterface.

While a watched module runs, its configuration is a private copy that names our function. That one notes queries, keys
and mask, puts the module's own configuration back and calls the kernel it stands for. Between two forward passes, in
other modules and after `close()` nothing is different.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack, _push_mode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attncongruence.capture.hooks import nothing
from attncongruence.capture.mode import AttentionMode, remove_mode
from attncongruence.capture.seen import Seen

_VISIBLE = (None, "eager", "sdpa")
_SUFFIX = "_seen_by_attncongruence"


def show_kernel(module: nn.Module) -> Callable[[], None]:
    """Makes a hidden kernel of this module visible until the returned function is called.

    Args:
        module: an attention module; any other is left alone.

    Returns:
        A function that puts everything back; calling it again does nothing.
    """
    config = module.__dict__.get("config")
    kernel = getattr(config, "_attn_implementation", None)
    if kernel in _VISIBLE or kernel not in ALL_ATTENTION_FUNCTIONS:
        return nothing
    private = copy.copy(config)
    # Not through the property, which would also rename the kernel of configurations inside this one.
    private.__dict__["_attn_implementation_internal"] = _registered(str(kernel))
    module.__dict__["config"] = private

    def restore() -> None:
        if module.__dict__.get("config") is private:
            module.__dict__["config"] = config

    private.__dict__["_attncongruence_restore"] = restore
    return restore


@functools.cache
def _registered(kernel: str) -> str:
    """Registers, once, the function that stands for a kernel, and the kernel's own masks under the same name."""

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        module.__dict__["config"].__dict__["_attncongruence_restore"]()
        call = functools.partial(ALL_ATTENTION_FUNCTIONS[kernel], module, query, key, value, mask, *args, **kwargs)
        seen = _seen(module, query, key, mask, kwargs)
        if seen is None:
            return call()
        # Off while it runs: flex attention is compiled, and would be compiled anew for each new mode.
        modes = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, AttentionMode)]
        for mode in modes:
            mode.sink(seen)
            remove_mode(mode)
        result = call()
        for mode in modes:
            _push_mode(mode)
        return result

    name = f"{kernel}{_SUFFIX}"
    ALL_ATTENTION_FUNCTIONS.register(name, forward)
    if kernel in ALL_MASK_ATTENTION_FUNCTIONS:
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[kernel])
    return name


def _seen(module: nn.Module, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]) -> Seen | None:
    """The operation in capture's words, or None where it is more than scale, product and masks."""
    if options.get("s_aux") is not None or options.get("softcap") is not None or "cu_seq_lens_q" in options:
        return None
    length, keys = query.shape[-2], key.shape[-2]
    masks: list[tuple[Tensor, float]] = []
    causal = False
    if hasattr(mask, "mask_mod"):  # flex: a function of positions
        masks.append((_dense(mask.mask_mod, query, keys), 1.0))
    elif isinstance(mask, Tensor) and mask.ndim == 4:
        masks.append((mask[..., :keys], 1.0))
    else:  # flash: real keys alone, the rest in options
        if isinstance(mask, Tensor):
            masks.append((mask[:, None, None, :keys].bool(), 1.0))
        asked = options.get("is_causal")
        causal = length > 1 and bool(getattr(module, "is_causal", False) if asked is None else asked)
        if (window := options.get("sliding_window")) is not None:
            place = torch.arange(keys, device=query.device)
            near = (place[:, None] - place[None, :]).abs() < window
            masks.append((near[-length:], 1.0))
    if isinstance(bias := options.get("position_bias"), Tensor):
        masks.append((bias, 1.0))
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return Seen(query=query, key=key, scale=scale, masks=tuple(masks), causal=causal)


def _dense(mask_mod: Callable[..., Tensor], query: Tensor, keys: int) -> Tensor:
    from torch.nn.attention.flex_attention import create_mask

    with torch._C.DisableTorchFunction():
        return create_mask(mask_mod, query.shape[0], None, query.shape[-2], keys, device=str(query.device))
