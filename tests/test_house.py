"""The house: how its rooms lean on each other, how large its files are, how far a call walks."""

from pathlib import Path

import pytest

import attncongruence
from benchmarks import record, walk

PACKAGE = Path(attncongruence.__file__).parent
# Each room may import those before it. The root of the package and `streaming` are one room, the paper's.
ROOMS = ("core", "capture", "training", "integrations", "doctor")


def room(module):
    first = module.split(".")[1] if "." in module else "everything"
    return first if first in (*ROOMS, "viz", "everything", "__main__") else "core"


def test_imports_lead_in_no_circle():
    graph = walk.imports_of(PACKAGE)
    assert len(graph) > 30
    assert "attncongruence.maps" in graph["attncongruence.losses"]
    assert walk.circles(graph) == []


def test_rooms_import_one_way():
    for module, imports in walk.imports_of(PACKAGE).items():
        own = room(module)
        if own in ("everything", "__main__"):
            continue
        allowed = {"core", "viz"} if own == "viz" else set(ROOMS[: ROOMS.index(own) + 1])
        for other in imports - {"attncongruence"}:
            assert room(other) in allowed, f"{module} imports {other}"


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"e"}}
    assert walk.circles(graph) == [["a", "b", "c"], ["e"]]


def test_no_file_is_longer_than_one_sitting():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) < 350, path


def test_a_dense_call_walks_through_few_functions():
    counts = walk.walks()
    assert counts["dense"]["functions"] <= 20, counts["dense"]
    assert counts["dense"]["files"] <= 6, counts["dense"]
    # The script sees what runs, and nothing else.
    assert {"cacr_loss", "cacr"} <= set(counts["dense"]["by file"]["losses.py"])
    assert counts["dense"]["by file"]["divergence.py"] == ["m_kl"]
    assert "streaming/low_rank.py" not in counts["dense"]["by file"]
    assert counts["streaming"]["functions"] > counts["dense"]["functions"]


@pytest.mark.parametrize("case", ["dense", "streaming", "capture", "regularized"])
def test_the_result_file_says_what_is(case):
    written = record.committed("walk")["after"]["walks"][case]
    counted = walk.walks()[case]
    assert {name: written[name] for name in ("functions", "files")} == {
        name: counted[name] for name in ("functions", "files")
    }
