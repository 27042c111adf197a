"""The rows of the table: what is measured, how often, and what comes out.

A trial is one run of a crew against one peer; it yields the figures of one or more
rows, so that a row that is another view of the same run costs nothing.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median

from . import cache_workloads, crews, workloads
from .crews import OTHER_CORE, SAME_CORE, Measured
from .servers import Running
from .workloads import Moment, Work

# They tell their clients of changes; those of RelStorage ask.
PUSHING = ("zeo", "zeo-msgpack", "zeolith")
SERVED = (*PUSHING, "relstorage")
STORAGES = (*SERVED, "filestorage")
# They speak TLS.
ENCRYPTING = ("zeo", "zeolith")
# They have a cache on disk.
CACHING = ("zeo", "zeolith")
ALL = (*STORAGES, "socket")

PREFETCHED = 500
PROCESSES_LOADING = 16
PROCESSES_COMMITTING = 8
PROCESSES_COMMITTING_MANY = 32
PROCESSES_IN_ONE_TREE = 8
THREADS_LOADING = 16
LISTENERS = 200
LISTENING_PROCESSES = 4
IDLE_PROCESSES = 5
PROCESSES_OF_A_HOST = 8
HITS_PERCENT_MIN = 0.1
ADDED_MS_MIN = 0.01


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of everything is done in one round."""

    rounds: int
    loads: int
    loads_each: int
    loads_beside: int
    walked: int
    lookups: int
    commits: int
    commits_each: int
    commits_each_of_many: int
    commits_of_100: int
    commits_of_1000: int
    commits_heard: int
    inserted: int
    idle: int
    cached: int
    missed: int
    working_set: int


