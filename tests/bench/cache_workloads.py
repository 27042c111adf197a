"""What client processes do with a cache on disk, and what they measure.

The two that have one are compared, each with its own way to name it: zeolith's is a
directory that all processes share, ZEO's a file for each. What is cached are the first
records of the data set, by oid. See workloads.py for what a workload is.
"""

import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ZODB.Connection import TransactionMetaData
from ZODB.utils import p64, u64

from .servers import Endpoint
from .workloads import Work, Workload, timed

CACHE_BYTES = 256 * 1024**2
# Of the working set that several processes have.
READ_EACH = 3


def open_cached(endpoint: Endpoint, folder: str, client: str = "client") -> Any:
    """A storage with the cache that is in ``folder``."""
    if endpoint.peer == "zeolith":
        return endpoint.open(cache=folder, cache_size=CACHE_BYTES)
    return endpoint.open(client=client, var=folder, cache_size=CACHE_BYTES)


class Loads:
    """Loads at the storage's own snapshot; counts those that the server answers."""

    def __init__(self, storage: Any):
        self._load = storage.loadBefore
        self._before = p64(u64(storage.lastTransaction()) + 1)
        self.misses = 0
        cache = storage._cache if hasattr(storage, "_cache") else storage.cache
        name = "loadBefore" if hasattr(cache, "loadBefore") else "load"
        self._look_up = getattr(cache, name)
        setattr(cache, name, self._counted)

        self._is_miss = False

    def __call__(self, oid: bytes) -> Any:
        self._is_miss = False
        found = self._load(oid, self._before)
        # ZEO looks twice.
        self.misses += self._is_miss
        return found

    def _counted(self, oid: bytes, before: bytes) -> Any:
        found = self._look_up(oid, before)
        self._is_miss = found is None
        return found


def read_warm(endpoint: Endpoint, share: int, records: int) -> Workload:
    """Open a storage with a full cache, and read all of it at random.

    The first latency is that of opening, the rest are those of reads.
    """
    with _folder() as folder:
        oids = _filled(endpoint, folder, records)
        random.Random(share).shuffle(oids)
        yield None
        storage, ready_s = _open_timed(endpoint, folder)
        load = storage.loadBefore
        before = p64(u64(storage.lastTransaction()) + 1)
        work = timed(records, lambda number: load(oids[number], before))
        storage.close()
        yield replace(work, latencies_s=[ready_s, *work.latencies_s])


def read_after_absence(
    endpoint: Endpoint, share: int, records: int, missed: int
) -> Workload:
    """The same after ``missed`` transactions that the cache has not heard of.

    The only latency is that of opening; the operations are the hits.
    """
    with _folder() as folder:
        oids = _filled(endpoint, folder, records)
        _commit(endpoint, random.Random(share).sample(oids, missed))
        yield None
        storage, ready_s = _open_timed(endpoint, folder)
        loads = Loads(storage)
        work = timed(records, lambda number: loads(oids[number]))
        storage.close()
        yield replace(work, latencies_s=[ready_s], operations=records - loads.misses)


def _open_timed(endpoint: Endpoint, folder: str) -> tuple[Any, float]:
    began_s = time.monotonic()
    storage = open_cached(endpoint, folder)
    return storage, time.monotonic() - began_s


def share_cache(endpoint: Endpoint, share: int, records: int, folder: int) -> Workload:
    """Read one working set in an own order; operations are what the server answered.

    ``folder`` is a number that all members have in common.
    """
    storage = open_cached(endpoint, str(_place(folder)), f"client-{share}")
    loads = Loads(storage)
    oids = [p64(number) for number in range(1, records + 1)]
    yield None
    began_s = time.monotonic()
    for number in range(READ_EACH):
        random.Random(share * READ_EACH + number).shuffle(oids)
        for oid in oids:
            loads(oid)
    ended_s = time.monotonic()
    yield Work([], loads.misses, began_s, ended_s)
    storage.close()


@contextmanager
def shared_folder() -> Iterator[tuple[int, Path]]:
    """A folder that exists meanwhile, and the number by which members know it."""
    with _folder() as name:
        place = Path(name)
        number = place.stat().st_ino
        _place(number).symlink_to(place)
        yield number, place
        _place(number).unlink()


def _place(number: int) -> Path:
    return Path(tempfile.gettempdir()) / f"zeolith-bench-cache-{number}"


def bytes_below(folder: Path) -> int:
    """What the files below ``folder`` take on the disk."""
    return sum(each.stat().st_blocks * 512 for each in folder.rglob("*"))


def _filled(endpoint: Endpoint, folder: str, records: int) -> list[bytes]:
    oids = [p64(number) for number in range(1, records + 1)]
    storage = open_cached(endpoint, folder)
    tid = p64(u64(storage.lastTransaction()) + 1)
    for start in range(0, records, 500):
        storage.prefetch(oids[start : start + 500], tid)
    for oid in oids:
        storage.loadBefore(oid, tid)
    storage.close()
    return oids


def _commit(endpoint: Endpoint, oids: list[bytes]) -> None:
    """One transaction for each of ``oids``."""
    storage = endpoint.open()
    for oid in oids:
        data, tid = storage.load(oid)
        transaction = TransactionMetaData()
        storage.tpc_begin(transaction)
        storage.store(oid, tid, data, "", transaction)
        storage.tpc_vote(transaction)
        storage.tpc_finish(transaction)
    storage.close()


@contextmanager
def _folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory("-bench-cache") as name:
        yield name
