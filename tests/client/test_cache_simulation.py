"""Simulated caches do what real ones do."""

import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ZODB.utils import p64

from zeolith.client.cache import ENTRY_BYTES, MemoryCache
from zeolith.client.cache_backlog import Batch
from zeolith.client.cache_simulation import (
    _taken_bytes,
    simulate,
    simulate_around,
    simulate_unbounded,
    workload,
)
from zeolith.client.cache_trace import (
    _EVENT,
    FORGET_ALL,
    HIT,
    INVALIDATE,
    MISS,
    STORE,
    WRITE,
    Block,
    blocks,
    traced,
)
from zeolith.client.disk_cache import DiskCache

from ..support.cache_files import opened, revision
from ..support.changes import one_change

T1 = p64(1)
Event = tuple[int, int, int]


def block(
    events: Iterable[Event], *, pid: int = 1, cache: int = 1, cache_bytes: int = 10_000
) -> Block:
    """Of ``(kind, oid, size)``, a second after the other; an entry costs 10 bytes."""
    packed = [
        _EVENT.pack(kind, number * 1_000_000, p64(oid), T1, size)
        for number, (kind, oid, size) in enumerate(events)
    ]
    body = b"".join(packed)
    return Block(pid, cache, cache_bytes, 10, 4, 0, 5_000_000, len(packed), body)


def loaded(*oids: int, size: int = 90) -> list[Event]:
    """Each missed and stored."""
    return [event for oid in oids for event in ((MISS, oid, 0), (STORE, oid, size))]


def record(oid: int, tid: int) -> bytes:
    """Of one revision, always the same."""
    return b"x" * ((oid * 7919 + tid * 104_729) % 1000)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("cache_entries", [8, 20, 60])
def test_the_recorded_size_gives_the_recorded_hits(
    tmp_path: Path, seed: int, cache_entries: int
):
    """Loads, own commits and changes of others, against the cache itself."""
    path = str(tmp_path / "cache.trace")
    cache_bytes = cache_entries * (ENTRY_BYTES + 500)
    cache = traced(MemoryCache(cache_bytes), path)
    cache.forget_all(T1)
    chance = random.Random(seed)
    now = 1
    current = dict.fromkeys(range(100), 1)
    for _ in range(5000):
        oid = min(int(chance.expovariate(0.05)), 99)
        action = chance.random()
        if action < 0.9:
            before, tid = p64(now + 1), p64(current[oid])
            if cache.load(p64(oid), before) is None:
                data = record(oid, current[oid])
                cache.store(p64(oid), tid, None, data, p64(now))
        else:
            now += 1
            current[oid] = now
            if action < 0.95:
                cache.store_committed(p64(now), {p64(oid): record(oid, now)}, 1)
            cache.apply(one_change(p64(now), [p64(oid)]))
    cache.close()
    recorded = workload(blocks(path))
    assert recorded.loads == cache.hits + cache.misses
    assert recorded.hits == cache.hits
    outcome = simulate(recorded, cache_bytes)
    assert outcome.evictions == cache.evicted
    assert outcome.hits == cache.hits


@given(st.lists(st.integers(1, 12)), st.integers(1, 5000))
def test_no_size_does_better_than_no_limit(oids: list[int], cache_bytes: int):
    recorded = workload([block(loaded(*oids, *oids))])
    best = simulate_unbounded(recorded)
    assert best.hits == 2 * len(oids) - len(set(oids))
    assert best.evictions == 0
    assert simulate(recorded, cache_bytes).hits <= best.hits


def test_first_in_is_first_out_but_for_what_was_used():
    # Room for ten; two are evicted when the eleventh comes.
    recorded = workload([block([*loaded(*range(1, 11), 1), *loaded(11, 1, 2, 3)])])
    outcome = simulate(recorded, 1000)
    assert outcome.hits == 2
    assert outcome.evictions == 4


def test_a_record_that_is_too_large_is_not_kept():
    recorded = workload([block(loaded(1, 1, size=240) + loaded(2, 2, size=241))])
    assert simulate(recorded, 1000).hits == 1


def test_what_is_not_there_is_missed_at_every_size():
    recorded = workload([block([(MISS, 1, 0), (MISS, 1, 0)])])
    assert recorded.loads == 2
    assert simulate_unbounded(recorded).hits == 0
    assert simulate_around(recorded)


