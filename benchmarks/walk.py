"""How far a reader walks: the functions and files that run, the size of the source, and what a call costs.

    python -m benchmarks.walk                    # this tree
    python -m benchmarks.walk --before COMMIT    # beside another commit, timed side by side; writes results/walk.json

Four cases are traced with `sys.setprofile`: a dense call, a streaming call, a forward pass under capture, and a
regularized forward pass. Only functions of `attncongruence` count; a change of file is a call or a return that leads
from one file of the package to another. `cacr_loss` is timed at UNITER's size, batch 8, in one process for each commit,
by turns, and the result is the ratio of the two.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from benchmarks import record

ROOT = Path(__file__).parent.parent
BATCH, HEADS, TEXT, IMAGE, WIDTH = 8, 12, 20, 36, 64


class Trace:
    """The functions of the package that run inside a `with` block."""

    def __init__(self, package: Path) -> None:
        self.package = str(package) + os.sep
        self.functions: set[tuple[str, int, str]] = set()
        self.changes = 0
        self._file: str | None = None

    def __enter__(self) -> Trace:
        sys.setprofile(self._see)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "return" and frame.f_back is not None:
            frame = frame.f_back
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(self.package):
            return
        file = code.co_filename.removeprefix(self.package)
        if event == "call":
            self.functions.add((file, code.co_firstlineno, code.co_name))
        if self._file not in (None, file):
            self.changes += 1
        self._file = file

    def counts(self) -> dict[str, int]:
        """Distinct functions (comprehensions and generators are functions too), files, and changes of file."""
        files = {file for file, _, _ in self.functions}
        return {"functions": len(self.functions), "files": len(files), "file changes": self.changes}


class Attends(nn.Module):
    """One layer of self-attention by torch's fused kernel, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """`{"loss": ...}`, as regularize wants it."""
        shape = (*tokens.shape[:2], HEADS, WIDTH)
        q, k, v = (x.reshape(shape).transpose(1, 2) for x in self.project(tokens).chunk(3, -1))
        return {"loss": nn.functional.scaled_dot_product_attention(q, k, v).square().mean()}


def walks() -> dict[str, Any]:
    """Counts of the four cases, after a first pass that makes what is made once."""
    import attncongruence
    from attncongruence import CACRLoss, cacr_loss, capture_attention, regularize

    torch.manual_seed(0)
    package = Path(attncongruence.__file__).parent
    model, tokens = Attends().train(), torch.randn(2, 12, HEADS * WIDTH)
    with capture_attention(model) as capture:
        record = _captured(capture, model, tokens)
        found = {
            "dense": _traced(package, lambda: cacr_loss(record(), 5)),
            "streaming": _traced(package, lambda: cacr_loss(record(), 5, impl="streaming")),
            "capture": _traced(package, lambda: model(tokens)),
        }
    with regularize(model, CACRLoss(), n_text=5):
        found["regularized"] = _traced(package, lambda: model(tokens))
    return found


def _captured(capture: Any, model: nn.Module, tokens: torch.Tensor) -> Callable[[], Any]:
    def fresh() -> Any:
        profile, _ = sys.getprofile(), sys.setprofile(None)
        model(tokens)
        record = capture.pop()
        sys.setprofile(profile)
        return record

    return fresh


def _traced(package: Path, call: Callable[[], Any]) -> dict[str, Any]:
    call()
    with Trace(package) as trace:
        call()
    return {**trace.counts(), "by file": _by_file(trace)}


def _by_file(trace: Trace) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for file, _, name in sorted(trace.functions):
        names.setdefault(file, []).append(name)
    return names


def size() -> dict[str, Any]:
    """Lines and files of the source, its longest file, and whether its imports lead in a circle."""
    import attncongruence

    package = Path(attncongruence.__file__).parent
    lines = {str(path.relative_to(package)): len(path.read_text().splitlines()) for path in package.rglob("*.py")}
    longest = max(lines, key=lines.__getitem__)
    return {
        "lines": sum(lines.values()),
        "files": len(lines),
        "longest file": [longest, lines[longest]],
        "circles": circles(imports_of(package)),
    }


