"""What all the losses share: blocks to maps, one side or both, heads, rows and batch reduced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attncongruence._precision import no_autocast, zeros
from attncongruence._typing import Direction, Impl, Reduction, checked, one_of, readable
from attncongruence.blocks import Attention, AttentionBlocks, NText, as_blocks
from attncongruence.conventions import Convention
from attncongruence.equivalence import Masks, attention_map, entries, fill, log_attention_map, without_unmatched
from attncongruence.fast import streaming
from attncongruence.locate import Located, joined, locate
from attncongruence.quadrants import Quadrants
from attncongruence.sources import QueryKey, ScoreSource


class Compared(NamedTuple):
    """The two maps that one side holds against each other, row by row, `(batch, heads, N, N)`."""

    R: Tensor
    """The other modality's attention in this one's terms: logits, but probabilities for the distributed alignment."""
    target: Tensor
    """This modality's own attention, likewise."""
    counted: Tensor | None
    """Which entries are compared, broadcastable; None: all."""


@dataclass(frozen=True, eq=False)
class Side:
    """What is particular to one loss, on the language side; the vision side is the same on swapped blocks."""

    kind: streaming.Kind
    """Its name to the streaming form, which has a way of its own for each."""
    compare: Callable[[Quadrants[Tensor], Tensor, Masks], Compared]
    """Maps, target and masks to what is compared."""
    divergence: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """What was compared to one divergence a row, `(batch, heads, N)`."""
    convention: Convention
    log_target: bool = False
    """Whether the target is a distribution whose logarithm is wanted: the logits of an m-KL without a softmax."""

    @property
    def there_and_back(self) -> bool:
        """Whether the language side looks at VL too."""
        return self.kind == "distributed"

    def __call__(self, blocks: AttentionBlocks, maps: Quadrants[Tensor], masks: Masks) -> Tensor:
        """The loss of each sample, `(batch,)`."""
        compared, counted = self.compared(blocks, maps, masks)
        rows = self.divergence(*compared)
        # sum_i, or the mean over the sample's own rows; then the mean over heads
        per_head = rows.sum(-1)
        if self.convention.rows == "mean":
            per_head = per_head / (rows.shape[-1] if counted is None else counted.any(-1).sum(-1).clamp(min=1))
        return per_head.mean(1)

    def compared(
        self, blocks: AttentionBlocks, maps: Quadrants[Tensor], masks: Masks
    ) -> tuple[Compared, Tensor | None]:
        """What is compared, and the entries of LL whose rows are the sample's own."""
        target = log_attention_map(blocks.LL, masks.LL, self.convention) if self.log_target else maps.LL
        if self.convention.heads == "mean_map":
            masks = Quadrants(*(None if mask is None else mask.any(1, keepdim=True) for mask in masks))
        counted = without_unmatched(masks)
        # Where tokens alone are left out, what stands in VV for their pairs has no weight.
        pairs = None if blocks.allowed is None else masks.VV
        return self.compare(maps, target, Quadrants(counted, masks.LV, masks.VL, pairs)), counted


def distributions(blocks: AttentionBlocks, side: Side, direction: Direction) -> Compared:
    """The two maps of probabilities behind the loss of one direction, `"language"` or `"vision"`: its picture."""
    blocks, masks = prepare(blocks, None, None, side.convention, direction, "none", "dense", side.there_and_back)
    if direction == "vision":
        blocks, masks = blocks.swap(), masks.swap()
    with no_autocast(blocks.LL.device):
        (R, target, counted), _ = side.compared(blocks, _maps(blocks, masks, side, both=False), masks)
    if side.there_and_back:
        return Compared(R, target, counted)
    # sigma(R), sigma(LL)
    P, T = (fill(x, counted, torch.finfo(x.dtype).min / 2).softmax(-1) for x in (R, target))
    return Compared(P, T, counted)


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
    check_options(side.convention, direction, reduction, impl)
    check_defined(side.convention, side.there_and_back)
    streamed = None if impl == "dense" else streaming_or_not(attention, n_text, mask, side.convention, impl)
    if streamed is not None:
        source, where = streamed
        text, image = where.text, where.image
        with no_autocast(source.query.device):
            per_sample = streaming.per_sample(source, where, side.kind, side.convention, direction)
    else:
        blocks, masks = prepare(
            attention, n_text, mask, side.convention, direction, reduction, impl, side.there_and_back
        )
        text, image = blocks.text_mask, blocks.image_mask
        if blocks.LV.numel():
            if direction == "vision":
                blocks, masks = blocks.swap(), masks.swap()
            with no_autocast(blocks.LL.device):
                per_sample = _dense(blocks, masks, side, both=direction == "both")
        else:
            per_sample = zeros(blocks.LV)
    if reduction == "none":
        return per_sample
    if reduction == "sum":
        return per_sample.sum()
    return per_sample.sum() / (text.any(-1) & image.any(-1)).sum().clamp(min=1)


