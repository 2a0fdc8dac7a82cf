"""What all the losses share: blocks to maps, one side or both, heads, rows and batch reduced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attncongruence._precision import at_least_float32, no_autocast
from attncongruence._typing import Direction, Impl, Reduction, checked, one_of
from attncongruence.blocks import Attention, AttentionBlocks, NText, as_blocks
from attncongruence.conventions import Convention
from attncongruence.equivalence import Masks, attention_map, entries, log_attention_map, without_unmatched
from attncongruence.quadrants import Quadrants


@dataclass(frozen=True)
class Side:
    """What is particular to one loss, on the language side; the vision side is the same on swapped blocks."""

    rows: Callable[[Quadrants[Tensor], Tensor, Masks], Tensor]
    """Maps, target and masks to one divergence a row, `(batch, heads, N)`."""
    convention: Convention
    log_target: bool = False
    """Whether the target is a distribution whose logarithm is wanted: the logits of an m-KL without a softmax."""
    there_and_back: bool = False
    """Whether the language side looks at VL too."""

    def __call__(self, blocks: AttentionBlocks, maps: Quadrants[Tensor], masks: Masks) -> Tensor:
        """The loss of each sample, `(batch,)`."""
        target = log_attention_map(blocks.LL, masks.LL, self.convention) if self.log_target else maps.LL
        if self.convention.heads == "mean_map":
            masks = Quadrants(*(None if mask is None else mask.any(1, keepdim=True) for mask in masks))
        counted = without_unmatched(masks)
        rows = self.rows(maps, target, masks._replace(LL=counted))
        # sum_i, or the mean over the sample's own rows; then the mean over heads
        per_head = rows.sum(-1)
        if self.convention.rows == "mean":
            per_head = per_head / (rows.shape[-1] if counted is None else counted.any(-1).sum(-1).clamp(min=1))
        return per_head.mean(1)


def loss_of(
    attention: Attention,
    n_text: NText,
    mask: Tensor | None,
    side: Side,
    direction: Direction,
    reduction: Reduction,
    impl: Impl,
) -> Tensor:
    """The loss that a side defines, in one direction or both, over the batch."""
    blocks, masks = prepare(attention, n_text, mask, side.convention, direction, reduction, impl, side.there_and_back)
    if blocks.LV.numel():
        if direction == "vision":
            blocks, masks = blocks.swap(), masks.swap()
        with no_autocast(blocks.LL.device):
            per_sample = _dense(blocks, masks, side, both=direction == "both")
    else:
        per_sample = zeros(blocks)
    if reduction == "none":
        return per_sample
    if reduction == "sum":
        return per_sample.sum()
    present = blocks.text_mask.any(-1) & blocks.image_mask.any(-1)
    return per_sample.sum() / present.sum().clamp(min=1)


@checked
def check_options(convention: Convention, direction: Direction, reduction: Reduction, impl: Impl) -> None:
    """Refuse unknown words."""
    one_of("direction", direction, ("both", "language", "vision"))
    one_of("reduction", reduction, ("mean", "sum", "none"))
    one_of("impl", impl, ("auto", "dense"))


def zeros(blocks: AttentionBlocks) -> Tensor:
    """`(batch,)` sums of nothing: exactly 0, with a gradient of exactly 0."""
    return at_least_float32(blocks.LV)[..., :0].sum((1, 2, 3))


def prepare(
    attention: Attention,
    n_text: NText,
    mask: Tensor | None,
    convention: Convention,
    direction: Direction,
    reduction: Reduction,
    impl: Impl,
    there_and_back: bool,
) -> tuple[AttentionBlocks, Masks]:
    """Blocks and the entries that count in them, or an error for what has no meaning: the oracles ask here too."""
    check_options(convention, direction, reduction, impl)
    if there_and_back and convention.blocks != "probabilities":
        raise ValueError(
            "alignment='distributed' is not defined on raw scores: use a convention with blocks='probabilities', "
            "such as RELEASED, or alignment='singular'"
        )
    blocks = as_blocks(attention, n_text, mask)
    cross = {"language": ("LV",), "vision": ("VL",), "both": ("LV", "VL")}[direction]
    cross = ("LV", "VL") if there_and_back else cross
    for name in cross:
        if getattr(blocks, name) is None:
            raise ValueError(f"these blocks have no {name}, which this loss and direction need: {_REMEDY[name]}")
    heads = sorted({getattr(blocks, name).shape[1] for name in ("LL", "VV", *cross)})
    if convention.heads == "mean_loss" and len(heads) > 1:
        raise ValueError(
            f"the blocks have different numbers of heads, {heads}, and a loss per head needs equal ones: "
            "use a convention with heads='mean_map'"
        )
    masks = entries(blocks)
    # Whether a decoder hides a whole block is known to its masks alone: one wait for the device, for pair masks only.
    if blocks.allowed is not None and not torch.compiler.is_compiling() and not blocks.LL.is_meta:
        both = (blocks.text_mask.any(-1) & blocks.image_mask.any(-1)).any()
        some = torch.stack([both, *(getattr(masks, name).any() for name in cross)]).tolist()
        for name, seen in zip(cross, some[1:], strict=True):
            if some[0] and not seen:
                raise ValueError(f"no pair of {name} may attend, as in causal decoders: {_REMEDY[name]}")
    return blocks, masks


_REMEDY = {
    "LV": "text tokens must see image tokens; direction='vision' of cacr_loss or of singular alignment does without",
    "VL": "image tokens must see text tokens; direction='language' of cacr_loss or of singular alignment does without",
}


def _dense(blocks: AttentionBlocks, masks: Masks, side: Side, both: bool) -> Tensor:
    """The loss of each sample, every map built."""
    # Without the reverse direction nothing looks at VL: its place in the maps stays empty.
    VL = blocks.VL if both or side.there_and_back else None
    maps = Quadrants(
        *(
            blocks.LL.new_empty(0) if block is None else attention_map(block, mask, side.convention)
            for block, mask in zip((blocks.LL, blocks.LV, VL, blocks.VV), masks, strict=True)
        )
    )
    loss = side(blocks, maps, masks)
    return loss + side(blocks.swap(), maps.swap(), masks.swap()) if both else loss
