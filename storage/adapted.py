"""Any ZODB storage behind the inner interface: MappingStorage, DemoStorage, others.

Nothing is known of what the storage locks or waits for, so nothing is done on the
loop: ``load_nowait`` always says WouldBlock, and the storage's own locks serialise the
reader threads. One transaction at a time is committed, in the writer thread.

Subclassed by ``filestore``, which replaces what a Data.fs can do better.
"""

import pickle
import sys
from base64 import decodebytes
from collections.abc import Callable, Collection, Sequence
from typing import Any

import ZODB._compat
import ZODB.interfaces
from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ReadOnlyError, StorageError, Unsupported
from ZODB.serialize import referencesf
from zope.interface import providedBy

from zeolith.storage.blobs import Piece, Uploads, has_blobs, read_piece
from zeolith.storage.changes import Change, Known, Past
from zeolith.storage.commit import Committing
from zeolith.storage.database import (
    Batch,
    CurrentRecord,
    Finished,
    LogEntry,
    Near,
    Prepared,
    Revision,
    Standing,
    Transaction,
    Unresolved,
    Voted,
    Wish,
    WouldBlock,
)
from zeolith.storage.feed import Feed, Listener
from zeolith.storage.iteration import current_in_storage, iterate_storage
from zeolith.storage.locks import ALONE, Claim
from zeolith.storage.pack_progress import Packed, Packing
from zeolith.storage.tids import Z64, advanced
from zeolith.storage.wrapping import form_of

_ENTRY_KEYS = {"id", "tid", "serial", "time", "user_name", "description", "size"}
# After opening: more than were voted on in vain by any server while its clock stood
# still; less than a quarter of a second of tids.
TIDS_SKIPPED = 2**24
# Of iterating while others commit.
_TRIES = 10
_TAKES_TID = (FileStorage, MappingStorage, DemoStorage)


def _opaque(extension: bytes) -> dict[str, Any]:
    return {"bytes": extension}


def forbid_unpickling() -> None:
    """From now on nothing in this process unpickles a transaction's extension.

    ZODB's FileStorage does it wherever it lists transactions, with any class that the
    extension names; it may be what another storage is made of. What it gets instead,
    ``_log_entry`` understands. For the whole process, so for a server's only.
    """
    sys.modules[FileStorage.__module__].loads = _opaque  # type: ignore[attr-defined]
    # What another server's storage lists them with.
    ZODB._compat.loads = _opaque


