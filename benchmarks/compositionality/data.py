"""Scenes as tensors: captions as word ids, pictures as region features or as patches, each beside its swap.

captions[n, 0] is true in images[n, 0], captions[n, 1] in images[n, 1]; crosswise both are false
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.compositionality.scenes import COLORS, KINDS, RELATIONS, Item, Scene, World

View = Literal["regions", "patches"]

WORLD = World()  # 3 colors, 3 kinds, 4 relations, 3 shapes in 96 x 96 pixels
WORDS = ("[CLS]", "the", "is", *COLORS, *KINDS, *RELATIONS)  # a relation is one word, so all captions are as long
CAPTION = 9  # [CLS] the red circle is left-of the blue square
APPEARANCE = 16  # width of the feature that a detector would give for how a region looks
NOISE = 0.3  # its standard deviation; the feature itself has entries of standard deviation 1
PATCH = 32  # pixels
OTHERS = 16  # unrelated scenes kept for each item, whose caption is false in its picture and the other way round


@dataclass(frozen=True)
class Pairs:
    """Items with their swaps.

    Attributes:
        captions: `(items, 2, CAPTION)`, ids of words.
        images: `(items, 2, tokens, features)`, regions or patches.
        others: `(items, OTHERS)`, items that fit neither way: the ordinary negatives.
    """

    captions: Tensor
    images: Tensor
    others: Tensor

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: str) -> Pairs:
        """The same on another device."""
        return Pairs(self.captions.to(device), self.images.to(device), self.others.to(device))


def pairs(n: int, seed: int, view: View) -> Pairs:
    """`n` items drawn from `WORLD`, the same in both views."""
    items = WORLD.items(n, seed)
    both = [(item, item.swapped()) for item in items]
    captions = torch.tensor([[_ids(one.caption) for one in pair] for pair in both])
    if view == "regions":
        images = _regions([[one.scene for one in pair] for pair in both], seed)
    else:
        images = torch.stack([torch.stack([_patches(one) for one in pair]) for pair in both])
    return Pairs(captions, images, _others(items, seed))


def _ids(caption: str) -> list[int]:
    words = caption.replace(" of ", "_of ").split()
    return [0, *(WORDS.index(word.replace("_", " ")) for word in words)]


def _regions(scenes: list[list[Scene]], seed: int) -> Tensor:
    """How each shape looks, with noise, and its box as UNITER gives it: corners, width, height, area; standardized."""
    generator = torch.Generator().manual_seed(seed)
    looks = [f"{color} {kind}" for color in COLORS for kind in KINDS]
    prototypes = torch.randn(len(looks), APPEARANCE, generator=torch.Generator().manual_seed(0))  # one detector for all
    which = torch.tensor([[[looks.index(f"{s.color} {s.kind}") for s in x.regions] for x in pair] for pair in scenes])
    look = prototypes[which] + NOISE * torch.randn(*which.shape, APPEARANCE, generator=generator)
    corners = torch.tensor([[x.boxes for x in pair] for pair in scenes]) / WORLD.pictures[0][0]
    size = corners[..., 2:] - corners[..., :2]
    box = torch.cat((corners, size, size.prod(dim=-1, keepdim=True)), dim=-1)
    return torch.cat((look, (box - box.mean(dim=(0, 1, 2))) / box.std(dim=(0, 1, 2))), dim=-1)


def _patches(item: Item) -> Tensor:
    """`(patches, 3 x 16 x 16)` at half the resolution, 0 for the background."""
    pixels = torch.from_numpy(np.array(item.image.reduce(2))).float() / 255
    side = PATCH // 2
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    return (1 - pixels).reshape(rows, side, columns, side, 3).permute(0, 2, 1, 3, 4).flatten(2).flatten(0, 1)


def _others(items: list[Item], seed: int) -> Tensor:
    rng = random.Random(seed)

    def some(item: Item) -> list[int]:
        found: list[int] = []
        while len(found) < OTHERS:
            other = rng.randrange(len(items))
            if not item.true_in(items[other].scene) and not items[other].true_in(item.scene):
                found.append(other)
        return found

    return torch.tensor([some(item) for item in items])
