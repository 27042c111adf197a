"""Which of two twins is used: the compiled one, if it is there and not switched off."""

import sys
from types import ModuleType

import pytest

from zeolith.protocol.compiled import SWITCH, compiled_module

NAME = "zeolith.protocol._a_twin"


@pytest.fixture
def module(monkeypatch) -> ModuleType:
    module = ModuleType(NAME)
    monkeypatch.setitem(sys.modules, NAME, module)
    return module


def test_what_was_built_is_used(monkeypatch, module):
    monkeypatch.delenv(SWITCH, raising=False)
    assert compiled_module(NAME) is module


@pytest.mark.parametrize(("value", "is_used"), [("0", False), ("1", True), ("", True)])
def test_the_environment_switches_it_off(monkeypatch, module, value, is_used):
    monkeypatch.setenv(SWITCH, value)
    assert compiled_module(NAME) is (module if is_used else None)


def test_what_was_not_built_is_none(monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    assert compiled_module(NAME) is None