class AdaptedStorage:
    """A database.Database over any object that provides IStorage."""

    tells_own = False

    def __init__(self, name: str, storage: Any, database_id: bytes, epoch: int = 1):
        self.name = name
        self.database_id = database_id
        self.epoch = epoch
        self._storage = storage
        self._feed = Feed()
        if hasattr(storage, "registerDB"):
            storage.registerDB(self._feed)
        self._form = form_of(storage)
        # Whether the storage lets us choose the tid, so that it is known at the vote
        # and grows whatever the storage thinks the time is.
        self._assigns_tid = isinstance(storage, _TAKES_TID)
        self._committing: Committing | None = None
        # No tid up to this one is given to a new transaction: clients may have seen it,
        # as that of a transaction which was voted on before a crash and then was not
        # committed, or which a restored backup has not got.
        self.tid_floor = advanced(storage.lastTransaction() or Z64, TIDS_SKIPPED)
        self._is_read_only = bool(storage.isReadOnly())
        self.supports_undo = bool(storage.supportsUndo()) if _undoes(storage) else False
        self.interfaces = tuple(
            interface.__name__
            for interface in providedBy(storage)
            if interface.__module__ == ZODB.interfaces.__name__
        )
        self.uploads = Uploads(storage)
        if not self.is_read_only:
            self.uploads.sweep(self.committed)

    # loop

    @property
    def takes_blobs(self) -> bool:
        """See Database.takes_blobs; a storage that connects may come to it later."""
        return has_blobs(self._storage)

    @property
    def is_read_only(self) -> bool:
        """See Database.is_read_only."""
        return self._is_read_only

    def follow(self, listener: Listener) -> None:
        """See Database.follow."""
        self._feed.follow(listener)

    def near(self) -> Near | None:
        """See Database.near."""
        return None

    def load_nowait(self, oid: bytes, before: bytes) -> Revision | None:
        """Nobody can say whether this storage would wait."""
        raise WouldBlock

    def claim(self, transaction: Transaction) -> Claim:
        """See Database.claim: ZODB's storages take one transaction at a time."""
        return ALONE

    def prepare(self, transaction: Transaction) -> Prepared:
        """See Database.prepare."""
        raise NotImplementedError("every transaction is alone here")

    # reader

    def last_changes(self) -> tuple[bytes, list[Change]]:
        """Only the last tid is known."""
        return self._storage.lastTransaction() or Z64, []

    def changes_before(self, last: bytes, position: bytes, bytes_max: int) -> Past:
        """Unknown: what IStorageIteration lists may have been packed."""
        return Past([], True)

    def last_known(self, tids: Collection[bytes], last: bytes, bytes_max: int) -> Known:
        """Unknown, as above; but nothing is after ``last``."""
        return Known(None, last)

    def outdated(self, revisions: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        """See Database.outdated."""
        return [oid for oid, tid in revisions if not self._is_current(oid, tid)]

    def _is_current(self, oid: bytes, tid: bytes) -> bool:
        try:
            return self.get_tid(oid) == tid
        except KeyError:
            return False

    def load(self, oid: bytes, before: bytes) -> Revision | None:
        """See Database.load."""
        found = self._storage.loadBefore(oid, before)
        return None if found is None else Revision(*found)

    def prefetch(self, oids: list[bytes], before: bytes) -> None:
        """See Database.prefetch: one by one is as good."""

    def load_serial(self, oid: bytes, tid: bytes) -> bytes:
        """See Database.load_serial."""
        data: bytes = self._storage.loadSerial(oid, tid)
        return data

    def load_blob(self, oid: bytes, tid: bytes, offset: int, size: int) -> Piece:
        """See Database.load_blob."""
        return read_piece(self._storage, oid, tid, offset, size)

    def get_tid(self, oid: bytes) -> bytes:
        """See Database.get_tid."""
        tid: bytes = self._storage.getTid(oid)
        return tid

    def history(self, oid: bytes, size: int) -> list[LogEntry]:
        """See Database.history."""
        return [
            _log_entry(entry["tid"], entry)
            for entry in self._storage.history(oid, size=size)
        ]

    def undo_log(self, before: bytes | None, size: int) -> list[LogEntry]:
        """See Database.undo_log."""
        if not self.supports_undo:
            raise Unsupported("this storage cannot undo")

        def is_before(entry: dict[str, Any]) -> bool:
            return before is None or decodebytes(entry["id"] + b"\n") < before

        return [
            _log_entry(decodebytes(entry["id"] + b"\n"), entry)
            for entry in self._storage.undoLog(0, -size, is_before)
        ]

    def transactions(self, wish: Wish, cursor: bytes | None) -> Batch:
        """See Database.transactions."""
        for _try in range(_TRIES):
            try:
                return iterate_storage(self._storage, wish, cursor)
            except RuntimeError as error:
                # A MappingStorage walks through its BTree without its lock, and the
                # tree minds that somebody commits meanwhile.
                failed = error
        raise StorageError(f"the storage could not be iterated: {failed}")

    def current_records(
        self, first: bytes | None, before: bytes, bytes_max: int
    ) -> tuple[list[CurrentRecord], bytes | None]:
        """See Database.current_records."""
        return current_in_storage(self._storage, first, bytes_max)

    def committed(self, tid: bytes) -> bool | None:
        """A storage without a log of its own does not remember."""
        return None

    def catch_up(self) -> None:
        """See Database.catch_up: nobody commits but through us."""

    def standing(self) -> Standing:
        """See Database.standing."""
        last_tid = self._storage.lastTransaction() or Z64
        return Standing(last_tid, self.database_id, self.epoch)

    def outcome(
        self, transaction_id: bytes, tid: bytes | None, position: bytes
    ) -> tuple[str, bytes | None]:
        """See Database.outcome: the server knows our own commits better."""
        return "unknown", None

    def new_oids(self, count: int) -> list[bytes]:
        """See Database.new_oids."""
        return [self._storage.new_oid() for _ in range(count)]

    def info(self) -> tuple[int, int]:
        """See Database.info."""
        return int(self._storage.getSize()), len(self._storage)

    def save_index(self) -> bool:
        """Other storages have none, or see to it themselves."""
        return False

    def pack(
        self, time_s: float, gc: bool | None = None, packing: Packing | None = None
    ) -> Packed:
        """See Database.pack; the references are read without importing anything.

        Nobody can say how far the storage is, nor stop it.
        """
        if self.is_read_only:
            raise ReadOnlyError("a read-only storage is not packed")
        size = int(self._storage.getSize())
        if packing is not None:
            packing.phase, packing.bytes_total = "packing", size
            packing.is_cancellable = False
        options = {} if gc is None else {"gc": gc}
        try:
            self._storage.pack(time_s, referencesf, **options)
        except TypeError as error:
            if gc is None:
                raise
            raise Unsupported(
                f"this storage cannot be told whether to collect garbage: {error}"
            ) from error
        return Packed(True, size, int(self._storage.getSize()))

    def stop_waiting(self) -> None:
        """See Database.stop_waiting: disks are waited for."""

    def close(self) -> None:
        """See Database.close."""
        self.abort()
        self.uploads.close()
        self._storage.close()

    # writer

    def raise_tid_floor(self, tid: bytes) -> None:
        """See Database.raise_tid_floor."""
        self.tid_floor = max(self.tid_floor, tid)

    def append(self, group: Sequence[Prepared]) -> list[Finished | Exception]:
        """See Database.append."""
        raise NotImplementedError("every transaction is alone here")

    def vote(self, transaction: Transaction) -> Voted | Unresolved:
        """See Database.vote."""
        assert self._committing is None, "a vote between vote and finish"
        if self.is_read_only:
            raise ReadOnlyError("the storage is read-only")
        committing = self._committing_of(transaction)
        self._committing = committing

        def begin_and_vote() -> Voted | Unresolved:
            committing.begin(self._assigns_tid)
            if committing.tid is not None and transaction.tid is None:
                # Told to the client as the name of this transaction: not used again.
                self.tid_floor = committing.tid
            return committing.vote({})

        return self._or_abort(begin_and_vote)

    def _committing_of(self, transaction: Transaction) -> Committing:
        return Committing(self._storage, transaction, self.tid_floor, self._form)

    def resolve(self, resolutions: dict[bytes, bytes]) -> Voted | Unresolved:
        """See Database.resolve."""
        committing = self._committing
        assert committing is not None, "a resolution without a vote"
        return self._or_abort(lambda: committing.vote(resolutions))

    def _or_abort(self, step: Callable[[], Voted | Unresolved]) -> Voted | Unresolved:
        try:
            return step()
        except BaseException:
            self.abort()
            raise

    def finish(self) -> Finished:
        """See Database.finish."""
        committing = self._committing
        assert committing is not None, "finish without a vote"
        self._committing = None
        return committing.finish()

    def abort(self) -> None:
        """See Database.abort."""
        committing, self._committing = self._committing, None
        if committing is not None:
            committing.abort()


def _undoes(storage: Any) -> bool:
    return ZODB.interfaces.IStorageUndoable.providedBy(storage)


def _log_entry(tid: bytes, entry: dict[str, Any]) -> LogEntry:
    # What commit.Metadata gave a MappingStorage to keep, or what _opaque made.
    extension = entry.get("extension", entry).get("bytes")
    if not isinstance(extension, bytes):
        # Of a storage that unpickles extensions itself and for other reasons.
        rest = {key: entry[key] for key in entry.keys() - _ENTRY_KEYS}
        extension = pickle.dumps(rest, 3) if rest else b""
    return LogEntry(
        tid,
        _bytes(entry["user_name"]),
        _bytes(entry["description"]),
        extension,
        int(entry.get("size", 0)),
    )


def _bytes(text: bytes | str) -> bytes:
    return text.encode() if isinstance(text, str) else text
