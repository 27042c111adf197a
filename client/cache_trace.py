"""What a cache is asked for, in a file: for ``zeolith cache simulate``.

``traced`` puts a cache between a storage and its cache that notes every call and passes
it on; without a path there is nothing in between. The threads that call append to a
queue; a thread of the trace's own writes what is in it, once a second or when it is
long. No error of a trace reaches those who call: the trace ends, and the log says so
once. ``kill -9`` costs what was not written yet: the last second, or ``QUEUE_MAX``
events.

Several storages and processes may write to one file. Each write is one block, appended
by one call of the system; a block names its process and its cache. Blocks of processes
that go on at the same time are in order but for the second that they wait. After
``fork`` the child is a writer of its own, and of its own cache, unless the cache is
one that processes share.

The format, all integers big-endian. A trace is blocks without anything in between; a
block is a header and a body:

======  ===========  ==========================================================
offset  type         meaning
======  ===========  ==========================================================
0       4 bytes      ``ZCT1``
4       u32          length of the body
8       u32          events in it
12      u32          process id
16      u64          which cache: blocks with the same number are of the same one
24      u64          how much the cache may hold, in bytes
32      u32          what an entry costs beside its data, in bytes
36      u32          the part of the cache that a record may have at most: 4 for 1/4
40      u32          the size of the pages that it consists of; 0 if of none
44      u64          time of the first event, microseconds since the epoch
52      bytes        the body, compressed with zlib: events of 25 bytes each
======  ===========  ==========================================================

======  ===========  ==========================================================
offset  type         meaning of an event's fields
======  ===========  ==========================================================
0       u8           1 hit, 2 miss, 3 stored, 4 written, 5 invalidated, 6 one object
                     forgotten, 7 everything forgotten
1       u32          microseconds since the first event of the block
5       8 bytes      oid
13      8 bytes      tid
21      u32          length of the data
======  ===========  ==========================================================

The tid is that of the revision that was found or stored; of a miss, the snapshot asked
for; of an invalidation, the change; when everything was forgotten, the last tid, and
the oid is null. A reader that meets something else goes on at the next ``ZCT1``: the
last block is torn if the disk was full.
"""

import atexit
import logging
import os
import secrets
import threading
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from struct import Struct
from time import monotonic_ns, time_ns
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

from zeolith.client.cache import ENTRY_BYTES, Cache
from zeolith.client.changes import Change
from zeolith.client.tids import Z64

logger = logging.getLogger(__name__)

FLUSH_INTERVAL_S = 1.0
# So many events are written before the second is over.
QUEUE_LONG = 10_000
# The disk does not keep up: what comes now is counted and dropped.
QUEUE_MAX = 500_000
BLOCK_EVENTS_MAX = 50_000
# Who forgets a trace shall not find the disk full.
TRACE_BYTES_MAX = 1024**3
# A disk that hangs does not keep a storage from being closed.
END_TIMEOUT_S = 10.0

MAGIC = b"ZCT1"
# Kinds of events. Stored is what the server has answered, written what a transaction of
# this storage has committed; either may be refused by the cache.
HIT, MISS, STORE, WRITE, INVALIDATE, FORGET, FORGET_ALL = range(1, 8)
_HEADER = Struct(">4sIIIQQIIIQ")
# Of a cache in memory.
_RECORD_PART = 4
_EVENT = Struct(">BI8s8sI")
_MICROSECONDS_MAX = 2**32 - 1
_SEARCH_BYTES = 1024 * 1024

CacheT = TypeVar("CacheT", bound=Cache)


class Block(NamedTuple):
    """Events of one process with one cache, one after the other."""

    pid: int
    # Blocks with the same number are of the same cache.
    cache: int
    cache_bytes: int
    entry_bytes: int
    record_part: int
    page_bytes: int
    # Microseconds since the epoch.
    started_us: int
    event_count: int
    packed: bytes

    def events(self) -> Iterator[tuple[int, int, bytes, bytes, int]]:
        """``(kind, microseconds after started_us, oid, tid, size)`` of each."""
        return cast(
            Iterator[tuple[int, int, bytes, bytes, int]],
            _EVENT.iter_unpack(self.packed),
        )


def blocks(path: str | Path) -> Iterator[Block]:
    """The blocks of a trace; what is torn is left out. Raises OSError."""
    with open(path, "rb") as file:
        while True:
            start = file.tell()
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                return
            block = _block(header, file)
            if block is not None:
                yield block
            elif not _seek_magic(file, start + 1):
                return


