"""Loads that are asked for together, whoever comes late, is interrupted or lost."""

import sys
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from linecache import getline
from types import FrameType
from typing import Any

import pytest
from ZODB.POSException import POSKeyError

from zeolith.client import crowd as crowd_module
from zeolith.client.crowd import (
    DEAR_S,
    GOOD_TIMES,
    IMPATIENT_TIMES,
    SLOW_S,
    TOGETHER_MAX,
    Crowd,
)
from zeolith.client.errors import ChannelLost, ClientDisconnected
from zeolith.protocol.messages import Failure, Reply

from ..support.gates import Background, Gate
from ..support.script import oid, tid
from ..support.waiting import wait_until

NOW = tid(9)


class Host:
    """A session of which the test decides what its server answers, and when."""

    def __init__(self) -> None:
        # Who asks comes to it when all is sent.
        self.gate = Gate()
        # What was asked for together, alone, and how many channels came back busy.
        self.batches: list[list[bytes]] = []
        self.alone: list[bytes] = []
        self.back: list[Any] = []
        self.dropped = self.out = 0
        # How many answers come at once, and how long they take.
        self.piece = 1000
        self.took_s = self.regained_s = 0.0
        # Raised by whoever asks next, or receives what comes after a first piece.
        self.error: BaseException | None = None
        self.error_of_the_rest: BaseException | None = None
        self.dispersed: list[bool] = []

    def take(self) -> Any:
        self.out += 1
        return Channel(self)

    def give_back(self, channel: Any) -> None:
        assert channel not in self.back, "somebody else may be using it"
        self.back.append(channel)
        self.out -= 1
        self.dropped += bool(channel.open)

    def call(self, method: str, *args: Any) -> Any:
        assert method == "load"
        self.alone.append(args[0])
        return answer_to(args[0])

    def lost(self, error: ChannelLost) -> ChannelLost:
        return ChannelLost(f"the session: {error}")

    def disperse(self, _crowd: Crowd, did_good: bool) -> None:
        self.dispersed.append(did_good)


class Channel:
    """What a crowd sees of one."""

    def __init__(self, host: Host):
        self._host = host
        self.open: dict[int, bytes] = {}

    def requests(
        self, method: str, calls: Iterable[Sequence[Any]]
    ) -> tuple[bytes, list[int]]:
        assert method == "load"
        self.open = {number: args[0] for number, args in enumerate(calls, 7)}
        return b"requests", list(self.open)

    def exchange(self, requests: bytes) -> tuple[list[Any], float, float]:
        host = self._host
        assert requests == b"requests"
        host.batches.append(list(self.open.values()))
        host.gate.pass_through()
        error, host.error = host.error, None
        if error is not None:
            raise error
        return self._piece(), host.took_s, host.regained_s

    def more_answers(self) -> list[Any]:
        error, self._host.error_of_the_rest = self._host.error_of_the_rest, None
        if error is not None:
            raise error
        return self._piece()

    def _piece(self) -> list[Any]:
        piece = list(self.open)[: self._host.piece]
        return [message_for(number, self.open.pop(number)) for number in piece]


def answer_to(oid: bytes) -> Any:
    return [b"data of " + oid, tid(1), None, tid(9)]


