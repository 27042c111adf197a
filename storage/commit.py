"""The steps of one transaction on a ZODB storage: validate, resolve, store, finish.

A Committing belongs to the writer thread of its database. It takes the storage's
commit lock at the beginning of the vote, so what it validates stays true until
finish or abort; everything is validated before anything is stored.
"""

import time
from base64 import encodebytes
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ZODB.Connection import TransactionMetaData
from ZODB.interfaces import (
    IBlobStorageRestoreable,
    IExternalGC,
    IStorageRestoreable,
    IStorageUndoable,
)
from ZODB.POSException import (
    POSKeyError,
    StorageTransactionError,
    UndoError,
    Unsupported,
)

from zeolith.storage import blobs
from zeolith.storage.database import (
    BrokenDatabase,
    Conflict,
    Finished,
    Transaction,
    Unresolved,
    Voted,
)
from zeolith.storage.tids import Z64, next_tid, tid_at
from zeolith.storage.undoing import UNDO_ROUNDS_MAX, UndoConflicts
from zeolith.storage.validation import (
    RESTORES,
    Validation,
    refuse_empty,
)
from zeolith.storage.wrapping import PLAIN, Form, bottom

# Committed, and packed. FileStorage writes the status as it is where it marks a
# transaction as whole: any other text takes it, or the whole file, away again.
_STATUSES = (" ", "p")

# A copied transaction keeps its tid; clocks differ, but not by more than this.
FUTURE_MAX_S = 24 * 3600


class Metadata(TransactionMetaData):
    """Transaction metadata whose extension is never unpickled here.

    MappingStorage keeps the ``extension``; it gets the bytes as they are.
    """

    def __init__(self, transaction: Transaction):
        super().__init__(transaction.user, transaction.description, b"")
        self.extension_bytes = transaction.extension
        self.extension = {"bytes": transaction.extension}
        # A storage that passes the transaction on may want to use the same.
        self.transaction_id = transaction.id


class _Of(NamedTuple):
    """A storage as the validation reads it."""

    storage: Any

    def get_tid(self, oid: bytes) -> bytes | None:
        with suppress(POSKeyError):
            tid: bytes = self.storage.getTid(oid)
            return tid
        return None

    def current_tids(self, oids: list[bytes]) -> dict[bytes, bytes]:
        found = ((oid, self.get_tid(oid)) for oid in oids)
        return {oid: tid for oid, tid in found if tid is not None}

    def load_serial(self, oid: bytes, tid: bytes) -> bytes:
        data: bytes = self.storage.loadSerial(oid, tid)
        return data


class _Asks(Exception):
    """An undo that needs the client to merge what it changes."""


