"""How a cache does, in plain values, for ``ClientStorage.cache_stats``.

Every cache has the counters of MemoryCache; what only some of them count is 0 for the
others. Any thread; takes no lock.
"""

from dataclasses import asdict
from typing import Any

import lmdb

from zeolith.client.cache_trace import TracedCache
from zeolith.client.read_ahead import ReadAhead


def cache_stats(cache: Any, read_ahead: ReadAhead | None = None) -> dict[str, Any]:
    """The keys are described in docs/reference.md, "Statistics of the cache"."""
    hits, misses = cache.hits, cache.misses
    loads = hits + misses
    revisions, used_bytes = _sizes(cache)
    return {
        "hits": hits,
        "misses": misses,
        "hit_rate": hits / loads if loads else None,
        "path": None if cache.path is None else str(cache.path),
        "revisions": revisions,
        "used_bytes": used_bytes,
        "cache_bytes": cache.cache_bytes,
        "evictions": cache.evicted,
        "errors": getattr(cache, "errors", 0),
        "valid_through": cache.valid_through.hex(),
        "read_ahead": None if read_ahead is None else asdict(read_ahead.counters),
        "trace": _trace(cache.trace) if isinstance(cache, TracedCache) else None,
    }


def _sizes(cache: Any) -> tuple[int | None, int | None]:
    try:
        return len(cache), cache.used_bytes
    except lmdb.Error:
        # Closed for the moment of a fork, or damaged.
        return None, None


def _trace(trace: Any) -> dict[str, Any]:
    return {"path": trace.path, "dropped": trace.dropped, "error": trace.error}
