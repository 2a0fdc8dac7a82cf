"""Tiny models with random weights, as their libraries build them, and what their own eager attention computes."""

from collections.abc import Iterable

import pytest
import transformers

from tests.zoo import decoders, dual_stream, encoders, plain
from tests.zoo.case import Case, Layer, run

transformers.logging.set_verbosity_error()

CASES = {case.name: case for case in [*encoders.CASES, *dual_stream.CASES, *decoders.CASES, *plain.CASES]}

# One of each kind: encoders whose layer is the last, is named, adds a bias; decoders; two streams; each library.
QUICK = (
    "vilt",
    "layoutlmv3",
    "florence2",
    "lxmert",
    "git",
    "llava_left_padded",
    "timm_fused",
    "timm_beit",
    "torch_encoder",
    "torch_attention_weights",
)


def each(names: Iterable[str]) -> list[object]:
    """Parameters of a test: these cases, those that are not QUICK marked as slow."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


__all__ = ["CASES", "QUICK", "Case", "Layer", "each", "run"]
