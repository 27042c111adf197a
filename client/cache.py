"""The revisions a client has seen, in memory, with the snapshots they are good for.

The rules (they hold for every cache that may stand here):

* A revision is good for a snapshot ``before`` if tid < before <= end. One that is
  *open* (end not known) is good only up to ``valid_through`` + 1: all changes up to
  there have been applied to the cache, and none of them touched it.
* An answer of the server is true *as of* a tid. It may be kept as open only if no
  change after that tid, of those applied already, touched the object.
* A change (oid, tid) closes what began before tid, and only that; applying it twice
  is harmless.
* Nothing here raises because of what it is given: a cache that fails would fail
  after a commit.

Threads: ``load`` takes no lock and may run anywhere, any time. Everything else takes
the cache's own lock for a moment; ``apply``, ``forget_all``, ``verified`` and
``cut_back`` are called by the holder of the position's lock only.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

from zeolith.client.changes import Change
from zeolith.client.tids import SPARSE_MAX, Z64, following, sparse

DEFAULT_CACHE_BYTES = 20 * 1024 * 1024
# What an entry costs beside its data: objects, tuple, dictionary slots (measured).
ENTRY_BYTES = 400
# Of one object. Old snapshots are read from the server if they are older than that; an
# object that changes with every commit must not cost more each time.
REVISIONS_MAX = 8
# How many changed oids are remembered to judge answers that are older than the last
# change. An answer older than that is used once and not kept.
RECENT_OIDS_MAX = 20_000
# How many revisions are looked at together when they are verified.
BATCH_MAX = 1000
# How many tids of changes are remembered until they are thinned out.
TIDS_MAX = 3 * SPARSE_MAX


class Cache(Protocol):
    """What a storage needs of a cache; the rules above hold for all of them."""

    # All changes up to this one have been applied.
    valid_through: bytes
    # Database id and epoch of what is cached, if that is known without a session.
    identity: tuple[bytes, int] | None

    @property
    def path(self) -> Path | None:
        """The file it is in, if it is in one."""

    def __len__(self) -> int:
        """How many revisions it has."""

    def load(
        self, oid: bytes, before: bytes
    ) -> tuple[bytes, bytes, bytes | None] | None:
        """``(data, tid, end)`` of the revision for snapshot ``before``, or None."""

    # Grows whenever all was forgotten; see ``store``.
    history: int

    def store(
        self,
        oid: bytes,
        tid: bytes,
        end: bytes | None,
        data: bytes,
        as_of: bytes,
        history: int | None = None,
    ) -> None:
        """Keep an answer of the server's that is true as of ``as_of``, if possible.

        ``history`` is the cache's when the server was asked: an answer from before
        everything was forgotten may be of a history that was given up (the server was
        restored from an older copy) and is not kept. None: it is known to be of this.
        """

    def store_committed(
        self, tid: bytes, records: Mapping[bytes, bytes], history: int
    ) -> None:
        """Keep what transaction ``tid`` has just written; else as ``store``."""

    def apply(self, changes: Sequence[Change]) -> None:
        """The next changes after ``valid_through``, at least one."""

    def forget(self, oid: bytes) -> None:
        """Drop an object whose revisions turned out to be of no use."""

    def forget_all(self, valid_through: bytes) -> None:
        """Start afresh: nothing before ``valid_through`` is known."""

    # When it is not known what has changed: see ``verification``.

    def verifying(self) -> AbstractContextManager[object]:
        """Of those who share the cache only one is inside at a time."""

    def open_revisions(self) -> Iterator[list[tuple[bytes, bytes]]]:
        """Batches of (oid, tid) of the revisions that count as open.

        All that there are at the call. From then on no answer is kept that was asked
        for before (``history`` grows): it would not have been looked at. In any
        thread; no lock is held between two batches.
        """

    def verified(self, through: bytes, stale: Collection[bytes]) -> None:
        """What ``open_revisions`` told is good through ``through``.

        Except for the open revisions of the oids ``stale``, which are dropped. Nothing
        is known of any change between what was ``valid_through`` and ``through``.
        """

    def known_tids(self) -> list[bytes]:
        """Tids of changes that were applied, newest first: the last, some of before."""

    def cut_back(self, tid: bytes) -> None:
        """The database was restored, and ends at ``tid``: forget what came after.

        Revisions that began, or ended, later are dropped; ``history`` grows.
        """

    def reset(self, valid_through: bytes) -> None:
        """In a forked child: start afresh, whatever was going on in the parent."""

    def identify(self, database_id: bytes, epoch: int) -> bool:
        """The server's database is this one, as a session says before it is adopted.

        What was answered as of later than ``valid_through`` is forgotten, and what was
        asked of another session is not kept: the server may be a restored one. True if
        something else is cached now than before, and ``valid_through`` is new.
        """

    def close(self) -> None:
        """Let go of everything; what is asked for from now on is a miss."""


class Entry:
    """One revision. ``end`` is set at most once, by a change."""

    __slots__ = ("data", "end", "oid", "tid", "was_used")

    def __init__(self, oid: bytes, tid: bytes, end: bytes | None, data: bytes):
        self.oid = oid
        self.tid = tid
        self.end = end
        self.data = data
        # Set by readers without a lock; gives a second chance at eviction.
        self.was_used = False


class MemoryCache:
    """Revisions in memory, up to ``cache_bytes``."""

    def __init__(self, cache_bytes: int = DEFAULT_CACHE_BYTES):
        self.cache_bytes = cache_bytes
        self.valid_through = Z64
        self.identity: tuple[bytes, int] | None = None
        self.history = 0
        self.hits = self.misses = self.evicted = 0
        self._lock = threading.Lock()
        # Tuples are replaced, never changed, so that readers need no lock. Newest
        # revision first.
        self._by_oid: dict[bytes, tuple[Entry, ...]] = {}
        # In the order of eviction.
        self._entries: OrderedDict[Entry, None] = OrderedDict()
        self._used_bytes = 0
        # oid -> tid of its last change, for changes after _recent_since.
        self._recent: dict[bytes, bytes] = {}
        self._recent_since = Z64
        # Of changes that were applied, the oldest first.
        self._tids: list[bytes] = []
        # oid -> as_of, of answers that are true as of later than valid_through.
        self._ahead: dict[bytes, bytes] = {}

    def __len__(self) -> int:
        return len(self._entries)

    path = None

    @property
    def used_bytes(self) -> int:
        """What the entries take, by estimate."""
        return self._used_bytes

    def load(
        self, oid: bytes, before: bytes
    ) -> tuple[bytes, bytes, bytes | None] | None:
        """See Cache.load."""
        # Read before the entries: an entry that is open afterwards was not touched by
        # any change up to this tid.
        valid_through = self.valid_through
        for entry in self._by_oid.get(oid, ()):
            if entry.tid < before:
                end = entry.end
                if before <= (following(valid_through) if end is None else end):
                    entry.was_used = True
                    self.hits += 1
                    return entry.data, entry.tid, end
                break
        self.misses += 1
        return None

    def store(
        self,
        oid: bytes,
        tid: bytes,
        end: bytes | None,
        data: bytes,
        as_of: bytes,
        history: int | None = None,
    ) -> None:
        """See Cache.store."""
        size = len(data) + ENTRY_BYTES
        if size > self.cache_bytes // 4:
            return
        with self._lock:
            if history is not None and history != self.history:
                return
            if end is None and as_of < self.valid_through:
                if as_of < self._recent_since:
                    return
                if self._recent.get(oid, Z64) > as_of:
                    return
            if as_of > self.valid_through:
                self._ahead[oid] = as_of
            self._keep(oid, tid, end, data)
            if self._used_bytes > self.cache_bytes:
                self._evict()

    def store_committed(
        self, tid: bytes, records: Mapping[bytes, bytes], history: int
    ) -> None:
        """See Cache.store_committed."""
        data_bytes_max = self.cache_bytes // 4 - ENTRY_BYTES
        with self._lock:
            if history == self.history and tid == self.valid_through:
                for oid, data in records.items():
                    if len(data) <= data_bytes_max:
                        self._keep(oid, tid, None, data)
                if self._used_bytes > self.cache_bytes:
                    self._evict()
                return
        # Others have committed since: what they changed is looked at, one by one.
        for oid, data in records.items():
            self.store(oid, tid, None, data, tid, history)

    def _keep(self, oid: bytes, tid: bytes, end: bytes | None, data: bytes) -> None:
        have = self._by_oid.get(oid, ())
        # Most that are stored are newer than what was known.
        is_newest = not have or have[0].tid < tid
        if not is_newest and any(entry.tid == tid for entry in have):
            return
        entry = Entry(oid, tid, end, data)
        self._entries[entry] = None
        self._used_bytes += len(data) + ENTRY_BYTES
        if is_newest:
            if len(have) == REVISIONS_MAX:
                self._remove(have[-1])
                have = have[:-1]
            self._by_oid[oid] = (entry, *have)
        else:
            self._by_oid[oid] = self._with(have, entry)

    def apply(self, changes: Sequence[Change]) -> None:
        """See Cache.apply."""
        by_oid = self._by_oid
        with self._lock:
            for _since, tid, oids, _transaction in changes:
                for oid in oids:
                    if oid in by_oid:
                        for entry in by_oid[oid]:
                            if entry.end is None and entry.tid < tid:
                                entry.end = tid
            self._remember(changes)
            self.valid_through = tid
            if self._ahead:
                self._ahead = {
                    oid: as_of for oid, as_of in self._ahead.items() if as_of > tid
                }

    def forget(self, oid: bytes) -> None:
        """See Cache.forget."""
        with self._lock:
            for entry in self._by_oid.pop(oid, ()):
                self._remove(entry)

    def forget_all(self, valid_through: bytes) -> None:
        """See Cache.forget_all."""
        with self._lock:
            self._by_oid = {}
            self._ahead = {}
            self._entries.clear()
            self._recent.clear()
            self._used_bytes = 0
            self._recent_since = self.valid_through = valid_through
            self._tids = [valid_through]
            self.history += 1

    def verifying(self) -> AbstractContextManager[object]:
        """See Cache.verifying: nobody shares this one."""
        return nullcontext()

    def open_revisions(self) -> Iterator[list[tuple[bytes, bytes]]]:
        """See Cache.open_revisions."""
        with self._lock:
            self.history += 1
            revisions = [
                (entry.oid, entry.tid) for entry in self._entries if entry.end is None
            ]
        starts = range(0, len(revisions), BATCH_MAX)
        return (revisions[start : start + BATCH_MAX] for start in starts)

    def verified(self, through: bytes, stale: Collection[bytes]) -> None:
        """See Cache.verified."""
        with self._lock:
            for oid in stale:
                self._drop(oid, lambda entry: entry.end is None)
            self._recent.clear()
            self._note_tid(through)
            self._recent_since = self.valid_through = through

    def known_tids(self) -> list[bytes]:
        """See Cache.known_tids."""
        with self._lock:
            return sparse(self._tids)

    def cut_back(self, tid: bytes) -> None:
        """See Cache.cut_back."""
        with self._lock:
            for oid in tuple(self._by_oid):
                self._drop(oid, lambda entry: max(entry.tid, entry.end or Z64) > tid)
            self._recent.clear()
            self._tids = [each for each in self._tids if each < tid]
            self._note_tid(tid)
            self._recent_since = self.valid_through = tid
            self.history += 1

    def reset(self, valid_through: bytes) -> None:
        """See Cache.reset."""
        self._lock = threading.Lock()
        self.forget_all(valid_through)

    def identify(self, _database_id: bytes, _epoch: int) -> bool:
        """See Cache.identify."""
        with self._lock:
            # Another server's history may part from the last one's after our position:
            # what was told of a later time is true in that one only.
            self.history += 1
            for oid in self._ahead:
                for entry in self._by_oid.pop(oid, ()):
                    self._remove(entry)
            self._ahead = {}
        return False

    def close(self) -> None:
        """See Cache.close."""

    def _with(self, have: tuple[Entry, ...], entry: Entry) -> tuple[Entry, ...]:
        """``have`` and one more, without the oldest if they are too many."""
        entries = sorted((*have, entry), key=_tid_of, reverse=True)
        if len(entries) > REVISIONS_MAX:
            self._remove(entries.pop())
        return tuple(entries)

    def _drop(self, oid: bytes, is_wrong: Callable[[Entry], bool]) -> None:
        have = self._by_oid.get(oid, ())
        rest = tuple(entry for entry in have if not is_wrong(entry))
        if len(rest) < len(have):
            # First, for who reads now takes no lock.
            if rest:
                self._by_oid[oid] = rest
            else:
                del self._by_oid[oid]
            for entry in have:
                if entry not in rest:
                    self._remove(entry)

    def _note_tid(self, tid: bytes) -> None:
        self._tids.append(tid)
        if len(self._tids) > TIDS_MAX:
            self._thin_out()

    def _thin_out(self) -> None:
        self._tids = sparse(self._tids)[::-1]

    def _remember(self, changes: Sequence[Change]) -> None:
        recent, tids = self._recent, self._tids
        for _since, tid, oids, _transaction in changes:
            count = len(oids)
            if len(recent) + count > RECENT_OIDS_MAX:
                recent.clear()
                self._recent_since = tid
            if count <= RECENT_OIDS_MAX:
                for oid in oids:
                    recent[oid] = tid
            tids.append(tid)
        if len(tids) > TIDS_MAX:
            self._thin_out()

    def _evict(self) -> None:
        """Make room: first in, first out, but what was read gets a second round."""
        goal = self.cache_bytes - self.cache_bytes // 20
        while self._used_bytes > goal and self._entries:
            entry, _nothing = self._entries.popitem(last=False)
            self._entries[entry] = None
            if entry.was_used:
                entry.was_used = False
                continue
            self.evicted += 1
            rest = tuple(e for e in self._by_oid[entry.oid] if e is not entry)
            if rest:
                self._by_oid[entry.oid] = rest
            else:
                del self._by_oid[entry.oid]
            self._remove(entry)

    def _remove(self, entry: Entry) -> None:
        del self._entries[entry]
        self._used_bytes -= len(entry.data) + ENTRY_BYTES


def _tid_of(entry: Entry) -> bytes:
    return entry.tid
