"""One training run: image-text matching, with a congruence loss on the last layer's attention of matched pairs.

    loss = main + weight * schedule(step) * cacr_loss(S[matched], layout)

A run is a function of its `Setting` alone: the same one gives the same numbers, whatever ran before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attncongruence import (
    PRINTED,
    RELEASED,
    WEIGHTED_MEAN,
    TokenLayout,
    argmax_entropy,
    cacr_loss,
    exponential_warmup,
    iais_loss,
    split_attention,
    winoground_scores,
)
from benchmarks.compositionality.data import CAPTION, OTHERS, Pairs, View, pairs
from benchmarks.compositionality.model import Matcher

Loss = Callable[[Tensor, TokenLayout], Tensor]
METHODS: dict[str, Loss | None] = {
    "none": None,
    "iais": iais_loss,
    "cacr-released": cacr_loss,
    "cacr-printed": functools.partial(cacr_loss, convention=PRINTED),
    "cacr-weighted-mean": functools.partial(cacr_loss, convention=WEIGHTED_MEAN),
}
SCHEDULES = {"constant": lambda steps: lambda step: 1.0, "exponential": exponential_warmup}

RATE, DECAY, BETAS, RISE = 1e-3, 0.1, (0.9, 0.98), 100  # AdamW; the rate rises for 100 steps, then a cosine to 0
TRAIN, VALIDATION, TEST = 0, 1, 2  # seeds of the three sets of scenes


@dataclass(frozen=True)
class Setting:
    """What a run depends on.

    Attributes:
        seed: of the initial weights, the order of the scenes and the choice of negatives.
        share: of negatives that are the swapped item; the others are unrelated items.
        items, batch: training scenes, and how many of them, each with a negative, make a step.
        every: steps between looks at the validation set.
        held_out: scenes in the validation set; the test set has more than twice as many, `tested`.
    """

    view: View = "regions"
    method: str = "none"
    weight: float = 0.0
    schedule: Literal["constant", "exponential"] = "exponential"
    seed: int = 0
    share: float = 0.7
    steps: int = 1500
    items: int = 4000
    batch: int = 32
    every: int = 100
    held_out: int = 400
    tested: int = 1000


def run(setting: Setting, device: str = "cpu") -> dict[str, Any]:
    """Train, and look: the validation curve, the test scores, and the attention before and after."""
    train, validation, test = (
        scenes(n, seed, setting.view, device)
        for n, seed in ((setting.items, TRAIN), (setting.held_out, VALIDATION), (setting.tested, TEST))
    )
    model, forward = _model(setting, train, device)
    before, curve = attention(model, test, setting.batch), []
    step = stepper(setting, model, forward, train)
    for number in range(setting.steps):
        step(number)
        if (number + 1) % setting.every == 0 or number + 1 == setting.steps:
            curve.append([number + 1, *(round(x, 4) for x in winoground(model, validation))])
    return {
        "curve": curve,
        "test": [round(x, 4) for x in winoground(model, test)],
        "attention": {"before": before, "after": attention(model, test, setting.batch)},
    }


def stepper(
    setting: Setting, model: Matcher, forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], train: Pairs
) -> Callable[[int], None]:
    """The training loop's body, as a function of the step's number."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, betas=BETAS, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=setting.steps + 1, pct_start=min(RISE / setting.steps, 0.5), cycle_momentum=False
    )
    method, weight = METHODS[setting.method], SCHEDULES[setting.schedule](setting.steps)
    layout = tokens(train, setting.batch)
    draw = _draw(setting, train)

    def step(number: int) -> None:
        caption, image, other_caption, other_image = next(draw)
        captions = torch.cat((caption, other_caption, caption, other_caption))
        images = torch.cat((image, other_image, other_image, image))
        scores, S = forward(captions, images)
        first, second, *wrong = scores.chunk(4)
        # Each of the two pairs that fit against the two that don't: a wrong picture and a wrong caption.
        main = sum(F.softplus(bad - good).mean() for good in (first, second) for bad in wrong) / 2
        loss = main
        if method is not None:
            loss = main + setting.weight * weight(number) * method(S[: setting.batch], layout)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()

    return step


