"""Tiny models with random weights, as their libraries build them, and what their own eager attention computes."""

import transformers

from tests.zoo import decoders, dual_stream, encoders, plain
from tests.zoo.case import Case, Layer, run

transformers.logging.set_verbosity_error()

CASES = {case.name: case for case in [*encoders.CASES, *dual_stream.CASES, *decoders.CASES, *plain.CASES]}

__all__ = ["CASES", "Case", "Layer", "run"]