def imports_of(package: Path) -> dict[str, set[str]]:
    """Each module's imports from its own package when it is loaded; those inside of functions do not count."""
    modules = {_name(package, path): path for path in package.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        graph[module] = set()
        for node in _outside_of_functions(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                graph[module] |= {alias.name for alias in node.names} & modules.keys()
            elif isinstance(node, ast.ImportFrom) and node.module:
                parts = {f"{node.module}.{alias.name}" for alias in node.names} & modules.keys()
                # `from package import module` needs the module; anything else, what the package itself defines.
                whole = len(parts) < len(node.names)
                graph[module] |= parts | ({node.module} & modules.keys() if whole else set())
    return graph


def _name(package: Path, path: Path) -> str:
    parts = [package.name, *path.relative_to(package).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _outside_of_functions(tree: ast.AST) -> list[ast.AST]:
    found: list[ast.AST] = []
    for node in ast.iter_child_nodes(tree):
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not isinstance(node, ast.FunctionDef | ast.Lambda) and not typing_only:
            found += [node, *_outside_of_functions(node)]
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or not."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        rest = [start]
        while rest:
            for module in graph[rest.pop()] - seen:
                seen.add(module)
                rest.append(module)
        return seen

    reached = {module: reach(module) for module in graph}
    groups = {
        tuple(sorted(other for other in reached[module] if module in reached[other]))
        for module in graph
        if module in reached[module]
    }
    return [list(group) for group in sorted(groups)]


CASES = {
    "tensor, RELEASED": {},
    "tensor, WEIGHTED_MEAN": {"convention": "WEIGHTED_MEAN"},
    "padded, RELEASED": {"padded": True},
}


def _timed(case: dict[str, Any]) -> Callable[[], float]:
    """Seconds of one forward and backward pass, best of a few."""
    import attncongruence

    torch.manual_seed(0)
    S = torch.randn(BATCH, HEADS, TEXT + IMAGE, TEXT + IMAGE, requires_grad=True)
    mask = torch.ones(BATCH, TEXT + IMAGE, dtype=torch.long)
    mask[::2, TEXT - 5 : TEXT] = 0
    convention = getattr(attncongruence, case.get("convention", "RELEASED"))
    options = {"mask": mask} if case.get("padded") else {}

    def run() -> float:
        start = time.perf_counter()
        for _ in range(20):
            attncongruence.cacr_loss(S, TEXT, convention=convention, **options).backward()
        return (time.perf_counter() - start) / 20

    run()
    return run


def _work() -> None:
    """A process that measures what it is told on its standard input."""
    torch.set_num_threads(1)
    timers = {name: _timed(case) for name, case in CASES.items()}
    for line in sys.stdin:
        request = line.strip()
        answer: Any = {"walks": walks(), "size": size()} if request == "walk" else timers[request]()
        print(json.dumps(answer), flush=True)


class Worker:
    """This script in a process of its own, with the source of one tree."""

    def __init__(self, source: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{ROOT}"}
        command = [sys.executable, "-c", "from benchmarks import walk; walk._work()"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, request: str) -> Any:
        """The answer to one request."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(request, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()


def compare(before: Path, rounds: int) -> dict[str, Any]:
    """Counts of both trees, and the time of this one over that of the other, by turns."""
    workers = {"before": Worker(before), "after": Worker(ROOT / "src")}
    found: dict[str, Any] = {name: worker.ask("walk") for name, worker in workers.items()}
    ratios: dict[str, Any] = {}
    for case in CASES:
        pairs = []
        for number in range(rounds):
            order = list(workers) if number % 2 else list(workers)[::-1]
            seconds = {name: workers[name].ask(case) for name in order}
            pairs.append(seconds["after"] / seconds["before"])
        ratios[case] = {**record.spread(pairs), "rounds": rounds}
    for worker in workers.values():
        worker.close()
    return {**found, "time of cacr_loss, after / before": ratios}


def main() -> None:
    """Print, and with another commit beside it, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.walk", description=__doc__.splitlines()[0])
    parser.add_argument("--before", help="a commit to compare with")
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    if options.before is None:
        print(json.dumps({"walks": walks(), "size": size()}, indent=2))
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), options.before], cwd=ROOT, check=True)
        try:
            results = compare(tree / "src", options.rounds)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    found = {
        "environment": record.environment("benchmarks.walk"),
        "results": {"commit before": options.before, **results},
    }
    path = record.RESULTS / "walk.json"
    path.write_text(json.dumps(found, indent=2) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
