"""What goes wrong around a server: descriptors, clocks, processes that stand still.

Each ends with the same questions: is what was acknowledged there, does every reader see
the latest, and does the server go on.
"""

import errno
import os
import resource
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from ZODB.FileStorage import FileStorage

from zeolith.client.errors import ClientDisconnected
from zeolith.client.storage import ClientStorage
from zeolith.storage.records import HEADER_BYTES, Generation

from ..support.hindering import few_descriptors, standing_still
from ..support.inprocess import InProcessServer, client_of, serving
from ..support.records import commit, oid_of, seen, wait_for_position
from ..support.serving import ServerProcess
from ..support.waiting import wait_until

HOUR_S = 3600
CLIENTS = 200


def in_file(path: Path) -> dict[bytes, bytes]:
    """The current records of a Data.fs, as ZODB finds them."""
    storage = FileStorage(str(path), read_only=True)
    found = {}
    for transaction in storage.iterator():
        for record in transaction:
            found[record.oid] = record.data
    storage.close()
    return found


@contextmanager
def written(
    folder: Path, **records: bytes
) -> Iterator[tuple[InProcessServer, ClientStorage]]:
    """A server that has these in its file, and nothing of them in memory."""
    with serving(folder / "Data.fs") as server:
        with client_of(server) as storage:
            for name, data in records.items():
                commit(storage, **{name: data})
        server.restart()
        with client_of(server) as storage:
            yield server, storage


# The disk


def test_a_record_that_cannot_be_read_fails_alone(tmp_path, monkeypatch):
    """An error of the disk in one place: that object fails, the rest goes on."""
    with written(tmp_path, bad=b"x" * 300_000, good=b"y" * 300_000) as (server, writer):
        bad_at = server.database._storage._index[oid_of("bad")]
        preadv, pread = os.preadv, os.pread

        def failing(real, position):
            if bad_at <= position < bad_at + HEADER_BYTES + 300_000:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real()

        monkeypatch.setattr(
            os, "preadv", lambda *args: failing(lambda: preadv(*args), args[2])
        )
        monkeypatch.setattr(
            os, "pread", lambda *args: failing(lambda: pread(*args), args[2])
        )
        with client_of(server) as reader:
            for _ in range(3):
                with pytest.raises(Exception, match=r"Input/output error"):
                    seen(reader, "bad")
                assert seen(reader, "good") == b"y" * 300_000
            commit(writer, good=b"written meanwhile")
            wait_for_position(reader, writer.lastTransaction())
            assert seen(reader, "good") == b"written meanwhile"
        monkeypatch.undo()
        with client_of(server) as reader:
            assert seen(reader, "bad") == b"x" * 300_000


def test_a_record_that_is_damaged_fails_alone(tmp_path):
    with written(tmp_path, bad=b"x" * 100, good=b"y") as (server, writer):
        at = server.database._storage._index[oid_of("bad")]
        with (tmp_path / "Data.fs").open("r+b") as file:
            file.seek(at + HEADER_BYTES - 8)
            file.write(struct.pack(">Q", 2**45))
        with client_of(server) as reader:
            with pytest.raises(Exception, match="Corrupted") as raised:
                seen(reader, "bad")
            assert not isinstance(raised.value, ClientDisconnected)
            assert seen(reader, "good") == b"y"
            commit(writer, good=b"z")
            wait_for_position(reader, writer.lastTransaction())
            assert seen(reader, "good") == b"z"


def test_memory_that_is_not_there_fails_one_request(tmp_path, monkeypatch):
    with written(tmp_path, large=b"x" * 300_000, small=b"y") as (server, _writer):
        data = Generation._data

        def without_memory(self, header, *args):
            if header.oid == oid_of("large"):
                raise MemoryError
            return data(self, header, *args)

        monkeypatch.setattr(Generation, "_data", without_memory)
        with client_of(server) as reader:
            with pytest.raises(Exception, match="MemoryError"):
                seen(reader, "large")
            assert seen(reader, "small") == b"y"
        monkeypatch.undo()
        with client_of(server) as reader:
            assert seen(reader, "large") == b"x" * 300_000