def message_for(number: int, asked: bytes) -> Reply | Failure:
    if asked == oid(404):
        return Failure(number, "POSKeyError", {"oid": asked}, "")
    if asked == oid(503):
        return Failure(number, "Unavailable", {}, "the server stops")
    return Reply(number, answer_to(asked))


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def crowd(host: Host) -> Crowd:
    return Crowd(host)


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine is not what makes somebody ask alone."""
    monkeypatch.setattr(crowd_module, "PATIENCE_S", 30)


def join(crowd: Crowd, *numbers: int) -> list[Background]:
    """Threads that load these objects, and wait one behind the other."""
    joined = []
    for number in numbers:
        waiting = len(crowd._waiting)
        joined.append(Background(crowd.load, oid(number), NOW))
        wait_for_another(crowd, waiting, joined[-1])
    return joined


def wait_for_another(crowd: Crowd, waiting: int, who: Background) -> None:
    """Until ``who`` waits, too, or had no patience to."""
    wait_until(
        lambda: len(crowd._waiting) > waiting or who.has_ended, f"more than {waiting}"
    )


def lead(host: Host, crowd: Crowd, number: int = 1) -> Background:
    """One who has asked, and waits for the gate."""
    host.gate.shut()
    leader = Background(crowd.load, oid(number), NOW)
    host.gate.wait_until_reached()
    return leader


def is_at_rest(crowd: Crowd) -> bool:
    return not crowd._waiting and not crowd._is_led


def test_who_comes_alone_is_answered(host, crowd):
    assert crowd.load(oid(1), NOW) == answer_to(oid(1))
    assert crowd.load(oid(2), NOW) == answer_to(oid(2))
    assert host.batches == [[oid(1)], [oid(2)]]
    assert host.out == host.dropped == 0
    assert is_at_rest(crowd)


def test_those_who_come_while_somebody_asks_are_asked_for_together(host, crowd):
    leader = lead(host, crowd)
    others = join(crowd, 2, 3, 4)
    host.gate.open()
    assert leader.result() == answer_to(oid(1))
    for number, each in enumerate(others, 2):
        assert each.result() == answer_to(oid(number))
    assert host.batches == [[oid(1)], [oid(2), oid(3), oid(4)]]
    assert host.alone == []
    assert is_at_rest(crowd)


def test_two_who_want_the_same_object_get_it_each(host, crowd):
    leader = lead(host, crowd)
    others = join(crowd, 2, 2)
    host.gate.open()
    leader.result()
    assert [each.result() for each in others] == [answer_to(oid(2))] * 2


def test_not_more_than_so_many_are_asked_for_at_once(host, crowd, monkeypatch):
    monkeypatch.setattr(crowd_module, "TOGETHER_MAX", 2)
    leader = lead(host, crowd)
    others = join(crowd, 2, 3, 4)
    host.gate.open()
    for each in (leader, *others):
        each.result()
    assert [len(batch) for batch in host.batches] == [1, 2, 1]
    assert TOGETHER_MAX < 1000, "the protocol's requests_open_max"


def test_an_error_is_that_of_whoever_asked_for_it(host, crowd):
    leader = lead(host, crowd)
    second, third, fourth = join(crowd, 404, 503, 4)
    host.gate.open()
    leader.result()
    error = second.error()
    assert isinstance(error, POSKeyError)
    assert error.args == (oid(404),)
    assert isinstance(third.error(), ClientDisconnected)
    assert fourth.result() == answer_to(oid(4))
    assert is_at_rest(crowd)


@pytest.mark.parametrize("nonsense", [b"short", "a text", None, 8])
def test_what_cannot_be_sent_is_nobody_elses_error(host, crowd, nonsense):
    leader = lead(host, crowd)
    (second,) = join(crowd, 2)
    assert crowd.load(oid(3), nonsense) == answer_to(oid(3)), "the session's call"
    assert host.alone == [oid(3)]
    host.gate.open()
    leader.result()
    second.result()


def test_the_rest_of_the_answers_is_for_an_heir(host, crowd):
    """Who has its own answer does not wait for those of others."""
    host.piece = 1
    leader = lead(host, crowd)
    others = join(crowd, 2, 3, 4)
    host.gate.open()
    for number, each in enumerate([leader, *others], 1):
        assert each.result() == answer_to(oid(number))
    assert host.batches == [[oid(1)], [oid(2), oid(3), oid(4)]]
    assert host.alone == []
    assert host.out == host.dropped == 0
    assert is_at_rest(crowd)


def test_a_lost_connection_is_the_error_of_one(host, crowd):
    """The others ask alone."""
    leader = lead(host, crowd)
    second, *others = join(crowd, 2, 3, 4)
    host.gate.open()
    leader_error = ChannelLost("a broken wire")
    host.error = leader_error
    error = leader.error()
    assert isinstance(error, ChannelLost)
    assert str(error) == "the session: a broken wire"
    # Nobody has asked for those who waited, so one of them leads.
    for number, each in enumerate([second, *others], 2):
        assert each.result() == answer_to(oid(number))
    assert host.alone == []
    assert is_at_rest(crowd)


@pytest.mark.parametrize("error", [ChannelLost("a broken wire"), KeyboardInterrupt()])
def test_those_for_whom_somebody_asked_who_failed_ask_alone(host, crowd, error):
    leader = lead(host, crowd)
    second, *others = join(crowd, 2, 3, 4)
    # The second one leads, and comes to the gate, too.
    host.gate.shut()
    failing = Gate()
    failing.shut()
    exchange = Channel.exchange

    def fail(channel: Channel, requests: bytes) -> Any:
        if len(channel.open) > 1:
            failing.pass_through()
            host.error = error
        return exchange(channel, requests)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Channel, "exchange", fail)
        host.gate.open()
        leader.result()
        failing.wait_until_reached()
        (late,) = join(crowd, 5)
        failing.open()
        assert isinstance(second.error(), type(error))
        for number, each in enumerate(others, 3):
            assert each.result() == answer_to(oid(number))
        assert late.result() == answer_to(oid(5))
    assert sorted(host.alone) == [oid(3), oid(4)]
    assert host.batches[-1] == [oid(5)], "who came later is not concerned"
    assert host.dropped == 1
    assert host.out == 0
    assert is_at_rest(crowd)


def test_an_heir_that_loses_the_connection_tells_the_others(host, crowd):
    host.piece = 1
    leader = lead(host, crowd)
    second, third, fourth = join(crowd, 2, 3, 4)
    host.error_of_the_rest = ChannelLost("a broken wire")
    host.gate.open()
    leader.result()
    assert second.result() == answer_to(oid(2))
    assert isinstance(third.error(), ChannelLost)
    assert fourth.result() == answer_to(oid(4))
    assert host.alone == [oid(4)]
    assert is_at_rest(crowd)


def test_a_session_without_a_channel_is_everybodys_error(host, crowd, monkeypatch):
    leader = lead(host, crowd)
    others = join(crowd, 2, 3)

    def ended() -> Any:
        raise ChannelLost("the session has ended")

    monkeypatch.setattr(host, "take", ended)
    host.gate.open()
    leader.result()
    for each in others:
        assert isinstance(each.error(), ChannelLost)
    assert is_at_rest(crowd)


def test_who_is_not_asked_for_in_time_asks_alone(host, crowd, monkeypatch):
    leader = lead(host, crowd)
    monkeypatch.setattr(crowd_module, "PATIENCE_S", 0.001)
    assert crowd.load(oid(2), NOW) == answer_to(oid(2))
    assert host.alone == [oid(2)]
    assert not crowd._waiting
    host.gate.open()
    leader.result()
    assert host.batches == [[oid(1)]]
    assert host.dispersed == []


def test_where_nobody_leads_the_crowd_disperses(host, crowd, monkeypatch):
    leader = lead(host, crowd)
    monkeypatch.setattr(crowd_module, "PATIENCE_S", 0.0001)
    for _ in range(IMPATIENT_TIMES):
        crowd.load(oid(2), NOW)
    assert host.dispersed == [False]
    host.gate.open()
    leader.result()


def test_who_was_asked_for_waits_for_a_slow_answer(host, crowd, monkeypatch):
    leader = lead(host, crowd)
    (second,) = join(crowd, 2)
    (member,) = crowd._waiting
    monkeypatch.setattr(crowd_module, "PATIENCE_S", 0.001)
    # Its own patience is the old one; it has been asked for when it looks.
    crowd._waiting.clear()
    assert not second.returns_soon()
    member.answer = Reply(1, answer_to(oid(2)))
    member.wake()
    assert second.result() == answer_to(oid(2))
    host.gate.open()
    leader.result()


def test_who_was_not_woken_finds_its_answer(host, crowd, monkeypatch):
    """Whoever had it was interrupted between noting and waking."""
    monkeypatch.setattr(crowd_module, "PATIENCE_S", 0.001)
    crowd._is_led = True
    crowd._waiting = Forgetful()
    second = Background(crowd.load, oid(2), NOW)
    wait_until(lambda: crowd._waiting.joined, "who waits")
    crowd._waiting.joined[0].answer = Reply(1, answer_to(oid(2)))
    assert second.result() == answer_to(oid(2))
    assert host.alone == []


def test_who_was_forgotten_asks_alone(host, crowd, monkeypatch):
    """By a thread that was interrupted in the wrong moment."""
    monkeypatch.setattr(crowd_module, "PATIENCE_S", 0.001)
    monkeypatch.setattr(crowd_module, "PATIENCE_TIMES", 3)
    crowd._is_led = True
    crowd._waiting = Forgetful()
    assert crowd.load(oid(2), NOW) == answer_to(oid(2))
    assert host.alone == [oid(2)]


class Forgetful(list[Any]):
    """Where nobody who waits is found."""

    def __init__(self) -> None:
        self.joined: list[Any] = []

    def append(self, member: Any) -> None:
        self.joined.append(member)


# When a crowd disperses


def crowded(crowd: Crowd, together: int, times: int = 1, **how: float) -> None:
    for _ in range(times):
        crowd._look_back(together, how.get("took_s", 0), how.get("regained_s", 0))


def test_a_crowd_stays_as_long_as_it_does_good(host, crowd):
    crowded(crowd, 8, 10_000, took_s=0.9 * 8 * SLOW_S, regained_s=0.9 * DEAR_S)
    assert host.dispersed == []


def test_a_single_wait_is_chance(host, crowd):
    crowded(crowd, 8, 10)
    crowded(crowd, 8, took_s=10, regained_s=10)
    assert host.dispersed == []


@pytest.mark.parametrize(
    ("together", "how"),
    [
        (1, {}),
        (8, {"took_s": 8 * SLOW_S * 1.1}),
        (8, {"regained_s": DEAR_S * 1.1}),
    ],
    ids=["small", "slow", "dear"],
)
def test_a_crowd_disperses_when_it_does_no_good(host, crowd, together, how):
    crowded(crowd, together, 50, **how)
    assert host.dispersed
    assert not any(host.dispersed)


def test_a_crowd_that_did_good_may_gather_again_at_once(host, crowd):
    crowded(crowd, 8, GOOD_TIMES)
    crowded(crowd, 1, 100)
    assert host.dispersed
    assert all(host.dispersed)


def test_a_server_that_is_slow_stays_so(host, crowd):
    """However long that went well."""
    crowded(crowd, 8, GOOD_TIMES)
    crowded(crowd, 8, 100, took_s=1)
    assert host.dispersed
    assert not any(host.dispersed)


def test_many_wait_together_for_a_server_far_away(host, crowd):
    crowded(crowd, 50, 1000, took_s=0.005)
    assert host.dispersed == []


# Whoever is interrupted, wherever


class Interruption(BaseException):
    """As a KeyboardInterrupt, or what a signal's handler raises."""


