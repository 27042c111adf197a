"""What client processes do, and what they measure meanwhile.

A workload is a generator that runs in a process of its own. All that it does before
its first ``yield`` is preparation; then it waits until every process of its crew is
prepared. What it yields the second time is its Work; then it cleans up.

Every storage is a fresh one with an empty cache, and every item is read once, so each
load is one that the server must answer. ``share`` is the number of the process in its
crew, and of its shelf.
"""

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import transaction
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.utils import maxtid

from . import dataset, echo
from .servers import Endpoint


@dataclass(frozen=True, slots=True)
class Work:
    """What one process did between two moments of the machine's monotonic clock."""

    latencies_s: list[float]
    operations: int
    started_s: float
    ended_s: float


Workload = Iterator[Work | None]


def open_db(endpoint: Endpoint, connections: int = 7) -> Any:
    """A DB whose ZODB connections keep every object."""
    return DB(endpoint.open(), pool_size=connections, cache_size=1_000_000)


def timed(steps: int, step: Callable[[int], object]) -> Work:
    """Call ``step`` with 0, 1, 2 ... and time each call."""
    clock = time.monotonic
    latencies_s = []
    started_s = before_s = clock()
    for number in range(steps):
        step(number)
        after_s = clock()
        latencies_s.append(after_s - before_s)
        before_s = after_s
    return Work(latencies_s, steps, started_s, before_s)


def load_from_storage(endpoint: Endpoint, share: int, loads: int) -> Workload:
    """Load records, one after the other, without a ZODB connection."""
    db = open_db(endpoint)
    shelves = range(-(-loads // dataset.ITEMS_PER_SHELF))
    oids = dataset.oids(db.open(), shelves)
    random.Random(share).shuffle(oids)
    db.close()
    storage = endpoint.open()
    yield None
    yield timed(loads, lambda number: storage.loadBefore(oids[number], maxtid))
    storage.close()


def exchange(endpoint: Endpoint, share: int, loads: int) -> Workload:
    """Send and receive as many bytes as a load does, and nothing else."""
    sock = endpoint.open()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    request = bytes(echo.REQUEST_BYTES)

    def round_trip(_number: int) -> None:
        sock.sendall(request)
        sock.recv(65536)

    round_trip(0)
    yield None
    yield timed(loads, round_trip)
    sock.close()


def load_objects(endpoint: Endpoint, share: int, loads: int) -> Workload:
    """Load objects, one after the other, through a ZODB connection."""
    db = open_db(endpoint)
    items = shuffled_items(db.open(), share, loads)
    yield None
    yield timed(loads, lambda number: items[number]._p_activate())
    transaction.abort()
    db.close()


def load_in_threads(
    endpoint: Endpoint, share: int, threads: int, loads: int
) -> Workload:
    """Load objects through as many ZODB connections of one DB as there are threads."""
    db = open_db(endpoint, threads)
    works: list[Work] = []
    start = threading.Barrier(threads + 1)

    def reader(number: int) -> None:
        items = shuffled_items(db.open(transaction.TransactionManager()), number, loads)
        start.wait()
        start.wait()
        works.append(timed(loads, lambda step: items[step]._p_activate()))

    crew = [threading.Thread(target=reader, args=(each,)) for each in range(threads)]
    for thread in crew:
        thread.start()
    start.wait()
    yield None
    start.wait()
    for thread in crew:
        thread.join()
    yield combined(works)
    db.close()


def commit_to_storage(endpoint: Endpoint, share: int, commits: int) -> Workload:
    """Store a new revision of one record again and again, without a connection."""
    db = open_db(endpoint)
    (oid, *_rest) = dataset.oids(db.open(), range(share, share + 1))
    db.close()
    storage = endpoint.open()
    data, serial, _end = storage.loadBefore(oid, maxtid)

    def commit(_number: int) -> None:
        nonlocal serial
        metadata = TransactionMetaData()
        storage.tpc_begin(metadata)
        storage.store(oid, serial, data, "", metadata)
        storage.tpc_vote(metadata)
        serial = storage.tpc_finish(metadata)

    commit(0)
    yield None
    yield timed(commits, commit)
    storage.close()


def commit_objects(
    endpoint: Endpoint, share: int, commits: int, objects: int
) -> Workload:
    """Change ``objects`` items of the own shelf in each of some transactions."""
    db = open_db(endpoint)
    items = shuffled_items(db.open(), share, dataset.ITEMS_PER_SHELF)

    def commit(number: int) -> None:
        for step in range(objects):
            item = items[(number * objects + step) % len(items)]
            item["data"] = dataset.payload()
        transaction.commit()

    for item in items:
        item._p_activate()
    commit(0)
    yield None
    yield timed(commits, commit)
    transaction.abort()
    db.close()


def insert_objects(
    endpoint: Endpoint, share: int, transactions: int, objects: int
) -> Workload:
    """Add new items, ``objects`` of them in each transaction."""
    db = open_db(endpoint)
    inserted = db.open().root()["inserted"]
    # Made beforehand: this row is not about making objects.
    shelves = [dataset.new_shelf(objects) for _ in range(transactions)]

    def insert(number: int) -> None:
        inserted.append(shelves[number])
        transaction.commit()

    len(inserted)
    yield None
    yield timed(transactions, insert)
    db.close()


def shuffled_items(connection: Any, share: int, count: int) -> list[Any]:
    """``count`` ghosts, the first of them from the shelf of this share."""
    items: list[Any] = []
    number = share
    while len(items) < count:
        items += dataset.shelf(connection, number % dataset.SHELVES)
        number += 1
    random.Random(share).shuffle(items)
    return items[:count]


def combined(works: list[Work]) -> Work:
    """What several threads or processes did side by side."""
    return Work(
        latencies_s=[each for work in works for each in work.latencies_s],
        operations=sum(work.operations for work in works),
        started_s=min(work.started_s for work in works),
        ended_s=max(work.ended_s for work in works),
    )
