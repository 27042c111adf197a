"""Nobody can hold up the others: not by hanging, breaking, misbehaving or dying."""

import gc
import re
import socket
import sys
import threading
import tracemalloc
from base64 import encodebytes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import StorageError

import zeolith.client
import zeolith.protocol
import zeolith.server
import zeolith.storage
from zeolith.client import connector
from zeolith.client.cache import RECENT_OIDS_MAX
from zeolith.client.errors import ClientDisconnected
from zeolith.client.storage import ClientStorage
from zeolith.protocol.errors import HelloRefused, LocalProtocolError, TransactionTimeout
from zeolith.protocol.limits import Limits
from zeolith.server.committer import Phase
from zeolith.storage.database import WouldBlock
from zeolith.storage.filestore import FileStore
from zeolith.storage.pack_progress import Packed
from zeolith.storage.preparing import Preparation

from ..support.gates import Background
from ..support.inprocess import HeldStream, InProcessServer, client_of, serving
from ..support.model import publish
from ..support.proxy import Direction, Proxy, proxied
from ..support.records import Listening, commit, oid_of, seen, vote, wait_for_position
from ..support.waiting import wait_until

X = oid_of("x")
# A network that falls silent is found out about soon.
IMPATIENT = Limits(heartbeat_interval_s=0.2, heartbeat_timeout_s=1.0)


def is_idle(server: InProcessServer) -> bool:
    return not server.status()["in transaction"]


# A transaction that is not finished


@pytest.fixture
def hasty(tmp_path) -> Iterator[InProcessServer]:
    """A server that does not wait long for a voted transaction."""
    with serving(tmp_path / "Data.fs", transaction_timeout_s=0.05) as server:
        yield server


def test_a_client_that_hangs_after_its_vote_holds_nobody_up(hasty):
    """It is told so, may try again, and the others go on at once."""
    with client_of(hasty) as hanging, client_of(hasty) as other:
        transaction = vote(hanging, x=b"hanging")
        tid = commit(other, x=b"other")
        with pytest.raises(TransactionTimeout, match="transaction-timeout"):
            hanging.tpc_finish(transaction)
        hanging.tpc_abort(transaction)
        wait_for_position(hanging, tid)
        assert seen(hanging, "x") == b"other"
        again = commit(hanging, x=b"again")
        wait_for_position(other, again)
        assert seen(other, "x") == b"again"


def test_many_that_hang_are_passed_over_one_after_the_other(hasty):
    with ExitStack() as closing:
        hanging = [closing.enter_context(client_of(hasty)) for _ in range(4)]
        voting = [Background(vote, storage, x=b"hanging") for storage in hanging]
        other = closing.enter_context(client_of(hasty))
        for each in voting:
            each.result()
        commit(other, x=b"other")
        assert is_idle(hasty)


def test_a_transaction_timeout_leaves_no_half_client_behind(hasty):
    """Its session goes on: the same client still hears of what others commit."""
    with client_of(hasty) as hanging, client_of(hasty) as other:
        before = hasty.status()
        vote(hanging, x=b"hanging")
        wait_until(lambda: is_idle(hasty), "the end of the transaction")
        assert hasty.status()["sessions"] == before["sessions"] == 2
        tid = commit(other, y=b"other")
        wait_for_position(hanging, tid)


# A client that is gone, whatever the reason


def offend(hold: "Hold") -> None:
    """Bytes that are no message."""
    hold.channel._socket.sendall(b"\xff" * 16)


def oversize(hold: "Hold") -> None:
    """The length of a frame that nobody may send."""
    hold.channel._socket.sendall((2**32 - 1).to_bytes(4, "big"))


def lose_the_channel(hold: "Hold") -> None:
    hold.channel._socket.shutdown(socket.SHUT_RDWR)


def lose_the_stream(hold: "Hold") -> None:
    assert hold.session is not None
    hold.session._stream.shutdown(socket.SHUT_RDWR)


def lose_everything(hold: "Hold") -> None:
    hold.proxy.cut()


def close_the_storage(hold: "Hold") -> None:
    hold.storage.close()