class Interrupted:
    """A load in a thread of its own that is interrupted before its `line`-th line."""

    def __init__(self, crowd: Crowd, oid: bytes, line: int):
        self._crowd, self._oid = crowd, oid
        self._lines_left = line
        self.has_happened = False
        self.load = Background(self._load)

    def _load(self) -> Any:
        sys.settrace(self._trace)
        try:
            return self._crowd.load(self._oid, NOW)
        finally:
            sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _arg: Any) -> Any:
        if frame.f_code.co_filename != crowd_module.__file__:
            return None
        # CPython interrupts nobody who is about to leave a ``with`` (bpo-29988).
        is_line = event == "line" and not getline(
            crowd_module.__file__, frame.f_lineno
        ).lstrip().startswith("with ")
        if is_line and not self.has_happened:
            self._lines_left -= 1
            if self._lines_left < 0:
                self.has_happened = True
                raise Interruption
        return self._trace


class Scene:
    """A leader who waits at the gate, and those who have come since, in this order."""

    def __init__(self, line: int, piece: int):
        self.host = Host()
        self.host.piece = piece
        self.crowd = Crowd(self.host)
        self.others = {1: lead(self.host, self.crowd)}
        self._line = line

    def join(self, number: int) -> None:
        """Somebody comes who must get what he wants."""
        (self.others[number],) = join(self.crowd, number)

    def join_victim(self, number: int) -> Interrupted:
        """Somebody comes who is interrupted somewhere, perhaps at once."""
        waiting = len(self.crowd._waiting)
        victim = Interrupted(self.crowd, oid(number), self._line)
        wait_for_another(self.crowd, waiting, victim.load)
        return victim

    def end(self) -> None:
        self.host.gate.open()
        for number, each in self.others.items():
            assert each.result() == answer_to(oid(number)), f"line {self._line}"
        late = Background(self.crowd.load, oid(5), NOW)
        assert late.result() == answer_to(oid(5)), f"line {self._line}"


