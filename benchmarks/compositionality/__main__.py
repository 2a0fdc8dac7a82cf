"""The compositionality experiment: `python -m benchmarks.compositionality`, about two hours on two cores.

Interrupted, the same command goes on where it was. `--smoke --out DIR` is a two-minute version that proves nothing.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.compositionality.grid import FULL, SMOKE, Runs

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, then write the summary, the tables and the plots."""
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


if __name__ == "__main__":
    main()
