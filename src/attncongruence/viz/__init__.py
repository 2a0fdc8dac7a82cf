"""Pictures: the four blocks, one attention beside the other's projection, where a word looks in the image.

Each function returns a matplotlib `Figure` and does nothing else: no window, no file, no pyplot, no rcParams. A
notebook shows the figure, `figure.savefig("blocks.png")` keeps it. Needs `pip install 'attncongruence[viz]'`.
"""

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError("attncongruence.viz draws with matplotlib: pip install 'attncongruence[viz]'") from error

from attncongruence.viz.matrices import plot_blocks, plot_congruence
from attncongruence.viz.picture import plot_token_attention

__all__ = ["plot_blocks", "plot_congruence", "plot_token_attention"]
