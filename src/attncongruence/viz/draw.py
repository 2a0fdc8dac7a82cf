"""Shared by all pictures: the blocks of one sample, means over heads, heat maps, tick labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from attncongruence.blocks import Attention, AttentionBlocks, NText, Quadrants
from attncongruence.conventions import RELEASED
from attncongruence.losses import read_blocks
from attncongruence.maps import attention_map, fill

Labels = Sequence[str] | None
Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

HATCH: dict[str, Any] = {"facecolor": "#f4f4f4", "edgecolor": "#c4c4c4", "hatch": "////"}
"""Marks pairs that may not attend."""


def one_sample(
    attention: Attention, n_text: NText | None, mask: Tensor | None, sample: int, head: int | None, *labels: Labels
) -> AttentionBlocks:
    """The blocks of one sample, cut to its real tokens, with all heads or one. Checks text and image labels too."""
    blocks = read_blocks(attention, n_text, mask)
    given = [block for block in (blocks.LL, blocks.LV, blocks.VL, blocks.VV) if block is not None]
    batch, heads = len(blocks.LL), min(block.shape[1] for block in given)
    for name, value, count in (("sample", sample, batch), ("head", head or 0, heads)):
        if not 0 <= value < count:
            raise ValueError(f"{name}={value} is out of range: {count} {name}(s) allow 0 to {count - 1}")
    text, image = blocks.text_mask[sample], blocks.image_mask[sample]
    n, m = int(text.sum()), int(image.sum())
    if not (n and m):
        raise ValueError(f"sample {sample} has {n} text tokens and {m} image tokens: choose one that has both")
    for word, words, count in zip(("text", "image"), labels, (n, m), strict=True):
        if words is not None and len(words) != count:
            raise ValueError(
                f"{word}_labels has {len(words)} labels, and sample {sample} has {count} {word} tokens: give one for "
                "each real token, in order, none for padding and for what a TokenLayout leaves out"
            )

    def cut(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        x = x.expand(batch, -1, len(rows), len(columns))[sample][:, rows][..., columns]  # pair masks may be broadcast
        return (x if head is None or len(x) == 1 else x[head : head + 1])[None]

    if (allowed := blocks.allowed) is not None:
        LL, LV, VL, VV = allowed
        allowed = Quadrants(cut(LL, text, text), cut(LV, text, image), cut(VL, image, text), cut(VV, image, image))
    return AttentionBlocks(
        LL=cut(blocks.LL, text, text),
        LV=cut(blocks.LV, text, image),
        VL=None if blocks.VL is None else cut(blocks.VL, image, text),
        VV=cut(blocks.VV, image, image),
        text_mask=text[text][None],
        image_mask=image[image][None],
        allowed=allowed,
        _padded=False,
    )


def sample_and_head(sample: int, head: int | None, heads: int) -> str:
    """Says which sample and head a picture shows."""
    if head is None:
        return f"sample {sample}, mean of {heads} heads" if heads > 1 else f"sample {sample}"
    return f"sample {sample}, head {head}"


def mean_over_heads(x: Tensor, counted: Tensor | None) -> Array:
    """`(1, heads, rows, columns)` to `(rows, columns)`: the mean over heads that count an entry, NaN if none does."""
    x = x.double()
    if bool(fill(x, counted, 0.0).isfinite().logical_not().any()):
        raise ValueError("the attention contains NaN or infinities: look for them in the model's scores")
    mean: Array = fill(x, counted, float("nan"))[0].nanmean(0).cpu().numpy()
    return mean


def mean_map(block: Tensor, pairs: Tensor | None) -> Array:
    """Mean over heads of the block's softmax, `(rows, columns)`; NaN where no head may attend."""
    A = attention_map(block, pairs, RELEASED)
    return mean_over_heads(A, None if pairs is None else pairs.any(1, keepdim=True))


def shared_scale(*arrays: Array, low: float | None = None) -> Normalize:
    """One color scale for all arrays, from their minimum or `low` to their maximum."""
    finite = np.concatenate([array[np.isfinite(array)] for array in arrays])
    return Normalize(finite.min() if low is None else low, finite.max()) if finite.size else Normalize(0.0, 1.0)


def heat_map(axes: Axes, array: Array, title: str, colors: str, norm: Normalize) -> None:
    """Draw a heat map; the hatched background shows where it is NaN."""
    axes.patch.set(**HATCH)
    axes.imshow(array, cmap=colors, norm=norm, aspect="auto")
    axes.set_title(title, fontweight="bold", fontsize="medium")
    axes.label_outer(remove_inner_ticks=True)


def name_tokens(axis: XAxis | YAxis, title: str, labels: Labels, count: int, share: float) -> None:
    """Title an axis, of that share of the figure, and label its tokens, as many as fit without overlap."""
    figure, across = axis.axes.figure, axis.axis_name == "x"
    # about 1.5 inches go to labels, titles and color bars
    inches = share * ((figure.bbox.width if across else figure.bbox.height) / figure.get_dpi() - 1.5)
    words = [str(token) for token in range(count)] if labels is None else labels
    # a small letter is about 0.075 inches wide
    slanted = across and labels is not None and 0.075 * max(map(len, words)) * count > inches
    room = 0.3 if labels is None else 0.2 if slanted else 0.16
    locator = MaxNLocator(max(1, int(inches / room)), steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    places = [int(place) for place in locator.tick_values(0, count - 1) if place < count]
    text: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axis.set_ticks(places, [words[place] for place in places], fontsize="small", parse_math=False, **text)
    axis.set_tick_params(length=2 if labels is None else 0)
    axis.set_label_text(title)
