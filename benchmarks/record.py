"""What every benchmark shares: paired timing, and a result file that says where it comes from."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "einops", "jaxtyping", "beartype", "transformers", "timm")


def environment(module: str, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Machine, versions, commit and command of this run, by default with the arguments it was started with.

    In a copy that git knows nothing about, `BENCH_COMMIT` says which commit it is.
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    known = _git("rev-parse", "--short", "HEAD")
    changes = bool(_git("status", "--porcelain", "--", "src", "benchmarks/*.py")) if known else None
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": versions,
        "commit": known or os.environ.get("BENCH_COMMIT", ""),
        "uncommitted_changes": changes,
        "command": shlex.join(["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)]),
    }


def clock(device: str) -> Callable[[], float]:
    """The clock on the wall; on a card, once all work is done."""

    def after_all_work() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return after_all_work if device == "cuda" else time.perf_counter


def paired(
    runs: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each run, round by round, after some rounds of warming up.

    The runs of a round stand side by side, every other round in reverse order, so that noise hits them alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-warmup, rounds):
        for name in list(runs)[:: 1 if number % 2 else -1]:
            start = clock()
            runs[name]()
            if number >= 0:
                seconds[name].append(clock() - start)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> Spread:
    """How many times longer one run took than another: the median of the round-by-round ratios, and their quartiles."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def spread(values: list[float]) -> Spread:
    """Median and quartiles."""
    low, _, high = statistics.quantiles(values, n=4)
    return {"median": statistics.median(values), "lower_quartile": low, "upper_quartile": high}


Spread = dict[str, float]
Results = dict[str, dict[str, dict[str, Any]]]


def table(title: str, results: Results, number: Callable[[float], str]) -> str:
    """Ratios, `{what: {variant: ratio(...)}}`, as Markdown; `{"not_run": why}` in place of a ratio says why."""
    lines = [f"| {title} | | median | quartiles |", "| --- | --- | ---: | ---: |"]
    for what, ratios in results.items():
        for variant, r in ratios.items():
            if "not_run" in r:
                lines.append(f"| {what} | {variant} | not run: {r['not_run']} | |")
                continue
            median, low, high = (number(r[key]) for key in ("median", "lower_quartile", "upper_quartile"))
            lines.append(f"| {what} | {variant} | {median} | {low} to {high} |")
    return "\n".join(lines)


def committed(name: str) -> Any:
    """The results in a committed file."""
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


def write(name: str, module: str, results: object) -> Path:
    """Write `benchmarks/results/<name>.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(module), "results": results}, indent=2) + "\n")
    return path


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    except OSError:  # no git here
        return ""
    return done.stdout.strip()
