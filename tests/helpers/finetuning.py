"""Short runs of the fine-tuning example: tiny data, a command, and what came of it."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from examples import make_tiny_data

SCENES, EXAMPLES, STEPS = 30, 8, 6
Run = tuple[dict[str, Any], Path]
"""The metrics of a run, and its folder."""


def make_tiny(folder: Path) -> Path:
    make_tiny_data.main([str(folder), "--scenes", str(SCENES), "--winoground", str(EXAMPLES)])
    return folder


def command(tiny: Path, output: Path, *changes: str) -> list[str]:
    """Arguments of a short run; later ones win."""
    data = ["--captions", f"{tiny}/dataset_flickr30k.json", "--images", f"{tiny}/images"]
    data += ["--winoground", f"{tiny}/winoground", "--model", f"{tiny}/vilt", "--output", str(output)]
    short = {"negatives": 3, "steps": STEPS, "accumulate": 2, "log-every": 1, "save-every": 2, "workers": 0}
    return data + [f"--{name}={value}" for name, value in short.items()] + ["--cpu", *changes]


def weights(output: Path, step: int = STEPS) -> dict[str, Tensor]:
    return load_file(output / f"checkpoint-{step}/model.safetensors")


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """To the last bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def column(run: Run, name: str) -> list[float]:
    return [row[name] for row in run[0]["training"]]
