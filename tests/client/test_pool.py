"""Channels for threads: as many as are needed, up to a bound, and no more for long."""

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from zeolith.client.errors import ChannelLost, ChannelRefused
from zeolith.client.pool import Pool
from zeolith.protocol.limits import Limits

from ..support.gates import Background
from ..support.waiting import wait_until

THREADS = 12
ROUNDS = 100


class Channel:
    """What a pool sees of one."""

    def __init__(self) -> None:
        self.is_lost = self.is_busy = False
        self.used_at = 0.0

    def close(self) -> None:
        self.is_lost = True


class Dialled:
    """A pool of at most two channels for calls, and what it has opened."""

    def __init__(self) -> None:
        self.channels: list[Channel] = []
        self.before: Callable[[], object] = lambda: None
        limits = Limits(channels_max=2, channel_idle_s=10)
        self.pool = Pool(self.dial, limits)  # type: ignore[arg-type]

    def dial(self) -> Channel:
        self.before()
        self.channels.append(Channel())
        return self.channels[-1]

    def wait_for_waiting(self, count: int) -> None:
        wait_until(lambda: len(self.pool.waiting) == count, f"{count} who wait")

    def full(self) -> list[Any]:
        """All the channels that there may be, taken."""
        return [self.pool.take(), self.pool.take()]


@pytest.fixture
def dialled() -> Dialled:
    return Dialled()


@pytest.fixture
def pool(dialled: Dialled) -> Pool:
    return dialled.pool


def test_a_channel_is_used_again_the_last_one_first(dialled, pool):
    first, second = dialled.full()
    pool.give_back(first)
    pool.give_back(second)
    assert pool.take() is second
    assert pool.take() is first
    assert len(dialled.channels) == 2


@pytest.mark.parametrize("what", ["is_lost", "is_busy"])
def test_what_is_of_no_use_is_dropped(dialled, pool, what):
    channel: Any = pool.take()
    setattr(channel, what, True)
    pool.give_back(channel)
    assert channel.is_lost
    assert pool.take() is not channel
    assert len(pool.channels) == 1


# The bound


def test_one_thread_too_many_waits_for_a_channel(dialled, pool):
    first, _second = dialled.full()
    taking = Background(pool.take)
    assert not taking.returns_soon()
    pool.give_back(first)
    assert taking.result() is first
    assert len(dialled.channels) == 2


def test_who_comes_first_is_served_first(dialled, pool):
    channels = dialled.full()
    taking = []
    for number in range(1, 5):
        taking.append(Background(pool.take))
        dialled.wait_for_waiting(number)
    for each in taking:
        channel = channels.pop(0)
        pool.give_back(channel)
        assert each.result() is channel
        channels.append(channel)


def test_a_call_of_a_session_serves_who_waits(dialled, pool):
    """It gives back without a call of the pool's, see Session.call."""
    first, _second = dialled.full()
    taking = Background(pool.take)
    dialled.wait_for_waiting(1)
    pool.idle.append(first)
    assert pool.waiting
    pool.serve()
    assert taking.result() is first


def test_what_is_given_back_while_one_begins_to_wait_is_not_missed(
    dialled, pool, monkeypatch
):
    """Nobody was waiting yet, and so nobody was served."""
    first, _second = dialled.full()
    wait = pool._wait

    def late() -> Any:
        pool.idle.append(first)
        return wait()

    monkeypatch.setattr(pool, "_wait", late)
    assert pool.take() is first


def test_a_channel_that_is_lost_makes_room_for_another(dialled, pool):
    first, second = dialled.full()
    taking = Background(pool.take)
    dialled.wait_for_waiting(1)
    first.is_lost = True
    pool.give_back(first)
    assert taking.result() not in (first, second)
    assert len(pool.channels) == 2


def test_a_channel_that_cannot_be_opened_makes_room_for_another(dialled, pool):
    def fail() -> None:
        dialled.before = lambda: None
        dialled.wait_for_waiting(1)
        raise ChannelLost("refused")

    pool.take()
    dialled.before = fail
    opening = Background(pool.take)
    wait_until(lambda: pool._opening == 1, "the opening")
    taking = Background(pool.take)
    assert str(opening.error()) == "refused"
    assert taking.result() is dialled.channels[-1]


def test_channels_that_are_being_opened_count(dialled, pool):
    go_on = threading.Event()
    dialled.before = lambda: go_on.wait(30)
    taking = [Background(pool.take) for _ in range(3)]
    dialled.wait_for_waiting(1)
    go_on.set()
    wait_until(lambda: len(pool.channels) == 2, "two channels")
    assert len(pool.waiting) == 1
    pool.give_back(dialled.channels[0])
    assert {each.result() for each in taking} == set(dialled.channels)


def test_what_is_lent_does_not_wait_and_does_not_count(dialled, pool):
    """A commit waits for others at the server, whose threads may have to load."""
    lent = [pool.lend() for _ in range(5)]
    first, second = dialled.full()
    lent.append(pool.lend())
    assert len(pool.channels) == 8
    for each in lent:
        pool.give_back(each)
    assert len({pool.take(), pool.take(), first, second}) == 4


