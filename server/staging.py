"""What a channel stages for a vote to come, in bounded memory.

Operations gather in memory; beyond ``staged_memory_bytes_max`` they are appended to an
unnamed temporary file, by a worker thread, one batch at a time. While a batch is on
its way and as much again has gathered, the channel's socket is not read: so a client
is slowed down by the disk, and the server needs no memory for what it sends.

``Staged`` belongs to the loop, ``Spill`` to one thread at a time: the one that writes
it, then a thread that votes and the writer thread of the database, which read it as
often as they like while its transaction lives. Invariants:

1. Whatever ends a transaction (finish, abort, an error, the channel's end, another
   transaction, the clock), ``discard`` is called, and may be called again.
2. After an error of the disk, of the clock, or when all of them together are too much,
   the rest of the transaction is received and dropped; the vote gets the error.
3. The socket is read again when the last write has ended, for whatever reason.
"""

import asyncio
import logging
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from operator import itemgetter
from struct import Struct
from typing import TYPE_CHECKING, Any, Protocol

import msgpack
from ZODB.POSException import StorageTransactionError

from zeolith.protocol.errors import Overloaded
from zeolith.protocol.limits import Limits
from zeolith.server import blobs
from zeolith.server.committer import Answer, Commit, Phase
from zeolith.server.workers import Workers
from zeolith.storage.blobs import NAMING_FILES

if TYPE_CHECKING:
    from zeolith.server.peer import Peer
    from zeolith.server.served import Served

logger = logging.getLogger(__name__)

# What an operation takes beside its data, about.
OPERATION_BYTES = 200
# What a transaction keeps in memory when all of them keep much.
SPARING_BYTES = 64 * 1024
_LENGTH = Struct(">Q")
_kind_of = itemgetter(0)

Operations = Collection[list[Any]]


class Reading(Protocol):
    """The socket from which operations come."""

    def hold_reading(self) -> None:
        """Read no more."""

    def let_read(self) -> None:
        """Take back one ``hold_reading``."""


