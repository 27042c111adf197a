"""A record may be large: the work for it grows with its size, not with its square."""

import gc
import socket
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.POSException import StorageError, StorageTransactionError

from zeolith.client.round_trip import RECEIVE_BYTES
from zeolith.client.stores import Stores
from zeolith.client.tids import MAX_TID
from zeolith.protocol.codec import encode
from zeolith.protocol.connection import Connection, Role
from zeolith.protocol.limits import DEFAULT, Limits
from zeolith.protocol.messages import Reply, Welcome
from zeolith.protocol.methods import VERSION

from ..support.ids import number
from ..support.inprocess import InProcessServer, client_of, serving
from ..support.memory import hello_fields
from ..support.records import commit, oid_of
from ..support.waiting import wait_until

MEGABYTE = 1024 * 1024
X = oid_of("x")


class Work:
    """Counts the bytes that steps allocate: each copy of data is an allocation."""

    def __init__(self) -> None:
        self.allocated_bytes = 0

    def do(self, step: Callable[..., Any], *args: Any) -> Any:
        """Take one step; it is charged with the most it had at one time."""
        before, _peak = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        result = step(*args)
        _after, peak = tracemalloc.get_traced_memory()
        self.allocated_bytes += peak - before
        return result


@pytest.fixture
def counting() -> Iterator[None]:
    gc.collect()
    tracemalloc.start(1)
    yield
    tracemalloc.stop()


def receive_in_pieces(size: int, piece_bytes: int) -> int:
    """How many bytes a client allocates to receive an answer of that size."""
    connection = Connection(Role.CLIENT, 0.0)
    connection.hello(hello_fields(kind="channel"), 0.0)
    connection.receive_data(encode(welcome()), 0.0)
    connection.request("load", [X, MAX_TID], 0.0)
    sent = encode(Reply(1, [bytes(size), number(1), None, number(1)]))
    work = Work()
    messages: list[Any] = []
    for start in range(0, len(sent), piece_bytes):
        piece = sent[start : start + piece_bytes]
        messages += work.do(connection.receive_data, piece, 0.0)
    (reply,) = messages
    assert len(reply.value[0]) == size
    return work.allocated_bytes


def welcome() -> Welcome:
    return Welcome(
        {
            "version": VERSION,
            "capabilities": [],
            "session": None,
            "database_id": None,
            "epoch": None,
            "last_tid": None,
            "changes": None,
            "name": None,
            "size": None,
            "length": None,
            "interfaces": [],
            "supports_undo": False,
            "read_only": True,
            "roles": [],
            "proof": None,
        }
    )


@pytest.mark.usefixtures("counting")
def test_what_arrives_in_pieces_is_put_together_in_linear_work():
    small = receive_in_pieces(1 * MEGABYTE, RECEIVE_BYTES)
    large = receive_in_pieces(16 * MEGABYTE, RECEIVE_BYTES)
    assert large < 20 * small
    # A few copies of the data, however many pieces there were.
    assert large < 4 * 16 * MEGABYTE


@pytest.mark.usefixtures("counting")
def test_smaller_pieces_are_no_more_work():
    """A slow network cuts a message into ten times as many."""
    coarse = receive_in_pieces(4 * MEGABYTE, 16 * 1024)
    fine = receive_in_pieces(4 * MEGABYTE, 1460)
    assert fine < 2 * coarse


