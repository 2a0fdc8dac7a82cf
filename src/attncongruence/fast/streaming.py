"""The losses from queries and keys: E VV E^T = scale (E Q_V) (E K_V)^T, so that VV need not exist.

On raw scores both sides of the m-KL are maps of low rank, made of cross-modally pooled queries and keys. On
probabilities, whose map is a mean over heads, the larger modality's map is worked on a tile at a time.
Everything is written for the side of `own` tokens seen through `other` ones; text and image take turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from attncongruence._precision import at_least_float32, zeros
from attncongruence._typing import Direction
from attncongruence.conventions import Convention
from attncongruence.divergence import symmetric_kl, there_and_back
from attncongruence.equivalence import attention_map, equivalence, fill, log_attention_map
from attncongruence.fast.low_rank import low_rank_kl
from attncongruence.fast.mean_map import mean_map
from attncongruence.fast.ops import batched, first_derivative_only, kernels
from attncongruence.fast.tiles import Target, cache_bytes
from attncongruence.layout import Stretch
from attncongruence.locate import Located
from attncongruence.quadrants import Quadrants, first_positions, take
from attncongruence.sources import QueryKey

Kind = Literal["cacr", "singular", "distributed"]


@dataclass(frozen=True, eq=False)
class Tokens:
    """The queries and keys of one modality, each sample's own tokens in front."""

    q: Tensor
    """`(batch, heads, n, width)`, 0 beyond the sample's length."""
    k: Tensor
    lengths: Tensor
    """`(batch,)`; 0 for samples that lack a modality."""
    padded: bool

    @property
    def real(self) -> Tensor | None:
        """`(batch, n)`, True at a sample's own tokens; None: at all of them."""
        if not self.padded:
            return None
        return torch.arange(self.q.shape[2], device=self.q.device) < self.lengths[:, None]


def pays(query: Tensor, longest: tuple[int, int], convention: Convention) -> bool:
    """The rule of `impl="auto"`: whether the streaming form is faster than the dense one (docs/performance.md).

    It is where one modality has at least 256 tokens and its map, of all heads and samples, fills the last cache level
    (twice `cache_bytes`); on raw scores, of which the dense form makes more copies, an eighth of it.
    """
    batch, heads = query.shape[:2]
    whole_map = batch * heads * max(longest) ** 2 * max(query.element_size(), 4)
    room = cache_bytes(query.device) // 4 if convention.blocks == "scores" else 2 * cache_bytes(query.device)
    return max(longest) >= 256 and whole_map > room


def per_sample(source: QueryKey, where: Located, kind: Kind, convention: Convention, direction: Direction) -> Tensor:
    """The loss of each sample, `(batch,)`: the same value and gradient as the dense form's."""
    (text, image), scale, heads = _tokens(source, where), source.scale, source.query.shape[1]
    if not text.q.shape[2] or not image.q.shape[2] or not text.q.shape[0]:
        return zeros(source.query) + zeros(source.key)
    if convention.blocks == "scores":
        if convention.heads == "mean_map":
            # mean_h scale q_h k_h^T: one head, with the heads' widths side by side
            text, image, scale = _side_by_side(text), _side_by_side(image), scale / heads
        sides = {"language": [(text, image)], "vision": [(image, text)], "both": [(text, image), (image, text)]}
        losses = [_on_scores(own, other, scale, kind, convention) for own, other in sides[direction]]
        return losses[0] if len(losses) == 1 else losses[0] + losses[1]
    if convention.heads == "mean_loss":
        text, image = _heads_as_samples(text), _heads_as_samples(image)
    if text.q.shape[2] > image.q.shape[2]:
        # The larger modality's map is the one that is never built.
        text, image, direction = image, text, _OTHER_WAY[direction]
    loss = _on_probabilities(text, image, scale, kind, convention, direction)
    return loss.view(-1, heads).mean(1) if convention.heads == "mean_loss" else loss


def _tokens(source: QueryKey, where: Located) -> tuple[Tokens, Tokens]:
    """Text and image of a joint sequence."""
    both = where.text.any(-1) & where.image.any(-1)
    of_text: Stretch | Tensor
    of_image: Stretch | Tensor
    if where.spans is not None and not where.padded:
        of_text, of_image = where.spans
    else:
        of_text = first_positions(where.text, where.longest[0])
        of_image = first_positions(where.image, where.longest[1])
    q, k = (first_derivative_only(x) for x in (source.query, source.key))
    if not kernels(q, k):
        q, k = at_least_float32(q), at_least_float32(k)
    q_text, q_image = take(q, of_text, of_image, -2)
    k_text, k_image = take(k, of_text, of_image, -2)
    text = Tokens(q_text, k_text, where.text.sum(-1) * both, where.padded)
    image = Tokens(q_image, k_image, where.image.sum(-1) * both, where.padded)
    return _without_padding(text), _without_padding(image)


