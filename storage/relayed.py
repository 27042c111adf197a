"""A storage that is itself served by another server: what a relay stands on.

It is known by ``is_connected``, which ClientStorages have. Others write to it as well,
so its changes come through the feed, ours among them, and nothing that must be true at
once is decided here: the vote is the upstream server's. A ClientStorage of zeolith also
has ``for_relay``, an object for what ZODB's interfaces cannot say; with any other one
conflicts that the upstream cannot resolve are errors, and outcomes are not known.

While the upstream is away, what is at hand is read on. Whoever comes first waits for it
as long as the storage does, those after him get the same error at once: else all
threads would wait in turn, and so would everybody behind them.
"""

import uuid
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar

from transaction.interfaces import TransientError
from ZODB.interfaces import IStorageWrapper
from ZODB.POSException import (
    ConflictError,
    ReadOnlyError,
    StorageTransactionError,
    Unsupported,
)

from zeolith.storage.adapted import AdaptedStorage
from zeolith.storage.blobs import Piece
from zeolith.storage.commit import Committing
from zeolith.storage.database import (
    Batch,
    Conflict,
    CurrentRecord,
    Finished,
    LogEntry,
    OutcomeUnknown,
    Revision,
    Standing,
    Transaction,
    Unavailable,
    Unresolved,
    Voted,
    Wish,
    WouldBlock,
)
from zeolith.storage.feed import Feed
from zeolith.storage.pack_progress import Packed, Packing
from zeolith.storage.tids import Z64

Args = ParamSpec("Args")
Value = TypeVar("Value")


