"""The block matrix of one sample, and what a loss compares in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from attncongruence._typing import Count, Loss, OneDirection, Values, checked, one_of
from attncongruence.blocks import Attention, Mask, NText, Quadrants
from attncongruence.conventions import PRINTED, RELEASED, WEIGHTED_MEAN, Convention
from attncongruence.losses import cacr_side, iais_side
from attncongruence.maps import attention_map, entries
from attncongruence.sides import distributions, loss_of
from attncongruence.viz.draw import (
    DIVERGING,
    SEQUENTIAL,
    Array,
    Labels,
    any_head,
    beside,
    canvas,
    chosen,
    heat,
    limits,
    over_heads,
    spacing,
    symmetric,
    ticks,
    whose,
)


@checked
@torch.no_grad()
def plot_blocks(
    attention: Attention,
    n_text: NText = None,
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

    Rows are queries, columns keys; text comes first, wherever it stands in the sequence. Padding is cut off, and pairs
    that may not attend are hatched. Where there are many more image tokens than text tokens, theirs are drawn smaller.

    Args:
        attention: as for `cacr_loss`, and so are `n_text` and `mask`. A record of many samples is best cut first,
            `captured[i]`: scores are computed for all that it holds.
        values: `"scores"`: what came, or its mean over the heads that allow a pair; `"probabilities"`: each block
            softmaxed by itself, then the mean over heads, as in `RELEASED`.
        sample: which sample of the batch, from 0.
        head: which head, from 0; None: the mean over heads.
        text_labels: a label for each real text token of the sample, in order: none for padding, nor for special tokens
            that a `TokenLayout` leaves out.
        image_labels: likewise for image tokens.
        figure: where to draw, for pictures of several; None: a new figure.

    Returns:
        The figure.

    Raises:
        jaxtyping.TypeCheckError, ValueError: as `cacr_loss`, and for a sample or head out of range, a sample without
            text or image, labels that are too many or too few, values that are NaN or +inf.

    Source:
        CACR (Pandey et al., ACL 2023), Eq. 2.

    Example:
        >>> figure = plot_blocks(torch.randn(1, 4, 5, 5), n_text=3, text_labels=["mug", "in", "grass"])
        >>> [axes.get_title() for axes in figure.axes[:4]]
        ['LL', 'LV', 'VL', 'VV']
    """
    one_of("values", values, ("scores", "probabilities"))
    blocks = chosen(attention, n_text, mask, sample, head, text_labels, image_labels)
    n, m = blocks.LV.shape[-2:]
    shown: list[Array] = []
    for block, pairs in zip((blocks.LL, blocks.LV, blocks.VL, blocks.VV), entries(blocks), strict=True):
        if block is None:
            shown.append(np.full((m, n), np.nan))
        elif values == "scores":
            shown.append(over_heads(block, ~block.isneginf() if pairs is None else pairs & ~block.isneginf()))
        else:
            shown.append(over_heads(attention_map(block, pairs, RELEASED), any_head(pairs)))
    # The larger modality is given at most twice the room of the other.
    text, image = n * min(1.0, 2 * m / n), m * min(1.0, 2 * n / m)
    side = min(max(0.28 * (text + image), 3.0), 9.0)
    widths, labels, counts = (text / (text + image), image / (text + image)), (text_labels, image_labels), (n, m)
    below = [spacing(words, k, side * width)[2] for words, k, width in zip(labels, counts, widths, strict=True)]
    size = side + 1.6 + max(map(beside, labels)), side + 1.1 + max(below)
    figure, inches = canvas(figure, size, side)
    grid = figure.subplots(2, 2, gridspec_kw={"width_ratios": widths, "height_ratios": widths}, squeeze=False)
    norm = limits(*shown, low=0.0 if values == "probabilities" else None)
    for place, (name, array) in enumerate(zip(Quadrants._fields, shown, strict=True)):
        row, column = divmod(place, 2)
        axes: Axes = grid[row, column]
        drawn = heat(axes, array, SEQUENTIAL, norm)
        axes.set_title(name, fontweight="bold", fontsize="medium")
        ticks(axes, "x", labels[column], counts[column], row and inches * widths[column])
        ticks(axes, "y", labels[row], counts[row], not column and inches * widths[row])
        # the boundary between text and image
        for edge in ("right" if column == 0 else "left", "bottom" if row == 0 else "top"):
            axes.spines[edge].set_linewidth(1.8)
    for position, word in enumerate(("text", "image")):
        grid[1, position].set_xlabel(f"{word} keys")
        grid[position, 0].set_ylabel(f"{word} queries")
    figure.colorbar(drawn, ax=grid, aspect=30, label="score" if values == "scores" else "probability, in each block")
    figure.suptitle(whose(sample, head, blocks.LL.shape[1]), fontsize="medium")
    return figure.canvas.figure


