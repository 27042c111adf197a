"""Short spellings for what a transaction does, and records to do it with."""

from io import BytesIO
from itertools import count
from typing import Any

from BTrees.Length import Length
from ZODB._compat import PersistentPickler, PersistentUnpickler
from ZODB.broken import find_global

from zeolith.storage.database import Transaction
from zeolith.storage.tids import Z64

from ..support.ids import number, transaction_id

ROOT, A, B, C = number(0), number(1), number(2), number(3)
_transactions = count(1)


def record(of_class: Any, state: Any) -> bytes:
    """A record without references."""
    file = BytesIO()
    pickler = PersistentPickler(lambda _value: None, file, 3)
    pickler.dump(of_class)
    pickler.dump(state)
    return file.getvalue()


def length(value: int) -> bytes:
    """The record of a BTrees.Length."""
    return record(Length, value)


def plain(value: Any) -> bytes:
    """The record of an object whose class only its application has."""
    return record(("an.application", "Class"), value)


def state_of(data: bytes) -> Any:
    """The state in a record without references."""
    unpickler = PersistentUnpickler(find_global, None, BytesIO(data))
    unpickler.load()
    return unpickler.load()


def store(oid: bytes, data: bytes, serial: bytes = Z64) -> list[Any]:
    return ["store", oid, serial, data]


def check(oid: bytes, serial: bytes) -> list[Any]:
    return ["check", oid, serial]


def undo(tid: bytes) -> list[Any]:
    return ["undo", tid]


def transaction(*operations: list[Any], **others: Any) -> Transaction:
    """A transaction of `operations` with an id of its own."""
    return Transaction(
        transaction_id(next(_transactions)), operations=list(operations), **others
    )


def references(*oids: bytes) -> bytes:
    """A record that refers to `oids`, so that a pack lets them live."""
    file = BytesIO()
    pickler = PersistentPickler(
        lambda value: value if isinstance(value, bytes) else None, file, 3
    )
    pickler.dump(("an.application", "Class"))
    pickler.dump(list(oids))
    return file.getvalue()
