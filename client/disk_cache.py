"""What one process does with the cache on disk that all of its host share.

The file (cache_file) is shared and stands at ``through``. A process stands at a
position of its own, ``valid_through``, usually a moment ahead: the changes it has
applied and the revisions it has loaded wait in memory until its *writer thread* writes
them, together. So applying a change costs a few stores to memory, whoever else writes.

::

    the file's history  ───────────────●── through
    written by us, or seen  ──────● base        (base <= through, always)
    our changes                    ├──┬───┬────● valid_through
                                     in memory, see Backlog

Why that is right:

1. A revision of the file that is open has no change after its beginning and up to
   ``through``; our own memory has all changes after ``base``. As ``base`` <=
   ``through``, together that is all of them up to ``valid_through``.
2. A reader takes the dictionary of changes *before* it looks into the file. What is
   trimmed from memory was written before, and the dictionary is replaced, not emptied:
   whoever still has the old one has all changes after the old ``base``. Whenever the
   position leaves the way it went, there is a new ``Backlog``: who reads keeps the old
   one, with its position and with the state of the file that it trusts.
3. Whatever is read comes with the file's state, in one snapshot. It counts only if the
   file's history is ours: if its ``through`` is one of our tids, or our position is one
   of its (``CacheFile.agrees``); asked once for each state. Otherwise it is a miss.
4. What the server answered is kept as open only if no change after its ``as_of`` is
   known: by us when it comes, by the file when it is written. It is written when our
   position has come to ``as_of``, and dropped if the session ends before: another
   server may part from this one in between.

Nothing here raises into the application: an error is a miss, and is counted. If the
file is of another history, or cannot be written for long, this process goes on *aside*:
with a cache in memory of its own, until it has a new session.

Threads: ``load`` takes no lock and may run anywhere. ``apply``, ``forget_all``,
``verified`` and ``cut_back`` are called by the holder of the position's lock. All that
is written is written by the writer thread: another process may keep the file locked.
"""

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import lmdb

from zeolith.client import cache_files
from zeolith.client.cache import MemoryCache
from zeolith.client.cache_backlog import Backlog, Batch, Revision, first_after
from zeolith.client.cache_counts import NO_LOADS, LoadCounts
from zeolith.client.cache_file import (
    Behind,
    CacheFile,
    Crowded,
    Foreign,
    Mark,
    Renewed,
    State,
)
from zeolith.client.cache_place import CachePlace, Identity, verifying
from zeolith.client.cache_writer import Writer
from zeolith.client.changes import Ask, Change, UnknownWay, changes_between
from zeolith.client.tids import Z64, following

logger = logging.getLogger(__name__)

# With more changes that wait the file is of no use: something keeps us from writing.
CHANGED_OIDS_MAX = 200_000
# This part of the cache, at most, is one record.
RECORD_PART = 64

_FILE_ERRORS = (lmdb.Error, OSError)


