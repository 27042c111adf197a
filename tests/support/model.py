"""A database that is a dictionary, and workers that work when the test says so.

With both, a test on one loop decides in which order everything happens, and no thread
is involved.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from ZODB.POSException import ConflictError, POSKeyError

from zeolith.protocol.limits import Limits
from zeolith.server.access import OPEN, Access
from zeolith.server.served import Served
from zeolith.server.service import Service
from zeolith.server.workers import Workers
from zeolith.storage.blobs import Piece
from zeolith.storage.changes import Change, Changes, Known, Past
from zeolith.storage.database import (
    Batch,
    BrokenDatabase,
    CurrentRecord,
    DataRecord,
    Finished,
    LogEntry,
    Prepared,
    Revision,
    Standing,
    Transaction,
    TransactionPiece,
    Unresolved,
    Voted,
    Wish,
    WouldBlock,
)
from zeolith.storage.feed import Listener
from zeolith.storage.locks import ALONE, Claim
from zeolith.storage.pack_progress import Packed, Packing
from zeolith.storage.preparing import claim_of

from .ids import number
from .memory import UNHURRIED


class ModelUpload:
    """The files of a transaction in a dictionary."""

    def __init__(self) -> None:
        self.files: dict[int | str, bytes] = {}
        self.write_error: Exception | None = None
        self.flush_error: Exception | None = None
        self.flushes = 0
        self.is_discarded = False

    def write(self, chunks: list[tuple[int, bytes]]) -> None:
        if self.write_error is not None:
            raise self.write_error
        for number_, data in chunks:
            self.files[number_] = self.files.get(number_, b"") + data

    def flush(self) -> None:
        self.flushes += 1
        if self.flush_error is not None:
            raise self.flush_error

    def seal(self, _operations: list[list[Any]]) -> dict[int | str, Path]:
        return {name: Path(str(name)) for name in self.files}

    def discard(self) -> None:
        self.is_discarded = True


class ModelUploads:
    """Remembers the uploads that were begun."""

    def __init__(self) -> None:
        self.begun: list[ModelUpload] = []

    def begin(self) -> ModelUpload:
        self.begun.append(ModelUpload())
        return self.begun[-1]


class ModelPrepared:
    """A transaction that votes beside others, on a ModelDatabase."""

    def __init__(self, database: "ModelDatabase", transaction: Transaction):
        self.transaction = transaction
        self.has_ended = False
        self._database = database

    def vote_nowait(self) -> Voted:
        if self._database.would_block or self._database.unresolved is not None:
            raise WouldBlock
        result = self.vote({})
        assert isinstance(result, Voted)
        return result

    def vote(self, resolutions: dict[bytes, bytes]) -> Voted | Unresolved:
        database = self._database
        database.steps.append("resolve" if resolutions else "prepare")
        if database.vote_error is not None:
            raise database.vote_error
        if database.unresolved is not None and not resolutions:
            return database.unresolved
        database.validate(self.transaction, resolutions)
        return Voted(None, list(resolutions))

    def end(self) -> None:
        self.has_ended = True


class ModelDatabase:
    """The inner interface over a dictionary: oid -> revisions, oldest first."""

    def __init__(self, name: str = "1", *, is_read_only: bool = False):
        self.name = name
        self.database_id = b"model-database-1"
        self.epoch = 1
        self.is_read_only = is_read_only
        self.tells_own = False
        self.prefetched: list[list[bytes]] = []
        # What can be read in its log, and from where on.
        self.log: list[Change] = []
        self.log_begins = number(0)
        self.log_error: Exception | None = None
        # What is known of any transaction, where ``tells_own``.
        self.known: tuple[str, bytes | None] = ("unknown", None)
        # Whoever follows; a test tells it what it likes.
        self.listener: Listener | None = None
        self.supports_undo = False
        self.interfaces: tuple[str, ...] = ("IStorage",)
        self.takes_blobs = True
        self.uploads: Any = ModelUploads()
        self.revisions: dict[bytes, list[tuple[bytes, bytes]]] = {}
        self.last_tid = number(0)
        self.tid_floor = number(0)
        self.blobs: dict[tuple[bytes, bytes], bytes] = {}
        # The names of the writer's steps that were taken.
        self.steps: list[str] = []
        # What the next steps come to, if not to success.
        self.unresolved: Unresolved | None = None
        self.vote_error: Exception | None = None
        self.finish_error: Exception | None = None
        self.abort_error: Exception | None = None
        self.save_error: Exception | None = None
        # Whether transactions vote beside others.
        self.side_by_side = False
        self.prepared: list[ModelPrepared] = []
        # By the number of the member, what of the next groups fails.
        self.append_errors: dict[int, Exception] = {}
        # What happens elsewhere while the next group is written.
        self.meanwhile: list[Callable[[], None]] = []
        # Whether loads must be made by a reader.
        self.would_block = False
        self._next_oid = 1
        self._voted: Transaction | None = None

    def put(self, oid: bytes, tid: bytes, data: bytes) -> None:
        """There is a record, by no commit that anybody watched."""
        self.revisions.setdefault(oid, []).append((tid, data))
        self.last_tid = max(self.last_tid, tid)

    # loop

    def follow(self, listener: Listener) -> None:
        self.listener = listener

    def load_nowait(self, oid: bytes, before: bytes) -> Revision | None:
        if self.would_block:
            raise WouldBlock
        return self.load(oid, before)

    def near(self) -> None:
        return None

    def claim(self, transaction: Transaction) -> Claim:
        return claim_of(transaction) if self.side_by_side else ALONE

    def prepare(self, transaction: Transaction) -> ModelPrepared:
        self.prepared.append(ModelPrepared(self, transaction))
        return self.prepared[-1]

    # reader

    def last_changes(self) -> tuple[bytes, list[Change]]:
        return self.last_tid, []

    def changes_before(self, last: bytes, position: bytes, bytes_max: int) -> Past:
        self.steps.append("changes before")
        if self.log_error is not None:
            raise self.log_error
        first = max(position, self.log_begins)
        changes = [each for each in self.log if first <= each.since < last]
        return Past(changes, first > position)

    def last_known(self, tids: Collection[bytes], last: bytes, bytes_max: int) -> Known:
        self.steps.append("last known")
        found = [each.tid for each in self.log if each.tid in tids and each.tid <= last]
        return Known(max(found, default=None), self.log_begins)

    def outdated(self, revisions: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        current = {oid: rows[-1][0] for oid, rows in self.revisions.items()}
        return [oid for oid, tid in revisions if current.get(oid) != tid]

    def load(self, oid: bytes, before: bytes) -> Revision | None:
        if oid not in self.revisions:
            raise POSKeyError(oid)
        end = None
        for tid, data in reversed(self.revisions[oid]):
            if tid < before:
                return Revision(data, tid, end)
            end = tid
        return None

    def load_blob(self, oid: bytes, tid: bytes, offset: int, size: int) -> Piece:
        data = self.blobs.get((oid, tid))
        if data is None:
            raise POSKeyError(oid)
        return Piece(len(data), data[offset : offset + size])

    def load_serial(self, oid: bytes, tid: bytes) -> bytes:
        for each, data in self.revisions.get(oid, ()):
            if each == tid:
                return data
        raise POSKeyError(oid)

    def get_tid(self, oid: bytes) -> bytes:
        if oid not in self.revisions:
            raise POSKeyError(oid)
        return self.revisions[oid][-1][0]

    def history(self, oid: bytes, size: int) -> list[LogEntry]:
        return self._log([tid for tid, _data in self.revisions[oid]], size)

    def undo_log(self, before: bytes | None, size: int) -> list[LogEntry]:
        tids = {tid for each in self.revisions.values() for tid, _data in each}
        return self._log([tid for tid in tids if before is None or tid < before], size)

    def transactions(self, wish: Wish, cursor: bytes | None) -> Batch:
        tids = sorted({tid for rows in self.revisions.values() for tid, _data in rows})
        wanted = [tid for tid in tids if wish.start <= tid <= wish.stop]
        if cursor is not None:
            wanted = [tid for tid in wanted if tid > cursor]
        pieces = [
            TransactionPiece(tid, " ", b"", b"", b"", self._records(tid))
            for tid in wanted[:1]
        ]
        return Batch(pieces, None, wanted[0] if len(wanted) > 1 else None)

    def _records(self, tid: bytes) -> list[DataRecord]:
        return [
            DataRecord(oid, tid, data, None)
            for oid, rows in self.revisions.items()
            for each, data in rows
            if each == tid
        ]

    def current_records(
        self, first: bytes | None, before: bytes, bytes_max: int
    ) -> tuple[list[CurrentRecord], bytes | None]:
        oids = sorted(oid for oid in self.revisions if oid >= (first or b""))
        found = self.load(oids[0], before)
        records = [CurrentRecord(oids[0], found.tid, found.data)] if found else []
        return records, oids[1] if len(oids) > 1 else None

    def committed(self, tid: bytes) -> bool | None:
        return any(
            tid == each for rows in self.revisions.values() for each, _data in rows
        )

    def prefetch(self, oids: list[bytes], before: bytes) -> None:
        self.prefetched.append(oids)

    def stop_waiting(self) -> None:
        self.steps.append("stop waiting")

    def catch_up(self) -> None:
        self.steps.append("catch up")

    def standing(self) -> Standing:
        return Standing(self.last_tid, self.database_id, self.epoch)

    def outcome(
        self, transaction_id: bytes, tid: bytes | None, position: bytes
    ) -> tuple[str, bytes | None]:
        return self.known

    def new_oids(self, count: int) -> list[bytes]:
        first, self._next_oid = self._next_oid, self._next_oid + count
        return [number(first + n) for n in range(count)]

    def info(self) -> tuple[int, int]:
        size = sum(len(data) for rows in self.revisions.values() for _tid, data in rows)
        return size, len(self.revisions)

    def pack(
        self, time_s: float, gc: bool | None = None, packing: Packing | None = None
    ) -> Packed:
        self.steps.append("pack")
        return Packed(True, 20, 10)

    def save_index(self) -> bool:
        self.steps.append("save_index")
        if self.save_error is not None:
            raise self.save_error
        return True

    def close(self) -> None:
        self.steps.append("close")

    # writer

    def raise_tid_floor(self, tid: bytes) -> None:
        self.tid_floor = max(self.tid_floor, tid)

    def vote(self, transaction: Transaction) -> Voted | Unresolved:
        self.steps.append("vote")
        assert self._voted is None, "a vote between vote and finish"
        if self.vote_error is not None:
            raise self.vote_error
        if self.unresolved is None:
            self.validate(transaction, {})
        self._voted = transaction
        return self.unresolved or Voted(self._next_tid, [])

    def validate(
        self, transaction: Transaction, resolutions: dict[bytes, bytes]
    ) -> None:
        """Raise ConflictError for a store of what was changed since."""
        for operation in transaction.operations:
            if operation[0] == "store":
                oid, serial = operation[1:3]
                have = self.revisions.get(oid)
                if have and have[-1][0] != serial and oid not in resolutions:
                    raise ConflictError(oid=oid, serials=(have[-1][0], serial))

    def resolve(self, resolutions: dict[bytes, bytes]) -> Voted | Unresolved:
        self.steps.append("resolve")
        assert self._voted is not None, "a resolution without a vote"
        return Voted(self._next_tid, list(resolutions))

    def finish(self) -> Finished:
        self.steps.append("finish")
        transaction, self._voted = self._voted, None
        assert transaction is not None, "finish without a vote"
        if self.finish_error is not None:
            if self.tells_own:
                raise self.finish_error
            raise BrokenDatabase(str(self.finish_error))
        return self._commit(transaction.operations)

    def append(self, group: Sequence[Prepared]) -> list[Finished | Exception]:
        self.steps.append(f"append {len(group)}")
        meanwhile, self.meanwhile = self.meanwhile, []
        for happens in meanwhile:
            happens()
        if self.finish_error is not None:
            raise BrokenDatabase(str(self.finish_error))
        outcomes: list[Finished | Exception] = []
        for number_, prepared in enumerate(group):
            error = self.append_errors.get(number_)
            outcomes.append(error or self._commit(prepared.transaction.operations))
        return outcomes

    def _commit(self, operations: Collection[list[Any]]) -> Finished:
        tid = self._next_tid
        for operation in operations:
            if operation[0] == "store":
                self.put(operation[1], tid, operation[3])
        self.last_tid = tid
        return Finished(tid, [o[1] for o in operations if o[0] == "store"])

    def abort(self) -> None:
        self.steps.append("abort")
        self._voted = None
        if self.abort_error is not None:
            raise self.abort_error

    @property
    def is_in_transaction(self) -> bool:
        """Whether something was voted and neither finished nor aborted."""
        return self._voted is not None

    @property
    def _next_tid(self) -> bytes:
        return number(int.from_bytes(max(self.last_tid, self.tid_floor), "big") + 1)

    @staticmethod
    def _log(tids: list[bytes], size: int) -> list[LogEntry]:
        newest_first = sorted(tids, reverse=True)[:size]
        return [LogEntry(tid, b"", b"", b"", 0) for tid in newest_first]


class HandWorkers(Workers):
    """Workers whose steps wait until the test has them done, one by one."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._writes: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._reads: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._blobs: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._votes: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()

    def write(self, step: Any, *args: Any, **_kwargs: Any) -> "asyncio.Future[Any]":
        return self._queue(self._writes, step, args)

    def read(self, step: Any, *args: Any, **_kwargs: Any) -> "asyncio.Future[Any]":
        return self._queue(self._reads, step, args)

    def vote(self, step: Any, *args: Any, **_kwargs: Any) -> "asyncio.Future[Any]":
        return self._queue(self._votes, step, args)

    def write_blobs(
        self, step: Any, *args: Any, **_kwargs: Any
    ) -> "asyncio.Future[Any]":
        return self._queue(self._blobs, step, args)

    def aside(self, step: Any, *args: Any, **_kwargs: Any) -> "asyncio.Future[Any]":
        return self._queue(self._reads, step, args)

    def look_back(self, step: Any, *args: Any, **_kwargs: Any) -> "asyncio.Future[Any]":
        return self._queue(self._reads, step, args)

    async def close(self, timeout_s: float) -> bool:
        await self.work()
        return True

    @property
    def writes_waiting(self) -> int:
        """How many steps the writer has been asked for and has not done."""
        return len(self._writes)

    async def write_step(self) -> None:
        """The writer does its next step, and the loop hears of it."""
        await self._do(self._writes)

    def write_unheard(self) -> None:
        """The writer does its next step; the loop hears of it at its own next one."""
        self._take(self._writes)

    async def read_step(self) -> None:
        """A reader does its next step, and the loop hears of it."""
        await self._do(self._reads)

    async def blob_step(self) -> None:
        """A thread that writes blobs does its next step, and the loop hears of it."""
        await self._do(self._blobs)

    async def vote_step(self) -> None:
        """A thread that votes does its next step, and the loop hears of it."""
        await self._do(self._votes)

    async def work(self) -> None:
        """Everything is done that there is to do."""
        while queue := self._writes or self._reads or self._blobs or self._votes:
            await self._do(queue)

    def _queue(
        self,
        queue: "deque[tuple[Callable[[], Any], asyncio.Future[Any]]]",
        step: Callable[..., Any],
        args: tuple[Any, ...],
    ) -> "asyncio.Future[Any]":
        future = self._loop.create_future()
        queue.append((lambda: step(*args), future))
        return future

    async def _do(
        self, queue: "deque[tuple[Callable[[], Any], asyncio.Future[Any]]]"
    ) -> None:
        self._take(queue)
        # Callbacks run in the next step of the loop.
        await asyncio.sleep(0)

    @staticmethod
    def _take(queue: "deque[tuple[Callable[[], Any], asyncio.Future[Any]]]") -> None:
        step, future = queue.popleft()
        try:
            future.set_result(step())
        except Exception as error:
            future.set_exception(error)


class ModelServer:
    """A Service over one ModelDatabase, with everything a test wants to look at."""

    def __init__(
        self,
        database: ModelDatabase | None = None,
        limits: Limits = UNHURRIED,
        *,
        is_read_only: bool = False,
        access: Access = OPEN,
    ):
        self.database = database or ModelDatabase()
        self.workers = HandWorkers()
        self.served = Served(
            self.database,
            self.workers,
            Changes(self.database.last_tid),
            info=(0, 0),
            is_read_only=is_read_only,
            limits=limits,
        )
        self.committer = self.served.committer
        self.limits = limits
        self.service = Service({"1": self.served}, limits, access)

    def commit(self, oid: bytes, data: bytes) -> bytes:
        """Somebody has committed, and it is announced; returns the tid."""
        tid = number(int.from_bytes(self.database.last_tid, "big") + 1)
        self.database.put(oid, tid, data)
        publish(self.served, tid, [oid])
        return tid


def publish(
    served: Served, tid: bytes, oids: list[bytes], transaction: bytes | None = None
) -> None:
    """What a committer does when a transaction is on disk."""
    served.announce([served.append(tid, oids, transaction)])
