"""The compositionality experiment: `python -m benchmarks.compositionality`, about two hours on two cores.

Interrupted, the same command goes on where it was. `--smoke --out DIR` is a two-minute version that proves nothing.

    runs.jsonl     every run: its setting, validation curve, test scores, attention before and after
    cost.json      a step with the loss against a step without, side by side
    summary.json   means, intervals and tests, computed from these two; scores.png and curves.png show it
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.compositionality import cost, plot
from benchmarks.compositionality.grid import FULL, SMOKE, Runs
from benchmarks.compositionality.summary import summarize
from benchmarks.compositionality.tables import fill
from benchmarks.record import environment

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent.parent / "docs/compositionality.md"
MODULE = "benchmarks.compositionality"


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, then write the summary, the plots and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs side by side (default: all cores)")
    parser.add_argument("--smoke", action="store_true", help="the two-minute version")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    given = parser.parse_args(arguments)
    if given.smoke and given.out == RESULTS:
        parser.error("--smoke needs --out DIR, so that it does not mix with the committed results")
    given.out.mkdir(parents=True, exist_ok=True)
    runs, plan = Runs(given.out / "runs.jsonl"), SMOKE if given.smoke else FULL
    for name, settings in plan.phases(runs):
        runs.complete(name, settings, given.device, given.processes)
    prices = given.out / "cost.json"
    if not prices.exists():
        _write(prices, cost.measure(plan, given.device, 20 if given.smoke else cost.ROUNDS))
    content = _write(given.out / "summary.json", summarize(plan, runs) | {"cost": _read(prices)["results"]})
    plot.draw(content["results"], given.out)
    if given.out == RESULTS:
        PAGE.write_text(fill(PAGE.read_text(), content))


def _write(path: Path, results: dict[str, Any]) -> dict[str, Any]:
    content = {"environment": environment(MODULE), "results": results}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return content


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


if __name__ == "__main__":
    main()