def _block(header: bytes, file: BinaryIO) -> Block | None:
    """The block whose body comes next; None if this is none."""
    magic, size, count, *rest = _HEADER.unpack(header)
    # zlib makes what cannot be made smaller a little larger.
    if (
        magic != MAGIC
        or count > BLOCK_EVENTS_MAX
        or size > 2 * count * _EVENT.size + 64
    ):
        return None
    packed_bytes = count * _EVENT.size
    try:
        inflating = zlib.decompressobj()
        # More is nothing that we have written, however much it may be.
        packed = inflating.decompress(file.read(size), packed_bytes + 1)
    except zlib.error:
        return None
    if len(packed) != packed_bytes or not inflating.eof:
        return None
    pid, cache, cache_bytes, entry_bytes, record_part, page_bytes, started_us = rest
    return Block(
        pid,
        cache,
        cache_bytes,
        entry_bytes,
        record_part,
        page_bytes,
        started_us,
        count,
        packed,
    )


def _seek_magic(file: BinaryIO, start: int) -> bool:
    """Go to the first place from ``start`` on where a block may begin, if any."""
    while True:
        file.seek(start)
        piece = file.read(_SEARCH_BYTES)
        found = piece.find(MAGIC)
        if found >= 0:
            file.seek(start + found)
            return True
        if len(piece) < _SEARCH_BYTES:
            return False
        start += len(piece) - len(MAGIC) + 1


def traced(cache: CacheT, path: str | None) -> CacheT:
    """``cache``, and from now on a trace of it at ``path``, if that is not None.

    Raises OSError if the file cannot be written, ValueError if it is something else.
    """
    if path is None:
        return cache
    try:
        trace = Trace(path, cache)
    except BaseException:
        cache.close()
        raise
    # It has all that the cache has: what it does not note, it passes on.
    return cast(CacheT, TracedCache(cache, trace))


