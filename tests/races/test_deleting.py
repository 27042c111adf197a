"""Objects are removed and restored while others have them in their caches."""

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.interfaces import IExternalGC, IStorageRestoreable
from ZODB.POSException import ConflictError, POSKeyError, StorageTransactionError

from zeolith.client.tids import MAX_TID, following
from zeolith.storage.tids import advanced

from ..support.records import Listening, commit, oid_of, seen, wait_for_position

X, Y = oid_of("x"), oid_of("y")


def delete(storage, oid: bytes, serial: bytes, **stored: bytes) -> bytes:
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    for name, data in stored.items():
        storage.store(oid_of(name), None, data, "", transaction)
    storage.deleteObject(oid, serial, transaction)
    try:
        storage.tpc_vote(transaction)
        tid: bytes = storage.tpc_finish(transaction)
    except BaseException:
        storage.tpc_abort(transaction)
        raise
    return tid


def restore(storage, oid: bytes, data: bytes | None, data_tid: bytes | None = None):
    tid = advanced(storage.lastTransaction(), 1000)
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction, tid, " ")
    storage.restore(oid, tid, data, "", data_tid, transaction)
    storage.tpc_vote(transaction)
    assert storage.tpc_finish(transaction) == tid
    return tid


def test_a_file_can_be_deleted_from_and_restored_to(reader):
    assert IExternalGC.providedBy(reader)
    assert IStorageRestoreable.providedBy(reader)


def test_an_object_that_was_deleted_is_gone_for_everybody(reader, writer):
    """Whoever has it cached must hear of it as of any other change."""
    database = Listening()
    reader.registerDB(database)
    old = commit(writer, x=b"old")
    wait_for_position(reader, old)
    assert seen(reader, "x") == seen(writer, "x") == b"old"
    gone = delete(writer, X, old)
    wait_for_position(reader, gone)
    assert database.told[-1] == (gone, {X})
    for storage in (reader, writer):
        with pytest.raises(POSKeyError):
            storage.load(X)
        with pytest.raises(POSKeyError):
            storage.loadBefore(X, following(gone))
        assert storage.loadBefore(X, gone) == (b"old", old, gone)


def test_a_record_that_was_restored_is_there_for_everybody(reader, writer):
    database = Listening()
    reader.registerDB(database)
    old = commit(writer, x=b"old")
    wait_for_position(reader, old)
    assert seen(reader, "x") == seen(writer, "x") == b"old"
    new = restore(writer, X, b"restored")
    wait_for_position(reader, new)
    assert database.told[-1] == (new, {X})
    assert seen(reader, "x") == seen(writer, "x") == b"restored"
    gone = restore(writer, X, None)
    wait_for_position(reader, gone)
    for storage in (reader, writer):
        with pytest.raises(POSKeyError):
            storage.loadBefore(X, following(gone))


def test_a_record_is_restored_from_the_transaction_that_has_its_data(writer, reader):
    first = commit(writer, x=b"first")
    commit(writer, x=b"second")
    again = restore(writer, X, b"first", first)
    assert seen(writer, "x") == b"first"
    (transaction,) = writer.iterator(again, again)
    (record,) = transaction
    assert (record.data, record.data_txn) == (b"first", first)


def test_what_was_changed_since_is_not_deleted(reader, writer):
    old = commit(writer, x=b"old")
    new = commit(writer, x=b"new")
    with pytest.raises(ConflictError) as raised:
        delete(writer, X, old)
    assert raised.value.oid == X
    assert raised.value.serials == (new, old)
    assert seen(writer, "x") == b"new"


def test_what_is_not_there_is_not_deleted(writer):
    old = commit(writer, x=b"old")
    with pytest.raises(POSKeyError):
        delete(writer, Y, old)
    delete(writer, X, old)
    with pytest.raises(POSKeyError):
        delete(writer, X, old)


def test_what_was_stored_and_then_deleted_is_not_left_in_the_cache(writer):
    old = commit(writer, x=b"old")
    transaction = TransactionMetaData()
    writer.tpc_begin(transaction)
    writer.store(X, old, b"stored first", "", transaction)
    writer.deleteObject(X, old, transaction)
    writer.tpc_vote(transaction)
    writer.tpc_finish(transaction)
    with pytest.raises(POSKeyError):
        writer.loadBefore(X, MAX_TID)


def test_a_record_is_not_restored_under_another_tid_than_its_transactions(writer):
    """In the file it would be a revision that is older than what is before it."""
    old = commit(writer, x=b"old")
    transaction = TransactionMetaData()
    writer.tpc_begin(transaction)
    writer.restore(X, old, b"forged", "", None, transaction)
    with pytest.raises(StorageTransactionError, match="in another transaction"):
        writer.tpc_vote(transaction)
    assert seen(writer, "x") == b"old"
