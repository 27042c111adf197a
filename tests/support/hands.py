"""Hands of simulated clients: one transaction at a time each, step by step.

A *raw* hand uses the storage interface, a *ZODB* hand a ZODB connection. Both do a
transaction in steps that the test calls (begin, read, write, depend, vote, finish or
abort; vote and finish may be one). Steps that may wait for the server run in a thread
of the hand's pool and are futures. Objects are cells and counters, and their values
numbers, whoever writes them.
"""

import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from io import BytesIO
from typing import Any, NamedTuple

import transaction
from BTrees.Length import Length
from persistent import Persistent
from transaction import TransactionManager
from ZODB._compat import PersistentUnpickler
from ZODB.broken import find_global
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.utils import p64, u64

from zeolith.client.storage import ClientStorage

from ..storage.transactions import record
from .history import Revision

WAIT_S = 60


class Cell(Persistent):
    """What cannot be merged."""

    def __init__(self) -> None:
        self.value = 0


class Tally(Persistent):
    """A counter that only the application can merge: no server knows its class."""

    def __init__(self) -> None:
        self.value = 0

    def _p_resolveConflict(self, old: Any, saved: Any, new: Any) -> Any:
        return {"value": saved["value"] + new["value"] - old["value"]}


def value_in(data: bytes) -> Any:
    """The value in the record of a cell or a counter; of others the record."""
    of_class, state = _parts(data)
    if of_class is Length:
        return state
    return data if state is None else state["value"]


def with_value(data: bytes, value: Any) -> bytes:
    """The record of the same object with another value."""
    of_class, _state = _parts(data)
    return record(of_class, value if of_class is Length else {"value": value})


def _parts(data: bytes) -> tuple[Any, Any]:
    unpickler = PersistentUnpickler(find_global, None, BytesIO(data))
    of_class = unpickler.load()
    if of_class not in (Cell, Tally, Length):
        return of_class, None
    return of_class, unpickler.load()


class TellingStorage(ClientStorage):
    """Remembers the tid of each thread's last commit: a ZODB connection does not."""

    def __init__(self, *args: Any, **options: Any):
        self.finished: dict[int, bytes] = {}
        super().__init__(*args, **options)

    def tpc_finish(self, transaction: Any, *args: Any) -> bytes:
        tid = super().tpc_finish(transaction, *args)
        self.finished[threading.get_ident()] = tid
        return tid


class AtOnce(NamedTuple):
    """What became of a transaction that voted and finished in one."""

    # None: a ZODB connection does not tell.
    resolved: list[bytes] | None
    tid: bytes


class Hand:
    """What a raw and a ZODB hand have in common."""

    def __init__(self, name: str, storage: TellingStorage):
        self.name = name
        self.storage = storage
        self._pool = ThreadPoolExecutor(2, f"hand-{name}")

    def close(self) -> None:
        self._pool.shutdown()


class RawHand(Hand):
    """Transactions by the storage interface alone."""

    def begin(self) -> bytes:
        """A new transaction; returns the last tid that it sees."""
        self._metadata = TransactionMetaData()
        self.storage.tpc_begin(self._metadata)
        self.snapshot = self.storage.lastTransaction()
        return self.snapshot

    def read(self, oid: bytes) -> tuple[Revision, bytes | None]:
        """What it sees, and until when that is current as far as it was told."""
        found = self.storage.loadBefore(oid, p64(u64(self.snapshot) + 1))
        assert found is not None, "nothing is there"
        data, tid, end = found
        return Revision(tid, value_in(data)), end

    def write(self, oid: bytes, revision: Revision, value: Any) -> None:
        data = self.storage.loadSerial(oid, revision.tid)
        self.storage.store(
            oid, revision.tid, with_value(data, value), "", self._metadata
        )

    def depend(self, oid: bytes, revision: Revision) -> None:
        self.storage.checkCurrentSerialInTransaction(oid, revision.tid, self._metadata)

    def undo(self, undo_id: bytes) -> None:
        self.storage.undo(undo_id, self._metadata)

    def vote(self) -> "Future[Any]":
        return self._pool.submit(self.storage.tpc_vote, self._metadata)

    def finish(self) -> "Future[bytes]":
        return self._pool.submit(self.storage.tpc_finish, self._metadata)

    def commit_at_once(self) -> "Future[AtOnce]":
        return self._pool.submit(self._commit_at_once)

    def _commit_at_once(self) -> AtOnce:
        commit = self.storage.commit_to_vote(self._metadata)
        resolved = commit.vote_and_finish()
        return AtOnce(resolved, self.storage.tpc_finish(self._metadata))

    def abort(self) -> "Future[None]":
        return self._pool.submit(self.storage.tpc_abort, self._metadata)


