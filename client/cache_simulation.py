"""What a cache of another size would have done with the loads of a trace.

Used by ``zeolith cache simulate``. Pure: blocks of a trace in, numbers out.

What is simulated is the eviction of our caches: first in, first out, with a second
chance for what was used since, down to 95 % of the size, by what each record takes in
memory, or of the pages of a file; and that a record larger than some part of the cache
is not kept. A revision is known by its oid and tid, so nothing old is ever found
and changes need no simulation: who loads after a change asks for another revision.

What a miss was looking for is told by what was stored next for that object by the same
process; if nothing was (the object is not there), it is a miss for every size. What was
stored without a miss, a read-ahead or an own commit, is put into the simulated cache,
too. Left out are that an old revision can be dropped for newer ones of its object, and
what a hit in a larger cache would have changed in the order of loads.
"""

from array import array
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

from zeolith.client.cache_trace import (
    FORGET_ALL,
    HIT,
    MISS,
    STORE,
    WRITE,
    Block,
)

# By default: the size that was used, and three times half of it and twice of it.
_DOUBLINGS = range(-3, 4)
# In the list of steps; everything else is the number of a revision, loaded if it is
# positive, stored if it is negative.
_NOT_THERE = 0
_FORGET_ALL = -(2**62)
# What LMDB puts around a record in its page, or pages.
_NODE_BYTES = 38


@dataclass
class Steps:
    """What one cache was asked for, in order."""

    steps: "array[int]" = field(default_factory=lambda: array("q"))
    # What each revision takes, by its number; that of nothing is 0.
    taken_bytes: "array[int]" = field(default_factory=lambda: array("q", [0]))


@dataclass
class Workload:
    """A trace, prepared for any number of simulations."""

    caches: list[Steps]
    # Of all caches and processes together, as they were recorded.
    loads: int = 0
    hits: int = 0
    processes: int = 0
    # Of the last cache that has written.
    cache_bytes: int = 0
    # A larger part of the cache than one of so many is not given to a record.
    record_part: int = 1
    # Microseconds since the epoch.
    started_us: int = 0
    ended_us: int = 0

    def sizes(self) -> list[int]:
        """Sizes that are worth a look, around the one that was used."""
        return [int(self.cache_bytes * 2**doublings) for doublings in _DOUBLINGS]

    @property
    def needed_bytes(self) -> int:
        """The size of a cache, of the largest one if there are several, for all."""
        return max(sum(each.taken_bytes) for each in self.caches)


@dataclass(frozen=True)
class Outcome:
    """What a size makes of a workload."""

    cache_bytes: int
    loads: int
    hits: int
    evictions: int

    @property
    def hit_rate(self) -> float:
        """From 0 to 1."""
        return self.hits / self.loads if self.loads else 0.0


class _Reader:
    """Makes steps of the events of one cache."""

    def __init__(self, *, forgets: bool):
        self.result = Steps()
        self._forgets = forgets
        # oid + tid -> the number of the revision.
        self._numbers: dict[bytes, int] = {}
        # Process -> oid -> steps that are waiting to learn what they were looking for.
        self._missed: dict[int, dict[bytes, list[int]]] = {}

    def read(self, block: Block) -> tuple[int, int]:
        """Go on with ``block``; returns how many loads and hits it has."""
        steps = self.result.steps
        missed = self._missed.setdefault(block.pid, {})
        number_of = partial(self._number, block)
        loads = hits = 0
        for kind, _after_us, oid, tid, size in block.events():
            if kind == HIT:
                steps.append(number_of(oid + tid, size))
                loads += 1
                hits += 1
            elif kind == MISS:
                missed.setdefault(oid, []).append(len(steps))
                steps.append(_NOT_THERE)
                loads += 1
            elif kind == STORE and oid in missed:
                for place in missed.pop(oid):
                    steps[place] = number_of(oid + tid, size)
            elif kind in (STORE, WRITE):
                steps.append(-number_of(oid + tid, size))
            elif kind == FORGET_ALL and self._forgets:
                steps.append(_FORGET_ALL)
        return loads, hits

    def _number(self, block: Block, revision: bytes, size: int) -> int:
        number = self._numbers.get(revision)
        if number is None:
            number = self._numbers[revision] = len(self.result.taken_bytes)
            self.result.taken_bytes.append(_taken_bytes(block, size))
        return number