class DiskCache:
    """Revisions in a file that is shared; see client.cache.Cache for the methods."""

    # For a trace: what an entry costs beside its data (measured), and in which pages.
    record_part = RECORD_PART
    entry_bytes = 50
    page_bytes = PAGESIZE

    def __init__(
        self, place: CachePlace, storage: str, cache_bytes: int, ask: Ask | None = None
    ):
        """Use what was used last as ``storage``, until ``identify`` says more."""
        self.cache_bytes = cache_bytes
        self.valid_through = Z64
        self.history = 0
        self.hits = self.misses = self.evicted = self.errors = 0
        # Of these, what the file has been told.
        self._told = NO_LOADS
        self._place = place
        self._storage = storage
        self._ask = ask
        self._record_bytes_max = cache_bytes // RECORD_PART
        self.identity: tuple[bytes, int] | None = None
        self._file: CacheFile | None = None
        # Used while there is no file to use.
        self._aside: MemoryCache | None = MemoryCache(cache_bytes)
        self._lock = threading.Lock()
        self._writer = Writer(self._flush_safely)
        self._backlog = Backlog(Z64)
        self._stand_at(None, Z64)
        # following(valid_through), made when it is first needed.
        self._horizon = (Z64, following(Z64))
        # When the revisions were listed that are to be verified.
        self._mark = Mark(b"", 0)
        identity = place.last(storage)
        if identity is not None:
            self._open(identity)

    def _stand_at(self, state: State | None, base: bytes) -> None:
        """No change and no revision waits: what there was is written, or given up."""
        self._lineage = b"" if state is None else state.lineage
        trusted = b"" if state is None else b"".join(state)
        forgotten = self._backlog.forgotten
        self._backlog = Backlog(base, trusted=trusted)
        self._backlog.forgotten = forgotten

    # The file

    def identify(self, database_id: bytes, epoch: int) -> bool:
        """The server's database is this one; whether another file is used now.

        Then everything of the old one is forgotten, and ``valid_through`` is new.
        Called with each session before it is adopted; a cache that had to go aside
        tries again.
        """
        identity = Identity(database_id, epoch)
        if identity == self.identity:
            self._forget_what_is_ahead()
            self._come_back()
            return False
        if self.identity is not None:
            logger.warning(
                "the server has another database than the one whose cache was used"
                " last as %r in %s",
                self._storage,
                self._place.directory,
            )
        had_one = self.identity is not None
        self._let_go()
        self._open(identity)
        return had_one or self.valid_through != Z64

    def _open(self, identity: Identity) -> None:
        path = self._place.path_of(identity)
        state: State | None = None
        try:
            with self._place.locked():
                self._file = cache_files.acquire(path, self.cache_bytes)
            self._place.remember(self._storage, identity)
            state = self._file.state()
        except _FILE_ERRORS as error:
            self._note(error)
            logger.warning("%s is not used: %s", path, error)
            self._let_go()
        with self._lock:
            self.identity = identity
            self.history += 1
            self.valid_through = Z64 if state is None else state.through
            self._stand_at(state, self.valid_through)
            if self._file is not None:
                self._aside = None
            elif self._aside is not None:
                self._aside.forget_all(self.valid_through)

    def _come_back(self) -> None:
        """Try again with the file, from where we are."""
        with self._lock:
            if self._aside is None or self._file is None or self.valid_through == Z64:
                return
            self._stand_at(None, self.valid_through)
            self._aside = None
        self._writer.due()

    def _forget_what_is_ahead(self) -> None:
        """What a session has told of later than our position may be in it only.

        Another server's history may part from it in between.
        """
        with self._lock:
            self.history += 1
            self._backlog.drop_ahead()

    def _let_go(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            cache_files.release(file)

    def _go_aside(self, reason: str) -> None:
        """Live without the file, until a session begins anew."""
        with self._lock:
            if self._aside is not None:
                return
            self._aside = MemoryCache(self.cache_bytes)
            self._aside.forget_all(self.valid_through)
            self._stand_at(None, self.valid_through)
        logger.warning("the cache on disk is not used for now: %s", reason)

    @property
    def is_aside(self) -> bool:
        """Whether this process has to do without the file."""
        return self._aside is not None

    @property
    def path(self) -> Path | None:
        """The file; None while it is not used."""
        file = self._file
        return None if file is None or self._aside is not None else file.path

    @property
    def used_bytes(self) -> int:
        """What is used of the disk; of memory, while the file is not used."""
        if self._aside is not None or self._file is None:
            return 0 if self._aside is None else self._aside.used_bytes
        return self._file.used_bytes

    def __len__(self) -> int:
        if self._aside is not None or self._file is None:
            return 0 if self._aside is None else len(self._aside)
        return len(self._file)

    def close(self) -> None:
        """Write what waits, and let go of the file."""
        if self._writer.close():
            self._let_go()
        # Else it waits for another process, and needs the file.

    # Reading

    def load(
        self, oid: bytes, before: bytes
    ) -> tuple[bytes, bytes, bytes | None] | None:
        """See Cache.load."""
        aside = self._aside
        if aside is not None:
            return self._load_aside(aside, oid, before)
        # In this order: see above.
        backlog = self._backlog
        valid_through = backlog.through
        changed = backlog.changed
        pending = backlog.pending.get(oid)
        if pending is not None and pending.tid < before:
            _oid, tid, end, data, _as_of = pending
        else:
            file = self._file
            if file is None or file.is_paused or oid in backlog.forgotten:
                self.misses += 1
                return None
            try:
                state, tid, end, data = file.find(oid, before)
                if state != backlog.trusted and not self._trust(backlog, state):
                    # It may have been written in between.
                    state, tid, end, data = file.find(oid, before)
                    data = data if state == backlog.trusted else b""
            except _FILE_ERRORS as error:
                self._note(error)
                data = b""
            if not data:
                self.misses += 1
                return None
        if end is None and (tids := changed.get(oid)):
            end = first_after(tids, tid)
        limit = end
        if limit is None:
            known, limit = self._horizon
            if known != valid_through:
                limit = following(valid_through)
                self._horizon = valid_through, limit
        if before <= limit:
            self.hits += 1
            return data, tid, end
        self.misses += 1
        return None

    def _load_aside(self, aside: MemoryCache, oid: bytes, before: bytes) -> Any:
        found = aside.load(oid, before)
        self.hits += found is not None
        self.misses += found is None
        return found

    def _trust(self, backlog: Backlog, stored: bytes | None) -> bool:
        """Whether a state of the file is of our history; raises lmdb.Error."""
        if stored is None:
            return False
        state = State.parse(stored)
        file = self._file
        with self._lock:
            base, tids, at = backlog.base, backlog.tids, backlog.through
        if file is None or not file.agrees(state, base, tids):
            self._writer.due()
            return False
        with self._lock:
            if backlog.through == at:
                backlog.trusted = stored
                if self._backlog is backlog:
                    self._lineage = state.lineage
        return True

    # Filling

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
        with self._lock:
            if history is None or history == self.history:
                self._store(Revision(oid, tid, end, data, as_of))
        self._writer.due()

    def _store(self, revision: Revision) -> None:
        if self._aside is not None:
            self._aside.store(*revision)
        elif 0 < len(revision.data) <= self._record_bytes_max:
            self._backlog.add_revision(revision)

    def store_committed(
        self, tid: bytes, records: Mapping[bytes, bytes], history: int
    ) -> None:
        """See Cache.store_committed."""
        with self._lock:
            if history == self.history:
                for oid, data in records.items():
                    self._store(Revision(oid, tid, None, data, tid))
        self._writer.due()

    # Changes

    def apply(self, changes: Sequence[Change]) -> None:
        """See Cache.apply."""
        with self._lock:
            aside = self._aside
            if aside is not None:
                aside.apply(changes)
                self.valid_through = changes[-1].tid
                return
            backlog = self._backlog
            for change in changes:
                backlog.add_change(change)
            self.valid_through = changes[-1].tid
            is_too_much = len(backlog.changed) > CHANGED_OIDS_MAX
        if is_too_much:
            self._go_aside("it cannot be written to")
        else:
            # Whoever shares the file hears of it, too.
            self._writer.due(is_urgent=False)

    def forget(self, oid: bytes) -> None:
        """See Cache.forget."""
        with self._lock:
            if self._aside is not None:
                self._aside.forget(oid)
            # Until the writer thread has done it.
            self._backlog.forget(oid)
        self._writer.due()

    def forget_all(self, valid_through: bytes) -> None:
        """See Cache.forget_all."""
        given_up = self._lineage
        self._begin_anew(
            valid_through, lambda file: file.start(valid_through, given_up or None)
        )

    def verified(self, through: bytes, stale: Collection[bytes]) -> None:
        """See Cache.verified."""
        mark = self._mark
        way = [self._backlog.base, *self._backlog.tids]
        self._begin_anew(through, lambda file: file.verified(mark, through, stale, way))

    def cut_back(self, tid: bytes) -> None:
        """See Cache.cut_back."""
        given_up = {self._backlog.base, *self._backlog.tids, self.valid_through}
        self._begin_anew(tid, lambda file: file.cut_back(tid, given_up))

    def _begin_anew(self, through: bytes, step: Callable[[CacheFile], State]) -> None:
        """Stand at ``through``, with what ``step`` leaves in the file."""
        file = self._file
        state: State | None = None
        with self._lock:
            self.history += 1
            # Nothing is read or written meanwhile.
            self._aside = self._aside or MemoryCache(self.cache_bytes)
            self._aside.forget_all(through)
            self._stand_at(None, through)
            self.valid_through = through
        if file is None:
            return

        def done() -> State | None:
            try:
                return step(file)
            except Foreign:
                return file.state()

        try:
            state = self._writer.have_done(done)
        except (TimeoutError, *_FILE_ERRORS) as error:
            self._note(error)
            logger.warning("the cache on disk is not used for now: %s", error)
            return
        with self._lock:
            if state is not None:
                self._lineage = state.lineage
            self._aside = None
        self._writer.due()

    # For a verification

    @contextmanager
    def verifying(self) -> Iterator[None]:
        """See Cache.verifying.

        What another process has verified, or cut back, while we waited is taken up:
        then ``valid_through`` is where the file stands.
        """
        file = self._file
        if self._aside is not None or file is None:
            yield
            return
        with verifying(file.path):
            self._take_up(file)
            yield

    def _take_up(self, file: CacheFile) -> None:
        try:
            state = file.state()
        except _FILE_ERRORS as error:
            self._note(error)
            return
        with self._lock:
            if state is not None and state.lineage != self._lineage:
                self.history += 1
                self.valid_through = state.through
                self._stand_at(state, state.through)

    def open_revisions(self) -> Iterator[list[tuple[bytes, bytes]]]:
        """See Cache.open_revisions."""
        file = self._file
        if self._aside is not None or file is None:
            return
        # What was listed in part only cannot be verified.
        self._mark = Mark(b"", 0)
        mark = file.mark()
        yield from file.open_revisions()
        self._mark = mark

    def known_tids(self) -> list[bytes]:
        """See Cache.known_tids."""
        file = self._file
        with self._lock:
            ours = self._backlog.tids[::-1][:30]
        if self._aside is not None or file is None:
            return [self.valid_through]
        try:
            known = file.known_tids()
        except _FILE_ERRORS as error:
            self._note(error)
            known = [self.valid_through]
        return list(dict.fromkeys([*ours, *known]))

    # Forks

    def reset(self, valid_through: bytes) -> None:
        """See Cache.reset: the parent's environment and threads are not ours."""
        backlog, identity = self._backlog, self.identity
        if self._aside is not None:
            backlog = Backlog(valid_through)
        self._lock = threading.Lock()
        self._writer = Writer(self._flush_safely)
        # The parent tells what was counted before.
        self._told = LoadCounts(self.hits, self.misses)
        self._file = None
        self._aside = MemoryCache(self.cache_bytes)
        self.history += 1
        if identity is not None:
            self._open(Identity(*identity))
        with self._lock:
            self.valid_through = valid_through
            self._stand_at(None, valid_through)
            # What the parent may have been about to write is ours to write, too.
            self._backlog = Backlog(backlog.base, backlog.changes)
            self._backlog.through = valid_through
            self._backlog.forgotten = dict(backlog.forgotten)
            if self._aside is not None:
                self._aside.forget_all(valid_through)

    # In the writer thread

    def _flush_safely(self) -> bool:
        try:
            self._flush()
        except Foreign:
            self._go_aside("the history in it is another one than the server's")
        except (Crowded, *_FILE_ERRORS) as error:
            if self._is_of_a_fork(error):
                self._writer.due()
                return True
            self._note(error)
            with self._lock:
                self._backlog.drop_revisions()
            return False
        except Exception:
            self.errors += 1
            logger.exception("writing to the cache failed")
            self._go_aside("writing to it failed")
        return True

    def _flush(self) -> None:
        """Write what waits in memory."""
        file = self._file
        with self._lock:
            if self._aside is not None or file is None:
                return
            backlog = self._backlog
            batch = backlog.batch()
        state = self._extend(file, batch)
        if state is None:
            return
        with self._lock:
            if backlog is self._backlog:
                backlog.written(batch)
                self._lineage = state.lineage
                # If changes came meanwhile they may lead past where the file is.
                if not backlog.changes or state.through == backlog.base:
                    backlog.trusted = b"".join(state)
                else:
                    backlog.trusted = b""

    def _extend(self, file: CacheFile, batch: Batch) -> State | None:
        """Bring the file to where we stand; None if that is not possible yet."""
        state = file.state()
        if state is None:
            raise Foreign
        if state.through < batch.base:
            # Somebody else began it, and has not brought it to where we began.
            try:
                # Who holds the position's lock and waits for this thread has no session
                # yet, and the last one has ended: this does not wait for him.
                missing = changes_between(self._ask, state.through, batch.base)
            except UnknownWay:
                state = file.start(batch.base, state.lineage)
            except Exception as error:  # noqa: BLE001 - whatever a server may answer
                logger.debug("the changes since %s: %s", state.through.hex(), error)
                return None
            else:
                if missing is None:
                    raise Foreign
                batch = batch._replace(
                    base=state.through, changes=(*missing, *batch.changes)
                )
        loads = LoadCounts(self.hits, self.misses)
        if loads == self._told and file.has(state, batch):
            return state
        try:
            more = LoadCounts(*map(int.__sub__, loads, self._told))
            state, evicted = file.extend(state.lineage, batch, more)
        except Behind:
            return None
        except Renewed:
            # Since we looked. Then it says where it stands now.
            return self._extend(file, batch)
        self._told = loads
        self.evicted += evicted
        return state

    def _note(self, error: BaseException) -> None:
        """Count an error, and say it once."""
        if self._is_of_a_fork(error):
            return
        self.errors += 1
        if self.errors == 1:
            logger.warning("the cache on disk failed, which is a miss: %s", error)

    def _is_of_a_fork(self, error: BaseException) -> bool:
        """Whether the file is, or was just now, closed for the moment of a fork."""
        file = self._file
        return (
            isinstance(error, lmdb.Error)
            and "closed" in str(error)
            and file is not None
            and (file.is_paused or file.was_paused)
        )
