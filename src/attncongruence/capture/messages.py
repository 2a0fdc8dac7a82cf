"""Error messages and warnings of capture: what happened, and what to do about it."""

from collections.abc import Iterable

from attncongruence.capture.product import Log

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
    "its record was taken before, and the model has not run since. Each record can be taken once: keep what pop() "
    "returned."
)
CLOSED = "this capture is closed. Make a new one with capture_attention(model)."
MANY_WAIT = (
    "{} records of captured attention wait, and each keeps its forward pass in memory. Call pop() or pop_all() after "
    "each forward pass with gradients on, also where the loss is not used; or close() the capture."
)
SEVERAL = (
    "pop() takes the one record since the last pop, but {} wait: {}. Take them all with pop_all(), choose one layer, "
    "or pop after each forward pass."
)
NEVER_RAN = (
    "{} has not run since capture began, or it ran in a way that calls no hooks (model.forward(...) called directly, "
    "TorchScript). Call model(...), or name a layer inside the part that runs: {}."
)
LAYER_NEVER_RAN = (
    "the model ran, but {} did not. Either this forward pass does not use it, or the model was compiled and had run "
    "before capture began, and compiled code never calls hooks added later: call capture_attention before the first "
    "compiled run, or torch.compiler.reset() after it."
)
OUT_OF_RANGE = "layers={} counts self-attentions, and the forward pass ran {}. Attention seen, queries x keys: {}. "
TWO_STREAMS = (
    "{} was chosen by its number, and cross-attention ran on a sequence of the same length ({}): it may hold text "
    "alone or image alone, and a loss on it would mean nothing. Where text and image are two streams, name their four "
    "layers and use AttentionBlocks.from_streams. Where the layer holds both, name it, layers='...', and this warning "
    "is gone."
)
DATA_PARALLEL = (
    "torch.nn.DataParallel copies the model for each device in each step, and capture cannot follow the copies. Use "
    "DistributedDataParallel (one process per device), or one device."
)
WRONG_LAYER = (
    "layers has {!r}, a {}: it takes ints (order of execution, -1 is the last), dotted names with wildcards, or "
    "modules, one or a list of them"
)
NO_SUCH_LAYER = "{}. Modules that look like attention: {} (see find_attention)"


def nothing_seen(candidates: Iterable[str]) -> str:
    """The layers ran, and no attention was seen in them."""
    return (
        "No softmax over a product of queries and keys was seen, and no scaled_dot_product_attention. The layer may "
        "use a kernel that torch functions do not show (flash, flex, xformers, TorchScript, or exp and sum by hand), "
        "or attend without scores (linear attention, convolution). Switch it to sdpa or eager "
        "(model.set_attn_implementation('sdpa') in transformers), or name another layer. Modules that look like "
        f"attention: {some(candidates)}."
    )


def operations(log: Log) -> str:
    """The last attention operations that were seen, by module and size."""
    seen = [f"{name or 'the model itself'} ({o.lengths[0]} x {o.lengths[1]})" for name, o in log[-6:]]
    return ", ".join(seen) or "none"


def some(candidates: Iterable[str]) -> str:
    """The last names of `find_attention`."""
    names = [name or "the model itself" for name in candidates]
    return ", ".join(names[-6:]) or "none, by their class names"