def interrupt_everywhere(piece: int, *joining: int) -> int:
    """One after the other join, the victim is 2; it is interrupted at line 0, 1, 2 ...

    Until it was not. The others must get what they want. Returns how often it was.
    """
    line = 0
    while True:
        scene = Scene(line, piece)
        victim = None
        for number in joining:
            if number == 2:
                victim = scene.join_victim(number)
            else:
                scene.join(number)
        scene.end()
        assert victim is not None
        try:
            found = victim.load.result()
        except Interruption:
            assert not scene.crowd._waiting
            assert scene.host.out <= 1, "one may be lost, and none is given back twice"
            line += 1
            continue
        assert found == answer_to(oid(2))
        assert is_at_rest(scene.crowd)
        assert scene.host.out == 0
        return line


@pytest.fixture
def _little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowd_module, "PATIENCE_S", 0.3)
    monkeypatch.setattr(crowd_module, "PATIENCE_TIMES", 2)


@pytest.mark.usefixtures("_little_patience")
@pytest.mark.parametrize("piece", [1000, 1])
def test_a_leader_may_be_interrupted_anywhere(piece):
    assert interrupt_everywhere(piece, 2, 3, 4) > 30


@pytest.mark.usefixtures("_little_patience")
@pytest.mark.parametrize("piece", [1000, 1])
def test_whoever_waits_may_be_interrupted_anywhere(piece):
    """And with a piece of the answers at a time, an heir."""
    assert interrupt_everywhere(piece, 3, 2, 4) > (10 if piece > 1 else 20)


