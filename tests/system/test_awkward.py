"""Transactions that are unlike others, over a server process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from ZODB.Connection import TransactionMetaData

from zeolith.client.storage import ClientStorage

from ..support.ids import number
from ..support.serving import ServerProcess

MANY = 5_000
A, B = number(1), number(2)


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[ClientStorage]:
    with ServerProcess(tmp_path) as server:
        storage = ClientStorage(server.address)
        yield storage
        storage.close()


def commit(storage: ClientStorage, *stores: tuple[bytes, bytes]) -> bytes:
    metadata = TransactionMetaData()
    storage.tpc_begin(metadata)
    for oid, data in stores:
        storage.store(oid, None, data, "", metadata)
    storage.tpc_vote(metadata)
    return storage.tpc_finish(metadata)


def test_an_empty_transaction_is_one(storage):
    tid = commit(storage)
    assert storage.lastTransaction() == tid
    assert len(storage) == 0
    assert commit(storage) > tid
    assert [each["size"] > 0 for each in storage.undoLog()] == [True, True]


def test_of_two_stores_of_an_object_the_last_one_counts(storage):
    tid = commit(storage, (A, b"first"), (B, b"between"), (A, b"last"))
    assert storage.load(A) == (b"last", tid)
    assert storage.load(B) == (b"between", tid)
    assert len(storage.history(A, 10)) == 1


def test_oids_may_come_in_any_order_and_from_anywhere(storage):
    oids = [number((value * 7919) % MANY + 2**40) for value in range(MANY)]
    tid = commit(storage, *((oid, oid * 500) for oid in oids))
    for oid in (min(oids), oids[0], oids[-1], max(oids)):
        assert storage.load(oid) == (oid * 500, tid)
    assert len(storage) == MANY
    assert storage.new_oid() > max(oids)


def test_a_record_of_64_megabytes_is_a_record(storage):
    data = b"0123456789abcdef" * (4 * 1024 * 1024)
    tid = commit(storage, (A, data))
    storage.cache.forget(A)
    assert storage.load(A) == (data, tid)
