"""How often a cache file was asked, and how often it had the answer, by all processes.

Each process counts for itself, and adds what it has counted to the file's ``meta`` when
it writes something else, and when it closes the file. So a hit writes nothing, and a
process that is killed takes with it what it has counted since.
"""

from struct import Struct
from typing import Any, NamedTuple

_KEY = b"loads"
_COUNTS = Struct(">QQ")


class LoadCounts(NamedTuple):
    """Loads that were answered, and those that were not."""

    hits: int
    misses: int


NO_LOADS = LoadCounts(0, 0)


def add_loads(txn: Any, meta: Any, counts: LoadCounts) -> None:
    """Add ``counts`` in a write transaction."""
    before = stored_loads(txn, meta)
    hits, misses = before.hits + counts.hits, before.misses + counts.misses
    txn.put(_KEY, _COUNTS.pack(hits, misses), db=meta)


def stored_loads(txn: Any, meta: Any) -> LoadCounts:
    """What was added so far; nothing, if that is damaged."""
    stored = txn.get(_KEY, None, meta)
    if stored is None or len(stored) != _COUNTS.size:
        return NO_LOADS
    return LoadCounts(*_COUNTS.unpack(stored))
