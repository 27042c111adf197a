"""Which cache a storage has: what its arguments say. Called while it is opened."""

import logging
import os

from zeolith.client.cache import Cache, MemoryCache
from zeolith.client.cache_place import CachePlace
from zeolith.client.changes import Ask
from zeolith.client.disk_cache import DiskCache

logger = logging.getLogger(__name__)


def directory_of(
    directory: str | None, client: str | None, var: str | None, storage: str
) -> str | None:
    """Where the cache is: ``directory``, or where the names that ZEO has for it say."""
    if directory is not None or client is None:
        return directory
    return os.path.join(var or os.getcwd(), f"{client}-{storage}.cache")


def open_cache(
    directory: str | None, storage: str, cache_bytes: int, ask: Ask
) -> Cache:
    """The cache in ``directory``; in memory, if there is none or it cannot be used.

    Raises ValueError if it is on a network file system.
    """
    if directory is None:
        return MemoryCache(cache_bytes)
    try:
        place = CachePlace(directory)
    except OSError as error:
        logger.warning(
            "the cache directory %s is not used, each process caches in memory: %s",
            directory,
            error,
        )
        return MemoryCache(cache_bytes)
    return DiskCache(place, storage, cache_bytes, ask)
