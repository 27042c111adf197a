"""A transaction that votes beside others: checked, resolved, and written later.

Nothing is written before it finishes, so to give it up is to forget it. It votes on the
loop, if all that is to be looked at is in memory and what is to be merged is small
(``vote_nowait``), or in a worker thread (``vote``); one thread at a time. Whoever calls
sees to it that nobody writes its objects between the vote and its end (``locks``).

Invariants:

1. A vote that raised, or was abandoned, has left nothing behind.
2. After a vote ``file_bytes`` is exactly what ``records`` and the transaction's frame
   take in the file.
"""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Protocol

from ZODB.FileStorage.FileStorage import FileStorageError
from ZODB.FileStorage.format import DATA_HDR_LEN, TRANS_HDR_LEN
from ZODB.POSException import StorageTransactionError, Unsupported

from zeolith.storage.blobs import name_in
from zeolith.storage.conflicts import Quickly, TakesLong, resolve_encoded
from zeolith.storage.database import Transaction, Unresolved, Voted, WouldBlock
from zeolith.storage.locks import ALONE, Claim
from zeolith.storage.plain import PLAIN_OPERATIONS_MIN, PlainOperations
from zeolith.storage.room import Room
from zeolith.storage.validation import (
    OID_MAX,
    STORES,
    Records,
    Resolve,
    Validation,
    refuse_empty,
)
from zeolith.storage.wrapping import Form

# How many operations are looked at on the loop. Stores and checks of objects that lie
# side by side take 1 us each; 0.3 ms together if all of them lie apart, which is what a
# load of hundreds takes, too.
NOWAIT_OPERATIONS_MAX = 128
# What a Data.fs has for the length of user, description and extension.
_TEXT_BYTES_MAX = 65535
# The length of a transaction is written a second time, behind it.
_TAIL_BYTES = 8


def claim_of(transaction: Transaction) -> Claim:
    """What ``transaction`` needs to itself; walks through its operations.

    Everything, unless it is of stores and checks alone: what an undo changes is known
    only when it is done, and what is copied brings a tid of its own.
    """
    if transaction.tid is not None or transaction.status != " ":
        return ALONE
    writes, depends_on = set(), set()
    for operation in transaction.operations:
        if operation[0] in STORES:
            writes.add(operation[1])
        elif operation[0] == "check":
            depends_on.add(operation[1])
        else:
            return ALONE
    return Claim(writes, depends_on)


class Home(Protocol):
    """The file that a transaction is to be written to."""

    room: Room
    # How records are in the file, against how clients send them.
    form_inside: Callable[[bytes], bytes] | None
    # As clients send records.
    form: Form

    @property
    def takes_blobs(self) -> bool:
        """Whether the file has blobs beside it."""

    def records(self, nowait: bool) -> Records:
        """What was committed; with ``nowait`` reading raises WouldBlock."""

    def current_tid_nowait(self, oid: bytes) -> bytes | None:
        """The tid of the current revision, None if there is none; or WouldBlock."""

    def see_oid(self, oid: bytes) -> None:
        """Give out no oid up to this one any more."""


