"""README.md describes the wire: what it says is what the tables say."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from zeolith.protocol import methods
from zeolith.protocol.errors import CROSSING_NAMES, HelloRefused
from zeolith.protocol.limits import DEFAULT, Limits
from zeolith.protocol.messages import KINDS
from zeolith.protocol.methods import (
    HELLO,
    METHODS,
    OPERATIONS,
    VERSION,
    WELCOME,
    Effect,
    Method,
)

README = (Path(__file__).parents[2] / "protocol" / "README.md").read_text()


def rows() -> list[list[str]]:
    """The rows of all tables, cell by cell."""
    return [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in README.splitlines()
        if line.lstrip().startswith("|")
    ]


def row_of(name: str, cells: int) -> list[str]:
    found = [row for row in rows() if row[0] == f"`{name}`" and len(row) == cells]
    assert len(found) == 1, f"{len(found)} rows of {cells} cells for {name}"
    return found[0]


def arguments(method: Method) -> str:
    return ", ".join(f"`{name}` {kind.name}" for name, kind in method.arguments)


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_every_method_has_its_row(method):
    _name, args, effect, answers, session = row_of(method.name, 5)
    assert args == (arguments(method) or "none")
    assert effect == method.effect.value
    assert answers == ("answers" if method.answers else "no answer")
    assert session == ("session" if method.needs_session else "no session")


def test_there_is_no_row_of_a_method_that_does_not_exist():
    effects = {effect.value for effect in Effect}
    described = {
        row[0].strip("`") for row in rows() if len(row) == 5 and row[2] in effects
    }
    assert described == set(METHODS)
