"""A Data.fs: ZODB's FileStorage for everything it does well, with our read path.

FileStorage keeps the file, its lock, its index, commit and undo. Ours are

* the saved index, through ``indexed``: after a crash most of it is there;
* loads, through ``records``: no lock, no file position, and on the loop no waiting;
* logs and histories, through ``log``: extensions are passed on, never unpickled;
* oids: never given out twice, through ``identity``;
* packing, through ``packing``: in another process;
* commits of stores alone, through ``preparing`` and ``appending``: side by side, and
  in groups; undo and whatever else is alone goes through FileStorage;
* tids: given by us, so that they grow whatever the clock does.

The result is a plain Data.fs at every moment. See ``database`` for the threads.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from io import DEFAULT_BUFFER_SIZE
from itertools import pairwise
from typing import Any

from persistent.TimeStamp import TimeStamp
from ZODB.FileStorage.format import TxnHeader
from ZODB.POSException import ConflictError, POSKeyError, ReadOnlyError

from zeolith.storage.adapted import TIDS_SKIPPED, AdaptedStorage
from zeolith.storage.appending import Appender
from zeolith.storage.blobs import BLOB_RECORD_BYTES_MAX, is_blob_record
from zeolith.storage.changes import Change, Known, Past
from zeolith.storage.commit import FUTURE_MAX_S
from zeolith.storage.database import (
    Batch,
    Conflict,
    CurrentRecord,
    Finished,
    LogEntry,
    Near,
    Prepared,
    Revision,
    Transaction,
    Wish,
    WouldBlock,
)
from zeolith.storage.disk import Disk
from zeolith.storage.identity import Identity
from zeolith.storage.index import put_places
from zeolith.storage.indexed import IndexedFile
from zeolith.storage.iteration import current_in_file, iterate_file
from zeolith.storage.locks import Claim
from zeolith.storage.log import LogReader
from zeolith.storage.pack_progress import Packed, Packing
from zeolith.storage.packing import FilePack, clean_up, finish_leftovers
from zeolith.storage.preparing import Preparation, claim_of
from zeolith.storage.recent import RecentIds
from zeolith.storage.records import NOWAIT, Generation
from zeolith.storage.replay import changes_before, last_known
from zeolith.storage.room import Room
from zeolith.storage.tids import Z64, advanced, tid_at
from zeolith.storage.undoing import UndoConflicts
from zeolith.storage.wrapping import PLAIN, Form

logger = logging.getLogger(__name__)

# How many oids are reserved on disk at a time, so that few requests wait for a sync.
OIDS_RESERVED = 10_000
# What a starting server reads of the log, so that clients need not start afresh.
CHANGES_READ_MAX = 1000
OIDS_READ_MAX = 100_000


class _DataFile(IndexedFile):
    """FileStorage that says when its index changes hands, and imports no classes."""

    generation: Generation | None = None
    # Of its records, against those that clients know; None if it is not known.
    outside: Form | None = PLAIN
    # Set by FileStorage.__init__ after the first _initIndex.
    _file: Any = None
    # Whether nothing can be behind the last transaction: it was the last thing written.
    is_end_clean = False

    def __init__(self, path: str, **options: Any):
        # Of the transaction under way; see commit.
        self.undo_conflicts = UndoConflicts()
        self.disk = Disk()
        self.room = Room(
            self.disk, self._duplicate, lambda: int(self._pos), options.get("quota")
        )
        try:
            super().__init__(path, **options)
        except BaseException:
            # FileStorage would leave them open, and the lock taken.
            for name in ("_file", "_tfile", "_lock_file"):
                opened = getattr(self, name, None)
                if opened is not None:
                    opened.close()
            raise

    def _newIndexes(self) -> Any:
        """Called at opening, with the lock file taken and before the file is opened."""
        if not self._is_read_only:
            clean_up(self._file_name)
        return super()._newIndexes()

    def _initIndex(self, index: Any, tindex: Any) -> None:
        """Called at opening and when ZODB's own pack has replaced the file."""
        if self._file is not None:
            try:
                self.generation = Generation(self._file_name, index)
            except BaseException:
                # FileStorage does not know yet where the new file ends: what it would
                # write there nobody would find. It must not write any more.
                self._file.close()
                raise
        self.room.forget()
        super()._initIndex(index, tindex)

    def _duplicate(self) -> tuple[int, int]:
        # Under this lock a pack replaces the file, whoever does it.
        with self._lock:
            return os.dup(self._file.fileno()), int(self._pos)

    def renew(self, generation: Generation) -> None:
        """Read that file from now on, by the index that goes with it; cannot fail."""
        super()._initIndex(generation.index, self._tindex)
        self.generation = generation
        self.room.forget()

    def extend(self, places: dict[bytes, int], end: int, tid: bytes) -> None:
        """Transactions were appended: their records are there, ``tid`` is the last.

        Called with the commit lock held, when all of it is on the disk.
        """
        with self._lock:
            self.will_change(places)
            put_places(self._index, places)
            self._pos = end
            self._ltid = tid
            self._ts = TimeStamp(tid)
            self.is_end_clean = True
            if places and (last := max(places)) > self._oid:
                self.set_max_oid(last)
            if self.dirty_oids:
                self._blob_tpc_finish()

    def forget_tail(self) -> None:
        """What was behind the last transaction was cut off, and is in no buffer."""
        self.room.forget()
        with self._lock:
            self._file.flush()
        self._files.flush()

    def close(self) -> None:
        """Give back what was reserved, and close."""
        try:
            if self._file is not None and not self._file.closed:
                self.room.release()
        except OSError as error:
            logger.warning("%s keeps the room it reserved: %s", self._file_name, error)
        super().close()

    def _begin(self, tid: bytes, user: bytes, description: bytes, ext: bytes) -> None:
        """Called by tpc_begin, which holds the commit lock.

        A disk that was full at an earlier vote, and at undoing it, has left some of
        that transaction behind the last one; it must not end up behind this one.
        """
        super()._begin(tid, user, description, ext)
        self.is_end_clean = False
        self._file.flush()
        if os.fstat(self._file.fileno()).st_size > self._pos:
            self._file.truncate(self._pos)
            self._files.flush()
            self.room.forget()

    def tpc_vote(self, transaction: Any) -> Any:
        """Write all of the transaction, with the mark "c".

        FileStorage syncs once, at finish. Of what is more than one write, a disk that
        writes in another order, and a crash, could leave the end and not the mark, and
        then nobody opens the file; or, see ``_finish``, the blank that takes the place
        of the mark and not the rest.
        """
        if self._thl + self._tfile.tell() > DEFAULT_BUFFER_SIZE:
            user, description, extension = self._ude
            lengths = map(len, (user, description, extension))
            length = self._thl + self._tfile.tell()
            header = TxnHeader(self._tid, length, "c", *lengths)
            header.user, header.descr, header.ext = user, description, extension
            self._file.seek(self._pos)
            self._file.write(header.asString())
            self._sync()
        return super().tpc_vote(transaction)

    def _finish(self, tid: bytes, user: bytes, description: bytes, ext: bytes) -> None:
        """Called by tpc_finish, to make the mark a blank and sync."""
        if self._nextpos - self._pos > DEFAULT_BUFFER_SIZE:
            self._sync()
        super()._finish(tid, user, description, ext)

    def _sync(self) -> None:
        self._file.flush()
        self.disk.sync(self._file.fileno())

    def _abort(self) -> None:
        """Called by tpc_abort.

        FileStorage removes blobs only if it has voted; a store may fail before.
        """
        super()._abort()
        self._blob_tpc_abort()
        self.room.forget()

    def is_blob_record(self, record: bytes) -> bool:
        """Called by undo and pack, with the record as it is in the file."""
        if len(record or b"") > BLOB_RECORD_BYTES_MAX:
            # Nor is it decompressed: that may be a thousand times as much.
            return False
        try:
            return is_blob_record(self._crs_untransform_record_data(record))
        except Exception:  # noqa: BLE001 - what wrappers raise for what was made up
            return False

    def tryToResolveConflict(
        self,
        oid: bytes,
        committed_tid: bytes,
        old_tid: bytes,
        new: bytes,
        committed: bytes = b"",
    ) -> bytes:
        """Called by undo (store finds no conflict: commit has resolved it before)."""
        try:
            old = self.loadSerial(oid, old_tid)
            committed = committed or self.loadSerial(oid, committed_tid)
        except POSKeyError:
            raise ConflictError(oid=oid, serials=(committed_tid, old_tid)) from None
        conflict = Conflict(oid, committed_tid, old_tid, committed, old, new)
        # Set by registerDB to the wrappers' conversions.
        plain = Form(self._crs_untransform_record_data, self._crs_transform_record_data)
        return self.undo_conflicts.merge(conflict, plain, self.outside)


