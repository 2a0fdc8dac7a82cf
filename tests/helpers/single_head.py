"""Small attention modules, by hand and fused, and what capture makes of them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attncongruence.capture import CapturedAttention, capture_attention


class ByHand(nn.Module):
    """One head of attention that calls softmax by itself and, if asked, writes to its scores unseen."""

    def __init__(self, write: bool = False) -> None:
        super().__init__()
        self.query, self.key, self.write = nn.Linear(4, 4), nn.Linear(4, 4), write

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x)[:, None] @ self.key(x)[:, None].transpose(-1, -2)
        if self.write:
            scores.detach()[..., 0] = 0
        return torch.softmax(scores, -1) @ x[:, None]


class Fused(nn.Module):
    """One head of attention in one call of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x)[:, None]
        return F.scaled_dot_product_attention(q, q, q)


X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


def record(model: nn.Module, layers: int | str = -1) -> CapturedAttention:
    """Of one forward pass."""
    with capture_attention(model, layers) as capture:
        model(X)
        return capture.pop()


class Ways(nn.Module):
    """Holds q and k, `(batch, heads, length, width)`, and calls one function of them."""

    def __init__(self, way: Callable[[Tensor, Tensor], Tensor], *, shape: tuple[int, ...], seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.q, self.k = (nn.Parameter(torch.randn(shape, generator=random)) for _ in range(2))
        self.way = way

    def forward(self) -> Tensor:
        return self.way(self.q * 1, self.k * 1)


def record_of(model: nn.Module) -> CapturedAttention:
    """Of one forward pass of a model without inputs, which attends by itself."""
    with capture_attention(model, model) as capture:
        model()
        return capture.pop()
