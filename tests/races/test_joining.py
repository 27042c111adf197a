"""Changes that happen while a client comes, comes back, or moves to another server."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from ZODB.POSException import ReadOnlyError

from zeolith.client import connector, dial
from zeolith.client.changes import Change
from zeolith.client.errors import ClientDisconnected
from zeolith.client.storage import ClientStorage
from zeolith.storage.changes import Changes
from zeolith.storage.filestore import FileStore

from ..support import inprocess
from ..support.gates import WAIT_S
from ..support.inprocess import InProcessServer, client_of
from ..support.model import publish
from ..support.proxy import Direction, Proxy, proxied
from ..support.records import (
    Listening,
    commit,
    oid_of,
    seen,
    vote,
    wait_for_position,
)
from ..support.waiting import wait_until

X = oid_of("x")


@pytest.fixture(autouse=True)
def readers_cache(in_memory_and_on_disk: dict[str, Any], monkeypatch) -> None:
    """Where those that come cache: those who write are other clients, in memory."""

    def options(options: dict[str, Any]) -> dict[str, Any]:
        return {**in_memory_and_on_disk, **options} if options else {}

    monkeypatch.setitem(
        globals(),
        "client_of",
        lambda server, **given: inprocess.client_of(server, **options(given)),
    )


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as closing:
        yield closing


def send_away(reader: ClientStorage, proxy: Proxy) -> None:
    """The client loses its server and does not find it again until `proxy.restore`."""
    proxy.refuse()
    proxy.cut()
    wait_until(lambda: not reader.is_connected(), "the loss of the connection")


def come_back(reader: ClientStorage, proxy: Proxy) -> None:
    proxy.restore()
    wait_until(reader.is_connected, "a new connection")


# Coming


@pytest.mark.parametrize("changes", [1, 5])
def test_changes_right_behind_the_welcome_are_not_lost(
    server, proxy, writer, changes: int
):
    """Welcome and changes arrive in one piece, before anybody listens."""
    commit(writer, x=b"old")
    proxy.stall(Direction.TO_CLIENT)
    with client_of(server, addr=proxy.address, wait=False) as reader:
        wait_until(lambda: server.status()["sessions"] == 2, "the second session")
        database = Listening()
        reader.registerDB(database)
        tids = [commit(writer, x=b"%d" % n) for n in range(changes)]
        proxy.restore()
        wait_for_position(reader, tids[-1])
        assert database.tids == tids
        assert seen(reader, "x") == b"%d" % (changes - 1)
        # Without another session: the first one was good.
        assert server.status()["sessions"] == 2


def test_changes_between_welcome_and_adoption_are_not_lost(
    server, proxy, writer, gate, monkeypatch
):
    """The client is slow to make use of a session that the server has begun."""
    with client_of(server, addr=proxy.address) as reader:
        database = Listening()
        reader.registerDB(database)
        first = commit(writer, x=b"first")
        wait_for_position(reader, first)
        position = reader.position
        monkeypatch.setattr(position, "adopt", gate.before(position.adopt))
        gate.shut()
        proxy.cut()
        gate.wait_until_reached()
        tids = [commit(writer, x=b"%d" % n) for n in range(3)]
        assert reader.position.tid_now == first
        gate.open()
        wait_for_position(reader, tids[-1])
        assert database.told == [(tid, {X}) for tid in (first, *tids)]
        assert not database.afresh
        assert seen(reader, "x") == b"2"


def test_joining_and_following_are_one_step_however_much_is_committed(
    server, writer, closing
):
    """Clients come while another commits without a pause; none misses a change."""
    first = commit(writer, x=b"first")
    databases = []
    readers = []
    for n in range(10):
        reader = closing.enter_context(client_of(server, wait=False))
        database = Listening()
        reader.registerDB(database)
        readers.append(reader)
        databases.append(database)
        last = commit(writer, x=b"%d" % n)
    for reader, database in zip(readers, databases, strict=True):
        wait_for_position(reader, last)
        welcome = reader.current_session.welcome
        assert not database.afresh
        expected = server.on_loop(server.served.changes.since, welcome["last_tid"])
        # Who comes with a cache is told of what has come since that, too.
        told = [tid for tid in database.tids if tid > welcome["last_tid"]]
        assert told == [change.tid for change in expected]
        assert welcome["last_tid"] >= first


# Coming back


def test_a_client_that_was_away_is_not_in_the_past(reader, writer, proxy):
    """Nothing happens after its return, and yet it sees what it has missed."""
    database = Listening()
    reader.registerDB(database)
    old = commit(writer, x=b"old")
    wait_for_position(reader, old)
    assert seen(reader, "x") == b"old"
    send_away(reader, proxy)
    missed = [commit(writer, x=b"%d" % n) for n in range(3)]
    # Offline it goes on with what it has.
    assert reader.lastTransaction() == old
    assert seen(reader, "x") == b"old"
    come_back(reader, proxy)
    assert reader.lastTransaction() == missed[-1]
    assert seen(reader, "x") == b"2"
    assert database.tids == [old, *missed]
    assert not database.afresh


def test_a_client_that_was_away_too_long_starts_afresh(server, reader, writer, proxy):
    """The server does not know any more what has changed since then."""
    database = Listening()
    reader.registerDB(database)
    old = commit(writer, x=b"old")
    wait_for_position(reader, old)
    assert seen(reader, "x") == b"old"
    send_away(reader, proxy)
    missed = commit(writer, x=b"new")

    def forget() -> None:
        server.served.changes = Changes(missed)
        server.served.replays.start_afresh(server.served.changes)
        server.served.replays.bytes_max = 0

    server.on_loop(forget)
    come_back(reader, proxy)
    assert reader.lastTransaction() == missed
    assert seen(reader, "x") == b"new"
    assert database.afresh == 1


def test_a_session_is_offered_only_when_it_has_caught_up(
    reader, writer, proxy, gate, monkeypatch
):
    """Whoever finds the client connected again finds it up to date."""
    old = commit(writer, x=b"old")
    wait_for_position(reader, old)
    send_away(reader, proxy)
    commit(writer, x=b"new")
    apply = reader.cache.apply
    monkeypatch.setattr(reader.cache, "apply", gate.before(apply))
    gate.shut()
    proxy.restore()
    gate.wait_until_reached()
    assert not reader.is_connected()
    gate.open()
    wait_until(reader.is_connected, "a new connection")
    assert seen(reader, "x") == b"new"


def test_a_gap_in_the_changes_is_noticed_and_mended(server, reader, writer):
    """A change that got lost must not be stepped over."""
    database = Listening()
    reader.registerDB(database)
    first = commit(writer, x=b"first")
    wait_for_position(reader, first)
    peer = server.stream_of(reader)
    send = peer.send_shared

    def lose_one(data: bytes) -> None:
        peer.send_shared = send

    server.on_loop(lambda: setattr(peer, "send_shared", lose_one))
    lost = commit(writer, x=b"lost")
    last = commit(writer, x=b"last")
    wait_for_position(reader, last)
    assert database.tids == [first, lost, last]
    assert not database.afresh
    assert seen(reader, "x") == b"last"
    assert server.stream_of(reader) is not peer


def test_changes_that_come_twice_are_applied_once(server, reader, writer):
    database = Listening()
    reader.registerDB(database)
    peer = server.stream_of(reader)
    send = peer.send_shared

    def stutter(data: bytes) -> None:
        send(data)
        send(data)

    server.on_loop(lambda: setattr(peer, "send_shared", stutter))
    tids = [commit(writer, x=b"%d" % n) for n in range(5)]
    wait_for_position(reader, tids[-1])
    assert database.tids == tids
    assert server.stream_of(reader) is peer


# Several servers of the same data


class Pair:
    """A server that takes writes, behind a proxy, and a read-only one of a copy."""

    def __init__(self, folder: Path):
        self.writable = InProcessServer({"1": lambda: FileStore("1", self._path("w"))})
        self.copy = InProcessServer(
            {"1": lambda: FileStore("1", self._path("r"), read_only=True)}
        )
        self._folder = folder

    def _path(self, name: str) -> str:
        return str(self._folder / name / "Data.fs")

    def start(self) -> None:
        (self._folder / "w").mkdir()
        self.writable.start()
        with client_of(self.writable) as storage:
            commit(storage, x=b"old")
        self.writable.stop()
        shutil.copytree(self._folder / "w", self._folder / "r")
        self.writable.start()
        self.copy.start()

    def stop(self) -> None:
        for server in (self.copy, self.writable):
            if server.is_running:
                server.stop()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    try:
        pair.start()
        yield pair
    finally:
        pair.stop()


@pytest.fixture
def road(pair: Pair) -> Iterator[Proxy]:
    """The way to the server that takes writes, which may be closed."""
    with proxied(pair.writable.address) as proxy:
        yield proxy


@pytest.fixture
def storage(pair: Pair, road: Proxy, monkeypatch) -> Iterator[ClientStorage]:
    """A client that would write, and is at the server that does not."""
    # It looks for one that takes writes all the time.
    monkeypatch.setattr(connector, "UPGRADE_INTERVAL_S", 0.01)
    road.refuse()
    addresses = [road.address, pair.copy.address]
    with client_of(pair.copy, addr=addresses, read_only_fallback=True) as storage:
        yield storage


def test_nothing_is_lost_when_a_client_moves_to_a_better_server(
    pair, road, storage, gate, monkeypatch
):
    """Commits at the better server between its welcome and the move count too."""
    database = Listening()
    storage.registerDB(database)
    assert storage.isReadOnly()
    assert seen(storage, "x") == b"old"
    position = storage.position
    monkeypatch.setattr(position, "adopt", gate.before(position.adopt))
    gate.shut()
    road.restore()
    gate.wait_until_reached()
    with client_of(pair.writable) as writer:
        tids = [commit(writer, x=b"%d" % n) for n in range(3)]
    gate.open()
    wait_for_position(storage, tids[-1])
    assert database.tids == tids
    assert not storage.isReadOnly()
    assert seen(storage, "x") == b"2"
    commit(storage, x=b"own")
    assert pair.copy.status()["sessions"] == 0


@pytest.mark.parametrize("way", ["stream", "sync", "finish"])
def test_a_server_that_was_left_feeds_the_client_no_more(road, storage, way):
    """What is still under way from it is dropped: it is another server's business."""
    database = Listening()
    storage.registerDB(database)
    left = storage.current_session
    assert left is not None
    road.restore()
    wait_until(
        lambda: storage.is_connected() and not storage.isReadOnly(),
        "the move to the better server",
    )
    old = storage.lastTransaction()
    strange = Change(old, b"\x7f" + bytes(7), [X], b"strange transact")
    told: list[bytes] = []
    if way == "stream":
        storage.position.receive(left, [strange])
    elif way == "sync":
        storage.position.catch_up(left, strange.tid, [strange])
    else:
        storage.position.begin_finish(b"strange transact")
        storage.position.finished(left, strange, [], told.append)
        # Its own thread is told, for its commit is real; others are not.
        assert told == [strange.tid]
    assert storage.lastTransaction() == old
    assert not database.told
    assert seen(storage, "x") == b"old"
    tid = commit(storage, x=b"new")
    assert storage.lastTransaction() == tid


