"""Copying, restoring and deleting: every record arrives, and everybody is told."""

import pickle
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.interfaces import IExternalGC, IStorageRestoreable
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import (
    ConflictError,
    POSKeyError,
    StorageTransactionError,
    Unsupported,
)

from zeolith.client.copying import copy_transactions
from zeolith.client.storage import ClientStorage
from zeolith.protocol.limits import DEFAULT
from zeolith.storage.adapted import AdaptedStorage
from zeolith.storage.tids import Z64, following

from ..support.ids import number
from ..support.inprocess import InProcessServer, client_of, serving
from ..support.waiting import wait_until

A, B = number(1), number(2)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[InProcessServer]:
    limits = replace(DEFAULT, batch_bytes_max=2000)
    with serving(tmp_path / "Data.fs", limits=limits) as server:
        yield server


@pytest.fixture
def storage(server: InProcessServer) -> Iterator[ClientStorage]:
    with client_of(server) as storage:
        yield storage


class Steps:
    """A transaction of some steps, committed at the end of the with block."""

    def __init__(self, storage: Any, *begin: Any, extension: Any = None):
        self._storage = storage
        self.metadata = TransactionMetaData("user", "description", extension)
        storage.tpc_begin(self.metadata, *begin)
        self.tid = b""

    def __enter__(self) -> TransactionMetaData:
        return self.metadata

    def __exit__(self, kind: Any, *_rest: object) -> None:
        if kind is None:
            try:
                self._storage.tpc_vote(self.metadata)
            except BaseException:
                self._storage.tpc_abort(self.metadata)
                raise
            self.tid = self._storage.tpc_finish(self.metadata)
        else:
            self._storage.tpc_abort(self.metadata)


def commit(storage: Any, oid: bytes, data: bytes, serial: bytes = Z64) -> bytes:
    with (steps := Steps(storage)) as metadata:
        storage.store(oid, serial, data, "", metadata)
    return steps.tid


def everything(storage: Any) -> list[Any]:
    return [
        [
            (each.tid, each.status, each.user, each.description, each.extension),
            [(r.oid, r.tid, r.data, r.data_txn) for r in each],
        ]
        for each in storage.iterator()
    ]


def filled(path: Path) -> FileStorage:
    """With an undo, a removal, metadata, a packed status and a large transaction."""
    storage = FileStorage(str(path))
    first = commit(storage, A, b"one")
    second = commit(storage, A, b"two", first)
    with Steps(storage, extension={"key": "value"}) as metadata:
        storage.undo(storage.undoLog(0, 1)[0]["id"], metadata)
    assert storage.load(A)[0] == b"one"
    assert second
    commit(storage, B, b"data")
    with Steps(storage) as metadata:
        storage.deleteObject(B, storage.getTid(B), metadata)
    with Steps(storage, None, "p") as metadata:
        for oid in range(100, 200):
            storage.store(number(oid), Z64, b"x" * 100, "", metadata)
    return storage


def test_a_copy_to_the_server_is_the_same(tmp_path, storage):
    source = filled(tmp_path / "source.fs")
    storage.copyTransactionsFrom(source)
    assert everything(storage) == everything(source)
    assert storage.lastTransaction() == source.lastTransaction()
    assert storage.load(A)[0] == b"one"
    with pytest.raises(POSKeyError):
        storage.load(B)
    source.close()


def test_a_copy_from_the_server_is_the_same(tmp_path, storage):
    source = filled(tmp_path / "source.fs")
    storage.copyTransactionsFrom(source)
    copy = FileStorage(str(tmp_path / "copy.fs"))
    copy.copyTransactionsFrom(storage)
    assert everything(copy) == everything(source)
    source.close()
    copy.close()


def test_extensions_are_copied_bit_for_bit(tmp_path, storage):
    source = FileStorage(str(tmp_path / "source.fs"))
    with Steps(source, extension=pickle.dumps({"key": 1}, 0)) as metadata:
        source.store(A, Z64, b"data", "", metadata)
    storage.copyTransactionsFrom(source)
    [copied] = storage.iterator()
    assert copied.extension_bytes == pickle.dumps({"key": 1}, 0)
    source.close()


def test_a_copied_undo_takes_no_room_for_its_data(tmp_path, server, storage):
    source = filled(tmp_path / "source.fs")
    storage.copyTransactionsFrom(source)
    assert storage.getSize() == source.getSize()
    source.close()