class Trace:
    """The file, and what is not in it yet."""

    def __init__(self, path: str, cache: Any):
        self.path = path
        # Events that were noted and are not in the file, for there were too many.
        self.dropped = 0
        # Why nothing is written any more; None while all is well.
        self.error: str | None = None
        self._cache = cache
        self._fd = _open(path)
        # Together they tell the time of an event, also when the clock jumps.
        self._started_ns = time_ns() - monotonic_ns()
        self._begin()
        atexit.register(self.end)

    def _begin(self) -> None:
        self._number = secrets.randbits(63)
        self._queue: deque[tuple[int, int, bytes, bytes, int]] = deque()
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_ended = self._fd is None
        if self._is_ended:
            self._swallow()

    def note(self, kind: int, oid: bytes, tid: bytes, size: int) -> None:
        """One event. Any thread; never waits, never fails."""
        queue = self._queue
        length = len(queue)
        if length < QUEUE_MAX:
            queue.append((kind, monotonic_ns(), oid, tid, size))
        else:
            self.dropped += 1
        if length == QUEUE_LONG:
            self._wake.set()
        if self._thread is None:
            self._start()

    def end(self) -> None:
        """Write what is left, and nothing afterwards. May be called again."""
        self._is_ended = True
        self._wake.set()
        thread = self._thread
        if thread is not None and thread.ident is not None:
            thread.join(END_TIMEOUT_S)
        if thread is None or not thread.is_alive():
            self.flush()
            self._close()

    def forget_parent(self) -> None:
        """In a forked child: what is in the queue, the parent writes."""
        self._begin()

    def flush(self) -> None:
        """Write what is in the queue now."""
        with self._lock:
            try:
                for _round in range(1 + len(self._queue) // BLOCK_EVENTS_MAX):
                    self._write_block()
            # Whatever it is: those who are traced need not know.
            except Exception as error:  # noqa: BLE001
                self._fail(f"{type(error).__name__}: {error}")

    def _start(self) -> None:
        with self._lock:
            if self._thread is None and not self._is_ended:
                self._thread = threading.Thread(
                    target=self._run, name="zeolith-trace", daemon=True
                )
                try:
                    self._thread.start()
                except RuntimeError as error:
                    self._fail(str(error))

    def _run(self) -> None:
        while not self._is_ended and self._fd is not None:
            self._wake.wait(FLUSH_INTERVAL_S)
            self._wake.clear()
            self.flush()

    def _write_block(self) -> None:
        queue = self._queue
        events = [queue.popleft() for _ in range(min(len(queue), BLOCK_EVENTS_MAX))]
        if not events or self._fd is None:
            return
        if os.fstat(self._fd).st_size >= TRACE_BYTES_MAX:
            self._fail(f"it has {TRACE_BYTES_MAX // 1024**2} MB, which is enough")
            return
        start_ns = events[0][1]
        body = zlib.compress(b"".join(_packed(events, start_ns)), 1)
        header = _HEADER.pack(
            MAGIC,
            len(body),
            len(events),
            os.getpid(),
            self._cache_number(),
            self._cache.cache_bytes,
            getattr(self._cache, "entry_bytes", ENTRY_BYTES),
            getattr(self._cache, "record_part", _RECORD_PART),
            getattr(self._cache, "page_bytes", 0),
            (self._started_ns + start_ns) // 1000,
        )
        block = header + body
        if os.write(self._fd, block) < len(block):
            raise OSError("the disk is full")

    def _cache_number(self) -> int:
        """Ours, or that of a cache which processes share: they all know its path."""
        path = self._cache.path
        if path is None:
            return self._number
        return int.from_bytes(blake2b(bytes(path), digest_size=8).digest(), "big")

    def _fail(self, reason: str) -> None:
        self.error = reason
        self._close()
        logger.warning("%s: the trace of the cache ends: %s", self.path, reason)

    def _close(self) -> None:
        fd, self._fd = self._fd, None
        self._swallow()
        if fd is not None:
            os.close(fd)
        atexit.unregister(self.end)

    def _swallow(self) -> None:
        """Nothing is kept from now on."""
        self._queue = deque(maxlen=0)


def _packed(
    events: list[tuple[int, int, bytes, bytes, int]], start_ns: int
) -> Iterator[bytes]:
    pack = _EVENT.pack
    for kind, at_ns, oid, tid, size in events:
        # Threads note side by side: one may have looked at the clock before the first.
        after_us = max(0, min((at_ns - start_ns) // 1000, _MICROSECONDS_MAX))
        yield pack(kind, after_us, oid, tid, size)


def _open(path: str) -> int | None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    start = os.pread(fd, len(MAGIC), 0)
    if not MAGIC.startswith(start):
        os.close(fd)
        raise ValueError(f"{path} is no trace of a cache; nothing is written to it")
    return fd


class TracedCache:
    """A cache that tells ``trace`` what it is asked for. Any thread.

    What is not here is the cache's own.
    """

    def __init__(self, cache: Cache, trace: Trace):
        self.trace = trace
        self._cache = cache
        self._load = cache.load
        self._note = trace.note

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def __len__(self) -> int:
        return len(cast(Any, self._cache))

    def load(
        self, oid: bytes, before: bytes
    ) -> tuple[bytes, bytes, bytes | None] | None:
        """See Cache.load."""
        found = self._load(oid, before)
        if found is None:
            self._note(MISS, oid, before, 0)
        else:
            self._note(HIT, oid, found[1], len(found[0]))
        return found

    def store(
        self, oid: bytes, tid: bytes, end: bytes | None, data: bytes, *rest: Any
    ) -> None:
        """See Cache.store."""
        self._note(STORE, oid, tid, len(data))
        self._cache.store(oid, tid, end, data, *rest)

    def store_committed(
        self, tid: bytes, records: Mapping[bytes, bytes], *rest: Any
    ) -> None:
        """See Cache.store_committed."""
        for oid, data in records.items():
            self._note(WRITE, oid, tid, len(data))
        self._cache.store_committed(tid, records, *rest)

    def apply(self, changes: Sequence[Change]) -> None:
        """See Cache.apply."""
        for _since, tid, oids, _transaction in changes:
            for oid in oids:
                self._note(INVALIDATE, oid, tid, 0)
        self._cache.apply(changes)

    def forget(self, oid: bytes) -> None:
        """See Cache.forget."""
        self._note(FORGET, oid, Z64, 0)
        self._cache.forget(oid)

    def forget_all(self, valid_through: bytes) -> None:
        """See Cache.forget_all."""
        self._note(FORGET_ALL, Z64, valid_through, 0)
        self._cache.forget_all(valid_through)

    def close(self) -> None:
        """See Cache.close; the trace ends."""
        # While the cache still has its name.
        self.trace.end()
        self._cache.close()

    def reset(self, valid_through: bytes) -> None:
        """See Cache.reset."""
        self.trace.forget_parent()
        self._cache.reset(valid_through)
