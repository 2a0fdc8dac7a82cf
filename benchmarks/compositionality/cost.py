"""What the loss costs in the experiment: a training step with it against a step without, side by side."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.compositionality.grid import FULL, LOSSES, Plan
from benchmarks.compositionality.model import Matcher
from benchmarks.compositionality.train import METHODS, Setting, scenes, stepper
from benchmarks.record import clock, paired, ratio

ROUNDS = 60


def measure(plan: Plan = FULL, device: str = "cpu", rounds: int = ROUNDS) -> dict[str, Any]:
    """For each view and loss, how many times longer a step takes. No run is compiled, so that all are treated alike."""
    return {
        view: _view(setting, device, rounds) for view, setting in (("regions", plan.base), ("patches", plan.patches))
    }


def _view(setting: Setting, device: str, rounds: int) -> dict[str, Any]:
    train = scenes(setting.items, 0, setting.view, device)
    runs = {}
    for method in METHODS:
        model = Matcher(*train.images.shape[2:], ordered=setting.view == "patches").to(device)
        step = stepper(replace(setting, method=method, weight=1.0), model, model, train)
        runs[method] = lambda step=step: step(0)
    seconds = paired(runs, rounds, warmup=5, clock=clock(device))
    return {method: ratio(seconds[method], seconds["none"]) for method in LOSSES}