@pytest.mark.usefixtures("counting")
def test_what_is_stored_is_sent_in_linear_work():
    def store_and_send(size: int) -> int:
        work = Work()
        stores = Stores(DEFAULT)
        data = bytes(64 * 1024)
        for n in range(size // len(data)):
            work.do(stores.store, number(n), number(0), data)
        chunks = stores.spilled()
        while work.do(next, chunks, None):
            pass
        stores.close()
        return work.allocated_bytes

    small = store_and_send(2 * MEGABYTE)
    large = store_and_send(32 * MEGABYTE)
    assert large < 20 * small


@pytest.mark.parametrize("size", [1, 64 * 1024, 64 * MEGABYTE])
def test_a_record_of_any_size_is_committed_and_loaded(tmp_path, size: int):
    data = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    with serving(tmp_path / "Data.fs") as server:
        with client_of(server) as storage:
            transaction = TransactionMetaData()
            storage.tpc_begin(transaction)
            storage.store(X, None, data, "", transaction)
            storage.store(oid_of("y"), None, b"small", "", transaction)
            storage.tpc_vote(transaction)
            tid = storage.tpc_finish(transaction)
            storage.cache.forget(X)
            assert storage.load(X) == (data, tid)
        server.restart()
        with client_of(server) as storage:
            assert storage.load(X) == (data, tid)
            assert storage.load(oid_of("y")) == (b"small", tid)


def test_a_record_without_data_is_refused(tmp_path):
    """A Data.fs cannot hold one: it would be lost, and all that comes after it."""
    path = tmp_path / "Data.fs"
    with serving(path) as server, client_of(server) as storage:
        before = commit(storage, x=b"before")
        transaction = TransactionMetaData()
        storage.tpc_begin(transaction)
        storage.store(oid_of("y"), None, b"", "", transaction)
        with pytest.raises(StorageTransactionError, match="is empty"):
            storage.tpc_vote(transaction)
        storage.tpc_abort(transaction)
        after = commit(storage, z=b"after")
        assert before < after
    (tmp_path / "Data.fs.index").unlink()
    plain = FileStorage(str(path), read_only=True)
    assert plain.load(oid_of("z")) == (b"after", after)
    plain.close()


def test_a_record_beyond_the_limit_is_refused_where_it_is_stored(tmp_path):
    """By the client, at once, with the name of the limit; nothing is lost by it."""
    limits = Limits(frame_bytes_max=2 * MEGABYTE)
    with (
        serving(tmp_path / "Data.fs", limits=limits) as server,
        client_of(server, limits=limits) as storage,
    ):
        session = storage.current_session
        transaction = TransactionMetaData()
        storage.tpc_begin(transaction)
        with pytest.raises(StorageError, match="record_bytes_max"):
            storage.store(X, None, bytes(2 * MEGABYTE), "", transaction)
        largest = bytes(limits.record_bytes_max)
        storage.store(X, None, largest, "", transaction)
        storage.tpc_vote(transaction)
        tid = storage.tpc_finish(transaction)
        storage.cache.forget(X)
        assert storage.load(X) == (largest, tid)
        assert storage.current_session is session


def test_a_length_alone_takes_no_memory(tmp_path):
    """Nobody who has not said hello makes the server set memory aside."""
    with serving(tmp_path / "Data.fs") as server:
        with socket.create_connection(server.address) as stranger:
            stranger.sendall((2**32 - 1).to_bytes(4, "big") + bytes(100))
            stranger.settimeout(30)
            said = b""
            while received := stranger.recv(4096):
                said += received
        assert b"a frame of 4294967295 bytes" in said
        with socket.create_connection(server.address) as stranger:
            stranger.sendall((16 * 1024).to_bytes(4, "big") + bytes(100))
            wait_until(lambda: held_bytes(server), "the bytes")
            assert held_bytes(server) == 104


def held_bytes(server: InProcessServer) -> int:
    """What the server keeps of messages that are not complete."""

    def count() -> int:
        return sum(peer.connection._reader.have_bytes for peer in server.service.peers)

    held: int = server.on_loop(count)
    return held


def test_others_are_answered_while_a_large_record_is_on_its_way(tmp_path):
    """Between the pieces of it, that is; nobody waits for the whole of it."""
    with (
        serving(tmp_path / "Data.fs") as server,
        client_of(server) as large,
        client_of(server) as small,
    ):
        transaction = TransactionMetaData()
        large.tpc_begin(transaction)
        for n in range(64):
            oid = oid_of(f"n{n}")
            large.store(oid, None, bytes(MEGABYTE), "", transaction)
        done = threading.Event()
        pings = 0

        def ping() -> None:
            nonlocal pings
            while not done.is_set():
                small.ping()
                pings += 1

        pinging = threading.Thread(target=ping)
        pinging.start()
        large.tpc_vote(transaction)
        large.tpc_finish(transaction)
        done.set()
        pinging.join()
        assert pings > 0
        assert len(small) == 64
