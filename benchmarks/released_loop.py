"""The losses the way the released codes compute them: one direction a call, one sample after the other.

Written from the formulas of the released codes, as a yardstick for speed (and checked against the library in
`tests/test_benchmarks.py`). Scores are given, so the codes' fourfold projection of queries and keys is not charged.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cacr_per_sample(scores: Tensor, text: Tensor, image: Tensor, n_text: int, direction: str) -> Tensor:
    """CACR, released convention, `(batch, heads, length, length)` scores, masks `(batch, length)`, text first."""
    rows, columns = (text, image) if direction == "language" else (image, text)

    def mean_map(rows: Tensor, columns: Tensor) -> Tensor:
        pairs = rows[:, None, :, None] & columns[:, None, None, :]
        return ((scores + (~pairs) * -10000.0).softmax(-1) * pairs).mean(1)

    own, other, cross = mean_map(rows, rows), mean_map(columns, columns), mean_map(rows, columns)
    own_start, other_start = (0, n_text) if direction == "language" else (n_text, 0)
    total = scores.new_zeros(())
    for sample in range(scores.shape[0]):
        n, m = int(rows[sample].sum()), int(columns[sample].sum())
        own_block = own[sample, own_start : own_start + n, own_start : own_start + n]
        other_block = other[sample, other_start : other_start + m, other_start : other_start + m]
        E = cross[sample, own_start : own_start + n, other_start : other_start + m].detach()
        p, t = (E @ other_block @ E.T).softmax(-1), own_block.softmax(-1)
        total = total + F.kl_div(t.log(), p, reduction="batchmean") + F.kl_div(p.log(), t, reduction="batchmean")
    return total / scores.shape[0]


def uniter_batch(batch: int, n_text: int = 20, n_image: int = 36, heads: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Random scores, text and image masks: captions of 8 to `n_text` tokens, images of 20 to `n_image` regions."""
    generator = torch.Generator().manual_seed(0)
    length = n_text + n_image
    scores = torch.randn(batch, heads, length, length, generator=generator)
    position = torch.arange(length)
    text = position < torch.randint(8, n_text + 1, (batch, 1), generator=generator)
    image = (position >= n_text) & (position < n_text + torch.randint(20, n_image + 1, (batch, 1), generator=generator))
    return scores, text, image
