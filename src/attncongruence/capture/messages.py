"""Error messages and warnings of capture: what happened, and what to do about it."""

from collections.abc import Iterable

from torch import nn

from attncongruence.capture.product import Operation

_REENTRANT = (
    "under reentrant checkpointing (pass use_reentrant=False to torch.utils.checkpoint, or "
    "gradient_checkpointing_kwargs={'use_reentrant': False})"
)

GRADIENTS_OFF = (
    f"the layer ran with gradients off. In training: {_REENTRANT}, or inside a no_grad() block of the model. In "
    "validation, or for analysis: capture_attention(..., analysis=True)."
)

FROZEN = (
    "was captured without gradient, so that a loss on it trains nothing: its queries and keys are frozen, or the layer "
    f"ran {_REENTRANT}. To look at attention without training it, capture_attention(..., analysis=True)."
)

TAKEN = (
    "its record was taken before, and the model has not run since. Each forward pass is taken once: keep what pop() "
    "returned, and pass it on."
)

CLOSED = "this capture is closed. Make a new one with capture_attention(model)."

MANY_WAIT = (
    "{} records of captured attention wait, and each keeps its forward pass in memory. Call pop() or pop_all() after "
    "each forward pass with gradients on, also where the loss is not used; or close() the capture."
)

DATA_PARALLEL = (
    "torch.nn.DataParallel copies the model for each device in each step, and capture cannot follow the copies. Use "
    "DistributedDataParallel (one process per device), or one device."
)


def wrong_layer(layer: object) -> str:
    """A choice of layers that is no int, name or module."""
    return (
        f"layers has {layer!r}, a {type(layer).__name__}: it takes ints (order of execution, -1 is the last), dotted "
        "names with wildcards, or modules, one or a list of them"
    )


def no_such_layer(model: nn.Module, layer: str | nn.Module, candidates: Iterable[str]) -> str:
    """A name that matches nothing, or another model's module."""
    found = f"the given {type(layer).__name__} is not a module of this {type(model).__name__}"
    if isinstance(layer, str):
        found = f"no module is called {layer!r}"
    return f"{found}. Modules that look like attention: {_some(candidates)} (see find_attention)"


def several_records(names: list[str]) -> str:
    """`pop` where several records wait."""
    return (
        f"pop() takes the one record since the last pop, but {len(names)} wait: {', '.join(names[:8])}. Take them all "
        "with pop_all(), choose one layer, or pop after each forward pass."
    )


def never_ran(model: nn.Module, candidates: Iterable[str]) -> str:
    """No forward pass since capture began."""
    return (
        f"{type(model).__name__} has not run since capture began, or it ran in a way that calls no hooks "
        "(model.forward(...) called directly, TorchScript). Call model(...), or name a layer inside the part that "
        f"runs: {_some(candidates)}."
    )


def layer_never_ran(names: Iterable[str]) -> str:
    """The model ran, and the watched layers did not."""
    return (
        f"the model ran, but {', '.join(names)} did not. Either this forward pass does not use it, or the model was "
        "compiled and had run before capture began, and compiled code never calls hooks added later: call "
        "capture_attention before the first compiled run, or torch.compiler.reset() after it."
    )


def index_out_of_range(indices: list[int], count: int, log: list[tuple[str, Operation]]) -> str:
    """Fewer self-attentions than the index asks for."""
    return (
        f"layers={indices} counts self-attentions, and the forward pass ran {count}. "
        f"Attention seen, queries x keys: {listed(log)}. "
    )


def two_streams(layer: str, crossed: list[str]) -> str:
    """The chosen layer's own sequence also attended to another one."""
    return (
        f"{layer or 'the model itself'} was chosen by its number, and cross-attention ran on a sequence of the same "
        f"length ({', '.join(list(dict.fromkeys(crossed))[-3:])}): it may hold text alone or image alone, and a loss "
        "on it would mean nothing. Where text and image are two streams, name their four layers and use "
        "AttentionBlocks.from_streams. Where the layer holds both, name it, layers='...', and this warning is gone."
    )


def nothing_seen(candidates: Iterable[str]) -> str:
    """The layers ran, and no attention was seen in them."""
    return (
        "No softmax over a product of queries and keys, and no scaled_dot_product_attention, ran where it was looked "
        "for: it may use a kernel that torch functions do not show (flash, flex, xformers, TorchScript, or exp and sum "
        "by hand), or attend without scores (linear attention, convolution). Switch it to sdpa or eager "
        "(model.set_attn_implementation('sdpa') in transformers), or name another layer. Modules that look like "
        f"attention: {_some(candidates)}."
    )


def listed(log: list[tuple[str, Operation]]) -> str:
    """The last attention operations that were seen, by module and size."""
    seen = [f"{name or 'the model itself'} ({o.lengths[0]} x {o.lengths[1]})" for name, o in log[-6:]]
    return ", ".join(seen) or "none"


def _some(candidates: Iterable[str]) -> str:
    names = [name or "the model itself" for name in candidates]
    return ", ".join(names[-6:]) or "none, by their class names"
