"""Copying between any two storages, in this process."""

from pathlib import Path
from typing import Any

import pytest
from transaction import TransactionManager
from ZODB.blob import Blob, BlobStorage
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import POSKeyError

from zeolith.client.copying import copy_transactions


@pytest.fixture
def source(tmp_path: Path) -> Any:
    storage = FileStorage(str(tmp_path / "Source.fs"), blob_dir=str(tmp_path / "blobs"))
    yield storage
    storage.close()


@pytest.fixture
def destination(tmp_path: Path) -> Any:
    storage = FileStorage(str(tmp_path / "Copy.fs"), blob_dir=str(tmp_path / "copied"))
    yield storage
    storage.close()


def fill(storage: Any) -> None:
    """Some transactions: two revisions, an undo, a blob."""
    db = DB(storage)
    with db.transaction("first") as connection:
        connection.root()["n"] = 1
    with db.transaction("second") as connection:
        connection.root()["n"] = 2
    with db.transaction("a blob") as connection:
        connection.root()["blob"] = Blob(b"file")
    undoing = TransactionManager()
    db.undo(db.undoLog(0, 1)[0]["id"], undoing.get())
    undoing.commit()
    with db.transaction("another blob") as connection:
        connection.root()["blob"] = Blob(b"another file")


def transactions_of(storage: Any) -> list[Any]:
    return [
        (
            each.tid,
            each.status,
            each.user,
            each.description,
            each.extension_bytes,
            [(r.oid, r.tid, r.data, r.data_txn) for r in each],
        )
        for each in storage.iterator()
    ]


def test_everything_is_as_it_was(source, destination):
    fill(source)
    copy_transactions(source, destination)
    assert transactions_of(destination) == transactions_of(source)
    for transaction in source.iterator():
        for record in transaction:
            try:
                path = source.loadBlob(record.oid, record.tid)
            except POSKeyError:
                continue
            copied = destination.loadBlob(record.oid, record.tid)
            assert Path(copied).read_bytes() == Path(path).read_bytes()
    assert not list(Path(destination.temporaryDirectory()).glob("copy*"))


def test_a_destination_that_cannot_restore_is_stored_to(source):
    fill(source)
    destination = MappingStorage()
    copy_transactions(source, destination)
    tids = [each[0] for each in transactions_of(source)]
    assert [each.tid for each in destination.iterator()] == tids
    assert destination.load(b"\0" * 8) == source.load(b"\0" * 8)


def test_a_source_that_keeps_no_bytes_of_extensions_is_copied(destination):
    source = MappingStorage()
    metadata = TransactionMetaData("user", "description", {"key": 1})
    source.tpc_begin(metadata)
    source.store(b"\0" * 8, b"\0" * 8, b"data", "", metadata)
    source.tpc_vote(metadata)
    source.tpc_finish(metadata)
    copy_transactions(source, destination)
    (copied,) = destination.iterator()
    assert (copied.user, copied.extension) == (b"user", {"key": 1})


def test_a_blob_whose_file_is_gone_is_copied_without_it(source, destination):
    fill(source)
    (first, *_others) = sorted(
        path for path in Path(source.fshelper.base_dir).rglob("*.blob")
    )
    first.unlink()
    copy_transactions(source, destination)
    assert transactions_of(destination) == transactions_of(source)


def test_a_destination_without_blobs_gets_the_records(tmp_path, source):
    fill(source)
    destination = FileStorage(str(tmp_path / "Without.fs"))
    copy_transactions(source, destination)
    assert transactions_of(destination) == transactions_of(source)
    destination.close()


def test_what_fails_is_aborted_and_what_was_before_stays(source, destination):
    fill(source)
    restore, calls = destination.restore, []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise OSError("full")
        return restore(*args)

    destination.restore = failing
    with pytest.raises(OSError, match="full"):
        copy_transactions(source, destination)
    assert transactions_of(destination) == transactions_of(source)[:2]
    assert destination.tpc_transaction() is None


def test_a_blob_storage_around_another_is_copied_to(tmp_path, source):
    fill(source)
    wrapped = FileStorage(str(tmp_path / "Wrapped.fs"))
    destination = BlobStorage(str(tmp_path / "wrapped"), wrapped)
    copy_transactions(source, destination)
    assert transactions_of(destination) == transactions_of(source)
    destination.close()
