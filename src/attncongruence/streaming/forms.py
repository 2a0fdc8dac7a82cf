"""What is particular to each loss in the streaming form. Its dense form, in `losses.py`, says the same in maps.

Everything is written for the side of `own` tokens seen through `other` ones; text and image take turns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attncongruence._typing import at_least_float32
from attncongruence.blocks import Quadrants, outer
from attncongruence.conventions import Convention
from attncongruence.divergence import distributed_kl, m_kl
from attncongruence.maps import attention_map, equivalence, fill, log_attention_map
from attncongruence.streaming.operators import Target, batched, cache_bytes
from attncongruence.streaming.pooling import pool

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Modality:
    """The queries and keys of one modality, each sample's own tokens in front."""

    q: Tensor
    """`(batch, heads, n, width)`, 0 beyond the sample's length."""
    k: Tensor
    lengths: Tensor
    """`(batch,)`; 0 for samples that lack a modality."""
    token_mask: Tensor | None
    """`(batch, n)`, True at a sample's own tokens; None: at all of them."""


class SmallMaps:
    """The maps of probabilities that are small enough to be built: all but VV, that of the larger modality.

    `text` is the smaller modality here, `image` the larger one. LV and VL have a gradient if `form` needs one.
    """

    def __init__(self, text: Modality, image: Modality, scale: float, form: Form, convention: Convention) -> None:
        self.text, self.image, self.scale, self.convention = text, image, scale, convention
        masks = text.token_mask, image.token_mask
        self.masks = Quadrants(*(None if x is None or y is None else outer(x, y) for x in masks for y in masks))
        self.scores = block(text.q, text.k, scale)
        self.LL = attention_map(self.scores, self.masks.LL, convention)
        with torch.set_grad_enabled(form.differentiates_cross_maps(convention) and torch.is_grad_enabled()):
            self.LV = attention_map(block(text.q, image.k, scale), self.masks.LV, convention)
            self.VL = attention_map(block(image.q, text.k, scale), self.masks.VL, convention)


class Form:
    """One loss from queries and keys, on raw scores by `pooled`, on probabilities by the other methods."""

    def pooled(self, own: Modality, other: Modality, scale: float, convention: Convention) -> Pair:
        """E Q and E K of the other modality, `(batch, heads, n, width)` each; E itself is not built."""
        raise NotImplementedError("this loss is not defined on raw scores")

    def differentiates_cross_maps(self, convention: Convention) -> bool:
        """Whether the loss has a gradient through LV and VL."""
        return False

    def target(self, convention: Convention) -> Target:
        """What a row is compared with: softmax(T), T itself, or T by the distributed formula."""
        return "softmax" if convention.iais_target_softmax else "log"

    def projection(self, small: SmallMaps) -> Tensor | None:
        """E, `(batch, N, M)`, where E VV E^T is wanted."""
        return None

    def factors(self, small: SmallMaps) -> Pair:
        """F `(batch, M, rank)` and G, whose product F G^T is compared with VV."""
        raise NotImplementedError

    def rows(self, small: SmallMaps, R: Tensor) -> Tensor:
        """Per-row divergence of the language side, `(batch, heads, N)`; R is `E VV E^T`, empty if not wanted."""
        # m-KL(sigma(R), sigma(LL)), or m-KL(sigma(R), LL)
        LL = small.LL
        if self.target(small.convention) == "log":
            LL = log_attention_map(small.scores, small.masks.LL, small.convention)
        return m_kl(R, LL, small.masks.LL)


