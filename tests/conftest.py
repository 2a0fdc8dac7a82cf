"""What holds for every test: one thread a worker, and hypothesis without a clock."""

import hypothesis
import torch

torch.set_num_threads(1)
# Two noisy cores: a deadline would measure the machine. Derandomised, so that a red test is red again.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("suite")