def forget_the_channel(hold: "Hold") -> None:
    """As when its thread dies."""
    hold.channel.close()


ENDS: list[Callable[["Hold"], None]] = [
    offend,
    oversize,
    lose_the_channel,
    lose_the_stream,
    lose_everything,
    close_the_storage,
    forget_the_channel,
]


class Hold:
    """A client that has voted and holds the turn."""

    def __init__(self, storage: ClientStorage, proxy: Proxy):
        self.storage = storage
        self.proxy = proxy
        self.transaction = vote(storage, x=b"held")
        self.session = storage.current_session
        channel = storage._commits[self.transaction]._channel
        assert channel is not None
        self.channel = channel


@pytest.mark.parametrize("end", ENDS)
def test_the_next_one_commits_whatever_became_of_the_holder(
    server, writer, reader, proxy, end: Callable[[Hold], None]
):
    """Every end of a connection leads through the same teardown."""
    hold = Hold(reader, proxy)
    waiting = Background(commit, writer, x=b"next")
    wait_until(
        lambda: server.on_loop(lambda: server.served.committer.waiting),
        "the next one in line",
    )
    end(hold)
    waiting.result()
    assert is_idle(server)
    with pytest.raises((StorageError, LocalProtocolError)):
        reader.tpc_finish(hold.transaction)
    last_tid = server.on_loop(lambda: server.served.changes.last_tid)
    assert last_tid == writer.lastTransaction()


@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_left_of_a_client_that_is_gone(
    server, writer, reader, proxy, monkeypatch, end: Callable[[Hold], None]
):
    """No session, no follower to whom every later change would be sent in vain."""
    hold = Hold(reader, proxy)
    before = server.status()["sessions"]
    assert before == 2
    end(hold)
    reader.close()
    expected = {"peers": 1, "sessions": 1, "followers": 1, "in transaction": 0}

    def only_the_writer() -> bool:
        # Its channels come and go.
        status = server.status()
        return {**status, "peers": 1} == expected and status["peers"] <= 3

    wait_until(only_the_writer, "the end of the other client")
    commit(writer, y=b"more")
    assert only_the_writer()


def test_a_silent_network_frees_the_turn_and_the_client(tmp_path):
    """Nothing arrives any more, and nothing says so."""
    with (
        serving(tmp_path / "Data.fs", limits=IMPATIENT) as server,
        proxied(server.address) as proxy,
        client_of(server, limits=IMPATIENT) as other,
        client_of(server, addr=proxy.address, limits=IMPATIENT) as silent,
    ):
        transaction = vote(silent, x=b"silent")
        proxy.stall()
        commit(other, x=b"other")
        assert is_idle(server)
        wait_until(lambda: not silent.is_connected(), "the end of the session")
        with pytest.raises(ClientDisconnected, match="nothing was committed"):
            silent.tpc_finish(transaction)
        proxy.cut()
        proxy.restore()


@pytest.mark.parametrize("way", list(Direction))
def test_a_call_does_not_wait_for_ever_for_a_silent_server(tmp_path, way: Direction):
    """The cause is in the error, and the client comes back by itself."""
    with (
        serving(tmp_path / "Data.fs", limits=IMPATIENT) as server,
        proxied(server.address) as proxy,
        client_of(server, addr=proxy.address, limits=IMPATIENT) as storage,
    ):
        storage._wait_timeout_s = 0
        tid = commit(storage, x=b"data")
        storage.cache.forget(X)
        proxy.stall(way)
        loading = Background(storage.load, X)
        # Who notices first, the client or the server, is the scheduler's affair.
        assert re.search("silent|the session has ended", str(loading.error()))
        proxy.cut()
        proxy.restore()
        storage._wait_timeout_s = 30
        assert storage.load(X) == (b"data", tid)