class Preparation:
    """One transaction of stores and checks, from its vote to the end."""

    def __init__(self, home: Home, transaction: Transaction):
        self.transaction = transaction
        # What it takes in the file; known after the vote.
        self.file_bytes = 0
        self._home = home
        self._validation = Validation(transaction, home.form)
        # What is to be written, as it is in the file; None if it is to be read from
        # where the operations are.
        self._records: list[tuple[bytes, bytes]] | None = None
        # Where its last record begins, from its own beginning.
        self._last_at = 0
        self._has_room = False
        # Of its blobs, while they are on their way to their places.
        self.marks: list[Path] = []

    def vote_nowait(self) -> Voted | Unresolved:
        """Vote on the loop; WouldBlock if it must be done in a thread."""
        operations = self.transaction.operations
        if type(operations) is not list or len(operations) > NOWAIT_OPERATIONS_MAX:
            raise WouldBlock
        if self._home.form_inside is not None:
            raise WouldBlock
        if len(operations) < PLAIN_OPERATIONS_MIN and self._vote_on_few(operations):
            return Voted(None, [])
        try:
            return self._vote(True, Quickly())
        except TakesLong:
            raise WouldBlock from None

    def vote(self, resolutions: dict[bytes, bytes]) -> Voted | Unresolved:
        """Vote in a worker thread, with what the client has resolved."""
        self._validation.take(resolutions)
        return self._vote(False, resolve_encoded)

    def _vote_on_few(self, operations: list[list[Any]]) -> bool:
        """Vote for a few stores of objects that nobody has changed meanwhile.

        What most transactions are, looked at once, where ``_vote`` looks at them for
        one thing after the other. False, and nothing is done, for all others.
        """
        transaction, home = self.transaction, self._home
        texts = transaction.user, transaction.description, transaction.extension
        end = TRANS_HDR_LEN + sum(map(len, texts))
        if end > _TEXT_BYTES_MAX:
            return False
        last_at = end
        written: dict[bytes, None] = {}
        records: list[tuple[bytes, bytes]] = []
        for operation in operations:
            if operation[0] != "store":
                return False
            _name, oid, serial, data = operation
            if oid in written or oid > OID_MAX or not data:
                return False
            if home.current_tid_nowait(oid) not in (None, serial):
                return False
            written[oid] = None
            records.append((oid, data))
            last_at = end
            end += DATA_HDR_LEN + len(data)
        if not records or not home.room.take(end + _TAIL_BYTES, last_at):
            return False
        self._has_room = True
        self._last_at = last_at
        self.file_bytes = end + _TAIL_BYTES
        self._records = records
        self._validation.written = written
        home.see_oid(max(written))
        return True

    def _vote(self, nowait: bool, resolve: Resolve) -> Voted | Unresolved:
        validation = self._validation
        self._refuse_texts()
        validation.refuse_extremes()
        records = self._home.records(nowait)
        unresolved = validation.conflicts(validation.last_stores(), records, resolve)
        if unresolved:
            validation.ask(unresolved)
            return Unresolved(unresolved)
        self._gather()
        room = self._home.room
        if not room.take(self.file_bytes, self._last_at):
            if nowait:
                raise WouldBlock
            room.make(self.file_bytes, self._last_at)
        self._has_room = True
        return self._voted()

    def end(self) -> None:
        """It is in the file, or given up; on the loop, may be called again."""
        if self._has_room:
            self._has_room = False
            self._home.room.give_back(self.file_bytes)
        self._records = None

    @property
    def written(self) -> Collection[bytes]:
        """The oids that get a new revision."""
        return self._validation.written.keys()

    def records(self) -> Iterator[tuple[bytes, bytes]]:
        """The (oid, record) to be written, each oid once; in the writer thread."""
        return self._stored() if self._records is None else iter(self._records)

    def blobs(self) -> Iterator[tuple[bytes, Path]]:
        """The (oid, file) of its blobs; StorageTransactionError if one is missing."""
        files = self.transaction.blobs
        if not files:
            return
        for operation in self._validation.last_stores():
            name = name_in(operation)
            if name is not None:
                yield operation[1], files[name]

    def _voted(self) -> Voted:
        written = self._validation.written
        if written:
            self._home.see_oid(max(written))
        return Voted(None, list(self._validation.resolutions))

    def _gather(self) -> None:
        """Find out what will be written, and how long it is."""
        plain = self._validation.plain
        is_as_sent = self._home.form_inside is None and not self._validation.resolutions
        if plain is not None and is_as_sent:
            self._gather_plain(plain)
            return
        self._refuse_blobs()
        if type(self.transaction.operations) is list:
            self._records = list(self._stored())
        end = self._last_at = self._begin_bytes
        for _oid, data in self.records():
            self._last_at = end
            end += DATA_HDR_LEN + len(data)
        self.file_bytes = end + _TAIL_BYTES

    def _gather_plain(self, plain: PlainOperations) -> None:
        self._records = list(zip(plain.oids, plain.records, strict=True))
        lengths = tuple(map(len, plain.records))
        if not all(lengths):
            refuse_empty(*self._records[lengths.index(0)])
        end = self._begin_bytes + len(lengths) * DATA_HDR_LEN + sum(lengths)
        self._last_at = end - lengths[-1] - DATA_HDR_LEN
        self.file_bytes = end + _TAIL_BYTES

    def _stored(self) -> Iterator[tuple[bytes, bytes]]:
        resolutions = self._validation.resolutions
        inside = self._home.form_inside
        for operation in self._validation.last_stores():
            if operation[0] in STORES:
                oid = operation[1]
                data = resolutions[oid] if oid in resolutions else operation[3]
                refuse_empty(oid, data)
                yield oid, data if inside is None else inside(data)

    @property
    def _begin_bytes(self) -> int:
        """What the transaction takes before its first record."""
        return TRANS_HDR_LEN + sum(map(len, self._texts))

    @property
    def _texts(self) -> tuple[bytes, bytes, bytes]:
        transaction = self.transaction
        return transaction.user, transaction.description, transaction.extension

    def _refuse_texts(self) -> None:
        if max(map(len, self._texts)) <= _TEXT_BYTES_MAX:
            return
        names = ("user name", "description", "extension data")
        for name, text in zip(names, self._texts, strict=True):
            if len(text) > _TEXT_BYTES_MAX:
                raise FileStorageError(f"{name} too long")

    def _refuse_blobs(self) -> None:
        files = self.transaction.blobs
        for operation in self.transaction.operations:
            name = name_in(operation)
            if name is None:
                continue
            if not self._home.takes_blobs:
                raise Unsupported("this storage has no blobs")
            if name not in files:
                raise StorageTransactionError(
                    f"there is no blob {name!r:.100} to be stored"
                )
