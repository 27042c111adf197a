"""One cache file: what is known of one database, for all processes of a host.

An LMDB environment. Readers take no lock and write nothing; writers exclude each other,
and what a writer that is killed had begun is not there. It holds

=========  ============================================================================
current    oid -> revision that is open: no change up to ``through`` touched it
ended      oid, end -> revision that was good until ``end``, which is exact
order      number -> oid, tid of a revision, in the order of eviction
recent     oid -> tid of its last change, of all changes after ``since``
changes    tid of each change that was applied; of those long ago only some
meta       state -> lineage, through, since; format; loads, see cache_counts
=========  ============================================================================

How a revision is stored is said in cache_values. Invariants, which hold between any two
write transactions:

1. ``through`` moves over contiguous changes of one history only. Whoever gives a part
   of it up (the server was restored, or does not know the way) begins a new *lineage*.
2. Nothing is kept that somebody knows of a later time than ``through``: a server that
   is asked next may have another history from there. So a revision in ``current`` is
   the one at ``through``, and all of ``ended`` has ended by then.
3. All changes after ``since`` and up to ``through`` are in ``recent``.
4. All of ``changes`` lies on the one way that led to ``through``.

A process may read and write only if its own history goes through the file's: see
``agrees``. Used by DiskCache: ``find`` and ``state`` in any thread, everything that
writes in its writer thread, because it may have to wait for another process.
"""

import logging
import os
import re
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
from xxhash import xxh3_64_digest

from zeolith.client import cache_place
from zeolith.client.cache import BATCH_MAX, REVISIONS_MAX
from zeolith.client.cache_backlog import Batch, Revision
from zeolith.client.cache_counts import NO_LOADS, LoadCounts, add_loads
from zeolith.client.cache_environment import opened
from zeolith.client.cache_eviction import MASK, UsedMarks
from zeolith.client.cache_place import Presence, is_whole
from zeolith.client.cache_values import CHECKED, CHECKSUM, DATA, TID, encode, number_of
from zeolith.client.changes import Change
from zeolith.client.tids import Z64, following, sparse

logger = logging.getLogger(__name__)

RECENT_OIDS_MAX = 50_000
CHANGES_MAX = 10_000
# Eviction stops at this part of what is allowed; and for one transaction at so many.
GOAL = 0.95
EVICTED_MAX = 5000
# A file may be larger than what is allowed: pages that somebody still reads are not
# used again. If that goes on (a process is stopped), nothing is added.
SLACK_BYTES = 32 * 1024**2
# A reader who reads what so many write transactions ago was true was stopped.
OLD_TXNS = 20
# A fork waits no longer for a write; the child then does without the file.
FORK_WAIT_S = 5.0

# A line of LMDB's list of readers: process, thread, transaction; none is a dash.
_READER = re.compile(r"^ *\d+ +[0-9a-f]+ +(\d+) *$", re.MULTILINE)
_STATE = b"state"


class State(NamedTuple):
    """Where the file stands; each is 8 bytes."""

    lineage: bytes
    through: bytes
    since: bytes

    @classmethod
    def parse(cls, data: bytes) -> "State":
        """The state that is stored as ``data``."""
        return cls(data[:8], data[8:16], data[16:])


class Mark(NamedTuple):
    """What was kept when: revisions of a lineage have numbers, which grow."""

    lineage: bytes
    number: int


class Foreign(Exception):
    """The file is of another history than ours, or of ours no more."""


class Renewed(Foreign):
    """Somebody has begun a new lineage since; it may be of our history all the same."""


class Behind(Exception):
    """The file lacks changes that we have not got either.

    Or we are so far behind it that nobody knows whether we are on its way.
    """


class Crowded(Exception):
    """The file is too large, and its free pages cannot be had."""