# Descriptors


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux has it")
def test_without_descriptors_those_who_are_there_go_on(tmp_path):
    with ServerProcess(tmp_path) as server, ExitStack() as stack:
        writer = ClientStorage(server.address)
        stack.callback(writer.close)
        commit(writer, x=b"before")
        with few_descriptors(server.process.pid, left=3):
            strangers = []
            for _ in range(20):
                stranger = stack.enter_context(socket.socket())
                stranger.setblocking(False)
                with suppress(BlockingIOError):
                    stranger.connect(server.address)
                strangers.append(stranger)
            for number in range(20):
                commit(writer, x=b"%d" % number)
            assert seen(writer, "x") == b"19"
            for stranger in strangers:
                stranger.close()
        other = ClientStorage(server.address, wait_timeout=30)
        stack.callback(other.close)
        assert seen(other, "x") == b"19"
    assert in_file(server.data_path)[oid_of("x")] == b"19"


# The clock


@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S])
def test_a_clock_that_jumps_an_hour_changes_nothing(tmp_path, monkeypatch, jump_s):
    """Tids go on growing, nobody is cut off, and nothing stale is seen."""
    real = time.time
    with (
        serving(tmp_path / "Data.fs") as server,
        client_of(server) as writer,
        client_of(server) as reader,
    ):
        tids = [commit(writer, x=b"0")]
        monkeypatch.setattr(time, "time", lambda: real() + jump_s)
        for number in range(1, 6):
            tids.append(commit(writer, x=b"%d" % number))
            wait_for_position(reader, tids[-1])
            assert seen(reader, "x") == b"%d" % number
        monkeypatch.undo()
        tids.append(commit(writer, x=b"6"))
        wait_for_position(reader, tids[-1])
        assert seen(reader, "x") == b"6"
        assert tids == sorted(set(tids))
        assert server.status()["sessions"] == 2
    assert in_file(tmp_path / "Data.fs")[oid_of("x")] == b"6"


# Processes that stand still


def test_a_server_that_stands_still_loses_nothing(tmp_path):
    """What was sent to it meanwhile is done when it goes on, or told as not done."""
    with ServerProcess(tmp_path) as server:
        writer = ClientStorage(server.address)
        commit(writer, x=b"before")
        with ThreadPoolExecutor(1) as pool:
            with standing_still(server.process.pid):
                committing = pool.submit(commit, writer, x=b"meanwhile")
                with pytest.raises(TimeoutError):
                    committing.result(0.5)
            tid = committing.result(30)
        assert seen(writer, "x") == b"meanwhile"
        assert writer.lastTransaction() == tid
        writer.close()
    assert in_file(server.data_path)[oid_of("x")] == b"meanwhile"


# Many at once


@pytest.mark.timeout(120)
def test_200_clients_that_come_back_at_once_are_all_served(tmp_path):
    """A server that was killed and started again; each has a session, none is stale."""
    with ServerProcess(tmp_path) as server, ExitStack() as stack:
        clients = [stack.enter_context(_client(server.address)) for _ in range(CLIENTS)]
        tid = commit(clients[0], x=b"before")
        for client in clients:
            wait_for_position(client, tid)
        server.kill()
        server.start()
        tid = commit_when_it_is_there(clients[0], b"after")
        for client in clients:
            wait_for_position(client, tid)
            assert seen(client, "x") == b"after"
    assert in_file(server.data_path)[oid_of("x")] == b"after"


@contextmanager
def _client(address: tuple[str, int]) -> Iterator[ClientStorage]:
    storage = ClientStorage(address, wait_timeout=60)
    try:
        yield storage
    finally:
        storage.close()


def commit_when_it_is_there(storage: ClientStorage, data: bytes) -> bytes:
    tids: list[bytes] = []

    def committed() -> bool:
        with suppress(ClientDisconnected):
            tids.append(commit(storage, x=data))
        return bool(tids)

    wait_until(committed, "the server is back", timeout_s=60)
    return tids[0]
