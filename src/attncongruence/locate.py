"""Reads a boundary or layout and a mask: where a joint sequence has text and image, and which pairs may attend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Integer
from torch import Tensor

from attncongruence._typing import REMEDIES, Count, readable, same_device
from attncongruence.layout import Stretch, TokenLayout, Tokens, check_boundary

Pairs = Bool[Tensor, "#batch #heads #length #length"] | Bool[Tensor, "batch length length"]
Mask = Tokens | Pairs
"""Which tokens are real, `(batch, length)`, or which pairs may attend, `(batch, heads, length, length)`."""


class Located(NamedTuple):
    """Where the tokens of a joint sequence are, and which pairs of them may attend."""

    text: Tensor
    """`(batch, length)` bool, True at real text tokens."""
    image: Tensor
    longest: tuple[int, int]
    """At most so many text and image tokens in a sample."""
    spans: tuple[Stretch, Stretch] | None
    """Where text and image lie, if each fills a stretch."""
    pairs: Tensor | None
    """4-D, where they say more than which tokens are real."""
    padded: bool
    """False where both stretches are known to be real throughout."""


def locate(x: Tensor, n_text: Count | Integer[Tensor, " batch"] | TokenLayout, mask: Tensor | None) -> Located:
    """Reads a boundary or layout and a mask, for a tensor `(batch, ..., length, width)`."""
    batch, length = x.shape[0], x.shape[-2]
    held = n_text.text if isinstance(n_text, TokenLayout) else n_text
    same_device(S=x, mask=mask, n_text=held if isinstance(held, Tensor) else None)
    if mask is not None:
        _fits(mask, [batch, x.shape[1] if x.dim() == 4 else 0, length, length])
    tokens, pairs = _tokens_and_pairs(mask, length)
    if not isinstance(n_text, (Tensor, TokenLayout)):
        check_boundary(n_text, length)
        real = torch.ones((), dtype=torch.bool, device=x.device) if tokens is None else tokens
        real = real.expand(batch, length)
        position = torch.arange(length, device=x.device)
        text, image = real & (position < n_text), real & (position >= n_text)
        return Located(
            text, image, (n_text, length - n_text), ((0, n_text), (n_text, length)), pairs, tokens is not None
        )
    layout = _layout(n_text, tokens, batch, length)
    text, image, extent = layout.text.expand(batch, length), layout.image.expand(batch, length), layout.extent
    return Located(text, image, (extent.max_text, extent.max_image), extent.spans, pairs, True)


def four_d(mask: Tensor) -> Tensor:
    """A mask of tokens or pairs as `(batch, heads, queries, keys)`."""
    mask = mask.bool()
    return mask[:, None, None] if mask.dim() == 2 else mask[:, None] if mask.dim() == 3 else mask


def joined(allowed: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """A layer's own pairs and the caller's mask: an entry counts where both say so."""
    if allowed is None or mask is None:
        return mask if allowed is None else allowed
    _fits(mask, [size if size > 1 else 0 for size in allowed.shape])
    return allowed & four_d(mask)


def _fits(mask: Tensor, shape: list[int]) -> None:
    """A ValueError unless a mask can be spread over `(batch, heads, length, length)`; 0: any size will do."""
    if any(size and own not in (1, size) for own, size in zip(four_d(mask).shape, shape, strict=True)):
        batch, heads, _, length = (size or "any" for size in shape)
        raise ValueError(
            f"the mask has shape {tuple(mask.shape)}, and the attention batch {batch}, heads {heads}, length {length}: "
            f"{REMEDIES['mask']} A captured layer carries the padding that the model was given: leave the mask out."
        )


def _tokens_and_pairs(mask: Tensor | None, length: int) -> tuple[Tensor | None, Tensor | None]:
    """`(batch or 1, length)` real tokens, and the pairs where they say more than the tokens do."""
    if mask is None:
        return None, None
    pairs = four_d(mask)
    tokens = pairs.any(1).any(1).expand(-1, length)
    return tokens, pairs.expand(-1, -1, length, length) if _differ(pairs) else None


def _differ(pairs: Tensor) -> bool:
    """Whether heads or queries may attend to different tokens.

    Many models spread a mask of tokens over all queries. That shows in the strides, or takes one wait for the device.
    """
    if all(pairs.shape[dim] == 1 or pairs.stride(dim) == 0 for dim in (1, 2)):
        return False
    if not readable(pairs):
        return True
    return bool((pairs != pairs[:, :1, :1]).any())


def _layout(n_text: Tensor | TokenLayout, tokens: Tensor | None, batch: int, length: int) -> TokenLayout:
    """The layout of real tokens, checked against the scores."""
    if isinstance(n_text, Tensor):
        return TokenLayout.from_n_text(n_text, length, None if tokens is None else tokens.expand(batch, length))
    if n_text.text.shape[0] not in (1, batch) or n_text.text.shape[1] != length:
        raise ValueError(
            f"the layout is for (batch, length) = {tuple(n_text.text.shape)}, the scores have {(batch, length)}: "
            "make it for the joint sequence that the layer attends over"
        )
    if tokens is None:
        return n_text
    return TokenLayout(n_text.text & tokens, n_text.image & tokens, extent=n_text.extent)
