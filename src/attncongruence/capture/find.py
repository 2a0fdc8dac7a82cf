"""Which modules of a model attend: by name and class, by the user's choice, or by watching one forward pass."""

import fnmatch
import re
from collections.abc import Iterable

from torch import nn

from attncongruence import _compat
from attncongruence.capture.folds import Unseen
from attncongruence.capture.product import Log, Operation
from attncongruence.capture.watch import OnEnd, Watch


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
    children = {name.lower() for name, _ in module.named_children()}
    if all(any(name.startswith(letter) for name in children) for letter in "qkv") or _has_projections(children):
        return True
    words = type(module).__name__.lower()
    # Parts of an attention attend to nothing.
    return ("attention" in words or "attn" in words) and not words.endswith(("output", "norm", "pooling", "mlp"))


def _has_projections(children: set[str]) -> bool:
    """Whether children have the same name but for q, k and v (`linear_q`, `Wk`, `to_kv`), or one has all three."""
    for name in children:
        if "qkv" in name:
            return True
        for place in re.finditer("query|q", name):
            before, after = name[: place.start()], name[place.end() :]
            for others in (("key", "value") if place[0] == "query" else ("k", "v"), ("kv",)):
                if children >= {before + other + after for other in others}:
                    return True
    return False


def _learns(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by dotted name, without the names of wrappers (`_orig_mod`, PEFT, DDP, FSDP, checkpointing)."""
    modules, short = dict(model.named_modules()), {"": ""}
    wrapped = {name: _compat.wrapped_at(module) for name, module in modules.items()}
    for name in [*modules][1:]:
        parent, _, last = name.rpartition(".")
        short[name] = short[parent] if last == wrapped[parent] else f"{short[parent]}.{last}".lstrip(".")
    return {short[name]: module for name, module in modules.items()}


def select_modules(model: nn.Module, layers: Iterable[str | nn.Module]) -> dict[str, nn.Module]:
    """The modules meant by dotted names, wildcards and modules, in order of definition.

    Raises:
        ValueError: a name that matches nothing, or a module that is not part of the model.
    """
    named = named_modules(model)
    chosen: set[nn.Module] = set()
    for layer in layers:
        if isinstance(layer, nn.Module):
            found, wrong = {layer}, f"the given {type(layer).__name__} is not a module of this {type(model).__name__}"
        else:
            wrong = f"no module is called {layer!r}"
            found = {module for name, module in named.items() if name == layer}
            found = found or {module for name, module in named.items() if fnmatch.fnmatchcase(name, layer)}
            # With the names of wrappers, and other names of shared modules.
            full = model.named_modules(remove_duplicate=False)
            found = found or {module for name, module in full if fnmatch.fnmatchcase(name, layer)}
        if found.isdisjoint(named.values()):
            raise ValueError(f"{wrong}. Modules that look like attention: {candidates(model)} (see find_attention)")
        chosen |= found
    return {name: module for name, module in named.items() if module in chosen}


def watch_model(model: nn.Module, analysis: bool, on_end: OnEnd) -> Watch:
    """Watches all modules of a model; `on_end("", log)` is called when the model has run."""
    # Without parameters, an nn.Softmax or nn.Dropout does not stand for the attention it is part of.
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


def missed(log: Log, unseen: Unseen, index: int, operation: Operation) -> str:
    """Which layer makes a number doubtful: it ran on the side from which is counted, and its softmax was not seen."""
    place = next(place for place, (_, other) in enumerate(log) if other is operation)
    doubtful = [
        name
        for name, lengths, before in unseen
        if lengths[0] == lengths[1] and (before > place if index < 0 else before <= place)
    ]
    return (doubtful[-1] or "the model itself") if doubtful else ""


def doubts(name: str, operation: Operation, log: Log) -> list[str]:
    """Why an operation that was chosen by its number may not be the one that holds text and image."""
    found = []
    crossed = dict.fromkeys(n for n, o in log if crosses(o) and o.lengths[0] == operation.lengths[0])
    if crossed:
        found.append(
            f"{name} was chosen by its number, and cross-attention ran on a sequence of the same length "
            f"({', '.join([*crossed][-3:])}): it may hold text alone or image alone, and a loss on it would mean "
            "nothing. Where text and image are two streams, name their four layers and use "
            "AttentionBlocks.from_streams. Where the layer holds both, name it, layers='...', and this warning is gone."
        )
    place = max(place for place, (_, other) in enumerate(log) if other is operation)
    own = operation.lengths[0]
    cached = [(n, o) for n, o in log[place:] if o.lengths[0] < o.lengths[1] and own not in o.lengths]
    if cached:
        found.append(
            f"{name} was chosen by its number, and what ran after it has fewer queries than keys, as with a key/value "
            f"cache or a prefix: {operations(cached)}. If one of these is meant, train without (use_cache=False); if "
            "not, name the layer, layers='...', and this warning is gone."
        )
    return found


def operations(log: Log) -> str:
    """The last attention operations of a log, by module and size."""
    seen = [f"{name or 'the model itself'} ({o.lengths[0]} x {o.lengths[1]})" for name, o in log[-6:]]
    return ", ".join(seen) or "none"


def wrong_index(indices: list[int], count: int, log: Log) -> str:
    """What to do where indices name no self-attention of a log that has `count`; "" where nothing attended."""
    if not log:
        return ""
    choose = "None of them is a self-attention: name a layer or, if one is missing here, switch it to sdpa or eager."
    if not count and any(o.lengths[0] + 1 < o.lengths[1] for _, o in log):
        choose = (
            "Fewer queries than keys: some keys come from a cache (past_key_values) or a prefix (prefix tuning), or "
            "it is cross-attention. Train without cache and prefix (use_cache=False, LoRA); for cross-attention name "
            "the layers and use AttentionBlocks.from_streams."
        )
    if count:
        choose = f"Choose {-count} to {count - 1}."
    return (
        f"layers={indices} counts self-attentions, and the forward pass ran {count}. Attention seen, queries x keys: "
        f"{operations(log)}. {choose}"
    )


def candidates(model: nn.Module) -> str:
    """The last names of `find_attention`."""
    names = [name or "the model itself" for name in find_attention(model)]
    return ", ".join(names[-6:]) or "none, by their class names"


def nothing_seen(model: nn.Module) -> str:
    """What to do where layers ran and no attention was seen in them."""
    return (
        "No softmax over a product of queries and keys was seen, and no scaled_dot_product_attention. The layer may "
        "use a kernel that torch functions do not show (flash, flex, xformers, TorchScript, or exp and sum by hand), "
        "or attend without scores (linear attention, convolution). Switch it to sdpa or eager "
        "(model.set_attn_implementation('sdpa') in transformers), or name another layer. Modules that look like "
        f"attention: {candidates(model)}."
    )
