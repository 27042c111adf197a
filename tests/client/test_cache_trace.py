"""Traces: whole to their last block, and no concern of those who are traced."""

import errno
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ZODB.utils import p64

from zeolith.client import cache_trace
from zeolith.client.cache import ENTRY_BYTES, Cache, MemoryCache
from zeolith.client.cache_place import CachePlace
from zeolith.client.cache_trace import (
    FORGET,
    FORGET_ALL,
    HIT,
    INVALIDATE,
    MISS,
    STORE,
    WRITE,
    Trace,
    TracedCache,
    blocks,
    traced,
)
from zeolith.client.disk_cache import RECORD_PART, DiskCache
from zeolith.client.storage import ClientStorage
from zeolith.client.tids import Z64

from ..support.changes import one_change
from ..support.gates import Gate
from ..support.script import ScriptedServer
from ..support.waiting import wait_until

A, B = p64(1), p64(2)
T1, T2, T3 = map(p64, range(1, 4))


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "cache.trace")


@pytest.fixture
def cache(path: str, nothing_left_behind: None) -> Iterator[MemoryCache]:
    cache = traced(MemoryCache(), path)
    cache.forget_all(T1)
    yield cache
    cache.close()


def trace_of(cache: Any) -> Trace:
    assert isinstance(cache, TracedCache)
    return cache.trace


def events(path: str) -> list[tuple[int, bytes, bytes, int]]:
    """All events of a trace but their times."""
    return [
        (event[0], *event[2:]) for block in blocks(path) for event in block.events()
    ]


def written(cache: MemoryCache, *oids: bytes) -> int:
    """Write a block with a miss of each; the size of the file after that."""
    trace = trace_of(cache)
    for oid in oids:
        cache.load(oid, T2)
    trace.flush()
    return os.path.getsize(trace.path)


def test_without_a_path_there_is_nothing_in_between():
    cache = MemoryCache()
    assert traced(cache, None) is cache
    cache.close()


def test_every_call_is_noted_and_passed_on(cache, path):
    assert cache.load(A, T2) is None
    cache.store(A, T1, None, b"data", T1, cache.history)
    assert cache.load(A, T2) == (b"data", T1, None)
    cache.store_committed(T2, {B: b"larger data"}, cache.history)
    cache.apply([*one_change(T2, [A, B]), *one_change(T3, [p64(3)])])
    assert cache.load(A, T3) is None
    assert len(cache) == 2
    cache.forget(B)
    assert len(cache) == 1
    cache.close()
    assert events(path) == [
        (FORGET_ALL, Z64, T1, 0),
        (MISS, A, T2, 0),
        (STORE, A, T1, 4),
        (HIT, A, T1, 4),
        (WRITE, B, T2, 11),
        (INVALIDATE, A, T2, 0),
        (INVALIDATE, B, T2, 0),
        (INVALIDATE, p64(3), T3, 0),
        (MISS, A, T3, 0),
        (FORGET, B, Z64, 0),
    ]
    assert (cache.hits, cache.misses, cache.valid_through) == (1, 2, T3)


def test_it_has_all_that_a_cache_has(cache):
    names = [name for name in vars(Cache) if not name.startswith("_")]
    names += list(Cache.__annotations__)
    assert {"load", "apply", "valid_through", "history"} <= set(names)
    for name in names:
        assert hasattr(cache, name)
    # And nothing of the protocol's own, which would do nothing in the cache's place.
    assert Cache not in TracedCache.__mro__


def test_a_block_tells_whose_it_is_and_when(cache, path):
    cache.load(A, T2)
    cache.close()
    (block,) = blocks(path)
    assert block.pid == os.getpid()
    assert block.cache_bytes == cache.cache_bytes
    assert block.entry_bytes == ENTRY_BYTES
    first, second = block.events()
    assert first[1] == 0 <= second[1]
    age_s = os.stat(path).st_mtime - block.started_us / 1e6
    assert -1 < age_s < 60


def test_two_caches_in_one_file_are_told_apart(cache, path):
    other = traced(MemoryCache(), path)
    other.load(A, T2)
    other.close()
    cache.close()
    assert len({block.cache for block in blocks(path)}) == 2


