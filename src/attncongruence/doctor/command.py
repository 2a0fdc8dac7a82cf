"""The command `python -m attncongruence doctor module:function`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from attncongruence.doctor.examine import examine
from attncongruence.doctor.text import as_text

_RETURNS = "(model, batch) or (model, batch, where)"


class BadFactory(Exception):
    """The command line names no usable factory."""


def load(name: str) -> tuple[Any, ...]:
    """What a factory `module:function`, importable from the current directory, returns: two or three things.

    Raises:
        BadFactory: no such module or function, one that raises, or another return.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise BadFactory(f"{name!r} is no factory: write module:function, for instance my_project.factory:make")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except AttributeError:
        raise BadFactory(f"{module_name} has no {function_name}") from None
    except Exception as error:  # whatever a stranger's module raises
        raise BadFactory(
            f"{module_name} can't be imported, {type(error).__name__}: {error}. It must be importable from the "
            f"current directory, {os.getcwd()}"
        ) from error
    if not callable(function):
        raise BadFactory(f"{name} is a {type(function).__name__}, and must be a function that returns {_RETURNS}")
    try:
        made = function()
    except Exception as error:
        raise BadFactory(f"{name}() raised {type(error).__name__}: {error}") from error
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        size = f" of {len(made)}" if isinstance(made, tuple) else ""
        raise BadFactory(f"{name}() returned a {type(made).__name__}{size}, and must return {_RETURNS}")
    model, batch = made[:2]
    if not isinstance(model, nn.Module) or not isinstance(batch, Mapping | tuple):
        raise BadFactory(
            f"{name}() returned ({type(model).__name__}, {type(batch).__name__}, ...), and must return {_RETURNS}: "
            "a torch.nn.Module, and a mapping of keyword arguments or a tuple of positional ones"
        )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0: all fine, 1: trouble with the model, 2 (by `SystemExit`): a bad command line."""
    parser = argparse.ArgumentParser(prog="python -m attncongruence", description="Tools around attncongruence.")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor",
        help="whether the loss can train your model, and what to write",
        description="Examines a model with one batch: what is captured, where text and image are, the loss, its "
        "gradient and its cost, and what to write in the training loop.",
        epilog="Exit status: 0 all fine, 1 trouble with the model, 2 a bad command line. More: docs/doctor.md.",
    )
    doctor.add_argument("factory", metavar="module:function", help=f"returns {_RETURNS}")
    doctor.add_argument(
        "--layers", type=_layer, default=-1, help="one attention: a dotted name, or an int; -1: the last"
    )
    doctor.add_argument("--direction", choices=("both", "language", "vision"), help="of the loss; by default what fits")
    doctor.add_argument("--rounds", type=int, default=7, help="of timing (7)")
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    try:
        model, batch, *where = load(options.factory)
        report = examine(
            model, batch, *where, layers=options.layers, direction=options.direction, rounds=options.rounds
        )
    except (BadFactory, ValueError) as error:
        doctor.error(str(error))
    if options.json:
        print(json.dumps({"ok": report.ok, **dataclasses.asdict(report)}, indent=1))
    else:
        print(as_text(report))
    return 0 if report.ok else 1


def _layer(word: str) -> int | str:
    try:
        return int(word)
    except ValueError:
        return word
