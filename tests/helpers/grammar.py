"""Attention as people write it by hand: random modules from a grammar, and what each of them computes.

Each choice of `CHOICES` is one way to write one step. `Attention` follows the choices; `Attention.truth` computes the
same scores as `(batch, heads, length, length)` from the same weights, in one way for all of them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from attncongruence import ScoreSource

CHOICES = {
    "first": ("batch", "length"),
    "projection": ("linear", "fused", "fused by head", "einsum", "conv", "one", "none"),
    "split": (
        "transpose", "permute", "movedim", "rearrange", "stack", "heads first", "fold", "fold rearrange",
        "fold length first", "fold heads first", "fold chunks", "einsum", "groups", "grouped keys",
    ),
    "product": ("matmul", "operator", "einsum", "bmm", "baddbmm", "transposed"),
    "scale": ("query", "key", "both", "scores", "divide", "tensor left", "learned", "alpha", "none"),
    "change": ("nothing", "nothing", "nothing", "bias", "cap", "shift", "clamp"),
    "mask": (
        "none", "add", "add low", "sub", "alpha", "fill", "fill in place", "where", "where hidden", "times", "causal",
        "two masks", "before scale",
    ),
    "softmax": ("function", "method", "torch", "module", "float32", "log", "by hand", "out"),
    "loop": ("none", "none", "none", "none", "heads", "samples"),
}  # fmt: skip
LOOPS = ("transpose", "permute", "movedim", "rearrange", "stack", "heads first")
UNSEEN = ("log", "by hand")
"""Softmaxes that no torch function shows: these are refused."""


@dataclass(frozen=True)
class Spec:
    """One module of the grammar."""

    batch: int
    heads: int
    length: int
    width: int
    choices: dict[str, str]

    def __getattr__(self, name: str) -> str:
        """A choice by its name."""
        try:
            return self.choices[name]
        except KeyError:
            raise AttributeError(name) from None


def draw(seed: int, **fixed: str) -> Spec:
    """A random module; sizes are small, so that some of them agree by chance."""
    r = random.Random(seed)
    choices = {name: fixed.get(name) or r.choice(ways) for name, ways in CHOICES.items()}
    batch, heads, length = r.randint(1, 4), r.randint(1, 4), r.randint(2, 7)
    if choices["split"] in ("groups", "grouped keys"):
        heads *= 2
    if choices["split"] == "grouped keys":
        choices["projection"] = "linear"
    if choices["loop"] != "none" and choices["split"] not in LOOPS:
        choices["loop"] = "none"
    return Spec(batch, heads, length, r.choice((1, 2, 3, 4)), choices)


class Attention(nn.Module):
    """One attention of the grammar, from `(batch, length, heads * width)` or `(length, batch, ...)` to the same."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        size, heads, width = spec.heads * spec.width, spec.heads, spec.width
        self.keys = heads // 2 if spec.split == "grouped keys" else heads
        if spec.projection == "fused" or spec.projection == "fused by head":
            self.qkv = nn.Linear(size, 3 * size)
        elif spec.projection == "einsum":
            self.weight = nn.Parameter(torch.randn(3, size, heads, width) / size**0.5)
        elif spec.projection == "conv":
            self.convs = nn.ModuleList([nn.Conv1d(size, size, 1) for _ in range(3)])
        elif spec.projection != "none":
            self.q = nn.Linear(size, size)
            self.k, self.v = (nn.Linear(size, self.keys * width) for _ in range(2))
        self.factor = nn.Parameter(torch.tensor(width**-0.5)) if spec.scale == "learned" else width**-0.5
        self.bias = nn.Parameter(torch.randn(heads, spec.length, spec.length))
        self.softmax = nn.Softmax(-1)
        self.register_buffer("number", torch.tensor(width**-0.5))

    def projected(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values, `(first, second, heads * width)` each, for x in either order."""
        spec, size = self.spec, x.shape[-1]
        if spec.projection == "none":
            return [x, x, x]
        if spec.projection == "one":
            q = self.q(x)
            return [q, q if self.keys == spec.heads else self.k(x), self.v(x)]
        if spec.projection == "linear":
            return [self.q(x), self.k(x), self.v(x)]
        if spec.projection == "fused":
            return list(self.qkv(x).chunk(3, -1))
        if spec.projection == "fused by head":
            each = self.qkv(x).view(*x.shape[:2], spec.heads, 3, spec.width)
            return [part.reshape(*x.shape[:2], size) for part in each.unbind(3)]
        if spec.projection == "einsum":
            return [torch.einsum("abe,ehd->abhd", x, w).flatten(2) for w in self.weight]
        return [conv(x.transpose(1, 2)).transpose(1, 2) for conv in self.convs]

    def truth(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Scores `(batch, heads, length, length)`, -inf at hidden pairs, and which pairs may attend."""
        spec, scale = self.spec, self.scale()
        q, k, _ = self.projected(x)
        q, k = ((y if spec.first == "batch" else y.transpose(0, 1)) for y in (q, k))
        q, k = (rearrange(y, "b l (h d) -> b h l d", d=spec.width) for y in (q, k))
        if self.keys != spec.heads:
            k = k.repeat_interleave(spec.heads // self.keys, 1)
        scores = self.changed(scale * q @ k.mT, self.bias)
        allowed = torch.ones(x.new_zeros(1).shape, dtype=torch.bool).expand(len(q), 1, spec.length, spec.length)
        if spec.mask == "causal":
            allowed = torch.ones(spec.length, spec.length, dtype=torch.bool).tril().expand(len(q), 1, -1, -1)
        elif spec.mask != "none":
            allowed = ~hidden[:, None, None].expand(-1, 1, spec.length, -1)
        return scores.masked_fill(~allowed, -torch.inf), allowed

    def scale(self) -> float | Tensor:
        """The factor of q k^T."""
        return 1.0 if self.spec.scale == "none" else self.factor

    def changed(self, scores: Tensor, bias: Tensor) -> Tensor:
        """What some models do to scores before the mask."""
        if self.spec.change == "bias":
            return scores + bias
        if self.spec.change == "cap":
            return 2.0 * torch.tanh(scores / 2.0)
        if self.spec.change == "shift":
            return scores - scores.amax(-1, keepdim=True).detach()
        return scores.clamp(-3, 3) if self.spec.change == "clamp" else scores

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Attention over the length; `hidden`, `(batch, length)`, is True at keys that nobody may see."""
        spec = self.spec
        q, k, v = self.projected(x)
        q, k, v = self.split(q, spec.heads), self.split(k, self.keys), self.split(v, self.keys)
        if spec.split == "grouped keys":
            k, v = (y[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for y in (k, v))
        if spec.loop == "heads":
            axis = 0 if spec.split == "heads first" else 1
            parts = [
                self.attend(*(y.select(axis, h) for y in (q, k, v)), hidden, self.bias[h]) for h in range(spec.heads)
            ]
            out = torch.stack(parts, axis)
        elif spec.loop == "samples":
            axis = 1 if spec.split == "heads first" else 0
            parts = [
                self.attend(*(y.select(axis, b) for y in (q, k, v)), hidden[b : b + 1], self.bias)
                for b in range(q.shape[axis])
            ]
            out = torch.stack(parts, axis)
        else:
            out = self.attend(q, k, v, hidden, self.bias)
        return self.joined(out)

    def split(self, x: Tensor, heads: int) -> Tensor:
        """Heads split off, and perhaps folded into the batch."""
        spec, width = self.spec, self.spec.width
        if spec.split == "fold length first":
            x = x if spec.first == "length" else x.transpose(0, 1)
            length, batch = x.shape[:2]
            return x.contiguous().view(length, batch * heads, width).transpose(0, 1)
        x = x if spec.first == "batch" else x.transpose(0, 1)
        batch, length = x.shape[:2]
        if spec.split == "fold chunks":
            return torch.cat(x.split(width, -1), 0)
        if spec.split == "stack":
            return torch.stack(x.chunk(heads, -1), 1)
        if spec.split == "rearrange":
            return rearrange(x, "b l (h d) -> b h l d", h=heads)
        if spec.split == "fold rearrange":
            return rearrange(x, "b l (h d) -> (b h) l d", h=heads)
        x = x.unflatten(-1, (heads, width)) if spec.split == "movedim" else x.reshape(batch, length, heads, width)
        if spec.split == "einsum":
            return x
        if spec.split == "movedim":
            return x.movedim(2, 1)
        if spec.split == "permute":
            return x.permute(0, 2, 1, 3)
        if spec.split == "heads first":
            return x.permute(2, 0, 1, 3)
        if spec.split == "fold":
            return x.transpose(1, 2).reshape(batch * heads, length, width)
        if spec.split == "fold heads first":
            return x.permute(2, 0, 1, 3).reshape(heads * batch, length, width)
        if spec.split == "groups":
            return x.transpose(1, 2).reshape(batch, 2, heads // 2, length, width)
        return x.transpose(1, 2)

    def joined(self, x: Tensor) -> Tensor:
        """The heads joined again, in the order of the module's input."""
        spec = self.spec
        heads, width = spec.heads, spec.width
        if spec.split in ("fold", "fold rearrange", "fold length first"):
            x = rearrange(x, "(b h) l d -> b l (h d)", h=heads)
        elif spec.split in ("fold chunks", "fold heads first"):
            x = rearrange(x, "(h b) l d -> b l (h d)", h=heads)
        elif spec.split == "heads first":
            x = rearrange(x, "h b l d -> b l (h d)")
        elif spec.split == "einsum":
            x = rearrange(x, "b l h d -> b l (h d)")
        elif spec.split == "groups":
            x = rearrange(x, "b g h l d -> b l (g h d)")
        else:
            x = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], heads * width)
        return x if spec.first == "batch" else x.transpose(0, 1)

    def spread(self, x: Tensor, scores: Tensor, per_head: bool) -> Tensor:
        """A mask `(batch, 1 or L, L)` or a bias `(heads, L, L)`, in the form of the scores."""
        spec = self.spec
        if spec.loop == "samples":
            return x if per_head else x[0]
        if spec.loop == "heads":
            return x
        if spec.split == "groups":
            return x.unflatten(0, (2, -1)) if per_head else x[:, None, None]
        if scores.dim() == 4:
            if spec.split == "heads first":
                return x[:, None] if per_head else x[None]
            return x if per_head else x[:, None]
        times = scores.shape[0] // x.shape[0]
        if (spec.split in ("fold chunks", "fold heads first")) == per_head:
            return x.repeat_interleave(times, 0)
        return x.repeat(times, 1, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, bias: Tensor) -> Tensor:
        """softmax(scale q k^T + mask) v, as the choices say."""
        spec, scale = self.spec, self.scale()
        if spec.scale == "query":
            q = q * scale
        elif spec.scale == "key":
            k = scale * k
        elif spec.scale == "both":
            q, k = q * scale**0.5, k * scale**0.5
        elif spec.scale == "learned":
            q = q * scale
        scores = self.multiplied(q, k)
        if spec.mask == "before scale" and spec.change == "nothing":
            scores = scores + self.spread(hidden[:, None].to(q.dtype), scores, False) * -1e9
        if spec.scale == "scores":
            scores = scores * scale
        elif spec.scale == "divide":
            scores = scores / (1.0 / scale)
        elif spec.scale == "tensor left":
            scores = self.number * scores
        elif spec.scale == "alpha" and not self.uses_alpha(scores):
            scores = scores.mul(scale)
        scores = self.changed(scores, self.spread(bias, scores, True) if spec.change == "bias" else bias)
        probs = self.normalized(self.masked(scores, hidden))
        if spec.split == "einsum":
            return torch.einsum("bhij,bjhd->bihd", probs, v)
        return probs @ v

    def uses_alpha(self, scores: Tensor) -> bool:
        """Whether the product itself had the scale."""
        return self.spec.product == "baddbmm" and scores.dim() == 3

    def multiplied(self, q: Tensor, k: Tensor) -> Tensor:
        """The product of queries and keys, before the scale."""
        spec = self.spec
        if spec.split == "einsum":
            return torch.einsum("bihd,bjhd->bhij", q, k)
        if spec.product == "einsum" and q.dim() == 4:
            return torch.einsum("abid,abjd->abij", q, k)
        if spec.product == "bmm" and q.dim() == 3:
            return torch.bmm(q, k.transpose(1, 2))
        if spec.product == "baddbmm" and q.dim() == 3:
            alpha = float(self.factor) if spec.scale == "alpha" else 1.0
            return torch.baddbmm(q.new_empty(q.shape[0], q.shape[1], k.shape[1]), q, k.mT, beta=0, alpha=alpha)
        if spec.product == "operator":
            return q @ k.transpose(-1, -2)
        if spec.product == "transposed":
            return (k @ q.mT).mT
        return torch.matmul(q, k.mT)

    def masked(self, scores: Tensor, hidden: Tensor) -> Tensor:
        """The scores with their mask."""
        spec, low = self.spec, torch.finfo(scores.dtype).min
        if spec.mask == "none" or (spec.mask == "before scale" and spec.change == "nothing"):
            return scores
        if spec.mask == "causal":
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            return scores.masked_fill(later, -torch.inf)
        pairs = self.spread(hidden[:, None], scores, False)
        mask = pairs.to(scores.dtype)
        if spec.mask == "add":
            return scores + torch.zeros_like(mask).masked_fill(pairs, low)
        if spec.mask == "sub":
            return scores - 10000.0 * mask
        if spec.mask == "alpha":
            return torch.add(scores, mask, alpha=-1e4)
        if spec.mask == "fill":
            return scores.masked_fill(pairs, -1e9)
        if spec.mask == "fill in place":
            return scores.masked_fill_(pairs, -torch.inf)
        if spec.mask == "where":
            return torch.where(~pairs, scores, scores.new_tensor(-1e9))
        if spec.mask == "where hidden":
            return torch.where(pairs, -torch.inf, scores)
        if spec.mask == "two masks":
            return scores + -1e4 * mask + (1.0 - (1.0 - mask)) * -1e4
        return scores + (1.0 - (1.0 - mask)) * (-1e4 if spec.mask == "add low" else low)

    def normalized(self, scores: Tensor) -> Tensor:
        """The softmax."""
        way = self.spec.softmax
        if way == "method":
            return scores.softmax(dim=-1)
        if way == "torch":
            return torch.softmax(scores, scores.dim() - 1)
        if way == "module":
            return self.softmax(scores)
        if way == "float32":
            return F.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
        if way == "log":
            return F.log_softmax(scores, -1).exp()
        if way == "by hand":
            e = (scores - scores.amax(-1, keepdim=True)).exp()
            return e / e.sum(-1, keepdim=True)
        if way == "out":
            probs = F.softmax(scores, -1)
            with torch.no_grad():
                scores.detach().copy_(probs)  # the model uses its memory again
            return probs
        return F.softmax(scores, dim=-1)


class Model(nn.Module):
    """Two attentions of the grammar, one after the other: sizes of one must not be taken for those of the other."""

    def __init__(self, below: Spec, spec: Spec) -> None:
        super().__init__()
        self.below, self.attention = Attention(below), Attention(spec)

    def forward(self, x: Tensor, y: Tensor, hidden_x: Tensor, hidden_y: Tensor) -> Tensor:
        """The sum of everything, of both."""
        return self.below(x, hidden_x).square().mean() + self.attention(y, hidden_y).square().mean()


class Truth(ScoreSource):
    """What a module of the grammar computes, as a source of scores."""

    def __init__(self, scores: Tensor, allowed: Tensor) -> None:
        self._scores, self._allowed = scores, allowed

    @property
    def scores(self) -> Tensor:
        """The scores."""
        return self._scores

    @property
    def allowed(self) -> Tensor:
        """Which pairs may attend."""
        return self._allowed