def test_a_cache_that_is_shared_is_one_for_all_who_trace_it(path, tmp_path):
    """It has a number by its file, and a smaller part of it is one record at most."""
    for database_id in (b"1" * 16, b"1" * 16, b"2" * 16):
        disk = DiskCache(CachePlace(tmp_path / "cache"), "1", 10**6)
        cache = traced(disk, path)
        cache.identify(database_id, 1)
        cache.load(A, T2)
        cache.close()
        assert disk.path is None
    one, again, another = blocks(path)
    assert one.cache == again.cache != another.cache
    assert one.record_part == RECORD_PART


def test_who_cannot_trace_has_no_cache_either(tmp_path):
    """Or nobody would close it."""
    disk = DiskCache(CachePlace(tmp_path / "cache"), "1", 10**6)
    disk.identify(b"1" * 16, 1)
    assert disk.path is not None
    with pytest.raises(FileNotFoundError):
        traced(disk, str(tmp_path / "nowhere" / "cache.trace"))
    assert disk.path is None


def test_what_is_noted_is_written_soon_by_itself(cache, path):
    cache.load(A, T2)
    wait_until(lambda: (MISS, A, T2, 0) in events(path), "the event in the file")


def test_a_long_queue_is_written_at_once(path, monkeypatch, nothing_left_behind):
    monkeypatch.setattr(cache_trace, "FLUSH_INTERVAL_S", 1000)
    monkeypatch.setattr(cache_trace, "QUEUE_LONG", 10)
    cache = traced(MemoryCache(), path)
    for _ in range(11):
        cache.load(A, T2)
    wait_until(lambda: events(path), "the events in the file")
    cache.close()
    assert len(events(path)) == 11


def test_many_events_are_several_blocks(cache, path, monkeypatch):
    monkeypatch.setattr(cache_trace, "BLOCK_EVENTS_MAX", 10)
    for number in range(25):
        cache.load(p64(number), T2)
    cache.close()
    assert [event[1] for event in events(path)][1:] == [p64(n) for n in range(25)]
    assert all(block.event_count <= 10 for block in blocks(path))


def test_after_its_end_nothing_is_noted(cache, path):
    cache.close()
    before = events(path)
    assert cache.load(A, T2) is None
    cache.close()
    assert events(path) == before


def test_a_later_process_appends(cache, path):
    cache.close()
    again = traced(MemoryCache(), path)
    again.load(B, T3)
    again.close()
    assert [event[0] for event in events(path)] == [FORGET_ALL, MISS]


def test_the_file_is_the_owners_alone(cache, path):
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_another_file_is_not_written_to(path):
    Path(path).write_text("precious")
    with pytest.raises(ValueError, match="is no trace of a cache"):
        traced(MemoryCache(), path)
    assert Path(path).read_text() == "precious"


def test_a_place_that_cannot_be_written_is_told_at_once(tmp_path):
    with pytest.raises(FileNotFoundError):
        traced(MemoryCache(), str(tmp_path / "nowhere" / "cache.trace"))


# What goes wrong


def test_every_torn_tail_leaves_the_blocks_before_it(cache, path):
    first = written(cache, A)
    size = written(cache, A, B)
    data = Path(path).read_bytes()
    whole = events(path)
    torn = path + ".torn"
    for length in range(first, size):
        Path(torn).write_bytes(data[:length])
        assert events(torn) == whole[:2]


def test_what_comes_after_a_torn_block_is_read(cache, path, monkeypatch):
    monkeypatch.setattr(cache_trace, "_SEARCH_BYTES", 8)
    first, second = written(cache, A), written(cache, A)
    written(cache, B)
    data = Path(path).read_bytes()
    for length in range(first, second):
        Path(path).write_bytes(data[:length] + data[second:])
        assert [event[1] for event in events(path)] == [Z64, A, B]


def test_a_damaged_byte_costs_a_block_at_most(cache, path):
    first = written(cache, A)
    written(cache, B)
    data = Path(path).read_bytes()
    for place in range(first):
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        Path(path).write_bytes(damaged)
        assert (MISS, B, T2, 0) in events(path)


def test_what_is_no_trace_has_no_blocks(path):
    Path(path).write_bytes(b"ZCT1" * 1000)
    assert not list(blocks(path))
    Path(path).write_bytes(b"")
    assert not list(blocks(path))