def test_a_handler_that_loads_in_the_middle_of_a_load_is_answered(host, monkeypatch):
    """It would wait for the thread that it has interrupted."""
    monkeypatch.setattr(crowd_module, "PATIENCE_S", 0.001)
    crowd = Crowd(host)
    found: list[Any] = []
    exchange = Channel.exchange

    def handle(channel: Channel, requests: bytes) -> Any:
        if not found:
            found.append(crowd.load(oid(2), NOW))
        return exchange(channel, requests)

    monkeypatch.setattr(Channel, "exchange", handle)
    assert crowd.load(oid(1), NOW) == answer_to(oid(1))
    assert found == [answer_to(oid(2))]


def test_a_handler_that_loads_under_the_lock_is_answered(host, monkeypatch):
    monkeypatch.setattr(crowd_module, "PATIENCE_S", 0.001)
    crowd = Crowd(host)
    found: list[Any] = []

    class Waiting(deque[Any]):
        """Where a signal comes in the middle of looking."""

        def __bool__(self) -> bool:
            if not found:
                found.append(crowd.load(oid(2), NOW))
            return len(self) > 0

    crowd._waiting = Waiting()
    loading = Background(crowd.load, oid(1), NOW)
    assert loading.result() == answer_to(oid(1))
    assert found == [answer_to(oid(2))]


# Many at once


def test_many_threads_get_what_they_ask_for(host, crowd):
    host.piece = 3
    errors: list[Any] = []
    start = threading.Barrier(12)

    def load_all(share: int) -> None:
        start.wait()
        for number in range(1000 + share, 2200, 12):
            if crowd.load(oid(number), NOW) != answer_to(oid(number)):
                errors.append(number)

    crew = [Background(load_all, share) for share in range(12)]
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for each in crew:
            each.result()
    finally:
        sys.setswitchinterval(interval_s)
    assert errors == []
    assert sum(map(len, host.batches)) + len(host.alone) == 1200
    assert host.out == host.dropped == 0
    assert is_at_rest(crowd)
