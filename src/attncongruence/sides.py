"""What all the losses share: blocks to maps, one side or both, heads, rows and batch reduced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attncongruence._typing import one_of
from attncongruence.blocks import Attention, AttentionBlocks, NText, Quadrants, as_blocks
from attncongruence.conventions import Convention
from attncongruence.divergence import at_least_float32
from attncongruence.equivalence import Masks, attention_map, entries, log_attention_map, without_unmatched


@dataclass(frozen=True)
class Side:
    """What is particular to one loss, on the language side; the vision side is the same on swapped blocks."""

    rows: Callable[[Quadrants[Tensor], Tensor, Masks], Tensor]
    """Maps, target and masks to one divergence a row, `(batch, heads, N)`."""
    convention: Convention
    softmax_target: bool
    """Whether the target map is logits of the m-KL, to be softmaxed, rather than its distribution."""
    there_and_back: bool = False
    """Whether the language side looks at VL too."""

    def __call__(self, blocks: AttentionBlocks, maps: Quadrants[Tensor], masks: Masks) -> Tensor:
        """The loss of each sample, `(batch,)`."""
        target = maps.LL if self.softmax_target else log_attention_map(blocks.LL, masks.LL, self.convention)
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
    direction: str,
    reduction: str,
    impl: str,
) -> Tensor:
    """The loss that a side defines, in one direction or both, over the batch."""
    one_of("direction", direction, ("both", "language", "vision"))
    one_of("reduction", reduction, ("mean", "sum", "none"))
    one_of("impl", impl, ("auto", "dense"))
    blocks = as_blocks(attention, n_text, mask)
    cross = {"language": ("LV",), "vision": ("VL",), "both": ("LV", "VL")}[direction]
    _check(blocks, side.convention, ("LV", "VL") if side.there_and_back else cross)
    if blocks.LV.numel():
        with _no_autocast(blocks.LL.device):
            per_sample = _dense(blocks.swap() if direction == "vision" else blocks, side, both=direction == "both")
    else:
        # No text or no image anywhere: an empty sum is exactly 0 and passes a gradient of exactly 0.
        per_sample = at_least_float32(blocks.LV).sum((1, 2, 3))
    if reduction == "none":
        return per_sample
    if reduction == "sum":
        return per_sample.sum()
    present = blocks.text_mask.any(-1) & blocks.image_mask.any(-1)
    return per_sample.sum() / present.sum().clamp(min=1)


def _dense(blocks: AttentionBlocks, side: Side, both: bool) -> Tensor:
    """The loss of each sample, every map built."""
    masks = entries(blocks)
    # Without the reverse direction nothing looks at VL: its map is spared.
    VL = blocks.VL if both or side.there_and_back else None
    maps = Quadrants(
        *(
            blocks.LL.new_empty(0) if block is None else attention_map(block, mask, side.convention)
            for block, mask in zip((blocks.LL, blocks.LV, VL, blocks.VV), masks, strict=True)
        )
    )
    loss = side(blocks, maps, masks)
    return loss + side(blocks.swap(), maps.swap(), masks.swap()) if both else loss


def _check(blocks: AttentionBlocks, convention: Convention, cross: tuple[str, ...]) -> None:
    """Refuse what has no meaning: heads that don't match, a cross-modal block that does not exist."""
    heads = sorted({block.shape[1] for block in (blocks.LL, blocks.LV, blocks.VV)})
    if convention.heads == "mean_loss" and len(heads) > 1:
        raise ValueError(
            f"the blocks have different numbers of heads, {heads}, and a loss per head needs equal ones: "
            "use a convention with heads='mean_map'"
        )
    for name in cross:
        if getattr(blocks, name) is None:
            raise ValueError(f"these blocks have no {name}, which this loss and direction need: {_REMEDY[name]}")
    if blocks.allowed is None or torch.compiler.is_compiling():
        return
    present = (blocks.text_mask.any(-1) & blocks.image_mask.any(-1)).any()
    masks = entries(blocks)
    for name in cross:
        mask = getattr(masks, name)
        if present and not mask.any():
            raise ValueError(f"no pair of {name} may attend, as in causal decoders: {_REMEDY[name]}")


_REMEDY = {
    "LV": "text tokens must see image tokens; direction='vision' of cacr_loss or of singular alignment does without",
    "VL": "image tokens must see text tokens; direction='language' of cacr_loss or of singular alignment does without",
}


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Autocast would run the losses' matrix products in half precision."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
