"""The losses from queries and keys: E VV E^T = scale (E Q_V) (E K_V)^T, so that VV need not exist.

On raw scores both sides of the m-KL are maps of low rank, made of cross-modally pooled queries and keys. On
probabilities, whose map is a mean over heads, the larger modality's map is made a tile at a time.
What is particular to one loss stands in `forms.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from attncongruence._typing import Direction, Impl, at_least_float32, no_autocast
from attncongruence.blocks import (
    Attention,
    AttentionBlocks,
    Located,
    NText,
    both_modalities,
    locate,
    own_positions,
    take,
)
from attncongruence.conventions import Convention
from attncongruence.maps import zero_losses
from attncongruence.streaming.forms import Form, Modality, SmallMaps
from attncongruence.streaming.low_rank import low_rank_kl
from attncongruence.streaming.mean_map import mean_map
from attncongruence.streaming.operators import cache_bytes, first_derivative_only, has_kernels

SHORTEST = 256
"""Tokens of the larger modality from which the streaming form can be faster than the dense one."""


def pays(query: Tensor, longest: tuple[int, int], convention: Convention) -> bool:
    """The rule of `impl="auto"`: whether the streaming form is faster than the dense one (docs/performance.md).

    It is where one modality has at least 256 tokens and its map, of all heads and samples, fills the last cache level
    (twice `cache_bytes`); on raw scores, of which the dense form makes more copies, an eighth of it.
    """
    batch, heads = query.shape[:2]
    whole_map = batch * heads * max(longest) ** 2 * max(query.element_size(), 4)
    room = cache_bytes(query.device) // 4 if convention.blocks == "scores" else 2 * cache_bytes(query.device)
    return max(longest) >= SHORTEST and whole_map > room


def streaming_or_dense(
    name: str,
    form: Form | None,
    attention: Attention,
    n_text: NText | None,
    mask: Tensor | None,
    convention: Convention,
    impl: Impl,
) -> tuple[Located | None, bool]:
    """Whether to use the streaming form, and where the tokens are, if that had to be read.

    Raises:
        ValueError: the streaming form was asked for and can't be used.
    """
    where, remedy = None, ", or pass a captured layer or QueryKey(query, key) without a mask of pairs"
    if form is None:
        why, remedy = f"the loss {name!r} has no streaming form", ""
    elif isinstance(attention, AttentionBlocks):
        why, remedy = "AttentionBlocks hold scores, not queries and keys, and two streams have no streaming form", ""
    elif isinstance(attention, Tensor):
        why = "it was given scores, not queries and keys"
    else:
        where = locate(attention, n_text, mask, attention)
        if where.allowed is not None:
            why = "a mask says which pairs may attend (causal attention, for instance)"
        elif attention.query is None:
            why = "it has no query and key, as a layer whose model adds a bias, caps or shifts its scores"
        elif impl == "streaming" or pays(attention.query, where.longest, convention):
            return where, True
    if impl == "streaming":
        raise ValueError(
            f"impl='streaming' can't be used here, {why}: use impl='auto', which then takes the dense form{remedy}"
        )
    return where, False


def per_sample(source: Any, where: Located, form: Form, convention: Convention, direction: Direction) -> Tensor:
    """The loss of each sample, `(batch,)`: the same value and gradient as the dense form's.

    Args:
        source: a `ScoreSource` with query and key.
        where: where its tokens are; no pairs of them are left out.
        form: of the loss.
        convention: and direction, as in `cacr_loss`.
    """
    query, key, scale = source.query, source.key, source.scale
    heads, language, vision = query.shape[1], direction != "vision", direction != "language"
    with no_autocast(query.device):
        text, image = _modalities(query, key, where)
        if not text.q.shape[2] or not image.q.shape[2] or not text.q.shape[0]:
            return zero_losses(query) + zero_losses(key)
        if convention.blocks == "scores":
            if convention.heads == "mean_map":
                # mean_h scale q_h k_h^T: one head, with the heads' widths side by side
                fold = "batch heads n width -> batch 1 n (heads width)"
                text, image, scale = _folded(text, fold, 1), _folded(image, fold, 1), scale / heads
            losses = [_on_scores(text, image, scale, form, convention)] if language else []
            losses += [_on_scores(image, text, scale, form, convention)] if vision else []
            return losses[0] if len(losses) == 1 else losses[0] + losses[1]
        if convention.heads == "mean_loss":
            fold = "batch heads n width -> (batch heads) 1 n width"
            text, image = _folded(text, fold, heads), _folded(image, fold, heads)
        if text.q.shape[2] > image.q.shape[2]:
            # The larger modality's map is the one that is never built.
            text, image, language, vision = image, text, vision, language
        loss = _on_probabilities(SmallMaps(text, image, scale, form, convention), form, language, vision)
        return loss.view(-1, heads).mean(1) if convention.heads == "mean_loss" else loss


def _modalities(query: Tensor, key: Tensor, where: Located) -> tuple[Modality, Modality]:
    """Queries and keys of text and of image, 0 beyond a sample's own tokens, so that no NaN there can pass on."""
    both = both_modalities(where.text, where.image)
    places = where.places
    if where.padded and not isinstance(places[0], Tensor):  # a span may hold padding
        places = own_positions(where.text, where.image, where.longest)
    q, k = first_derivative_only(query), first_derivative_only(key)
    if not has_kernels(q, k):
        q, k = at_least_float32(q), at_least_float32(k)
    found = []
    for q_own, k_own, tokens in zip(take(q, places, -2), take(k, places, -2), (where.text, where.image), strict=True):
        lengths, mask = tokens.sum(-1) * both, None
        if where.padded:
            mask = torch.arange(q_own.shape[2], device=q_own.device) < lengths[:, None]
            q_own, k_own = (x.masked_fill(~mask[:, None, :, None], 0.0) for x in (q_own, k_own))
        found.append(Modality(q_own, k_own, lengths, mask))
    return found[0], found[1]


