"""Transactions at the level of a storage, where a record is just bytes."""

from collections.abc import Callable
from typing import Any

from ZODB.Connection import TransactionMetaData
from ZODB.POSException import POSKeyError

from zeolith.client.storage import ClientStorage
from zeolith.client.tids import following

from .waiting import wait_until


def begin(storage: Any, **records: bytes) -> TransactionMetaData:
    """A transaction that writes records and has not voted; see `oid_of`."""
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    for name, data in records.items():
        oid = oid_of(name)
        storage.store(oid, current_tid(storage, oid), data, "", transaction)
    return transaction


def vote(storage: Any, **records: bytes) -> TransactionMetaData:
    """A transaction that writes records and has voted."""
    transaction = begin(storage, **records)
    storage.tpc_vote(transaction)
    return transaction


def commit(storage: Any, **records: bytes) -> bytes:
    """Write records; returns the tid."""
    tid: bytes = storage.tpc_finish(vote(storage, **records))
    return tid


def oid_of(name: str) -> bytes:
    """The oid of the object that a test calls ``name``."""
    return name.encode().rjust(8, b"\0")


def current_tid(storage: Any, oid: bytes) -> bytes | None:
    try:
        tid: bytes = storage.getTid(oid)
    except POSKeyError:
        return None
    return tid


def seen(storage: ClientStorage, name: str) -> bytes:
    """The data of an object in the snapshot that a new transaction would get."""
    found = storage.loadBefore(oid_of(name), following(storage.lastTransaction()))
    assert found is not None
    return found[0]


def wait_for_position(storage: ClientStorage, tid: bytes) -> None:
    """Return when everything up to ``tid`` was applied."""
    wait_until(
        lambda: (storage.position.tid_now or b"") >= tid, f"position {tid.hex()}"
    )


class Listening:
    """A ZODB database as a storage sees it, which remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[bytes, set[bytes]]] = []
        self.afresh = 0
        # Called with each tid before it is remembered.
        self.on_invalidate: Callable[[bytes], None] = lambda tid: None

    def invalidate(self, tid: bytes, oids: Any) -> None:
        self.on_invalidate(tid)
        self.told.append((tid, set(oids)))

    def invalidateCache(self) -> None:
        self.afresh += 1

    def transform_record_data(self, data: bytes) -> bytes:
        return data

    untransform_record_data = transform_record_data

    @property
    def tids(self) -> list[bytes]:
        """The tids that it was told of, in that order."""
        return [tid for tid, _oids in self.told]