class _Committed:
    """What was committed to a FileStore, as a validation reads it."""

    def __init__(self, store: "FileStore", nowait: bool):
        self._store = store
        self._nowait = nowait

    def current_tids(self, oids: list[bytes]) -> dict[bytes, bytes]:
        flags = NOWAIT if self._nowait else 0
        return self._store.generation.current_tids(oids, flags)

    def load_serial(self, oid: bytes, tid: bytes) -> bytes:
        if not self._nowait:
            return self._store.load_serial(oid, tid)
        if not NOWAIT:
            # A whole record, and a search for it: too much for who cannot say nowait.
            raise WouldBlock
        return self._store.generation.load_serial(oid, tid, NOWAIT)


class FileStore(AdaptedStorage):
    """The database in a Data.fs; raises what FileStorage and Identity raise."""

    # What makes of a record that a client sent what is in the file.
    form_inside: Callable[[bytes], bytes] | None = None

    def __init__(self, name: str, path: str, **options: Any):
        """Open the Data.fs at ``path``; ``options`` are FileStorage's."""
        self._path = os.path.abspath(path)
        self._file = _DataFile(path, **options)
        try:
            storage = self._around(self._file)
            self._identity = Identity(
                self._path, is_read_only=bool(options.get("read_only"))
            )
            self._file.renew(Generation(self._path, self._file._index))
            if not self._file.isReadOnly():
                finish_leftovers(self._file)
            cut_off = self._file.lastTransaction() or Z64
            self._file._ltid = self._last_tid()
            self._recent = RecentIds(
                self._path, is_read_only=bool(options.get("read_only"))
            )
        except BaseException:
            self._file.close()
            raise
        super().__init__(
            name, storage, self._identity.database_id, self._identity.epoch
        )
        self._assigns_tid = True
        if cut_off < tid_at(time.time() + FUTURE_MAX_S):
            self.raise_tid_floor(advanced(cut_off, TIDS_SKIPPED))
        self._appender = Appender(self._file, self._recent)
        self.room = self._file.room
        self.form = self._form
        self._oids_lock = threading.Lock()
        # The largest oid that a vote has brought; never held while anybody waits.
        self._seen_oid = Z64
        self._seen_lock = threading.Lock()
        self._next_oid = 1 + max(
            int.from_bytes(self._file._oid, "big"), self._identity.oids_reserved
        )

    def _around(self, file: _DataFile) -> Any:
        """What commits go through."""
        return file

    def _last_tid(self) -> bytes:
        """The last tid in the log.

        FileStorage's own may be that of what opening has cut off: a transaction that a
        crash left unfinished, whose tid a client may have heard of, or anything at all.
        """
        with self._log() as log:
            return next((entry.tid for entry in log.backwards()), Z64)

    # loop

    def load_nowait(self, oid: bytes, before: bytes) -> Revision | None:
        """See Database.load_nowait."""
        # Without the property, for this is the hot path.
        return self._file.generation.load_nowait(oid, before)  # type: ignore[union-attr]

    def near(self) -> Near | None:
        """See Database.near."""
        return self._file.generation

    def claim(self, transaction: Transaction) -> Claim:
        """See Database.claim."""
        return claim_of(transaction)

    def prepare(self, transaction: Transaction) -> Prepared:
        """See Database.prepare."""
        if self.is_read_only:
            raise ReadOnlyError("the storage is read-only")
        return Preparation(self, transaction)

    def records(self, nowait: bool) -> _Committed:
        """What was committed, for a validation."""
        return _Committed(self, nowait)

    def current_tid_nowait(self, oid: bytes) -> bytes | None:
        """The tid of the current revision; None if there is none. On the loop only."""
        return self._file.generation.current_tid_nowait(oid)  # type: ignore[union-attr]

    def see_oid(self, oid: bytes) -> None:
        """Give out no oid up to this one any more: a client has brought it."""
        with self._seen_lock:
            self._seen_oid = max(self._seen_oid, oid)

    @property
    def generation(self) -> Generation:
        generation = self._file.generation
        assert generation is not None
        return generation

    # reader

    def load(self, oid: bytes, before: bytes) -> Revision | None:
        """See Database.load."""
        return self.generation.load(oid, before)

    def load_serial(self, oid: bytes, tid: bytes) -> bytes:
        """See Database.load_serial."""
        return self.generation.load_serial(oid, tid)

    def get_tid(self, oid: bytes) -> bytes:
        """See Database.get_tid."""
        return self.generation.get_tid(oid)

    def last_changes(self) -> tuple[bytes, list[Change]]:
        """The last tid, and what the end of the log says led to it."""
        found: list[tuple[bytes, list[bytes]]] = []
        oids_read = 0
        with self._log() as log:
            for entry in log.backwards():
                if entry.status == b"p":
                    # A pack has taken records out of it and of what is before it, so
                    # what these transactions changed is not known any more.
                    found.append((entry.tid, []))
                    break
                oids = log.oids(entry)
                oids_read += len(oids)
                found.append((entry.tid, oids))
                if len(found) >= CHANGES_READ_MAX or oids_read >= OIDS_READ_MAX:
                    break
            else:
                # All of the log was read: nothing is before its first transaction.
                found.append((Z64, []))
        found.reverse()
        changes = [
            Change(since, tid, oids, self._recent.id_of(tid))
            for (since, _oids), (tid, oids) in pairwise(found)
        ]
        return found[-1][0], changes

    def changes_before(self, last: bytes, position: bytes, bytes_max: int) -> Past:
        """See Database.changes_before."""
        with self._log() as log:
            return changes_before(log, last, position, bytes_max, self._recent.id_of)

    def last_known(self, tids: Collection[bytes], last: bytes, bytes_max: int) -> Known:
        """See Database.last_known."""
        with self._log() as log:
            return last_known(log, tids, last, bytes_max)

    def outdated(self, revisions: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        """See Database.outdated."""
        current = self.generation.current_tids([oid for oid, _tid in revisions])
        return [oid for oid, tid in revisions if current.get(oid) != tid]

    def history(self, oid: bytes, size: int) -> list[LogEntry]:
        """See Database.history."""
        entries: list[LogEntry] = []
        generation = self.generation
        with LogReader(generation.duplicate(), 0) as log:
            for header, _position, _start in generation.revisions(oid):
                if len(entries) >= size:
                    break
                entry = log.entry_at(header.transaction)
                entries.append(entry.as_log_entry()._replace(size=header.length))
        if not entries and size:
            raise POSKeyError(oid)
        return entries

    def undo_log(self, before: bytes | None, size: int) -> list[LogEntry]:
        """See Database.undo_log; a packed transaction ends the list."""
        entries: list[LogEntry] = []
        with self._log() as log:
            for entry in log.backwards():
                if entry.status == b"p" or len(entries) >= size:
                    break
                if entry.status == b" " and (before is None or entry.tid < before):
                    entries.append(entry.as_log_entry())
        return entries

    def transactions(self, wish: Wish, cursor: bytes | None) -> Batch:
        """See Database.transactions."""
        generation, end = self._state()
        return iterate_file(generation, end, wish, cursor)

    def current_records(
        self, first: bytes | None, before: bytes, bytes_max: int
    ) -> tuple[list[CurrentRecord], bytes | None]:
        """See Database.current_records."""
        return current_in_file(self.generation, first, before, bytes_max)

    def committed(self, tid: bytes) -> bool | None:
        """Whether ``tid`` is in the log; None if a pack may have taken it away."""
        was_packed = False
        with self._log() as log:
            for entry in log.backwards():
                if entry.tid == tid:
                    return True
                was_packed = entry.status == b"p"
                if entry.tid < tid:
                    break
        return None if was_packed else False

    def new_oids(self, count: int) -> list[bytes]:
        """See Database.new_oids; waits for a sync once in OIDS_RESERVED oids."""
        if self.is_read_only:
            raise ReadOnlyError("the storage is read-only")
        with self._oids_lock:
            # Whoever copies transactions brings oids of its own.
            brought = max(self._file._oid, self._seen_oid)
            stored = int.from_bytes(brought, "big")
            first = max(self._next_oid, stored + 1)
            if first + count - 1 > self._identity.oids_reserved:
                self._identity.reserve_oids(first + count - 1 + OIDS_RESERVED)
            self._next_oid = first + count
        return [(first + n).to_bytes(8, "big") for n in range(count)]

    def info(self) -> tuple[int, int]:
        """See Database.info."""
        return int(self._file.getSize()), len(self._file)

    def save_index(self) -> bool:
        """See Database.save_index."""
        return self._file.save_index_if_grown()

    def pack(
        self, time_s: float, gc: bool | None = None, packing: Packing | None = None
    ) -> Packed:
        """See Database.pack; raises what FilePack.run raises."""
        if self.is_read_only:
            raise ReadOnlyError("a read-only storage is not packed")
        return FilePack(self._file, packing or Packing()).run(time_s, gc)

    # writer

    def append(self, group: Sequence[Prepared]) -> list[Finished | Exception]:
        """See Database.append."""
        return self._appender.append(group, self.tid_floor)  # type: ignore[arg-type]

    def finish(self) -> Finished:
        """See Database.finish."""
        committing = self._committing
        if committing is not None and committing.tid is not None:
            self._recent.note([(committing.tid, committing.transaction_id)])
        return super().finish()

    def close(self) -> None:
        """Save index and oids; release the files."""
        generation = self.generation
        with self._oids_lock:
            if not self.is_read_only:
                self._identity.return_oids(self._next_oid)
        super().close()
        generation.close()
        self._recent.close()

    def _log(self) -> LogReader:
        generation, end = self._state()
        return LogReader(generation.duplicate(), end)

    def _state(self) -> tuple[Generation, int]:
        # A pack replaces the generation and its end together, under this lock.
        with self._file._lock:
            return self.generation, self._file.getSize()
