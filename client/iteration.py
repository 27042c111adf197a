"""The transactions of a database and its current records, as ZODB iterates them.

The server sends batches and keeps nothing in between: what is needed to go on is in
the cursor that a batch ends with, so a lost connection is only a request more. Used by
the calling thread; an iterator belongs to one thread.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ZODB.BaseStorage import DataRecord, TransactionRecord
from ZODB.Connection import overridable_property
from ZODB.interfaces import IStorageTransactionInformation
from zope.interface import implementer

from zeolith.client.extensions import load_extension

Call = Callable[..., Any]


@implementer(IStorageTransactionInformation)
class Transaction(TransactionRecord):
    """A transaction and, iterated, its records; what is not here yet is asked for."""

    def __init__(self, call: Call, piece: Sequence[Any], rest: bytes | None):
        tid, status, user, description, extension, records = piece
        super().__init__(tid, status, user, description, extension)
        self._call = call
        self._records = records
        self._rest = rest

    @overridable_property  # type: ignore[untyped-decorator]
    def extension(self) -> dict[str, Any]:
        """What the transaction says of itself; see load_extension."""
        return load_extension(self.extension_bytes)

    def __iter__(self) -> Iterator[DataRecord]:
        records, rest = self._records, self._rest
        while True:
            for oid, tid, data, data_tid in records:
                yield DataRecord(oid, tid, data, data_tid)
            if rest is None:
                return
            pieces, rest, _next = self._call("transactions", self.tid, self.tid, rest)
            records = pieces[0][-1]


def transactions(
    call: Call, start: bytes | None, stop: bytes | None
) -> Iterator[Transaction]:
    """The transactions from ``start`` to ``stop``, both inclusive, oldest first."""
    cursor = None
    while True:
        pieces, rest, cursor = call("transactions", start, stop, cursor)
        last = len(pieces) - 1
        for number, piece in enumerate(pieces):
            yield Transaction(call, piece, rest if number == last else None)
        if cursor is None:
            return


class Transactions:
    """What ``iterator`` returns; ``close`` is there for those who expect it."""

    def __init__(self, call: Call, start: bytes | None, stop: bytes | None):
        self._transactions = transactions(call, start, stop)

    def __iter__(self) -> "Transactions":
        return self

    def __next__(self) -> Transaction:
        return next(self._transactions)

    def close(self) -> None:
        """Nothing is given any more; nothing is held anywhere either."""
        self._transactions = iter(())


class CurrentRecords:
    """record_iternext, with a batch of records read ahead.

    Any thread may use it; threads that go through the database at the same time disturb
    each other's batch, not each other's result.
    """

    def __init__(self, call: Call):
        self._call = call
        self._lock = threading.Lock()
        # The oid of a record -> itself, and the oid to go on with behind it.
        self._ahead: dict[bytes, tuple[bytes, bytes, bytes, bytes | None]] = {}

    def next(self, first: bytes | None) -> tuple[bytes, bytes, bytes, bytes | None]:
        """``(oid, tid, data, next)`` of the first object from ``first`` on.

        Raises ValueError if there is none, as FileStorage does.
        """
        if first is not None:
            with self._lock:
                # Each is given once, so a later walk does not find what has aged.
                ahead = self._ahead.pop(first, None)
            if ahead is not None:
                return ahead
        _as_of, records, after = self._call("records", first)
        while not records and after is not None:
            _as_of, records, after = self._call("records", after)
        if not records:
            raise ValueError("there is no object from there on")
        oids = [oid for oid, _tid, _data in records]
        found = [
            (*record, following)
            for record, following in zip(records, [*oids[1:], after], strict=True)
        ]
        with self._lock:
            self._ahead = dict(zip(oids[1:], found[1:], strict=True))
        return found[0]
