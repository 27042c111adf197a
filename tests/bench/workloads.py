"""What client processes do, and what they measure meanwhile.

A workload is a generator that runs in a process of its own. All that it does before
its first ``yield`` is preparation; then it waits until every process of its crew is
prepared. What it yields the second time is its Work; then it cleans up.

Every storage is a fresh one with an empty cache, and every item is read once, so each
load is one that the server must answer. ``share`` is the number of the process in its
crew, and of its shelf.
"""

import gc
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import transaction
from BTrees.IOBTree import IOBTree
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.mvccadapter import MVCCAdapter
from ZODB.POSException import ConflictError
from ZODB.utils import maxtid

from . import dataset, echo
from .servers import Endpoint

# What is rung when a committer has done all it had to; the item of that number.
BELL = 0
HEARING_S = 120
# The hot tree: some buckets, and keys enough to find a new one at once.
HOT_KEYS = 1000
KEY_MAX = 2**31 - 1
# Of the tree, in a row before it is the other's turn.
LOOKUPS = 20

# A transaction, and a moment of the machine's monotonic clock.
Moment = tuple[bytes, float]


@dataclass(frozen=True, slots=True)
class Work:
    """What one process did between two moments of the machine's monotonic clock."""

    latencies_s: list[float]
    operations: int
    started_s: float
    ended_s: float
    # When a committer began each transaction, or each listener heard of it.
    moments: list[list[Moment]] = field(default_factory=list)


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


def walk_tree(endpoint: Endpoint, share: int, objects: int, at_once: int) -> Workload:
    """Use the first ``objects`` of the tree, in the order of its keys.

    They are prefetched, ``at_once`` of them; or, if that is 0, nobody says that they
    will be used.
    """
    db = open_db(endpoint)
    connection = db.open()
    tree = connection.root()["tree"]
    tree._p_activate()

    def walk(_number: int) -> None:
        values = islice(tree.values(), objects)
        while batch := list(islice(values, at_once or 1)):
            if at_once:
                connection.prefetch(batch)
            for item in batch:
                item._p_activate()

    yield None
    whole = timed(1, walk)
    yield Work(whole.latencies_s, objects, whole.started_s, whole.ended_s)
    transaction.abort()
    db.close()


def find_in_tree(endpoint: Endpoint, share: int, chunks: int) -> Workload:
    """Look up items of the tree at random, without and with reading ahead.

    The two take turns, with the same items; a latency is that of LOOKUPS of them,
    without at even places and with at odd ones.
    """
    dbs = [
        DB(endpoint.open(read_ahead=how), cache_size=1_000_000) for how in (False, True)
    ]
    trees = [db.open(transaction.TransactionManager()).root()["tree"] for db in dbs]
    places = random.Random(share).sample(range(dataset.TREE_ITEMS), chunks * LOOKUPS)
    keys = [dataset.tree_key(place) for place in places]

    def look_up(number: int) -> None:
        chunk, which = divmod(number, 2)
        for key in keys[chunk * LOOKUPS : (chunk + 1) * LOOKUPS]:
            trees[which][key]._p_activate()

    # One of them would pay for the garbage of both.
    gc.disable()
    yield None
    yield timed(2 * chunks, look_up)
    transaction.abort()
    for db in dbs:
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


def load_beside(endpoint: Endpoint, share: int, computing: int, loads: int) -> Workload:
    """Load records while ``computing`` threads of this process compute.

    They have a core of their own, as threads have on a machine with enough of them.
    """
    is_over = threading.Event()
    core = max(os.sched_getaffinity(os.getppid()))
    crew = [
        threading.Thread(target=_compute, args=(is_over, core))
        for _ in range(computing)
    ]
    steps = load_from_storage(endpoint, share, loads)
    next(steps)
    yield None
    for thread in crew:
        thread.start()
    work = next(steps)
    is_over.set()
    for thread in crew:
        thread.join()
    yield work
    next(steps, None)


def _compute(is_over: threading.Event, core: int) -> None:
    """Nothing but Python: it gives the GIL back when another thread asks for it."""
    os.sched_setaffinity(0, {core})
    total = 0
    while not is_over.is_set():
        for number in range(1000):
            total += number * number


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