FULL = Scale(
    rounds=5,
    loads=3000,
    loads_each=1000,
    loads_beside=200,
    walked=100_000,
    lookups=4000,
    commits=300,
    commits_each=400,
    commits_each_of_many=150,
    commits_of_100=30,
    commits_of_1000=8,
    commits_heard=40,
    inserted=100_000,
    idle=500,
    cached=50_000,
    missed=1000,
    working_set=5000,
)
QUICK = Scale(
    rounds=3,
    loads=600,
    loads_each=500,
    loads_beside=60,
    walked=10_000,
    lookups=2000,
    commits=80,
    commits_each=40,
    commits_each_of_many=15,
    commits_of_100=10,
    commits_of_1000=4,
    commits_heard=15,
    inserted=5_000,
    idle=300,
    cached=10_000,
    missed=200,
    working_set=2000,
)
INSERTED_PER_TRANSACTION = 1000


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table."""

    key: str
    title: str
    unit: str
    more_is_better: bool = False


@dataclass(frozen=True, slots=True)
class Trial:
    """``run`` gives a figure for each of ``rows``, in their order."""

    rows: tuple[Row, ...]
    run: Callable[[Running, Scale], tuple[float, ...]]
    # Those to whom it means something.
    peers: tuple[str, ...] = STORAGES
    # It needs a server that has served nobody yet.
    is_fresh: bool = False
    # And that speaks TLS.
    is_encrypted: bool = False


def _load(placement: str, running: Running, scale: Scale) -> tuple[float, ...]:
    is_socket = running.endpoint.peer == "socket"
    found = crews.measure(
        running,
        workloads.exchange if is_socket else workloads.load_from_storage,
        placement=placement,
        loads=scale.loads,
    )
    return (_p50_us(found.work),)


def _load_connection(
    placement: str, running: Running, scale: Scale
) -> tuple[float, ...]:
    found = crews.measure(
        running, workloads.load_objects, placement=placement, loads=scale.loads
    )
    return _p50_us(found.work), _rate(found.work)


def _walk(at_once: int, running: Running, scale: Scale) -> tuple[float, ...]:
    found = crews.measure(
        running, workloads.walk_tree, objects=scale.walked, at_once=at_once
    )
    return (_rate(found.work),)


def _find(running: Running, scale: Scale) -> tuple[float, ...]:
    found = crews.measure(
        running, workloads.find_in_tree, chunks=scale.lookups // workloads.LOOKUPS
    )
    without, reading = found.work.latencies_s[::2], found.work.latencies_s[1::2]
    return (median(without) / median(reading),)


def _load_processes(running: Running, scale: Scale) -> tuple[float, ...]:
    found = crews.measure(
        running,
        workloads.load_objects,
        members=PROCESSES_LOADING,
        loads=scale.loads_each,
    )
    return _rate(found.work), _server_cpu_us(found)


def _load_threads(running: Running, scale: Scale) -> tuple[float, ...]:
    found = crews.measure(
        running,
        workloads.load_in_threads,
        threads=THREADS_LOADING,
        loads=scale.loads_each,
    )
    return (_rate(found.work),)


def _load_beside(running: Running, scale: Scale) -> tuple[float, ...]:
    alone, beside = (
        crews.measure(
            running,
            workloads.load_beside,
            placement=SAME_CORE,
            computing=computing,
            loads=scale.loads_beside,
        ).work
        for computing in (0, 1)
    )
    p50_ms = (_p50_us(beside) - _p50_us(alone)) / 1000
    p99_ms = _p99_ms(beside) - _p99_ms(alone)
    # Next to nothing may come out as less than nothing, which has no ratio.
    return max(p50_ms, ADDED_MS_MIN), max(p99_ms, ADDED_MS_MIN)


def _commit(running: Running, scale: Scale) -> tuple[float, ...]:
    found = crews.measure(running, workloads.commit_to_storage, commits=scale.commits)
    return (_p50_us(found.work),)


def _commit_connection(running: Running, scale: Scale) -> tuple[float, ...]:
    found = crews.measure(
        running, workloads.commit_objects, commits=scale.commits, objects=1
    )
    return (_p50_us(found.work),)


def _commit_100(running: Running, scale: Scale) -> tuple[float, ...]:
    found = crews.measure(
        running, workloads.commit_objects, commits=scale.commits_of_100, objects=100
    )
    return (_p50_us(found.work) / 1000,)


def _commit_1000(running: Running, scale: Scale) -> tuple[float, ...]:
    found = crews.measure(
        running, workloads.commit_objects, commits=scale.commits_of_1000, objects=1000
    )
    return (_p50_us(found.work) / 1000,)


def _insert(running: Running, scale: Scale) -> tuple[float, ...]:
    found = crews.measure(
        running,
        workloads.insert_objects,
        transactions=scale.inserted // INSERTED_PER_TRANSACTION,
        objects=INSERTED_PER_TRANSACTION,
    )
    return (_rate(found.work) * INSERTED_PER_TRANSACTION,)


def _commit_processes(running: Running, scale: Scale) -> tuple[float, ...]:
    found = crews.measure(
        running,
        workloads.commit_objects,
        members=PROCESSES_COMMITTING,
        commits=scale.commits_each,
        objects=1,
    )
    return _rate(found.work), _server_cpu_us(found)


def _commit_many_processes(running: Running, scale: Scale) -> tuple[float, ...]:
    found = crews.measure(
        running,
        workloads.commit_objects,
        members=PROCESSES_COMMITTING_MANY,
        commits=scale.commits_each_of_many,
        objects=1,
    )
    return _rate(found.work), _p99_ms(found.work), _server_cpu_us(found)


def _commit_hot(running: Running, scale: Scale) -> tuple[float, ...]:
    found = crews.measure(
        running,
        workloads.commit_to_hot_tree,
        members=PROCESSES_IN_ONE_TREE,
        commits=scale.commits_each,
    )
    return (_rate(found.work),)


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """Both ends of a pipe, which processes inherit that are forked meanwhile."""
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


def _commit_heard(running: Running, scale: Scale) -> tuple[float, ...]:
    with pipe() as (told_fd, tell_fd):
        found = crews.measure(
            running,
            workloads.commit_and_hear,
            members=1 + LISTENING_PROCESSES,
            commits=scale.commits_heard,
            listening=LISTENING_PROCESSES,
            listeners=LISTENERS // LISTENING_PROCESSES,
            told_fd=told_fd,
            tell_fd=tell_fd,
        )
    committer, *listening = found.works
    heard = [each for work in listening for each in work.moments]
    return (
        _p50_us(committer) / 1000,
        median(until_all_heard_s(committer.moments[0], heard)) * 1000,
    )


def _stay_idle(running: Running, scale: Scale) -> tuple[float, ...]:
    with crews.prepared(running, workloads.stay_idle, clients=1) as first:
        before_bytes = running.memory_bytes()
        with crews.prepared(
            running,
            workloads.stay_idle,
            members=IDLE_PROCESSES,
            clients=scale.idle // IDLE_PROCESSES,
        ) as crew:
            crew.go()
            grown_bytes = running.memory_bytes() - before_bytes
        first.go()
    return (grown_bytes / scale.idle / 1000,)


def _read_warm(running: Running, scale: Scale) -> tuple[float, ...]:
    work = crews.measure(running, cache_workloads.read_warm, records=scale.cached).work
    ready_s, *reads_s = work.latencies_s
    return _rate(work), median(reads_s) * 1e6, ready_s * 1000


def _read_after_absence(running: Running, scale: Scale) -> tuple[float, ...]:
    work = crews.measure(
        running,
        cache_workloads.read_after_absence,
        records=scale.cached,
        missed=scale.missed,
    ).work
    percent = work.operations / (scale.cached - scale.missed) * 100
    # None at all would have no ratio.
    return work.latencies_s[0] * 1000, max(percent, HITS_PERCENT_MIN)


def _share_cache(running: Running, scale: Scale) -> tuple[float, ...]:
    used = []
    for members in (1, PROCESSES_OF_A_HOST):
        with cache_workloads.shared_folder() as (number, folder):
            found = crews.measure(
                running,
                cache_workloads.share_cache,
                members=members,
                records=scale.working_set,
                folder=number,
            )
            used.append((found.work.operations, cache_workloads.bytes_below(folder)))
    (loads, disk_bytes), (loads_of_all, disk_bytes_of_all) = used
    return loads_of_all / loads, disk_bytes_of_all / disk_bytes


def until_all_heard_s(
    began: list[Moment], heard: list[list[Moment]]
) -> Iterator[float]:
    """For each commit, the time from its begin till the last listener knew it.

    Who hears of a later transaction knows the earlier ones too.
    """
    for tid, began_s in began:
        moments_s = [
            next(moment_s for heard_tid, moment_s in each if heard_tid >= tid)
            for each in heard
        ]
        yield max(moments_s) - began_s


def _p50_us(work: Work) -> float:
    return median(work.latencies_s) * 1e6


def _p99_ms(work: Work) -> float:
    return sorted(work.latencies_s)[int(len(work.latencies_s) * 0.99)] * 1000


def _rate(work: Work) -> float:
    return work.operations / (work.ended_s - work.started_s)


def _server_cpu_us(found: Measured) -> float:
    return found.server.cpu_s / found.work.operations * 1e6


def trials(scale: Scale) -> tuple[Trial, ...]:
    """Every trial, in the order of the table."""
    return (
        *_loading(),
        *_walking(scale),
        *_loading_together(),
        *_committing(scale),
        *_committing_together(),
        *_with_many_clients(scale),
        *_caching(scale),
    )


def _loading() -> Iterator[Trial]:
    for at, suffix in ((SAME_CORE, ""), (OTHER_CORE, "-apart")):
        title = "load latency, cold, storage level, p50"
        yield Trial(
            (Row(f"load{suffix}", f"{title}, {at}", "us"),),
            partial(_load, at),
            ALL,
        )
    yield Trial(
        (
            Row(
                "load-tls",
                f"load latency over TLS, cold, storage level, p50, {SAME_CORE}",
                "us",
            ),
        ),
        partial(_load, SAME_CORE),
        ENCRYPTING,
        is_fresh=True,
        is_encrypted=True,
    )
    for at, suffix in ((SAME_CORE, ""), (OTHER_CORE, "-apart")):
        title = "load latency through Connection, p50"
        yield Trial(
            (
                Row(f"load-connection{suffix}", f"{title}, {at}", "us"),
                Row(f"loads{suffix}", f"loads/s, 1 process, {at}", "/s", True),
            ),
            partial(_load_connection, at),
        )


def _walking(scale: Scale) -> Iterator[Trial]:
    title = f"walk of a BTree, {scale.walked:,} objects"
    yield Trial((Row("walk", title, "objects/s", True),), partial(_walk, 0))
    title = f"the same with prefetch of {PREFETCHED}"
    yield Trial(
        (Row("walk-prefetch", title, "objects/s", True),), partial(_walk, PREFETCHED)
    )
    title = "random access with read-ahead, against without"
    yield Trial((Row("random-ahead", title, "times", True),), _find, ("zeolith",))


def _loading_together() -> Iterator[Trial]:
    crowd = f"{PROCESSES_LOADING} processes"
    yield Trial(
        (
            Row("loads-16p", f"loads/s, {crowd}", "/s", True),
            Row("cpu-load", f"server CPU per load, {crowd}", "us"),
        ),
        _load_processes,
        SERVED,
    )
    threads = f"{THREADS_LOADING} threads of one process"
    yield Trial((Row("loads-16t", f"loads/s, {threads}", "/s", True),), _load_threads)
    beside = "added to a load by a computing thread beside it"
    yield Trial(
        (
            Row("gil", f"{beside}, p50", "ms"),
            Row("gil-p99", f"{beside}, p99", "ms"),
        ),
        _load_beside,
    )


def _committing(scale: Scale) -> Iterator[Trial]:
    yield Trial(
        (Row("commit", "commit of 1 object, storage level, p50", "us"),), _commit
    )
    yield Trial(
        (Row("commit-connection", "commit of 1 object, p50", "us"),),
        _commit_connection,
    )
    yield Trial((Row("commit-100", "commit of 100 objects, p50", "ms"),), _commit_100)
    yield Trial(
        (Row("commit-1000", "commit of 1000 objects, p50", "ms"),), _commit_1000
    )
    title = f"bulk insert of {scale.inserted:,} objects"
    yield Trial((Row("insert", title, "objects/s", True),), _insert)


def _committing_together() -> Iterator[Trial]:
    few, many = PROCESSES_COMMITTING, PROCESSES_COMMITTING_MANY
    disjoint = "committing processes, disjoint objects"
    yield Trial(
        (
            Row("commits-8p", f"commits/s, {few} {disjoint}", "/s", True),
            Row("cpu-commit", f"server CPU per commit, {few} processes", "us"),
        ),
        _commit_processes,
        SERVED,
    )
    yield Trial(
        (
            Row("commits-32p", f"commits/s, {many} {disjoint}", "/s", True),
            Row("commit-32p-p99", f"p99 commit with {many} committers", "ms"),
            Row("cpu-commit-32p", f"server CPU per commit, {many} processes", "us"),
        ),
        _commit_many_processes,
        SERVED,
    )
    title = f"commits/s, {PROCESSES_IN_ONE_TREE} committers in one hot BTree"
    yield Trial((Row("commits-hot", title, "/s", True),), _commit_hot, SERVED)


def _with_many_clients(scale: Scale) -> Iterator[Trial]:
    crowd = f"{LISTENERS} connected clients"
    yield Trial(
        (
            Row("commit-200c", f"{crowd}: commit, p50", "ms"),
            Row("heard-200c", f"{crowd}: until the last has heard, p50", "ms"),
        ),
        _commit_heard,
        PUSHING,
    )
    title = f"{scale.idle} idle clients: server memory per client"
    yield Trial((Row("idle", title, "kB"),), _stay_idle, PUSHING, is_fresh=True)


def _caching(scale: Scale) -> Iterator[Trial]:
    restart = f"restart with {scale.cached:,} records cached"
    yield Trial(
        (
            Row("cache-warm", f"{restart}: read from the cache", "objects/s", True),
            Row("cache-hit", "cache hit, p50", "us"),
            Row("ready", f"{restart}: ready, nothing changed", "ms"),
        ),
        _read_warm,
        CACHING,
    )
    missed = f"{scale.missed:,} transactions missed"
    yield Trial(
        (
            Row("ready-missed", f"{restart}: ready, {missed}", "ms"),
            Row("hit-rate", "hit rate then, of what has not changed", "%", True),
        ),
        _read_after_absence,
        CACHING,
    )
    host = f"{PROCESSES_OF_A_HOST} processes of a host with one working set"
    yield Trial(
        (
            Row("host-loads", f"{host}: loads, against one process", "times"),
            Row("host-bytes", f"{host}: disk, against one process", "times"),
        ),
        _share_cache,
        CACHING,
    )