def _draw(setting: Setting, train: Pairs) -> Any:
    """Batches without end: matched captions and images, and items that fit neither, swapped ones or unrelated ones."""
    generator = torch.Generator().manual_seed(setting.seed)
    B, device = setting.batch, train.captions.device
    while True:
        for items in torch.randperm(len(train), generator=generator).split(B):
            if len(items) < B:
                break
            other = train.others[items, torch.randint(OTHERS, (B,), generator=generator)]
            swap = torch.rand(B, generator=generator) < setting.share
            items, other = torch.stack((items, torch.where(swap, items, other))).to(device)
            side = swap.long().to(device)
            captions, images = train.captions, train.images
            yield captions[items, 0], images[items, 0], captions[other, side], images[other, side]


def _model(setting: Setting, train: Pairs, device: str) -> tuple[Matcher, Any]:
    model, forward = _compiled(*train.images.shape[2:], setting.view == "patches", device, setting.steps > 300)
    torch.manual_seed(setting.seed)
    fresh = Matcher(*train.images.shape[2:], ordered=setting.view == "patches")
    model.load_state_dict(fresh.state_dict())
    return model, forward


@functools.cache
def _compiled(tokens: int, features: int, ordered: bool, device: str, worth_it: bool) -> tuple[Matcher, Any]:
    """One model a process, its weights replaced for each run, so that it is compiled once."""
    model = Matcher(tokens, features, ordered).to(device)
    return model, torch.compile(model) if worth_it else model


@functools.cache
def scenes(n: int, seed: int, view: View, device: str = "cpu") -> Pairs:
    """`pairs`, made once a process."""
    return pairs(n, seed, view).to(device)


def tokens(data: Pairs, batch: int) -> TokenLayout:
    """All words but [CLS] are text, as in the released code; all regions or patches are image."""
    place = torch.arange(CAPTION + data.images.shape[2], device=data.images.device).expand(batch, -1)
    return TokenLayout((place > 0) & (place < CAPTION), place >= CAPTION)


@torch.no_grad()
def winoground(model: Matcher, data: Pairs) -> tuple[float, float, float]:
    """Text, image and group score, in percent."""
    n = len(data)
    captions = data.captions[:, :, None].expand(-1, -1, 2, -1).reshape(4 * n, -1)
    images = data.images[:, None].expand(-1, 2, -1, -1, -1).reshape(4 * n, *data.images.shape[2:])
    scores = torch.cat([model(*some)[0] for some in zip(captions.split(512), images.split(512), strict=True)])
    found = winoground_scores(scores.reshape(n, 2, 2))
    return found.text, found.image, found.group


@torch.no_grad()
def attention(model: Matcher, data: Pairs, batch: int) -> dict[str, float]:
    """What the paper looks at in the last layer, over matched pairs of `data`.

    - `argmax_entropy`, in nats: how many image tokens the words look at most (Section 5.2).
    - `distance_released`, `distance_weighted_mean`, in nats: between LL and its projection, as the loss has it.
    - `flatness_LL` and so on, 0 to 1: entropy of the rows inside a block, 1 where attention is uniform.
    """
    n = len(data) // batch * batch
    layout, found = tokens(data, batch), []
    for captions, images in zip(data.captions[:n, 0].split(batch), data.images[:n, 0].split(batch), strict=True):
        S = model(captions, images)[1]
        blocks = split_attention(S, layout)
        found.append(
            {
                "argmax_entropy": argmax_entropy(blocks, convention=RELEASED),
                "distance_released": cacr_loss(blocks, direction="language"),
                "distance_weighted_mean": cacr_loss(blocks, convention=WEIGHTED_MEAN, direction="language"),
                **{f"flatness_{name}": _flatness(getattr(blocks, name)) for name in ("LL", "LV", "VL", "VV")},
            }
        )
    return {name: round(torch.stack([some[name] for some in found]).mean().item(), 6) for name in found[0]}


def _flatness(block: Tensor) -> Tensor:
    P = block.softmax(dim=-1)
    columns = torch.tensor(block.shape[-1], dtype=P.dtype, device=P.device)
    return torch.special.entr(P).sum(dim=-1).mean() / columns.log()
