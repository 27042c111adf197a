"""One presence at one server: its stream, its channels, its end."""

import errno
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from ZODB.POSException import POSKeyError
from ZODB.utils import p64, u64

from zeolith.client import crowd as crowd_module
from zeolith.client import dial as dial_module
from zeolith.client import session as session_module
from zeolith.client.cache import MemoryCache
from zeolith.client.changes import Change
from zeolith.client.channel import Channel
from zeolith.client.crowd import CROWD_MIN, PAUSE_MAX_S, PAUSE_MIN_S
from zeolith.client.dial import Wish, dial
from zeolith.client.errors import ChannelLost
from zeolith.client.position import Position
from zeolith.client.session import Session
from zeolith.protocol.codec import encode
from zeolith.protocol.errors import HelloRefused
from zeolith.protocol.limits import DEFAULT, Limits
from zeolith.protocol.messages import Goodbye, Notice, Welcome

from ..support.gates import Background
from ..support.script import (
    IMPATIENT,
    Act,
    Held,
    Raw,
    ScriptedServer,
    scripted,
    tid,
    welcome,
)
from ..support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

WISH = Wish("1", False, None, None, None, None)
OID = p64(1)


@contextmanager
def session_of(server: ScriptedServer, limits: Limits = DEFAULT) -> Iterator[Session]:
    session = Session(dial(server.address, WISH, limits), limits)
    try:
        yield session
    finally:
        session.discard("the test is over")


@pytest.fixture
def session(server: ScriptedServer) -> Iterator[Session]:
    with session_of(server) as session:
        yield session


