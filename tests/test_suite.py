"""The tests' own order: no test file imports another, what they share is a helper's, and markers are declared."""

import ast
import re
import tomllib
from itertools import combinations, product
from pathlib import Path

import pytest

from tests.helpers.problems import pairwise

pytestmark = pytest.mark.docs
ROOT = Path(__file__).parent.parent
TESTS = sorted((ROOT / "tests").rglob("*.py"))
DECLARED = {
    line.split(":")[0]
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
}
BUILT_IN = {"parametrize", "filterwarnings", "usefixtures", "skipif"}


def named(path):
    return str(path.relative_to(ROOT))


def test_no_test_file_is_imported():
    for path in TESTS:
        text, modules = path.read_text(), set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{named(path)}:{node.lineno} is relative"
                modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        # And in code that another process runs, which is text here.
        modules |= set(re.findall(r"^(?:from|import) (\S+)", text, re.MULTILINE))
        assert not {module for module in modules if module.startswith("tests.test_")}, named(path)


def test_markers_are_declared():
    assert {"slow", "docs", "needs"} == DECLARED
    for path in TESTS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pytest.mark":
                assert node.attr in BUILT_IN | DECLARED, f"{named(path)}:{node.lineno}"


def test_pairwise_meets_every_pair():
    choices = ["abc", range(3), (True, False), [None, 1.0, 2.0, 3.0]]
    taken = pairwise(*choices)
    for one, other in combinations(range(len(choices)), 2):
        assert {(row[one], row[other]) for row in taken} == set(product(choices[one], choices[other]))
    assert len(taken) < 20  # of 72