class Spill:
    """Operations in a file that has no name: nothing is left of it after a crash."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="zeolith-", buffering=0)  # noqa: SIM115 - see close
        self._end = 0

    def write(self, operations: list[list[Any]]) -> None:
        """Append a batch."""
        packed = msgpack.packb(operations, use_bin_type=True)
        unwritten = memoryview(_LENGTH.pack(len(packed)) + packed)
        while unwritten:
            written = os.pwrite(self._file.fileno(), unwritten, self._end)
            self._end += written
            unwritten = unwritten[written:]

    def __iter__(self) -> Iterator[list[Any]]:
        """The operations, decoded a batch at a time."""
        position = 0
        while position < self._end:
            (length,) = _LENGTH.unpack(self._read(_LENGTH.size, position))
            position += _LENGTH.size
            yield from msgpack.unpackb(self._read(length, position), raw=False)
            position += length

    def close(self) -> None:
        """Let go of the file; harmless if that happened already."""
        self._file.close()

    def _read(self, size: int, position: int) -> bytes:
        parts = []
        while size:
            part = os.pread(self._file.fileno(), size, position)
            if not part:
                raise OSError("a temporary file has lost its end")
            parts.append(part)
            position += len(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class Spilled(Collection[list[Any]]):
    """The operations of a large transaction: first those in the file."""

    def __init__(self, spill: Spill, count: int, rest: list[list[Any]]):
        self._spill = spill
        self._count = count
        self._rest = rest

    def followed_by(self, last: list[list[Any]]) -> "Spilled":
        """These, and then ``last``."""
        return Spilled(self._spill, self._count, [*self._rest, *last])

    def __iter__(self) -> Iterator[list[Any]]:
        yield from self._spill
        yield from self._rest

    def __len__(self) -> int:
        return self._count + len(self._rest)

    def __contains__(self, operation: object) -> bool:
        return any(each == operation for each in self)


class Stock:
    """How much all transactions of a server have staged; belongs to the loop."""

    def __init__(self, bytes_max: int):
        self._bytes_max = bytes_max
        self.bytes = 0
        # How much of it is in memory.
        self.memory_bytes = 0

    def add(self, size: int) -> None:
        """Count ``size`` bytes more; raises Overloaded if they are too many."""
        if self.bytes + size > self._bytes_max:
            raise Overloaded(
                f"there is no room for what transactions send: {self._bytes_max} bytes"
                " of others are there; try again later (staged_bytes_max)"
            )
        self.bytes += size


class Staged:
    """The operations of one transaction until its vote, and its file until the end."""

    def __init__(
        self,
        transaction_id: bytes,
        reading: Reading,
        workers: Workers,
        limits: Limits,
        stock: Stock,
    ):
        self.transaction_id = transaction_id
        # When something happened to it last; see Peer.expire.
        self.touched_at = asyncio.get_running_loop().time()
        self._reading = reading
        self._workers = workers
        self._limits = limits
        self._stock = stock
        # What of the stock is this one's.
        self._stocked_bytes = 0
        self._gathered: list[list[Any]] = []
        self._gathered_bytes = 0
        self._all_bytes = 0
        self._spill: Spill | None = None
        self._spilled_count = 0
        self._is_writing = False
        self._is_holding = False
        self._error: Exception | None = None
        # Whether there are files to come with it.
        self.names_blobs = False
        self._sealed: Callable[[Operations, Exception | None], None] | None = None
        self._is_discarded = False

    def add(self, operations: list[list[Any]]) -> None:
        """More operations; raises StorageTransactionError if they are too many."""
        self.touched_at = asyncio.get_running_loop().time()
        size = sum(map(_size, operations))
        self._all_bytes += size
        if self._all_bytes > self._limits.transaction_bytes_max:
            raise StorageTransactionError(
                f"the transaction has more than {self._limits.transaction_bytes_max}"
                " bytes (transaction_bytes_max)"
            )
        if not self.names_blobs:
            self.names_blobs = not NAMING_FILES.isdisjoint(map(_kind_of, operations))
        if self._error is not None:
            return
        try:
            self._stock.add(size)
        except Overloaded as error:
            self._error = error
            self._forget()
            return
        self._stocked_bytes += size
        self._gathered += operations
        self._keep_in_memory(self._gathered_bytes + size)
        self._spill_gathered()

    def seal(self, sealed: Callable[[Operations, Exception | None], None]) -> None:
        """Call ``sealed`` with all operations as soon as they are where they belong."""
        self._sealed = sealed
        if not self._is_writing:
            self._seal()

    def expire(self, timeout_s: float) -> None:
        """Keep nothing of it any more; its vote will be told why."""
        self._error = blobs.not_heard_of(timeout_s)
        self._forget()

    @property
    def is_idle(self) -> bool:
        """Whether it waits for the client, and holds something meanwhile."""
        has_any = bool(self._gathered) or self._spill is not None
        return has_any and not self._is_writing and self._sealed is None

    @property
    def is_writing(self) -> bool:
        """Whether it waits for the disk."""
        return self._is_writing

    def discard(self) -> None:
        """The transaction has ended."""
        self._is_discarded = True
        self._sealed = None
        self._forget()

    def _keep_in_memory(self, size: int) -> None:
        self._stock.memory_bytes += size - self._gathered_bytes
        self._gathered_bytes = size

    def _spill_gathered(self) -> None:
        limits = self._limits
        bytes_max = limits.staged_memory_bytes_max
        if self._stock.memory_bytes > limits.all_staged_memory_bytes_max:
            bytes_max = min(bytes_max, SPARING_BYTES)
        if self._gathered_bytes <= bytes_max:
            return
        if self._is_writing:
            if not self._is_holding:
                self._is_holding = True
                self._reading.hold_reading()
            return
        batch, self._gathered = self._gathered, []
        self._keep_in_memory(0)
        self._is_writing = True
        self._spilled_count += len(batch)
        writing = self._workers.stage(_append, self._spill, batch)
        writing.add_done_callback(self._written)

    def _written(self, writing: "asyncio.Future[Spill]") -> None:
        self._is_writing = False
        self.touched_at = asyncio.get_running_loop().time()
        error = writing.exception()
        if error is None:
            self._spill = writing.result()
        elif not self._is_discarded:
            assert isinstance(error, Exception)
            self._error = error
        if self._is_discarded or self._error is not None:
            self._forget()
        self._spill_gathered()
        if not self._is_writing:
            self._let_read()
            self._seal()

    def _seal(self) -> None:
        sealed, self._sealed = self._sealed, None
        if sealed is None:
            return
        rest, self._gathered = self._gathered, []
        if self._spill is None:
            sealed(rest, self._error)
        else:
            sealed(Spilled(self._spill, self._spilled_count, rest), self._error)

    def _forget(self) -> None:
        self._gathered = []
        self._keep_in_memory(0)
        self._stock.bytes -= self._stocked_bytes
        self._stocked_bytes = 0
        spill = self._spill
        if spill is not None and not self._is_writing:
            self._spill = None
            try:
                # To free what a large file takes is work for the disk.
                self._workers.stage(spill.close)
            except RuntimeError:
                # The server has stopped; nobody waits for the loop any more.
                spill.close()

    def _let_read(self) -> None:
        if self._is_holding:
            self._is_holding = False
            self._reading.let_read()


def vote(
    peer: "Peer",
    served: "Served",
    commit: Commit,
    last: list[list[Any]],
    limits: Limits,
    answer: Answer,
) -> None:
    """Let ``commit`` vote, as soon as all that was staged for it is at hand.

    ``last`` are the operations that came with the vote.
    """
    names_blobs = not NAMING_FILES.isdisjoint(map(_kind_of, last))
    staged = peer.transactions.take(commit.transaction.id)
    if staged is None and peer.upload is None and not names_blobs:
        commit.transaction.operations = last
        served.committer.vote(commit, answer)
        return
    commit.answer = answer

    def sealed(operations: Operations, error: Exception | None) -> None:
        if commit.phase is Phase.ENDED:
            # Its channel is gone.
            return
        if error is not None:
            if isinstance(error, Overloaded):
                peer.complain(f"cannot commit: {error}")
            served.committer.abandon(commit, error, None)
            return
        commit.transaction.operations = joined(operations, last)
        blobs.vote(peer, served, commit, limits, names_blobs=names_blobs, answer=answer)

    if staged is None:
        sealed([], None)
        return
    names_blobs = names_blobs or staged.names_blobs
    commit.when_ended.append(staged.discard)
    staged.seal(sealed)


def joined(staged: Operations, last: list[list[Any]]) -> Operations:
    """What was staged, and then ``last``."""
    if isinstance(staged, Spilled):
        return staged.followed_by(last)
    return [*staged, *last]


def _append(spill: Spill | None, batch: list[list[Any]]) -> Spill:
    if spill is not None:
        spill.write(batch)
        return spill
    made = Spill()
    try:
        made.write(batch)
    except BaseException:
        made.close()
        raise
    return made


def _size(operation: list[Any]) -> int:
    # Records, and the names of files, which are as long as a client likes.
    variable = (each for each in operation[3:] if isinstance(each, bytes | str))
    return OPERATION_BYTES + sum(map(len, variable))
