"""The steps of one transaction on a ZODB storage: validate, resolve, store, finish.

A Committing belongs to the writer thread of its database. It takes the storage's
commit lock at the beginning of the vote, so what it validates stays true until
finish or abort; everything is validated before anything is stored.
"""

import time
from base64 import encodebytes
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ZODB.Connection import TransactionMetaData
from ZODB.interfaces import (
    IBlobStorageRestoreable,
    IStorageRestoreable,
    IStorageUndoable,
)
from ZODB.POSException import (
    ConflictError,
    POSKeyError,
    ReadConflictError,
    StorageTransactionError,
    Unsupported,
)

from zeolith.storage import blobs, conflicts
from zeolith.storage.database import (
    BrokenDatabase,
    Conflict,
    Finished,
    Transaction,
    Unresolved,
    Voted,
)
from zeolith.storage.tids import Z64, next_tid, tid_at

# Committed, and packed. FileStorage writes the status as it is where it marks a
# transaction as whole: any other text takes it, or the whole file, away again.
_STATUSES = (" ", "p")

# A copied transaction keeps its tid; clocks differ, but not by more than this.
FUTURE_MAX_S = 24 * 3600
OID_MAX = b"\x7f" + b"\xff" * 7

# Operations that write a record; the first of them, only if nobody else has.
_VALIDATED = {"store", "store_blob", "store_shared_blob"}
_STORES = _VALIDATED | {"restore_blob"}


class Metadata(TransactionMetaData):
    """Transaction metadata whose extension is never unpickled here.

    MappingStorage keeps the ``extension``; it gets the bytes as they are.
    """

    def __init__(self, transaction: Transaction):
        super().__init__(transaction.user, transaction.description, b"")
        self.extension_bytes = transaction.extension
        self.extension = {"bytes": transaction.extension}