def streaming_or_not(
    attention: Attention, n_text: NText, mask: Tensor | None, convention: Convention, impl: Impl
) -> tuple[QueryKey, Located] | None:
    """What the streaming form works on, where it can and should, or None; an error where it was asked for and can't."""
    why, query = None, attention.query if isinstance(attention, ScoreSource) else None
    if not isinstance(attention, ScoreSource):
        why = "it was given scores, not queries and keys"
        if isinstance(attention, AttentionBlocks):
            why = "AttentionBlocks hold scores, not queries and keys, and two streams have no streaming form"
    elif query is None:
        why = "this layer's scores are not scale query key^T: its model adds a bias, caps or shifts them"
    elif impl == "auto" and not streaming.pays(query, (query.shape[-2], query.shape[-2]), convention):
        return None  # not even if one modality had all the tokens: nothing else need be looked at
    elif n_text is not None and (key := attention.key) is not None and query.shape[-2] == key.shape[-2]:
        source = QueryKey(query, key, attention.scale)
        where = locate(query, n_text, joined(attention.allowed, mask))
        if where.pairs is not None:
            why = "a mask says which pairs may attend (causal attention, for instance)"
        elif impl == "streaming" or streaming.pays(query, where.longest, convention):
            return source, where
    if impl == "streaming" and why is not None:
        other = ", or pass a captured layer or QueryKey(query, key) without a mask of pairs"
        raise ValueError(
            f"impl='streaming' can't be used here, {why}: use impl='auto', which then takes the dense form"
            + ("" if isinstance(attention, AttentionBlocks) else other)
        )
    return None


@checked
def check_options(convention: Convention, direction: Direction, reduction: Reduction, impl: Impl) -> None:
    """Refuse unknown words."""
    one_of("direction", direction, ("both", "language", "vision"))
    one_of("reduction", reduction, ("mean", "sum", "none"))
    one_of("impl", impl, ("auto", "dense", "streaming"))


def check_defined(convention: Convention, there_and_back: bool) -> None:
    """Refuse distributed alignment of raw scores."""
    if there_and_back and convention.blocks != "probabilities":
        raise ValueError(
            "alignment='distributed' is not defined on raw scores: use a convention with blocks='probabilities', "
            "such as RELEASED, or alignment='singular'"
        )


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
    check_defined(convention, there_and_back)
    blocks = as_blocks(attention, n_text, mask)
    cross = {"language": ("LV",), "vision": ("VL",), "both": ("LV", "VL")}[direction]
    cross = ("LV", "VL") if there_and_back else cross
    for name in cross:
        if getattr(blocks, name) is None:
            raise ValueError(f"these blocks have no {name}, which this loss and direction need: {_REMEDY[name]}")
    heads = sorted({getattr(blocks, name).shape[1] for name in ("LL", "VV", *cross)})
    if 0 in heads:
        raise ValueError("the attention has 0 heads: a loss is a mean over heads and needs at least one")
    if convention.heads == "mean_loss" and len(heads) > 1:
        raise ValueError(
            f"the blocks have different numbers of heads, {heads}, and a loss per head needs equal ones: "
            "use a convention with heads='mean_map'"
        )
    masks = entries(blocks)
    # Whether a decoder hides a whole block is known to its masks alone: one wait for the device, for pair masks only.
    if blocks.allowed is not None and readable(blocks.LL, *blocks.allowed):
        both = (blocks.text_mask.any(-1) & blocks.image_mask.any(-1)).any()
        some = torch.stack([both, *(getattr(masks, name).any() for name in cross)]).tolist()
        for name, seen in zip(cross, some[1:], strict=True):
            if some[0] and not seen:
                raise ValueError(
                    f"no pair of {name} may attend, as in causal decoders: {_REMEDY[name]}. If that is not so in this "
                    "model, n_text or the layout is wrong: where does the image stand?"
                )
    return blocks, masks


_REMEDY = {
    "LV": "text tokens must see image tokens; direction='vision' of cacr_loss or of singular alignment does without",
    "VL": "image tokens must see text tokens; direction='language' of cacr_loss or of singular alignment does without",
}


def _dense(blocks: AttentionBlocks, masks: Masks, side: Side, both: bool) -> Tensor:
    """The loss of each sample, every map built."""
    maps = _maps(blocks, masks, side, both)
    loss = side(blocks, maps, masks)
    return loss + side(blocks.swap(), maps.swap(), masks.swap()) if both else loss


def _maps(blocks: AttentionBlocks, masks: Masks, side: Side, both: bool) -> Quadrants[Tensor]:
    """The blocks in the convention's form."""
    # Without the reverse direction nothing looks at VL: its place in the maps stays empty.
    VL = blocks.VL if both or side.there_and_back else None
    return Quadrants(
        *(
            blocks.LL.new_empty(0) if block is None else attention_map(block, mask, side.convention)
            for block, mask in zip((blocks.LL, blocks.LV, VL, blocks.VV), masks, strict=True)
        )
    )