def test_a_single_channel_that_falls_silent_is_replaced(tmp_path):
    """The stream and the other channels are well; the call is made again."""
    with (
        serving(tmp_path / "Data.fs", limits=IMPATIENT) as server,
        client_of(server, limits=IMPATIENT) as storage,
    ):
        tid = commit(storage, x=b"data")
        storage.cache.forget(X)
        session = storage.current_session
        stream = server.stream_of(storage)

        def silence(peer: Any) -> None:
            peer._write = lambda data: None

        def silence_channels() -> int:
            channels = server.service.peers - {stream}
            for peer in channels:
                silence(peer)
            return len(channels)

        assert server.on_loop(silence_channels)
        assert storage.load(X) == (b"data", tid)
        assert storage.current_session is session


def test_a_quiet_connection_is_kept_alive(tmp_path):
    """Nothing happens for many times the time after which silence is an end."""
    with (
        serving(tmp_path / "Data.fs", limits=IMPATIENT) as server,
        client_of(server, limits=IMPATIENT) as storage,
    ):
        commit(storage, x=b"data")
        session = storage.current_session
        assert session is not None
        beats = count_beats(session)
        wait_until(lambda: beats() >= 20, "heartbeats")
        assert storage.current_session is session
        assert commit(storage, x=b"more")


def count_beats(session: Any) -> Callable[[], int]:
    receive = session._connection.receive_data
    count = 0

    def counting(data: bytes, now: float) -> Any:
        nonlocal count
        count += 1
        return receive(data, now)

    session._connection.receive_data = counting
    return lambda: count


def test_a_long_call_is_kept_alive_by_the_server(tmp_path, gate, monkeypatch):
    """It may take longer than silence is suffered: the server says that it works."""
    with (
        serving(tmp_path / "Data.fs", limits=IMPATIENT) as server,
        client_of(server, limits=IMPATIENT) as storage,
    ):
        commit(storage, x=b"data")
        session = storage.current_session
        assert session is not None
        database = server.database
        monkeypatch.setattr(
            database, "pack", gate.before(lambda *_: Packed(False, 0, 0))
        )
        gate.shut()
        packing = Background(storage.pack)
        gate.wait_until_reached()
        beats = count_beats(session)
        wait_until(lambda: beats() >= 20, "heartbeats")
        gate.open()
        packing.result()
        assert storage.current_session is session


# A storage that is slow, or held by a pack


def test_a_finish_that_waits_for_a_lock_holds_up_no_reader(server, writer, reader):
    """A packer holds the storage's commit lock, and somebody wants to commit."""
    tid = commit(writer, x=b"data")
    wait_for_position(reader, tid)
    files: Any = server.database
    with files._file._commit_lock:
        finishing = Background(writer.tpc_finish, vote(writer, y=b"other"))
        wait_until(
            lambda: server.on_loop(
                lambda: server.served.committer.holders[0].phase is Phase.FINISHING
            ),
            "the finish under way",
        )
        for _ in range(10):
            reader.cache.forget(X)
            assert reader.load(X) == (b"data", tid)
            reader.ping()
        with client_of(server) as newcomer:
            assert newcomer.load(X) == (b"data", tid)
        # Nor those who vote.
        reader.tpc_abort(vote(reader, z=b"third"))
        assert not finishing.returns_soon()
    finishing.result()


def undo(storage: ClientStorage, tid: bytes) -> TransactionMetaData:
    """A transaction that is alone, and has voted."""
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    storage.undo(encodebytes(tid).rstrip(), transaction)
    storage.tpc_vote(transaction)
    return transaction


@pytest.mark.parametrize("step", ["vote", "finish", "abort"])
def test_a_slow_step_of_one_who_is_alone_holds_up_no_reader(
    server, writer, reader, gate, monkeypatch, step: str
):
    tid = commit(writer, x=b"data")
    wait_for_position(reader, tid)
    database = server.database
    monkeypatch.setattr(database, step, gate.before(getattr(database, step)))
    gate.shut()
    if step == "vote":
        working = Background(undo, writer, tid)
    else:
        gate.open()
        transaction = undo(writer, tid)
        gate.shut()
        working = Background(getattr(writer, f"tpc_{step}"), transaction)
    gate.wait_until_reached()
    look_around(reader, tid)
    assert not working.returns_soon()
    gate.open()
    working.result()


