"""A single-stream matcher of captions and pictures, as UNITER (regions) and ViLT (patches) are, small enough for a CPU.

score, S = Matcher(view)(captions, images)        S: the last layer's pre-softmax scores
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.compositionality.data import CAPTION, WORDS

WIDTH, HEADS, LAYERS = 64, 4, 3


class Layer(nn.Module):
    """Self-attention and a feed-forward part, each behind a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens after this layer, and its scores, scale Q K^T."""
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        S = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
        x = x + self.out((S.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x)))), S


class Matcher(nn.Module):
    """How well a caption fits a picture, read off the first word ([CLS]).

    Args:
        tokens: number of image tokens.
        features: width of an image token.
        ordered: whether the place of an image token among the others means something (patches), or not (regions).
    """

    def __init__(self, tokens: int, features: int, ordered: bool) -> None:
        super().__init__()
        self.word = nn.Embedding(len(WORDS), WIDTH)
        self.place = nn.Parameter(torch.randn(CAPTION + (tokens if ordered else 0), WIDTH))
        self.image = nn.Linear(features, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.last, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, captions: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores `(batch,)` of the pairs, and the last layer's attention scores, `(batch, heads, length, length)`."""
        text, image = self.word(captions) + self.place[:CAPTION], self.image(images)
        if len(self.place) > CAPTION:
            image = image + self.place[CAPTION:]
        x = self.norm(torch.cat((text, image), dim=1))
        for layer in self.layers:
            x, S = layer(x)
        return self.head(self.last(x[:, 0])).squeeze(-1), S
