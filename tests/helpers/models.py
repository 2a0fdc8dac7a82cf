"""Small models that attend, for tests of capture, training and the doctor."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """`softmax(q k^T / sqrt(8)) v`, by hand or fused; `trouble` is raised between scores and values."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.qkv, self.fused, self.trouble = nn.Linear(16, 48), fused, None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
        if self.trouble is not None:
            raise self.trouble
        return out.transpose(1, 2).flatten(2)


class Stack(nn.Module):
    """Attention layers with a residual around each."""

    def __init__(self, layers: int = 2, fused: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(fused) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Tiny(nn.Module):
    """One self-attention over a sequence whose first tokens are text, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        query, key = self.project(x)[:, None].chunk(2, -1)
        return {"loss": F.scaled_dot_product_attention(query, key, key).square().mean()}


class Plain(nn.Module):
    """Two encoder layers; the second as the test wants it."""

    def __init__(self, run=lambda layer, x: layer(x)):
        super().__init__()
        layers = [nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(2)]
        self.first, self.second = layers
        self.norm, self.run = nn.BatchNorm1d(16), run

    def forward(self, x):
        return self.run(self.second, self.norm(self.first(x).mT).mT)


class ByHandAttention(nn.Module):
    """Exp and sum: no softmax that could be seen."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        weights = (self.q(x) @ self.k(x).mT).exp()
        return weights / weights.sum(-1, keepdim=True) @ self.v(x)


X = (torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0)),)
"""A batch for `Plain` and `ByHandAttention`: arguments of their forward pass."""


def hook_count(model: nn.Module) -> int:
    """How many forward hooks of every kind a model and its parts have."""
    dicts = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(module, name)) for module in model.modules() for name in dicts)