def _folded(x: Modality, pattern: str, repeats: int) -> Modality:
    """The heads folded into another dimension, and so many samples in place of one."""
    lengths, mask = x.lengths, x.token_mask
    if repeats > 1:
        lengths = lengths[:, None].expand(-1, repeats).flatten()
        mask = mask if mask is None else mask[:, None].expand(-1, repeats, -1).flatten(0, 1)
    return Modality(rearrange(x.q, pattern), rearrange(x.k, pattern), lengths, mask)


def _each_row(loss: Tensor, own: Modality, convention: Convention) -> Tensor:
    """Sums over rows, `(batch, ...)`, as the convention counts rows."""
    if convention.rows == "sum":
        return loss
    return loss / own.lengths.clamp(min=1).view(-1, *[1] * (loss.dim() - 1))


def _on_scores(own: Modality, other: Modality, scale: float, form: Form, convention: Convention) -> Tensor:
    """m-KL(sigma(E VV E^T), sigma(LL)) of one side, both maps by their factors."""
    pooled_q, pooled_k = form.pooled(own, other, scale, convention)
    # E VV E^T = scale (E Q_V) (E K_V)^T
    rows = low_rank_kl(pooled_q, pooled_k, own.q, own.k, own.lengths, scale)
    return _each_row(rows, own, convention).mean(1)


def _on_probabilities(small: SmallMaps, form: Form, language: bool, vision: bool) -> Tensor:
    """One side or both, where all blocks but VV are small enough to be built; `mean_map` replaces VV."""
    text, image, convention = small.text, small.image, small.convention
    # What is asked of VV: E VV E^T, and the rows of FG^T against its own.
    E = form.projection(small) if language else None
    F, G = form.factors(small) if vision else (None, None)
    R, of_image = mean_map(
        image.q, image.k, E, F, G, image.lengths, small.scale, form.target(convention), convention.epsilon
    )
    loss = _each_row(of_image, image, convention)
    if language:
        loss = loss + _each_row(form.rows(small, R[:, None]).sum((1, 2)), text, convention)
    return loss
