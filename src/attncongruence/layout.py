"""Which positions of a joint sequence are text and which are image."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Integer
from torch import Tensor

from attncongruence._typing import REMEDIES, Count, checked, readable, same_device

TokenMask = Bool[Tensor, "batch length"] | Integer[Tensor, "batch length"]
"""A token mask as tokenizers return it: bool, or int with 0 for padding."""

PairMask = Bool[Tensor, "#batch #heads #length #length"] | Bool[Tensor, "#batch length length"]
Mask = TokenMask | PairMask
"""Which tokens are real, `(batch, length)`, or which pairs may attend, `(batch, heads, length, length)`.

A bool `(length, length)` where the batch is as large as the sequence could be either, and is refused.
"""

Span = tuple[int, int]
"""The first position, and one past the last."""


class Extent(NamedTuple):
    """What the host must know of a layout to cut S."""

    max_text: int
    """Tokens of the longest text."""
    max_image: int
    spans: tuple[Span, Span] | None
    """Of text and image, if each fills one span without gaps in every sample: blocks are views then. None: gathered."""


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Text and image positions of a batch, in any order, interleaved or with special tokens left out.

    Every loss ignores positions that are neither, such as padding, `[CLS]` and `[SEP]`. Making a layout costs one
    device synchronization, which finds the longest text and the longest image. Using it costs none.

    Args:
        text: `(batch, length)` bool, True at text tokens. A batch of one row serves every sample.
        image: `(batch, length)` bool, True at image tokens.

    Raises:
        ValueError: masks that are not bool, differ in shape or are on two devices; a position that is both text and
            image.

    Example:
        >>> layout = TokenLayout.from_n_text(torch.tensor([2, 1]), length=4)
        >>> layout.text.int().tolist(), layout.image.int().tolist()
        ([[1, 1, 0, 0], [1, 0, 0, 0]], [[0, 0, 1, 1], [0, 1, 1, 1]])
    """

    text: Bool[Tensor, "batch length"]
    image: Bool[Tensor, "batch length"]
    _extent: Extent = field(default=None, kw_only=True, repr=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self._extent is None:
            _same_shape(self.text, self.image)
            object.__setattr__(self, "_extent", _measure(self.text, self.image))

    @property
    def max_text(self) -> int:
        """Text tokens of the sample that has most."""
        return self._extent.max_text

    @property
    def max_image(self) -> int:
        """Image tokens of the sample that has most."""
        return self._extent.max_image

    @classmethod
    @checked
    def from_n_text(
        cls,
        n_text: Count | Integer[Tensor, " batch"],
        length: Count | None = None,
        attention_mask: TokenMask | None = None,
    ) -> TokenLayout:
        """Text first, then image: the first `n_text` positions are text, the rest image.

        Args:
            n_text: one boundary for all samples, or `(batch,)`, one for each; 0 to `length`.
            length: length of the joint sequence. Not needed with an `attention_mask`.
            attention_mask: `(batch, length)`, True or 1 at real tokens.

        Raises:
            ValueError: neither `length` nor `attention_mask`, a length below 0, or a boundary outside 0..length.
        """
        mask = attention_mask
        if mask is not None:
            if length not in (None, mask.shape[1]):
                raise ValueError(f"length={length}, but the mask has {mask.shape[1]} positions: leave length out")
            length = mask.shape[1]
        if length is None:
            raise ValueError("from_n_text needs the length of the joint sequence: pass length= or attention_mask=")
        if length < 0:
            raise ValueError(f"length={length} must be >= 0: the number of positions in the joint sequence")
        if isinstance(n_text, Tensor):
            same_device(n_text=n_text, mask=mask)
            boundary = n_text.long()[:, None]
        else:
            if not 0 <= n_text <= length:
                raise boundary_error(n_text, length)
            boundary = torch.tensor([[n_text]], device=None if mask is None else mask.device)
        text = torch.arange(length, device=boundary.device) < boundary
        valid = torch.ones_like(text) if mask is None else mask.bool()
        text, image = torch.broadcast_tensors(text & valid, ~text & valid)
        return cls(text, image, _extent=_measure(text, image, boundary))

    @classmethod
    @checked
    def from_masks(cls, text: TokenMask, image: TokenMask) -> TokenLayout:
        """From bool or integer masks: `(batch, length)`, True or 1 at text and at image tokens."""
        return cls(text.bool(), image.bool())

    @classmethod
    @checked
    def from_segments(
        cls, text: TokenMask, image: Bool[Tensor, "batch image"] | Integer[Tensor, "batch image"]
    ) -> TokenLayout:
        """Two padded segments, text first, with one mask for each, as in ViLT and VisualBERT.

        Args:
            text: `(batch, n_text)`, True or 1 at the text tokens to use.
            image: `(batch, n_image)`, True or 1 at the image tokens to use.
        """
        same_device(text=text, image=image)
        text, image = text.bool(), image.bool()
        return cls(
            torch.cat([text, torch.zeros_like(image)], 1),
            torch.cat([torch.zeros_like(text), image], 1),
        )

    @classmethod
    @checked
    def from_token_type_ids(
        cls,
        token_type_ids: Integer[Tensor, "batch length"],
        attention_mask: TokenMask | None = None,
        *,
        image_type: Count = 1,
    ) -> TokenLayout:
        """Image where the token type is `image_type`, text where it is anything else (VisualBERT: 1 is image).

        Args:
            token_type_ids: `(batch, length)` integer types of the joint sequence.
            attention_mask: `(batch, length)`, True or 1 at real tokens.
            image_type: the type of image tokens (PaliGemma: 0).
        """
        same_device(token_type_ids=token_type_ids, attention_mask=attention_mask)
        return cls._from_image(_where("image_type", token_type_ids, image_type), attention_mask)

    @classmethod
    @checked
    def from_input_ids(
        cls, input_ids: Integer[Tensor, "batch length"], image_token_id: Count, attention_mask: TokenMask | None = None
    ) -> TokenLayout:
        """Image where `input_ids` holds the image placeholder, text elsewhere: LLaVA-style interleaved sequences.

        Args:
            input_ids: `(batch, length)` token ids, one placeholder for each image token.
            image_token_id: the placeholder's id.
            attention_mask: `(batch, length)`, True or 1 at real tokens.
        """
        same_device(input_ids=input_ids, attention_mask=attention_mask)
        return cls._from_image(_where("image_token_id", input_ids, image_token_id), attention_mask)

    @classmethod
    def _from_image(cls, image: Tensor, mask: Tensor | None) -> TokenLayout:
        valid = torch.ones_like(image) if mask is None else mask.bool()
        return cls(~image & valid, image & valid)

    @checked
    def without(self, special: TokenMask) -> TokenLayout:
        """The same layout without some positions, for instance those of a tokenizer's `special_tokens_mask`.

        Args:
            special: `(batch, length)`, True or 1 at the positions to ignore.

        Raises:
            ValueError: a mask for another length or batch: pad a text's own mask to the joint sequence first.
        """
        same_device(layout=self.text, special=special)
        batch, length = self.text.shape
        if special.shape[1] != length or (1 not in (batch, special.shape[0]) and batch != special.shape[0]):
            raise ValueError(
                f"special has (batch, length) = {tuple(special.shape)}, the layout {(batch, length)}: "
                "it must cover the whole joint sequence; pad it with zeros over the image"
            )
        keep = ~special.bool()
        return TokenLayout(self.text & keep, self.image & keep)

    def __getitem__(self, samples: int | slice | Tensor | list[int]) -> TokenLayout:
        """The layout of some samples: `layout[positives]`. A layout of one row serves every sample."""
        if self.text.shape[0] == 1:
            return self
        samples = [int(samples)] if isinstance(samples, numbers.Integral) else samples
        return TokenLayout(self.text[samples], self.image[samples])

    def to(self, device: torch.device | str) -> TokenLayout:
        """The same layout on another device."""
        return TokenLayout(self.text.to(device), self.image.to(device), _extent=self._extent)


def boundary_error(n_text: int, length: int) -> ValueError:
    """The error for a boundary outside of the sequence."""
    return ValueError(f"n_text={n_text} is out of range: a sequence of {length} positions allows 0 to {length}")


def _where(name: str, ids: Tensor, wanted: int) -> Tensor:
    """The positions of an id. Compared in 64 bits, since in 8 bits 300 would equal 44."""
    if not -(2**63) <= wanted < 2**63:
        raise ValueError(f"{name}={wanted} is not an id: ids are integers of 64 bits")
    return ids.long() == wanted


def _measure(text: Tensor, image: Tensor, boundary: Tensor | None = None) -> Extent:
    """Extent of two masks, and the checks of their values, in one synchronization."""
    length = text.shape[1]
    # Where the host cannot read values, every block keeps the full length.
    if not readable(text, image, *(() if boundary is None else (boundary,))):
        return Extent(length, length, None)
    ends = [] if boundary is None or not boundary.numel() else [boundary.min(), boundary.max()]
    found = [(text & image).sum(), *_reach(text), *_reach(image)] if text.numel() else []
    read = torch.stack([*ends, *found]).tolist() if ends or found else []
    for end in read[: len(ends)]:
        if not 0 <= end <= length:
            raise boundary_error(end, length)
    if not found:
        return Extent(length, length, None)
    overlap, max_text, text_start, text_end, max_image, image_start, image_end = read[len(ends) :]
    if overlap:
        raise ValueError(f"text and image masks overlap at {overlap} position(s): a position is text, image or neither")
    spans = (text_start, text_end), (image_start, image_end)
    apart = text_end <= image_start or image_end <= text_start
    full = max_text == text_end - text_start and max_image == image_end - image_start
    return Extent(max_text, max_image, spans if apart and full else None)


def _reach(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The most tokens of any sample, the first position that any sample uses, and one past the last."""
    used = mask.any(0).int()
    return mask.sum(1).max(), used.argmax(), len(used) - used.flip(0).argmax()


@checked
def _same_shape(text: Bool[Tensor, "batch length"], image: Bool[Tensor, "batch length"]) -> None:
    """Check that both masks have one shape and are on one device."""
    same_device(text=text, image=image)


def as_layout(n_text: Tensor | TokenLayout, tokens: Tensor | None, batch: int, length: int) -> TokenLayout:
    """The layout of real tokens, checked against the scores."""
    if isinstance(n_text, Tensor):
        if n_text.shape != (batch,):
            raise ValueError(
                f"n_text has shape {tuple(n_text.shape)}, and the batch {batch} samples: give one for each"
            )
        return TokenLayout.from_n_text(n_text, length, None if tokens is None else tokens.expand(batch, length))
    if n_text.text.shape[0] not in (1, batch) or n_text.text.shape[1] != length:
        raise ValueError(
            f"the layout is for (batch, length) = {tuple(n_text.text.shape)}, the scores have {(batch, length)}: "
            "make it for the joint sequence that the layer attends over"
        )
    if tokens is None:
        return n_text
    return TokenLayout(n_text.text & tokens, n_text.image & tokens, _extent=n_text._extent)


def as_pairs(mask: Tensor) -> Tensor:
    """A mask of tokens or pairs as `(batch, heads, queries, keys)`."""
    mask = mask.bool()
    return mask[:, None, None] if mask.dim() == 2 else mask[:, None] if mask.dim() == 3 else mask


def joined(allowed: Tensor, mask: Tensor | None) -> Tensor:
    """A layer's own pairs and the caller's mask: an entry counts where both allow it."""
    if mask is None:
        return allowed
    check_mask(mask, tuple(size if size > 1 else 0 for size in allowed.shape))
    return allowed & as_pairs(mask)


def not_ambiguous(mask: Tensor, batch: int, length: int) -> None:
    """A ValueError for a square bool mask that could be one of tokens or one of pairs."""
    if mask.dim() == 2 and mask.dtype == torch.bool and mask.shape[0] == mask.shape[1] == batch == length > 1:
        raise ValueError(
            f"the mask is bool, {tuple(mask.shape)}, and the attention has batch {batch} and length {length}: it may "
            "say which tokens are real, (batch, length), or which pairs may attend, (length, length): of tokens, pass "
            "mask.long() or a TokenLayout; of pairs, pass mask[None], (1, length, length)"
        )


def check_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    """A ValueError unless a mask can be broadcast to `(batch, heads, length, length)`; 0: any size will do."""
    own = as_pairs(mask).shape
    if any(size and mine not in (1, size) for mine, size in zip(own, shape, strict=True)):
        batch, heads, _, length = (size or "any" for size in shape)
        raise ValueError(
            f"the mask has shape {tuple(mask.shape)}, and the attention batch {batch}, heads {heads}, length {length}: "
            f"{REMEDIES['mask']} A captured layer carries the padding that the model was given: leave the mask out."
        )