class CACR(Form):
    """`cacr`: E is the text-to-image attention."""

    def pooled(self, own: Modality, other: Modality, scale: float, convention: Convention) -> Pair:
        q, k = (x.detach() if convention.detach_equivalence else x for x in (own.q, other.k))
        if convention.equivalence == "block":
            # E = LV = scale Q_L K_V^T, so E Q_V = scale Q_L (K_V^T Q_V)
            q, k = scale * at_least_float32(q), at_least_float32(k)
            return q @ (k.mT @ at_least_float32(other.q)), q @ (k.mT @ at_least_float32(other.k))
        # E = softmax(LV / tau), so E Q_V and E K_V are attention with values Q_V and K_V
        pooled = pool(q, k, torch.cat([other.q, other.k], -1), other.lengths, scale / convention.temperature)
        width = own.q.shape[-1]
        return pooled[..., :width], pooled[..., width:]

    def differentiates_cross_maps(self, convention: Convention) -> bool:
        return not convention.detach_equivalence

    def target(self, convention: Convention) -> Target:
        return "softmax" if convention.target_softmax else "log"

    def projection(self, small: SmallMaps) -> Tensor:
        return equivalence(small.LV, small.masks.LV, small.convention)[:, 0]

    def factors(self, small: SmallMaps) -> Pair:
        # R = E LL E^T of the vision side
        E = equivalence(small.VL, small.masks.VL, small.convention)[:, 0]
        return E @ small.LL[:, 0], E


class Singular(Form):
    """`singular`: E = one_hot(argmax LV), so that E Q is a gather, and has no gradient."""

    def pooled(self, own: Modality, other: Modality, scale: float, convention: Convention) -> Pair:
        index: Tensor = _argmax(own.q.detach(), other.k.detach(), other.lengths, scale, other.token_mask is not None)
        index = index[..., None].expand(-1, -1, -1, own.q.shape[-1])
        return other.q.gather(2, index) + _nan_or_0(own.q, other.q, other.k), other.k.gather(2, index)

    def factors(self, small: SmallMaps) -> Pair:
        # R[i, j] = LL[a_i, a_j], from its picked rows and a one-hot E
        best, LL = _best(small.VL, small.text.token_mask)[:, 0], small.LL[:, 0]
        G = (best[..., None] == torch.arange(LL.shape[-1], device=best.device)).to(LL.dtype)
        F = LL.gather(1, best[..., None].expand(-1, -1, LL.shape[-1]))
        mask = None if small.image.token_mask is None else small.image.token_mask[..., None]
        return fill(F, mask, 0.0), fill(G, mask, 0.0)

    def rows(self, small: SmallMaps, R: Tensor) -> Tensor:
        # R = VV[argmax LV, argmax LV], for which only the picked rows of VV are built
        best, image = _best(small.LV, small.image.token_mask), small.image
        heads, width = image.q.shape[1], image.q.shape[3]
        picked = image.q.gather(2, best[..., None].expand(-1, heads, -1, width))
        VV = attention_map(block(picked, image.k, small.scale), small.masks.LV, small.convention)
        R = VV.gather(-1, best[:, :, None].expand(-1, -1, best.shape[-1], -1))
        return super().rows(small, R + _nan_or_0(small.LV, image.q, image.k))


class Distributed(Form):
    """`distributed`: from text to image and back. Only defined on probabilities."""

    def differentiates_cross_maps(self, convention: Convention) -> bool:
        return True

    def target(self, convention: Convention) -> Target:
        return "distributed"

    def factors(self, small: SmallMaps) -> Pair:
        # A_VL A_LV against A_VV
        return small.VL[:, 0], small.LV[:, 0].mT

    def rows(self, small: SmallMaps, R: Tensor) -> Tensor:
        # A_LV A_VL against A_LL; VV does not matter
        return distributed_kl(small.LV @ small.VL, small.LL, small.convention.epsilon)


def block(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """A block of S, `(batch, heads, rows, columns)`."""
    return (scale * at_least_float32(q)) @ at_least_float32(k).mT


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
    return torch.cat([_best(block(q[:, :, start : start + step], k, scale), columns) for start in starts], -1)


@_argmax.register_fake
def _(q: Tensor, k: Tensor, lengths: Tensor, scale: float, padded: bool) -> Tensor:
    return q.new_empty(q.shape[:-1], dtype=torch.long)


batched(_argmax, tensors=3)


def _best(scores: Tensor, columns: Tensor | None) -> Tensor:
    floor = torch.finfo(scores.dtype).min / 2
    return fill(scores, None if columns is None else columns[:, None, None], floor).argmax(-1)


def _nan_or_0(*tensors: Tensor) -> Tensor:
    """0 for each sample, `(batch, 1, 1, 1)`, NaN where a tensor has one: an argmax would lose it."""
    return torch.stack([0 * x.detach().amax((1, 2, 3), keepdim=True) for x in tensors]).sum(0)
