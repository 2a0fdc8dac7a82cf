"""The workflows run what the Makefile has, on what pyproject.toml promises, and only a release may publish."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
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
    named = {word for line in wanted for word in line.split() if "=" not in word}
    assert named <= targets
    assert {"test", "lint", "types", "docs", "fuzz", "soak", "lowest", "release-check"} == named


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


def test_the_lowest_versions_are_the_lower_bounds():
    lines = (ROOT / "tests/lowest.txt").read_text().splitlines()
    pinned = {Requirement(line).name: Requirement(line) for line in lines if not line.startswith("#")}
    wanted = {Requirement(line).name: Requirement(line) for line in PROJECT["dependencies"]}
    assert set(pinned) == set(wanted)
    for name, need in wanted.items():
        (low,), (pin,) = need.specifier, pinned[name].specifier
        assert (low.operator, pin.operator) == (">=", "==")
        assert Version(low.version) == Version(pin.version), name


@pytest.mark.parametrize("name", re.search(r"^LOWEST := (.*?)\n\n", MAKEFILE, re.MULTILINE | re.DOTALL)[1].split())
def test_the_lowest_job_needs_no_extra(name):
    if name != "\\":
        text = (ROOT / f"tests/test_{name}.py").read_text()
        helpers = [
            ROOT / f"tests/helpers/{helper}.py" for helper in re.findall(r"^from tests\.helpers\.(\w+)", text, re.M)
        ]
        for source in (text, *(helper.read_text() for helper in helpers)):
            assert not re.search(r"^(from|import) (transformers|timm|lightning|matplotlib|tests\.zoo)", source, re.M)
