"""Kernels that no torch function shows (flash, flex): seen where transformers calls them, in its AttentionInterface.

While a watched module runs, its configuration is a private copy that names our function. That one notes queries, keys
and mask, puts the module's own configuration back and calls the kernel it stands for. Between two forward passes, in
other modules and after `close()` nothing is different.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attncongruence import _compat
from attncongruence.capture.hooks import nothing
from attncongruence.capture.mode import AttentionMode, push_mode, remove_mode
from attncongruence.capture.seen import Seen

_VISIBLE = ("eager", "sdpa")
_SUFFIX = "_seen_by_attncongruence"


def show_kernel(module: nn.Module) -> Callable[[], None]:
    """Makes a hidden kernel of this module visible until the returned function is called.

    Args:
        module: an attention module; any other is left alone.

    Returns:
        A function that puts everything back; calling it again does nothing.
    """
    config = module.__dict__.get("config")
    kernel, tables = _compat.kernel_of(config), _compat.kernels()
    if kernel is None or tables is None or kernel in _VISIBLE or kernel not in tables.attention:
        return nothing
    private = module.__dict__["config"] = _compat.with_kernel(config, _registered(kernel))

    def restore() -> None:
        if module.__dict__.get("config") is private:
            module.__dict__["config"] = config

    private.__dict__["_attncongruence_restore"] = restore
    return restore


@functools.cache
def _registered(kernel: str) -> str:
    """Registers, once, the function that stands for a kernel, and the kernel's own masks under the same name."""
    tables = _compat.kernels()
    assert tables is not None, "show_kernel has seen them"

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        module.__dict__["config"].__dict__["_attncongruence_restore"]()
        call = functools.partial(tables.attention[kernel], module, query, key, value, mask, *args, **kwargs)
        # Off for the mask of flex attention, and while it runs: compiled, it would be compiled anew for each new mode.
        modes = [mode for mode in _compat.function_modes() if isinstance(mode, AttentionMode)]
        for mode in modes:
            remove_mode(mode)
        seen = _seen(module, query, key, mask, kwargs)
        if seen is not None:
            for mode in modes:
                mode.sink(seen)
            result = call()
        for mode in modes:
            push_mode(mode)
        return call() if seen is None else result

    name = f"{kernel}{_SUFFIX}"
    tables.attention.register(name, forward)
    if kernel in tables.masks:
        tables.masks.register(name, tables.masks[kernel])
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

    return create_mask(mask_mod, query.shape[0], None, query.shape[-2], keys, device=str(query.device))
