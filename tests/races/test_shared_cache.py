"""Processes that share a cache on disk, and stand in each other's way there."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lmdb
import pytest
from ZODB.Connection import TransactionMetaData

from zeolith.client import cache_writer
from zeolith.client.storage import ClientStorage
from zeolith.client.tids import following

from ..support.inprocess import InProcessServer, client_of, serving
from ..support.records import commit, oid_of, seen, wait_for_position
from ..support.waiting import wait_until

X = oid_of("x")
# Stops itself when it has begun to write.
WRITER = """
import os, signal, sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from zeolith.client.cache_file import CacheFile

file = CacheFile(Path(sys.argv[1]), 1_000_000)
with file._write() as txn:
    txn.put(b"12345678", b"torn", db=file._current)
    os.kill(os.getpid(), signal.SIGSTOP)
"""

# Begins while another process is stopped.
NEWCOMER = """
import sys
from zeolith.client.storage import ClientStorage

storage = ClientStorage(sys.argv[1], cache=sys.argv[2])
data, _tid = storage.load(bytes.fromhex(sys.argv[3]))
sys.stdout.buffer.write(data)
assert storage.cache.is_aside
storage.close()
"""


@pytest.fixture(autouse=True)
def written_at_once(monkeypatch) -> None:
    for wait in ("FLUSH_WAIT_S", "LATER_WAIT_S"):
        monkeypatch.setattr(cache_writer, wait, 0)


@pytest.fixture
def cached(tmp_path: Path) -> dict[str, Any]:
    return {"cache": str(tmp_path / "cache")}


def file_of(storage: ClientStorage) -> Any:
    cache: Any = storage.cache
    assert cache._file is not None
    return cache._file


def wait_until_written(storage: ClientStorage) -> None:
    """All that is known is in the file."""
    cache: Any = storage.cache
    wait_until(
        lambda: not cache._backlog.pending and not cache._backlog.changes, "a write"
    )


@contextmanager
def stopped_in_the_middle_of_a_write(path: Path) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
    try:
        _pid, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        yield
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def other(server: InProcessServer) -> Iterator[ClientStorage]:
    """Of another host."""
    with client_of(server) as storage:
        yield storage


def test_nobody_waits_for_a_process_that_was_stopped_while_it_wrote(
    server, other, cached
):
    """The others read what is right and commit, and use the file when it has gone."""
    with client_of(server, **cached) as storage:
        old = commit(storage, x=b"old", y=b"y")
        wait_until_written(storage)
        with stopped_in_the_middle_of_a_write(file_of(storage).path):
            new = commit(other, x=b"new")
            wait_for_position(storage, new)
            assert seen(storage, "x") == b"new"
            assert storage.loadBefore(X, new) == (b"old", old, new)
            commit(storage, y=b"mine")
            assert seen(storage, "y") == b"mine"
            # Nor does one that begins now.
            newcomer = [sys.executable, "-c", NEWCOMER]
            address = "{}:{}".format(*server.address)
            arguments = [address, cached["cache"], X.hex()]
            found = subprocess.run(
                newcomer + arguments, check=True, timeout=60, stdout=subprocess.PIPE
            )
            assert found.stdout == b"new"
        wait_until_written(storage)
        assert file_of(storage).state().through == storage.lastTransaction()
        assert storage.cache.load(b"12345678", new) is None


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "no space"), lmdb.DiskError("no space")]
)
def test_a_full_disk_harms_nobody(server, other, cached, monkeypatch, error):
    monkeypatch.setattr(cache_writer, "RETRY_WAIT_S", 0.01)
    with client_of(server, **cached) as storage:
        commit(storage, x=b"old")
        wait_until_written(storage)

        def fail(*_args: Any) -> Any:
            raise error

        cache: Any = storage.cache
        with monkeypatch.context() as full:
            full.setattr(file_of(storage), "extend", fail)
            for number in range(3):
                data = b"%d" % number
                wait_for_position(storage, commit(other, x=data))
                assert seen(storage, "x") == data
                commit(storage, x=b"own " + data)
                assert seen(storage, "x") == b"own " + data
            wait_until(lambda: cache.errors, "an error")
        wait_until_written(storage)
        assert not cache.is_aside
        loads = server.on_loop(lambda: server.served.counters.loads)
        with client_of(server, **cached) as newcomer:
            assert seen(newcomer, "x") == b"own 2"
        assert server.on_loop(lambda: server.served.counters.loads) <= loads + 1


def test_two_databases_in_one_directory_by_mistake_are_two(tmp_path, cached):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with (
        serving(tmp_path / "one" / "Data.fs") as one,
        serving(tmp_path / "two" / "Data.fs") as two,
        client_of(one, **cached) as of_one,
        client_of(two, **cached) as of_two,
    ):
        commit(of_one, x=b"one")
        commit(of_two, x=b"two")
        for storage, data in ((of_one, b"one"), (of_two, b"two")):
            wait_until_written(storage)
            assert seen(storage, "x") == data
        # Whoever comes says hello with what was used last: the other one.
        for server, data in ((one, b"one"), (two, b"two")) * 2:
            with client_of(server, **cached) as newcomer:
                assert seen(newcomer, "x") == data


def test_a_damaged_file_is_dropped_by_who_comes_next(server, cached):
    with client_of(server, **cached) as storage:
        commit(storage, x=b"data")
        wait_until_written(storage)
        path = file_of(storage).path
    size = path.stat().st_size
    for damage in (lambda: path.write_bytes(b"?" * size), lambda: os.truncate(path, 5)):
        damage()
        with client_of(server, **cached) as storage:
            assert seen(storage, "x") == b"data"
            wait_until_written(storage)
            assert seen(storage, "x") == b"data"
            assert file_of(storage).state()


def test_what_is_stored_twice_in_a_transaction_is_there_once(server, other, cached):
    """And when its change comes once more it is still what is current."""
    with client_of(server, **cached) as storage:
        commit(storage, x=b"old")
        transaction = TransactionMetaData()
        storage.tpc_begin(transaction)
        _data, serial = storage.load(X)
        for data in (b"first", b"second"):
            storage.store(X, serial, data, "", transaction)
        storage.tpc_vote(transaction)
        tid = storage.tpc_finish(transaction)
        wait_until_written(storage)
        with client_of(server, **cached) as another:
            loads = server.on_loop(lambda: server.served.counters.loads)
            for each in (storage, another):
                assert each.loadBefore(X, following(tid)) == (b"second", tid, None)
                assert each.loadBefore(X, tid) == (b"old", serial, tid)
            assert server.on_loop(lambda: server.served.counters.loads) == loads
        wait_for_position(storage, commit(other, x=b"new"))
        assert storage.load(X)[0] == b"new"


def test_a_cache_is_as_warm_after_many_restarts_as_after_one(server, other, cached):
    names = [f"o{number}" for number in range(200)]
    with client_of(server, **cached) as storage:
        commit(storage, **dict.fromkeys(names, b"data"))
    for number in range(8):
        commit(other, **{names[number]: b"new"})
        with client_of(server, **cached) as storage:
            wait_for_position(storage, other.lastTransaction())
            loads = server.on_loop(lambda: server.served.counters.loads)
            for name in names:
                assert seen(storage, name)
            assert server.on_loop(lambda: server.served.counters.loads) <= loads + 1
            wait_until_written(storage)


def copy_of(data: Path) -> Path:
    """The same database with the same id, as somebody has restored it elsewhere."""
    shutil.copytree(data.parent, data.parent.with_name("copy"))
    return data.parent.with_name("copy") / data.name


def clock(ahead_s: float, now: Callable[[], float] = time.time) -> float:
    return now() + ahead_s


@pytest.mark.parametrize("is_late", [False, True])
def test_processes_at_two_servers_that_have_parted_see_each_its_own(
    tmp_path, cached, monkeypatch, is_late
):
    """Split by mistake: both have the id of the database, and an epoch, in common."""
    data = tmp_path / "data" / "Data.fs"
    data.parent.mkdir()
    with serving(data) as server, client_of(server) as storage:
        old = commit(storage, x=b"old", y=b"y")
    with (
        serving(data) as one,
        serving(copy_of(data)) as two,
        client_of(one, **cached) as of_one,
        client_of(two, **cached) as of_two,
    ):
        ahead_s = 0.0
        both = [(of_one, b"one"), (of_two, b"two")]
        for storage, _name in both:
            assert seen(storage, "x") == b"old"
        for number in range(3):
            for storage, name in both:
                # Else, within a moment after a start, they may give the same tid.
                ahead_s += 1
                monkeypatch.setattr(time, "time", partial(clock, ahead_s))
                tid = commit(storage, x=name + b" %d" % number)
                if not is_late:
                    wait_until_written_or_aside(storage)
                assert storage.loadBefore(X, following(old)) is not None
                assert seen(storage, "x") == name + b" %d" % number
                found = storage.loadBefore(X, following(tid))
                assert found == (name + b" %d" % number, tid, None)
        for storage, name in both:
            wait_until_written_or_aside(storage)
            assert seen(storage, "x") == name + b" 2"


def wait_until_written_or_aside(storage: ClientStorage) -> None:
    cache: Any = storage.cache
    wait_until(
        lambda: (
            cache.is_aside or not (cache._backlog.pending or cache._backlog.changes)
        ),
        "a write",
    )


def test_tids_far_ahead_are_tids(server, cached, monkeypatch):
    """The clock of the server has jumped, and jumps back."""
    with client_of(server, **cached) as storage, client_of(server, **cached) as other:
        tids = [commit(storage, x=b"0")]
        for number, ahead_s in enumerate((10 * 365 * 86400, -86400, 0), 1):
            monkeypatch.setattr(time, "time", partial(clock, ahead_s))
            tids.append(commit(storage, x=b"%d" % number))
            wait_for_position(other, tids[-1])
            wait_until_written(storage)
            assert seen(other, "x") == b"%d" % number
            for tid, after in pairwise(tids):
                assert other.loadBefore(X, after) == (
                    b"%d" % tids.index(tid),
                    tid,
                    after,
                )
        assert tids == sorted(tids)


def test_where_no_file_can_be_written_each_caches_for_itself(server, tmp_path):
    (tmp_path / "cache").mkdir()
    # Even the superuser cannot make a file of that name.
    (tmp_path / "cache" / "lock").mkdir()
    with client_of(server, cache=str(tmp_path / "cache")) as storage:
        tid = commit(storage, x=b"data")
        loads = server.on_loop(lambda: server.served.counters.loads)
        for _ in range(3):
            assert storage.loadBefore(X, following(tid)) == (b"data", tid, None)
        assert server.on_loop(lambda: server.served.counters.loads) <= loads + 1