class Committing:
    """One transaction on ``storage``, from vote to finish or abort."""

    def __init__(
        self,
        storage: Any,
        transaction: Transaction,
        tid_floor: bytes,
        form: Form = PLAIN,
    ):
        """``tid_floor``: a new transaction's tid is greater than this.

        ``form`` is that of the records.
        """
        self._storage = storage
        self._transaction = transaction
        self._tid_floor = tid_floor
        self._metadata = Metadata(transaction)
        self._form = form
        self._undone: set[bytes] = set()
        self._validation = Validation(transaction, form)
        self._undo_conflicts = UndoConflicts()
        self._undo_rounds = 0
        self._begin_arguments: list[Any] = []
        self._begun = False
        # Of the blobs that were stored; and, by what names it, where a file was before.
        self._marks: list[Path] = []
        self._taken: dict[int | str, tuple[Path, Path]] = {}
        # Known from begin on for a FileStorage; see Voted.tid.
        self.tid: bytes | None = None
        # As its client calls it.
        self.transaction_id = transaction.id

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
        self._begin_arguments = arguments
        self._begin_storage()
        self.tid = tid

    def _begin_storage(self) -> None:
        # A storage may take its lock and then find fault with the metadata.
        self._begun = True
        self._storage.tpc_begin(self._metadata, *self._begin_arguments)
        file = bottom(self._storage)
        if hasattr(file, "undo_conflicts"):
            file.undo_conflicts = self._undo_conflicts

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
        self._validation.refuse_extremes()

    def vote(self, resolutions: dict[bytes, bytes]) -> Voted | Unresolved:
        """Validate all, then store all and vote; or say what is unresolved."""
        self._take(resolutions)
        validation = self._validation
        self._refuse_restores()
        unresolved = validation.conflicts(validation.last_stores(), _Of(self._storage))
        if unresolved:
            return self._ask(unresolved)
        try:
            self._store(validation.last_stores())
        except _Asks:
            # What is stored is half of it. Nobody else can commit in between: this is
            # the writer thread.
            self._count_round()
            self._take_back_blobs()
            self.abort()
            self._undone.clear()
            self._begin_storage()
            return self._ask(self._undo_conflicts.unresolved)
        answer = self._storage.tpc_vote(self._metadata)
        blobs.sync_stored(self._storage)
        # Storages of old answer (oid, serial) pairs; those of today oids or nothing.
        self._undone.update(oid for oid in answer or () if isinstance(oid, bytes))
        return Voted(self.tid, [*validation.resolutions, *self._undone])

    def _count_round(self) -> None:
        self._undo_rounds += 1
        if self._undo_rounds > UNDO_ROUNDS_MAX:
            raise UndoError(
                f"what was changed since takes more than {UNDO_ROUNDS_MAX} rounds to"
                " merge (UNDO_ROUNDS_MAX); undo fewer transactions at a time"
            )

    def _ask(self, unresolved: list[Conflict]) -> Unresolved:
        self._validation.ask(unresolved)
        return Unresolved(unresolved)

    def _take(self, resolutions: dict[bytes, bytes]) -> None:
        """What the client has resolved, of stores and of undos."""
        undos = self._undo_conflicts.asked()
        self._validation.take(resolutions, apart=undos)
        self._undo_conflicts.answer(resolutions)

    def _refuse_restores(self) -> None:
        if IStorageRestoreable.providedBy(self._storage):
            return
        if any(each[0] in RESTORES for each in self._transaction.operations):
            raise Unsupported("this storage cannot restore records; store them")

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
        return Finished(tid if isinstance(tid, bytes) else told[0], self._changed())

    def _changed(self) -> list[bytes]:
        """The oids that the transaction changes."""
        oids = dict.fromkeys(self._validation.written)
        oids.update(dict.fromkeys(self._undone))
        return list(oids)

    def abort(self) -> None:
        """Undo whatever was begun."""
        if self._begun:
            self._begun = False
            self._storage.tpc_abort(self._metadata)
            blobs.unmark(self._marks)

    def _store(self, operations: Iterable[list[Any]]) -> None:
        actions: dict[str, Callable[..., None]] = {
            "store": self._store_record,
            "check": self._check,
            "undo": self._undo,
            "restore": self._restore_record,
            "delete": self._delete,
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
        resolutions = self._validation.resolutions
        if oid in resolutions:
            data = resolutions[oid]
            serial = _Of(self._storage).get_tid(oid) or serial
        refuse_empty(oid, data)
        return serial, data

    def _store_blob(
        self, oid: bytes, serial: bytes, data: bytes, name: int | str
    ) -> None:
        path = self._blob_file(name)
        serial, data = self._as_resolved(oid, serial, data)
        self._mark(name, oid, path)
        self._storage.storeBlob(oid, serial, data, path, "", self._metadata)

    def _restore_blob(
        self, oid: bytes, serial: bytes, data: bytes, previous: bytes | None, name: int
    ) -> None:
        if not IBlobStorageRestoreable.providedBy(self._storage):
            raise Unsupported("this storage cannot restore blobs")
        refuse_empty(oid, data)
        previous = self._if_it_is(oid, previous, data)
        path = self._blob_file(name)
        self._mark(name, oid, path)
        self._storage.restoreBlob(oid, serial, data, path, previous, self._metadata)

    def _if_it_is(
        self, oid: bytes, tid: bytes | None, data: bytes | None
    ) -> bytes | None:
        """``tid`` if that is where the data are, which is only a client's hint.

        They may be packed away here, or it is another record.
        """
        try:
            is_it = tid is not None and self._storage.loadSerial(oid, tid) == data
        except POSKeyError:
            is_it = False
        return tid if is_it else None

    def _mark(self, name: int | str, oid: bytes, path: str) -> None:
        """Leave a mark of a blob's file, for the case that nobody comes to the end."""
        if self.tid is not None:
            mark = blobs.mark(path, oid, self.tid)
            self._marks.append(mark)
            self._taken[name] = mark, Path(path)

    def _take_back_blobs(self) -> None:
        """Before an abort: let the files be there once more, to be stored again.

        Where there are no marks they are lost, and storing them again says so.
        """
        for name, (mark, path) in self._taken.items():
            with suppress(OSError):
                mark.rename(path)
                self._transaction.blobs[name] = path
        self._taken.clear()

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

    def _restore_record(
        self, oid: bytes, serial: bytes, data: bytes | None, data_tid: bytes | None
    ) -> None:
        if data is not None:
            refuse_empty(oid, data)
        data_tid = self._if_it_is(oid, data_tid, data)
        self._storage.restore(oid, serial, data, "", data_tid, self._metadata)

    def _delete(self, oid: bytes, serial: bytes) -> None:
        if not IExternalGC.providedBy(self._storage):
            raise Unsupported("this storage cannot delete objects")
        self._storage.deleteObject(oid, serial, self._metadata)

    def _check(self, oid: bytes, serial: bytes) -> None:
        """It is validated, and stays true: the storage's commit lock is ours."""

    def _undo(self, tid: bytes) -> None:
        if not IStorageUndoable.providedBy(self._storage):
            raise Unsupported("this storage cannot undo")
        try:
            result = self._storage.undo(encodebytes(tid).rstrip(), self._metadata)
        except UndoError:
            if not self._undo_conflicts.unresolved:
                raise
            raise _Asks from None
        # A record that was in the way of one may have been overtaken by another.
        self._undo_conflicts.forget_unresolved()
        if result:
            self._undone.update(result[1])
