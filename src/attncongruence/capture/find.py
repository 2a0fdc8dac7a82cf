"""Which modules of a model attend: by name and class, by the user's choice, or by watching one forward pass."""

import fnmatch
import re
from collections.abc import Callable, Iterable

from torch import nn

from attncongruence import _compat
from attncongruence.capture import messages
from attncongruence.capture.product import Log, Operation
from attncongruence.capture.watch import Watch

_WRAPPERS = re.compile(rf"(?:^|\.)(?:{'|'.join(_compat.WRAPPERS)})(?=\.|$)")


def find_attention(model: nn.Module) -> dict[str, str]:
    """Modules that look like attention, by dotted name: candidates for `capture_attention(model, layers=name)`.

    Only names and classes are looked at, nothing runs; which modules really attend is known after a forward pass.
    Wrappers around another candidate are left out.

    Args:
        model: any `nn.Module`.

    Returns:
        `{dotted name: class name}` in order of definition.

    Example:
        >>> find_attention(nn.TransformerEncoderLayer(8, 2))
        {'self_attn': 'MultiheadAttention'}
    """
    named = {name: module for name, module in named_modules(model).items() if _looks_like_attention(module)}
    return {
        name: type(module).__name__
        for name, module in named.items()
        if not any(other != name and (not name or other.startswith(f"{name}.")) for other in named)
    }


def _looks_like_attention(module: nn.Module) -> bool:
    if not _learns(module):
        return False
    children = [name for name, _ in module.named_children()]
    if "qkv" in children or all(any(name.startswith(letter) for name in children) for letter in "qkv"):
        return True
    words = type(module).__name__.lower()
    # Parts of an attention attend to nothing.
    return ("attention" in words or "attn" in words) and not words.endswith(("output", "norm", "pooling", "mlp"))


def _learns(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by dotted name, without the names of wrappers (`_orig_mod`, FSDP, checkpointing)."""
    return {_WRAPPERS.sub("", name).lstrip("."): module for name, module in model.named_modules()}


def select_modules(model: nn.Module, layers: Iterable[str | nn.Module]) -> dict[str, nn.Module]:
    """The modules meant by dotted names, wildcards and modules, in order of definition.

    Raises:
        ValueError: a name that matches nothing, or a module that is not part of the model.
    """
    named = named_modules(model)
    chosen: set[str] = set()
    for layer in layers:
        names = []
        if isinstance(layer, str):
            names = [layer] if layer in named else [name for name in named if fnmatch.fnmatchcase(name, layer)]
        if not names:
            names = [name for name, module in named.items() if module is _module(model, layer)]
        if not names:
            wrong = f"the given {type(layer).__name__} is not a module of this {type(model).__name__}"
            if isinstance(layer, str):
                wrong = f"no module is called {layer!r}"
            raise ValueError(messages.NO_SUCH_LAYER.format(wrong, messages.some(find_attention(model))))
        chosen.update(names)
    return {name: module for name, module in named.items() if name in chosen}


def _module(model: nn.Module, layer: str | nn.Module) -> nn.Module | None:
    """A module, or the module of this name: where one module is shared, it has several."""
    try:
        return model.get_submodule(layer) if isinstance(layer, str) else layer
    except AttributeError:
        return None


def watch_model(model: nn.Module, analysis: bool, on_end: Callable[[str, Log], None]) -> Watch:
    """Watches all modules of a model; `on_end("", log)` is called when the model has run.

    Modules without parameters are left out: an `nn.Softmax` or `nn.Dropout` called on the way does not stand for the
    attention it is part of.
    """
    modules = {name: module for name, module in named_modules(model).items() if module is model or _learns(module)}
    return Watch(modules, analysis, on_end, find_attention(model))


def self_attention(log: Log) -> list[tuple[str, int, Operation]]:
    """The entries where a sequence attends to itself: module, how many of its operations came before, operation."""
    count: dict[str, int] = {}
    found = []
    for name, operation in log:
        number = count[name] = count.get(name, -1) + 1
        if not crosses(operation):
            found.append((name, number, operation))
    return found


def crosses(operation: Operation) -> bool:
    """Whether queries and keys come from two sequences."""
    return operation.cross or operation.lengths[0] != operation.lengths[1]