def _taken_bytes(block: Block, data_bytes: int) -> int:
    """What a record takes in the cache of ``block``; as measured, for one of pages."""
    page_bytes = block.page_bytes
    if not page_bytes:
        return data_bytes + block.entry_bytes
    if data_bytes > page_bytes // 2 - _NODE_BYTES:
        # It has pages of its own.
        pages = -(-(data_bytes + _NODE_BYTES) // page_bytes)
        return pages * page_bytes + block.entry_bytes
    in_full_page = page_bytes // (data_bytes + _NODE_BYTES)
    # Pages are two thirds full.
    return page_bytes * 3 // (2 * in_full_page) + block.entry_bytes


def workload(blocks: Iterable[Block], *, together: bool = False) -> Workload:
    """Prepare a trace. ``together``: as if all processes had shared one cache."""
    readers: dict[int, _Reader] = {}
    pids = set()
    result = Workload([])
    for block in blocks:
        cache = 0 if together else block.cache
        # Each process forgets all when it begins, which does not empty a shared cache.
        is_shared = together or bool(block.page_bytes)
        reader = readers.setdefault(cache, _Reader(forgets=not is_shared))
        loads, hits = reader.read(block)
        result.loads += loads
        result.hits += hits
        pids.add(block.pid)
        result.cache_bytes, result.record_part = block.cache_bytes, block.record_part
        started_us = result.started_us or block.started_us
        result.started_us = min(started_us, block.started_us)
        last_us = max((event[1] for event in block.events()), default=0)
        result.ended_us = max(result.ended_us, block.started_us + last_us)
    result.caches = [reader.result for reader in readers.values()]
    result.processes = len(pids)
    return result


def simulate_around(workload: Workload) -> list[Outcome]:
    """Of the size that was used and others, up to the first that evicts nothing."""
    outcomes = []
    for size in workload.sizes():
        outcomes.append(simulate(workload, size))
        if size >= workload.cache_bytes and not outcomes[-1].evictions:
            break
    return outcomes


def simulate_unbounded(workload: Workload) -> Outcome:
    """Of a cache that has room for everything: no size does better."""
    # A record is admitted if so many of its size have room.
    return simulate(workload, workload.record_part * workload.needed_bytes)


def simulate(workload: Workload, cache_bytes: int) -> Outcome:
    """What caches of ``cache_bytes`` each would have done."""
    hits = evictions = 0
    for steps in workload.caches:
        found = _Simulation(cache_bytes, workload, steps)
        found.run()
        hits += found.hits
        evictions += found.evictions
    return Outcome(cache_bytes, workload.loads, hits, evictions)


_ABSENT, _PRESENT, _USED = range(3)


class _Simulation:
    """One cache of one size."""

    def __init__(self, cache_bytes: int, workload: Workload, steps: Steps):
        self._cache_bytes = cache_bytes
        self._size_max = cache_bytes // workload.record_part
        self._steps = steps
        # Of each revision by its number.
        self._states = bytearray(len(steps.taken_bytes))
        # In the order of eviction.
        self._order: deque[int] = deque()
        self._used_bytes = 0
        self.hits = 0
        self.evictions = 0

    def run(self) -> None:
        """From the first step to the last one."""
        states, taken_bytes = self._states, self._steps.taken_bytes
        append = self._order.append
        size_max = self._size_max
        hits = 0
        for step in self._steps.steps:
            if step > 0:
                if states[step]:
                    states[step] = _USED
                    hits += 1
                    continue
                number = step
            elif step == _NOT_THERE:
                continue
            elif step == _FORGET_ALL:
                self._forget_all()
                continue
            else:
                number = -step
                if states[number]:
                    continue
            size = taken_bytes[number]
            if size <= size_max:
                states[number] = _PRESENT
                append(number)
                self._used_bytes += size
                if self._used_bytes > self._cache_bytes:
                    self._evict()
        self.hits = hits

    def _forget_all(self) -> None:
        for number in self._order:
            self._states[number] = _ABSENT
        self._order.clear()
        self._used_bytes = 0

    def _evict(self) -> None:
        states, order, taken = self._states, self._order, self._steps.taken_bytes
        goal = self._cache_bytes - self._cache_bytes // 20
        while self._used_bytes > goal and order:
            number = order.popleft()
            if states[number] == _USED:
                states[number] = _PRESENT
                order.append(number)
                continue
            states[number] = _ABSENT
            self._used_bytes -= taken[number]
            self.evictions += 1
