"""The workflows run what the Makefile has, on what pyproject.toml promises, and only a release may publish."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from benchmarks import matrix
from benchmarks.matrix import ENVIRONMENTS
from benchmarks.record import committed

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MAKEFILE = (ROOT / "Makefile").read_text()
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").iterdir()}
CI, RELEASE = WORKFLOWS["ci"], WORKFLOWS["release"]
STEPS = [step for workflow in WORKFLOWS.values() for job in workflow["jobs"].values() for step in job["steps"]]


def test_the_matrix_is_what_the_classifiers_say():
    promised = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", name) for name in PROJECT["classifiers"]]
    versions = [match[1] for match in promised if match]
    assert CI["jobs"]["test"]["strategy"]["matrix"]["python"] == versions
    assert PROJECT["requires-python"] == f">={versions[0]}"


def test_every_command_is_a_target():
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    wanted = [word for step in STEPS for word in re.findall(r"^make (.*)$", step.get("run", ""), re.MULTILINE)]
    named = {word for line in wanted for word in shlex.split(line) if "=" not in word}
    assert named <= targets
    assert {
        *("test", "test-docs", "lint", "types", "docs", "fuzz", "soak", "matrix", "drift", "release-check"),
    } == named


def test_actions_are_pinned_to_a_major_version():
    used = [step["uses"] for step in STEPS if "uses" in step]
    assert len(used) > 5
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", name) for name in used), used


def test_only_the_publishing_job_may_publish():
    assert RELEASE[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads the word `on` as true
    for file, workflow in WORKFLOWS.items():
        assert file == workflow["name"]
        assert workflow["permissions"] == {"contents": "read"}
        for name, job in workflow["jobs"].items():
            assert job.get("permissions", {}) == ({"id-token": "write"} if name == "publish" else {})
    publish = RELEASE["jobs"]["publish"]
    assert (publish["environment"], publish["needs"]) == ("pypi", "build")
    assert "pypa/gh-action-pypi-publish@release/v1" in [step["uses"] for step in publish["steps"]]
    # Nothing is installed or run beside what was built and checked before.
    assert not any("run" in step for step in publish["steps"])


def pins(environment):
    """The exact versions of an environment of the matrix, by name."""
    needs = [Requirement(package) for package in environment.packages]
    return {need.name: need.specifier for need in needs if str(need.specifier).startswith("==")}


@pytest.mark.parametrize(
    ("name", "extras"), [("lowest, alone", ()), ("lowest extras", ("hf", "timm", "lightning", "viz"))]
)
def test_the_matrix_has_the_lower_bounds(name, extras):
    (environment,) = [environment for environment in ENVIRONMENTS if environment.name == name]
    lines = [line for extra in extras for line in EXTRAS[extra]] if extras else PROJECT["dependencies"]
    bounds = {need.name: need.specifier for need in map(Requirement, lines) if need.specifier}
    assert len(bounds) >= 4
    for package, bound in bounds.items():
        (low,), (pin,) = bound, pins(environment)[package]
        assert (low.operator, pin.operator) == (">=", "==")
        assert Version(low.version) == Version(pin.version), package


def test_the_workflow_runs_the_matrix():
    asked = CI["jobs"]["lowest"]["strategy"]["matrix"]["environment"]
    assert asked == [environment.name for environment in ENVIRONMENTS if not environment.name.startswith("newest")]


def test_the_committed_matrix_is_whole_and_green():
    results = committed("matrix")
    assert [row["name"] for row in results["environments"]] == [environment.name for environment in ENVIRONMENTS]
    assert not matrix.failed(results)
    for row in results["environments"]:
        assert "not_run" in row or all(area["passed"] > 0 for area in row["areas"].values()), row["name"]


def test_the_lock_pins_all_that_is_asked_for_and_names_no_address():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    locked = {}
    for line in lines:
        need = Requirement(line)
        assert (need.url, need.extras) == (None, set()), line
        ((operator, version),) = [(pin.operator, pin.version) for pin in need.specifier]
        assert operator == "==", line
        locked.setdefault(canonicalize_name(need.name), []).append(version)
    for line in [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]:
        need = Requirement(line)
        versions = locked[canonicalize_name(need.name)]
        assert all(need.specifier.contains(version) for version in versions), line


def test_the_matrix_runs_test_files_that_there_are():
    names = " ".join(matrix.AREAS.values()).split()
    assert len(set(names)) == len(names) > 20
    assert {name for name in names if not (ROOT / "tests" / f"test_{name}.py").exists()} == set()
