"""`token_layout`: which positions of a model from transformers are text and which are image.

The only place in the library that knows models by name. Capture does not need it; `token_layout` saves you from writing
two masks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attncongruence import _compat
from attncongruence.capture.record import CapturedAttention
from attncongruence.layout import TokenLayout

# Encoders that join a caption and an image: positions before both that are neither, and whether the image starts with
# its own [CLS].
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
    special: Iterable[int] | Any = (),
    image: Iterable[str] = ("image", "video"),
) -> TokenLayout:
    """The layout of a batch, for known model families.

    Known are models whose `input_ids` hold a placeholder for each image token (LLaVA, Qwen-VL, Gemma 3, PaliGemma,
    InternVL, Idefics 3, BLIP-2 and all others with an `image_token_id` in their configuration; Kosmos-2), text-first
    encoders (ViLT, VisualBERT, LayoutLMv3) and image-first ones (FLAVA, GIT, the Q-Former of BLIP-2).

    A position is text if it holds no placeholder of any modality that the configuration names. Tokens around an image
    (`vision_start_token_id`) and those of a chat template are text unless `special` leaves them out.

    Args:
        model: the model, also inside DDP or compiled.
        inputs: the model's arguments: `input_ids`, `attention_mask`, and masks of the image if it has them.
        captured: a captured layer of this batch. It gives the length of the joint sequence and its padding; encoders
            that add the image themselves need it.
        special: token ids that are not words, or a tokenizer or processor, whose special tokens are taken: those
            positions are left out, and the image's own [CLS] too. Image placeholders stay. With a tokenizer or
            processor, so are the tokens around a placeholder that the configuration names (`vision_start_token_id`).
        image: which modalities count as image, of `"image"` and `"video"`. Others (audio) are neither text nor image.

    Returns:
        The layout over the joint sequence.

    Raises:
        ValueError: a model that is not known or has no joint sequence, inputs without `input_ids`, a captured layer or
            an attention mask of another length, another word in `image`, placeholders that do not tell images from
            videos where `image` asks for one of them. The message says how to build the layout by hand.

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
    config = getattr(_compat.unwrapped(model), "config", None)
    family = str(getattr(config, "model_type", type(model).__name__))
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor):
        raise ValueError(f"token_layout needs inputs['input_ids'], got {sorted(inputs)}. {_BY_HAND}")
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, and input_ids {tuple(ids.shape)}: positions that are no "
            "tokens (prefix or prompt tuning) or a mask of pairs cannot be laid out. " + _BY_HAND
        )
    image = (image,) if isinstance(image, str) else tuple(image)
    if not set(image) <= {"image", "video"}:
        raise ValueError(f"image={image} may hold 'image' and 'video', the modalities to take for the image")
    token_mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    left_out = torch.tensor(_special_ids(special), dtype=ids.dtype, device=ids.device)
    text = token_mask & ~torch.isin(ids, left_out)

    placeholders, others = _placeholders(config, family, inputs, ids, image, marks=_holder(special) is not None)
    if placeholders is not None:
        layout = TokenLayout(text & ~placeholders & ~others, token_mask & placeholders)
    elif captured is not None and captured.lengths == ids.shape[1:] * 2:
        raise ValueError(
            f"{captured.layer} attends over {ids.shape[1]} positions, as many as input_ids has: it sees only text. "
            f"Capture another layer, or: {_BY_HAND}"
        )
    elif family in _TEXT_FIRST or family in _IMAGE_FIRST:
        layout = _joined(family, inputs, text, captured, drop_cls=left_out.numel() > 0)
    else:
        raise ValueError(f"token_layout does not know where {family!r} puts text and image. {_BY_HAND}")
    length = layout.text.shape[1]
    if captured is not None and captured.lengths != (length, length):
        queries, keys = captured.lengths
        raise ValueError(
            f"the layout has {length} positions, but {captured.layer} attends with {queries} queries over {keys} keys: "
            f"it is not the joint sequence of these inputs. Capture another layer, or: {_BY_HAND}"
        )
    return layout


def _holder(special: Any) -> Any:
    """The tokenizer that was given, or that of a processor; None: ids were."""
    special = getattr(special, "tokenizer", special)
    return special if hasattr(special, "all_special_ids") else None


def _special_ids(special: Any) -> tuple[int, ...]:
    """The ids themselves, or the special tokens of a tokenizer or processor."""
    tokenizer = _holder(special)
    if tokenizer is None:
        if not isinstance(special, Iterable) or isinstance(special, str):
            raise ValueError(f"special is a {type(special).__name__}: pass token ids, a tokenizer or its processor")
        return tuple(special)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return (*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special))


