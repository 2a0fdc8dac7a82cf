"""The doctor's command: exit status, JSON, bad command lines, and the page that shows what it prints."""

import json
import re
import sys
from pathlib import Path

import pytest

from attncongruence.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers on its own tiny random models
PAGE = Path(__file__).parent.parent / "docs" / "doctor.md"

FACTORIES = """
from tests.helpers.models import X, ByHandAttention, Plain

good = lambda: (Plain(), X, 3)
frozen = lambda: (Plain().requires_grad_(False), X, 3)
unseen = lambda: (ByHandAttention(), X, 3)
lone = lambda: (Plain(), X[0])
model_alone = lambda: Plain()
number = 3

def broken():
    raise KeyError("weights")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "factories.py").write_text(FACTORIES)
    (tmp_path / "unimportable.py").write_text("import no_such_module_anywhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("factories", None)


def test_exit_codes(folder, capsys):
    assert main(["doctor", "factories:good", "--rounds", "1"]) == 0
    # One tensor holds words and pictures, so that nothing tells them apart.
    assert capsys.readouterr().out.endswith("No problem found, but where text and image are is not confirmed.\n")
    assert main(["doctor", "factories:frozen"]) == 1
    assert "second.self_attn.out_proj.bias are frozen" in re.sub(r"\s+", " ", out := capsys.readouterr().out)
    assert out.endswith("Problems: 1.\n")
    assert main(["doctor", "factories:unseen"]) == 1
    assert "no attention was seen" in capsys.readouterr().out


def test_json(folder, capsys):
    assert main(["doctor", "factories:good", "--json", "--rounds", "1", "--layers", "-2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["layer"], report["placed"]["text"]) == (True, "first.self_attn", [3, 3])
    assert main(["doctor", "factories:frozen", "--json"]) == 1
    assert "frozen" in json.loads(capsys.readouterr().out)["problems"][0]["came"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["factories"], "write module:function"),
        (["no_such_module:make"], "no_such_module:make raised ModuleNotFoundError"),
        (["unimportable:make"], "no_such_module_anywhere"),
        (["factories:nothing"], "AttributeError: module 'factories' has no attribute 'nothing'"),
        (["factories:number"], "must name a function that returns (model, batch)"),
        (["factories:broken"], "factories:broken raised KeyError: 'weights'"),
        (["factories:model_alone"], "returned a Plain, and must return (model, batch)"),
        (["factories:lone"], "batch is of type Tensor: it must be a mapping"),
        (["factories:good", "--layers", "third"], "no module is called 'third'"),
        (["factories:good", "--layers", "7"], "layers=7, and the forward pass ran 2"),
        (["factories:good", "--direction", "up"], "invalid choice"),
        (["factories:good", "--rounds", "0"], "rounds=0 must be >= 1"),
        ([], "required: module:function"),
    ],
)
def test_bad_command_lines(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        main(["doctor", *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_the_page_shows_what_is_printed(tmp_path, monkeypatch, capsys):
    page = PAGE.read_text()
    factory, output = re.search(r"```python\n(.*?)```.*?```text\n(.*?)```", page, re.DOTALL).groups()
    (tmp_path / "factory.py").write_text(factory)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["doctor", "factory:make"]) == 0
    masked = lambda text: re.sub(r"takes .* rounds\)", "takes ... rounds)", text)
    assert masked(capsys.readouterr().out) == masked(output)
