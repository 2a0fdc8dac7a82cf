"""Tiny models with random weights, as their libraries build them, and what their own eager attention computes."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import pytest
import transformers

from tests.zoo import decoders, dual_stream, encoders, plain
from tests.zoo.case import Case, Layer, run, set_kernel

transformers.logging.set_verbosity_error()

T = TypeVar("T")

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

# What a case needs, and why. Only some versions were tried: transformers 4.30.2, 4.53.0, 5.0.0, 5.17.0 and newer.
Needs = dict[tuple[str, str], tuple[str, ...]]
NEEDS: Needs = {
    ("transformers>=4.53", "the family is newer than 4.30"): (
        "paligemma",
        "gemma3",
        "gemma3_sliding",
        "llava",
        "llava_left_padded",
        "llava_next",
        "llava_onevision",
        "janus",
        "internvl",
        "chameleon",
        "idefics3",
        "smolvlm",
        "grounding_dino",
        "phi4_multimodal",
        "kosmos2",
        "blip_2_itm",
    ),
    ("transformers>=4.53", "image tokens have no place in its ids in 4.30"): ("blip_2",),
    ("transformers>=5.0", "the family is newer than 4.53"): ("florence2", "qwen3_vl"),
    ("transformers>=5.0", "4.53 does not read rope_parameters"): ("qwen2_vl", "qwen2_5_vl", "mllama"),
    ("transformers>=5.17", "the family is newer than 5.0"): ("modernvbert",),
}
# What a case needs to be compared with the model's own eager attention.
REFERENCE_NEEDS: Needs = {
    ("transformers>=5.0", "eager attention returns no probabilities in 4.53"): ("blip_2_itm", "bridgetower"),
    ("transformers>=5.0", "eager attention cannot be set for the language model alone in 4.53"): ("phi4_multimodal",),
    ("transformers>=5.17", "eager attention returns no probabilities in 5.0"): ("blip_2",),
    ("transformers>=5.24", "eager and sdpa attention differ up to 5.17"): ("kosmos2",),
}


def each(names: Iterable[str], *, slow: bool = True, reference: bool = False) -> list[object]:
    """Parameters of a test: these cases with their needs, and those that are not QUICK marked as slow."""
    tables = (NEEDS, REFERENCE_NEEDS) if reference else (NEEDS,)
    marks = {name: [mark for table in tables for mark in _marks(name, table)] for name in CASES}
    late = [name for name in CASES if slow and name not in QUICK]
    return [pytest.param(name, marks=[*marks[name], *[pytest.mark.slow] * (name in late)]) for name in names]


def needs(name: str) -> Callable[[T], T]:
    """Marks a test that takes this case itself."""

    def mark(test: T) -> T:
        for need in _marks(name, NEEDS):
            test = need(test)
        return test

    return mark


def _marks(name: str, table: Needs) -> list[pytest.MarkDecorator]:
    return [pytest.mark.needs(need, reason=reason) for (need, reason), names in table.items() if name in names]


__all__ = ["CASES", "NEEDS", "QUICK", "REFERENCE_NEEDS", "Case", "Layer", "each", "needs", "run", "set_kernel"]