class Upstream(Protocol):
    """What ``for_relay`` of a storage returns."""

    def identity(self) -> tuple[bytes, int]:
        """Database id and epoch."""

    def is_in_place(self, tid: bytes) -> bool:
        """In the callback of tpc_finish: whether all before ``tid`` was told."""

    def load_cached(
        self, oid: bytes, before: bytes
    ) -> tuple[bytes, bytes, bytes | None] | None:
        """Without waiting, or None."""

    def catch_up(self) -> None:
        """Be told all changes until now."""

    def outdated(self, revisions: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        """The oids of those that are not current."""

    def prefetch(self, oids: list[bytes], before: bytes) -> None:
        """Into the cache."""

    def new_oids(self, count: int) -> list[bytes]:
        """Oids."""

    def history(self, oid: bytes, size: int) -> list[list[Any]]:
        """Log entries."""

    def undo_log(self, before: bytes | None, size: int) -> list[list[Any]]:
        """Log entries."""

    def outcome(
        self, transaction_id: bytes, tid: bytes | None, position: bytes
    ) -> tuple[str, bytes | None]:
        """What became of a transaction."""

    def vote(self, transaction: Any) -> Any:
        """``(tid, resolved, conflicts)``."""

    def resolve(self, transaction: Any, resolutions: dict[bytes, bytes]) -> Any:
        """``(tid, resolved, conflicts)``."""


def is_remote(storage: Any) -> bool:
    """Whether ``storage`` is a client of some server, or a wrapper of one."""
    return callable(getattr(storage, "is_connected", None))


class RelayedStorage(AdaptedStorage):
    """A database.Database over a client of another server."""

    tells_own = True

    def __init__(self, name: str, storage: Any):
        for_relay = getattr(storage, "for_relay", None)
        self._upstream: Upstream | None = for_relay() if for_relay else None
        # A wrapper hands for_relay through, but its records are others.
        self._is_wrapped = IStorageWrapper.providedBy(storage)
        # Why the upstream could not be reached the last time.
        self._away: str | None = None
        # Size and length, as of the last time that somebody asked for them.
        self._info: tuple[int, int] | None = None
        super().__init__(name, storage, *self._identity(uuid.uuid4().bytes))

    def _identity(self, otherwise: bytes) -> tuple[bytes, int]:
        return (otherwise, 1) if self._upstream is None else self._upstream.identity()

    # loop

    @property
    def is_read_only(self) -> bool:
        """As the upstream is now: a fallback may begin and end."""
        return bool(self._storage.isReadOnly())

    def load_nowait(self, oid: bytes, before: bytes) -> Revision | None:
        """What the storage has cached."""
        found = None
        if self._upstream is not None and not self._is_wrapped:
            found = self._upstream.load_cached(oid, before)
        if found is None:
            raise WouldBlock
        return Revision(*found)

    # reader

    def reach(
        self, call: Callable[Args, Value], *args: Args.args, **kwargs: Args.kwargs
    ) -> Value:
        """What ``call`` returns; raises Unavailable if the upstream is away."""
        if self._away is not None and not self._storage.is_connected():
            raise Unavailable(self._away)
        try:
            value = call(*args, **kwargs)
        except TransientError as error:
            if (
                not isinstance(error, ConflictError)
                and not self._storage.is_connected()
            ):
                self._away = f"the upstream server is away: {error}"
                raise Unavailable(self._away) from error
            raise
        self._away = None
        return value

    def standing(self) -> Standing:
        """See Database.standing; a fresh start may be one with another database."""
        database_id, epoch = self._identity(uuid.uuid4().bytes)
        return Standing(self._storage.lastTransaction() or Z64, database_id, epoch)

    def catch_up(self) -> None:
        """See Database.catch_up; a stranger tells what it tells."""
        if self._upstream is not None:
            self._upstream.catch_up()

    def outdated(self, revisions: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        """See Database.outdated."""
        if self._upstream is None:
            return self.reach(super().outdated, revisions)
        return self.reach(self._upstream.outdated, revisions)

    def load(self, oid: bytes, before: bytes) -> Revision | None:
        """See Database.load."""
        return self.reach(super().load, oid, before)

    def prefetch(self, oids: list[bytes], before: bytes) -> None:
        """See Database.prefetch."""
        if self._upstream is not None:
            self.reach(self._upstream.prefetch, oids, before)

    def load_serial(self, oid: bytes, tid: bytes) -> bytes:
        """See Database.load_serial."""
        return self.reach(super().load_serial, oid, tid)

    def get_tid(self, oid: bytes) -> bytes:
        """See Database.get_tid."""
        return self.reach(super().get_tid, oid)

    def history(self, oid: bytes, size: int) -> list[LogEntry]:
        """See Database.history."""
        if self._upstream is None:
            return self.reach(super().history, oid, size)
        entries = self.reach(self._upstream.history, oid, size)
        return [LogEntry(*entry) for entry in entries]

    def undo_log(self, before: bytes | None, size: int) -> list[LogEntry]:
        """See Database.undo_log."""
        if self._upstream is None:
            return self.reach(super().undo_log, before, size)
        if not self.supports_undo:
            raise Unsupported("the upstream's storage cannot undo")
        entries = self.reach(self._upstream.undo_log, before, size)
        return [LogEntry(*entry) for entry in entries]

    def outcome(
        self, transaction_id: bytes, tid: bytes | None, position: bytes
    ) -> tuple[str, bytes | None]:
        """See Database.outcome: the upstream knows."""
        if self._upstream is None:
            return "unknown", None
        found = self.reach(self._upstream.outcome, transaction_id, tid, position)
        if self._upstream.identity() != (self.database_id, self.epoch):
            # It is another database now than our clients know.
            return "unknown", None
        return found

    def new_oids(self, count: int) -> list[bytes]:
        """See Database.new_oids."""
        if self._upstream is None:
            return self.reach(super().new_oids, count)
        if self.is_read_only:
            raise ReadOnlyError("the storage is read-only")
        return self.reach(self._upstream.new_oids, count) if count else []

    def info(self) -> tuple[int, int]:
        """See Database.info; while the upstream is away, as it was before.

        Whoever asks how this server is must not have to wait for another one.
        """
        if self._info is None or self._storage.is_connected():
            self._info = self.reach(super().info)
        return self._info

    def load_blob(self, oid: bytes, tid: bytes, offset: int, size: int) -> Piece:
        """See Database.load_blob."""
        return self.reach(super().load_blob, oid, tid, offset, size)

    def transactions(self, wish: Wish, cursor: bytes | None) -> Batch:
        """See Database.transactions."""
        return self.reach(super().transactions, wish, cursor)

    def current_records(
        self, first: bytes | None, before: bytes, bytes_max: int
    ) -> tuple[list[CurrentRecord], bytes | None]:
        """See Database.current_records."""
        return self.reach(super().current_records, first, before, bytes_max)

    def pack(
        self, time_s: float, gc: bool | None = None, packing: Packing | None = None
    ) -> Packed:
        """See Database.pack."""
        return self.reach(super().pack, time_s, gc, packing)

    def stop_waiting(self) -> None:
        """See Database.stop_waiting; what is not committed will not be."""
        self._storage.close()

    # writer

    def vote(self, transaction: Transaction) -> Voted | Unresolved:
        """See Database.vote."""
        return self.reach(super().vote, transaction)

    def resolve(self, resolutions: dict[bytes, bytes]) -> Voted | Unresolved:
        """See Database.resolve."""
        return self.reach(super().resolve, resolutions)

    def _committing_of(self, transaction: Transaction) -> Committing:
        votes = None if self._is_wrapped else self._upstream
        return _Passing(self._storage, transaction, self._feed, self._upstream, votes)


class _Passing(Committing):
    """One transaction that is passed on; it is the upstream that decides on it."""

    def __init__(
        self,
        storage: Any,
        transaction: Transaction,
        feed: Feed,
        upstream: Upstream | None,
        votes: Upstream | None,
    ):
        super().__init__(storage, transaction, Z64)
        self._feed = feed
        self._upstream = upstream
        # Who takes votes that may be left unresolved.
        self._votes = votes
        self._is_sent = False

    def begin(self, assigns_tid: bool) -> None:
        """Whatever is wrong with the metadata, the upstream says it."""
        transaction = self._transaction
        self._begun = True
        if transaction.tid is None:
            self._storage.tpc_begin(self._metadata)
        else:
            self._storage.tpc_begin(self._metadata, transaction.tid, transaction.status)

    def vote(self, resolutions: dict[bytes, bytes]) -> Voted | Unresolved:
        """Send everything, or the resolutions of what was sent."""
        if not self._is_sent:
            self._is_sent = True
            self._store(self._validation.last_stores())
            if self._votes is None:
                answer = self._storage.tpc_vote(self._metadata)
                changed = [oid for oid in answer or () if isinstance(oid, bytes)]
                self._undone.update(changed)
                return Voted(None, changed)
            tid, resolved, conflicts = self._votes.vote(self._metadata)
        else:
            assert self._votes is not None, "nothing was left unresolved"
            tid, resolved, conflicts = self._votes.resolve(self._metadata, resolutions)
        if conflicts:
            return Unresolved([Conflict(*conflict) for conflict in conflicts])
        self.tid = tid
        self._undone.update(resolved)
        return Voted(tid, list(resolved))

    def finish(self) -> Finished:
        """Commit; the feed is told in the callback, where the upstream's order is."""
        oids = self._changed()
        told: list[bytes] = []

        def tell(tid: bytes) -> None:
            told.append(tid)
            if self._upstream is None or self._upstream.is_in_place(tid):
                self._feed.own(tid, oids, self._transaction.id)

        self._begun = False
        try:
            tid = self._storage.tpc_finish(self._metadata, tell)
        except (TransientError, StorageTransactionError):
            # It says that nothing was committed.
            raise
        except Exception as error:
            raise OutcomeUnknown(str(error)) from error
        return Finished(tid if isinstance(tid, bytes) else told[0], oids)

    def _check(self, oid: bytes, serial: bytes) -> None:
        self._storage.checkCurrentSerialInTransaction(oid, serial, self._metadata)
