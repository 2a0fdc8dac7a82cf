"""Every example in a docstring runs and prints what it says; every public name is documented."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import attncongruence

MODULES = ["attncongruence"] + [
    module.name for module in pkgutil.walk_packages(attncongruence.__path__, "attncongruence.")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    names = {"torch": torch, **{public: getattr(attncongruence, public) for public in attncongruence.__all__}}
    result = doctest.testmod(module, extraglobs=names)
    assert result.failed == 0


def test_the_main_functions_have_an_example():
    for name in ("split_attention", "symmetric_kl", "cacr_loss", "iais_loss", "exponential_warmup", "Convention"):
        assert ">>>" in inspect.getdoc(getattr(attncongruence, name))


def test_public_names_are_documented():
    for name in attncongruence.__all__:
        value = getattr(attncongruence, name)
        if callable(value):
            assert len(inspect.getdoc(value) or "") > 40, name
