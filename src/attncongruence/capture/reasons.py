"""Why nothing was captured: what was seen, and what to do about it."""

from collections.abc import Iterable

from torch import nn

from attncongruence.capture.find import Log, some_candidates

GRADIENTS_OFF = (
    "the layer ran with gradients off. In training: under reentrant checkpointing (pass use_reentrant=False to "
    "torch.utils.checkpoint, or gradient_checkpointing_kwargs={'use_reentrant': False}), or inside a no_grad() block "
    "of the model. In validation, or for analysis: capture_attention(..., analysis=True)."
)


def never_ran(model: nn.Module) -> str:
    """No forward pass since capture began."""
    return (
        f"{type(model).__name__} has not run since capture began, or it ran in a way that calls no hooks "
        "(model.forward(...) called directly, TorchScript). Call model(...), or name a layer inside the part that "
        f"runs: {some_candidates(model)}."
    )


def layer_never_ran(names: Iterable[str]) -> str:
    """The model ran, and the watched layers did not."""
    return (
        f"the model ran, but {', '.join(names)} did not. Either this forward pass does not use it, or the model was "
        "compiled and had run before capture began, and compiled code never calls hooks added later: call "
        "capture_attention before the first compiled run, or torch.compiler.reset() after it."
    )


def index_out_of_range(indices: list[int], count: int, log: Log) -> str:
    """Fewer self-attentions than the index asks for."""
    seen = ", ".join(f"{name or 'the model itself'} ({s.lengths[0]} x {s.lengths[1]})" for name, s in log[-6:])
    return (
        f"layers={indices} counts self-attentions, and the forward pass ran {count}. "
        f"Attention seen, queries x keys: {seen or 'none'}. "
    )


def two_streams(layer: str, crossed: list[str]) -> str:
    """The chosen layer's own sequence also attended to another one."""
    return (
        f"{layer or 'the model itself'} was chosen by its number, and cross-attention ran on a sequence of the same "
        f"length ({', '.join(list(dict.fromkeys(crossed))[-3:])}): it may hold text alone or image alone, and a loss "
        "on it would mean nothing. Where text and image are two streams, name their four layers and use "
        "AttentionBlocks.from_streams; where the layer does hold both, name it, layers='...', and this is not said."
    )


def nothing_seen(model: nn.Module) -> str:
    """The layers ran, and no attention was seen in them."""
    return (
        "No softmax over a product of queries and keys, and no scaled_dot_product_attention, ran where it was looked "
        "for: it may use a kernel that torch functions do not show (flash, flex, xformers, TorchScript, or exp and sum "
        "by hand), or attend without scores (linear attention, convolution). Switch it to sdpa or eager "
        "(model.set_attn_implementation('sdpa') in transformers), or name another layer. Modules that look like "
        f"attention: {some_candidates(model)}."
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

FROZEN = (
    "was captured without gradient, so that a loss on it trains nothing: its queries and keys are frozen, or the layer "
    "ran under reentrant checkpointing (pass use_reentrant=False to torch.utils.checkpoint, or "
    "gradient_checkpointing_kwargs={'use_reentrant': False}). To look at attention without training it, "
    "capture_attention(..., analysis=True)."
)