class GivenUp(Exception):
    """The transaction is aborted after its vote because the test wants it."""


class Pause:
    """Takes part in a transaction, and stops it after everybody else has voted."""

    transaction_manager = None

    def __init__(self) -> None:
        self.voted: Future[Any] = Future()
        self.goes_on: Future[bool] = Future()

    def sortKey(self) -> str:
        return "~"

    def tpc_vote(self, _transaction: Any) -> None:
        self.voted.set_result(None)
        if not self.goes_on.result(WAIT_S):
            raise GivenUp

    def abort(self, _transaction: Any) -> None:
        pass

    tpc_begin = commit = tpc_finish = tpc_abort = abort


class ZodbHand(Hand):
    """Transactions of a ZODB connection."""

    def __init__(self, name: str, storage: TellingStorage, db: DB):
        super().__init__(name, storage)
        self._manager = TransactionManager()
        self._connection = db.open(self._manager)
        self._committing: Future[Any] | None = None

    def close(self) -> None:
        if self._committing is not None and not self._pause.goes_on.done():
            self._pause.goes_on.set_result(False)
            wait([self._committing])
        self._manager.abort()
        self._connection.close()
        super().close()

    def begin(self) -> bytes:
        """A new transaction; returns the last tid that it sees."""
        self._manager.begin()
        self._committing = None
        self.snapshot = p64(u64(self._connection._storage._start) - 1)
        return self.snapshot

    def read(self, oid: bytes) -> tuple[Revision, bytes | None]:
        """What it sees; until when that is current no connection says."""
        found = self._connection.get(oid)
        if not found._p_changed:
            # Or it is read once, and then only looked at.
            found._p_deactivate()
        value = found.value
        return Revision(found._p_serial, value), None

    def write(self, oid: bytes, _revision: Revision, value: Any) -> None:
        self._connection.get(oid).value = value

    def depend(self, oid: bytes, _revision: Revision) -> None:
        self._connection.readCurrent(self._connection.get(oid))

    def vote(self) -> "Future[Any]":
        pause = self._pause = Pause()
        self._manager.get().join(pause)
        self._committing = self._pool.submit(self._commit)

        def ended(committing: "Future[Any]") -> None:
            if not pause.voted.done():
                pause.voted.set_exception(committing.exception())

        self._committing.add_done_callback(ended)
        return pause.voted

    def commit_at_once(self) -> "Future[AtOnce]":
        return self._pool.submit(self._commit_at_once)

    def _commit_at_once(self) -> AtOnce:
        return AtOnce(None, self._commit())

    def finish(self) -> "Future[bytes]":
        assert self._committing is not None
        self._pause.goes_on.set_result(True)
        return self._committing

    def abort(self) -> "Future[Any]":
        if self._committing is None:
            return self._pool.submit(self._manager.abort)
        if self._pause.voted.exception() is None and not self._pause.goes_on.done():
            self._pause.goes_on.set_result(False)
        committing = self._committing

        def ended() -> None:
            error = committing.exception(WAIT_S)
            self._manager.abort()
            assert error is not None, "it was given up"

        return self._pool.submit(ended)

    def _commit(self) -> bytes:
        # It is the transaction of this thread: without a pause, nobody else is there.
        transaction.manager.manager = self._manager
        self._manager.commit()
        return self.storage.finished[threading.get_ident()]