class Heard:
    """A position that only writes down what it hears."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.sources: list[Any] = []

    def receive(self, source: Any, changes: list[Change]) -> None:
        self.sources.append(source)
        self.changes += changes


def change(number: int) -> list[Any]:
    return [tid(number - 1), tid(number), [OID], None]


def hear(session: Session) -> tuple[Heard, Background]:
    heard = Heard()
    return heard, Background(session.listen, heard)


# Channels


def test_channels_are_opened_when_they_are_needed(server, session):
    assert server.channels() == []
    session.call("ping")
    assert len(server.channels()) == 1
    assert server.hellos[1]["session"] == session.welcome["session"]


def test_a_channel_is_used_again(server, session):
    for _ in range(10):
        session.call("ping")
    assert len(server.hellos) == 2


def test_threads_do_not_wait_for_each_other(server, session):
    """Each has a channel of its own, and they are used again."""
    go_on = threading.Event()
    server.answers["ping"] = Held(go_on, b"pong")
    calling = [Background(session.call, "ping") for _ in range(5)]
    server.wait_for("ping", times=5)
    assert len(server.channels()) == 5
    go_on.set()
    assert [each.result() for each in calling] == [b"pong"] * 5
    calling = [Background(session.call, "ping") for _ in range(5)]
    assert [each.result() for each in calling] == [b"pong"] * 5
    assert len(server.channels()) == 5


def test_channels_that_are_not_needed_any_more_are_closed():
    """By the thread that listens; one is kept."""
    limits = Limits(
        heartbeat_interval_s=0.1, heartbeat_timeout_s=30, channel_idle_s=0.2
    )
    go_on = threading.Event()
    with scripted() as server, session_of(server, limits) as session:
        server.answers["ping"] = Held(go_on)
        calling = [Background(session.call, "ping") for _ in range(5)]
        server.wait_for("ping", times=5)
        _heard, listening = hear(session)
        assert len(server.channels()) == 5
        go_on.set()
        for each in calling:
            each.result()
        wait_until(lambda: len(server.channels()) == 1, "the end of four channels")
        session.call("ping")
        assert len(server.hellos) == 6
        session.close("enough")
        listening.result()


def test_more_threads_than_there_may_be_channels_take_turns(server):
    go_on = threading.Event()
    server.answers["ping"] = Held(go_on, b"pong")
    with session_of(server, Limits(channels_max=2)) as session:
        calling = [Background(session.call, "ping") for _ in range(6)]
        server.wait_for("ping", times=2)
        wait_until(lambda: len(session._pool.waiting) == 4, "four who wait")
        channel = session.borrow()
        assert channel.call("new_oids", 0) is None, "a commit does not wait"
        session.give_back(channel)
        go_on.set()
        assert [each.result() for each in calling] == [b"pong"] * 6
        assert len(server.hellos) <= 4


def loaded(number: int) -> list[Any]:
    return [b"data of %d" % number, tid(1), None, tid(1)]


def load_all(server: ScriptedServer, session: Session, *numbers: int) -> list[Any]:
    """Threads that load these objects, one after the other."""
    loading = []
    for number in numbers:
        loading.append(Background(session.load, p64(number), tid(9)))
        server.wait_for("load", times=number)
    return loading


def test_a_few_threads_load_on_a_channel_each(server, session):
    go_on = threading.Event()
    server.answers["load"] = lambda oid, _before: Held(go_on, loaded(u64(oid)))
    loading = load_all(server, session, *range(1, CROWD_MIN + 1))
    assert len(server.channels()) == CROWD_MIN
    go_on.set()
    assert [each.result() for each in loading] == [
        loaded(number) for number in range(1, CROWD_MIN + 1)
    ]
    assert session._crowd is None


def test_many_threads_load_together(server, session, monkeypatch):
    monkeypatch.setattr(crowd_module, "PATIENCE_S", 30)
    go_on = threading.Event()
    server.answers["load"] = lambda oid, _before: Held(go_on, loaded(u64(oid)))
    loading = load_all(server, session, *range(1, CROWD_MIN + 2))
    crowd = session._crowd
    assert crowd is not None, "it has one member, which leads"
    more = range(CROWD_MIN + 2, CROWD_MIN + 12)
    loading += [Background(session.load, p64(number), tid(9)) for number in more]
    wait_until(lambda: len(crowd._waiting) == 10, "ten who wait")
    assert len(server.channels()) == CROWD_MIN + 1
    go_on.set()
    assert [each.result() for each in loading] == [
        loaded(number) for number in range(1, CROWD_MIN + 12)
    ]
    assert len(server.channels()) == CROWD_MIN + 1
    assert session.has_answered


def test_a_crowd_ends_with_its_session(server, session, monkeypatch):
    monkeypatch.setattr(crowd_module, "PATIENCE_S", 30)
    server.answers["load"] = Act.SILENCE
    loading = load_all(server, session, *range(1, CROWD_MIN + 2))
    crowd = session._crowd
    assert crowd is not None
    loading += [Background(session.load, OID, tid(9)) for _ in range(3)]
    wait_until(lambda: len(crowd._waiting) == 3, "three who wait")
    session.close("enough")
    for each in loading:
        error = each.error()
        assert isinstance(error, ChannelLost)
        assert str(error) == "enough"


def test_after_a_crowd_that_did_no_good_there_is_none_for_a_while(session, monkeypatch):
    now = 1000.0
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(session_module, "time", clock)
    pauses = []
    for _ in range(12):
        session.disperse(session._gather(), False)
        assert session._crowd is None
        began = now
        while session._gather() is None:
            now += PAUSE_MIN_S / 2
        pauses.append(now - began)
    expected = [min(PAUSE_MIN_S * 2**times, PAUSE_MAX_S) for times in range(12)]
    assert pauses == pytest.approx(expected, abs=PAUSE_MIN_S)
    session.disperse(session._crowd, True)
    assert session._gather() is not None


def test_only_the_crowd_that_there_is_can_disperse(session):
    first, second = session._gather(), session._gather()
    session.disperse(first, False)
    assert session._crowd is second


def test_those_who_wait_for_a_channel_are_told_of_the_end(server):
    server.answers["ping"] = Act.SILENCE
    with session_of(server, Limits(channels_max=1)) as session:
        calling = [Background(session.call, "ping") for _ in range(3)]
        wait_until(lambda: len(session._pool.waiting) == 2, "two who wait")
        session.close("enough")
        assert [str(each.error()) for each in calling] == ["enough"] * 3


def test_a_borrowed_channel_is_used_by_nobody_else(server, session):
    channel = session.borrow()
    session.call("ping")
    assert len(server.channels()) == 2
    session.give_back(channel)
    again = [session.borrow(), session.borrow()]
    assert channel in again
    assert len(server.channels()) == 2
    for each in again:
        session.give_back(each)


def test_an_error_of_the_server_costs_no_channel(server, session):
    server.answers["load"] = POSKeyError(OID)
    for _ in range(3):
        with pytest.raises(POSKeyError):
            session.call("load", OID, tid(1))
    assert len(server.channels()) == 1


def test_a_channel_that_is_lost_is_not_used_again(server, session):
    server.answers["ping"] = Act.HANG_UP
    with pytest.raises(ChannelLost):
        session.call("ping")
    server.answers["ping"] = b"pong"
    assert session.call("ping") == b"pong"
    assert session.ended is None


def test_a_channel_that_was_lost_while_it_was_idle_is_one_error(server, session):
    session.call("ping")
    (channel,) = server.channels()
    channel.hang_up()
    wait_until(lambda: not server.channels(), "the end of the channel")
    with pytest.raises(ChannelLost):
        session.call("ping")
    session.call("ping")


def test_the_answer_to_an_interrupted_call_goes_to_nobody(server, session, monkeypatch):
    server.answers["load_serial"] = lambda oid, _serial: oid
    session.call("ping")
    call = Channel.call

    def interrupted(channel: Channel, method: str, *args: Any) -> Any:
        data = channel._connection.request(method, list(args), 0)
        channel._socket.sendall(data)
        raise KeyboardInterrupt

    monkeypatch.setattr(Channel, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.call("load_serial", p64(1), tid(1))
    monkeypatch.setattr(Channel, "call", call)
    assert session.call("load_serial", p64(2), tid(1)) == p64(2)
    assert len(server.hellos) == 3


def test_several_questions_go_over_one_channel(server, session):
    server.answers["load_serial"] = lambda oid, _serial: oid
    calls = [(p64(n), tid(1)) for n in range(10)]
    answers = list(session.answers("load_serial", calls, 3))
    assert answers == [p64(n) for n in range(10)]
    assert len(server.channels()) == 1
    assert session._idle, "it was given back"


def test_a_channel_with_answers_that_nobody_took_is_not_taken_back(server, session):
    answered = [p64(0), p64(7)]
    server.answers["load_serial"] = lambda oid, _serial: (
        oid if oid in answered else Act.SILENCE
    )
    calls = [(p64(n), tid(1)) for n in range(5)]
    answers = session.answers("load_serial", calls, 3)
    assert next(answers) == p64(0)
    answers.close()
    assert session._idle == []
    assert session.call("load_serial", p64(7), tid(1)) == p64(7)


def test_a_lost_channel_ends_its_answers_and_not_the_session(server, session):
    server.answers["load_serial"] = Act.HANG_UP
    with pytest.raises(ChannelLost):
        list(session.answers("load_serial", [(OID, tid(1))], 3))
    assert session._idle == []
    assert session.ended is None


def test_a_busy_channel_is_not_taken_back(server, session):
    channel = session.borrow()
    channel._connection.request("ping", [], 0)
    session.give_back(channel)
    assert channel.is_lost
    assert channel not in session._pool.channels
    assert session._idle == []


def test_a_lost_channel_is_not_taken_back(server, session):
    channel = session.borrow()
    channel.close()
    session.give_back(channel)
    assert session._idle == []
    assert session._pool.channels == set()
    assert not session.has_answered
    other = session.borrow()
    session.give_back(other)
    assert session._idle == [other]
    assert session.has_answered


def test_a_server_that_knows_the_session_no_more_ends_it(server, session):
    server.channel_hello = HelloRefused("session", "the session has ended")
    with pytest.raises(ChannelLost, match="the session has ended"):
        session.call("ping")
    assert session.ended == "the session has ended"


@pytest.mark.parametrize(
    "refusal",
    [
        HelloRefused("limit", "more than 1 channels (session_channels_max)"),
        Raw(encode(Goodbye("limit", "more than 2 connections (connections_max)"))),
    ],
)
def test_a_server_that_has_no_place_for_a_channel_does_not_end_the_session(
    server, session, refusal, caplog
):
    server.channel_hello = refusal
    with pytest.raises(ChannelLost, match="more than"):
        session.call("ping")
    server.channel_hello = None
    go_on = threading.Event()
    server.answers["ping"] = Held(go_on, b"pong")
    calling = [Background(session.call, "ping")]
    server.wait_for("ping")
    server.channel_hello = refusal
    calling += [Background(session.call, "ping") for _ in range(3)]
    wait_until(lambda: len(session._pool.waiting) == 3, "three who wait")
    go_on.set()
    assert [each.result() for each in calling] == [b"pong"] * 4
    assert session.ended is None
    assert len(server.channels()) == 1
    # Once, however often it is.
    assert caplog.text.count("lets this client have no more sockets") == 1


def test_a_process_without_descriptors_goes_on_with_its_channels(
    server, session, caplog, monkeypatch
):
    go_on = threading.Event()
    server.answers["ping"] = Held(go_on, b"pong")
    calling = [Background(session.call, "ping")]
    server.wait_for("ping")

    def none_is_left(*_args: Any) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(dial_module, "_connect", none_is_left)
    calling += [Background(session.call, "ping") for _ in range(3)]
    wait_until(lambda: len(session._pool.waiting) == 3, "three who wait")
    go_on.set()
    assert [each.result() for each in calling] == [b"pong"] * 4
    assert session.ended is None
    (text,) = (each.message for each in caplog.records if each.levelname == "WARNING")
    assert text.startswith("there are no more sockets here for a channel to ")
    assert "Too many open files" in text


def test_no_server_to_open_a_channel_ends_the_session(server, session):
    server.refuse()
    with pytest.raises(ChannelLost, match="refused"):
        session.borrow()
    assert session.ended is not None


# The stream


def test_changes_are_handed_on_in_order(server, session):
    heard, listening = hear(session)
    server.publish(change(2))
    server.publish(change(3), change(4))
    wait_until(lambda: len(heard.changes) == 3, "the changes")
    assert heard.changes == [Change(*change(number)) for number in (2, 3, 4)]
    assert set(heard.sources) == {session}
    session.close("enough")
    listening.result()


def test_changes_behind_the_welcome_are_the_first(server):
    fields = welcome(session=bytes(16))
    early = [Notice("changes", [[change(2)]]), Notice("changes", [[change(3)]])]
    server.hello = Raw(b"".join([encode(Welcome(fields)), *map(encode, early)]))
    with session_of(server) as session:
        heard, listening = hear(session)
        wait_until(lambda: len(heard.changes) == 2, "the early changes")
        server.peers[0].send(encode(Notice("changes", [[change(4)]])))
        wait_until(lambda: len(heard.changes) == 3, "the change after them")
        assert heard.changes == [Change(*change(number)) for number in (2, 3, 4)]
        session.close("enough")
        listening.result()


def test_a_gap_in_the_changes_ends_the_session(server, session):
    position = Position(MemoryCache())
    position.adopt(session, tid(1), [])
    listening = Background(session.listen, position)
    server.publish(change(5))
    assert "missing" in listening.result()
    assert session.ended is not None


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (lambda stream: stream.hang_up(), "closed the connection"),
        (lambda stream: stream.goodbye("stopping", "for a rest"), "for a rest"),
        (lambda stream: stream.send(b"garbage, garbage"), "a frame of 1734439522"),
    ],
)
def test_the_end_of_the_stream_is_the_end_of_the_session(server, session, end, reason):
    _heard, listening = hear(session)
    session.call("ping")
    (stream,) = server.streams()
    end(stream)
    assert reason in listening.result()
    assert session.ended == listening.result()
    wait_until(lambda: not server.peers, "the end of every socket")
    with pytest.raises(ChannelLost, match=re.escape(session.ended)):
        session.call("ping")


def test_a_silent_server_ends_the_session():
    with scripted() as server, session_of(server, IMPATIENT) as session:
        server.streams()[0].freeze()
        assert session.listen(Heard()) == "silent for 0.2 s"  # type: ignore[arg-type]


def test_both_ends_keep_a_quiet_stream_alive():
    """Each would give up the other, if it said nothing."""
    limits = Limits(heartbeat_interval_s=0.2, heartbeat_timeout_s=1)
    with (
        scripted(limits=limits) as server,
        session_of(server, limits) as session,
    ):
        _heard, listening = hear(session)
        for _ in range(20):
            assert not listening.returns_soon()
        assert len(server.streams()) == 1
        session.close("enough")
        listening.result()


def test_a_client_that_only_gets_changes_still_beats():
    """It is never so quiet that its receive would time out."""
    limits = Limits(heartbeat_interval_s=0.2, heartbeat_timeout_s=1)
    with (
        scripted(limits=limits) as server,
        session_of(server, limits) as session,
    ):
        _heard, listening = hear(session)
        number = 2
        began = server.streams()[0].connection.rcvd_at
        while server.streams()[0].connection.rcvd_at < began + 1.5:
            server.publish(change(number))
            number += 1
            assert not threading.Event().wait(0.01)
        session.close("enough")
        listening.result()


# The end


def test_closing_ends_the_listening(server):
    """At once, however long it would wait for the next heartbeat."""
    limits = Limits(heartbeat_interval_s=1000, heartbeat_timeout_s=3000)
    with session_of(server, limits) as session:
        server.streams()[0].freeze()
        _heard, listening = hear(session)
        assert not listening.returns_soon()
        session.close("enough")
        assert listening.result() == "enough"
        assert session._stream.fileno() == -1
    wait_until(lambda: not server.streams(), "the end of the stream")


def test_closing_wakes_everybody_and_says_why(server, session):
    server.answers["ping"] = Act.SILENCE
    calling = [Background(session.call, "ping") for _ in range(3)]
    server.wait_for("ping", times=3)
    session.close("enough")
    for each in calling:
        error = each.error()
        assert isinstance(error, ChannelLost)
        assert str(error) == "enough"
    wait_until(lambda: not server.channels(), "the end of the channels")


def test_closing_closes_idle_channels(server, session):
    session.call("ping")
    session.close("enough")
    wait_until(lambda: not server.channels(), "the end of the channel")


def test_only_the_first_reason_counts(server, session):
    session.close("the first")
    session.close("the second")
    assert session.ended == "the first"


def test_no_channel_after_the_end(server, session):
    session.close("enough")
    with pytest.raises(ChannelLost, match="enough"):
        session.borrow()
    with pytest.raises(ChannelLost, match="enough"):
        session.call("ping")
    assert len(server.hellos) == 1


def test_a_channel_that_comes_back_after_the_end_is_closed(server, session):
    channel = session.borrow()
    session.close("enough")
    session.give_back(channel)
    assert channel._socket.fileno() == -1


def test_a_channel_that_comes_back_in_the_moment_of_the_end_is_closed(
    server, session, monkeypatch
):
    """Every channel that was there is shut, and this one is put to the idle ones."""
    channel = session.borrow()
    is_busy = property(lambda _channel: session.close("enough"))
    monkeypatch.setattr(Channel, "is_busy", is_busy)
    session.give_back(channel)
    assert session._idle == []
    assert channel._socket.fileno() == -1


def test_a_channel_that_is_ready_only_after_the_end_is_closed(server, session):
    accept = threading.Event()
    server.channel_hello = Held(accept)
    borrowing = Background(session.borrow)
    wait_until(lambda: len(server.hellos) == 2, "the hello of the channel")
    session.close("enough")
    accept.set()
    error = borrowing.error()
    assert isinstance(error, ChannelLost)
    wait_until(lambda: not server.channels(), "the end of the channel")


def test_a_call_that_ends_with_the_session_keeps_no_channel(
    server, session, monkeypatch
):
    """The answer is there, and the session ends before the channel is given back."""
    call = Channel.call

    def answered(channel: Channel, method: str, *args: Any) -> Any:
        value = call(channel, method, *args)
        session.close("enough")
        return value

    monkeypatch.setattr(Channel, "call", answered)
    session.call("ping")
    assert session._idle == []
    assert session._pool.channels == set()


def test_a_session_that_nobody_listens_to_can_be_let_go(server, session):
    session.call("ping")
    session.discard("not needed")
    assert session.ended == "not needed"
    assert session._stream.fileno() == -1
    wait_until(lambda: not server.peers, "the end of every socket")


def test_a_forked_child_lets_go_of_the_sockets_and_says_nothing(server, session):
    """The parent, with copies of them, goes on."""
    session.call("ping")
    (channel,) = session._pool.channels
    parents = [session._stream.dup(), channel._socket.dup()]
    with session._lock:
        session.forget()
        # The lock was the parent's.
        Background(session.close, "again").result()
    assert session.ended is not None
    assert session._stream.fileno() == channel._socket.fileno() == -1
    assert len(server.peers) == 2
    for sock in parents:
        # Somebody still listens at the other end.
        sock.settimeout(30)
        sock.sendall(b"\0")
        sock.close()
    with pytest.raises(ChannelLost, match="forked"):
        session.call("ping")


def test_a_session_is_read_only_if_the_server_says_so(server, session):
    assert not session.is_read_only
    server.hello = {"read_only": True}
    with session_of(server) as other:
        assert other.is_read_only


# What was missed


def test_an_incomplete_welcome_is_completed_on_the_stream(server):
    server.hello = {"last_tid": tid(5), "changes": [change(2), change(3)]}
    completed: list[int] = []
    with session_of(server) as session:
        heard = Heard()
        listening = Background(
            session.listen, heard, lambda: completed.append(len(heard.changes))
        )
        assert session.missed == [Change(*change(2)), Change(*change(3))]
        assert session.is_incomplete
        server.publish(change(4))
        wait_until(lambda: len(heard.changes) == 1, "a change")
        assert not completed
        server.publish(change(5), change(6))
        wait_until(lambda: completed, "the last of them")
        server.publish(change(7))
        wait_until(lambda: len(heard.changes) == 4, "one more")
        # Not before the position has them, and once.
        assert completed == [3]
        assert session.replayed == 5
        session.close("enough")
        listening.result()


@pytest.mark.parametrize(
    "changes",
    [[], None, [[tid(0), tid(1), [OID], None]]],
    ids=["none", "unknown", "all"],
)
def test_a_welcome_may_be_complete(server, changes):
    server.hello = {"changes": changes}
    with session_of(server) as session:
        assert not session.is_incomplete
        assert session.replayed == len(changes or ())


def test_a_session_that_ends_with_its_last_piece_is_never_complete(server):
    """The position found a gap, and nobody is to call it connected."""
    server.hello = {"last_tid": tid(3), "changes": [change(2)]}
    completed: list[bool] = []
    with session_of(server) as session:

        class Picky(Heard):
            def receive(self, source: Any, changes: list[Change]) -> None:
                source.close("a gap")

        listening = Background(session.listen, Picky(), lambda: completed.append(True))
        server.publish(change(3))
        assert listening.result() == "a gap"
        assert not completed
