"""Coming back after a long absence: nothing stale, and nothing right is dropped."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import transaction
from persistent.mapping import PersistentMapping
from ZODB.DB import DB

from zeolith.client.storage import ClientStorage
from zeolith.client.tids import following
from zeolith.protocol.limits import DEFAULT
from zeolith.storage import filestore

from ..support.gates import Gate
from ..support.inprocess import InProcessServer, client_of, serving
from ..support.proxy import Proxy, proxied
from ..support.records import commit, oid_of, seen, wait_for_position
from ..support.serving import ServerProcess
from ..support.waiting import wait_until

OBJECTS = 50


@pytest.fixture(autouse=True)
def short_memory(monkeypatch) -> None:
    """A server that starts knows only its last change."""
    monkeypatch.setattr(filestore, "CHANGES_READ_MAX", 2)


class Application:
    """A ZODB connection with many objects in memory."""

    def __init__(self, storage: ClientStorage):
        self.storage = storage
        self._manager = transaction.TransactionManager()
        self._db = DB(storage)
        self._connection = self._db.open(self._manager)
        self._manager.begin()
        root = self._connection.root()
        for n in range(OBJECTS):
            root[n] = PersistentMapping({"value": 0})
        self._manager.commit()
        self.objects = [root[n] for n in range(OBJECTS)]
        self._manager.begin()
        self.values()

    def begin(self) -> None:
        self._manager.begin()

    def values(self) -> list[int]:
        return [each["value"] for each in self.objects]

    def ghosts(self) -> list[int]:
        return [n for n, each in enumerate(self.objects) if each._p_changed is None]

    def close(self) -> None:
        self._manager.abort()
        self._db.close()


@pytest.fixture
def application(reader: ClientStorage) -> Iterator[Application]:
    application = Application(reader)
    yield application
    application.close()


@contextmanager
def writing(server: InProcessServer) -> Iterator[Any]:
    """A function that changes objects, one transaction for each."""
    with client_of(server) as storage:
        db = DB(storage)

        def change(*numbers: int) -> None:
            for n in numbers:
                with db.transaction() as connection:
                    connection.root()[n]["value"] += 1

        yield change
        db.close()


def leave(storage: ClientStorage, proxy: Proxy) -> None:
    proxy.refuse()
    proxy.cut()
    wait_until(lambda: not storage.is_connected(), "the loss")


def come_back(storage: ClientStorage, proxy: Proxy) -> dict[str, Any]:
    proxy.restore()
    wait_until(storage.is_connected, "the return")
    info = storage.connection_info()
    assert info is not None
    return info


def loads(server: InProcessServer) -> int:
    return int(server.on_loop(lambda: server.served.counters.loads))


def counter(server: InProcessServer, name: str) -> int:
    return int(server.on_loop(lambda: getattr(server.served.counters, name)))


def test_only_what_changed_long_ago_is_loaded_again(server, reader, proxy, application):
    """The server was started since, and remembers next to nothing."""
    leave(reader, proxy)
    with writing(server) as change:
        change(3, 7, 7, 3, 12)
    server.restart()
    with writing(server) as change:
        change(12)
    info = come_back(reader, proxy)
    assert info["changes_replayed"] == 6
    assert info["records_verified"] == 0
    assert counter(server, "replays") == 1
    before = loads(server)
    application.begin()
    assert application.ghosts() == [3, 7, 12]
    expected = [0] * OBJECTS
    expected[3] = expected[7] = expected[12] = 2
    assert application.values() == expected
    assert loads(server) == before + 3


def test_what_a_snapshot_of_before_needs_is_still_there(
    server, reader, proxy, application
):
    """Ranges were closed, each at its own end, not dropped."""
    oid = application.objects[3]._p_oid
    before = reader.lastTransaction()
    leave(reader, proxy)
    with writing(server) as change:
        change(7, 3, 3)
    server.restart()
    come_back(reader, proxy)
    found = reader.cache.load(oid, following(before))
    assert found is not None
    _data, _tid, end = found
    assert end is not None
    assert before < end < reader.lastTransaction()


def test_after_a_pack_what_is_right_is_kept(server, reader, proxy, application):
    """Nobody knows what changed; every cached record is asked about, once."""
    leave(reader, proxy)
    with writing(server) as change:
        change(3, 7, 7, 3)
    server.database.pack(time.time() + 1)
    server.restart()
    with writing(server) as change:
        change(12)
    info = come_back(reader, proxy)
    assert info["records_verified"] >= OBJECTS
    assert info["records_dropped"] == 3
    before = loads(server)
    application.begin()
    expected = [0] * OBJECTS
    expected[3] = expected[7] = 2
    expected[12] = 1
    assert application.values() == expected
    assert loads(server) == before + 3


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("way", ["changes_before", "outdated"])
def test_commits_while_the_log_is_read_or_the_cache_verified_are_seen(
    server, reader, proxy, application, gate: Gate, way: str, side: str
):
    leave(reader, proxy)
    with writing(server) as change:
        change(1, 2)
        if way == "outdated":
            # Nobody can say any more what changed.
            server.database.pack(time.time() + 1)
        server.restart()
        wait_until(lambda: server.status()["sessions"], "the writer")
        asked = getattr(server.database, way)
        setattr(server.database, way, getattr(gate, side)(asked))
        gate.shut()
        proxy.restore()
        gate.wait_until_reached()
        # Nobody waits for it but who has come back.
        change(2, 3, 3)
        assert not reader.is_connected()
        gate.open()
        wait_until(reader.is_connected, "the return")
        change(4)
        last = server.on_loop(lambda: server.served.changes.last_tid)
        wait_for_position(reader, last)
    application.begin()
    assert application.values()[:6] == [0, 1, 2, 2, 1, 0]


def test_what_is_cached_is_served_while_the_log_is_read(
    server, reader, proxy, application, gate: Gate
):
    leave(reader, proxy)
    with writing(server) as change:
        change(1, 2, 3)
    server.restart()
    server.database.changes_before = gate.before(server.database.changes_before)
    gate.shut()
    proxy.restore()
    gate.wait_until_reached()
    application.begin()
    assert application.values() == [0] * OBJECTS
    gate.open()
    wait_until(reader.is_connected, "the return")


def test_a_reading_that_outlasts_a_hello_serves_the_next_one(tmp_path, gate: Gate):
    """Or a client on a slow disk would begin anew for ever."""
    limits = replace(DEFAULT, hello_timeout_s=0.2)
    with (
        serving(tmp_path / "Data.fs", limits=limits) as server,
        proxied(server.address) as proxy,
        client_of(server, addr=proxy.address) as away,
        client_of(server) as writer,
    ):
        commit(writer, x=b"0")
        leave(away, proxy)
        tids = [commit(writer, x=b"%d" % n) for n in range(1, 5)]
        server.restart()
        readings: list[int] = []
        database: Any = server.database
        read = gate.before(database.changes_before)

        def counted(*args: Any) -> Any:
            readings.append(1)
            return read(*args)

        database.changes_before = counted
        gate.shut()
        proxy.restore()
        gate.wait_until_reached()
        wait_until(
            lambda: "no hello in time" in str(away._connector._cause), "the time-out"
        )
        gate.open()
        wait_until(away.is_connected, "the return")
        assert away.lastTransaction() == tids[-1]
        assert len(readings) == 1


def test_a_log_that_is_too_long_is_not_read(server, reader, proxy, application):
    leave(reader, proxy)
    with writing(server) as change:
        change(3, 7, 12)
    server.restart()
    server.on_loop(setattr, server.served.replays, "bytes_max", 0)
    info = come_back(reader, proxy)
    assert info["records_dropped"] == 3
    assert counter(server, "replays") == 0
    application.begin()
    assert sum(application.values()) == 3


def test_many_changes_come_in_pieces_and_all_are_seen(
    server, reader, proxy, application, monkeypatch
):
    leave(reader, proxy)
    with writing(server) as change:
        change(*range(40))
    server.restart()
    limits = server.on_loop(lambda: server.served._limits)
    small = type(limits)(notice_changes_max=3)
    server.on_loop(setattr, server.served, "_limits", small)
    info = come_back(reader, proxy)
    assert info["changes_replayed"] == 40
    application.begin()
    assert application.values() == [1] * 40 + [0] * 10


def test_many_clients_that_come_back_together_share_the_reading(server, proxy):
    with client_of(server) as writer:
        commit(writer, x=b"0")
        clients = [ClientStorage(proxy.address) for _ in range(20)]
        try:
            for storage in clients:
                assert seen(storage, "x") == b"0"
            proxy.refuse()
            proxy.cut()
            tids = [commit(writer, x=b"%d" % n, y=b"y") for n in range(10)]
            server.restart()
            readings: list[int] = []
            database: Any = server.database
            read = database.changes_before

            def counted(*args: Any) -> Any:
                readings.append(1)
                return read(*args)

            database.changes_before = counted
            proxy.restore()
            for storage in clients:
                wait_until(storage.is_connected, "the return")
                assert storage.lastTransaction() == tids[-1]
                assert seen(storage, "x") == b"9"
            assert len(readings) <= 3
        finally:
            for storage in clients:
                storage.close()


def test_an_answer_to_a_load_of_before_is_not_kept(server, reader, proxy):
    """A load that was on its way when the connection was lost is not kept."""
    commit(reader, x=b"old")
    before = reader.lastTransaction()
    reader.cache.forget(oid_of("x"))
    history = reader.cache.history
    leave(reader, proxy)
    with client_of(server) as writer:
        commit(writer, x=b"new")
        server.database.pack(time.time() + 1, gc=False)
        server.restart()
        proxy.restore()
        wait_until(reader.is_connected, "the return")
        reader.cache.store(oid_of("x"), before, None, b"old", before, history)
        assert seen(reader, "x") == b"new"


def test_after_more_than_a_thousand_transactions_nothing_is_dropped(tmp_path):
    """With real processes: the server was killed, and reads only its last changes."""
    with ServerProcess(tmp_path) as server:
        away = ClientStorage(server.address, wait_timeout=60)
        writer = ClientStorage(server.address, wait_timeout=60)
        try:
            commit(away, x=b"kept", y=b"changed")
            assert seen(away, "x") == b"kept"
            stopped = threading.Event()
            session = away.current_session
            assert session is not None
            # It does not come back before it is told to.
            dial = away._connector._dial

            def wait_and_dial() -> Any:
                assert stopped.wait(60)
                return dial()

            away._connector._dial = wait_and_dial  # type: ignore[method-assign]
            session.close("the test")
            for n in range(1100):
                commit(writer, y=b"%d" % n)
            server.kill()
            server.start()
            stopped.set()
            wait_until(away.is_connected, "the return")
            info = away.connection_info()
            assert info is not None
            assert info["changes_replayed"] == 1100
            status = away.server_status()["storages"]["1"]
            assert status["counters"]["replays"] == 1
            assert seen(away, "x") == b"kept"
            assert seen(away, "y") == b"1099"
            loads = away.server_status()["storages"]["1"]["counters"]["loads"]
            assert loads - status["counters"]["loads"] == 1
        finally:
            away.close()
            writer.close()
