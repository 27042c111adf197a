"""README.md describes the wire: what it says is what the tables say."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from zeolith.protocol import methods
from zeolith.protocol.codec import encode
from zeolith.protocol.connection import SENDING, Role, State
from zeolith.protocol.errors import CROSSING_NAMES, HelloRefused
from zeolith.protocol.limits import DEFAULT, Limits
from zeolith.protocol.messages import KINDS, Heartbeat, Reply, Request
from zeolith.protocol.methods import (
    HELLO,
    METHODS,
    OPERATION_ROLES,
    OPERATIONS,
    VERSION,
    WELCOME,
    Kind,
    Method,
)
from zeolith.protocol.roles import AccessRole

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
    _name, args, role, answers, session = row_of(method.name, 5)
    assert args == (arguments(method) or "none")
    assert role == (method.role or "none")
    assert answers == ("answers" if method.answers else "no answer")
    assert session == ("session" if method.needs_session else "no session")


def test_there_is_no_row_of_a_method_that_does_not_exist():
    roles = {"none", *AccessRole}
    described = {
        row[0].strip("`") for row in rows() if len(row) == 5 and row[2] in roles
    }
    assert described == set(METHODS)


def section(heading: str) -> list[list[str]]:
    """The rows of the tables below a heading of the second level, without heads."""
    (text,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", README, re.M | re.S)
    cells = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    return [[row[0].strip("`"), *row[1:]] for row in cells]


def test_every_field_of_hello_and_welcome_has_its_row():
    wanted = [(name, kind.name) for name, kind in (*HELLO.items(), *WELCOME.items())]
    described = [(row[0], row[1]) for row in section("Hello and welcome")]
    assert described[: len(wanted)] == wanted
    refusals = [reason for reason, _meaning in described[len(wanted) :]]
    assert refusals == list(HelloRefused.REFUSALS)


def test_every_operation_has_its_row():
    described = {row[0]: row[1:3] for row in section("Transactions")}
    assert described == {
        name: [
            ", ".join(kind.name for kind in kinds),
            OPERATION_ROLES.get(name, AccessRole.WRITE),
        ]
        for name, kinds in OPERATIONS.items()
    }


def test_every_failure_that_has_a_meaning_has_its_row():
    assert {row[0] for row in section("Failures")} == set(CROSSING_NAMES)


def test_every_limit_has_its_row_and_its_value():
    described = {row[0]: float(row[1]) for row in section("Limits")}
    assert described == {
        limit.name: getattr(DEFAULT, limit.name) for limit in fields(Limits)
    }


def test_every_method_that_answers_has_its_result():
    described = {
        name for row in section("Results") for name in re.findall(r"\w+", row[0])
    }
    assert described == {name for name, method in METHODS.items() if method.answers}


def test_every_kind_of_message_has_its_code():
    described = [(row[0], row[1]) for row in rows() if row[0].isdecimal()]
    assert described == [(str(code), kind.__name__) for code, kind in enumerate(KINDS)]


def test_every_state_has_its_row():
    described = {row[0]: row[1:] for row in rows() if len(row) == 3}
    for state in State:
        for said, role in zip(described[state.value], Role, strict=True):
            assert set(re.findall(r"\w+", said)) == {
                kind.__name__ for kind in SENDING[role].get(state, {})
            }, state


def test_every_kind_of_value_is_explained():
    described = {row[0] for row in rows() if len(row) == 2}
    kinds = {each.name for each in vars(methods).values() if type(each) is Kind}
    named = {kind.removeprefix("list of ").removesuffix(" or nil") for kind in kinds}
    assert named <= described


def test_the_version_is_this_one():
    assert f"talk: version {VERSION}." in README


def test_the_examples_are_what_is_sent():
    for message in (Heartbeat(), Request(1, "ping", []), Reply(1, None)):
        assert f"`{encode(message).hex(' ')}`" in README
