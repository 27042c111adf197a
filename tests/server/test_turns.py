"""Whose turn it is: accounts, rests and lines, on a clock that the test sets."""

import asyncio

import pytest

from zeolith.server import turns
from zeolith.server.turns import (
    RESTING,
    SHARE,
    SOCKET_S,
    Account,
    Line,
    Rest,
    Turns,
)

from ..support.waiting import wait_on_loop

BURST_S = 1.0


class Clock:
    """It stands still unless somebody lets time pass."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(turns, "clock", clock)
    monkeypatch.setattr(turns, "computed", clock)
    return clock


class Somebody:
    """Has some turns to take, each of which takes its time."""

    def __init__(self, clock: Clock, line: Line, turns_left: int, took_s: float = 0.0):
        self._clock = clock
        self._line = line
        self.turns_left = turns_left
        self._took_s = took_s

    def take_turn(self) -> None:
        self._clock.now_s += self._took_s
        self.turns_left -= 1
        if self.turns_left:
            self._line.wait(self)


async def steps(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_an_account_is_over_when_more_was_taken_than_at_once_and_not_for_ever():
    account = Account(BURST_S)
    account.charge(BURST_S, 0.0)
    assert not account.is_over(0.0)
    account.charge(SHARE, 0.0)
    assert account.is_over(0.0)
    assert account.is_over(0.9)
    assert not account.is_over(1.1)
    assert not account.is_empty(1.1)
    assert account.is_empty(BURST_S / SHARE + 2.0)


def test_who_takes_his_share_and_no_more_never_waits():
    account = Account(BURST_S)
    for second in range(1000):
        account.charge(SHARE, float(second))
        assert not account.is_over(float(second))


async def test_in_each_step_of_the_loop_one_has_a_turn(clock):
    line = Line()
    crowd = [Somebody(clock, line, 2) for _ in range(10)]
    for each in crowd:
        line.wait(each)
    for taken in range(1, 21):
        await steps(1)
        assert sum(2 - each.turns_left for each in crowd) == taken
        # Nobody has two before everybody has one.
        assert max(2 - each.turns_left for each in crowd) == (taken + 9) // 10


@pytest.mark.parametrize("is_busy", [True, False])
async def test_guests_rest_while_others_are_at_work(clock, is_busy):
    done = 0
    rest = Rest(lambda: done)
    line = Line(rest)
    guest = Somebody(clock, line, 5, took_s=1.0)
    line.wait(guest)
    done += is_busy
    await steps(10)
    assert guest.turns_left == (4 if is_busy else 0)
    assert rest.left_s == (RESTING * 1.0 if is_busy else 0.0)


async def test_what_is_done_for_guests_themselves_is_no_reason_to_rest(clock):
    done = 0
    rest = Rest(lambda: done)
    for _ in range(10):
        rest.look()
        done += 5
        rest.take(1.0)
    assert rest.left_s == 0.0


async def test_guests_go_on_when_they_have_rested(clock):
    done = 0
    rest = Rest(lambda: done)
    line = Line(rest)
    guest = Somebody(clock, line, 3, took_s=turns.REST_MIN_S)
    done += 1
    line.wait(guest)
    await steps(5)
    assert guest.turns_left == 2
    clock.now_s += 10.0
    await wait_on_loop(lambda: guest.turns_left == 0, "the rest to be over")


async def test_strangers_of_one_host_have_one_account_as_long_as_there_is_something(
    clock,
):
    lines = Turns(lambda: 0, BURST_S)
    account = lines.account_of("192.0.2.7")
    assert lines.account_of("192.0.2.7") is account
    assert lines.account_of("192.0.2.8") is not account
    account.charge(1.0, clock.now_s)
    lines.tick()
    assert lines.account_of("192.0.2.7") is account
    clock.now_s += 1000.0
    lines.tick()
    assert lines.account_of("192.0.2.7") is not account


@pytest.mark.parametrize("is_busy", [True, False])
async def test_sockets_that_come_and_go_count_and_guests_rest_for_them(clock, is_busy):
    done = 0
    lines = Turns(lambda: done, BURST_S)
    done += is_busy
    lines.rest.look()
    at_once = round(BURST_S / SOCKET_S)
    for _ in range(at_once + 1):
        account = lines.arrive("192.0.2.7")
    assert account.is_over(clock.now_s)
    assert lines.rest.left_s == 0.0
    for _ in range(100):
        lines.arrive("192.0.2.7")
    rest_s = 100 * RESTING * SOCKET_S if is_busy else 0.0
    assert lines.rest.left_s == pytest.approx(rest_s)
    # Somebody else has not taken anything.
    assert not lines.arrive("192.0.2.8").is_over(clock.now_s)