@checked
@torch.no_grad()
def plot_congruence(
    attention: Attention,
    n_text: NText = None,
    *,
    mask: Mask | None = None,
    loss: Loss = "cacr",
    convention: Convention = RELEASED,
    direction: OneDirection = "language",
    sample: Count = 0,
    head: Count | None = None,
    text_labels: Labels = None,
    image_labels: Labels = None,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """What a loss compares: sigma(LL) beside sigma(E VV E^T), and the second less the first; the title says the loss.

    For `direction="vision"` it is sigma(VV) beside sigma(E LL E^T). The two share one colour scale, which need not
    start at 0: under `RELEASED` they are nearly flat. The difference has its own, symmetric about 0. Entries that are
    not compared are hatched.

    Args:
        attention: and `n_text`, `mask`, `sample`, `text_labels`, `image_labels`, `figure`: as for `plot_blocks`.
        loss: `"cacr"`, or IAIS's `"singular"` or `"distributed"` alignment, which holds A_LV A_VL against A_LL.
        convention: as for the losses.
        direction: `"language"` or `"vision"`.
        head: one head, from 0, as if the layer had no other; None: all of them, as the loss has it. Where a loss is the
            mean over heads, so are the two maps.

    Returns:
        The figure. The loss in its title is in nats, that of this sample: `cacr_loss(..., reduction="none")[sample]`,
        or `iais_loss`, in this direction.

    Raises:
        jaxtyping.TypeCheckError, ValueError: as `cacr_loss` and `plot_blocks`.

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
    one_of("loss", loss, ("cacr", "singular", "distributed"))
    one_of("direction", direction, ("language", "vision"))
    side = cacr_side(convention) if loss == "cacr" else iais_side(loss, convention)
    blocks = chosen(attention, n_text, mask, sample, head, text_labels, image_labels)
    nats = float(loss_of(blocks, None, None, side, direction, "sum", "dense"))
    P, T, counted = distributions(blocks, side, direction)
    own, other, labels = ("LL", "VV", text_labels) if direction == "language" else ("VV", "LL", image_labels)
    titles = f"σ({own})", f"σ(E {other} Eᵀ)"
    if loss == "distributed":
        titles = ("A_LL", "A_LV A_VL") if own == "LL" else ("A_VV", "A_VL A_LV")
    target, projected = over_heads(T, counted), over_heads(P, counted)
    difference, shared = projected - target, limits(target, projected)
    count = len(target)
    length = min(max(0.32 * count, 2.4), 5.0)
    size = 3 * length + 1.0 + beside(labels), length + 1.9 + spacing(labels, count, length)[2]
    figure, inches = canvas(figure, size, 3 * length)
    panels: Sequence[Axes] = figure.subplots(1, 3)
    for panel, array, colours, scale, title in (
        (panels[0], target, SEQUENTIAL, shared, titles[0]),
        (panels[1], projected, SEQUENTIAL, shared, titles[1]),
        (panels[2], difference, DIVERGING, symmetric(difference), "difference"),
    ):
        heat(panel, array, colours, scale)
        panel.set_title(title, fontweight="bold", fontsize="medium")
        ticks(panel, "x", labels, count, inches / 3)
        ticks(panel, "y", labels, count, inches / 3 if panel is panels[0] else 0)
    word = "text" if own == "LL" else "image"
    panels[0].set_ylabel(f"{word} queries")
    for panel in panels:
        panel.set_xlabel(f"{word} keys")
    for panel, over, aspect, label in (
        (panels[0], panels[:2], 50, "probability"),
        (panels[2], panels[2:], 25, "difference"),
    ):
        drawn, few = panel.images[0], MaxNLocator(4)
        figure.colorbar(drawn, ax=over, location="bottom", aspect=aspect, label=label, ticks=few)
    known = {RELEASED: "RELEASED", PRINTED: "PRINTED", WEIGHTED_MEAN: "WEIGHTED_MEAN"}
    what = ["CACR" if loss == "cacr" else f"IAIS {loss}", known.get(convention, "own convention"), direction]
    which = whose(sample, head, blocks.LL.shape[1])
    figure.suptitle(f"{', '.join(what)}: {nats:.4g} nats\n{which}", fontsize="medium")
    return figure.canvas.figure