@pytest.mark.parametrize("step", ["vote", "append"])
def test_a_slow_step_of_one_client_holds_up_no_reader(
    server, writer, reader, gate, monkeypatch, step: str
):
    """A conflict that takes seconds to resolve, or a disk that takes them to sync."""
    tid = commit(writer, x=b"data")
    wait_for_position(reader, tid)
    monkeypatch.setattr(Preparation, "vote_nowait", would_block)
    place = Preparation if step == "vote" else FileStore
    monkeypatch.setattr(place, step, gate.before(getattr(place, step)))
    gate.shut()
    working = Background(commit, writer, y=b"other")
    gate.wait_until_reached()
    look_around(reader, tid)
    assert not working.returns_soon()
    gate.open()
    working.result()


def would_block(_preparation: Preparation) -> None:
    raise WouldBlock


def look_around(reader: ClientStorage, tid: bytes) -> None:
    """What somebody does who reads while another commits."""
    for _ in range(10):
        reader.cache.forget(X)
        assert reader.load(X) == (b"data", tid)
        reader.ping()
    assert reader.server_status()["storages"]["1"]["transactions"]


def test_a_load_that_waits_for_the_disk_holds_up_nobody(
    server, writer, reader, gate, monkeypatch
):
    tid = commit(writer, x=b"data", y=b"other")
    wait_for_position(reader, tid)
    database = server.database
    load_nowait = database.load_nowait

    def not_in_memory(oid: bytes, before: bytes) -> Any:
        if oid == X:
            raise WouldBlock
        return load_nowait(oid, before)

    monkeypatch.setattr(database, "near", lambda: None)
    monkeypatch.setattr(database, "load_nowait", not_in_memory)
    monkeypatch.setattr(database, "load", gate.before(database.load))
    gate.shut()
    loading = Background(reader.load, X)
    gate.wait_until_reached()
    commit(writer, z=b"committed meanwhile")
    assert reader.load(oid_of("y")) == (b"other", tid)
    gate.open()
    assert loading.result() == (b"data", tid)


def test_a_client_that_does_not_read_holds_up_nobody(tmp_path):
    """What waits for it is bounded; then it is let go, and comes back."""
    limits = Limits(output_bytes_max=100_000)
    with (
        serving(tmp_path / "Slow.fs", limits=limits) as server,
        proxied(server.address) as road,
        client_of(server) as writer,
        client_of(server, addr=road.address) as slow,
    ):
        commit(writer, x=b"old")
        database = Listening()
        slow.registerDB(database)
        stream = server.stream_of(slow)
        road.stall(Direction.TO_CLIENT)
        oids = [b"%08d" % n for n in range(20_000)]

        def flood() -> bool:
            served = server.served
            last = int.from_bytes(served.changes.last_tid, "big")
            publish(served, (last + 1).to_bytes(8, "big"), oids)
            return stream in served.followers

        while server.on_loop(flood):
            pass
        last = commit(writer, x=b"new")
        road.restore()
        wait_for_position(slow, last)
        assert seen(slow, "x") == b"new"
        assert server.stream_of(slow) is not stream


