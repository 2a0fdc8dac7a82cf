"""The block matrix of one sample, and the two maps that a loss compares in it; what all pictures share is below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.colors import CenteredNorm, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from attncongruence._typing import Count, OneDirection, Values, checked, one_of
from attncongruence.blocks import Attention, AttentionBlocks, NText, Quadrants
from attncongruence.conventions import CONVENTIONS, RELEASED, ConventionLike, as_convention
from attncongruence.layout import Mask
from attncongruence.losses import LOSSES, congruence_loss
from attncongruence.maps import attention_map, entries, fill, read_blocks, sides

Labels = Sequence[str] | None
Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"
HATCH: dict[str, Any] = {"facecolor": "#f4f4f4", "edgecolor": "#c4c4c4", "hatch": "////"}
"""Marks pairs that may not attend."""


@torch.no_grad()
@checked
def plot_blocks(
    attention: Attention,
    n_text: NText | None = None,
    *,
    mask: Mask | None = None,
    values: Values = "scores",
    sample: Count = 0,
    head: Count | None = None,
    text_labels: Labels = None,
    image_labels: Labels = None,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """The four blocks of one sample's attention, S = [[LL, LV], [VL, VV]] (Eq. 2), as heat maps on one scale.

    Rows are queries, columns are keys. Text comes first, wherever it stands in the sequence. Padding is cut off, and
    pairs that may not attend are hatched. If one modality has many more tokens, they are drawn smaller.

    Args:
        attention: as in `cacr_loss`, like `n_text` and `mask`. For a captured layer of many samples, pass
            `captured[i]`: scores are computed for all samples of the record.
        values: `"scores"`: the given scores, as a mean over the heads that allow a pair; `"probabilities"`: each block
            softmaxed by itself, then the mean over heads, as in `RELEASED`.
        sample: index of the sample in the batch.
        head: index of one head; None: the mean over heads.
        text_labels: one label for each real text token of the sample, in order, without padding and without special
            tokens that a `TokenLayout` leaves out.
        image_labels: the same for image tokens.
        figure: the figure or subfigure to draw in; None: a new figure.

    Returns:
        The figure.

    Raises:
        ValueError: as `cacr_loss`, and for a sample or head out of range, a sample without text or image, a wrong
            number of labels, values that are NaN or +inf.

    Source:
        CACR (Pandey et al., ACL 2023), Eq. 2.

    Example:
        >>> figure = plot_blocks(torch.randn(1, 4, 5, 5), n_text=3, text_labels=["mug", "in", "grass"])
        >>> [axes.get_title() for axes in figure.axes[:4]]
        ['LL', 'LV', 'VL', 'VV']
    """
    one_of("values", values, ("scores", "probabilities"))
    blocks = one_sample(attention, n_text, mask, sample, head, text_labels, image_labels)
    n, m = blocks.LV.shape[-2:]
    shown: list[Array] = []
    for block, pairs in zip((blocks.LL, blocks.LV, blocks.VL, blocks.VV), entries(blocks), strict=True):
        if block is None:
            shown.append(np.full((m, n), np.nan))
        elif values == "scores":
            shown.append(mean_over_heads(block, ~block.isneginf() if pairs is None else pairs & ~block.isneginf()))
        else:
            shown.append(mean_map(block, pairs))
    # The larger modality gets at most twice the room of the smaller one.
    text, image = n * min(1.0, 2 * m / n), m * min(1.0, 2 * n / m)
    side = min(max(0.28 * (text + image), 3.0), 9.0)
    figure = figure or Figure(figsize=(side + 2.1, side + 1.5), layout="constrained")
    widths = text / (text + image), image / (text + image)
    ratios = {"width_ratios": widths, "height_ratios": widths}
    grid = figure.subplots(2, 2, sharex="col", sharey="row", gridspec_kw=ratios)
    norm = _shared_scale(*shown, low=0.0 if values == "probabilities" else None)
    for k, (word, labels, count) in enumerate((("text", text_labels, n), ("image", image_labels, m))):
        _name_tokens(grid[1, k].xaxis, f"{word} keys", labels, count, widths[k])
        _name_tokens(grid[k, 0].yaxis, f"{word} queries", labels, count, widths[k])
    for ((row, column), axes), name, array in zip(np.ndenumerate(grid), Quadrants._fields, shown, strict=True):
        _heat_map(axes, array, name, SEQUENTIAL, norm)
        # the boundary between text and image
        axes.spines[["left" if column else "right", "top" if row else "bottom"]].set_linewidth(1.8)
    label = "score" if values == "scores" else "probability, in each block"
    figure.colorbar(grid[0, 0].images[0], ax=grid, aspect=30, label=label)
    figure.suptitle(sample_and_head(sample, head, blocks.LL.shape[1]), fontsize="medium")
    return figure.canvas.figure


@torch.no_grad()
@checked
def plot_congruence(
    attention: Attention,
    n_text: NText | None = None,
    *,
    mask: Mask | None = None,
    loss: str = "cacr",
    convention: ConventionLike = RELEASED,
    direction: OneDirection = "language",
    sample: Count = 0,
    head: Count | None = None,
    text_labels: Labels = None,
    image_labels: Labels = None,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """The two maps that a loss compares, sigma(LL) and sigma(E VV E^T), and their difference; the title has the loss.

    For `direction="vision"` they are sigma(VV) and sigma(E LL E^T). The two maps share one color scale, which need not
    start at 0: under `RELEASED` they are nearly flat. The difference, second minus first, has a scale of its own,
    symmetric about 0. Entries that are not compared are hatched.

    Args:
        attention: as in `plot_blocks`, like `n_text`, `mask`, `sample`, `text_labels`, `image_labels` and `figure`.
        loss: `"cacr"`, IAIS's `"singular"` or `"distributed"` alignment (which compares A_LV A_VL with A_LL), or any
            other name in `losses.LOSSES`.
        convention: as in the losses.
        direction: `"language"` or `"vision"`.
        head: index of one head, drawn as if the layer had no other; None: all heads. If the loss is a mean over heads,
            the two maps are means over heads too.

    Returns:
        The figure. Its title has the loss of this sample and direction in nats, as `cacr_loss` or `iais_loss` return
        for `reduction="none"`.

    Raises:
        ValueError: as `cacr_loss` and `plot_blocks`.

    Source:
        CACR (Pandey et al., ACL 2023), Eq. 3 to 5; IAIS (Ren et al., ACL 2021), Section 3.

    Example:
        The example of `cacr_loss`, whose loss is log(3) / 4:

        >>> S = torch.zeros(1, 3, 3)
        >>> S[0, :2, 0] = torch.tensor(3.0).log()
        >>> figure = plot_congruence(S, 2, convention=WEIGHTED_MEAN)
        >>> figure.get_suptitle().splitlines()[0]
        'CACR, WEIGHTED_MEAN, language: 0.2747 nats'
    """
    one_of("loss", loss, tuple(LOSSES))
    one_of("direction", direction, ("language", "vision"))
    blocks = one_sample(attention, n_text, mask, sample, head, text_labels, image_labels)
    convention = as_convention(convention)
    nats = congruence_loss(loss, blocks, convention=convention, direction=direction, reduction="sum").item()
    (maps,) = sides(blocks, convention, direction, both_ways="VL" in LOSSES[loss].needs)
    P, T, counted, _ = LOSSES[loss].dense(maps, convention)
    if counted is not None and not counted.any():
        raise ValueError(f"sample {sample} has nothing to compare: the text must see the image; choose another sample")
    own, other, word, labels = "LL", "VV", "text", text_labels
    if direction == "vision":
        own, other, word, labels = "VV", "LL", "image", image_labels
    if LOSSES[loss].logits:
        # sigma(R), sigma(LL)
        P, T = (fill(x, counted, torch.finfo(x.dtype).min / 2).softmax(-1) for x in (P, T))
        titles = f"σ({own})", f"σ(E {other} Eᵀ)"
    else:
        titles = f"A_{own}", f"A_{own[0]}{other[0]} A_{other[0]}{own[0]}"
    target, projected = mean_over_heads(T, counted), mean_over_heads(P, counted)
    difference, shared = projected - target, _shared_scale(target, projected)
    centered = CenteredNorm(halfrange=max(np.abs(np.nan_to_num(difference)).max(), 1e-12))
    count = len(target)
    side = min(max(0.32 * count, 2.4), 5.0)
    figure = figure or Figure(figsize=(3 * side + 1.5, side + 2.2), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 3, sharey=True)
    _name_tokens(panels[0].yaxis, f"{word} queries", labels, count, 1.0)
    for panel in panels:
        _name_tokens(panel.xaxis, f"{word} keys", labels, count, 1 / 3)
    _heat_map(panels[0], target, titles[0], SEQUENTIAL, shared)
    _heat_map(panels[1], projected, titles[1], SEQUENTIAL, shared)
    _heat_map(panels[2], difference, "difference", DIVERGING, centered)
    for over, aspect, label in ((panels[:2], 50, "probability"), (panels[2:], 25, "difference")):
        few = MaxNLocator(4)
        figure.colorbar(over[0].images[0], ax=over, location="bottom", aspect=aspect, label=label, ticks=few)
    known = repr(convention) if convention in CONVENTIONS.values() else "own convention"
    which = sample_and_head(sample, head, blocks.LL.shape[1])
    title = f"{LOSSES[loss].title}, {known}, {direction}: {nats:.4g} nats\n{which}"
    figure.suptitle(title, fontsize="medium")
    return figure.canvas.figure


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

    LL, LV, VV = cut(blocks.LL, text, text), cut(blocks.LV, text, image), cut(blocks.VV, image, image)
    VL = None if blocks.VL is None else cut(blocks.VL, image, text)
    allowed = blocks.allowed
    if allowed is not None:
        places = ((text, text), (text, image), (image, text), (image, image))
        allowed = Quadrants(*(cut(x, *place) for x, place in zip(allowed, places, strict=True)))
    return AttentionBlocks(LL, LV, VL, VV, text[text][None], image[image][None], allowed, _padded=False)


def sample_and_head(sample: int, head: int | None, heads: int) -> str:
    """What a picture shows, for its title."""
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


def _shared_scale(*arrays: Array, low: float | None = None) -> Normalize:
    finite = np.concatenate([array[np.isfinite(array)] for array in arrays])
    return Normalize(finite.min() if low is None else low, finite.max()) if finite.size else Normalize(0.0, 1.0)


def _heat_map(axes: Axes, array: Array, title: str, colors: str, norm: Normalize) -> None:
    axes.patch.set(**HATCH)  # shows where the array is NaN
    axes.imshow(array, cmap=colors, norm=norm, aspect="auto")
    axes.set_title(title, fontweight="bold", fontsize="medium")
    axes.label_outer(remove_inner_ticks=True)


def _name_tokens(axis: XAxis | YAxis, title: str, labels: Labels, count: int, share: float) -> None:
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