def test_what_was_lent_counts_again_when_it_is_given_back(dialled, pool):
    for channel in (pool.lend(), pool.lend()):
        pool.give_back(channel)
    first, _second = dialled.full()
    taking = Background(pool.take)
    assert not taking.returns_soon()
    pool.give_back(first)
    assert taking.result() is first


def test_lending_what_was_idle_makes_room(dialled, pool):
    """Of two channels one is used and one is on its way to a commit."""
    first, _second = dialled.full()
    pool.give_back(first)
    lent = pool.idle.pop()
    taking = Background(pool.take)
    dialled.wait_for_waiting(1)
    pool.idle.append(lent)
    assert pool.lend() is lent
    assert taking.result() is dialled.channels[2]


def test_many_threads_share_few_channels(dialled, pool):
    in_use: set[Any] = set()

    def work() -> int:
        for _ in range(ROUNDS):
            channel = pool.take()
            assert channel not in in_use
            in_use.add(channel)
            assert len(in_use) <= 2
            in_use.remove(channel)
            pool.give_back(channel)
        return ROUNDS

    before_s = sys.getswitchinterval()
    # In the middle of everything.
    sys.setswitchinterval(1e-6)
    try:
        working = [Background(work) for _ in range(THREADS)]
        assert [each.result() for each in working] == [ROUNDS] * THREADS
    finally:
        sys.setswitchinterval(before_s)
    assert set(pool.idle) == pool.channels == set(dialled.channels)
    assert not pool.waiting


# A server that refuses


class Refusing(Dialled):
    """A pool whose server lets it have only so many channels."""

    def __init__(self, allowed: int, **limits: Any):
        super().__init__()
        self.allowed = allowed
        self.dials = 0
        limits = {"channels_max": 100, "heartbeat_interval_s": 5, **limits}
        self.pool = Pool(self.dial, Limits(**limits))  # type: ignore[arg-type]

    def dial(self) -> Channel:
        self.dials += 1
        if self.open >= self.allowed:
            raise ChannelRefused(f"more than {self.allowed} channels")
        return super().dial()

    @property
    def open(self) -> int:
        return sum(not each.is_lost for each in self.channels)


WAYS = [Pool.take, Pool.lend]


@pytest.mark.parametrize("take", WAYS)
@pytest.mark.parametrize("others", WAYS)
def test_who_is_refused_a_channel_waits_for_anothers(take, others):
    refusing = Refusing(2)
    pool = refusing.pool
    first, second = others(pool), others(pool)
    taking = Background(take, pool)
    refusing.wait_for_waiting(1)
    pool.give_back(second)
    assert taking.result() is second
    assert pool.channels == {first, second}
    assert (second in pool._lent) is (take is Pool.lend)


@pytest.mark.parametrize("take", WAYS)
def test_who_is_refused_the_first_channel_is_told_so(take):
    refusing = Refusing(0)
    for _ in range(2):
        with pytest.raises(ChannelRefused, match="more than 0 channels"):
            take(refusing.pool)
    assert not refusing.pool.waiting
    refusing.allowed = 1
    assert take(refusing.pool)


@pytest.mark.parametrize("take", WAYS)
def test_who_gets_no_channel_in_time_is_told_why(take):
    """Those who have one may wait themselves, for this one."""
    refusing = Refusing(1, channel_wait_s=0.01)
    refusing.pool.lend()
    for _ in range(2):
        with pytest.raises(ChannelRefused, match="more than 1 channels"):
            take(refusing.pool)
    assert not refusing.pool.waiting
    assert refusing.pool._opening == 0


def test_a_server_that_has_refused_is_not_asked_by_everybody():
    refusing = Refusing(1)
    pool = refusing.pool
    only = pool.take()
    taking = []
    for number in range(1, 9):
        taking.append(Background(WAYS[number % 2], pool))
        refusing.wait_for_waiting(number)
    # The first one was refused, the others have heard of it.
    assert refusing.dials == 2
    # One of them asks again, after a while.
    pool.trim(pool._refused_at + 4)
    assert refusing.dials == 2
    pool.trim(pool._refused_at + 5)
    wait_until(lambda: refusing.dials == 3, "the next refusal")
    refusing.wait_for_waiting(8)
    # And when the server has changed its mind, one after the other.
    refusing.allowed = 9
    pool.trim(pool._refused_at + 5)
    assert {each.result() for each in taking} == {*refusing.channels} - {only}
    assert refusing.dials == 11


def test_a_refusal_is_forgotten_when_nobody_waits_any_more():
    refusing = Refusing(1, channel_wait_s=0.01)
    pool = refusing.pool
    pool.take()
    with pytest.raises(ChannelRefused):
        pool.take()
    refusing.allowed = 3
    pool.trim(0)
    assert pool.take() is not pool.take()


def test_a_channel_that_is_lost_is_a_reason_to_ask_again():
    refusing = Refusing(1)
    pool = refusing.pool
    only = pool.take()
    taking = Background(pool.take)
    refusing.wait_for_waiting(1)
    only.is_lost = True
    pool.give_back(only)
    assert taking.result() is refusing.channels[1]


