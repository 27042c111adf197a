"""The inner interface: what a served database can do, and who may wait.

The server knows databases only through ``Database``. Its methods come in three
groups, and the group says which thread may call them:

* **loop**: never waits, takes no lock, may be called from the event loop;
* **reader**: may wait for the disk or a lock; called in reader threads, many at once;
* **writer**: called in the one writer thread of the database, one at a time, in the
  order vote, (resolve,) finish or abort. At most one transaction is between vote and
  finish.

Every answer that depends on a point in time is bounded by ``before``: the server
passes at most one more than the last tid it has announced, so an answer never shows
what clients have not heard of.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from zeolith.storage.changes import Change


class WouldBlock(Exception):
    """The record is not in memory: ask again in a reader thread."""


class BrokenDatabase(Exception):
    """A disaster between vote and durability; this process must not write any more."""


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
    # ["store", oid, serial, data], ["check", oid, serial], ["undo", tid]
    # and perhaps not in memory: to be iterated in the writer thread, several times.
    operations: Collection[list[Any]] = field(default_factory=list)


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


class Database(Protocol):
    """A database that can be served."""

    name: str
    # 16 bytes and a number that grows when history is rewritten.
    database_id: bytes
    epoch: int
    is_read_only: bool
    supports_undo: bool
    # Names of the ZODB.interfaces that the storage provides.
    interfaces: tuple[str, ...]

    # loop
    def load_nowait(self, oid: bytes, before: bytes) -> Revision | None:
        """Like ``load``, or WouldBlock."""

    # reader
    def last_changes(self) -> tuple[bytes, list[Change]]:
        """The last tid and the changes that lead to it; once, after opening."""

    def load(self, oid: bytes, before: bytes) -> Revision | None:
        """The last revision before ``before``; None if the object is younger.

        Raises POSKeyError if there is no such object.
        """

    def load_serial(self, oid: bytes, tid: bytes) -> bytes:
        """The record that transaction ``tid`` wrote; POSKeyError."""

    def get_tid(self, oid: bytes) -> bytes:
        """The tid of the current revision; POSKeyError."""

    def history(self, oid: bytes, size: int) -> list[LogEntry]:
        """The last ``size`` revisions, newest first; POSKeyError."""

    def undo_log(self, before: bytes | None, size: int) -> list[LogEntry]:
        """Up to ``size`` undoable transactions before ``before``, newest first."""

    def committed(self, tid: bytes) -> bool | None:
        """Whether transaction ``tid`` is in the log; None if nobody can tell."""

    def new_oids(self, count: int) -> list[bytes]:
        """Oids that were never given out; ReadOnlyError."""

    def info(self) -> tuple[int, int]:
        """Size in bytes and number of objects, as far as the storage knows."""

    def pack(self, time_s: float) -> None:
        """Remove what was not current at ``time_s`` and garbage."""

    def close(self) -> None:
        """Save what makes the next start fast, and release the files."""

    # writer
    def raise_tid_floor(self, tid: bytes) -> None:
        """Give no tid up to ``tid`` to a new transaction: clients have seen it."""

    def vote(self, transaction: Transaction) -> Voted | Unresolved:
        """Validate, resolve, store. An error leaves nothing behind."""

    def resolve(self, resolutions: dict[bytes, bytes]) -> Voted | Unresolved:
        """Go on with the records that the client made of the conflicts."""

    def finish(self) -> Finished:
        """Make the voted transaction durable; BrokenDatabase if that fails."""

    def abort(self) -> None:
        """Forget the transaction that was voted or waits; harmless without one."""
