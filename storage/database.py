"""The inner interface: what a served database can do, and who may wait.

The server knows databases only through ``Database``. Its methods come in three
groups, and the group says which thread may call them:

* **loop**: never waits, takes no lock, may be called from the event loop;
* **reader**: may wait for the disk or a lock; called in reader threads, many at once;
* **writer**: called in the one writer thread of the database, one at a time.

A transaction says what it needs to itself (``claim``); the server sees to it that it
has that from its vote to its end. One that is *alone* is voted on and finished in the
writer thread, in the order vote, (resolve,) finish or abort; nobody else is between
vote and finish then. Others are *prepared* side by side, and those that finish at the
same time are appended together.

Every answer that depends on a point in time is bounded by ``before``: the server
passes at most one more than the last tid it has announced, so an answer never shows
what clients have not heard of.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from transaction.interfaces import TransientError
from ZODB.POSException import StorageError

from zeolith.storage.blobs import Piece, Uploads
from zeolith.storage.changes import Change, Known, Past
from zeolith.storage.feed import Listener
from zeolith.storage.locks import Claim
from zeolith.storage.pack_progress import Packed, Packing


class WouldBlock(Exception):
    """The record is not in memory: ask again in a reader thread."""


class BrokenDatabase(Exception):
    """A disaster between vote and durability; this process must not write any more."""


class Unavailable(StorageError, TransientError):
    """What the storage stands on cannot be reached; nothing was committed."""


class OutcomeUnknown(StorageError):
    """Nobody can say whether the transaction was committed; all else is in order."""


class NotCommitted(StorageError):
    """The disk did not take a transaction that had voted; nothing was committed."""


class Standing(NamedTuple):
    """Where a database stands, and which one it is."""

    last_tid: bytes
    database_id: bytes
    epoch: int


class Revision(NamedTuple):
    """A record and the range of snapshots in which it is the one."""

    data: bytes
    tid: bytes
    # The tid of the next revision; None if there is none yet.
    end: bytes | None


class LogEntry(NamedTuple):
    """One transaction as undo logs and histories list it; the extension is opaque."""

    tid: bytes
    user: bytes
    description: bytes
    extension: bytes
    size: int


@dataclass(slots=True)
class Transaction:
    """What a client wants to commit, as it arrived; nothing of it is checked yet."""

    # Chosen by the client, 16 random bytes.
    id: bytes
    user: bytes = b""
    description: bytes = b""
    extension: bytes = b""
    # The tid to keep when transactions are copied; None for a new one.
    tid: bytes | None = None
    status: str = " "
    # ["store", oid, serial, data], ["check", oid, serial], ["undo", tid],
    # ["restore", oid, serial, data or None, tid of the data or None],
    # ["delete", oid, serial], and the blobs' (storage.blobs); perhaps not in memory: to
    # be iterated in a worker thread, several times.
    operations: Collection[list[Any]] = field(default_factory=list)
    # The files of its blobs, by what names them in the operations.
    blobs: dict[int | str, Path] = field(default_factory=dict)


class Conflict(NamedTuple):
    """The three states of an object that two transactions changed."""

    oid: bytes
    committed_tid: bytes
    # What the transaction had read.
    old_tid: bytes
    committed: bytes
    old: bytes
    new: bytes


class Unresolved(NamedTuple):
    """The answer to a vote that waits for the client to resolve ``conflicts``."""

    conflicts: list[Conflict]


class Voted(NamedTuple):
    """The answer to a successful vote: from here on, finish cannot fail."""

    # The tid under which the transaction will be committed, where it is known.
    tid: bytes | None
    # What the server wrote differently from what the client sent.
    resolved: list[bytes]


class Finished(NamedTuple):
    """A transaction that is on disk."""

    tid: bytes
    oids: list[bytes]


class DataRecord(NamedTuple):
    """What a transaction wrote of an object."""

    oid: bytes
    tid: bytes
    # None where the creation of the object was undone, or it was deleted.
    data: bytes | None
    # The transaction whose data these are, where the record only points to them.
    data_tid: bytes | None


class TransactionPiece(NamedTuple):
    """A transaction, or as much of it as was wanted."""

    tid: bytes
    status: str
    user: bytes
    description: bytes
    extension: bytes
    records: list[DataRecord]


class Batch(NamedTuple):
    """Transactions one after the other, and how to go on."""

    pieces: list[TransactionPiece]
    # To the records of the last one that are not in it; None if all are.
    rest: bytes | None
    # To the transaction after the last one; None at the end.
    next: bytes | None


class Wish(NamedTuple):
    """Which transactions, and how much of them at once."""

    # Inclusive, both.
    start: bytes
    stop: bytes
    bytes_max: int


class CurrentRecord(NamedTuple):
    """An object as it is now."""

    oid: bytes
    tid: bytes
    data: bytes


class Prepared(Protocol):
    """A transaction that votes beside others; nothing is written before it finishes.

    The votes by one thread at a time; an error leaves nothing behind.
    """

    transaction: Transaction

    def vote_nowait(self) -> Voted | Unresolved:
        """On the loop; WouldBlock if it is to be done in a thread."""

    def vote(self, resolutions: dict[bytes, bytes]) -> Voted | Unresolved:
        """In a worker thread: validate, resolve, with what the client has resolved."""

    def end(self) -> None:
        """On the loop: it is committed, or given up; may be called again."""


class Near(Protocol):
    """Current records as they are in a file, for code that reads them without us."""

    # Open for as long as there is a reference to this.
    fd: int
    # An fsIndex's: by the first six bytes of an oid, by the last two, the position.
    buckets: Any


class Database(Protocol):
    """A database that can be served."""

    name: str
    # 16 bytes and a number that grows when history is rewritten.
    database_id: bytes
    epoch: int
    # Whether its own commits, too, are told through ``follow``, in their place.
    tells_own: bool
    supports_undo: bool
    # Names of the ZODB.interfaces that the storage provides.
    interfaces: tuple[str, ...]
    # Where blobs wait for their vote; see there for the threads.
    uploads: Uploads

    # loop
    @property
    def takes_blobs(self) -> bool:
        """Whether the storage has blobs."""

    @property
    def is_read_only(self) -> bool:
        """Whether nothing can be written now."""

    def follow(self, listener: Listener) -> None:
        """Tell ``listener``, from any thread, of changes that are not our own."""

    def load_nowait(self, oid: bytes, before: bytes) -> Revision | None:
        """Like ``load``, or WouldBlock."""

    def near(self) -> Near | None:
        """Where ``load_nowait`` finds records and answers with what is there."""

    def prepare(self, transaction: Transaction) -> Prepared:
        """For a transaction whose claim is not alone: it is about to vote."""

    # loop, for a few operations in memory; else reader
    def claim(self, transaction: Transaction) -> Claim:
        """What the transaction needs to itself."""

    # reader
    def last_changes(self) -> tuple[bytes, list[Change]]:
        """The last tid and the changes that lead to it; once, after opening."""

    def changes_before(self, last: bytes, position: bytes, bytes_max: int) -> Past:
        """The changes up to that of ``last``, exactly as they were.

        Back to ``position``, or as far as that can be told; about ``bytes_max`` are
        read at most. Takes long, in a thread that nobody else waits for.
        """

    def last_known(self, tids: Collection[bytes], last: bytes, bytes_max: int) -> Known:
        """The last one of ``tids`` that is a transaction of the log up to ``last``.

        As ``changes_before`` otherwise.
        """

    def outdated(self, revisions: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        """The oids of those (oid, tid) that are not current revisions (any more)."""

    def load(self, oid: bytes, before: bytes) -> Revision | None:
        """The last revision before ``before``; None if the object is younger.

        Raises POSKeyError if there is no such object.
        """

    def prefetch(self, oids: list[bytes], before: bytes) -> None:
        """Bring near what ``load`` of each of ``oids`` would have to wait for."""

    def load_serial(self, oid: bytes, tid: bytes) -> bytes:
        """The record that transaction ``tid`` wrote; POSKeyError."""

    def load_blob(self, oid: bytes, tid: bytes, offset: int, size: int) -> Piece:
        """A part of a blob's file; POSKeyError, Unsupported."""

    def get_tid(self, oid: bytes) -> bytes:
        """The tid of the current revision; POSKeyError."""

    def history(self, oid: bytes, size: int) -> list[LogEntry]:
        """The last ``size`` revisions, newest first; POSKeyError."""

    def undo_log(self, before: bytes | None, size: int) -> list[LogEntry]:
        """Up to ``size`` undoable transactions before ``before``, newest first."""

    def transactions(self, wish: Wish, cursor: bytes | None) -> Batch:
        """Transactions with their records, from ``cursor`` on or as ``wish`` says.

        Raises StorageError for a cursor that is of no use, Unsupported.
        """

    def current_records(
        self, first: bytes | None, before: bytes, bytes_max: int
    ) -> tuple[list[CurrentRecord], bytes | None]:
        """Objects as they are, in the order of oids from ``first`` on; what is next.

        Raises Unsupported.
        """

    def committed(self, tid: bytes) -> bool | None:
        """Whether transaction ``tid`` is in the log; None if nobody can tell."""

    def catch_up(self) -> None:
        """Where ``tells_own``: have all told that was committed before this call.

        If that can be found out now.
        """

    def standing(self) -> Standing:
        """After ``follow`` told that nothing known is of use: what is true now."""

    def outcome(
        self, transaction_id: bytes, tid: bytes | None, position: bytes
    ) -> tuple[str, bytes | None]:
        """What became of a transaction, where ``tells_own``; as on the wire."""

    def new_oids(self, count: int) -> list[bytes]:
        """Oids that were never given out; ReadOnlyError."""

    def info(self) -> tuple[int, int]:
        """Size in bytes and number of objects, as far as the storage knows."""

    def pack(
        self, time_s: float, gc: bool | None = None, packing: Packing | None = None
    ) -> Packed:
        """Remove what was not current at ``time_s``, and with ``gc`` garbage.

        ``gc`` None: as the storage's options say. Takes long, in a thread that nobody
        waits for; ``packing`` tells others how far it is.
        """

    def stop_waiting(self) -> None:
        """At the end: whoever waits for another server gets an error now."""

    def save_index(self) -> bool:
        """Save what makes a start after a crash fast; false if that is not worth it.

        Commits go on meanwhile. Raises OSError.
        """

    def close(self) -> None:
        """Save what makes the next start fast, and release the files."""

    # writer
    def raise_tid_floor(self, tid: bytes) -> None:
        """Give no tid up to ``tid`` to a new transaction: clients have seen it."""

    def append(self, group: Sequence[Prepared]) -> list[Finished | Exception]:
        """Make these durable, in this order; the outcome of each.

        An exception among them says that nothing of it was committed. BrokenDatabase
        if nobody can say that of all.
        """

    def vote(self, transaction: Transaction) -> Voted | Unresolved:
        """Validate, resolve, store. An error leaves nothing behind."""

    def resolve(self, resolutions: dict[bytes, bytes]) -> Voted | Unresolved:
        """Go on with the records that the client made of the conflicts."""

    def finish(self) -> Finished:
        """Make the voted transaction durable; BrokenDatabase if that fails.

        OutcomeUnknown, and errors that say that nothing was committed, are possible
        where ``tells_own``.
        """

    def abort(self) -> None:
        """Forget the transaction that was voted or waits; harmless without one."""
