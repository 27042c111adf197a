"""Whether a transaction fits what was committed since it began, and what to write.

A Validation looks at every operation of one transaction before anything is written:
what it read must still be current, or the states are merged, by the server where it
knows the class (``conflicts``), else by the client. It only reads, so it may run beside
others whose objects are not the same; whoever runs it sees to it that nobody writes
these objects meanwhile, and until its transaction has ended.

Belongs to one thread at a time. Invariants:

1. Validating again, with more resolutions, comes to the same as doing it once.
2. ``written`` names every object that gets a new revision, whatever resolves it.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice
from typing import Any, Protocol

from ZODB.POSException import (
    ConflictError,
    POSKeyError,
    ReadConflictError,
    StorageTransactionError,
    Unsupported,
)

from zeolith.storage import conflicts
from zeolith.storage.database import Conflict, Transaction
from zeolith.storage.plain import (
    PLAIN_OPERATIONS_MAX,
    PlainOperations,
    plain_operations,
)
from zeolith.storage.tids import Z64
from zeolith.storage.wrapping import Form

# Operations that write a record: only if nobody else has; as it was elsewhere.
STORES = {"store", "store_blob", "store_shared_blob"}
RESTORES = {"restore", "restore_blob"}
# All that leave a new revision of the oid they name.
WRITING = STORES | RESTORES | {"delete"}

OID_MAX = b"\x7f" + b"\xff" * 7


# conflicts.resolve_encoded, or one that may raise more.
Resolve = Callable[[Form, bytes, bytes, bytes], bytes]


class Records(Protocol):
    """What was committed."""

    def current_tids(self, oids: list[bytes]) -> dict[bytes, bytes]:
        """The tids of the current revisions of those that exist; WouldBlock."""

    def load_serial(self, oid: bytes, tid: bytes) -> bytes:
        """The record that transaction ``tid`` wrote.

        Raises POSKeyError, Unsupported, WouldBlock.
        """


class Validation:
    """The validation of one transaction, until it is resolved or refused."""

    def __init__(self, transaction: Transaction, form: Form):
        """``form`` is that of the records that clients send."""
        self._transaction = transaction
        self._form = form
        # What was resolved, by the server or the client: oid -> record.
        self.resolutions: dict[bytes, bytes] = {}
        # Every oid that an operation changes, in the order of the first of each.
        self.written: dict[bytes, None] = {}
        # Of what the client has to resolve now.
        self._asked: set[bytes] = set()
        # Whether no object is stored twice, so that nobody need remember which is last:
        # it takes time, and of a large transaction memory, each time it is looked at.
        self._are_distinct = False
        # The operations by columns, if that says all; known when they were looked at.
        self.plain: PlainOperations | None = None

    def refuse_extremes(self) -> None:
        """Raise StorageTransactionError for oids that leave too few for others.

        The first look at the operations.
        """
        plain = self.plain = plain_operations(self._transaction.operations)
        if plain is not None:
            _refuse_extreme(max(plain.oids))
            return
        for operation in self._transaction.operations:
            if operation[0] in WRITING:
                _refuse_extreme(operation[1])

    def last_stores(self) -> Iterator[list[Any]]:
        """The operations, of several stores of one oid only the last one."""
        operations = self._transaction.operations
        if self._are_distinct:
            return iter(operations)
        if self.plain is not None:
            self.written = dict.fromkeys(self.plain.oids)
            self._are_distinct = True
            return iter(operations)
        stores = 0
        last: dict[bytes, int] = {}
        self.written = {}
        for index, operation in enumerate(operations):
            if operation[0] in WRITING:
                self.written[operation[1]] = None
            if operation[0] in STORES:
                stores += 1
                last[operation[1]] = index
        if stores == len(last):
            self._are_distinct = True
            return iter(operations)
        return (
            operation
            for index, operation in enumerate(operations)
            if operation[0] not in STORES or last[operation[1]] == index
        )

    def conflicts(
        self,
        operations: Iterable[list[Any]],
        records: Records,
        resolve: Resolve = conflicts.resolve_encoded,
    ) -> list[Conflict]:
        """Validate ``operations``; what only the client can resolve.

        Raises ConflictError, ReadConflictError, POSKeyError, and what ``records`` and
        ``resolve`` raise; then it may be asked again.
        """
        return list(self._conflicts(operations, records, resolve))

    def ask(self, unresolved: list[Conflict]) -> None:
        """The client is about to be asked to resolve these."""
        self._asked = {conflict.oid for conflict in unresolved}

    def take(
        self, resolutions: dict[bytes, bytes], apart: Collection[bytes] = ()
    ) -> None:
        """What the client has resolved; those of ``apart`` are not of stores.

        Raises StorageTransactionError if it is not all that it was asked. Or it could
        go on asking, and hold its objects, for ever: each time everything is looked at
        again, and that is the server's time.
        """
        if not self._asked <= resolutions.keys():
            raise StorageTransactionError("not all of the conflicts were resolved")
        self.resolutions.update(
            (oid, data) for oid, data in resolutions.items() if oid not in apart
        )

    def _conflicts(
        self, operations: Iterable[list[Any]], records: Records, resolve: Resolve
    ) -> Iterator[Conflict]:
        for operation, committed_tid in self._outdated(operations, records):
            name, oid, serial, data = operation[:4]
            if serial == Z64 and name != "store":
                # All blobs have the same record; their files differ.
                raise ConflictError(oid=oid, serials=(committed_tid, serial))
            if oid in self.resolutions:
                continue
            if serial == Z64:
                self._resolve_new(records, oid, committed_tid, data)
                continue
            states = _older_states(records, oid, serial, committed_tid)
            try:
                self.resolutions[oid] = resolve(self._form, data, *states)
            except conflicts.Contradiction:
                raise ConflictError(oid=oid, serials=(committed_tid, serial)) from None
            except conflicts.Unresolvable:
                old, committed = states
                yield Conflict(oid, committed_tid, serial, committed, old, data)

    def _outdated(
        self, operations: Iterable[list[Any]], records: Records
    ) -> Iterator[tuple[list[Any], bytes]]:
        """The stores of what was changed since, each with the tid of the change."""
        plain = self.plain
        if plain is not None:
            tids = records.current_tids([*plain.oids, *plain.checked_oids])
            if not plain.are_current(tids):
                yield from self._outdated_among(operations, tids)
            return
        for batch in batched(operations):
            oids = [each[1] for each in batch if each[0] != "undo"]
            yield from self._outdated_among(batch, records.current_tids(oids))

    def _outdated_among(
        self, operations: Iterable[list[Any]], tids: dict[bytes, bytes]
    ) -> Iterator[tuple[list[Any], bytes]]:
        for operation in operations:
            name = operation[0]
            if name == "undo":
                continue
            oid, serial = operation[1], operation[2]
            committed_tid = tids.get(oid)
            if name == "check":
                _check_read(oid, serial, committed_tid)
            elif name in RESTORES:
                self._check_restored(oid, serial)
            elif name == "delete":
                _check_deleted(oid, serial, committed_tid)
            elif committed_tid is not None and serial != committed_tid:
                yield operation, committed_tid

    def _check_restored(self, oid: bytes, serial: bytes) -> None:
        # FileStorage writes the serial as the record's tid, whatever it is.
        if serial != self._transaction.tid:
            raise StorageTransactionError(
                f"oid {oid.hex()} is restored as of {serial.hex()} in another"
                " transaction; begin it with that tid"
            )

    def _resolve_new(
        self, records: Records, oid: bytes, committed_tid: bytes, new: bytes
    ) -> None:
        """Two clients made an object of the same oid: there is no common state.

        If they made the same thing of it, as two that open an empty database do with
        its root, there is no conflict either.
        """
        if records.load_serial(oid, committed_tid) != new:
            raise ConflictError(oid=oid, serials=(committed_tid, Z64))
        self.resolutions[oid] = new


def _older_states(
    records: Records, oid: bytes, old_tid: bytes, committed_tid: bytes
) -> tuple[bytes, bytes]:
    try:
        return records.load_serial(oid, old_tid), records.load_serial(
            oid, committed_tid
        )
    except (POSKeyError, Unsupported):
        # Packed away, or never stored under this serial.
        raise ConflictError(oid=oid, serials=(committed_tid, old_tid)) from None


def batched(operations: Iterable[list[Any]]) -> Iterator[list[list[Any]]]:
    """``operations``, PLAIN_OPERATIONS_MAX of them at a time."""
    rest = iter(operations)
    while batch := list(islice(rest, PLAIN_OPERATIONS_MAX)):
        yield batch
        if len(batch) < PLAIN_OPERATIONS_MAX:
            return


def refuse_empty(oid: bytes, data: bytes) -> None:
    """Raise StorageTransactionError for a record without a byte."""
    if not data:
        # In a Data.fs length 0 means that the data are elsewhere: the file would
        # end here at the next opening without an index.
        raise StorageTransactionError(f"the record of oid {oid.hex()} is empty")


def _refuse_extreme(oid: bytes) -> None:
    if oid > OID_MAX:
        raise StorageTransactionError(
            f"oid {oid.hex()} is beyond all that are given out"
        )


def _check_read(oid: bytes, serial: bytes, current: bytes | None) -> None:
    if current is None:
        raise POSKeyError(oid)
    if current != serial:
        raise ReadConflictError(oid=oid, serials=(current, serial))


def _check_deleted(oid: bytes, serial: bytes, current: bytes | None) -> None:
    if current is None:
        raise POSKeyError(oid)
    if current != serial:
        raise ConflictError(oid=oid, serials=(current, serial))
