"""Attention congruence losses for vision-language transformers: CACR (ACL 2023) and IAIS (ACL 2021).

    model --capture--> scores S --layout--> blocks LL LV VL VV --equivalence E--> E VV E^T --m-KL--> LL   (V likewise)

    capture = capture_attention(model)
    weight = exponential_warmup(total_steps=5000)
    for step, batch in enumerate(loader):
        out = model(**batch)
        loss = out.loss + weight(step) * cacr_loss(capture.pop(), n_text=batch["input_ids"].shape[1])
        loss.backward(); optimizer.step(); optimizer.zero_grad()

    regularize(model, CACRLoss(), n_text=40, weight=weight)  # or, for a trainer that can't be edited: one line, no loop

`docs/paper-map.md` leads from each equation of the papers to its function and its test.
"""

from importlib.metadata import version

from attncongruence.blocks import AttentionBlocks, split_attention
from attncongruence.capture import AttentionCapture, CapturedAttention, capture_attention, find_attention
from attncongruence.conventions import CONVENTIONS, PRINTED, RELEASED, WEIGHTED_MEAN, Convention
from attncongruence.divergence import symmetric_kl
from attncongruence.layout import TokenLayout
from attncongruence.losses import cacr_loss, iais_loss
from attncongruence.metrics import WinogroundScores, argmax_entropy, attention_distance, recall_at_k, winoground_scores
from attncongruence.modules import CACRLoss, IAISLoss
from attncongruence.reference import hard_equivalence_loop, soft_equivalence_loop
from attncongruence.sources import QueryKey, ScoreSource
from attncongruence.training.regularize import LossParts, Regularizer, regularize
from attncongruence.training.schedules import Schedule, exponential_warmup, linear_warmup, logarithmic_warmup

__version__ = version("attncongruence")

__all__ = [
    "CONVENTIONS",
    "PRINTED",
    "RELEASED",
    "WEIGHTED_MEAN",
    "AttentionBlocks",
    "AttentionCapture",
    "CACRLoss",
    "CapturedAttention",
    "Convention",
    "IAISLoss",
    "LossParts",
    "QueryKey",
    "Regularizer",
    "Schedule",
    "ScoreSource",
    "TokenLayout",
    "WinogroundScores",
    "argmax_entropy",
    "attention_distance",
    "cacr_loss",
    "capture_attention",
    "exponential_warmup",
    "find_attention",
    "hard_equivalence_loop",
    "iais_loss",
    "linear_warmup",
    "logarithmic_warmup",
    "recall_at_k",
    "regularize",
    "soft_equivalence_loop",
    "split_attention",
    "symmetric_kl",
    "winoground_scores",
]
