"""The runs of the experiment, in order, and the file that keeps them: a run that is there is not made again.

sweep    the plain model at several shares of swapped negatives: is the task neither trivial nor impossible?
tuning   each loss at four weights and two schedules, on the validation set, with seeds of its own
main     every method, its best weight and schedule, on the test set
patches  the same on patches, with the weights and schedules found on regions
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.compositionality.train import METHODS, SCHEDULES, Setting, run

LOSSES = tuple(name for name in METHODS if name != "none")


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        weights: of each loss, as many for all. The losses differ in scale by three orders of magnitude, so the decades
            differ too: at the start of training the gradients' norms per unit of weight are about 0.04 (RELEASED), 0.5
            (IAIS), 0.8 (WEIGHTED_MEAN) and 14 (PRINTED). Weight 1, the released code's, is among all of them.
    """

    base: Setting
    patches: Setting
    shares: Sequence[float] = (0.0, 0.25, 0.5, 0.7, 1.0)
    sweep_seeds: Sequence[int] = range(200, 204)
    tuning_seeds: Sequence[int] = range(100, 103)
    seeds: Sequence[int] = range(20)
    patch_seeds: Sequence[int] = range(5)
    weights: Mapping[str, Sequence[float]] = field(default_factory=lambda: WEIGHTS)

    def sweep(self) -> list[Setting]:
        """The plain model at each share."""
        return [replace(self.base, share=share, seed=seed) for share in self.shares for seed in self.sweep_seeds]

    def trials(self, method: str) -> list[Setting]:
        """What is tried for a loss, without seeds."""
        return [
            replace(self.base, method=method, weight=weight, schedule=schedule)
            for weight in self.weights[method]
            for schedule in SCHEDULES
        ]

    def tuning(self) -> list[Setting]:
        """All trials with all tuning seeds."""
        return [replace(trial, seed=s) for name in LOSSES for trial in self.trials(name) for s in self.tuning_seeds]

    def best(self, runs: Runs, method: str) -> Setting:
        """The trial with the best mean group score on the validation set at the end of training."""
        if method == "none":
            return self.base
        return max(self.trials(method), key=lambda trial: self.score(runs, trial))

    def score(self, runs: Runs, trial: Setting) -> float:
        """Mean over the tuning seeds of the last validation group score."""
        return statistics.mean(runs[replace(trial, seed=seed)]["curve"][-1][3] for seed in self.tuning_seeds)

    def main(self, runs: Runs) -> list[Setting]:
        """The best of each method, seed by seed, so that an interrupted grid has compared what it has."""
        return [replace(self.best(runs, method), seed=seed) for seed in self.seeds for method in METHODS]

    def on_patches(self, runs: Runs) -> list[Setting]:
        """The same for the patch model."""
        best = {method: self.best(runs, method) for method in METHODS}
        return [
            replace(self.patches, method=method, weight=best[method].weight, schedule=best[method].schedule, seed=seed)
            for seed in self.patch_seeds
            for method in METHODS
        ]

    def phases(self, runs: Runs) -> Iterator[tuple[str, list[Setting]]]:
        """Name and runs of each phase; a phase may depend on the results of those before."""
        yield "sweep", self.sweep()
        yield "tuning", self.tuning()
        yield "main", self.main(runs)
        yield "patches", self.on_patches(runs)


WEIGHTS = {
    "iais": (0.01, 0.1, 1.0, 10.0),
    "cacr-released": (0.1, 1.0, 10.0, 100.0),
    "cacr-printed": (0.001, 0.01, 0.1, 1.0),
    "cacr-weighted-mean": (0.01, 0.1, 1.0, 10.0),
}
FULL = Plan(Setting(), Setting(view="patches"))
_TINY = {"steps": 60, "items": 400, "batch": 16, "every": 20, "held_out": 50, "tested": 100}
SMOKE = Plan(
    Setting(**_TINY),
    Setting(view="patches", **_TINY),
    shares=(0.0, 1.0),
    sweep_seeds=(200,),
    tuning_seeds=(100,),
    seeds=range(3),
    patch_seeds=range(2),
    weights={method: weights[1:3] for method, weights in WEIGHTS.items()},
)


class Runs:
    """Results by setting, in a file with one run a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._found = {Setting(**one["setting"]): one["result"] for one in map(json.loads, lines)}

    def __getitem__(self, setting: Setting) -> dict[str, Any]:
        return self._found[setting]

    def __contains__(self, setting: Setting) -> bool:
        return setting in self._found

    def complete(self, name: str, settings: Sequence[Setting], device: str, processes: int) -> None:
        """Make the runs that are missing."""
        missing = [setting for setting in dict.fromkeys(settings) if setting not in self]
        if not missing:
            return
        with multiprocessing.get_context("spawn").Pool(min(processes, len(missing)), _one_thread) as pool:
            done = pool.imap_unordered(_run, [(setting, device) for setting in missing])
            for setting, result in tqdm(done, desc=name, total=len(missing)):
                with self.path.open("a") as file:
                    file.write(json.dumps({"setting": asdict(setting), "result": result}) + "\n")
                self._found[setting] = result


def _one_thread() -> None:
    torch.set_num_threads(1)


def _run(what: tuple[Setting, str]) -> tuple[Setting, dict[str, Any]]:
    setting, device = what
    return setting, run(setting, device)
