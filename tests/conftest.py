"""What holds for every test: one thread a worker, hypothesis without a clock, and GPU kernels without a GPU."""

import os

import hypothesis
import torch

from tests.helpers.versions import (  # noqa: F401  what a test needs of other packages
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_runtest_setup,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

torch.set_num_threads(1)
# Without a card, kernels run in Triton's interpreter. It must be chosen before Triton is imported, by whichever test.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Two noisy cores: a deadline would measure the machine. Derandomized, so that a red test is red again.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
# `make fuzz`: many more examples, new ones each time; a failure prints the line that reproduces it.
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=2500, print_blob=True, database=None)
hypothesis.settings.load_profile("suite")
