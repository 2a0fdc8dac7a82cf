"""The pages are right: their code runs, their numbers are the committed ones, and their links lead somewhere."""

import ast
import re
from pathlib import Path

import pytest
import torch

from benchmarks import capture_cost, conventions, fuzz, matrix, report, soak
from benchmarks.record import committed

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# A heading outside of code: a comment in code begins with # as well.
HEADING_OR_FENCE = re.compile(r"^```.*?^```|^##? ([^\n]+)$", re.MULTILINE | re.DOTALL)


def sections(page):
    """The code of each section, by the section's title."""
    text = page.read_text()
    headings = [match for match in HEADING_OR_FENCE.finditer(text) if match[1]]
    ends = [*(match.start() for match in headings[1:]), len(text)]
    return {match[1]: CODE.findall(text, match.end(), end) for match, end in zip(headings, ends, strict=False)}


# One section is one session: its later blocks see what earlier ones defined.
SECTIONS = {f"{page.name}, {title}": blocks for page in PAGES for title, blocks in sections(page).items() if blocks}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("section", SECTIONS)
def test_code_runs(section):
    torch.manual_seed(0)
    names = {"__name__": "__docs__"}
    for code in SECTIONS[section]:
        exec(compile(code, section, "exec"), names)


def test_no_code_is_left_out():
    fences = sum(line == "```python" for page in PAGES for line in page.read_text().splitlines())
    assert sum(map(len, SECTIONS.values())) == fences > 30


def test_each_kind_of_model_has_code():
    kinds = ["Text-first encoders", "Image-first decoders", "Interleaved sequences", "Dual streams", "Cross-attention"]
    assert {f"capture.md, {kind}" for kind in [*kinds, "timm", "Your own module"]} <= set(SECTIONS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
    ("page", "result", "tables"),
    [
        ("docs/conventions.md", "conventions", conventions.tables),
        ("docs/capture.md", "capture-cost-cpu", capture_cost.table),
        ("docs/reliability.md", "fuzz-cpu", fuzz.table),
        ("docs/reliability.md", "soak-cpu", soak.table),
        ("docs/reliability.md", "matrix", matrix.table),
    ],
)
def test_tables_are_the_committed_ones(page, result, tables):
    text = (ROOT / page).read_text()
    for table in tables(committed(result)).split("\n\n"):
        assert table in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_of_the_speed_suite_are_the_newest(page):
    text = page.read_text()
    assert len(report.MARKED.findall(text)) == text.count("<!-- bench ") == text.count("<!-- /bench -->")
    assert report.fill(text) == text, "python -m benchmarks.report writes them"


def test_the_committed_conventions_are_what_is_measured():
    # Values, not timings: any machine gets these, to rounding.
    for row, before in zip(conventions.measure(), committed("conventions"), strict=True):
        assert row["loss"] == pytest.approx(before["loss"], rel=1e-6)
        assert row["gradient"] == pytest.approx(before["gradient"], rel=1e-6)


def names_in(path):
    """Functions, classes, their methods, and constants of a module, as `name` or `Class.name`."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize(("name", "least"), [("paper-map", 20), ("mathematics", 20), ("code", 40)])
def test_names_of_the_code_are_there(name, least):
    page = (ROOT / f"docs/{name}.md").read_text()
    pointers = re.findall(r"`([\w/]+\.py)(?:::([\w.]+))?`(?:, `(test_\w+)`)?", page)
    assert len(pointers) > least
    missing = []
    for file, attribute, also in pointers:
        path = ROOT / ("tests" if file.startswith("test_") else "src/attncongruence") / file
        there = names_in(path) if path.exists() else set()
        if not path.exists() or not {attribute, also} - {""} <= there:
            missing.append(f"{file}::{attribute or also}")
    assert not missing


def test_the_stack_table_names_locked_versions_and_tests_that_there_are():
    section = (ROOT / "docs/training.md").read_text().split("## What is tested")[1].split("\n## ")[0]
    locked = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 15
    for _, versions, _, tested in rows:
        file, test = re.findall(r"`([\w.]+)`", tested)
        assert test in names_in(ROOT / "tests" / file), test
        for package, version in re.findall(r"([a-z]+) ([\d.]+)", versions):
            assert locked[package] == version
    trainers = " ".join(row[0] for row in rows)
    for name in ("SFTTrainer", "DPOTrainer", "GRPOTrainer", "Accelerate", "DeepSpeed", "Fabric", "PEFT", "FSDP2"):
        assert name in trainers
