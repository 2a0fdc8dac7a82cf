"""The quick tests in an environment for each version that the library claims to work with: `make matrix`.

    python -m benchmarks.matrix                            # all of them; some minutes and some gigabytes each
    python -m benchmarks.matrix "newest, Python 3.14"      # those with these names; the others keep their results

Writes `benchmarks/results/matrix.json`, and the table of it in `docs/reliability.md`. An environment that cannot be
made here (no such Python, say) is in the table as not run. The exit status says whether anything failed.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from benchmarks.record import RESULTS, write

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "matrix"
PAGE = ROOT / "docs" / "reliability.md"
START, END = "<!-- matrix -->\n", "<!-- /matrix -->"

AREAS = {
    "core": (
        "reference conventions maps divergence schedules layout blocks metrics losses streaming "
        "streaming_operators messages compat_private"
    ),
    "capture": (
        "capture_autograd capture_find capture_hooks capture_parallel capture_product capture_record "
        "capture_training capture_zoo compat doctor huggingface"
    ),
    "training": (
        "regularize regularize_steps training_loops training_parallel compat_frameworks robustness_training engines "
        "peft trl"
    ),
    "compile": "compile capture_compile",
}
"""Test files by what they hold."""
SLOW = ("compile",)
"""Areas of which the slow tests run too: inductor is one of them."""
OPTIONAL = ("transformers", "accelerate", "timm", "lightning", "peft", "trl", "deepspeed")
SHOWN = ("torch", "transformers", "accelerate", "lightning", "timm")
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "numpy", "packaging", "scipy")


@dataclass(frozen=True)
class Environment:
    """Versions that stand beside the library; those not named are the newest that go with them."""

    name: str
    python: str
    packages: tuple[str, ...]
    note: str = ""
    """What does not apply, in words."""


HF = ("torchvision", "pillow", "accelerate", "peft", "timm", "lightning", "matplotlib")
# setuptools: inductor of PyTorch 2.6 imports it.
ENVIRONMENTS = (
    Environment(
        "lowest, alone",
        "3.11",
        ("torch==2.6.0", "einops==0.8.2", "jaxtyping==0.3.4", "beartype==0.20.0", "setuptools"),
        "models of transformers and timm, Trainer, Lightning: not installed",
    ),
    Environment(
        "transformers 4.30",
        "3.11",
        ("torch==2.6.0", "torchvision", "pillow", "transformers==4.30.2", "timm==1.0.3", "numpy<2", "setuptools"),
        "Trainer's callback asks for transformers 5.0 (extra `hf`); there is no attention interface, so flash and flex "
        "kernels stay hidden, and say so; FSDP2 on CPU needs torch 2.11",
    ),
    Environment(
        "transformers 4.53",
        "3.11",
        ("torch==2.8.0", "torchvision", "pillow", "transformers==4.53.0", "accelerate", "timm", "peft"),
        "Lightning: not installed; FSDP2 on CPU needs torch 2.11",
    ),
    Environment(
        "lowest extras",
        "3.11",
        (
            "torch==2.11.0", "torchvision", "pillow", "transformers==5.0.0", "accelerate==1.3.0", "timm==1.0.3",
            "lightning==2.5.0", "peft", "matplotlib==3.9.0",
        ),
    ),
    Environment("torch 2.14", "3.11", ("torch==2.14.1", "transformers==5.17.0", *HF)),
    Environment("newest", "3.11", ("torch", "transformers", *HF)),
    Environment("newest, Python 3.14", "3.14", ("torch", "transformers", *HF)),
)  # fmt: skip


def run(environment: Environment) -> dict[str, Any]:
    """Makes an environment and runs in it what applies."""
    folder = BUILD / environment.name.replace(" ", "-").replace(",", "")
    python = folder / "bin" / "python"
    made = _uv("venv", "--clear", "--python", environment.python, str(folder))
    if made is None:
        named = {Requirement(package).name for package in environment.packages}
        packages = (*environment.packages, *(tool for tool in TOOLS if tool not in named))
        made = _uv("pip", "install", "--python", str(python), "--editable", str(ROOT), *packages)
    if made is not None:
        return {**asdict(environment), "not_run": made}
    versions = _versions(python)
    areas: dict[str, Any] = {}
    for area, files in AREAS.items():
        paths = [ROOT / "tests" / f"test_{name}.py" for name in files.split()]
        apply = [path for path in paths if needs(path) <= set(versions)]
        areas[area] = _tested(python, apply, slow=area in SLOW)
        left_out = [path for path in paths if path not in apply]
        areas[area]["left_out"] = {path.stem: sorted(needs(path) - set(versions)) for path in left_out}
        print(f"{environment.name}: {area}: {cell(areas[area])}", flush=True)
    return {**asdict(environment), "versions": versions, "areas": areas}


@functools.cache
def needs(path: Path) -> frozenset[str]:
    """The optional packages that a test file imports when it is read, by itself or by one of its helpers."""
    found: set[str] = set()
    seen, waiting = set(), [path]
    while waiting:
        seen.add(file := waiting.pop())
        for node in ast.parse(file.read_text()).body:
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            found |= {name.split(".")[0] for name in names} & set(OPTIONAL)
            helpers = [ROOT.joinpath(*name.split(".")) for name in names if name.startswith(("tests.", "benchmarks."))]
            files = [file for helper in helpers for file in (helper.with_suffix(".py"), helper / "__init__.py")]
            waiting += [file for file in files if file.exists() and file not in seen]
    return frozenset(found)


def cell(area: dict[str, Any]) -> str:
    """What is said of one area: how many tests passed, or how many did not."""
    if area["failed"]:
        return f"**{area['failed']:,} of {area['tests']:,} failed**"
    return f"{area['passed']:,}"


def table(results: dict[str, Any]) -> str:
    """What `docs/reliability.md` says of the results, as Markdown."""
    lines = [f"| quick tests passed | {' | '.join(AREAS)} |", "| --- |" + " ---: |" * len(AREAS)]
    notes = []
    for row in results["environments"]:
        if "not_run" in row:
            lines.append(f"| {row['name']}: not run here |{' |' * len(AREAS)}")
            continue
        shown = [("Python", row["versions"]["python"])]
        shown += [(name, row["versions"][name]) for name in SHOWN if name in row["versions"]]
        versions = ", ".join(" ".join(pair) for pair in shown)
        cells = " | ".join(cell(row["areas"][area]) for area in AREAS)
        lines.append(f"| {row['name']}: {versions} | {cells} |")
        if row["note"]:
            notes.append(f"- {row['name']}: {row['note']}.")
    return "\n".join([*lines, "", "What does not apply:", "", *notes])


def failed(results: dict[str, Any]) -> bool:
    """Whether anything failed, in an environment that could be made."""
    return any(area.get("failed") for row in results["environments"] for area in row.get("areas", {}).values())


def _uv(*arguments: str) -> str | None:
    """Runs uv; the last line of what it says when it fails, None when it does not."""
    done = subprocess.run([sys.executable, "-m", "uv", "--quiet", *arguments], capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["uv failed"])[-1]


def _versions(python: Path) -> dict[str, str]:
    """The versions of what matters in an environment."""
    kept = sorted({*SHOWN, *OPTIONAL, "triton", "numpy", "einops", "jaxtyping", "beartype"})
    code = (
        "import importlib.metadata as m, json, platform\n"
        "names = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        f"names = {{name: version for name, version in names.items() if name in {kept}}}\n"
        "print(json.dumps({**names, 'python': platform.python_version()}))"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def _tested(python: Path, paths: list[Path], *, slow: bool) -> dict[str, Any]:
    """Runs test files and counts."""
    report = BUILD / "report.xml"
    report.unlink(missing_ok=True)
    done = subprocess.run(
        [
            str(python), "-m", "pytest", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider",
            "-m", "not docs" if slow else "not slow and not docs", f"--junitxml={report}", *map(str, paths),
        ],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "ATTNCONGRUENCE_MATRIX": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode not in (0, 1) or not report.exists():
        (BUILD / "last-error.txt").write_text(done.stdout + done.stderr)
        return {"tests": 1, "passed": 0, "failed": 1, "failures": [(done.stdout + done.stderr).strip()[-2000:]]}
    counts = next(ElementTree.parse(report).iter("testsuite")).attrib
    tests, bad = int(counts["tests"]), int(counts["failures"]) + int(counts["errors"])
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    needs_unmet = [line.strip() for line in done.stdout.splitlines() if line.startswith("needs ")]
    return {
        "tests": tests, "passed": tests - bad - int(counts["skipped"]), "failed": bad, "failures": failures,
        "needs_unmet": needs_unmet,
    }  # fmt: skip


def main() -> int:
    """Runs the environments asked for, writes the results and the page."""
    wanted = sys.argv[1:] or [environment.name for environment in ENVIRONMENTS]
    unknown = set(wanted) - {environment.name for environment in ENVIRONMENTS}
    if unknown:
        print(f"no such environment: {sorted(unknown)}; there are {[e.name for e in ENVIRONMENTS]}", file=sys.stderr)
        return 2
    path = RESULTS / "matrix.json"
    before = json.loads(path.read_text())["results"]["environments"] if path.exists() else []
    rows = {row["name"]: row for row in before}
    BUILD.mkdir(parents=True, exist_ok=True)
    for environment in ENVIRONMENTS:
        if environment.name in wanted:
            rows[environment.name] = run(environment)
            results = {"environments": [rows[e.name] for e in ENVIRONMENTS if e.name in rows]}
            write("matrix", "benchmarks.matrix", results)
    page = PAGE.read_text()
    start, end = page.index(START) + len(START), page.index(END)
    PAGE.write_text(f"{page[:start]}{table(results)}\n\n{page[end:]}")
    print(table(results))
    return int(failed(results))


if __name__ == "__main__":
    sys.exit(main())
