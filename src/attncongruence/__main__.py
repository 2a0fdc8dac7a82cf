"""`python -m attncongruence doctor module:function`: the doctor as a command."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any

from attncongruence.doctor.examine import examine
from attncongruence.doctor.report import as_text

_RETURNS = "(model, batch) or (model, batch, n_text)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status; a bad command line raises `SystemExit(2)`."""
    parser = argparse.ArgumentParser(prog="python -m attncongruence", description="Tools for attncongruence.")
    doctor = parser.add_subparsers(dest="command", required=True).add_parser(
        "doctor",
        help="whether the loss can train your model, and the code to write",
        description="Examines a model with one batch, and prints what was found and the code for the training loop.",
        epilog="Exit status: 0 all fine, 1 a problem with the model, 2 a bad command line. More: docs/doctor.md.",
    )
    doctor.add_argument("factory", metavar="module:function", help=f"returns {_RETURNS}")
    doctor.add_argument("--layers", default="-1", help="one attention: a dotted name, or an int; -1: the last")
    words = ("both", "language", "vision")
    doctor.add_argument("--direction", choices=words, help="of the loss; the default is what fits")
    doctor.add_argument("--rounds", type=int, default=7, help="number of timed rounds (7)")
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    layers = int(options.layers) if options.layers.removeprefix("-").isdecimal() else options.layers
    try:
        made = _call_factory(options.factory)
        report = examine(*made, layers=layers, direction=options.direction, rounds=options.rounds)
    except ValueError as error:
        doctor.error(str(error))
    print(json.dumps({"ok": report.ok, **dataclasses.asdict(report)}, indent=1) if options.json else as_text(report))
    return 0 if report.ok else 1


def _call_factory(name: str) -> tuple[Any, ...]:
    """What the factory `module:function` returns: two or three values."""
    sys.path.insert(0, os.getcwd())
    try:
        made = pkgutil.resolve_name(name)()
    except Exception as error:  # whatever the module or the function raises
        raise ValueError(
            f"{name} raised {type(error).__name__}: {error}. It must name a function that returns {_RETURNS}: write "
            f"module:function, importable from the current directory, {os.getcwd()}"
        ) from error
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        size = f" of {len(made)}" if isinstance(made, tuple) else ""
        raise ValueError(f"{name} returned a {type(made).__name__}{size}, and must return {_RETURNS}")
    return made


if __name__ == "__main__":
    sys.exit(main())
