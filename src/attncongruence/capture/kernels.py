"""Makes attention kernels of transformers visible that no torch function shows (flash, flex).

While a watched module runs, its configuration is a private copy that names our function. The function reports queries,
keys and mask to the modes that are on, puts the module's own configuration back and calls the kernel.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attncongruence import _compat
from attncongruence.capture.product import Operation
from attncongruence.capture.trace import AttentionMode, push_mode, remove_mode


def do_nothing(*args: object) -> None:
    """A callback that does nothing."""


def show_kernel(module: nn.Module) -> Callable[[], None]:
    """Makes a hidden kernel of an attention module visible until the returned function is called, once or again."""
    config = module.__dict__.get("config")
    kernel, tables = _compat.kernel_of(config), _compat.kernels()
    if kernel is None or tables is None or kernel in ("eager", "sdpa") or kernel not in tables.attention:
        return do_nothing
    private = module.__dict__["config"] = _compat.with_kernel(config, _registered(kernel))

    def restore() -> None:
        if module.__dict__.get("config") is private:
            module.__dict__["config"] = config

    private.__dict__["_attncongruence_restore"] = restore
    return restore


@functools.cache
def _registered(kernel: str) -> str:
    """Registers a function that reports the operation and calls the kernel; returns its name."""
    tables = _compat.kernels()
    assert tables is not None, "show_kernel has seen them"

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        module.__dict__["config"].__dict__["_attncongruence_restore"]()
        call = functools.partial(tables.attention[kernel], module, query, key, value, mask, *args, **kwargs)
        # Modes are off for the mask of flex attention and while it runs: it would be compiled anew for each new mode.
        modes = [mode for mode in _compat.function_modes() if isinstance(mode, AttentionMode)]
        for mode in modes:
            remove_mode(mode)
        operation = _operation(module, query, key, mask, kwargs)
        if operation is not None:
            for mode in modes:
                mode.log(operation)
            result = call()
        for mode in modes:
            push_mode(mode)
        return call() if operation is None else result

    name = f"{kernel}_seen_by_attncongruence"
    tables.attention.register(name, forward)
    if kernel in tables.masks:
        tables.masks.register(name, tables.masks[kernel])
    return name


def _operation(module: nn.Module, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]) -> Operation | None:
    """The operation of one call of a kernel; None where it is more than scale, product and masks."""
    if any(options.get(name) is not None for name in ("s_aux", "softcap", "block_table", "cache")):
        return None
    length, keys = query.shape[-2], key.shape[-2]
    causal, masks = False, []
    if hasattr(mask, "mask_mod"):  # flex: a function of positions
        from torch.nn.attention.flex_attention import create_mask

        masks.append(create_mask(mask.mask_mod, query.shape[0], None, length, keys, device=str(query.device)))
    elif isinstance(mask, Tensor) and mask.ndim == 4:
        masks.append(mask[..., :keys])
    else:  # flash: a token mask, and the rest in options
        if isinstance(mask, Tensor):
            masks.append(mask[:, None, None, :keys].bool())
        else:
            known, document = _documents(query.shape[0], length, options)
            if not known or (document is not None and length != keys):
                return None
            if document is not None:
                document = document.to(query.device)
                masks.append((document[:, None] == document) & (document > 0))
        asked = options.get("is_causal")
        causal = length > 1 and bool(getattr(module, "is_causal", False) if asked is None else asked)
        if (window := options.get("sliding_window")) is not None:
            position = torch.arange(keys, device=query.device)
            near = (position[:, None] - position[None, :]).abs() < window
            masks.append(near[-length:])
    if isinstance(bias := options.get("position_bias"), Tensor):
        masks.append(bias)
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return Operation(query, key, scale, tuple((mask, 1.0) for mask in masks), causal)


def _documents(batch: int, length: int, options: dict[str, Any]) -> tuple[bool, Tensor | None]:
    """Whether it is known, and to which document of a packed row each position belongs, from 1 on, 0: to none.

    None instead of numbers: there is one document. As transformers' flash attention has it (its
    `modeling_flash_attention_utils`): by `cu_seq_lens`, if all of them came; else, in a batch of one, where
    `position_ids` start again.
    """
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    if all(options.get(name) is not None for name in names):
        ends, of_keys = options[names[0]], options[names[1]]
        if batch != 1 or (ends is not of_keys and not torch.equal(ends, of_keys)):
            return False, None
        places = torch.arange(length, device=ends.device)
        document = torch.bucketize(places, ends.to(places.dtype), right=True)
        return True, document.where(places < ends[-1], 0)
    positions = options.get("position_ids")
    if not isinstance(positions, Tensor) or batch != 1 or positions.shape[-1] == 1:
        return True, None
    if positions.shape != (1, length):
        return False, None
    first = positions.min()
    packed = (torch.arange(length, device=positions.device) + first != positions).any()
    if not torch.compiler.is_compiling() and not packed:  # the kernel looks, too: no synchronization more
        return True, None
    return True, torch.where(packed, (positions[0] == first).cumsum(0), 1)
