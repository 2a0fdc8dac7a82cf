"""For transformers: `token_layout`, which positions are text and which are image, and `Trainer`'s `CongruenceCallback`.

The one place in the library that knows models by name. Capture needs none of it; `token_layout` only saves writing two
masks.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attncongruence.capture.record import CapturedAttention
from attncongruence.capture.session import unwrapped
from attncongruence.integrations.trainer import CongruenceCallback
from attncongruence.layout import TokenLayout

__all__ = ["CongruenceCallback", "token_layout"]

# Encoders that put a caption and an image side by side: which comes first, how many positions before both are neither,
# and whether the image opens with a [CLS] of its own.
_TEXT_FIRST = {"vilt": (0, True), "visual_bert": (0, False), "layoutlmv3": (0, True)}
_IMAGE_FIRST = {"flava": (1, True), "git": (0, True), "blip-2": (0, False), "instructblip": (0, False)}
_BY_HAND = (
    "Build it by hand: TokenLayout(text, image) takes two boolean (batch, length) masks over the joint sequence, and "
    "TokenLayout.from_n_text, from_segments and from_input_ids the common cases."
)


def token_layout(
    model: nn.Module,
    inputs: Mapping[str, Any],
    captured: CapturedAttention | None = None,
    *,
    special: Iterable[int] = (),
) -> TokenLayout:
    """The layout of a batch, for the families it knows.

    Known are models whose `input_ids` hold a placeholder for each image token (LLaVA, Qwen-VL, Gemma 3, PaliGemma,
    InternVL, Idefics 3, BLIP-2 and all others with an `image_token_id` in their configuration; Kosmos-2), text-first
    encoders (ViLT, VisualBERT, LayoutLMv3) and image-first ones (FLAVA, GIT, the Q-Former of BLIP-2).

    Args:
        model: the model, also inside DDP or compiled.
        inputs: what it was called with: `input_ids`, `attention_mask`, and masks of the image where it has them.
        captured: a record of this batch. It tells the length of the joint sequence and which of its positions are
            padding; encoders that add the image inside need it.
        special: token ids that are no words, for instance `tokenizer.all_special_ids`: those positions are left out,
            and the image's own [CLS] too. Image placeholders stay.

    Returns:
        The layout over the joint sequence.

    Raises:
        ValueError: a family it does not know or that has no joint sequence, inputs without `input_ids`, or a captured
            layer of another length. The message says how to build the layout by hand.

    Example:
        A LLaVA whose placeholder is 5, with two image tokens and a word, then padding:

        >>> from types import SimpleNamespace
        >>> llava = nn.Identity()
        >>> llava.config = SimpleNamespace(model_type="llava", image_token_id=5)
        >>> inputs = {"input_ids": torch.tensor([[1, 5, 5, 9, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}
        >>> layout = token_layout(llava, inputs, special=[1])
        >>> layout.text.int().tolist(), layout.image.int().tolist()
        ([[0, 0, 0, 1, 0]], [[0, 1, 1, 0, 0]])
    """
    config = getattr(unwrapped(model), "config", None)
    family = str(getattr(config, "model_type", type(model).__name__))
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor):
        raise ValueError(f"token_layout needs inputs['input_ids'], got {sorted(inputs)}. {_BY_HAND}")
    mask = inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    special = tuple(special)
    words = real & ~torch.isin(ids, torch.tensor(special, dtype=ids.dtype, device=ids.device))

    image = _placeholders(config, inputs, ids)
    if image is not None:
        layout = TokenLayout(words & ~image, real & image)
    elif captured is not None and captured.lengths == ids.shape[1:] * 2:
        raise ValueError(
            f"{captured.layer} attends over {ids.shape[1]} positions, as many as input_ids has: it sees text alone. "
            f"Capture another layer, or: {_BY_HAND}"
        )
    elif family in _TEXT_FIRST:
        layout = _text_first(family, inputs, words, captured, drop_cls=bool(special))
    elif family in _IMAGE_FIRST:
        layout = _image_first(family, words, captured, drop_cls=bool(special))
    else:
        raise ValueError(f"token_layout does not know where {family!r} puts text and image. {_BY_HAND}")
    _check(layout, captured)
    return layout


def _placeholders(config: Any, inputs: Mapping[str, Any], ids: Tensor) -> Tensor | None:
    """Where `input_ids` hold a placeholder for an image token; None for families that have none."""
    place = inputs.get("image_embeds_position_mask")
    if isinstance(place, Tensor):  # Kosmos-2
        return place.bool()
    text = getattr(config, "text_config", None)
    if getattr(text, "cross_attention_layers", None):
        raise ValueError(
            f"{getattr(config, 'model_type', 'this model')!r} looks at the image through cross-attention: there is no "
            "joint sequence to lay out. Capture its layers by name and use AttentionBlocks.from_streams."
        )
    for holder in (config, getattr(config, "vision_config", None)):
        for name in ("image_token_id", "image_token_index"):
            token = getattr(holder, name, None)
            if isinstance(token, int):
                return ids == token
    return None


def _text_first(
    family: str, inputs: Mapping[str, Any], words: Tensor, captured: CapturedAttention | None, *, drop_cls: bool
) -> TokenLayout:
    _, has_cls = _TEXT_FIRST[family]
    own = inputs.get("visual_attention_mask")
    image = own.bool() if isinstance(own, Tensor) else _real_keys(family, captured)[:, words.shape[1] :]
    if has_cls and drop_cls:
        image = image & (torch.arange(image.shape[1], device=image.device) > 0)
    return TokenLayout.from_segments(words, image.expand(words.shape[0], -1))


def _image_first(family: str, words: Tensor, captured: CapturedAttention | None, *, drop_cls: bool) -> TokenLayout:
    before, has_cls = _IMAGE_FIRST[family]
    first = before + (has_cls and drop_cls)
    image = _real_keys(family, captured)[:, : -words.shape[1]].expand(words.shape[0], -1)
    image = image & (torch.arange(image.shape[1], device=image.device) >= first)
    return TokenLayout(F.pad(words, (image.shape[1], 0)), F.pad(image, (0, words.shape[1])))


def _real_keys(family: str, captured: CapturedAttention | None) -> Tensor:
    """`(batch or 1, length)`: positions that some query may look at."""
    if captured is None:
        raise ValueError(
            f"{family!r} puts the image into the sequence itself, so its length is known only from a captured layer: "
            "pass it as captured, or build the layout by hand."
        )
    _, keys = captured.lengths
    if captured.allowed is None:
        return torch.ones(1, keys, dtype=torch.bool, device=captured.device)
    return captured.allowed.any(2).any(1).expand(-1, keys)


def _check(layout: TokenLayout, captured: CapturedAttention | None) -> None:
    length = layout.text.shape[1]
    if captured is not None and captured.lengths != (length, length):
        queries, keys = captured.lengths
        raise ValueError(
            f"the layout has {length} positions, but {captured.layer} attends with {queries} queries over {keys} keys: "
            f"it is not the joint sequence of these inputs. Capture another layer, or: {_BY_HAND}"
        )
