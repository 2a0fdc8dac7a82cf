"""Speed and memory of the losses: one run, one result file, with tables and a plot.

    python -m benchmarks                 # on CPU, 2 threads: about a quarter of an hour, on a machine that is quiet
    python -m benchmarks --device cuda   # on a card
    python -m benchmarks --quick --out build/bench    # seconds; sizes too small to mean anything

First the streaming form is held to the dense form in float64, and nothing is timed if it is off. Then every form of
every loss is timed side by side: the loops (`loops`), the sizes of real models (`speed`) and the growth with the number
of image tokens (`growth`). Writes `benchmarks/results/<date>-<device>.json`, `.md` and `.png` at the end.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import correctness, growth, loops, record, report, speed
from benchmarks.forms import Plan, plan_for
from benchmarks.schema import PARTS

MEASURES: dict[str, Callable[..., Any]] = {"loops": loops.measure, "speed": speed.measure, "growth": growth.measure}


def slug_of(device: str) -> str:
    """A short name for result files: `cpu`, `h200`."""
    if device == "cpu":
        return device
    words = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return re.sub(r"^nvidia-(geforce-)?", "", words)


def measure(plan: Plan, parts: Sequence[str]) -> dict[str, Any]:
    """The results that a file holds."""
    results: dict[str, Any] = {
        "quick": plan.quick,
        "parts": list(parts),
        "setting": {
            "device": plan.device,
            "slug": slug_of(plan.device),
            "dtype": str(plan.dtype).removeprefix("torch."),
            "heads": plan.heads,
            "width": plan.width,
        },
    }
    results["correctness"] = correctness.measure(plan)
    correctness.refuse_if_off(results["correctness"])
    began = time.perf_counter()

    def progress(line: str) -> None:
        print(f"{time.perf_counter() - began:5.0f} s  {line}", flush=True)

    progress("correct")
    for part in parts:
        results[part] = MEASURES[part](plan, progress)
    return results


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs; needs --out")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="some parts; written to a file with a name of its own")
    parser.add_argument("--out", type=Path, help="folder of the result file, instead of benchmarks/results")
    options = parser.parse_args(arguments)
    if options.quick and options.out is None:
        parser.error("--quick measures nothing that is worth keeping: say where to with --out")
    parts = [part for part in PARTS if part in (options.only or PARTS)]
    plan = plan_for(options.device, options.quick)
    before = torch.get_num_threads()
    if options.device == "cpu":
        torch.set_num_threads(plan.threads)
    said = ["--device", options.device, *["--quick"] * options.quick]
    said += ["--only", *parts] if options.only else []
    environment = record.environment("benchmarks", said)
    if not environment["commit"] and options.out is None:
        parser.error("git does not know this copy: say which commit it is with BENCH_COMMIT=...")
    try:
        results = measure(plan, parts)
    finally:
        torch.set_num_threads(before)
    path = report.write({"environment": environment, "results": results}, options.out or record.RESULTS)
    print(path.with_suffix(".md").read_text())
    print(f"written to {path}")
    return path


if __name__ == "__main__":
    main()
