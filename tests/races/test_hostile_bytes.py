"""No byte that a client sends is run as code by the server, before or after a hello."""

import pickle
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import msgpack
import pytest
from BTrees.OOBTree import OOBTree
from ZODB.serialize import ObjectWriter

from zeolith.client.storage import ClientStorage
from zeolith.protocol.frames import frame
from zeolith.storage.filestore import FileStore

from ..support.inprocess import InProcessServer
from ..support.memory import hello_fields
from ..support.payloads import payload_that_makes
from ..support.records import commit, current_tid, oid_of, seen, wait_for_position

X = oid_of("x")
METADATA = [b"", b"", b"", None, " "]
NEVER = bytes(8)
SOON_S = 1


@pytest.fixture
def server(tmp_path: Path) -> Iterator[InProcessServer]:
    path, blobs = str(tmp_path / "Data.fs"), str(tmp_path / "blobs")
    opened = {"1": lambda: FileStore("1", path, blob_dir=blobs)}
    with InProcessServer(opened) as server:
        yield server


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    """What is there when a payload was run."""
    return tmp_path / "was run"


@pytest.fixture
def payload(proof: Path) -> bytes:
    return payload_that_makes(proof)


@pytest.fixture
def ids() -> Iterator[bytes]:
    """Ids of transactions."""
    return (b"hostile%09d" % n for n in count())


@contextmanager
def channel_of(storage: ClientStorage) -> Iterator[Any]:
    session = storage.current_session
    assert session is not None
    channel = session.borrow()
    try:
        yield channel
    finally:
        session.give_back(channel)


def tid_of(storage: ClientStorage, oid: bytes) -> bytes:
    return current_tid(storage, oid) or NEVER


def send_and_wait_for_the_end(server: InProcessServer, data: bytes) -> None:
    host, port = server.address
    with socket.create_connection((host, port), 30) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass


def commit_by_hand(
    channel: Any, id_: bytes, *operations: Any, extension: bytes = b""
) -> None:
    metadata = [b"", b"", extension, None, " "]
    channel.call("vote", id_, metadata, list(operations))
    channel.call("finish", id_, NEVER)


# Before a hello was accepted


def test_nothing_is_run_of_what_comes_first(server, writer, payload, proof):
    hello = hello_fields()
    firsts = [
        payload,
        frame(payload),
        # The greetings of ZEO's two forms, and a call in each.
        frame(b"Z5") + frame(pickle.dumps((1, 0, "register", payload), 2)) + payload,
        frame(b"M5") + frame(msgpack.packb((1, 0, "register", (payload,)))),
        *(frame(msgpack.packb(msgpack.ExtType(n, payload))) for n in range(128)),
        *(
            frame(msgpack.packb([1, {**hello, name: value}]))
            for name in hello
            for value in (payload, msgpack.ExtType(1, payload), [payload])
        ),
        frame(msgpack.packb([0, 1, "status", [payload]])),
    ]
    for first in firsts:
        send_and_wait_for_the_end(server, first)
    assert not proof.exists()
    commit(writer, x=b"the server is as good as before")


# From whoever may write


def test_nothing_is_run_of_records_and_extensions(
    server, writer, reader, payload, proof, ids
):
    with channel_of(writer) as channel:
        for _ in range(3):
            operation = ["store", X, tid_of(writer, X), payload]
            commit_by_hand(channel, next(ids), operation, extension=payload)
        # Everything that reads the log or the records of it.
        channel.call("undo_log", None, 10)
        channel.call("history", X, 10)
        channel.call("transactions", None, None, None)
        channel.call("records", None)
        channel.call("load_many", [X], b"\x7f" + b"\xff" * 7)
        channel.call("status")
        undone = tid_of(writer, X)
        commit_by_hand(channel, next(ids), ["undo", undone])
    assert seen(reader, "x") == payload
    server.restart()
    # What was committed by hand was told to nobody but the hand.
    wait_for_position(writer, reader.lastTransaction())
    assert seen(writer, "x") == payload
    assert not proof.exists()


def test_nothing_is_run_by_a_conflict(server, writer, payload, proof, ids):
    tree = ObjectWriter().serialize(OOBTree({"a": 1}))
    records = [payload, payload + payload, tree[: tree.index(b"\x80", 1)] + payload]
    for data in records:
        with channel_of(writer) as channel:
            old = tid_of(writer, X)
            commit_by_hand(channel, next(ids), ["store", X, old, data])
            first = tid_of(writer, X)
            commit_by_hand(channel, next(ids), ["store", X, first, data])
            conflicting = next(ids)
            asked = channel.call(
                "vote", conflicting, METADATA, [["store", X, first, data]]
            )
            assert asked[0] == "conflicts"
            channel.call("abort", conflicting)
    assert not proof.exists()


@pytest.mark.parametrize("collects", [True, False])
def test_nothing_is_run_by_a_pack(writer, payload, proof, ids, collects):
    with channel_of(writer) as channel:
        for _ in range(2):
            # A class and a state.
            data = payload + payload
            operation = ["store", NEVER, tid_of(writer, NEVER), data]
            commit_by_hand(channel, next(ids), operation)
        # Not before what was just committed: tids may be ahead of the clock.
        has_changed, *_sizes = channel.call("pack", time.time() + SOON_S, collects)
    assert has_changed, "a pack that does nothing proves nothing"
    assert not proof.exists()
    commit(writer, y=b"the server is as good as before")
