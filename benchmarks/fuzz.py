"""The fuzzing of tests/test_robustness.py with new examples, and how many of them each function answered and refused.

    python -m benchmarks.fuzz     # or `make fuzz`: 25 times as many examples as the test suite draws

A failure prints the input and the line that reproduces it, and nothing is written. Otherwise writes
`benchmarks/results/fuzz-cpu.json`. One example asks one or several functions, some of them more than once.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest

from benchmarks.record import write
from tests.helpers.fuzzing import EXAMPLES, TALLY

TESTS = ["tests/test_robustness.py", "tests/test_robustness_training.py"]


def results() -> dict[str, Any]:
    """What the fuzzing of this process has counted."""
    calls = {name: dict(sorted(counts.items())) for name, counts in sorted(TALLY.items())}
    return {"examples": dict(sorted(EXAMPLES.items())), "calls": calls}


def table(results: dict[str, Any]) -> str:
    """What `docs/reliability.md` says of them, as Markdown."""
    examples, calls = results["examples"], results["calls"]
    total = {kind: sum(counts.get(kind, 0) for counts in calls.values()) for kind in ("answered", "refused")}
    lines = [
        f"| {name} | {counts.get('answered', 0):,} | {counts.get('refused', 0):,} |"
        for name, counts in [*((f"`{name}`", counts) for name, counts in calls.items()), ("all", total)]
    ]
    title = f"calls in {sum(examples.values()):,} examples of {len(examples)} properties"
    return "\n".join([f"| {title} | right result | clear error |", "| --- | ---: | ---: |", *lines])


def main() -> int:
    """Fuzz, print and write."""
    failed = pytest.main([*TESTS, "--hypothesis-profile", "nightly", "-p", "no:cacheprovider"])
    if failed:
        return int(failed)
    print(table(results()))
    print(f"written to {write('fuzz-cpu', 'benchmarks.fuzz', results())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
