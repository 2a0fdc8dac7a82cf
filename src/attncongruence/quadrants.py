"""Eq. 2 on any tensor: its four parts, cut as views where text and image fill stretches, gathered elsewhere."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

from attncongruence.layout import Stretch

T = TypeVar("T")


class Quadrants(NamedTuple, Generic[T]):
    """One thing for each block: its scores, its map, its mask. Rows are queries: `LV` is text to image."""

    LL: T
    LV: T
    VL: T
    VV: T

    def swap(self) -> Quadrants[T]:
        """L and V exchanged."""
        return Quadrants(LL=self.VV, LV=self.VL, VL=self.LV, VV=self.LL)


def first_positions(mask: Tensor, longest: int) -> Tensor:
    """Where each sample's True positions are, in order, and then some others: `(batch, longest)`."""
    return (~mask).int().argsort(dim=1, stable=True)[:, :longest]


def quadrants(S: Tensor, text: Stretch | Tensor, image: Stretch | Tensor) -> Quadrants[Tensor]:
    """Eq. 2: rows first, then columns; views for stretches, gathered for positions."""
    of_text, of_image = take(S, text, image, -2)
    (LL, LV), (VL, VV) = take(of_text, text, image, -1), take(of_image, text, image, -1)
    return Quadrants(LL, LV, VL, VV)


def take(x: Tensor, text: Stretch | Tensor, image: Stretch | Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Text and image of one dimension: two stretches of it, as views, or each sample's own positions."""
    if isinstance(text, Tensor) or isinstance(image, Tensor):
        return _gather(x, text, dim), _gather(x, image, dim)  # type: ignore[arg-type]
    in_order = text[1] <= image[0]
    (a, b), (c, d) = (text, image) if in_order else (image, text)
    # One split: its backward is one concatenation, that of slices fills all of x with zeros for each of them.
    _, first, _, second, _ = x.split([a, b - a, c - b, d - c, x.shape[dim] - d], dim)
    return (first, second) if in_order else (second, first)


def _gather(x: Tensor, index: Tensor, dim: int) -> Tensor:
    # Not take_along_dim: its broadcasting makes torch.compile a graph for each batch size.
    shape, wide = [index.shape[0]] + [1] * (x.dim() - 1), list(x.shape)
    shape[dim] = wide[dim] = index.shape[1]
    return x.gather(dim, index.view(shape).expand(wide))
