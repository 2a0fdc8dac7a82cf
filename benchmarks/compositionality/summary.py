"""What the runs say: means with 95% intervals, and differences to the plain model, paired by seed.

Intervals are Student's, over seeds. The paired test flips the signs of the differences, seed by seed, and asks how
often their mean is as far from 0; p-values of the four losses are adjusted after Holm.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.compositionality.grid import LOSSES, Plan, Runs
from benchmarks.compositionality.train import METHODS, Setting

HALF = 50.0  # percent of validation items right, on all four counts
SCORES = ("text", "image", "group")
Result = dict[str, Any]


def summarize(plan: Plan, runs: Runs) -> dict[str, Any]:
    """Everything that the tables and the plots show."""
    return {
        "seeds": {"sweep": len(plan.sweep_seeds), "tuning": len(plan.tuning_seeds)},
        "steps": plan.base.steps,
        "sweep": {
            str(share): [runs[one]["test"][2] for one in plan.sweep() if one.share == share] for share in plan.shares
        },
        "tuning": {method: _tuning(plan, runs, method) for method in LOSSES},
        "regions": _compare(plan.main(runs), runs),
        "patches": _compare(plan.on_patches(runs), runs),
    }


def _tuning(plan: Plan, runs: Runs, method: str) -> list[dict[str, Any]]:
    best = plan.best(runs, method)
    return [
        {
            "weight": trial.weight,
            "schedule": trial.schedule,
            "group": round(plan.score(runs, trial), 2),
            "best": trial == best,
        }
        for trial in plan.trials(method)
    ]


def _compare(settings: Sequence[Setting], runs: Runs) -> dict[str, Any]:
    """Of each method: the scores, their difference to the plain model, the way there, and the attention."""
    found = {method: [(one, runs[one]) for one in settings if one.method == method] for method in METHODS}
    results = {method: [result for _, result in some] for method, some in found.items()}
    table: dict[str, Any] = {}
    for method, some in found.items():
        setting, of = some[0][0], results[method]
        table[method] = {
            "weight": setting.weight,
            "schedule": setting.schedule if method != "none" else None,
            **{score: mean([one["test"][i] for one in of]) for i, score in enumerate(SCORES)},
            "groups": [one["test"][2] for one in of],
            "half": _half(of),
            "curve": _curve(of),
            "attention": {
                when: {name: mean([one["attention"][when][name] for one in of]) for name in of[0]["attention"][when]}
                for when in ("before", "after")
            },
        }
        if method != "none":
            table[method]["difference"] = paired(of, results["none"], lambda one: one["test"][2])
            table[method]["area"] = paired(of, results["none"], area)
    for what in ("difference", "area"):
        adjusted = holm([table[method][what]["p"] for method in LOSSES])
        for method, p in zip(LOSSES, adjusted, strict=True):
            table[method][what]["holm"] = p
    table["congruence"] = _congruence(results["none"])
    return table


def mean(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and 95% interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else float("nan")
    middle = statistics.fmean(values)
    return _rounded({"mean": middle, "low": middle - half, "high": middle + half})


def paired(some: Sequence[Result], plain: Sequence[Result], of: Callable[[Result], float]) -> dict[str, Any]:
    """Mean difference to the plain model with the same seed, 95% interval, p-value, and how many seeds are better."""
    differences = np.array([of(a) - of(b) for a, b in zip(some, plain, strict=True)])
    test = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=100_000, rng=np.random.default_rng(0)
    )
    return {
        **mean(list(differences)),
        "p": round(float(test.pvalue), 5),
        "better": int((differences > 0).sum()),
        "worse": int((differences < 0).sum()),
    }


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for as many comparisons, in the order given."""
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, place in enumerate(np.argsort(p)):
        highest = max(highest, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = round(highest, 5)
    return adjusted


def area(result: Result) -> float:
    """Mean group score along the validation curve: high where a run learns early."""
    return statistics.fmean(point[3] for point in result["curve"])


def _half(results: Sequence[Result]) -> dict[str, Any]:
    """The first look at which half of the validation items are right; the median counts runs that never get there."""
    steps = [next((point[0] for point in one["curve"] if point[3] >= HALF), float("inf")) for one in results]
    median = statistics.median_high(steps)
    return {
        "reached": sum(step < float("inf") for step in steps),
        "runs": len(steps),
        "median": median if median < float("inf") else None,
    }


def _curve(results: Sequence[Result]) -> list[dict[str, float]]:
    looks = zip(*(one["curve"] for one in results), strict=True)
    return [{"step": look[0][0], **mean([point[3] for point in look])} for look in looks]


def _congruence(plain: Sequence[Result]) -> dict[str, dict[str, float | None]]:
    """Rank correlation, over seeds of the plain model, of the test score with what its attention looks like."""
    groups = [one["test"][2] for one in plain]
    found = {}
    for name in plain[0]["attention"]["after"]:
        values = [one["attention"]["after"][name] for one in plain]
        ranked = len(set(groups)) > 1 and len(set(values)) > 1  # what is constant correlates with nothing
        rho = stats.spearmanr(groups, values) if ranked else None
        found[name] = _rounded({"rho": rho.statistic, "p": rho.pvalue}) if rho else {"rho": None, "p": None}
    return found


def _rounded(values: dict[str, float]) -> dict[str, float | None]:
    """NaN, of a single seed, is None: JSON has none."""
    return {key: None if value != value else float(f"{value:.5g}") for key, value in values.items()}
