"""What the pictures share: one sample's blocks, arrays with holes, heat maps, ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from torch import Tensor

from attncongruence.blocks import Attention, AttentionBlocks, NText, as_blocks, one_sample
from attncongruence.maps import fill

Labels = Sequence[str] | None
Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"
HATCH: dict[str, Any] = {"facecolor": "#f4f4f4", "edgecolor": "#c4c4c4", "hatch": "////"}
"""Of pairs without attention."""
LETTER, LINE = 0.075, 0.14
"""Width of a letter and height of a line of tick labels, in inches."""


def chosen(
    attention: Attention,
    n_text: NText,
    mask: Tensor | None,
    sample: int,
    head: int | None,
    text_labels: Labels,
    image_labels: Labels,
) -> AttentionBlocks:
    """The blocks of one sample, and a check of its labels."""
    blocks = one_sample(as_blocks(attention, n_text, mask), sample, head)
    for word, labels, count in zip(("text", "image"), (text_labels, image_labels), blocks.LV.shape[-2:], strict=True):
        if labels is not None and len(labels) != count:
            raise ValueError(
                f"{word}_labels has {len(labels)} labels, and sample {sample} has {count} {word} tokens: give one for "
                "each real token, in order, none for padding and for what a TokenLayout leaves out"
            )
    return blocks


def whose(sample: int, head: int | None, heads: int) -> str:
    """Which sample and head a picture shows."""
    if head is None:
        return f"sample {sample}, mean of {heads} heads" if heads > 1 else f"sample {sample}"
    return f"sample {sample}, head {head}"


def over_heads(x: Tensor, counted: Tensor | None) -> Array:
    """`(1, heads, rows, columns)` to `(rows, columns)`: mean over the heads that count an entry, else NaN."""
    x = x.double()
    if bool(fill(x, counted, 0.0).isfinite().logical_not().any()):
        raise ValueError("the attention contains NaN or infinities: look for them in the model's scores")
    mean: Array = fill(x, counted, float("nan"))[0].nanmean(0).cpu().numpy()
    return mean


def any_head(mask: Tensor | None) -> Tensor | None:
    """The entries that some head counts."""
    return None if mask is None else mask.any(1, keepdim=True)


def canvas(
    figure: Figure | SubFigure | None, size: tuple[float, float], side: float
) -> tuple[Figure | SubFigure, float]:
    """The figure to draw in, and about how wide its maps will be, in inches, where a new one's are `side`."""
    if figure is None:
        return Figure(figsize=size, layout="constrained"), side
    room = figure.bbox.width / figure.get_dpi() / size[0], figure.bbox.height / figure.get_dpi() / size[1]
    return figure, side * min(room)


def limits(*arrays: Array, low: float | None = None) -> Normalize:
    """One scale for all of them."""
    every = np.concatenate([array[np.isfinite(array)] for array in arrays])
    return Normalize(every.min() if low is None else low, every.max()) if every.size else Normalize(0.0, 1.0)


def symmetric(array: Array) -> Normalize:
    """A scale about 0."""
    return CenteredNorm(halfrange=max(float(np.abs(np.nan_to_num(array)).max(initial=0.0)), 1e-12))


def heat(axes: Axes, array: Array, colours: str, norm: Normalize) -> AxesImage:
    """A heat map; what is NaN lets the hatched ground through."""
    axes.patch.set(**HATCH)
    return axes.imshow(array, cmap=colours, norm=norm, aspect="auto")


def spacing(labels: Labels, count: int, inches: float) -> tuple[int, int, float]:
    """Along an axis of so many inches: every how many-th tick label fits, at which angle, and how high it then is."""
    cell = inches / count
    wanted = LINE if labels else 2 * LINE
    step = next((step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if step * cell >= wanted), count)
    longest = LETTER * max(map(len, labels), default=0) if labels else LETTER * len(str(count))
    angle = 0 if longest <= 0.9 * step * cell else 45 if step * cell > 1.5 * LINE else 90
    return step, angle, longest * math.sin(math.radians(angle))


def beside(labels: Labels) -> float:
    """Width of level tick labels, in inches."""
    return LETTER * max(map(len, labels), default=0) if labels else 0.0


def ticks(axes: Axes, which: Literal["x", "y"], labels: Labels, count: int, inches: float) -> None:
    """Tick labels that don't overlap on an axis of so many inches; 0: none."""
    step, angle, _ = spacing(labels, count, inches)
    places = range(0, count, step) if inches else ()
    words = [str(place) if labels is None else labels[place] for place in places]
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(places, words, fontsize="small", parse_math=False)
    axis.set_tick_params(length=2 if labels is None else 0)
    if which == "x" and angle:
        slanted: dict[str, Any] = {"ha": "right", "rotation_mode": "anchor"} if angle == 45 else {}
        axis.set_ticks(places, words, rotation=angle, **slanted)