def commit_to_hot_tree(endpoint: Endpoint, share: int, commits: int) -> Workload:
    """Add keys to a BTree to which others add theirs; a conflict is tried again.

    Its time counts for the commit that succeeds. Share 0 makes the tree: a new one
    every time, so that it is as hot as the last time.
    """
    db = open_db(endpoint)
    root = db.open().root()
    chance = random.Random(share)
    if share == 0:
        keys = (chance.randrange(KEY_MAX) for _ in range(HOT_KEYS))
        root["hot"] = IOBTree(dict.fromkeys(keys, 0))
        transaction.commit()
    tree = root["hot"]

    def add(_number: int) -> None:
        key = chance.randrange(KEY_MAX)
        while True:
            try:
                tree[key] = share
                transaction.commit()
                return
            except ConflictError:
                transaction.abort()

    tree.get(0)
    transaction.abort()
    yield None
    yield timed(commits, add)
    transaction.abort()
    db.close()


def commit_and_hear(
    endpoint: Endpoint,
    share: int,
    commits: int,
    listening: int,
    listeners: int,
    told_fd: int,
    tell_fd: int,
) -> Workload:
    """Share 0 commits; every other one, ``listening``, has storages that hear of it.

    It commits again when all have heard. They say so in a pipe, with a byte of each
    process.
    """
    if share:
        return _hear(endpoint, listeners, tell_fd)
    return _announce(endpoint, commits, listening, told_fd)


def _announce(
    endpoint: Endpoint, commits: int, listening: int, told_fd: int
) -> Workload:
    db = open_db(endpoint)
    bell, *items = dataset.shelf(db.open(), BELL)
    began: list[Moment] = []
    latencies_s = []

    def commit(item: Any) -> None:
        item["data"] = dataset.payload()
        transaction.commit()

    for item in (bell, items[0]):
        item._p_activate()
    commit(items[0])
    yield None
    started_s = time.monotonic()
    for _ in range(commits):
        before_s = time.monotonic()
        commit(items[0])
        latencies_s.append(time.monotonic() - before_s)
        began.append((items[0]._p_serial, before_s))
        missing = listening
        while missing:
            missing -= len(os.read(told_fd, missing))
    commit(bell)
    yield Work(latencies_s, commits, started_s, time.monotonic(), [began])
    db.close()


def _hear(endpoint: Endpoint, listeners: int, tell_fd: int) -> Workload:
    db = open_db(endpoint)
    bell = dataset.shelf(db.open(), BELL)[0]._p_oid
    db.close()
    audience = _Audience(listeners, tell_fd)
    crew = [_Listener(endpoint.open(), bell, audience) for _ in range(listeners)]
    yield None
    started_s = time.monotonic()
    for each in crew:
        if not each.has_heard_bell.wait(HEARING_S):
            raise TimeoutError(f"a listener heard of {len(each.heard)} commits only")
    heard = [each.heard for each in crew]
    yield Work([], 0, started_s, time.monotonic(), heard)
    for each in crew:
        each.close()


class _Audience:
    """The listeners of a process, of whom the last one to hear says so in a pipe."""

    def __init__(self, size: int, tell_fd: int) -> None:
        self._size = size
        self._tell_fd = tell_fd
        self._lock = threading.Lock()
        self._heard: Counter[bytes] = Counter()

    def heard(self, transaction_id: bytes) -> None:
        """One of them has, in whatever thread."""
        with self._lock:
            self._heard[transaction_id] += 1
            is_last = self._heard[transaction_id] == self._size
        if is_last:
            os.write(self._tell_fd, b".")


class _Listener(MVCCAdapter):
    """What stands between a storage and the ZODB connections of its database."""

    def __init__(self, storage: Any, bell: bytes, audience: _Audience) -> None:
        self.heard: list[Moment] = []
        self.has_heard_bell = threading.Event()
        self._bell = bell
        self._audience = audience
        super().__init__(storage)
        self.new_instance()

    def invalidate(self, transaction_id: bytes, oids: Any) -> None:
        oids = list(oids)
        super().invalidate(transaction_id, oids)
        self.heard.append((transaction_id, time.monotonic()))
        if self._bell in oids:
            self.has_heard_bell.set()
        else:
            self._audience.heard(transaction_id)


def stay_idle(endpoint: Endpoint, share: int, clients: int) -> Workload:
    """Have databases open, each with a storage and a ZODB connection of its own."""
    dbs = [open_db(endpoint) for _ in range(clients)]
    for db in dbs:
        len(db.open(transaction.TransactionManager()).root()["inserted"])
    yield None
    now_s = time.monotonic()
    yield Work([], clients, now_s, now_s)
    for db in dbs:
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
        moments=[each for work in works for each in work.moments],
    )
