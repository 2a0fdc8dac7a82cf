"""No private part of another library stands anywhere in the source but in the `_compat` modules."""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import attncongruence

SOURCE = Path(attncongruence.__file__).parent
PRIVATE = re.compile(r"_(?!_)\w+")
PUBLIC = {"_replace", "_fields", "_asdict"}
"""Documented parts of named tuples."""


def sources():
    """All modules but those two."""
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        if name not in ("_compat.py", "_compat_distributed.py", "_compat_stack.py"):
            yield name, ast.parse(path.read_text())


def names_of_ours(tree):
    """What a module defines under a leading underscore: functions, classes, attributes of `self`, parameters, names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def foreign(tree, ours):
    """`line: name` of everything private that is not ours: imports, attributes, and names given as strings."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        found = []
        if isinstance(node, ast.Import):
            found = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("attncongruence"):
            found = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            found = [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found = node.value.split(".") if re.fullmatch(r"[\w.]+", node.value) else []
        for name in found:
            if PRIVATE.fullmatch(name) and name not in ours | PUBLIC and "attncongruence" not in name:
                yield f"{node.lineno}: {name}"


def test_private_parts_of_others_stand_in_compat_alone():
    trees = dict(sources())
    ours = {name for tree in trees.values() for name in names_of_ours(tree) if PRIVATE.fullmatch(name)}
    assert len(trees) > 40
    assert "_records" in ours
    # A name of ours that torch has as well would hide the use of torch's.
    theirs = {*dir(nn.Module()), *dir(Tensor), *dir(torch), *dir(torch.overrides)}
    assert {name for name in ours & theirs if PRIVATE.fullmatch(name)} <= {"_check", "_indices", "_values"}
    assert {name: list(foreign(tree, ours)) for name, tree in trees.items() if list(foreign(tree, ours))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo",
        "from torch._C import x",
        "from torch.overrides import _push_mode",
        "torch._C.f()",
        "model._forward_hooks",
        "getattr(module, '_is_replica', False)",
        "config.__dict__['_attn_implementation']",
        "hasattr(x, '_orig_mod')",
        "find('torch._dynamo.reset')",
    ],
)
def test_the_check_finds(line):
    assert len(list(foreign(ast.parse(line), set()))) == 1


@pytest.mark.parametrize(
    "line", ["'''torch._C'''", "x.__dict__", "from attncongruence._typing import y", "t._replace()"]
)
def test_the_check_leaves(line):
    assert list(foreign(ast.parse(line), set())) == []
