"""The pictures of tests/test_viz.py, in tests/data/viz: `python -m tests.helpers.viz_pictures` draws them anew.

Drawn small and without words: fonts differ between versions of matplotlib. The numbers are sines, not drawn at random.
"""

import io
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch import Tensor

from attncongruence import WEIGHTED_MEAN, TokenLayout
from attncongruence.viz import plot_blocks, plot_congruence, plot_region_labels, plot_token_attention

FOLDER = Path(__file__).parents[1] / "data/viz"


def scores(batch: int, heads: int, length: int) -> Tensor:
    """Numbers from -2 to 2."""
    places = torch.arange(batch * heads * length**2, dtype=torch.float64)
    return 2 * (12.9898 * places + 0.3).sin().view(batch, heads, length, length)


def image(height: int, width: int) -> Tensor:
    """A slope from black to a light blue."""
    across = torch.linspace(0, 1, width).expand(height, width)
    return torch.stack([across * 0.6, across * 0.8, across], -1)


def causal(length: int) -> Tensor:
    """Each position sees those up to itself."""
    return torch.ones(1, length, length, dtype=torch.bool).tril()


def hiding(length: int, keys: range) -> Tensor:
    """The first position doesn't see these."""
    pairs = torch.ones(1, length, length, dtype=torch.bool)
    pairs[0, 0, list(keys)] = False
    return pairs


IMAGE_FIRST = TokenLayout(torch.arange(9)[None] >= 5, torch.arange(9)[None] < 5)
BOXES = [(4, 4, 30, 28), (20, 16, 60, 36), (40, 2, 62, 20)]
PICTURES = {
    "blocks": lambda: plot_blocks(scores(1, 2, 9), 4),
    "blocks_causal": lambda: plot_blocks(scores(1, 2, 9), IMAGE_FIRST, mask=causal(9), values="probabilities"),
    "congruence": lambda: plot_congruence(scores(1, 2, 9), 4, convention=WEIGHTED_MEAN),
    "congruence_causal": lambda: plot_congruence(
        scores(1, 2, 9), IMAGE_FIRST, mask=causal(9), convention=WEIGHTED_MEAN
    ),
    "regions": lambda: plot_token_attention(scores(1, 2, 5), 2, image=image(40, 64), token=1, boxes=BOXES),
    "patches": lambda: plot_token_attention(
        scores(1, 2, 17), 2, image=image(40, 64), token=0, mask=hiding(17, range(2, 6)), grid=(3, 5), top=3
    ),
    "words": lambda: plot_region_labels(scores(1, 2, 18), 3, image=image(40, 64), block="VL", grid=(3, 5), top=2),
}


def save(figure: Figure, path: Path) -> None:
    """Without words, legends and layout, and smoothed: those move edges by a pixel from version to version."""
    for words in [*figure.findobj(Text), *figure.legends]:
        words.set_visible(False)
    figure.set_layout_engine("none")
    figure.set_size_inches(6, 4)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=160)
    Image.open(drawn).convert("RGB").reduce(4).save(path, optimize=True)


if __name__ == "__main__":
    for name, draw in PICTURES.items():
        save(draw(), FOLDER / f"{name}.png")
