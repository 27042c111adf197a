"""The right to vote: who has it, who waits, whose time is over."""

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
)

from zeolith.storage.turn import Turn

A, B, C, STRANGER = "a first", "a second", "a third", "a stranger"


def test_the_first_gets_its_turn_at_once():
    turn = Turn[str]()
    assert turn.request(A)
    assert turn.holder == A
    assert turn.waiting == ()


def test_first_come_first_served():
    turn = Turn[str]()
    assert [turn.request(each) for each in (A, B, C)] == [True, False, False]
    assert turn.waiting == (B, C)
    assert turn.leave(A) == B
    assert turn.leave(B) == C
    assert turn.leave(C) is None
    assert turn.holder is None


def test_who_leaves_the_line_changes_nothing_for_the_others():
    turn = Turn[str]()
    for each in (A, B, C):
        turn.request(each)
    assert turn.leave(B) is None
    assert turn.holder == A
    assert turn.leave(A) == C


def test_leaving_twice_or_without_having_come_changes_nothing():
    turn = Turn[str]()
    assert turn.leave(STRANGER) is None
    for each in (A, B, C):
        turn.request(each)
    turn.leave(A)
    assert turn.leave(A) is None
    assert turn.leave(STRANGER) is None
    assert (turn.holder, turn.waiting) == (B, (C,))


def test_holders_are_told_apart_by_identity():
    one, twin = [1], [1]
    turn = Turn[list[int]]()
    turn.request(one)
    turn.request(twin)
    assert turn.leave(twin) is None
    assert turn.holder is one
    assert turn.waiting == ()


def test_time_runs_only_when_the_server_waits_for_the_holder():
    turn = Turn[str]()
    turn.request(A)
    assert turn.expired(1e9, 30) is None
    turn.started_at = 100
    assert turn.expired(129.9, 30) is None
    assert turn.expired(130, 30) == A


def test_all_the_time_that_a_holder_takes_counts():
    turn = Turn[str]()
    turn.request(A)
    turn.request(B)
    turn.started_at = 100
    turn.stop_clock(120)
    turn.stop_clock(500)
    assert turn.expired(1000, 30) is None, "the server works for it"
    turn.started_at = 1000
    assert turn.expired(1009, 30) is None
    assert turn.expired(1010, 30) == A
    turn.leave(A)
    turn.started_at = 2000
    assert turn.expired(2029, 30) is None, "the next one has time of its own"


def test_the_next_holder_gets_time_of_its_own():
    turn = Turn[str]()
    turn.request(A)
    turn.request(B)
    turn.started_at = 100
    assert turn.leave(A) == B
    assert turn.started_at is None
    assert turn.expired(1000, 30) is None


def test_who_leaves_the_line_does_not_stop_the_holders_clock():
    turn = Turn[str]()
    turn.request(A)
    turn.request(B)
    turn.started_at = 100
    turn.leave(B)
    assert turn.expired(130, 30) == A


def test_nobody_expires_when_nobody_holds_the_turn():
    turn = Turn[str]()
    turn.request(A)
    turn.started_at = 100
    turn.leave(A)
    assert turn.expired(1000, 30) is None


class Line(RuleBasedStateMachine):
    """Against a list: its first is the holder, the others wait."""

    comers: Any = Bundle("comers")

    def __init__(self) -> None:
        super().__init__()
        self.turn = Turn[object]()
        self.line: list[object] = []
        self.now = 0.0

    @rule(target=comers)
    def come(self) -> object:
        comer = object()
        assert self.turn.request(comer) is (not self.line)
        self.line.append(comer)
        return comer

    @rule(comer=consumes(comers))
    def leave(self, comer: object) -> None:
        was_holder = self.line[0] is comer
        self.line.remove(comer)
        now_on = self.turn.leave(comer)
        assert now_on is (self.line[0] if was_holder and self.line else None)

    @precondition(lambda self: self.line)
    @rule()
    def start_the_clock(self) -> None:
        self.turn.started_at = self.now

    @rule(seconds=st.floats(0, 20), timeout_s=st.floats(1, 30))
    def let_time_pass(self, seconds: float, timeout_s: float) -> None:
        self.now += seconds
        expired = self.turn.expired(self.now, timeout_s)
        assert expired is None or expired is self.line[0]

    @invariant()
    def at_most_one_holds_and_the_others_wait_in_their_order(self) -> None:
        holder = [] if self.turn.holder is None else [self.turn.holder]
        assert [*holder, *self.turn.waiting] == self.line

    @invariant()
    def the_line_never_waits_for_nobody(self) -> None:
        assert self.turn.holder is not None or not self.turn.waiting


TestLine = Line.TestCase


@pytest.mark.parametrize("timeout_s", [0.5, 30])
def test_a_holder_that_never_ends_does_so_at_its_timeout(timeout_s):
    turn = Turn[str]()
    turn.request(A)
    turn.started_at = 0
    assert turn.expired(timeout_s - 0.25, timeout_s) is None
    assert turn.expired(timeout_s, timeout_s) == A
