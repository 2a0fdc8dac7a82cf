"""Pictures of attention: its blocks, the two maps that a loss compares, words and image tokens on the image.

Each function returns a matplotlib `Figure` and has no other effect: no window, no file, no pyplot, no rcParams. A
notebook shows the figure; `figure.savefig("blocks.png")` saves it. Needs matplotlib, the extra `viz`.
"""

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError("attncongruence.viz draws with matplotlib: pip install matplotlib (or the extra viz)") from error

from attncongruence.viz.matrices import plot_blocks, plot_congruence
from attncongruence.viz.picture import plot_region_labels, plot_token_attention

__all__ = ["plot_blocks", "plot_congruence", "plot_region_labels", "plot_token_attention"]
