"""Where a word looks in the image."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from attncongruence._typing import Count, checked
from attncongruence.blocks import Attention, Mask, NText
from attncongruence.conventions import RELEASED
from attncongruence.maps import attention_map, entries
from attncongruence.viz.draw import HATCH, LETTER, Array, Labels, any_head, canvas, chosen, over_heads, whose

BEST, NEXT = "#1a9641", "#d7191c"
"""The paper's green and red."""
SHADE = LinearSegmentedColormap.from_list("shade", [(0.33, 0.15, 0.56, 0.0), (0.33, 0.15, 0.56, 0.85)])
"""From nothing to purple, which is rare in pictures."""


@checked
@torch.no_grad()
def plot_token_attention(
    image: object,
    attention: Attention,
    token: Count,
    n_text: NText = None,
    *,
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
    """Where one word looks: the image tokens with its highest attention, drawn on the image.

    The attention is the word's row of A_LV = softmax(LV), of one head or the mean over heads. The image token with the
    highest, IAIS's a_i, is outlined in green, the next ones in red and dashed; a legend gives their probabilities.

    Args:
        image: a PIL image, or an array or tensor `(height, width, 3)`: uint8, or floats from 0 to 1.
        attention: and `n_text`, `mask`, `sample`, `head`, the labels and `figure`: as for `plot_blocks`.
        token: which of the sample's real text tokens, from 0.
        boxes: `(image tokens, 4)`: left, top, right, bottom of each real image token, in pixels of `image`; for
            regions, and for patches that are not in reading order (ViLT shuffles them: `docs/pictures.md`).
        grid: `(rows, columns)` of patches in reading order that cover the image, instead of boxes. An image's own
            [CLS] is no patch: leave it out with a `TokenLayout`.
        shade: whether to colour each box by its attention; None: for a grid alone, as regions overlap.
        top: how many image tokens to outline, at least 1.

    Returns:
        The figure.

    Raises:
        jaxtyping.TypeCheckError, ValueError: as `plot_blocks`, and for a token out of range or that may attend to no
            image token, an image or boxes of another shape or range, a grid with another number of patches, and unless
            there is either `boxes` or `grid`.

    Source:
        After CACR (Pandey et al., ACL 2023), Figures 4 and 5; IAIS (Ren et al., ACL 2021), Section 3, for a_i.

    Example:
        Of two regions, side by side, the word looks at the second.

        >>> S = torch.zeros(1, 3, 3)
        >>> S[0, 0, 2] = torch.tensor(3.0).log()
        >>> figure = plot_token_attention(torch.ones(8, 16, 3), S, 0, n_text=1, grid=(1, 2), top=1)
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['1  token 1  0.75']
    """
    pixels = _pixels(image)
    blocks = chosen(attention, n_text, mask, sample, head, text_labels, image_labels)
    n, m = blocks.LV.shape[-2:]
    if not 0 <= token < n:
        raise ValueError(f"token={token} is out of range: sample {sample} has {n} text tokens, 0 to {n - 1}")
    if top < 1:
        raise ValueError(f"top={top} must be at least 1")
    places = _places(boxes, grid, m, pixels)
    pairs = entries(blocks).LV
    # A_LV[token]
    looks = over_heads(attention_map(blocks.LV, pairs, RELEASED), any_head(pairs))[token]
    order = [int(k) for k in np.argsort(-looks, kind="stable") if np.isfinite(looks[k])][:top]
    if not order:
        raise ValueError(f"token {token} of sample {sample} may attend to no image token: choose another")

    height, width = pixels.shape[:2]
    shade = grid is not None if shade is None else shade
    names = [f"token {k}" if image_labels is None else image_labels[k] for k in order]
    scale = 4.2 / max(height, width)  # inches a pixel
    beside, below = 1.2 + 1.2 * LETTER * max(map(len, names)), 1.4 if shade else 0.7
    figure, _ = canvas(figure, (width * scale + beside, height * scale + below), 1.0)
    axes = figure.subplots()
    axes.imshow(pixels, extent=(0, width, height, 0))
    axes.set_axis_off()
    if shade:
        _shade(figure, axes, places, looks)
    word = f"token {token}" if text_labels is None else f"“{text_labels[token]}”"
    outlines = [
        _outline(axes, places[k], rank, f"{rank + 1}  {name}  {looks[k]:.2f}")
        for rank, (k, name) in enumerate(zip(order, names, strict=True))
    ]
    legend = figure.legend(handles=outlines, loc="outside right upper", frameon=False, title="highest attention")
    for text in legend.get_texts():
        text.set_parse_math(False)
    title = f"Where {word} looks\n{whose(sample, head, blocks.LV.shape[1])}"
    axes.set_title(title, fontsize="medium", parse_math=False)
    return figure.canvas.figure


def _outline(axes: Axes, box: Array, rank: int, label: str) -> Patch:
    """A numbered box: the best in green, the next in red and dashed, the better ones above the others."""
    left, upper, right, lower = box
    colour = NEXT if rank else BEST
    outline = Rectangle(
        (left, upper),
        right - left,
        lower - upper,
        fill=False,
        edgecolor=colour,
        linewidth=2.0 if rank else 3.0,
        linestyle="--" if rank else "-",
        path_effects=[withStroke(linewidth=4.5, foreground="white")],
        label=label,
        zorder=10 - rank / (rank + 1),
    )
    axes.annotate(
        str(rank + 1),
        (left, upper),
        (3, -3),
        textcoords="offset points",
        ha="left",
        va="top",
        color="white",
        fontsize="small",
        fontweight="bold",
        bbox={"boxstyle": "round,pad=0.2", "facecolor": colour, "edgecolor": "white", "linewidth": 0.8},
        zorder=20 - rank / (rank + 1),
    )
    return axes.add_patch(outline)


def _shade(figure: Figure | SubFigure, axes: Axes, places: Array, looks: Array) -> None:
    """Each box in the colour of its attention, hatched where it may not attend."""
    seen = np.isfinite(looks)
    rectangles = [Rectangle((left, upper), right - left, lower - upper) for left, upper, right, lower in places]
    hidden = [rectangle for rectangle, see in zip(rectangles, seen, strict=True) if not see]
    axes.add_collection(PatchCollection(hidden, linewidth=0.0, **HATCH))
    shown = PatchCollection(
        [rectangle for rectangle, see in zip(rectangles, seen, strict=True) if see],
        cmap=SHADE,
        norm=Normalize(0.0, looks[seen].max()),
        linewidth=0.0,
        antialiased=False,
    )
    shown.set_array(looks[seen])
    axes.add_collection(shown)
    figure.colorbar(shown, ax=axes, label="probability", location="bottom", aspect=40, ticks=MaxNLocator(5))


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
            "pass the picture itself, not the processor's normalised pixels"
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
        # Multiplied before the division, so that neighbours share their edges to the bit.
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