def test_an_idle_client_keeps_nothing_of_what_others_change(server, writer, reader):
    """Beyond what its cache remembers to judge late answers, which is bounded.

    What a pooled connection collects until it is opened again is ZODB's.
    """
    changed = 5000
    oids = (b"%08d" % n for n in count())

    def change(times: int) -> None:
        served = server.served
        for _ in range(times):
            last = int.from_bytes(served.changes.last_tid, "big")
            tid = (last + 1).to_bytes(8, "big")
            publish(served, tid, list(islice(oids, changed)))

    def kept_after(times: int) -> int:
        server.on_loop(change, times)
        wait_for_position(reader, server.served.changes.last_tid)
        gc.collect()
        taken = tracemalloc.take_snapshot().filter_traces(ours)
        return sum(trace.size for trace in taken.traces)

    commit(writer, x=b"before")
    packages = (zeolith.client, zeolith.protocol, zeolith.server, zeolith.storage)
    ours = [
        tracemalloc.Filter(True, str(Path(package.__path__[0]) / "*"))
        for package in packages
    ]
    tracemalloc.start()
    try:
        kept = kept_after(2 * RECENT_OIDS_MAX // changed)
        grown = kept_after(20) - kept
    finally:
        tracemalloc.stop()
    # What the cache remembers is now more, now less.
    assert grown < 20 * changed * sys.getsizeof(next(oids)) // 2


# Closing


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """The threads of clients that begin inside end inside."""
    before = client_threads()
    yield
    wait_until(lambda: client_threads() <= before, "the end of the threads")


def client_threads() -> set[threading.Thread]:
    return {each for each in threading.enumerate() if each.name.startswith("zeolith-")}


def unreachable() -> tuple[str, int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address: tuple[str, int] = listener.getsockname()
    return address


def test_closing_ends_the_search_for_a_server():
    with nothing_left_behind():
        storage = ClientStorage(unreachable(), wait=False)
        asking = Background(storage.load, X)
        assert not asking.returns_soon()
        storage.close()
        assert "closed" in str(asking.error())


def test_closing_ends_a_dial_that_is_not_answered():
    """The server accepts and says nothing."""
    limits = Limits(hello_timeout_s=0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener, nothing_left_behind():
        storage = ClientStorage(listener.getsockname(), wait=False, limits=limits)
        accepted, _address = listener.accept()
        with accepted:
            accepted.recv(1)
            storage.close()
        assert not storage.is_connected()


def test_closing_ends_calls_that_are_under_way(server, writer, gate, monkeypatch):
    commit(writer, x=b"data")
    database = server.database
    monkeypatch.setattr(database, "get_tid", gate.before(database.get_tid))
    with nothing_left_behind():
        storage = ClientStorage(server.address)
        gate.shut()
        asking = [Background(storage.getTid, X) for _ in range(3)]
        for _ in asking:
            gate.wait_until_reached()
        storage.close()
        for each in asking:
            assert isinstance(each.error(), ClientDisconnected)
        storage.close()
    gate.open()


def test_closing_in_the_middle_of_an_adoption_leaves_no_session(
    server, gate, monkeypatch
):
    """The welcome is there, and nobody wants it any more."""
    monkeypatch.setattr(connector, "CLOSE_TIMEOUT_S", 0.01)
    with nothing_left_behind():
        storage = ClientStorage(unreachable(), wait=False)
        position = storage.position
        monkeypatch.setattr(position, "adopt", gate.before(position.adopt))
        gate.shut()
        storage.new_addr(server.address)
        gate.wait_until_reached()
        storage.close()
        gate.open()
        wait_until(lambda: not server.status()["peers"], "the end of the session")
        assert not storage.is_connected()


def test_closing_while_a_better_server_is_looked_for_leaves_no_session(
    server, gate, monkeypatch
):
    """The thread that looks for it has just found one."""
    reach = connector.Connector._reach
    refusals = iter([HelloRefused("read-only", "not yet")])

    def reach_late(self: Any, *, is_read_only: bool) -> Any:
        if is_read_only:
            return reach(self, is_read_only=True)
        for refusal in refusals:
            raise refusal
        reached = reach(self, is_read_only=False)
        gate.pass_through()
        return reached

    monkeypatch.setattr(connector.Connector, "_reach", reach_late)
    monkeypatch.setattr(connector, "UPGRADE_INTERVAL_S", 0.01)
    with nothing_left_behind():
        gate.shut()
        storage = ClientStorage(server.address, read_only_fallback=True)
        assert storage.isReadOnly()
        gate.wait_until_reached()
        storage.close()
        gate.open()
    wait_until(lambda: not server.status()["peers"], "the end of both sessions", 10)


def test_a_stream_that_is_held_does_not_hold_up_the_end(server):
    with nothing_left_behind():
        storage = ClientStorage(server.address)
        HeldStream(server, storage).hold()
        storage.close()
    wait_until(lambda: not server.status()["peers"], "the end of the session")