def _without_padding(x: Tokens) -> Tokens:
    """Zeros where another sample's tokens are: what stands there, NaN too, may not pass."""
    if x.real is None:
        return x
    hidden = ~x.real[:, None, :, None]
    return Tokens(x.q.masked_fill(hidden, 0.0), x.k.masked_fill(hidden, 0.0), x.lengths, x.padded)


_OTHER_WAY: dict[Direction, Direction] = {"language": "vision", "vision": "language", "both": "both"}


def _side_by_side(x: Tokens) -> Tokens:
    q, k = (rearrange(t, "batch heads n width -> batch 1 n (heads width)") for t in (x.q, x.k))
    return Tokens(q, k, x.lengths, x.padded)


def _heads_as_samples(x: Tokens) -> Tokens:
    q, k = (rearrange(t, "batch heads n width -> (batch heads) 1 n width") for t in (x.q, x.k))
    return Tokens(q, k, x.lengths.repeat_interleave(x.q.shape[1], output_size=q.shape[0]), x.padded)


def _each_row(loss: Tensor, own: Tokens, convention: Convention) -> Tensor:
    """Sums over rows, `(batch, ...)`, as the convention counts rows."""
    if convention.rows == "sum":
        return loss
    return loss / own.lengths.clamp(min=1).view(-1, *[1] * (loss.dim() - 1))


def _on_scores(own: Tokens, other: Tokens, scale: float, kind: Kind, convention: Convention) -> Tensor:
    """m-KL(sigma(E VV E^T), sigma(LL)) of one side, both maps by their factors."""
    if kind == "singular":
        pooled_q, pooled_k = _picked(own, other, scale)
    else:
        pooled_q, pooled_k = _pooled(own, other, scale, convention)
    # E VV E^T = scale (E Q_V) (E K_V)^T
    rows = low_rank_kl(pooled_q, pooled_k, own.q, own.k, own.lengths, scale)
    return _each_row(rows, own, convention).mean(1)


def _pooled(own: Tokens, other: Tokens, scale: float, convention: Convention) -> tuple[Tensor, Tensor]:
    """E Q and E K of the other modality, `(batch, heads, n, width)` each; E itself is not built."""
    q, k = (x.detach() if convention.detach_equivalence else x for x in (own.q, other.k))
    if convention.equivalence == "block":
        # E = LV = scale Q_L K_V^T, so E Q_V = scale Q_L (K_V^T Q_V)
        q, k = scale * at_least_float32(q), at_least_float32(k)
        return q @ (k.mT @ at_least_float32(other.q)), q @ (k.mT @ at_least_float32(other.k))
    # E = softmax(LV / tau), so E Q_V is attention with Q_V as its values
    real, tau = other.real, convention.temperature
    if real is not None:
        real = (real | (other.lengths == 0)[:, None])[:, None, None]
    pooled_q, pooled_k = (
        nn.functional.scaled_dot_product_attention(q, k, values, attn_mask=real, scale=scale / tau)
        for values in (other.q, other.k)
    )
    return pooled_q, pooled_k


def _picked(own: Tokens, other: Tokens, scale: float) -> tuple[Tensor, Tensor]:
    """E Q and E K for E = one_hot(argmax LV), by a gather."""
    index: Tensor = _argmax(own.q.detach(), other.k.detach(), other.lengths, scale, other.padded)
    index = index[..., None].expand(-1, -1, -1, own.q.shape[-1])
    return other.q.gather(2, index) + _nan_or_0(own.q, other.q, other.k), other.k.gather(2, index)


