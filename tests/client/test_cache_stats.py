"""What a storage tells of its cache."""

import json
from pathlib import Path

from ZODB.utils import p64

from zeolith.client.cache import ENTRY_BYTES, MemoryCache
from zeolith.client.cache_place import CachePlace, Identity
from zeolith.client.cache_stats import cache_stats
from zeolith.client.cache_trace import traced
from zeolith.client.disk_cache import DiskCache
from zeolith.client.storage import ClientStorage

from ..support.script import ScriptedServer

A, T1, T2 = p64(1), p64(1), p64(2)


def test_a_new_cache_has_no_hit_rate():
    stats = cache_stats(MemoryCache(1000))
    assert stats["hit_rate"] is None
    assert stats["hits"] == stats["misses"] == stats["revisions"] == 0
    assert stats["cache_bytes"] == 1000
    assert stats["trace"] is stats["read_ahead"] is None


def test_hits_misses_and_evictions_are_counted():
    cache = MemoryCache(4 * (ENTRY_BYTES + 100))
    cache.forget_all(T1)
    for number in range(6):
        cache.store(p64(number), T1, None, b"x" * 100, T1)
    found = [cache.load(p64(number), T2) for number in range(6)]
    stats = cache_stats(cache)
    hits = sum(each is not None for each in found)
    assert 0 < hits < 6
    assert stats["hits"] == hits == stats["revisions"]
    assert stats["misses"] == stats["evictions"] == 6 - hits
    assert stats["hit_rate"] == hits / 6
    assert stats["used_bytes"] == hits * (ENTRY_BYTES + 100)
    assert stats["errors"] == 0


def test_a_cache_on_disk_tells_the_same_and_where_it_is(tmp_path: Path):
    cache = DiskCache(CachePlace(tmp_path), "1", 10**6)
    assert cache_stats(cache)["path"] is None
    cache.identify(b"d" * 16, 1)
    cache.forget_all(T1)
    stats = cache_stats(cache)
    assert set(stats) == set(cache_stats(MemoryCache()))
    assert stats["path"] == str(CachePlace(tmp_path).path_of(Identity(b"d" * 16, 1)))
    assert stats["revisions"] == 0 < stats["used_bytes"]
    assert stats["valid_through"] == T1.hex()
    assert json.loads(json.dumps(stats)) == stats
    cache.close()
    assert cache_stats(cache)["path"] is None


def test_a_file_that_cannot_be_read_now_has_no_sizes(tmp_path: Path):
    cache = DiskCache(CachePlace(tmp_path), "1", 10**6)
    cache.identify(b"d" * 16, 1)
    assert cache._file is not None
    cache._file.pause()
    stats = cache_stats(cache)
    assert stats["revisions"] is stats["used_bytes"] is None
    cache._file.resume()
    assert cache_stats(cache)["revisions"] == 0
    cache.close()


def test_a_trace_is_told_of(tmp_path: Path):
    path = str(tmp_path / "cache.trace")
    cache = traced(MemoryCache(), path)
    assert cache_stats(cache)["trace"] == {"path": path, "dropped": 0, "error": None}
    assert cache_stats(cache)["misses"] == 0
    cache.close()


def test_a_storage_tells_plain_values(server: ScriptedServer):
    storage = ClientStorage(server.address)
    server.answers["load"] = (b"data", T1, None, T1)
    for _ in range(3):
        storage.loadBefore(A, T2)
    stats = storage.cache_stats()
    storage.close()
    assert stats["read_ahead"] == {"answers": 0, "sent": 0, "sent_bytes": 0, "used": 0}
    assert (stats["hits"], stats["misses"], stats["revisions"]) == (2, 1, 1)
    assert json.loads(json.dumps(stats)) == stats
    assert stats["valid_through"] == storage.cache.valid_through.hex()