def test_many_threads_share_what_the_server_lets_them_have():
    refusing = Refusing(2)
    pool = refusing.pool
    in_use: set[Any] = set()

    def work(take: Callable[[Pool], Any]) -> int:
        for _ in range(ROUNDS):
            channel = take(pool)
            assert channel not in in_use
            in_use.add(channel)
            in_use.remove(channel)
            pool.give_back(channel)
        return ROUNDS

    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        working = [Background(work, WAYS[n % 2]) for n in range(THREADS)]
        assert [each.result() for each in working] == [ROUNDS] * THREADS
    finally:
        sys.setswitchinterval(before_s)
    assert set(pool.idle) == pool.channels
    assert len(refusing.channels) == len(pool.channels)
    assert not pool.waiting
    assert pool._opening == 0


def test_the_end_wakes_those_who_were_refused():
    refusing = Refusing(1)
    refusing.pool.take()
    taking = [Background(take, refusing.pool) for take in WAYS]
    refusing.wait_for_waiting(2)
    refusing.pool.end("enough")
    assert [str(each.error()) for each in taking] == ["enough"] * 2


# Those that wait and are not served


def test_the_end_wakes_those_who_wait_and_says_why(dialled, pool):
    dialled.full()
    taking = [Background(pool.take) for _ in range(3)]
    dialled.wait_for_waiting(3)
    assert set(pool.end("enough")) == set(dialled.channels)
    for each in taking:
        error = each.error()
        assert isinstance(error, ChannelLost)
        assert str(error) == "enough"
    for take in (pool.take, pool.lend, pool._wait):
        with pytest.raises(ChannelLost, match="enough"):
            take()


def interrupt(pool: Pool, monkeypatch: Any, before: Callable[[], object]) -> None:
    """Take a channel, wait, and be interrupted by a signal, right after ``before``."""

    def interrupted(_event: threading.Event, _timeout_s: float | None) -> None:
        before()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threading.Event, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.take()


def test_an_interrupted_thread_waits_no_more(dialled, pool, monkeypatch):
    dialled.full()
    interrupt(pool, monkeypatch, lambda: None)
    assert not pool.waiting


def test_an_interrupted_thread_gives_back_what_it_was_given(dialled, pool, monkeypatch):
    first, _second = dialled.full()
    interrupt(pool, monkeypatch, lambda: pool.give_back(first))
    assert pool.take() is first


def test_an_interrupted_thread_leaves_its_room_to_others(dialled, pool, monkeypatch):
    first, _second = dialled.full()
    first.is_lost = True
    interrupt(pool, monkeypatch, lambda: pool.give_back(first))
    assert pool._opening == 0
    assert pool.take() is dialled.channels[2]


def test_an_interrupted_thread_keeps_nothing_after_the_end(dialled, pool, monkeypatch):
    first, _second = dialled.full()

    def end() -> None:
        pool.give_back(first)
        pool.end("enough")

    interrupt(pool, monkeypatch, end)
    assert pool.idle == []
    assert first.is_lost


# Fewer again


def idle(pool: Pool, *used_at: float) -> list[Any]:
    """As many idle channels, used last at these moments; the last one on the top."""
    channels: list[Any] = [pool.lend() for _ in used_at]
    for channel, moment in zip(channels, used_at, strict=True):
        channel.used_at = moment
        pool.give_back(channel)
    return channels


def test_what_nobody_used_for_long_is_closed(pool):
    old, older, recent, last = idle(pool, 5, 4, 11, 12)
    pool.trim(20)
    assert pool.idle == [recent, last]
    assert pool.channels == {recent, last}
    assert old.is_lost
    assert older.is_lost


def test_one_channel_is_kept_however_long_nobody_called(pool):
    *_others, last = idle(pool, 1, 2, 3)
    pool.trim(1000)
    assert pool.idle == [last]
    assert not last.is_lost


def test_what_is_used_is_not_closed(pool):
    (_channel, used) = idle(pool, 1, 2)
    assert pool.take() is used
    pool.trim(1000)
    assert not used.is_lost


def test_trimming_an_empty_pool_does_nothing(pool):
    pool.trim(1000)


def test_what_was_used_in_the_moment_of_the_trimming_is_given_back(pool):
    """Between the look at it and taking it out, a thread has used it."""

    class Turning(list[Any]):
        def pop(self, index: Any = -1) -> Any:
            channel = super().pop(index)
            channel.used_at = 1000
            return channel

    first, second = idle(pool, 1, 2)
    pool.idle = Turning([first, second])
    pool.trim(1000)
    assert set(pool.idle) == {first, second}
    assert not first.is_lost


def test_what_was_taken_in_the_moment_of_the_trimming_is_left_alone(pool):
    class Emptied(list[Any]):
        def pop(self, index: Any = -1) -> Any:
            raise IndexError

    pool.idle = Emptied(idle(pool, 1, 2))
    pool.trim(1000)
    assert len(pool.channels) == 2
