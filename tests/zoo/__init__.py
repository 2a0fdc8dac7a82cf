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
NEEDS: dict[tuple[str, str], tuple[str, ...]] = {
    ("transformers>=5.17", "the family is newer than 5.0"): ("modernvbert",),
    ("transformers>=5.17", "its language model returns no attentions in 5.0"): ("blip_2",),
    ("transformers>=5.24", "its eager and its sdpa attention differ up to 5.17"): ("kosmos2",),
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
    ),
    ("transformers>=5.0", "the family is newer than 4.53"): ("florence2", "qwen3_vl"),
    ("transformers>=5.0", "its Q-Former returns no probabilities in 4.53"): ("blip_2_itm",),
    ("transformers>=5.0", "its eager attention returns no probabilities in 4.53"): ("bridgetower",),
    ("transformers>=5.0", "eager attention for the language model alone cannot be set in 4.53"): ("phi4_multimodal",),
    ("transformers>=5.0", "4.53 does not read rope_parameters"): ("qwen2_vl", "qwen2_5_vl", "mllama"),
}


def each(names: Iterable[str], *, slow: bool = True) -> list[object]:
    """Parameters of a test: these cases with their needs, and those that are not QUICK marked as slow."""
    late = [] if not slow else [name for name in CASES if name not in QUICK]
    return [pytest.param(name, marks=[*_needs(name), *[pytest.mark.slow] * (name in late)]) for name in names]


def needs(*names: str) -> Callable[[T], T]:
    """Marks a test that takes these cases itself."""

    def mark(test: T) -> T:
        for name in names:
            for need in _needs(name):
                test = need(test)
        return test

    return mark


def _needs(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.needs(need, reason=reason) for (need, reason), names in NEEDS.items() if name in names]


__all__ = ["CASES", "NEEDS", "QUICK", "Case", "Layer", "each", "needs", "run", "set_kernel"]