class CacheFile:
    """One environment; all storages of a process that name it share it."""

    def __init__(self, path: Path, cache_bytes: int):
        """Open ``path``, or begin it; the place is locked.

        Raises OSError and lmdb.Error if there can be no such file.
        """
        self.path = path
        self.cache_bytes = cache_bytes
        self._presence = Presence(path)
        # Held by the thread that writes, and while a fork is under way.
        self._writing = threading.Lock()
        # And whether it was: who was reading then may find out later.
        self.is_paused = self.was_paused = False
        try:
            self._begin()
        except BaseException:
            self._presence.abandon()
            raise

    def _begin(self) -> None:
        presence = self._presence
        if presence.is_alone and not (presence.is_trusted and is_whole(self.path)):
            if self.path.exists():
                logger.warning(
                    "%s is dropped: it is damaged, or the machine stopped before it was"
                    " closed",
                    self.path,
                )
            cache_place.remove(self.path)
        # After it was judged, and before anything is written, for that is not synced.
        presence.stay()
        try:
            self._open()
        except lmdb.Error as error:
            if not presence.is_alone:
                raise
            logger.warning("%s is dropped: %s", self.path, error)
            cache_place.remove(self.path)
            self._open()

    def _open(self) -> None:
        self._used = UsedMarks(self.path.with_suffix(".used"))
        self._env, self._dbs = env, dbs = opened(self.path, self.cache_bytes)
        self._current, self._ended, self._order, self._recent = dbs[:4]
        self._changes, self._meta = dbs[4:]
        self._page_bytes = env.stat()["psize"]
        # For ``find``, all at once, for after a fork it is another environment; with
        # the state in the snapshot that was read last, by its number.
        seen: dict[int, bytes] = {}
        self._reading = env.begin, dbs.current, seen, self._used.marks

    def close(self) -> None:
        """Nobody of this process uses it any more."""
        self._presence.leave(lambda: self._env.sync(True))
        self._env.close()

    def pause(self) -> None:
        """Before a fork: a child must not have what its parent has open.

        LMDB says so, and to close it in the child would take the parent's readers their
        places. Whoever reads now gets an lmdb.Error, which is a miss.
        """
        if self._writing.acquire(timeout=FORK_WAIT_S):
            self.is_paused = True
            self._env.close()

    def resume(self) -> None:
        """After the fork, in the parent; raises lmdb.Error and OSError."""
        if self.is_paused:
            self.was_paused = False
            try:
                self._open()
                self.was_paused = True
            finally:
                self.is_paused = False
                self._writing.release()

    @contextmanager
    def _write(self) -> Iterator[Any]:
        with self._writing, self._env.begin(write=True) as txn:
            yield txn

    # Reading

    def find(
        self, oid: bytes, before: bytes
    ) -> tuple[bytes | None, bytes, bytes | None, bytes]:
        """``(state, tid, end, data)`` of the last revision before ``before``.

        ``data`` is empty if there is none. ``state`` is as stored. Whether an open
        one is good for ``before`` is the caller's to say. Raises lmdb.Error.
        """
        begin, current, seen, marks = self._reading
        end = None
        txn = begin(current)
        # Spelled out, as is_whole below, for this is the hot path.
        try:
            snapshot = txn.id()
            state = seen.get(snapshot) or self._see(txn, snapshot, seen)
            value = txn.get(oid)
            if value is None or value[TID] >= before:
                with txn.cursor(self._ended) as cursor:
                    if not cursor.set_range(oid + before):
                        return state, Z64, None, b""
                    key, value = cursor.item()
                if key[:8] != oid or value[TID] >= before:
                    return state, Z64, None, b""
                end = key[8:]
        finally:
            txn.abort()
        (number,) = number_of(oid)
        if xxh3_64_digest(value[CHECKED], number) != value[CHECKSUM]:
            raise lmdb.CorruptedError(f"a revision of {oid.hex()} is damaged")
        marks[number & MASK] = 1
        return state, value[TID], end, value[DATA]

    def _see(self, txn: Any, snapshot: int, seen: dict[int, bytes]) -> bytes | None:
        state: bytes | None = txn.get(_STATE, None, self._meta)
        if state is not None:
            seen.clear()
            seen[snapshot] = state
        return state

    def state(self) -> State | None:
        """Where it stands; None if nothing was ever kept."""
        with self._env.begin() as txn:
            return self._state(txn)

    def agrees(self, state: State, base: bytes, tids: Sequence[bytes]) -> bool:
        """Whether ``state`` is of the history of somebody who stands at ``tids[-1]``.

        He has all of ``tids``, the changes after ``base``, and knows that the file was
        at ``base`` once.
        """
        with self._env.begin() as txn:
            now = self._state(txn)
            if now is None or now.lineage != state.lineage:
                # What is here now says nothing of what was then.
                return False
            return self._is_on_the_way(txn, state, base, tids)

    def has(self, state: State, batch: Batch) -> bool:
        """Whether all that is in ``batch`` was in the file at ``state``, or before."""
        if batch.revisions or batch.forgotten:
            return False
        tids = [change.tid for change in batch.changes]
        is_past = state.through >= max(tids, default=batch.base)
        return is_past and self.agrees(state, batch.base, tids)

    def open_revisions(self) -> Iterator[list[tuple[bytes, bytes]]]:
        """(oid, tid) of what is in ``current``, in batches."""
        after = b""
        while True:
            batch: list[tuple[bytes, bytes]] = []
            with self._env.begin() as txn, txn.cursor(self._current) as cursor:
                is_there = cursor.set_range(after)
                while is_there and len(batch) < BATCH_MAX:
                    oid, value = cursor.item()
                    batch.append((oid, value[TID]))
                    is_there = cursor.next()
            if not batch:
                return
            yield batch
            after = batch[-1][0] + b"\0"

    def known_tids(self) -> list[bytes]:
        """Of changes that were applied, newest first, and fewer of those long ago."""
        with self._env.begin() as txn, txn.cursor(self._changes) as cursor:
            tids = list(cursor.iternext(keys=True, values=False))
        return sparse(tids)

    def mark(self) -> Mark:
        """For ``verified``: what is kept from now on has another mark."""
        with self._env.begin() as txn:
            state = self._state(txn)
            return Mark(state.lineage if state else b"", self._last_number(txn))

    @property
    def used_bytes(self) -> int:
        """The pages that hold something, in bytes."""
        with self._env.begin() as txn:
            return self._used_bytes(txn)

    def __len__(self) -> int:
        with self._env.begin() as txn:
            return sum(txn.stat(db)["entries"] for db in (self._current, self._ended))

    # Writing

    def extend(
        self, lineage: bytes, batch: Batch, loads: LoadCounts = NO_LOADS
    ) -> tuple[State, int]:
        """Apply the changes of ``batch``, keep its revisions, add ``loads``.

        Returns the new state and how many were evicted. Raises Foreign, Renewed,
        Behind, Crowded and lmdb.Error; then nothing was done.
        """
        with self._write() as txn:
            state = self._state(txn)
            if state is None or state.lineage != lineage:
                raise Renewed
            if state.through < batch.base:
                raise Behind
            self._refuse_if_crowded()
            tids = [change.tid for change in batch.changes]
            if not self._is_on_the_way(txn, state, batch.base, tids):
                if self._is_thinned_out(txn, tids[-1] if tids else batch.base):
                    # He may have been stopped for long; as he goes on it is found out.
                    raise Behind
                raise Foreign
            for change in batch.changes:
                if change.tid > state.through:
                    state = self._apply(txn, state, change)
            for oid in batch.forgotten:
                self._drop(txn, oid)
            number = self._last_number(txn)
            for revision in batch.revisions:
                if self._keep(txn, state, revision):
                    number += 1
                    where = revision.oid + revision.tid
                    txn.put(number.to_bytes(8, "big"), where, db=self._order)
            evicted = self._evict(txn)
            self._put_state(txn, state)
            add_loads(txn, self._meta, loads)
        return state, evicted

    def start(self, through: bytes, given_up: bytes | None) -> State:
        """Begin a new lineage at ``through``, with nothing.

        ``given_up`` is the lineage that is of no more use. If somebody else has begun
        another one that leads to ``through``, or will, it is that.
        """
        with self._write() as txn:
            state = self._state(txn)
            if (
                state is not None
                and state.lineage != given_up
                and self._leads_to(txn, state, through)
            ):
                return state
            self._drop_all(txn)
            return self._new_lineage(txn, through)

    def verified(
        self,
        mark: Mark,
        through: bytes,
        stale: Collection[bytes],
        way: Sequence[bytes],
    ) -> State:
        """All open revisions but those of ``stale`` are current as of ``through``.

        But not those that were kept after ``mark``: nobody has asked for them.
        ``way`` are the tids that the caller has come by, the last is where he stood.
        Raises Foreign.
        """
        with self._write() as txn:
            state = self._state(txn)
            if state is None or state.lineage != mark.lineage:
                raise Foreign
            if not self._is_on_the_way(txn, state, way[0], way[1:]):
                raise Foreign
            for oid in stale:
                txn.delete(oid, db=self._current)
            if self._has_passed(txn, through):
                return state
            # Others have gone on since, and perhaps not to where the server is.
            self._drop_ended_after(txn, way[-1])
            with txn.cursor(self._order) as cursor:
                is_there = cursor.set_range((mark.number + 1).to_bytes(8, "big"))
                while is_there:
                    txn.delete(cursor.value()[:8], db=self._current)
                    is_there = cursor.next()
            # What lies between is not known: nobody else may conclude anything of it.
            txn.drop(self._recent, delete=False)
            return self._new_lineage(txn, through)

    def cut_back(self, through: bytes, given_up: Collection[bytes]) -> State:
        """Forget what came after ``through``: the history goes another way from there.

        ``given_up`` are tids of the other way that the caller has gone. If none of them
        is here somebody else has done it already, and it is his lineage.
        """
        with self._write() as txn:
            state = self._state(txn)
            has_gone_on = any(
                self._has_passed(txn, tid) for tid in given_up if tid > through
            )
            if not has_gone_on and state and self._leads_to(txn, state, through):
                return state
            if self._has_passed(txn, through):
                self._drop_if(
                    txn, self._current, lambda _key, value: value[TID] > through
                )
                # If one that ended later has ended in the new history is not known.
                self._drop_ended_after(txn, through)
                txn.drop(self._recent, delete=False)
            else:
                # It has gone another way still.
                self._drop_all(txn)
            return self._new_lineage(txn, through)

    # Of a write transaction

    def _state(self, txn: Any) -> State | None:
        data = txn.get(_STATE, None, self._meta)
        return None if data is None else State.parse(data)

    def _put_state(self, txn: Any, state: State) -> None:
        txn.put(_STATE, b"".join(state), db=self._meta)

    def _new_lineage(self, txn: Any, through: bytes) -> State:
        state = State(os.urandom(8), through, through)
        txn.put(through, b"", db=self._changes)
        self._put_state(txn, state)
        return state

    def _leads_to(self, txn: Any, state: State, through: bytes) -> bool:
        # If it is not there yet, whoever began it will bring it there, or we will.
        return state.through < through or self._has_passed(txn, through)

    def _has_passed(self, txn: Any, tid: bytes) -> bool:
        return txn.get(tid, None, self._changes) is not None

    def _is_on_the_way(
        self, txn: Any, state: State, base: bytes, tids: Sequence[bytes]
    ) -> bool:
        at = tids[-1] if tids else base
        if state.through <= at:
            return state.through == base or state.through in tids
        return self._has_passed(txn, at)

    def _apply(self, txn: Any, state: State, change: Change) -> State:
        tid, oids = change.tid, change.oids
        for oid in oids:
            value = txn.get(oid, None, self._current)
            if value is not None and value[TID] < tid:
                txn.delete(oid, db=self._current)
                self._keep_ended(txn, oid, tid, value)
            txn.put(oid, tid, db=self._recent)
        since = state.since
        if txn.stat(self._recent)["entries"] > RECENT_OIDS_MAX:
            txn.drop(self._recent, delete=False)
            since = tid
        txn.put(tid, b"", db=self._changes)
        if txn.stat(self._changes)["entries"] > CHANGES_MAX:
            self._thin_out(txn)
        return State(state.lineage, tid, since)

    def _thin_out(self, txn: Any) -> None:
        """Of the older half of the changes, keep every other one."""
        with txn.cursor(self._changes) as cursor:
            tids = list(islice(cursor.iternext(values=False), CHANGES_MAX // 2))
        for tid in tids[1::2]:
            txn.delete(tid, db=self._changes)

    def _is_thinned_out(self, txn: Any, tid: bytes) -> bool:
        """Whether a change ``tid`` need not be in ``changes`` any more."""
        with txn.cursor(self._changes) as cursor:
            *_rest, oldest = islice(cursor.iterprev(values=False), CHANGES_MAX // 2)
            return tid < oldest and bool(cursor.prev())

    def _keep(self, txn: Any, state: State, revision: Revision) -> bool:
        """Keep ``revision`` if that is right; whether it is there now, and was not."""
        oid, tid, end, data, as_of = revision
        if (end or tid) > state.through:
            return False
        value = encode(oid, tid, data)
        if end is not None:
            if txn.get(oid + end, None, self._ended) is not None:
                return False
            return self._keep_ended(txn, oid, end, value)
        if as_of < state.through:
            changed = txn.get(oid, None, self._recent)
            if as_of < state.since or (changed is not None and changed > as_of):
                # It has ended by now, and nobody here knows when.
                return False
        # Whatever is there is the same.
        return bool(txn.put(oid, value, overwrite=False, db=self._current))

    def _keep_ended(self, txn: Any, oid: bytes, end: bytes, value: bytes) -> bool:
        with txn.cursor(self._ended) as cursor:
            count, oldest = 0, b""
            is_there = cursor.set_range(oid)
            while is_there and (key := cursor.key())[:8] == oid:
                oldest = oldest or key
                count += 1
                is_there = cursor.next()
        if count >= REVISIONS_MAX:
            if end < oldest[8:]:
                return False
            txn.delete(oldest, db=self._ended)
        txn.put(oid + end, value, db=self._ended)
        return True

    def _drop(self, txn: Any, oid: bytes) -> None:
        txn.delete(oid, db=self._current)
        with txn.cursor(self._ended) as cursor:
            is_there = cursor.set_range(oid)
            while is_there and cursor.key()[:8] == oid:
                is_there = cursor.delete()

    def _drop_all(self, txn: Any) -> None:
        for db in self._dbs:
            if db is not self._meta:
                txn.drop(db, delete=False)

    def _drop_ended_after(self, txn: Any, tid: bytes) -> None:
        self._drop_if(txn, self._ended, lambda key, _value: key[8:] > tid)
        self._drop_if(txn, self._changes, lambda key, _value: key > tid)

    def _drop_if(self, txn: Any, db: Any, is_wrong: Any) -> None:
        with txn.cursor(db) as cursor:
            is_there = cursor.first()
            while is_there:
                if is_wrong(*cursor.item()):
                    # It is at the next one then, or at none.
                    is_there = cursor.delete() and bool(cursor.key())
                else:
                    is_there = cursor.next()

    # Room

    def _last_number(self, txn: Any) -> int:
        with txn.cursor(self._order) as cursor:
            return int.from_bytes(cursor.key(), "big") if cursor.last() else 0

    def _used_bytes(self, txn: Any) -> int:
        pages = 0
        for db in self._dbs:
            stat = txn.stat(db)
            pages += stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
        return int(pages * self._page_bytes)

    def _refuse_if_crowded(self) -> None:
        file_bytes = self._env.info()["last_pgno"] * self._page_bytes
        if file_bytes <= 2 * self.cache_bytes + SLACK_BYTES:
            return
        env = self._env
        env.reader_check()
        oldest = min(map(int, _READER.findall(env.readers())), default=None)
        if oldest is not None and oldest < env.info()["last_txnid"] - OLD_TXNS:
            # There are free pages, but somebody who was stopped may still read them.
            raise Crowded(f"{self.path} has {file_bytes} bytes")

    def _evict(self, txn: Any) -> int:
        """Make room if there is too little; how many were evicted."""
        if self._used_bytes(txn) <= self.cache_bytes:
            return 0
        goal = int(self.cache_bytes * GOAL)
        evicted = 0
        number = self._last_number(txn)
        with txn.cursor(self._order) as cursor:
            for _ in range(EVICTED_MAX):
                # One stays, for the next numbers to be greater.
                if not cursor.first() or cursor.key() == number.to_bytes(8, "big"):
                    break
                where = cursor.value()
                cursor.delete()
                oid, tid = where[:8], where[8:]
                if self._used.take(oid) and self._is_open(txn, oid, tid):
                    number += 1
                    txn.put(number.to_bytes(8, "big"), where, db=self._order)
                elif self._drop_one(txn, oid, tid):
                    evicted += 1
                    if evicted % 32 == 0 and self._used_bytes(txn) <= goal:
                        break
        return evicted

    def _is_open(self, txn: Any, oid: bytes, tid: bytes) -> bool:
        value = txn.get(oid, None, self._current)
        return value is not None and value[TID] == tid

    def _drop_one(self, txn: Any, oid: bytes, tid: bytes) -> bool:
        if self._is_open(txn, oid, tid):
            return bool(txn.delete(oid, db=self._current))
        with txn.cursor(self._ended) as cursor:
            is_there = cursor.set_range(oid + following(tid))
            if is_there and cursor.key()[:8] == oid and cursor.value()[TID] == tid:
                return bool(cursor.delete())
        return False
