"""Who keeps a storage connected: from one session to the next."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from ZODB.POSException import POSKeyError
from ZODB.utils import p64

from zeolith.client import connector as connector_module
from zeolith.client.cache import MemoryCache
from zeolith.client.connector import Arrival, Connector
from zeolith.client.dial import RETRY_FIRST_S, RETRY_MAX_S, delays
from zeolith.client.errors import ClientDisconnected
from zeolith.client.position import Position
from zeolith.client.session import Session
from zeolith.client.verification import Verified
from zeolith.protocol.codec import encode
from zeolith.protocol.errors import HelloRefused
from zeolith.protocol.limits import DEFAULT, Limits
from zeolith.protocol.messages import Goodbye, Welcome

from ..support.gates import Background
from ..support.script import (
    DATABASE_ID,
    IMPATIENT,
    Act,
    Held,
    Raw,
    ScriptedServer,
    refused_address,
    scripted,
    tid,
    welcome,
)
from ..support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

NO_STORAGE = HelloRefused("storage", "there is no storage 'main' here")
READ_ONLY = HelloRefused("read-only", "storage 'main' is read-only here")
# A test that waits for so long has failed before.
LONG_S = 1000


class Database:
    """What is registered with the position."""

    def __init__(self) -> None:
        self.told: list[bytes] = []
        self.error: Exception | None = None

    def invalidate(self, tid: bytes, _oids: list[bytes]) -> None:
        if self.error is not None:
            raise self.error
        self.told.append(tid)

    # The name is ZODB's.
    def invalidateCache(self) -> None:
        self.told.append(b"everything")


@contextmanager
def connecting(
    *addresses: Any,
    limits: Limits = DEFAULT,
    is_read_only: bool = False,
    falls_back: bool = False,
    on_session: Callable[[Session], None] = lambda session: None,
    position: Position | None = None,
) -> Iterator[Connector]:
    position = position or Position(MemoryCache())
    connector = Connector(
        list(addresses),
        position,
        position._cache,
        storage="main",
        label="web-1",
        is_read_only=is_read_only,
        falls_back=falls_back,
        limits=limits,
        tls=None,
        on_session=on_session,
    )
    connector.start()
    try:
        yield connector
    finally:
        connector.close()


def change(number: int) -> list[Any]:
    return [tid(number - 1), tid(number), [p64(1)], None]


def hellos_of_streams(server: ScriptedServer) -> list[dict[str, Any]]:
    return [each for each in server.hellos if each["kind"] == "stream"]


@pytest.fixture
def few_waits(monkeypatch) -> None:
    """Look for a server that takes writes all the time."""
    monkeypatch.setattr(connector_module, "UPGRADE_INTERVAL_S", 0.01)


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """How long the connector waited each time; it does not really."""
    waits: list[float] = []

    def counted() -> Iterator[float]:
        for delay_s in delays():
            waits.append(delay_s)
            yield 0.001

    monkeypatch.setattr(connector_module, "delays", counted)
    return waits


# A session


def test_a_session_is_there_soon(server):
    with connecting(server.address) as connector:
        session = connector.session(LONG_S)
        assert connector.current is session
        assert session.address == server.address
        (hello,) = server.hellos
        assert (hello["storage"], hello["label"]) == ("main", "web-1")
        assert (hello["read_only"], hello["position"]) == (False, None)
        assert hello["database_id"] is hello["epoch"] is None


def test_a_session_is_shown_when_it_was_adopted(server):
    """Whoever gets it finds position and interfaces of it."""
    server.last_tid = tid(7)
    seen: list[Any] = []
    position = Position(MemoryCache())

    def on_session(session: Session) -> None:
        seen.append((position.tid, connector.current, session))

    with connecting(
        server.address, position=position, on_session=on_session
    ) as connector:
        session = connector.session(LONG_S)
        assert seen == [(tid(7), None, session)]


def test_changes_of_the_stream_reach_the_position(server):
    position = Position(MemoryCache())
    with connecting(server.address, position=position) as connector:
        connector.session(LONG_S)
        server.publish(change(2), change(3))
        wait_until(lambda: position.tid == tid(3), "the changes")


def test_one_thread_serves_a_storage(server):
    with connecting(server.address) as connector:
        connector.session(LONG_S)
        names = [each.name for each in threading.enumerate()]
        assert names.count("zeolith-main") == 1


# No session


def test_a_refusal_is_told_at_once(server):
    server.hello = NO_STORAGE
    with connecting(server.address) as connector:
        asking = Background(connector.session, LONG_S)
        error = asking.error()
        assert isinstance(error, ClientDisconnected)
        assert "refused: there is no storage 'main' here" in str(error)
        assert "127.0.0.1" in str(error)
        assert isinstance(error.__cause__, HelloRefused)


def test_another_version_is_told_at_once(server):
    server.hello = HelloRefused("version", "this server speaks version 2")
    with connecting(server.address) as connector:
        asking = Background(connector.session, LONG_S)
        assert "version 2" in str(asking.error())


def test_a_refusal_is_not_for_ever(server):
    """Somebody adds the storage; nobody has to restart the client."""
    server.hello = NO_STORAGE
    with connecting(server.address) as connector:
        with pytest.raises(ClientDisconnected):
            connector.session(LONG_S)
        server.hello = None
        wait_until(lambda: connector.current, "a session")
        assert connector._cause is None


def test_a_server_that_stops_is_waited_for(server):
    server.hello = HelloRefused("stopping", "the server is stopping")
    with connecting(server.address) as connector:
        asking = Background(connector.session, LONG_S)
        wait_until(lambda: len(server.hellos) > 1, "a second attempt")
        server.hello = None
        assert asking.result() is connector.current


def test_without_a_server_the_cause_is_told_when_time_is_up():
    with connecting(refused_address()) as connector:
        wait_until(lambda: connector._cause, "an attempt")
        with pytest.raises(
            ClientDisconnected,
            match=r"no connection within 0\.01 s: Connection refused",
        ) as caught:
            connector.session(0.01)
        assert isinstance(caught.value.__cause__, ConnectionRefusedError)


def test_a_server_that_says_nothing_is_the_cause():
    with (
        scripted(hello=Act.FREEZE) as server,
        connecting(server.address, limits=IMPATIENT) as connector,
    ):
        wait_until(lambda: connector._cause, "an attempt")
        with pytest.raises(ClientDisconnected, match="did not answer the hello"):
            connector.session(0.01)


def test_before_any_attempt_there_is_no_cause(server):
    server.hello = Act.FREEZE
    with (
        connecting(server.address, limits=Limits(hello_timeout_s=1)) as connector,
        pytest.raises(ClientDisconnected, match=r"no connection within 0 s$"),
    ):
        connector.session(0)


@pytest.mark.parametrize(
    "hello",
    [
        Raw(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        Act.HANG_UP,
        {"last_tid": 17},
        # Nothing that a server should say here.
        POSKeyError(p64(1)),
    ],
)
def test_a_strange_server_is_tried_again(server, hello):
    server.hello = hello
    with connecting(server.address) as connector:
        wait_until(lambda: len(server.hellos) > 2, "more attempts")
        server.hello = None
        wait_until(lambda: connector.current, "a session")


def test_who_speaks_another_language_is_told_at_once(server):
    server.hello = Raw(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with connecting(server.address) as connector:
        asking = Background(connector.session, LONG_S)
        assert "refused: a frame of 1213486160 bytes" in str(asking.error())


def test_a_name_that_is_none_is_the_cause(server, caplog):
    """No resolver is asked; Python itself cannot encode it."""
    with connecting(("x" * 100, 8100)) as connector:
        wait_until(lambda: connector._cause, "an attempt")
        with pytest.raises(ClientDisconnected, match="label"):
            connector.session(0.01)
        connector.new_addresses([server.address])
        assert connector.session(LONG_S).ended is None


def test_of_several_addresses_one_that_answers_is_taken(server):
    away = refused_address()
    with connecting(away, server.address, away) as connector:
        assert connector.session(LONG_S).address == server.address


def test_the_text_names_all_addresses():
    away = [refused_address(), refused_address()]
    with connecting(*away) as connector:
        wait_until(lambda: connector._cause, "an attempt")
        with pytest.raises(ClientDisconnected) as caught:
            connector.session(0.01)
        for host, port in away:
            assert f"{host}:{port}" in str(caught.value)


# The next session


def test_a_lost_session_is_followed_by_another(server):
    position = Position(MemoryCache())
    with connecting(server.address, position=position) as connector:
        first = connector.session(LONG_S)
        server.publish(change(2))
        wait_until(lambda: position.tid == tid(2), "the change")
        server.streams()[0].goodbye("stopping", "for a rest")
        wait_until(lambda: connector.current not in (None, first), "the next session")
        assert first.ended
        assert "for a rest" in first.ended
        again = hellos_of_streams(server)[1]
        assert again["position"] == tid(2)
        assert (again["database_id"], again["epoch"]) == (DATABASE_ID, 1)


def test_a_server_that_comes_back_is_found(server):
    with connecting(server.address) as connector:
        first = connector.session(LONG_S)
        server.die()
        wait_until(lambda: first.ended, "the end of the session")
        wait_until(
            lambda: isinstance(connector._cause, ConnectionRefusedError), "an attempt"
        )
        with pytest.raises(ClientDisconnected, match="Connection refused"):
            connector.session(0.01)
        assert connector._position._source is None, "somebody may wait for the lost one"
        server.start()
        assert connector.session(LONG_S) is not first


def test_the_changes_that_were_missed_are_applied(server):
    position = Position(MemoryCache())
    database = Database()
    with connecting(server.address, position=position) as connector:
        connector.session(LONG_S)
        position.register(database)
        server.hello = {"last_tid": tid(3), "changes": [change(2), change(3)]}
        server.streams()[0].hang_up()
        wait_until(lambda: position.tid == tid(3), "the changes")
        assert database.told == [tid(2), tid(3)]


def test_a_server_that_forgot_us_makes_us_start_afresh(server):
    position = Position(MemoryCache())
    database = Database()
    with connecting(server.address, position=position) as connector:
        connector.session(LONG_S)
        position.register(database)
        server.hello = {"last_tid": tid(9), "changes": None}
        server.streams()[0].hang_up()
        wait_until(lambda: position.tid == tid(9), "the fresh start")
        assert database.told == [b"everything"]


def lose(server: ScriptedServer, **hello: Any) -> None:
    """The session is lost; the next hello is answered with ``hello``."""
    server.hello = hello
    server.streams()[0].hang_up()


def come_back(connector: Connector, server: ScriptedServer, **hello: Any) -> None:
    """The session is lost, and another one is there."""
    before = connector.current
    lose(server, **hello)
    wait_until(lambda: connector.current not in (None, before), "another session")


def test_a_session_is_current_when_all_that_was_missed_is_applied(server):
    """The welcome has only the first changes; the others come on the stream."""
    position = Position(MemoryCache())
    with connecting(server.address, position=position) as connector:
        first = connector.session(LONG_S)
        lose(server, last_tid=tid(5), changes=[change(2), change(3)])
        wait_until(lambda: position.tid == tid(3), "the first changes")
        assert connector.current is None
        with pytest.raises(ClientDisconnected):
            connector.session(0.01)
        server.publish(change(4))
        wait_until(lambda: position.tid == tid(4), "one more")
        assert connector.current is None
        server.publish(change(5), change(6))
        session = connector.session(LONG_S)
        assert session is not first
        assert position.tid == tid(6)
        assert connector.arrival is not None
        assert connector.arrival.replayed == 5


def test_a_session_that_is_lost_before_it_is_complete_never_was_one(server):
    sessions: list[Session] = []
    position = Position(MemoryCache())
    with connecting(
        server.address, position=position, on_session=sessions.append
    ) as connector:
        connector.session(LONG_S)
        lose(server, last_tid=tid(5), changes=[change(2)])
        wait_until(lambda: position.tid == tid(2), "the first changes")
        come_back(connector, server, last_tid=tid(2), changes=[])
        assert len(sessions) == 2
        assert server.hellos[-1]["position"] == tid(2)


def test_the_cache_is_verified_when_the_server_cannot_say_what_changed(server, caplog):
    position = Position(MemoryCache())
    database = Database()
    caplog.set_level("INFO")
    with connecting(server.address, position=position) as connector:
        connector.session(LONG_S)
        position.register(database)
        for n in (1, 2, 3):
            position._cache.store(p64(n), tid(1), None, b"data", tid(1))
        server.answers["verify"] = lambda revisions: [tid(9), [p64(2)]]
        come_back(connector, server, last_tid=tid(9), changes=None)
        assert database.told == [b"everything"]
        assert position.tid == tid(9)
        assert [
            position._cache.load(p64(n), tid(10)) is not None for n in (1, 2, 3)
        ] == [True, False, True]
        assert connector.arrival is not None
        assert connector.arrival.verified == (3, 1)
    assert "3 cached records verified, 1 of them dropped" in caplog.text


def test_changes_wait_while_the_cache_is_verified(server):
    position = Position(MemoryCache())
    database = Database()
    gate = threading.Event()
    with connecting(server.address, position=position) as connector:
        connector.session(LONG_S)
        position.register(database)
        position._cache.store(p64(1), tid(1), None, b"data", tid(1))
        server.answers["verify"] = Held(gate, [tid(9), []])
        lose(server, last_tid=tid(9), changes=None)
        server.wait_for("verify")
        server.publish(change(10))
        wait_until(lambda: bool(position._pending), "the change")
        assert position.tid == tid(1)
        assert connector.current is None
        gate.set()
        wait_until(lambda: connector.current is not None, "a session")
        assert position.tid == tid(10)
        assert database.told == [b"everything", tid(10)]


def test_a_session_that_is_lost_while_it_verifies_is_followed_by_another(server):
    """Which knows what has changed, and the cache is as it was."""
    position = Position(MemoryCache())
    database = Database()
    gate = threading.Event()
    with connecting(server.address, position=position) as connector:
        connector.session(LONG_S)
        position.register(database)
        position._cache.store(p64(2), tid(1), None, b"data", tid(1))
        server.answers["verify"] = Held(gate, [tid(9), []])
        lose(server, last_tid=tid(9), changes=None)
        server.wait_for("verify")
        come_back(connector, server, last_tid=tid(3), changes=[change(2), change(3)])
        gate.set()
        assert position.tid == tid(3)
        assert database.told == [tid(2), tid(3)]
        assert position._cache.load(p64(2), tid(4)) is not None


def test_a_verification_that_comes_to_nothing_drops_everything(server, caplog):
    position = Position(MemoryCache())
    database = Database()
    with connecting(server.address, position=position) as connector:
        connector.session(LONG_S)
        position.register(database)
        position._cache.store(p64(1), tid(1), None, b"data", tid(1))
        server.answers["verify"] = POSKeyError(p64(1))
        come_back(connector, server, last_tid=tid(9), changes=None)
        assert database.told == [b"everything"]
        assert position.tid == tid(9)
        assert position._cache.load(p64(1), tid(10)) is None
        server.publish(change(10))
        wait_until(lambda: position.tid == tid(10), "the next change")
    assert "nothing could be verified" in caplog.text


def test_a_database_that_takes_no_news_of_a_verification_ends_the_session(
    server, caplog, monkeypatch
):
    monkeypatch.setattr(connector_module, "RETRY_MAX_S", 0.01)
    position = Position(MemoryCache())

    class Deaf(Database):
        deaf = 3

        # The name is ZODB's.
        def invalidateCache(self) -> None:
            self.deaf -= 1
            if self.deaf > 0:
                raise RuntimeError("out of order")

    with connecting(server.address, position=position) as connector:
        connector.session(LONG_S)
        position.register(Deaf())
        position._cache.store(p64(1), tid(1), None, b"data", tid(1))
        come_back(connector, server, last_tid=tid(9), changes=None)
        assert position.tid == tid(9)
    assert "out of order" in caplog.text


def test_a_session_that_is_ready_too_late_replaces_nobody(server):
    """It was lost in the last moment of its verification."""
    sessions: list[Session] = []
    may_go_on = threading.Event()

    def take(session: Session) -> None:
        sessions.append(session)
        if threading.current_thread().name.endswith("-verify"):
            assert may_go_on.wait(LONG_S)

    position = Position(MemoryCache())
    with connecting(server.address, position=position, on_session=take) as connector:
        connector.session(LONG_S)
        lose(server, last_tid=tid(9), changes=None)
        wait_until(lambda: len(sessions) == 2, "the end of the verification")
        lose(server, last_tid=tid(9), changes=[])
        wait_until(lambda: len(sessions) == 3, "another session")
        assert connector.session(LONG_S) is sessions[2]
        may_go_on.set()
        names = [f"zeolith-{connector._storage}-verify"]
        wait_until(
            lambda: not [t for t in threading.enumerate() if t.name in names],
            "the end of the thread",
        )
        assert connector.current is sessions[2]


def test_whoever_cannot_take_a_verified_session_ends_it(server, caplog):
    sessions: list[Session] = []

    def take(session: Session) -> None:
        sessions.append(session)
        if len(sessions) == 2:
            raise RuntimeError("out of order")

    position = Position(MemoryCache())
    with connecting(server.address, position=position, on_session=take) as connector:
        connector.session(LONG_S)
        position._cache.store(p64(1), tid(1), None, b"data", tid(1))
        lose(server, last_tid=tid(9), changes=None)
        wait_until(lambda: len(sessions) == 3, "another attempt")
        wait_until(lambda: connector.current is sessions[2], "a session")
        assert position.tid == tid(9)
    assert "out of order" in caplog.text


def test_after_a_restore_the_next_hello_is_from_what_is_left(server):
    position = Position(MemoryCache())
    database = Database()
    with connecting(server.address, position=position) as connector:
        connector.session(LONG_S)
        position.register(database)
        server.publish(change(2), change(3), change(4))
        wait_until(lambda: position.tid == tid(4), "the changes")
        server.answers["last_known"] = [tid(2), bytes(8)]
        answers = iter(
            [
                {"last_tid": tid(2), "changes": None},
                {
                    "last_tid": tid(9),
                    "changes": [[tid(2), tid(9), [p64(7)], None]],
                },
            ]
        )
        before = connector.current
        server.hello = lambda: next(answers)
        server.streams()[0].hang_up()
        wait_until(lambda: connector.current not in (None, before), "a session")
        assert hellos_of_streams(server)[-1]["position"] == tid(2)
        assert position.tid == tid(9)
        assert database.told[3:] == [b"everything", tid(9)]


def test_another_database_is_not_asked_for_our_revisions(server):
    position = Position(MemoryCache())
    with connecting(server.address, position=position) as connector:
        connector.session(LONG_S)
        position._cache.store(p64(1), tid(1), None, b"data", tid(1))
        come_back(
            connector,
            server,
            last_tid=tid(9),
            changes=None,
            database_id=b"another-database",
        )
        assert position.tid == tid(9)
        assert position._cache.load(p64(1), tid(10)) is None
        assert server.asked("verify") == server.asked("last_known") == []


def test_closing_in_the_middle_of_a_verification_ends_it(server):
    position = Position(MemoryCache())
    with connecting(server.address, position=position) as connector:
        connector.session(LONG_S)
        position._cache.store(p64(1), tid(1), None, b"data", tid(1))
        server.answers["verify"] = Act.SILENCE
        lose(server, last_tid=tid(9), changes=None)
        server.wait_for("verify")
    # The fixture waits for the end of its thread.
    assert connector.current is None


def test_a_new_address_ends_a_verification(server):
    position = Position(MemoryCache())
    with scripted() as other, connecting(server.address, position=position) as one:
        one.session(LONG_S)
        position._cache.store(p64(1), tid(1), None, b"data", tid(1))
        server.answers["verify"] = Act.SILENCE
        lose(server, last_tid=tid(9), changes=None)
        server.wait_for("verify")
        one.new_addresses([other.address])
        assert one.session(LONG_S).address == other.address


def test_it_is_told_how_long_it_took_to_be_ready(server, caplog):
    caplog.set_level("INFO")
    with connecting(server.address) as connector:
        connector.session(LONG_S)
        arrival = connector.arrival
        assert arrival is not None
        assert arrival.took_s > 0
        host, port = server.address
        assert arrival.describe() == {
            "address": f"{host}:{port}",
            "read_only": False,
            "ready_s": arrival.took_s,
            "changes_replayed": 0,
            "records_verified": 0,
            "records_dropped": 0,
        }
    assert f"storage main: connected to {host}:{port} in " in caplog.text


@pytest.mark.parametrize(
    ("arrival", "text"),
    [
        (Arrival(("h", 1), False, 0.0124, 0, None), "h:1 in 12 ms"),
        (Arrival(("h", 1), True, 0.5, 0, None), "h:1 (read-only) in 500 ms"),
        (
            Arrival(("h", 1), False, 2.0, 1000, None),
            "h:1 in 2000 ms, 1000 changes replayed",
        ),
        (
            Arrival("/s", False, 0.0, 0, Verified(7, 2)),
            "/s in 0 ms, 7 cached records verified, 2 of them dropped",
        ),
    ],
)
def test_how_it_connected_is_told_in_a_line(arrival, text):
    assert str(arrival) == text


def test_attempts_become_rarer(waits):
    with connecting(refused_address()):
        wait_until(lambda: len(waits) > 20, "many attempts")
    assert waits[0] < RETRY_MAX_S / 10
    assert all(wait >= RETRY_MAX_S / 2 for wait in waits[10:])


def test_a_server_that_accepts_and_drops_us_is_not_hurried(server, waits):
    goodbye = encode(Goodbye("stopping", "at once"))
    server.hello = Raw(encode(Welcome(welcome(session=bytes(16)))) + goodbye)
    with connecting(server.address) as connector:
        wait_until(lambda: len(server.hellos) > 20, "many attempts")
        assert len(waits) >= len(server.hellos) - 2
        # While it is welcomed again, there is no cause.
        wait_until(lambda: "at once" in str(connector._cause), "the cause")
    assert all(wait >= RETRY_MAX_S / 2 for wait in waits[10:])


def has_waited(waits: list[float], times: int) -> bool:
    return len(waits) == times


@pytest.mark.parametrize("call", ["a call", "a borrowed channel"])
def test_after_a_session_that_was_of_use_the_wait_is_short(server, waits, call):
    """A bad network cuts good sessions; each is a new beginning."""
    server.answers["ping"] = None
    with connecting(server.address) as connector:
        for count in range(1, 12):
            session = connector.session(LONG_S)
            if call == "a call":
                session.call("ping")
            else:
                channel = session.borrow()
                channel.call("ping")
                session.give_back(channel)
            server.streams()[-1].hang_up()
            wait_until(partial(getattr, session, "ended"), "the end of the session")
            wait_until(partial(has_waited, waits, count), "the wait")
    # The last one served nobody.
    assert max(waits[:11]) <= RETRY_FIRST_S


def test_after_a_long_session_there_is_no_wait(server, waits, monkeypatch):
    with connecting(server.address) as connector:
        for _ in range(3):
            session = connector.session(LONG_S)
            monkeypatch.setattr(connector_module, "RETRY_MAX_S", -1)
            server.streams()[-1].hang_up()
            wait_until(partial(getattr, session, "ended"), "the end of the session")
        connector.session(LONG_S)
        assert waits == []


def test_a_database_that_takes_no_invalidation_does_not_leave_us_alone(
    server, monkeypatch, caplog
):
    monkeypatch.setattr(connector_module, "RETRY_MAX_S", 0.01)
    position = Position(MemoryCache())
    database = Database()
    with connecting(server.address, position=position) as connector:
        first = connector.session(LONG_S)
        position.register(database)
        database.error = RuntimeError("out of order")
        server.publish(change(2))
        wait_until(lambda: first.ended, "the end of the session")
        assert "out of order" in caplog.text
        assert position.tid == tid(1)
        database.error = None
        server.hello = {"last_tid": tid(2), "changes": [change(2)]}
        wait_until(lambda: position.tid == tid(2), "the change, once more")
        assert connector.session(LONG_S) is not first


# A read-only fallback


def read_only_server(server: ScriptedServer) -> None:
    """Make it refuse who wants to write."""

    def hello() -> Any:
        return {"read_only": True} if server.hellos[-1]["read_only"] else READ_ONLY

    server.hello = hello


def test_without_a_fallback_a_read_only_server_refuses(server):
    read_only_server(server)
    with (
        connecting(server.address) as connector,
        pytest.raises(ClientDisconnected, match="is read-only here"),
    ):
        connector.session(LONG_S)


def test_a_fallback_takes_a_read_only_server(server):
    read_only_server(server)
    with connecting(server.address, falls_back=True) as connector:
        assert connector.session(LONG_S).is_read_only
        asked = [each["read_only"] for each in hellos_of_streams(server)[:2]]
        assert asked == [False, True]


def test_a_fallback_is_for_read_only_servers_alone(server):
    server.hello = NO_STORAGE
    with connecting(server.address, falls_back=True) as connector:
        with pytest.raises(ClientDisconnected, match="no storage 'main'"):
            connector.session(LONG_S)
        assert not any(each["read_only"] for each in server.hellos)


def test_a_writable_server_is_preferred(server):
    with scripted() as writable:
        read_only_server(server)
        addresses = [server.address, writable.address]
        with connecting(*addresses, falls_back=True) as connector:
            session = connector.session(LONG_S)
            assert session.address == writable.address
            assert not session.is_read_only


def test_a_fallback_ends_when_a_writable_server_is_there(few_waits, server):
    read_only_server(server)
    with scripted() as writable:
        writable.refuse()
        addresses = [server.address, writable.address]
        with connecting(*addresses, falls_back=True) as connector:
            fallback = connector.session(LONG_S)
            assert fallback.is_read_only
            writable.start()
            wait_until(
                lambda: connector.current not in (None, fallback), "a better session"
            )
            better = connector.session(LONG_S)
            assert better.address == writable.address
            assert not better.is_read_only
            assert fallback.ended == "a server that takes writes is there again"
            wait_until(lambda: not server.streams(), "the end of the fallback")
            assert len(writable.streams()) == 1


def test_the_change_to_a_better_server_misses_nothing(few_waits, server):
    """What the better one said after its welcome, before anybody listened to it."""
    position = Position(MemoryCache())
    read_only_server(server)
    with scripted() as writable:
        writable.refuse()
        addresses = [server.address, writable.address]
        with connecting(*addresses, falls_back=True, position=position) as connector:
            fallback = connector.session(LONG_S)
            is_closing, go_on = threading.Event(), threading.Event()
            close = fallback.close

            def late(reason: str) -> None:
                is_closing.set()
                assert go_on.wait(30)
                close(reason)

            fallback.close = late  # type: ignore[method-assign]
            writable.start()
            assert is_closing.wait(30)
            server.publish(change(2))
            writable.publish(change(2))
            wait_until(lambda: position.tid == tid(2), "the change")
            writable.publish(change(3))
            go_on.set()
            wait_until(lambda: position.tid == tid(3), "the next change")
            assert connector.session(LONG_S).address == writable.address


def test_who_wants_only_to_read_does_not_look_for_a_better_server(few_waits, server):
    server.hello = {"read_only": True}
    with connecting(server.address, is_read_only=True, falls_back=True) as connector:
        connector.session(LONG_S)
        names = [each.name for each in threading.enumerate()]
        assert "zeolith-main-upgrade" not in names
        assert server.hellos[0]["read_only"]


def test_closing_a_fallback_ends_the_search(server):
    """It is in its pause; nobody is dialled any more."""
    read_only_server(server)
    with connecting(server.address, falls_back=True) as connector:
        connector.session(LONG_S)
        connector.close()
        wait_until(lambda: not searches(), "the end of the search")
        assert len(server.hellos) == 2


def searches() -> int:
    names = [each.name for each in threading.enumerate()]
    return names.count("zeolith-main-upgrade")


def test_a_search_that_is_not_needed_any_more_asks_nobody(server, monkeypatch):
    """It is in its pause when the next session, a writable one, begins."""
    monkeypatch.setattr(connector_module, "UPGRADE_INTERVAL_S", LONG_S)
    read_only_server(server)
    with connecting(server.address, falls_back=True) as connector:
        connector.session(LONG_S)
        server.hello = None
        server.streams()[0].hang_up()
        wait_until(lambda: not searches(), "the end of the search")
        assert not connector.session(LONG_S).is_read_only
        asked = [each["read_only"] for each in hellos_of_streams(server)]
        assert asked == [False, True, False]


def test_a_search_that_finds_something_too_late_lets_it_go(few_waits, server):
    """The storage was closed while the server thought about it."""
    read_only_server(server)
    accept = threading.Event()
    with scripted() as writable:
        writable.hello = Held(accept)
        with connecting(server.address, falls_back=True) as connector:
            connector.session(LONG_S)
            connector.new_addresses([server.address, writable.address])
            wait_until(lambda: writable.hellos, "the search asks the writable server")
            connector.close()
            accept.set()
            wait_until(lambda: not writable.peers, "the end of what was found late")
            assert connector._better is None


def test_a_fallback_that_is_lost_takes_its_search_along(few_waits, server):
    """One that had just found something must leave nothing open."""
    read_only_server(server)
    accept = threading.Event()
    with scripted() as writable:
        writable.hello = Held(accept)
        with connecting(server.address, falls_back=True) as connector:
            first = connector.session(LONG_S)
            connector.new_addresses([server.address, writable.address])
            wait_until(lambda: writable.hellos, "the search asks the writable server")
            # Only the search asks it; who follows the fallback is not held up.
            connector.new_addresses([server.address])
            server.streams()[0].hang_up()
            wait_until(
                lambda: connector.current not in (None, first), "another fallback"
            )
            second = connector.current
            accept.set()
            wait_until(lambda: not writable.peers, "the end of what was found late")
            assert connector.current is second
            assert connector._better is None


# New addresses


def test_a_new_address_is_followed(server):
    with scripted() as other, connecting(server.address) as connector:
        connector.session(LONG_S)
        connector.new_addresses([other.address])
        wait_until(lambda: other.streams(), "the stream at the new address")
        wait_until(lambda: not server.streams(), "the end of the old one")
        assert connector.session(LONG_S).address == other.address


def test_a_session_at_one_of_the_new_addresses_goes_on(server):
    with connecting(server.address) as connector:
        session = connector.session(LONG_S)
        connector.new_addresses([refused_address(), server.address])
        assert connector.session(LONG_S) is session
        assert session.ended is None


def test_a_new_address_is_tried_at_once(server, monkeypatch):
    def for_ever() -> Iterator[float]:
        while True:
            yield LONG_S

    monkeypatch.setattr(connector_module, "delays", for_ever)
    with connecting(refused_address()) as connector:
        wait_until(lambda: connector._cause, "an attempt")
        connector.new_addresses([server.address])
        assert connector.session(LONG_S).address == server.address


def test_a_new_address_ends_a_refusal(server):
    with (
        scripted(hello=NO_STORAGE) as other,
        connecting(other.address) as connector,
    ):
        with pytest.raises(ClientDisconnected):
            connector.session(LONG_S)
        connector.new_addresses([server.address])
        assert connector.session(LONG_S).address == server.address


def test_an_old_address_that_answers_late_is_not_taken(server):
    accept = threading.Event()
    with scripted(hello=Held(accept)) as late, connecting(late.address) as connector:
        wait_until(lambda: late.hellos, "the hello at the old address")
        connector.new_addresses([server.address])
        accept.set()
        wait_until(lambda: server.streams(), "the stream at the new address")
        wait_until(lambda: not late.streams(), "the end of the old one")
        assert connector.session(LONG_S).address == server.address


# The end


def test_closing_ends_session_and_thread(server):
    with connecting(server.address) as connector:
        session = connector.session(LONG_S)
        connector.close()
        assert session.ended == "the storage is closed"
        assert connector.current is None
        wait_until(lambda: not server.peers, "the end of the stream")
        assert "zeolith-main" not in [each.name for each in threading.enumerate()]


def test_after_closing_there_is_no_session(server):
    with connecting(server.address) as connector:
        connector.session(LONG_S)
        connector.close()
        with pytest.raises(ClientDisconnected, match="the storage is closed"):
            connector.session(LONG_S)
        assert len(server.hellos) == 1


def test_closing_wakes_who_waits_for_a_session():
    with connecting(refused_address()) as connector:
        asking = Background(connector.session, LONG_S)
        assert not asking.returns_soon()
        connector.close()
        assert "the storage is closed" in str(asking.error())


def test_closing_in_the_middle_of_a_dial_leaves_no_session(monkeypatch):
    monkeypatch.setattr(connector_module, "CLOSE_TIMEOUT_S", 0.01)
    accept = threading.Event()
    with (
        scripted(hello=Held(accept)) as server,
        connecting(server.address) as connector,
    ):
        wait_until(lambda: server.hellos, "the hello")
        connector.close()
        accept.set()
        wait_until(lambda: not server.peers, "the end of the stream")
        assert connector.current is None


def test_closing_twice_does_no_harm(server):
    with connecting(server.address) as connector:
        connector.session(LONG_S)
        connector.close()
        connector.close()


def test_closing_lets_go_of_a_better_session_that_waits(few_waits, server):
    """It was found, and the fallback is at its end, but not ended yet."""
    read_only_server(server)
    with scripted() as writable:
        writable.refuse()
        addresses = [server.address, writable.address]
        with connecting(*addresses, falls_back=True) as connector:
            fallback = connector.session(LONG_S)
            is_closing, go_on = threading.Event(), threading.Event()
            close = fallback.close

            def late(reason: str) -> None:
                if reason == "a server that takes writes is there again":
                    is_closing.set()
                    assert go_on.wait(30)
                close(reason)

            fallback.close = late  # type: ignore[method-assign]
            writable.start()
            assert is_closing.wait(30)
            connector.close()
            wait_until(lambda: not writable.peers, "the end of the better session")
            go_on.set()


def test_the_thread_itself_may_close(server, caplog):
    """A database that is told of a change may be at its end."""
    is_known = threading.Event()

    def close(_session: Session) -> None:
        assert is_known.wait(LONG_S)
        connector.close()

    with connecting(server.address, on_session=close) as connector:
        is_known.set()
        wait_until(lambda: server.hellos and not server.peers, "the end")
        assert connector.current is None
    assert not [each for each in caplog.records if each.levelname == "ERROR"]


def test_a_forked_child_connects_when_it_needs_to(server):
    """There the thread of the parent does not run; here it is ended beforehand."""
    with connecting(server.address) as connector:
        parents = connector.session(LONG_S)
        connector.close()
        assert connector._thread
        connector._is_closed = False
        has_lock, may_end = threading.Event(), threading.Event()

        def hold() -> None:
            with connector._changed:
                has_lock.set()
                may_end.wait()

        holder = Background(hold)
        has_lock.wait()
        connector.forget()
        assert connector.current is None
        assert len(server.hellos) == 1, "nobody asked for a session yet"
        assert connector.session(LONG_S) is not parents
        may_end.set()
        holder.result()


def test_a_forked_child_lets_go_of_the_parents_sessions(server):
    cache = MemoryCache()
    connector = Connector(
        [server.address],
        Position(cache),
        cache,
        storage="main",
        label=None,
        is_read_only=False,
        falls_back=False,
        limits=DEFAULT,
        tls=None,
        on_session=lambda session: None,
    )
    sessions = [connector._dial(), connector._dial()]
    connector._adopted, connector._better = sessions
    connector.forget()
    assert [each.ended for each in sessions] == ["the process was forked"] * 2
    assert connector._current is connector._better is None


def test_a_closed_storage_stays_closed_in_a_forked_child(server):
    with connecting(server.address) as connector:
        connector.session(LONG_S)
        connector.close()
        connector.forget()
        with pytest.raises(ClientDisconnected, match="the storage is closed"):
            connector.session(LONG_S)
