"""The rows of the table: what is measured, how often, and what comes out.

A trial is one run of a crew against one peer; it yields the figures of one or more
rows, so that a row that is another view of the same run costs nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median

from . import crews, workloads
from .crews import OTHER_CORE, SAME_CORE
from .servers import Running

SERVED = ("zeo", "zeo-msgpack", "zeolith")
STORAGES = (*SERVED, "filestorage")
ALL = (*STORAGES, "socket")

PROCESSES_LOADING = 16
PROCESSES_COMMITTING = 8
THREADS_LOADING = 16


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of everything is done in one round."""

    rounds: int
    loads: int
    loads_each: int
    commits: int
    commits_each: int
    commits_of_100: int
    commits_of_1000: int
    inserted: int


FULL = Scale(
    rounds=5,
    loads=3000,
    loads_each=1000,
    commits=400,
    commits_each=100,
    commits_of_100=40,
    commits_of_1000=8,
    inserted=100_000,
)
QUICK = Scale(
    rounds=3,
    loads=800,
    loads_each=500,
    commits=100,
    commits_each=40,
    commits_of_100=10,
    commits_of_1000=4,
    inserted=5_000,
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


def _load(placement: str, running: Running, scale: Scale) -> tuple[float, ...]:
    is_socket = running.endpoint.peer == "socket"
    work, _cpu_s = crews.measure(
        running,
        workloads.exchange if is_socket else workloads.load_from_storage,
        placement=placement,
        loads=scale.loads,
    )
    return (_p50_us(work),)


def _load_connection(
    placement: str, running: Running, scale: Scale
) -> tuple[float, ...]:
    work, _cpu_s = crews.measure(
        running, workloads.load_objects, placement=placement, loads=scale.loads
    )
    return _p50_us(work), _rate(work)


def _load_processes(running: Running, scale: Scale) -> tuple[float, ...]:
    work, cpu_s = crews.measure(
        running,
        workloads.load_objects,
        members=PROCESSES_LOADING,
        loads=scale.loads_each,
    )
    return _rate(work), cpu_s / work.operations * 1e6


def _load_threads(running: Running, scale: Scale) -> tuple[float, ...]:
    work, _cpu_s = crews.measure(
        running,
        workloads.load_in_threads,
        threads=THREADS_LOADING,
        loads=scale.loads_each,
    )
    return (_rate(work),)


def _commit(running: Running, scale: Scale) -> tuple[float, ...]:
    work, _cpu_s = crews.measure(
        running, workloads.commit_to_storage, commits=scale.commits
    )
    return (_p50_us(work),)


def _commit_connection(running: Running, scale: Scale) -> tuple[float, ...]:
    work, _cpu_s = crews.measure(
        running, workloads.commit_objects, commits=scale.commits, objects=1
    )
    return (_p50_us(work),)


def _commit_100(running: Running, scale: Scale) -> tuple[float, ...]:
    work, _cpu_s = crews.measure(
        running, workloads.commit_objects, commits=scale.commits_of_100, objects=100
    )
    return (_p50_us(work) / 1000,)


def _commit_1000(running: Running, scale: Scale) -> tuple[float, ...]:
    work, _cpu_s = crews.measure(
        running, workloads.commit_objects, commits=scale.commits_of_1000, objects=1000
    )
    return (_p50_us(work) / 1000,)


def _insert(running: Running, scale: Scale) -> tuple[float, ...]:
    work, _cpu_s = crews.measure(
        running,
        workloads.insert_objects,
        transactions=scale.inserted // INSERTED_PER_TRANSACTION,
        objects=INSERTED_PER_TRANSACTION,
    )
    return (_rate(work) * INSERTED_PER_TRANSACTION,)


def _commit_processes(running: Running, scale: Scale) -> tuple[float, ...]:
    work, cpu_s = crews.measure(
        running,
        workloads.commit_objects,
        members=PROCESSES_COMMITTING,
        commits=scale.commits_each,
        objects=1,
    )
    return _rate(work), cpu_s / work.operations * 1e6


def _p50_us(work: workloads.Work) -> float:
    return median(work.latencies_s) * 1e6


def _rate(work: workloads.Work) -> float:
    return work.operations / (work.ended_s - work.started_s)


def trials(scale: Scale) -> tuple[Trial, ...]:
    """Every trial, in the order of the table."""
    return (*_loading(), *_loading_together(), *_committing(scale))


def _loading() -> Iterator[Trial]:
    for at, suffix in ((SAME_CORE, ""), (OTHER_CORE, "-apart")):
        yield Trial(
            (Row(f"load{suffix}", f"load, cold, storage level, p50, {at}", "us"),),
            partial(_load, at),
            ALL,
        )
    for at, suffix in ((SAME_CORE, ""), (OTHER_CORE, "-apart")):
        title = "load through a Connection, p50"
        yield Trial(
            (
                Row(f"load-connection{suffix}", f"{title}, {at}", "us"),
                Row(f"loads{suffix}", f"loads, 1 process, {at}", "/s", True),
            ),
            partial(_load_connection, at),
        )


def _loading_together() -> Iterator[Trial]:
    crowd = f"{PROCESSES_LOADING} processes"
    yield Trial(
        (
            Row("loads-16p", f"loads, {crowd}", "/s", True),
            Row("cpu-load", f"server CPU a load, {crowd}", "us"),
        ),
        _load_processes,
        SERVED,
    )
    yield Trial(
        (Row("loads-16t", f"loads, {THREADS_LOADING} threads", "/s", True),),
        _load_threads,
    )


def _committing(scale: Scale) -> Iterator[Trial]:
    crowd = f"{PROCESSES_COMMITTING} processes"
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
    yield Trial(
        (Row("insert", f"insert of {scale.inserted:,} objects", "objects/s", True),),
        _insert,
    )
    yield Trial(
        (
            Row("commits-8p", f"commits, {crowd}, disjoint", "/s", True),
            Row("cpu-commit", f"server CPU a commit, {crowd}", "us"),
        ),
        _commit_processes,
        SERVED,
    )
