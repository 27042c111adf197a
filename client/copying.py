"""Copying transactions, one after the other, with everything that belongs to them.

A copy keeps tid, status and metadata of each transaction, and of each record what it
is: data, a pointer to earlier data, or the undoing of a creation. It works between any
two storages of ZODB, not only ours. Used by the thread that copies.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ZODB.Connection import TransactionMetaData
from ZODB.interfaces import (
    IBlobStorage,
    IBlobStorageRestoreable,
    IStorageRestoreable,
)
from ZODB.POSException import POSKeyError, Unsupported

from zeolith.client.blob_directory import discard
from zeolith.client.record_class import is_blob_record

Transactions = Iterable[Any]

# No pickle begins so, but what wrappers like zc.zlibstorage make of one does.
_WRAPPED = b"."


def _metadata_of(transaction: Any) -> TransactionMetaData:
    """Of a copied transaction; the extension is passed on as it is, if it is bytes."""
    extension = getattr(transaction, "extension_bytes", None)
    if not isinstance(extension, bytes):
        extension = dict(transaction.extension)
    return TransactionMetaData(transaction.user, transaction.description, extension)


@contextmanager
def transactions_of(storage: Any, *bounds: bytes | None) -> Iterator[Any]:
    """``storage.iterator(*bounds)``, closed at the end if it can be."""
    transactions = storage.iterator(*bounds)
    try:
        yield transactions
    finally:
        close = getattr(transactions, "close", None)
        if close is not None:
            close()


def is_wrapped(record: Any) -> bool:
    """Whether a wrapper has changed the record, so that nobody can look into it."""
    return bool(record.data) and record.data[:1] == _WRAPPED


def blob_of(storage: Any, record: Any) -> str | None:
    """The path of the record's blob in ``storage``; None if it has none.

    Raises POSKeyError if it should have one. Of a record that nobody can look into,
    what files there are is all that can be asked.
    """
    if is_blob_record(record.data):
        path: str = storage.loadBlob(record.oid, record.tid)
        return path
    if is_wrapped(record):
        with suppress(POSKeyError):
            path = storage.loadBlob(record.oid, record.tid)
            return path
    return None


def copy_transactions(
    transactions: Transactions,
    source: Any,
    destination: Any,
    on_copied: Callable[[Any], None] = lambda _transaction: None,
    on_record: Callable[[Any], None] = lambda _record: None,
    on_missing_blob: Callable[[Any], None] = lambda _record: None,
    *,
    with_blobs: bool = True,
) -> None:
    """Append ``transactions``, which are those of ``source``, to ``destination``.

    ``on_copied`` is called with each transaction when it is committed, ``on_record``
    with each record before it is written. An error, also theirs, leaves the destination
    as it was after the last transaction that was committed. Blobs are copied
    ``with_blobs`` if both storages can; ``source`` may be whatever gives transactions
    and has none. ``on_missing_blob`` is called with a record whose blob the source has
    not got, and which is copied without it then. Raises what the storages raise.
    """
    copier = _Copier(source, destination, on_record, on_missing_blob, with_blobs)
    for transaction in transactions:
        copier.copy(transaction)
        on_copied(transaction)


class _Copier:
    """Copies transactions from one storage to another."""

    def __init__(
        self,
        source: Any,
        destination: Any,
        on_record: Callable[[Any], None],
        on_missing_blob: Callable[[Any], None],
        with_blobs: bool,
    ):
        self._on_record = on_record
        self._on_missing_blob = on_missing_blob
        self._source = source
        self._destination = destination
        self._restores = IStorageRestoreable.providedBy(destination)
        self._copies_blobs = (
            with_blobs
            and IBlobStorage.providedBy(source)
            and IBlobStorageRestoreable.providedBy(destination)
        )
        # For a destination that only stores: what it must be told the record replaces.
        self._tids: dict[bytes, bytes] = {}

    def copy(self, transaction: Any) -> None:
        """Copy one transaction."""
        destination = self._destination
        metadata = _metadata_of(transaction)
        # A MappingStorage knows no status.
        status = [transaction.status] if self._restores else []
        destination.tpc_begin(metadata, transaction.tid, *status)
        try:
            for record in transaction:
                self._on_record(record)
                self._copy_record(record, metadata)
            destination.tpc_vote(metadata)
        except BaseException:
            destination.tpc_abort(metadata)
            raise
        destination.tpc_finish(metadata)

    def _copy_record(self, record: Any, metadata: Any) -> None:
        if self._copies_blobs:
            blob = self._copy_of_blob(record)
            if blob is not None:
                self._restore_blob(record, blob, metadata)
                return
        if self._restores:
            self._destination.restore(
                record.oid, record.tid, record.data, "", record.data_txn, metadata
            )
        else:
            self._store(record, metadata)

    def _store(self, record: Any, metadata: Any) -> None:
        if record.data is None:
            raise Unsupported(
                f"transaction {record.tid.hex()} undoes the creation of object"
                f" {record.oid.hex()}, which the destination cannot keep"
            )
        before = self._tids.get(record.oid)
        self._destination.store(record.oid, before, record.data, "", metadata)
        self._tids[record.oid] = record.tid

    def _restore_blob(self, record: Any, path: str, metadata: Any) -> None:
        try:
            self._destination.restoreBlob(
                record.oid, record.tid, record.data, path, record.data_txn, metadata
            )
        except BaseException:
            # It may have been taken away before.
            discard(path)
            raise

    def _copy_of_blob(self, record: Any) -> str | None:
        """A copy of the record's blob that the destination may take away."""
        try:
            committed = blob_of(self._source, record)
        except POSKeyError:
            self._on_missing_blob(record)
            return None
        if committed is None:
            return None
        descriptor, path = tempfile.mkstemp(
            ".tmp", "copy", self._destination.temporaryDirectory()
        )
        try:
            with os.fdopen(descriptor, "wb") as copy, open(committed, "rb") as blob:
                shutil.copyfileobj(blob, copy, 1024 * 1024)
        except BaseException:
            # No room, most likely, and least of all for this.
            discard(path)
            raise
        return path
