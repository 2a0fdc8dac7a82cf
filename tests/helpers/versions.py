"""What a test needs of other packages: `@pytest.mark.needs("torch>=2.11", reason="...")`, all of it decided here.

A test with an unmet need is an error that names it. Under `ATTNCONGRUENCE_MATRIX=1`, which runs the suite on older
versions, it is deselected instead, and the summary says what was left out and why: nothing is skipped in silence.
"""

import importlib.metadata
import os

import pytest
from packaging.requirements import Requirement

MATRIX = "ATTNCONGRUENCE_MATRIX"
_LEFT_OUT = pytest.StashKey[set[tuple[str, str]]]()

FSDP2_ON_CPU = pytest.mark.needs(
    "torch>=2.11",
    reason="FSDP2 on CPU is impossible in 2.6, and in 2.8 trains wrongly by itself; none between was tried",
)


def has(need: str) -> bool:
    """Whether a package is installed in such a version: `has("transformers>=5.0")`."""
    requirement = Requirement(need)
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return requirement.specifier.contains(version, prereleases=True)


def unmet(item: pytest.Item) -> str:
    """The needs of a test that are not met, with their reasons; empty where all are."""
    found = []
    for mark in item.iter_markers("needs"):
        reason = mark.kwargs.get("reason", "")
        found += [need + (f" ({reason})" if reason else "") for need in mark.args if not has(need)]
    return ", ".join(dict.fromkeys(found))


def pytest_configure(config: pytest.Config) -> None:
    """Nothing is left out yet."""
    config.stash[_LEFT_OUT] = set()


@pytest.hookimpl(trylast=True)  # after -m and -k: what nobody asked for is not left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In the matrix, leave out tests with an unmet need."""
    if os.environ.get(MATRIX) != "1":
        return
    left_out = {item: need for item in items if (need := unmet(item))}
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
        config.stash[_LEFT_OUT].update((item.nodeid, need) for item, need in left_out.items())


@pytest.hookimpl(tryfirst=True)  # before its fixtures
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Anywhere else such a test is an error."""
    if need := unmet(item):
        pytest.fail(f"this environment lacks {need}; a matrix of older versions sets {MATRIX}=1", pytrace=False)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of pytest-xdist tells its parent."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = list(session.config.stash[_LEFT_OUT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:
    """The parent keeps what it was told; each process collects all tests."""
    node.config.stash[_LEFT_OUT] |= {tuple(pair) for pair in getattr(node, "workeroutput", {}).get("left_out", [])}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What was left out, by need."""
    left_out = config.stash[_LEFT_OUT]
    if left_out:
        terminalreporter.section("left out: a need is not met")
    for need in sorted({need for _, need in left_out}):
        tests = sorted(test for test, other in left_out if other == need)
        terminalreporter.line(f"needs {need}: {len(tests)}")
        for test in tests:
            terminalreporter.line(f"  {test}")
