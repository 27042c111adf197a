"""Transactions of one storage, committed to another with their ids and metadata.

Called by whoever copies, in its thread; both storages are ZODB's, whatever they are.
Each transaction is committed by itself, so a copy that is broken off can go on after
the last transaction of its destination.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable
from typing import Any

from ZODB.blob import is_blob_record
from ZODB.Connection import TransactionMetaData
from ZODB.interfaces import (
    IBlobStorage,
    IBlobStorageRestoreable,
    IStorageRestoreable,
)
from ZODB.POSException import POSKeyError
from ZODB.utils import z64


def copy_transactions(source: Any, destination: Any) -> None:
    """Commit every transaction of ``source`` to ``destination``.

    Raises what either raises; a transaction that fails is aborted, those before it
    stay.
    """
    copy = Copy(source, destination)
    transactions = source.iterator()
    try:
        for transaction in transactions:
            copy.commit(transaction)
    finally:
        # FileStorage's holds a file; some have nothing to close.
        getattr(transactions, "close", lambda: None)()


class Copy:
    """Commits transactions of ``source`` to ``destination``, one after the other."""

    def __init__(self, source: Any, destination: Any):
        self._destination = destination
        self._restores = IStorageRestoreable.providedBy(destination)
        self._blobs = None
        if IBlobStorage.providedBy(source) and IBlobStorageRestoreable.providedBy(
            destination
        ):
            self._blobs = source
        # For a destination that can only store: the tid of each object's revision.
        self._tids: dict[bytes, bytes] = {}

    def commit(self, transaction: Any) -> None:
        """Commit ``transaction`` (IStorageTransactionInformation) with its records."""
        destination = self._destination
        metadata = transaction
        if not hasattr(transaction, "extension_bytes"):
            # A MappingStorage's transaction, which no other storage would take.
            metadata = TransactionMetaData(
                transaction.user, transaction.description, transaction.extension
            )
        # A MappingStorage knows no status.
        status = [transaction.status] if self._restores else []
        destination.tpc_begin(metadata, transaction.tid, *status)
        try:
            self._write(metadata, transaction)
            destination.tpc_vote(metadata)
            destination.tpc_finish(metadata)
        except BaseException:
            # Of a commit whose end is unknown there is nothing to abort any more.
            destination.tpc_abort(metadata)
            raise

    def _write(self, metadata: Any, records: Iterable[Any]) -> None:
        for record in records:
            blob_path = self._copied_blob(record)
            if blob_path is not None:
                self._destination.restoreBlob(
                    record.oid,
                    record.tid,
                    record.data,
                    blob_path,
                    record.data_txn,
                    metadata,
                )
            elif self._restores:
                self._destination.restore(
                    record.oid,
                    record.tid,
                    record.data,
                    "",
                    record.data_txn,
                    metadata,
                )
            elif record.data is not None:
                serial = self._tids.get(record.oid, z64)
                self._destination.store(record.oid, serial, record.data, "", metadata)
                self._tids[record.oid] = record.tid

    def _copied_blob(self, record: Any) -> str | None:
        """A copy of the blob's file, for the destination to take; None without one."""
        if self._blobs is None or record.data is None:
            return None
        if not is_blob_record(record.data):
            return None
        try:
            blob = self._blobs.openCommittedBlobFile(record.oid, record.tid)
        except POSKeyError:
            # Packed away, or the source never had it.
            return None
        with blob:
            handle, path = tempfile.mkstemp(
                prefix="copy", dir=self._destination.temporaryDirectory()
            )
            with os.fdopen(handle, "wb") as copied:
                shutil.copyfileobj(blob, copied, 1024 * 1024)
        return path