def test_what_was_stored_without_a_miss_is_there():
    events = [(STORE, 1, 90), (WRITE, 2, 90), (INVALIDATE, 3, 0)]
    recorded = workload([block([*events, (HIT, 1, 90), *loaded(2, 3)])])
    assert simulate(recorded, 1000).hits == 2


def test_a_write_is_not_what_a_miss_was_looking_for():
    recorded = workload([block([(HIT, 1, 90), (MISS, 1, 0), (WRITE, 1, 90)])])
    assert simulate(recorded, 1000).hits == 0


def test_what_is_forgotten_is_gone():
    recorded = workload([block([*loaded(1, 2), (FORGET_ALL, 0, 0), *loaded(1)])])
    assert simulate(recorded, 1000).hits == 0
    assert simulate(recorded, 1000).evictions == 0


def test_a_hit_that_a_smaller_cache_misses_is_loaded_into_it():
    hits = [(HIT, oid, 190) for oid in (*range(1, 7), 6)]
    recorded = workload([block(hits)])
    assert recorded.hits == 7
    assert simulate(recorded, 1000).hits == 1


def test_caches_of_several_processes_are_apart_or_together():
    apart = [
        block(loaded(1, 2), pid=1, cache=1),
        block(loaded(1, 2), pid=2, cache=2, cache_bytes=20_000),
    ]
    recorded = workload(apart)
    assert (recorded.processes, len(recorded.caches)) == (2, 2)
    assert recorded.cache_bytes == 20_000
    assert simulate(recorded, 1000).hits == 0
    recorded = workload(apart, together=True)
    assert (recorded.processes, len(recorded.caches)) == (2, 1)
    assert simulate(recorded, 1000).hits == 2


def test_a_process_that_begins_empties_no_shared_cache():
    start = (FORGET_ALL, 0, 0)
    apart = [block([start, *loaded(1)], pid=pid, cache=pid) for pid in (1, 2)]
    assert simulate(workload(apart, together=True), 1000).hits == 1
    on_disk = [each._replace(cache=1, page_bytes=4096) for each in apart]
    assert simulate_unbounded(workload(on_disk)).hits == 1


def test_processes_of_one_cache_do_not_take_each_others_answers():
    blocks_of_two = [
        block([(HIT, 1, 90), (MISS, 1, 0)], pid=1),
        block([(STORE, 1, 90)], pid=2),
    ]
    recorded = workload(blocks_of_two)
    assert simulate(recorded, 1000).hits == 0


def test_a_trace_knows_its_time():
    recorded = workload([block(loaded(1, 2))])
    assert (recorded.started_us, recorded.ended_us) == (5_000_000, 8_000_000)


def test_sizes_double_until_nothing_is_evicted():
    recorded = workload([block(loaded(*range(1, 200)), cache_bytes=8000)])
    assert recorded.needed_bytes == 19_900
    outcomes = simulate_around(recorded)
    sizes = [outcome.cache_bytes for outcome in outcomes]
    assert sizes == [1000, 2000, 4000, 8000, 16_000, 32_000]
    assert [outcome.evictions > 0 for outcome in outcomes] == [True] * 5 + [False]


def test_an_empty_trace_has_no_caches():
    assert workload([]).caches == []


@pytest.mark.parametrize("data_bytes", [100, 500, 1000, 2000, 3000, 5000, 20_000])
def test_a_record_takes_of_a_file_about_what_it_does(tmp_path: Path, data_bytes: int):
    chance = random.Random(data_bytes)
    oids = chance.sample(range(10_000), 1000)
    with opened(tmp_path) as file:
        file.cache_bytes = 10**9
        lineage, empty_bytes = file.start(T1, None).lineage, file.used_bytes
        for start in range(0, len(oids), 100):
            revisions = [
                revision(oid, 1, None, b"x" * data_bytes, 1)
                for oid in oids[start : start + 100]
            ]
            file.extend(lineage, Batch(T1, (), revisions, {}))
        taken = file.used_bytes - empty_bytes
    shape = block([])._replace(
        entry_bytes=DiskCache.entry_bytes, page_bytes=DiskCache.page_bytes
    )
    assumed = 1000 * _taken_bytes(shape, data_bytes)
    assert 0.85 < assumed / taken < 1.2