@torch.library.custom_op(
    "attncongruence::argmax",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor lengths, float scale, bool padded) -> Tensor",
)
def _argmax(q: Tensor, k: Tensor, lengths: Tensor, scale: float, padded: bool) -> Tensor:
    """Each row's best column among a sample's own, `(batch, heads, rows)`; some rows of the block at a time."""
    batch, heads, rows, _ = q.shape
    columns = torch.arange(k.shape[2], device=q.device) < lengths[:, None] if padded else None
    step = max(1, cache_bytes(q.device) // (q.element_size() * max(batch * heads * k.shape[2], 1)))
    starts = range(0, rows, step)
    return torch.cat([_best(_block(q[:, :, start : start + step], k, scale), columns) for start in starts], -1)


@_argmax.register_fake
def _(q: Tensor, k: Tensor, lengths: Tensor, scale: float, padded: bool) -> Tensor:
    return q.new_empty(q.shape[:-1], dtype=torch.long)


batched(_argmax, tensors=3)


def _best(scores: Tensor, columns: Tensor | None) -> Tensor:
    floor = torch.finfo(scores.dtype).min / 2
    return fill(scores, None if columns is None else columns[:, None, None], floor).argmax(-1)


def _block(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """A block of S, `(batch, heads, rows, columns)`."""
    return (scale * at_least_float32(q)) @ at_least_float32(k).mT


def _outer(rows: Tokens, columns: Tokens) -> Tensor | None:
    if rows.real is None or columns.real is None:
        return None
    return rows.real[:, None, :, None] & columns.real[:, None, None, :]


def _on_probabilities(
    text: Tokens, image: Tokens, scale: float, kind: Kind, convention: Convention, direction: Direction
) -> Tensor:
    """One side or both, where all blocks but VV are small enough to be built; `mean_map` stands for VV."""
    language, vision = direction != "vision", direction != "language"
    target_softmax = convention.iais_target_softmax if kind == "singular" else convention.target_softmax
    masks = Quadrants(*(_outer(rows, columns) for rows in (text, image) for columns in (text, image)))
    scores = _block(text.q, text.k, scale)
    LL = attention_map(scores, masks.LL, convention)
    with_grad = kind == "distributed" or (kind == "cacr" and not convention.detach_equivalence)
    with torch.set_grad_enabled(with_grad and torch.is_grad_enabled()):
        LV = attention_map(_block(text.q, image.k, scale), masks.LV, convention)
        VL = attention_map(_block(image.q, text.k, scale), masks.VL, convention)

    # What is asked of VV: E VV E^T, and the rows of FG^T against its own.
    E = F = G = None
    if kind == "cacr":
        if language:
            E = equivalence(LV, masks.LV, convention)[:, 0]
        if vision:
            # R = E LL E^T
            G = equivalence(VL, masks.VL, convention)[:, 0]
            F = G @ LL[:, 0]
    elif vision and kind == "singular":
        best = _best(VL, text.real)[:, 0]
        G = (best[..., None] == torch.arange(LL.shape[-1], device=best.device)).to(LL.dtype)
        F = LL[:, 0].gather(1, best[..., None].expand(-1, -1, LL.shape[-1]))
        F, G = (fill(x, None if image.real is None else image.real[..., None], 0.0) for x in (F, G))
    elif vision:
        F, G = VL[:, 0], LV[:, 0].mT
    target: Target = "distributed" if kind == "distributed" else "softmax" if target_softmax else "log"
    R, of_image = mean_map(image.q, image.k, E, F, G, image.lengths, scale, target, convention.epsilon)
    loss = _each_row(of_image, image, convention)
    if language:
        if kind == "distributed":
            rows = there_and_back(LV @ VL, LL, convention.epsilon)
        else:
            R = _picked_map(LV, image, scale, masks.LV, convention) if kind == "singular" else R[:, None]
            goal = LL if target_softmax else log_attention_map(scores, masks.LL, convention)
            rows = symmetric_kl(R, goal, masks.LL)
        loss = loss + _each_row(rows.sum((1, 2)), text, convention)
    return loss


def _picked_map(LV: Tensor, image: Tokens, scale: float, mask: Tensor | None, convention: Convention) -> Tensor:
    """VV[argmax LV, argmax LV], `(batch, 1, N, N)`: only the picked rows of VV are built."""
    best = _best(LV, image.real)
    heads, width = image.q.shape[1], image.q.shape[3]
    rows = image.q.gather(2, best[..., None].expand(-1, heads, -1, width))
    VV = attention_map(_block(rows, image.k, scale), mask, convention)
    return VV.gather(-1, best[:, :, None].expand(-1, -1, best.shape[-1], -1)) + _nan_or_0(LV, image.q, image.k)


def _nan_or_0(*tensors: Tensor) -> Tensor:
    """0 for each sample, `(batch, 1, 1, 1)`: a NaN has no argmax, and may stand where nothing is picked."""
    return torch.stack([0 * x.detach().amax((1, 2, 3), keepdim=True) for x in tensors]).sum(0)
