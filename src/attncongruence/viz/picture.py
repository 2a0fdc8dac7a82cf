"""Attention between words and image tokens, drawn on the image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox
from torch import Tensor

from attncongruence._typing import Count, CrossBlock, checked, one_of
from attncongruence.blocks import Attention, NText
from attncongruence.layout import Mask
from attncongruence.maps import entries
from attncongruence.viz.matrices import HATCH, Array, Labels, mean_map, one_sample, sample_and_head

BEST, NEXT = "#1a9641", "#d7191c"  # the paper's green and red
# From transparent to purple, a color that is rare in images.
SHADE = LinearSegmentedColormap.from_list("shade", [(0.33, 0.15, 0.56, 0.0), (0.33, 0.15, 0.56, 0.85)])
LINES = 20  # of a legend, in one column


@torch.no_grad()
@checked
def plot_token_attention(
    attention: Attention,
    n_text: NText | None = None,
    *,
    image: object,
    token: Count,
    block: CrossBlock = "LV",
    mask: Mask | None = None,
    boxes: object = None,
    grid: tuple[Count, Count] | None = None,
    shade: bool | None = None,
    top: Count = 4,
    sample: Count = 0,
    head: Count | None = None,
    text_labels: Labels = None,
    image_labels: Labels = None,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """One word's attention on the image: the image tokens that it attends to most, or that attend to it most.

    The image token with the highest attention is outlined in green, the next ones in dashed red; a legend gives their
    probabilities. For `block="LV"` the green one is the word's counterpart in hard equivalence, a_i.

    Args:
        attention: as in `plot_blocks`, like `n_text`, `mask`, `sample`, `head`, `figure` and the labels.
        image: a PIL image, or an array or tensor `(height, width, 3)`, uint8 or floats from 0 to 1.
        token: index of the word among the sample's real text tokens.
        block: `"LV"`: what the word attends to, its row of A_LV = softmax(LV), which sums to 1; `"VL"`: what attends to
            the word, its column of A_VL = softmax(VL), one probability for each image token.
        boxes: `(image tokens, 4)`: left, top, right, bottom of each real image token in pixels of `image`. Use it for
            regions, and for patches that are not in reading order (ViLT shuffles them: `docs/pictures.md`).
        grid: `(rows, columns)` of patches in reading order that cover the image, instead of boxes. The image's own
            [CLS] token is not a patch: leave it out with a `TokenLayout`.
        shade: whether to shade each box by its attention; None: only for a grid, since regions overlap.
        top: number of image tokens to outline, at least 1.

    Returns:
        The figure.

    Raises:
        ValueError: as `plot_blocks`, and for blocks without VL if `block="VL"`, a token out of range or without any
            pair that may attend, an image or boxes of another shape or range, a grid with another number of patches,
            or unless exactly one of `boxes` and `grid` is given.

    Source:
        After CACR (Pandey et al., ACL 2023), Figures 4 and 5; IAIS (Ren et al., ACL 2021), Section 3, for a_i.

    Example:
        Of two regions, side by side, the word attends most to the second.

        >>> S = torch.zeros(1, 3, 3)
        >>> S[0, 0, 2] = torch.tensor(3.0).log()
        >>> figure = plot_token_attention(S, 1, image=torch.ones(8, 16, 3), token=0, grid=(1, 2), top=1)
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['1  token 1  0.75']
    """
    A, heads = _text_by_image(block, attention, n_text, mask, sample, head, text_labels, image_labels)
    n, m = A.shape
    if not 0 <= token < n:
        raise ValueError(f"token={token} is out of range: sample {sample} has {n} text tokens, 0 to {n - 1}")
    if top < 1:
        raise ValueError(f"top={top} must be at least 1")
    pixels = _pixels(image)
    places, looks = _places(boxes, grid, m, pixels), A[token]
    order = _best_first(looks)[:top]
    if not order:
        what = "attend to no image token" if block == "LV" else "be attended to by no image token"
        raise ValueError(f"token {token} of sample {sample} may {what}: choose another")
    legend = [f"{k + 1}  {_name(image_labels, place)}  {looks[place]:.2f}" for k, place in enumerate(order)]
    shade = grid is not None if shade is None else shade
    figure, axes = _draw(pixels, figure, legend, colorbar=shade)
    if shade:
        shown = _fill(axes, places, np.isfinite(looks), cmap=SHADE, norm=Normalize(0.0, looks[order[0]]))
        shown.set_array(looks[np.isfinite(looks)])
        figure.colorbar(shown, ax=axes, label="probability", location="bottom", aspect=40, ticks=MaxNLocator(5))
    for k, (place, label) in enumerate(zip(order, legend, strict=True)):
        style: dict[str, Any] = {"linewidth": 2.0, "linestyle": "--"} if k else {"linewidth": 3.0}
        _outline(axes, places[place], str(k + 1), k, NEXT if k else BEST, label=label, **style)
    _legend(figure, axes.patches, "highest attention")
    word = f"“{text_labels[token]}”" if text_labels else f"token {token}"
    what = f"Where {word} looks" if block == "LV" else f"What looks at {word}"
    axes.set_title(f"{what}\n{sample_and_head(sample, head, heads)}", fontsize="medium", parse_math=False)
    return figure.canvas.figure


@torch.no_grad()
@checked
def plot_region_labels(
    attention: Attention,
    n_text: NText | None = None,
    *,
    image: object,
    block: CrossBlock = "LV",
    mask: Mask | None = None,
    boxes: object = None,
    grid: tuple[Count, Count] | None = None,
    shade: bool | None = None,
    top: Count | None = None,
    sample: Count = 0,
    head: Count | None = None,
    text_labels: Labels = None,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """The word for each region of the image: the one that attends to it most, or that it attends to most.

    A box has an outline and a label, its word and the probability; boxes of one word share a color. Labels that would
    overlap are stacked.

    Args:
        attention: as in `plot_blocks`, like `n_text`, `mask`, `sample`, `head`, `text_labels` and `figure`.
        image: as in `plot_token_attention`, like `boxes` and `grid`.
        block: `"LV"`: region k gets the word with the highest A_LV[:, k], which attends to it most; `"VL"`: the word
            with the highest A_VL[k, :], which the region attends to most.
        shade: whether to fill each box with the color of its word and list the words in a legend; None: only for a
            grid, since regions overlap.
        top: number of boxes to outline and label, in descending order of the probability; None: all, but none if
            boxes are shaded.

    Returns:
        The figure. A box without any pair that may attend gets no word.

    Raises:
        ValueError: as `plot_token_attention`.

    Source:
        After CACR (Pandey et al., ACL 2023), Figures 4 and 5 and Section 5.2.

    Example:
        Each of two words attends to a region of its own with probability 3/4.

        >>> S = torch.zeros(1, 4, 4)
        >>> S[0, 0, 2] = S[0, 1, 3] = torch.tensor(3.0).log()
        >>> boxes = [(0, 0, 8, 8), (8, 0, 16, 8)]
        >>> figure = plot_region_labels(S, 2, image=torch.ones(8, 16, 3), boxes=boxes, text_labels=["mug", "grass"])
        >>> [label.get_text() for label in figure.axes[0].texts]
        ['mug 0.75', 'grass 0.75']
    """
    A, heads = _text_by_image(block, attention, n_text, mask, sample, head, text_labels, None)
    if top is not None and top < 0:
        raise ValueError(f"top={top} must be at least 0")
    pixels = _pixels(image)
    places = _places(boxes, grid, A.shape[1], pixels)
    # argmax_i A[i, k], the first of several maxima
    best, highest = np.nan_to_num(A, nan=-1.0).argmax(0), A.max(0, where=np.isfinite(A), initial=-np.inf)
    order = _best_first(highest)
    if not order:
        raise ValueError(f"no pair of {block} may attend in sample {sample}: choose the other block")
    words = sorted({int(best[k]) for k in order})
    few = len(words) <= 10
    palette = colormaps["tab10"](np.arange(10)) if few else colormaps["turbo"](np.linspace(0.0, 1.0, len(words)))
    colors = dict(zip(words, palette, strict=False))
    shade = grid is not None if shade is None else shade
    legend = [_name(text_labels, word) for word in words] if shade else []
    figure, axes = _draw(pixels, figure, legend, colorbar=False)
    if shade:
        _fill(axes, places, np.isfinite(highest), facecolor=[(*colors[best[k]][:3], 0.5) for k in sorted(order)])
        _legend(figure, [Patch(color=colors[i], label=name) for i, name in zip(words, legend, strict=True)], "word")
    top = (0 if shade else len(order)) if top is None else top
    for rank, k in enumerate(order[:top]):
        label = f"{_name(text_labels, best[k])} {highest[k]:.2f}"
        _outline(axes, places[k], label, rank, colors[best[k]], linewidth=2.0)
    what = "Word that looks at each region most" if block == "LV" else "Word that each region looks at most"
    axes.set_title(f"{what}\n{sample_and_head(sample, head, heads)}", fontsize="medium")
    _separate_labels(axes)
    return figure.canvas.figure


def _text_by_image(block: CrossBlock, *attention: Any) -> tuple[Array, int]:
    """A_LV or A_VL^T of one sample, mean over heads, NaN where none may attend; the number of heads."""
    one_of("block", block, ("LV", "VL"))
    blocks = one_sample(*attention)
    scores = blocks.LV if block == "LV" else blocks.VL
    if scores is None:
        raise ValueError("these blocks have no VL (image-to-text attention): use block='LV'")
    A = mean_map(scores, getattr(entries(blocks), block))
    return A if block == "LV" else A.T, scores.shape[1]


def _best_first(looks: Array) -> list[int]:
    """Where the finite values are, in descending order; equal ones in their own order."""
    return [int(k) for k in np.argsort(-looks, kind="stable") if np.isfinite(looks[k])]


def _name(labels: Labels, token: int) -> str:
    return labels[token] if labels else f"token {token}"


def _draw(
    pixels: np.ndarray, figure: Figure | SubFigure | None, legend: list[str], colorbar: bool
) -> tuple[Figure | SubFigure, Axes]:
    """The figure with the image alone, and room for a legend and a color bar."""
    height, width = pixels.shape[:2]
    scale = 4.2 / max(height, width)  # inches per pixel
    beside = -(-len(legend) // LINES) * (0.8 + 0.075 * max(map(len, legend), default=0))
    size = width * scale + beside + 0.1, height * scale + (1.5 if colorbar else 0.8)
    figure = figure or Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.imshow(pixels, extent=(0, width, height, 0))
    axes.set_axis_off()
    return figure, axes


def _outline(axes: Axes, box: Array, tag: str, rank: int, color: Any, **style: Any) -> None:
    """Draw a box with a tag in its upper left corner, above those of higher rank."""
    (left, upper, right, lower), behind = box, rank / (rank + 1)
    around = [withStroke(linewidth=4.5, foreground="white")]
    outline = Rectangle((left, upper), right - left, lower - upper, fill=False, edgecolor=color, **style)
    axes.add_patch(outline).set(path_effects=around, zorder=10 - behind)
    patch = {"boxstyle": "round,pad=0.2", "facecolor": color, "edgecolor": "white", "linewidth": 0.8}
    text = axes.annotate(tag, (left, upper), (3, -3), "data", "offset points", bbox=patch, zorder=20 - behind)
    light = np.dot(to_rgb(color), (0.3, 0.59, 0.11)) > 0.6
    text.set(color="black" if light else "white", parse_math=False, va="top", fontsize="small", fontweight="bold")


def _separate_labels(axes: Axes) -> None:
    """Move each label down until it overlaps no earlier one."""
    root = axes.figure.canvas.figure
    root.draw_without_rendering()  # extents are known after the layout
    taken: list[Bbox] = []
    for label in axes.texts:
        assert isinstance(label, Annotation)
        place = start = label.get_window_extent().padded(root.dpi / 25)
        while hit := next(filter(place.fully_overlaps, taken), None):
            place = place.translated(0, hit.y0 - place.y1 - 1)
        label.xyann = 3, -3 - (start.y0 - place.y0) * 72 / root.dpi
        taken.append(place)


def _fill(axes: Axes, places: Array, seen: np.ndarray, **style: Any) -> PatchCollection:
    """Fill the boxes that are seen, and hatch the others."""
    for shown, look in ((~seen, HATCH), (seen, {"antialiased": False, **style})):
        boxes = [Rectangle((left, upper), right - left, lower - upper) for left, upper, right, lower in places[shown]]
        filled = PatchCollection(boxes, linewidth=0.0, **look)
        axes.add_collection(filled)
    return filled


def _legend(figure: Figure | SubFigure, handles: Any, title: str) -> None:
    """A legend beside the image."""
    columns = -(-len(handles) // LINES)
    legend = figure.legend(handles=handles, loc="outside right upper", frameon=False, title=title, ncols=columns)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _pixels(image: object) -> np.ndarray:
    """`(height, width, 3 or 4)`, checked."""
    pixels = np.asarray(image.detach().cpu() if isinstance(image, Tensor) else image)
    if pixels.ndim != 3 or pixels.shape[2] not in (3, 4):
        raise ValueError(
            f"image has shape {pixels.shape}: it must be (height, width, 3); image.convert('RGB') makes a PIL image "
            "so, and tensor.permute(1, 2, 0) a tensor (3, height, width)"
        )
    most = 255 if np.issubdtype(pixels.dtype, np.integer) else 1
    if not (pixels.min() >= 0 and pixels.max() <= most):
        raise ValueError(
            f"image has values {pixels.min():.3g} to {pixels.max():.3g}, and {pixels.dtype} allows 0 to {most}: "
            "pass the picture itself, not the processor's normalized pixels"
        )
    return pixels


def _places(boxes: object, grid: tuple[int, int] | None, m: int, pixels: np.ndarray) -> Array:
    """`(image tokens, 4)`: where each image token is, in pixels."""
    height, width = pixels.shape[:2]
    if (boxes is None) == (grid is None):
        raise ValueError("pass either boxes=, one for each image token, or grid=(rows, columns) of patches")
    if grid is not None:
        rows, columns = grid
        if rows * columns != m:
            raise ValueError(
                f"grid={grid} has {rows * columns} patches, and the sample {m} image tokens: leave special image "
                "tokens out with a TokenLayout, or pass boxes="
            )
        # Multiply before dividing, so that neighbors share their edges exactly.
        y, x = np.divmod(np.arange(m), columns)
        return np.stack([x * width / columns, y * height / rows, (x + 1) * width / columns, (y + 1) * height / rows], 1)
    found: Array = np.asarray(torch.as_tensor(boxes).detach().cpu(), dtype=np.float64)
    if found.shape != (m, 4):
        raise ValueError(
            f"boxes has shape {found.shape}, and the sample {m} image tokens: give left, top, right, bottom for each "
            f"real one, ({m}, 4); leave special image tokens out with a TokenLayout"
        )
    left, upper, right, lower = found.T
    if not ((left < right) & (upper < lower)).all():
        raise ValueError("each box must be left, top, right, bottom, with left < right and top < bottom")
    beyond = found.min() < -1 or right.max() > width + 1 or lower.max() > height + 1
    if beyond or found.max() <= 1:
        raise ValueError(
            f"boxes reach from ({left.min():.4g}, {upper.min():.4g}) to ({right.max():.4g}, {lower.max():.4g}), and "
            f"the image is {width} x {height} pixels: scale them to its pixels"
        )
    return found
