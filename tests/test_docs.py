"""The documents say what is so: their code runs, their numbers are the committed ones, their pointers lead on."""

import ast
import re
from pathlib import Path

import pytest

from benchmarks import conventions

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_runs(page):
    # One page is one session: later blocks see what earlier ones defined.
    names = {"__name__": "__docs__"}
    for code in BLOCK.findall(page.read_text()):
        exec(compile(code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_tables_of_conventions_are_the_committed_ones():
    page = (ROOT / "docs/conventions.md").read_text()
    for table in conventions.tables(conventions.committed()).split("\n\n"):
        assert table in page


def test_the_committed_conventions_are_what_is_measured():
    # Values, not timings: any machine gets these, to rounding.
    for row, committed in zip(conventions.measure(), conventions.committed(), strict=True):
        assert row["loss"] == pytest.approx(committed["loss"], rel=1e-6)
        assert row["gradient"] == pytest.approx(committed["gradient"], rel=1e-6)


def names_in(path):
    """Functions, classes and their methods of a module, as `name` or `Class.name`."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_the_paper_map_leads_somewhere():
    page = (ROOT / "docs/paper-map.md").read_text()
    pointers = re.findall(r"`([\w/]+\.py)(?:::([\w.]+))?`(?:, `(test_\w+)`)?", page)
    assert len(pointers) > 20
    for file, name, also in pointers:
        path = ROOT / ("tests" if file.startswith("test_") else "src/attncongruence") / file
        assert path.exists(), file
        for wanted in filter(None, (name, also)):
            assert wanted in names_in(path), f"{file}::{wanted}"
