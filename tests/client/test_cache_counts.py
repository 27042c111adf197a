"""Loads of all processes, added up in the file."""

from pathlib import Path

from ZODB.utils import p64

from zeolith.client.cache_counts import LoadCounts
from zeolith.client.cache_inspection import Inspection
from zeolith.client.cache_place import CachePlace
from zeolith.client.disk_cache import DiskCache

from ..support.cache_files import IDENTITY, damaging

A, B, T1, T2 = p64(1), p64(2), p64(1), p64(2)


def opened(directory: Path) -> DiskCache:
    cache = DiskCache(CachePlace(directory), "1", 10 * 1024**2)
    cache.identify(*IDENTITY)
    return cache


def stored(directory: Path) -> LoadCounts:
    with Inspection(CachePlace(directory).path_of(IDENTITY)) as file:
        return file.loads()


def asked(cache: DiskCache, *, hits: int, misses: int) -> None:
    for oid, count in ((A, hits), (B, misses)):
        for _ in range(count):
            cache.load(oid, T2)


def test_what_was_counted_is_in_the_file_when_it_is_closed(tmp_path):
    cache = opened(tmp_path)
    cache.forget_all(T1)
    cache.store(A, T1, None, b"data", T1)
    asked(cache, hits=3, misses=2)
    assert (cache.hits, cache.misses) == (3, 2)
    cache.close()
    assert stored(tmp_path) == LoadCounts(3, 2)


def test_what_another_one_counts_is_added(tmp_path):
    cache = opened(tmp_path)
    cache.forget_all(T1)
    cache.store(A, T1, None, b"data", T1)
    cache.close()
    for _ in range(2):
        cache = opened(tmp_path)
        asked(cache, hits=1, misses=4)
        cache.close()
    assert stored(tmp_path) == LoadCounts(2, 8)


def test_nothing_is_told_twice(tmp_path):
    cache = opened(tmp_path)
    cache.forget_all(T1)
    cache.store(A, T1, None, b"data", T1)
    for _ in range(3):
        asked(cache, hits=1, misses=1)
        cache._writer.have_done(cache._flush_safely)
    cache.close()
    assert stored(tmp_path) == LoadCounts(3, 3)


def test_a_forked_child_does_not_tell_what_its_parent_has_counted(tmp_path):
    cache = opened(tmp_path)
    cache.forget_all(T1)
    asked(cache, hits=0, misses=5)
    writer, file = cache._writer, cache._file
    cache.reset(T1)
    asked(cache, hits=0, misses=1)
    cache.close()
    cache._writer, cache._file = writer, file
    cache.close()
    assert stored(tmp_path) == LoadCounts(0, 1)


def test_what_is_damaged_counts_as_nothing(tmp_path):
    cache = opened(tmp_path)
    cache.forget_all(T1)
    cache.close()
    with damaging(CachePlace(tmp_path).path_of(IDENTITY)) as (txn, dbs):
        txn.put(b"loads", b"short", db=dbs["meta"])
    assert stored(tmp_path) == LoadCounts(0, 0)
