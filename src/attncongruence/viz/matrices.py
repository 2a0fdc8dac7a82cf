"""The block matrix of one sample, and the two maps that a loss compares in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from attncongruence._typing import Count, OneDirection, Values, checked, one_of
from attncongruence.blocks import Attention, AttentionBlocks, NText, Quadrants
from attncongruence.conventions import CONVENTIONS, RELEASED, Convention, ConventionLike, as_convention
from attncongruence.layout import Mask
from attncongruence.losses import LOSSES, congruence_loss
from attncongruence.maps import entries, fill, sides
from attncongruence.viz import draw
from attncongruence.viz.draw import Array, Labels

SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"


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
    blocks = draw.one_sample(attention, n_text, mask, sample, head, text_labels, image_labels)
    n, m = blocks.LV.shape[-2:]
    shown: list[Array] = []
    for block, pairs in zip((blocks.LL, blocks.LV, blocks.VL, blocks.VV), entries(blocks), strict=True):
        if block is None:
            shown.append(np.full((m, n), np.nan))
        elif values == "scores":
            shown.append(draw.mean_over_heads(block, ~block.isneginf() if pairs is None else pairs & ~block.isneginf()))
        else:
            shown.append(draw.mean_map(block, pairs))
    # The larger modality gets at most twice the room of the smaller one.
    text, image = n * min(1.0, 2 * m / n), m * min(1.0, 2 * n / m)
    side = min(max(0.28 * (text + image), 3.0), 9.0)
    figure = figure or Figure(figsize=(side + 2.1, side + 1.5), layout="constrained")
    widths = text / (text + image), image / (text + image)
    ratios = {"width_ratios": widths, "height_ratios": widths}
    grid = figure.subplots(2, 2, sharex="col", sharey="row", gridspec_kw=ratios)
    norm = draw.shared_scale(*shown, low=0.0 if values == "probabilities" else None)
    for k, (word, labels, count) in enumerate((("text", text_labels, n), ("image", image_labels, m))):
        draw.name_tokens(grid[1, k].xaxis, f"{word} keys", labels, count, widths[k])
        draw.name_tokens(grid[k, 0].yaxis, f"{word} queries", labels, count, widths[k])
    for ((row, column), axes), name, array in zip(np.ndenumerate(grid), Quadrants._fields, shown, strict=True):
        draw.heat_map(axes, array, name, SEQUENTIAL, norm)
        # the boundary between text and image
        axes.spines[["left" if column else "right", "top" if row else "bottom"]].set_linewidth(1.8)
    label = "score" if values == "scores" else "probability, in each block"
    figure.colorbar(grid[0, 0].images[0], ax=grid, aspect=30, label=label)
    figure.suptitle(draw.sample_and_head(sample, head, blocks.LL.shape[1]), fontsize="medium")
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
    blocks = draw.one_sample(attention, n_text, mask, sample, head, text_labels, image_labels)
    convention = as_convention(convention)
    P, T, counted, nats = _compared(loss, blocks, convention, direction)
    own, other, word, labels = "LL", "VV", "text", text_labels
    if direction == "vision":
        own, other, word, labels = "VV", "LL", "image", image_labels
    titles = f"σ({own})", f"σ(E {other} Eᵀ)"
    if not LOSSES[loss].logits:
        titles = f"A_{own}", f"A_{own[0]}{other[0]} A_{other[0]}{own[0]}"
    target, projected = draw.mean_over_heads(T, counted), draw.mean_over_heads(P, counted)
    difference, shared = projected - target, draw.shared_scale(target, projected)
    centered = CenteredNorm(halfrange=max(np.abs(np.nan_to_num(difference)).max(), 1e-12))
    count = len(target)
    side = min(max(0.32 * count, 2.4), 5.0)
    figure = figure or Figure(figsize=(3 * side + 1.5, side + 2.2), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 3, sharey=True)
    draw.name_tokens(panels[0].yaxis, f"{word} queries", labels, count, 1.0)
    for panel in panels:
        draw.name_tokens(panel.xaxis, f"{word} keys", labels, count, 1 / 3)
    draw.heat_map(panels[0], target, titles[0], SEQUENTIAL, shared)
    draw.heat_map(panels[1], projected, titles[1], SEQUENTIAL, shared)
    draw.heat_map(panels[2], difference, "difference", DIVERGING, centered)
    for over, aspect, label in ((panels[:2], 50, "probability"), (panels[2:], 25, "difference")):
        few = MaxNLocator(4)
        figure.colorbar(over[0].images[0], ax=over, location="bottom", aspect=aspect, label=label, ticks=few)
    known = {known: name.upper() for name, known in CONVENTIONS.items()}
    what = LOSSES[loss].title, known.get(convention, "own convention"), direction
    which = draw.sample_and_head(sample, head, blocks.LL.shape[1])
    figure.suptitle(f"{', '.join(what)}: {nats:.4g} nats\n{which}", fontsize="medium")
    return figure.canvas.figure


def _compared(
    name: str, blocks: AttentionBlocks, convention: Convention, direction: OneDirection
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """The projected and the own map as distributions, which entries are compared (None: all), the loss in nats."""
    loss = LOSSES[name]
    nats = congruence_loss(name, blocks, convention=convention, direction=direction, reduction="sum")
    (maps,) = sides(blocks, convention, direction, both_ways="VL" in loss.needs)
    projected, own, counted, _ = loss.dense(maps, convention)
    if loss.logits:
        # sigma(R), sigma(LL)
        floor = torch.finfo(projected.dtype).min / 2
        projected, own = (fill(x, counted, floor).softmax(-1) for x in (projected, own))
    return projected, own, counted, float(nats)
