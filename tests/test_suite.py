"""The tests' own order: no test file imports another, what they share is a helper's, and markers are declared."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from itertools import combinations, product
from pathlib import Path

import pytest

from tests.helpers.problems import pairwise
from tests.helpers.versions import MATRIX, has
from tests.zoo import CASES, NEEDS, REFERENCE_NEEDS

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


NEEDY = """
import pytest

@pytest.mark.needs("pytest>=1.0")
def test_met(): pass

@pytest.mark.needs("pytest>=1.0", "pytest>=999", reason="it was slow")
def test_version(): pass

@pytest.mark.needs("no-such-package")
def test_package(): pass
"""


@pytest.mark.parametrize(("matrix", "processes"), [(False, 0), (True, 0), (True, 1)])
def test_an_unmet_need_is_an_error_and_in_a_matrix_left_out_aloud(matrix, processes, tmp_path):
    (tmp_path / "test_needy.py").write_text(NEEDY)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = needs\n")
    environment = {
        name: value for name, value in os.environ.items() if name != MATRIX and not name.startswith("PYTEST")
    }
    environment |= {"PYTHONPATH": str(ROOT)} | ({MATRIX: "1"} if matrix else {})
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.helpers.versions",
        "-p",
        "no:cacheprovider",
        "-n",
        str(processes),
    ]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = re.sub(r"\s+", " ", run.stdout)
    if matrix:
        assert run.returncode == 0, said
        assert "1 passed" in said
        assert "needs no-such-package: 1 test_needy.py::test_package" in said
        assert "needs pytest>=999 (it was slow): 1 test_needy.py::test_version" in said
    else:
        assert run.returncode == 1, said
        assert "1 passed, 2 errors" in said
        assert "this environment lacks no-such-package" in said
        assert "this environment lacks pytest>=999 (it was slow)" in said


def test_no_case_of_the_zoo_is_left_out_here():
    """With the versions that the project is developed on; and whatever is said to have needs exists."""
    for table in (NEEDS, REFERENCE_NEEDS):
        assert [need for need, _ in table if not has(need)] == []
        assert {name for names in table.values() for name in names} <= set(CASES)


def test_pairwise_meets_every_pair():
    choices = ["abc", range(3), (True, False), [None, 1.0, 2.0, 3.0]]
    taken = pairwise(*choices)
    for one, other in combinations(range(len(choices)), 2):
        assert {(row[one], row[other]) for row in taken} == set(product(choices[one], choices[other]))
    assert len(taken) < 20  # of 72