class Committing:
    """One transaction on ``storage``, from vote to finish or abort."""

    def __init__(self, storage: Any, transaction: Transaction, tid_floor: bytes):
        """``tid_floor``: a new transaction's tid is greater than this."""
        self._storage = storage
        self._transaction = transaction
        self._tid_floor = tid_floor
        self._metadata = Metadata(transaction)
        self._undone: set[bytes] = set()
        # What was resolved, by the server or the client: oid -> record.
        self._resolutions: dict[bytes, bytes] = {}
        self._begun = False
        # Of the blobs that were stored.
        self._marks: list[Path] = []
        # Known from begin on for a FileStorage; see Voted.tid.
        self.tid: bytes | None = None

    def begin(self, assigns_tid: bool) -> None:
        """Take the storage's commit lock; with a tid of our own if it takes one."""
        transaction = self._transaction
        tid = transaction.tid
        last_tid = self._storage.lastTransaction() or Z64
        self._refuse_extremes(last_tid)
        if tid is None and assigns_tid:
            tid = next_tid(time.time(), max(last_tid, self._tid_floor))
        arguments: list[Any] = [] if tid is None else [tid]
        if transaction.status not in _STATUSES:
            raise StorageTransactionError(
                f"no transaction is stored with status {transaction.status[:20]!r}"
            )
        if transaction.status != " " and IStorageRestoreable.providedBy(self._storage):
            arguments = [tid, transaction.status]
        # A storage may take its lock and then find fault with the metadata.
        self._begun = True
        self._storage.tpc_begin(self._metadata, *arguments)
        self.tid = tid

    def _refuse_extremes(self, last_tid: bytes) -> None:
        """Ids that would leave too few for those who come after."""
        tid = self._transaction.tid
        if tid is not None:
            if tid <= last_tid:
                raise StorageTransactionError(
                    f"transaction id {tid.hex()} is not after the last one,"
                    f" {last_tid.hex()}"
                )
            latest = max(tid_at(time.time() + FUTURE_MAX_S), last_tid)
            if tid > latest:
                raise StorageTransactionError(
                    f"transaction id {tid.hex()} is too far in the future"
                )
        for operation in self._transaction.operations:
            if operation[0] in _STORES and operation[1] > OID_MAX:
                raise StorageTransactionError(
                    f"oid {operation[1].hex()} is beyond all that are given out"
                )

    def vote(self, resolutions: dict[bytes, bytes]) -> Voted | Unresolved:
        """Validate all, then store all and vote; or say what is unresolved."""
        self._resolutions.update(resolutions)
        operations = list(self._last_stores())
        unresolved = list(self._validate(operations))
        if unresolved:
            return Unresolved(unresolved)
        self._store(operations)
        answer = self._storage.tpc_vote(self._metadata)
        blobs.sync_stored(self._storage)
        # Storages of old answer (oid, serial) pairs; those of today oids or nothing.
        self._undone.update(oid for oid in answer or () if isinstance(oid, bytes))
        return Voted(self.tid, [*self._resolutions, *self._undone])

    def finish(self) -> Finished:
        """Commit. After this call the transaction is durable or all is lost."""
        told: list[bytes] = []
        try:
            tid = self._storage.tpc_finish(self._metadata, told.append)
        except Exception as error:
            raise BrokenDatabase(
                f"the storage failed while finishing a transaction: {error!r}; whether"
                " it was committed is known after a restart"
            ) from error
        self._begun = False
        blobs.unmark(self._marks)
        oids = dict.fromkeys(
            operation[1]
            for operation in self._transaction.operations
            if operation[0] in _STORES
        )
        oids.update(dict.fromkeys(self._undone))
        return Finished(tid if isinstance(tid, bytes) else told[0], list(oids))

    def abort(self) -> None:
        """Undo whatever was begun."""
        if self._begun:
            self._begun = False
            self._storage.tpc_abort(self._metadata)
            blobs.unmark(self._marks)

    def _last_stores(self) -> Iterable[list[Any]]:
        """The operations, of several stores of one oid only the last one."""
        operations = self._transaction.operations
        last = {
            operation[1]: index
            for index, operation in enumerate(operations)
            if operation[0] in _STORES
        }
        return (
            operation
            for index, operation in enumerate(operations)
            if operation[0] not in _STORES or last[operation[1]] == index
        )

    def _validate(self, operations: list[list[Any]]) -> Iterable[Conflict]:
        for operation in operations:
            if operation[0] not in _VALIDATED and operation[0] != "check":
                continue
            oid, serial = operation[1], operation[2]
            committed_tid = self._current_tid(oid)
            if operation[0] == "check":
                self._check_read(oid, serial, committed_tid)
            elif committed_tid is not None and serial != committed_tid:
                if serial == Z64 and operation[0] != "store":
                    # All blobs have the same record; their files differ.
                    raise ConflictError(oid=oid, serials=(committed_tid, serial))
                conflict = self._resolve(oid, serial, committed_tid, operation[3])
                if conflict is not None:
                    yield conflict

    def _current_tid(self, oid: bytes) -> bytes | None:
        try:
            tid: bytes = self._storage.getTid(oid)
        except POSKeyError:
            return None
        return tid

    def _check_read(self, oid: bytes, serial: bytes, current: bytes | None) -> None:
        if current is None:
            raise POSKeyError(oid)
        if current != serial:
            raise ReadConflictError(oid=oid, serials=(current, serial))

    def _resolve(
        self, oid: bytes, old_tid: bytes, committed_tid: bytes, new: bytes
    ) -> Conflict | None:
        if oid in self._resolutions:
            return None
        if old_tid == Z64:
            # Two clients made an object of the same oid: there is no common state. If
            # they made the same thing of it, as two that open an empty database do
            # with its root, there is no conflict either.
            if self._storage.loadSerial(oid, committed_tid) != new:
                raise ConflictError(oid=oid, serials=(committed_tid, old_tid))
            self._resolutions[oid] = new
            return None
        try:
            old = self._storage.loadSerial(oid, old_tid)
            committed = self._storage.loadSerial(oid, committed_tid)
        except (POSKeyError, Unsupported):
            # Packed away, or never stored under this serial.
            raise ConflictError(oid=oid, serials=(committed_tid, old_tid)) from None
        try:
            self._resolutions[oid] = conflicts.resolve(new, old, committed)
        except conflicts.Unresolvable:
            return Conflict(oid, committed_tid, old_tid, committed, old, new)
        return None

    def _store(self, operations: list[list[Any]]) -> None:
        actions: dict[str, Callable[..., None]] = {
            "store": self._store_record,
            "check": lambda *_validated: None,
            "undo": self._undo,
            "store_blob": self._store_blob,
            "store_shared_blob": self._store_blob,
            "restore_blob": self._restore_blob,
        }
        for name, *arguments in operations:
            actions[name](*arguments)

    def _store_record(self, oid: bytes, serial: bytes, data: bytes) -> None:
        serial, data = self._as_resolved(oid, serial, data)
        self._storage.store(oid, serial, data, "", self._metadata)

    def _as_resolved(
        self, oid: bytes, serial: bytes, data: bytes
    ) -> tuple[bytes, bytes]:
        if oid in self._resolutions:
            data = self._resolutions[oid]
            serial = self._current_tid(oid) or serial
        if not data:
            # In a Data.fs length 0 means that the data are elsewhere: the file would
            # end here at the next opening without an index.
            raise StorageTransactionError(f"the record of oid {oid.hex()} is empty")
        return serial, data

    def _store_blob(
        self, oid: bytes, serial: bytes, data: bytes, name: int | str
    ) -> None:
        path = self._blob_file(name)
        serial, data = self._as_resolved(oid, serial, data)
        self._mark(oid, path)
        self._storage.storeBlob(oid, serial, data, path, "", self._metadata)

    def _restore_blob(
        self, oid: bytes, serial: bytes, data: bytes, previous: bytes | None, name: int
    ) -> None:
        if not IBlobStorageRestoreable.providedBy(self._storage):
            raise Unsupported("this storage cannot restore blobs")
        if serial != self.tid:
            # The file would be that of another transaction's blob.
            raise StorageTransactionError(
                f"a blob of transaction {serial.hex()} in another one"
            )
        _serial, data = self._as_resolved(oid, serial, data)
        if previous is not None and not self._is_record(oid, previous, data):
            # It is a hint: packed away here, or another record.
            previous = None
        path = self._blob_file(name)
        self._mark(oid, path)
        self._storage.restoreBlob(oid, serial, data, path, previous, self._metadata)

    def _is_record(self, oid: bytes, tid: bytes, data: bytes) -> bool:
        try:
            return bool(self._storage.loadSerial(oid, tid) == data)
        except POSKeyError:
            return False

    def _mark(self, oid: bytes, path: str) -> None:
        """Leave a mark of a blob's file, for the case that nobody comes to the end."""
        if self.tid is not None:
            self._marks.append(blobs.mark(path, oid, self.tid))

    def _blob_file(self, name: int | str) -> str:
        """The file of a blob, which the storage will take away."""
        if not blobs.has_blobs(self._storage):
            raise Unsupported("this storage has no blobs")
        path = self._transaction.blobs.pop(name, None)
        if path is None:
            raise StorageTransactionError(
                f"there is no blob {name!r:.100} to be stored"
            )
        return str(path)

    def _undo(self, tid: bytes) -> None:
        if not IStorageUndoable.providedBy(self._storage):
            raise Unsupported("this storage cannot undo")
        result = self._storage.undo(encodebytes(tid).rstrip(), self._metadata)
        if result:
            self._undone.update(result[1])