@pytest.mark.parametrize("short", [True, False])
def test_a_full_disk_ends_the_trace_and_nothing_else(
    cache, path, monkeypatch, caplog, short
):
    def full(_fd: int, data: bytes) -> int:
        if short:
            return len(data) - 1
        raise OSError(errno.ENOSPC, "No space left on device")

    cache.store(A, T1, None, b"data", T1)
    monkeypatch.setattr(os, "write", full)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert cache.load(A, T2) == (b"data", T1, None)
            trace_of(cache).flush()
    (record,) = caplog.records
    assert "the trace of the cache ends" in record.getMessage()
    error = trace_of(cache).error
    assert error is not None
    assert error.startswith("OSError")


def test_a_trace_does_not_fill_the_disk(cache, path, monkeypatch):
    size = written(cache, A)
    monkeypatch.setattr(cache_trace, "TRACE_BYTES_MAX", size)
    assert written(cache, B) == size
    assert "enough" in (trace_of(cache).error or "")


def test_no_thread_to_be_had_ends_the_trace_and_nothing_else(
    path, monkeypatch, nothing_left_behind
):
    def refuse(_thread: object) -> None:
        raise RuntimeError("can't start new thread")

    cache = traced(MemoryCache(), path)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert cache.load(A, T2) is None
        assert cache.load(A, T2) is None
    assert trace_of(cache).error == "can't start new thread"
    cache.close()


def test_a_disk_that_hangs_costs_events_and_no_time(
    path, monkeypatch, nothing_left_behind
):
    gate = Gate()
    monkeypatch.setattr(os, "write", gate.before(os.write))
    monkeypatch.setattr(cache_trace, "QUEUE_MAX", 20)
    monkeypatch.setattr(cache_trace, "QUEUE_LONG", 0)
    cache = traced(MemoryCache(), path)
    gate.shut()
    cache.load(A, T2)
    gate.wait_until_reached()
    for _ in range(30):
        cache.load(B, T2)
    assert trace_of(cache).dropped == 10
    monkeypatch.setattr(cache_trace, "END_TIMEOUT_S", 0)
    cache.close()
    gate.open()
    thread = trace_of(cache)._thread
    assert thread is not None
    thread.join()
    cache.close()
    assert len(events(path)) == 21


# Processes

LOADING = """
import os, sys
from zeolith.client.cache import MemoryCache
from zeolith.client.cache_trace import traced
from ZODB.utils import p64

cache = traced(MemoryCache(), sys.argv[1])
"""


def program(path: str, text: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", LOADING + text, path])


def test_kill_9_leaves_a_trace_that_can_be_read(path):
    process = program(path, "while True: cache.load(p64(1), p64(2))")
    wait_until(lambda: os.path.exists(path) and len(events(path)) > 20_000, "events")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert set(events(path)) == {(MISS, A, T2, 0)}


def test_a_process_that_ends_without_closing_writes_what_is_left(path):
    process = program(path, "cache.load(p64(1), p64(2))")
    assert process.wait(30) == 0
    assert events(path) == [(MISS, A, T2, 0)]


def test_a_forked_child_writes_its_own_events_alone(path):
    process = program(
        path,
        """
cache.load(p64(1), p64(2))
if os.fork():
    os.wait()
else:
    cache.reset(p64(0))
    cache.load(p64(2), p64(2))
""",
    )
    assert process.wait(30) == 0
    parent, child = sorted(blocks(path), key=lambda block: block.pid == process.pid)[
        ::-1
    ]
    assert parent.pid == process.pid != child.pid
    assert parent.cache != child.cache
    assert [event[2] for event in parent.events()] == [A]
    assert [event[2] for event in child.events()] == [B]


def test_a_storage_traces_its_cache_until_it_is_closed(server: ScriptedServer, path):
    storage = ClientStorage(server.address, cache_trace=path)
    server.answers["load"] = (b"data", T1, None, T1)
    for _ in range(2):
        assert storage.loadBefore(A, T2) == (b"data", T1, None)
    storage.close()
    assert [event[:2] for event in events(path)][-3:] == [
        (MISS, A),
        (STORE, A),
        (HIT, A),
    ]