# What processors write into mm_token_type_ids.
_KINDS = {"image": 1, "video": 2}
_MODALITIES = (*_KINDS, "audio", "speech")
_TOKEN = re.compile(r"(.+)_token_(?:ids?|index)|(.*(?:start|end|newline))_id")
_MEDIA = re.compile(r"image|video|vision|visual|audio|speech|frame|slice|newline|^im_|^(?:bo|eo)[aiv]$")


def named_tokens(config: Any) -> dict[str, set[int]]:
    """Ids of the tokens of images, videos and sounds that a configuration names, those inside of it included.

    `"image"`, `"video"`, `"audio"`, `"speech"`: placeholders. Other names: what stands around them. What an outer
    configuration says of a name holds, whatever an inner one says.
    """
    found: dict[str, set[int]] = {}
    level = [] if config is None else [config]
    while level:
        here: dict[str, set[int]] = {}
        for holder in level:
            for attribute in {*dir(holder), *getattr(holder, "attribute_map", ())}:
                match = _TOKEN.fullmatch(attribute)
                name = (match[1] or match[2]) if match else ""
                if _MEDIA.search(name):
                    value = getattr(holder, attribute, None)
                    numbers = {n for n in (value if isinstance(value, list | tuple) else [value]) if type(n) is int}
                    here[name] = here.get(name, set()) | numbers
        found = {name: numbers for name, numbers in here.items() if numbers} | found
        inner = (value for holder in level for value in vars(holder).values())
        level = [value for value in inner if hasattr(value, "to_dict") and hasattr(value, "model_type")]
    return found


def _placeholders(
    config: Any, family: str, inputs: Mapping[str, Any], ids: Tensor, image: tuple[str, ...], *, marks: bool
) -> tuple[Tensor | None, Tensor]:
    """Where `input_ids` hold an image placeholder (None: the family has none), and another token that is no word."""
    positions = inputs.get("image_embeds_position_mask")
    if getattr(getattr(config, "text_config", None), "cross_attention_layers", None):
        raise ValueError(
            f"{family!r} looks at the image through cross-attention: there is no joint sequence to lay out. Capture "
            "its layers by name and use AttentionBlocks.from_streams."
        )
    named = named_tokens(config)

    def where(*names: str) -> Tensor:
        numbers = sorted(set().union(*(named.get(name, set()) for name in names)))
        return torch.isin(ids, torch.tensor(numbers, dtype=ids.dtype, device=ids.device))

    others = where(*(named if marks else _MODALITIES))
    if isinstance(positions, Tensor):  # Kosmos-2
        return positions.bool(), others
    visual = named.keys() & _KINDS.keys()
    if not visual:
        return None, others
    kinds = inputs.get("mm_token_type_ids")
    if len(visual & set(image)) == len(visual):
        return where(*image), others
    if isinstance(kinds, Tensor):  # also where images and videos have one placeholder (GLM-4V, Molmo 2)
        return where(*_KINDS) & torch.isin(kinds, torch.tensor([_KINDS[name] for name in image]).to(kinds)), others
    asked, rest = ({n for name in names for n in named.get(name, ())} for names in (set(image), visual - set(image)))
    if not asked or asked & rest:
        raise ValueError(
            f"image={image}, but the placeholders that the configuration of {family!r} names do not tell "
            f"{' from '.join(sorted(_KINDS))}: leave image out, or pass the processor's mm_token_type_ids too"
        )
    return where(*image), others


def _joined(
    family: str, inputs: Mapping[str, Any], text: Tensor, captured: CapturedAttention | None, *, drop_cls: bool
) -> TokenLayout:
    """The layout of an encoder that adds the image to the sequence itself, after the text or before it."""
    text_first, n_text = family in _TEXT_FIRST, text.shape[1]
    before, has_cls = (_TEXT_FIRST if text_first else _IMAGE_FIRST)[family]
    image = inputs.get("visual_attention_mask") if text_first else None
    if not isinstance(image, Tensor):
        if captured is None:
            raise ValueError(
                f"{family!r} adds the image to the sequence itself, so its length is known only from a captured layer: "
                "pass it as captured, or build the layout by hand."
            )
        keys = torch.ones(1, captured.lengths[1], dtype=torch.bool, device=captured.device)
        if captured.allowed is not None:  # some query may attend to the key
            keys = keys & captured.allowed.any(2).any(1)
        image = keys[:, n_text:] if text_first else keys[:, :-n_text]
    image = image.bool().expand(len(text), -1)
    image = image & (torch.arange(image.shape[1], device=image.device) >= before + (has_cls and drop_cls))
    if text_first:
        return TokenLayout.from_segments(text, image)
    return TokenLayout(F.pad(text, (image.shape[1], 0)), F.pad(image, (0, n_text)))