def test_a_storage_that_only_stores_gets_tids_and_data(tmp_path):
    made = {"1": lambda: AdaptedStorage("1", MappingStorage(), b"d" * 16)}
    source = FileStorage(str(tmp_path / "source.fs"))
    tid = commit(source, A, b"one")
    commit(source, A, b"two", tid)
    with InProcessServer(made) as server, client_of(server) as storage:
        assert not IStorageRestoreable.providedBy(storage)
        assert not IExternalGC.providedBy(storage)
        storage.copyTransactionsFrom(source)
        assert everything(storage) == everything(source)
        with pytest.raises(Unsupported, match="cannot restore"), Steps(storage) as t:
            storage.restore(A, Z64, b"data", "", None, t)
        with pytest.raises(Unsupported, match="cannot delete"), Steps(storage) as t:
            storage.deleteObject(A, storage.getTid(A), t)
        with Steps(source) as metadata:
            source.deleteObject(A, source.getTid(A), metadata)
        last = source.iterator(source.lastTransaction())
        with pytest.raises(Unsupported, match="undoes the creation"), closing(last):
            copy_transactions(last, source, storage)
    source.close()


def test_an_error_leaves_what_was_committed_before(tmp_path, storage):
    source = filled(tmp_path / "source.fs")
    copied: list[bytes] = []

    def stop(record: Any) -> None:
        if len(copied) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), closing(source.iterator()) as transactions:
        copy_transactions(
            transactions,
            source,
            storage,
            lambda transaction: copied.append(transaction.tid),
            stop,
        )
    assert everything(storage) == everything(source)[:3]
    rest = source.iterator(following(copied[-1]))
    copy_transactions(rest, source, storage)
    assert everything(storage) == everything(source)
    source.close()


def test_a_record_is_restored_only_in_its_own_transaction(storage):
    tid = commit(storage, A, b"data")
    later = following(tid)
    with (
        pytest.raises(StorageTransactionError, match="in another transaction"),
        Steps(storage, later) as metadata,
    ):
        storage.restore(A, tid, b"other", "", None, metadata)


def test_a_wrong_hint_for_the_data_is_ignored(storage):
    tid = commit(storage, A, b"data")
    for hint in (tid, number(77)):
        later = following(storage.lastTransaction())
        with Steps(storage, later) as metadata:
            storage.restore(A, later, b"other data", "", hint, metadata)
        assert storage.loadSerial(A, later) == b"other data"


def seen(storage: ClientStorage, oid: bytes) -> bytes | None:
    try:
        return storage.load(oid)[0]
    except POSKeyError:
        return None


def test_a_deleted_object_is_in_nobodys_cache(server, storage):
    tid = commit(storage, A, b"data")
    with client_of(server) as other:
        assert seen(other, A) == seen(storage, A) == b"data"
        with (steps := Steps(storage)) as metadata:
            storage.deleteObject(A, tid, metadata)
        assert seen(storage, A) is None
        wait_until(lambda: other.lastTransaction() == steps.tid, "the change")
        assert seen(other, A) is None
        # What it was is still there for those who look at the past.
        assert other.loadBefore(A, steps.tid) == (b"data", tid, steps.tid)


def test_a_restored_object_is_in_nobodys_cache(server, storage):
    commit(storage, A, b"old")
    commit(storage, B, b"gone")
    with client_of(server) as other:
        for oid in (A, B):
            assert seen(other, oid) == seen(storage, oid)
        tid = following(storage.lastTransaction())
        with Steps(storage, tid) as metadata:
            storage.restore(A, tid, b"restored", "", None, metadata)
            storage.restore(B, tid, None, "", None, metadata)
        assert (seen(storage, A), seen(storage, B)) == (b"restored", None)
        wait_until(lambda: other.lastTransaction() == tid, "the change")
        assert (seen(other, A), seen(other, B)) == (b"restored", None)


def test_an_undone_object_is_in_nobodys_cache(server, storage):
    tid = commit(storage, A, b"old")
    commit(storage, A, b"new", tid)
    with client_of(server) as other:
        assert seen(other, A) == seen(storage, A) == b"new"
        with (steps := Steps(storage)) as metadata:
            storage.undo(storage.undoLog(0, 1)[0]["id"], metadata)
        assert seen(storage, A) == b"old"
        wait_until(lambda: other.lastTransaction() == steps.tid, "the change")
        assert seen(other, A) == b"old"


def test_an_object_stored_and_deleted_in_one_transaction_is_gone(storage):
    tid = commit(storage, A, b"data")
    with Steps(storage) as metadata:
        storage.store(A, tid, b"more", "", metadata)
        storage.deleteObject(A, tid, metadata)
    assert seen(storage, A) is None


def test_an_object_that_was_changed_is_not_deleted(storage):
    tid = commit(storage, A, b"data")
    commit(storage, A, b"more", tid)
    with pytest.raises(ConflictError), Steps(storage) as metadata:
        storage.deleteObject(A, tid, metadata)
    with pytest.raises(POSKeyError), Steps(storage) as metadata:
        storage.deleteObject(B, tid, metadata)
    assert seen(storage, A) == b"more"