def test_of_two_servers_that_accept_at_once_one_is_chosen(pair, monkeypatch):
    """Both say welcome; only one session remains, and only that one is heard."""
    servers = (pair.writable, pair.copy)
    addresses = [server.address for server in servers]
    both_are_welcome = threading.Barrier(len(servers))
    dial_one = dial.dial

    def dial_together(*args: Any) -> dial.Reached:
        reached = dial_one(*args)
        both_are_welcome.wait(WAIT_S)
        return reached

    monkeypatch.setattr(dial, "dial", dial_together)
    with client_of(pair.copy, addr=addresses, read_only=True) as storage:
        wait_until(
            lambda: sum(server.status()["sessions"] for server in servers) == 1,
            "a single session",
        )
        (chosen,) = (server for server in servers if server.status()["sessions"])
        (other,) = (server for server in servers if server is not chosen)
        database = Listening()
        storage.registerDB(database)
        early, late = b"\x7e" + bytes(7), b"\x7f" + bytes(7)
        other.on_loop(publish, other.served, early, [X])
        chosen.on_loop(publish, chosen.served, late, [X])
        wait_for_position(storage, late)
        assert database.tids == [late]


def test_a_transaction_that_began_in_one_session_does_not_go_on_in_another(
    server, reader, proxy
):
    transaction = vote(reader, y=b"new")
    begun = reader.current_session
    proxy.cut()
    wait_until(lambda: reader.current_session not in (begun, None), "another session")
    with pytest.raises(ClientDisconnected, match="nothing was committed"):
        reader.tpc_finish(transaction)
    reader.tpc_abort(transaction)
    assert server.status()["in transaction"] == 0
    commit(reader, y=b"newer")
    assert seen(reader, "y") == b"newer"


def test_a_fallback_takes_no_writes_and_says_so(storage):
    with pytest.raises(ReadOnlyError):
        vote(storage, y=b"new")
