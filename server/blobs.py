"""Blobs on their way through the server, without the loop ever touching a file.

A channel's chunks are queued here and written by a worker thread, in the order in
which they came; one batch of a channel is with the workers at a time. When too much
waits, the channel's socket is not read until half of it is written: so a client is
slowed down by the disk, and nobody needs memory for what it sends.

All classes belong to the loop. Invariants:

1. An upload ends with its transaction: ``discard`` is called for every reason for
   which a commit, an abort or a channel ends, and may be called again. It removes
   what the storage has not taken.
2. After an error of the disk, or of the clock, the rest of the transaction's chunks is
   received and dropped; the vote gets the error.
3. A vote is handed to the committer when all chunks of its transaction are on disk.
"""

import asyncio
import logging
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ZODB.POSException import POSKeyError, Unsupported

from zeolith.protocol.errors import RemoteProtocolError, TransactionTimeout
from zeolith.protocol.limits import Limits
from zeolith.server.committer import Answer, Commit, Phase

if TYPE_CHECKING:
    from zeolith.server.peer import Peer
    from zeolith.server.served import Served

logger = logging.getLogger(__name__)

Paths = dict[int | str, Path]

# What is handed to a thread at a time: to hand over takes as long as to write 100 KB.
BATCH_BYTES = 512 * 1024
# After so much the disk is told to begin, so that the vote need not wait for all of it.
FLUSH_BYTES = 16 * 1024 * 1024
# So many chunks are a batch, however small they are: each takes memory of its own.
BATCH_CHUNKS = 1000


class Blobs:
    """The methods of the wire that have to do with blobs."""

    def __init__(self, read: Callable[..., object], limits: Limits):
        # Service's way to answer from a reader thread.
        self._read = read
        self._limits = limits
        self.handlers: dict[str, Callable[..., Any]] = {
            "blob_chunk": self._blob_chunk,
            "load_blob": self._load_blob,
        }

    def _blob_chunk(
        self,
        peer: "Peer",
        _number: int,
        transaction_id: bytes,
        blob: int,
        data: bytes,
    ) -> None:
        assert peer.session is not None
        served = peer.session.served
        limits = self._limits
        if not served.database.takes_blobs:
            raise Unsupported("this storage has no blobs")
        if len(data) > limits.batch_bytes_max:
            raise RemoteProtocolError(
                f"a chunk of {len(data)} bytes"
                f" (batch_bytes_max is {limits.batch_bytes_max})"
            )
        upload = peer.upload
        if upload is None or upload.transaction_id != transaction_id:
            # A transaction that was given up before its vote leaves its blobs.
            discard(peer)
            upload = peer.upload = Uploading(served, peer, transaction_id, limits)
        upload.receive(blob, data)

    def _load_blob(
        self, peer: "Peer", number: int, oid: bytes, tid: bytes, offset: int, size: int
    ) -> object:
        assert peer.session is not None
        served = peer.session.served
        if tid >= served.horizon:
            # The file has its place before its record is on the disk, and announced.
            raise POSKeyError(oid)
        limits = self._limits
        size = min(size, limits.batch_bytes_max, limits.record_bytes_max)
        if offset >= 2**63:
            raise ValueError("an offset beyond all files")
        load = served.database.load_blob
        return self._read(peer, number, load, oid, tid, offset, size)


class Uploading:
    """The blobs that one channel sends for one transaction."""

    def __init__(
        self, served: "Served", peer: "Peer", transaction_id: bytes, limits: Limits
    ):
        self.transaction_id = transaction_id
        # When something happened to it last; see Peer.expire.
        self.touched_at = asyncio.get_running_loop().time()
        self._files = served.database.uploads.begin()
        self._workers = served.workers
        self._peer = peer
        self._limits = limits
        self._numbers: set[int] = set()
        self._all_bytes = 0
        # What no thread has been given yet.
        self._queue: list[tuple[int, bytes]] = []
        self._queued_bytes = 0
        self._batch_bytes = min(BATCH_BYTES, limits.blob_backlog_bytes_max // 2)
        # What is not written yet, queued or with a thread.
        self._waiting_bytes = 0
        self._is_writing = False
        self._is_holding = False
        self._unflushed_bytes = 0
        self._is_flushing = False
        # Of the disk; told at the vote.
        self._error: BaseException | None = None
        # Whoever waits for everything to be written.
        self._when_written: Callable[[], None] | None = None
        self._is_discarded = False

    def receive(self, number: int, data: bytes) -> None:
        """One more chunk; raises RemoteProtocolError."""
        self.touched_at = asyncio.get_running_loop().time()
        self._numbers.add(number)
        if len(self._numbers) > self._limits.transaction_blobs_max:
            raise RemoteProtocolError(
                "a transaction with more than"
                f" {self._limits.transaction_blobs_max} blobs (transaction_blobs_max)"
            )
        self._all_bytes += len(data)
        if self._all_bytes > self._limits.transaction_blob_bytes_max:
            raise RemoteProtocolError(
                "the blobs of the transaction have more than"
                f" {self._limits.transaction_blob_bytes_max} bytes"
                " (transaction_blob_bytes_max)"
            )
        if self._error is not None:
            return
        self._queue.append((number, data))
        self._queued_bytes += len(data)
        self._waiting_bytes += len(data)
        if (
            self._waiting_bytes > self._limits.blob_backlog_bytes_max
            or len(self._queue) > BATCH_CHUNKS
        ):
            self._hold_reading()
        if self._has_batch:
            self._write()

    def seal(
        self,
        operations: Collection[list[Any]],
        sealed: Callable[[Paths, BaseException | None], None],
    ) -> None:
        """Call ``sealed`` with the files when everything is written and synced."""

        def written() -> None:
            if self._error is not None:
                sealed({}, self._error)
                return
            sealing = self._workers.write_blobs(self._files.seal, operations)
            sealing.add_done_callback(done)

        def done(sealing: "asyncio.Future[Paths]") -> None:
            error = sealing.exception()
            sealed({} if error else sealing.result(), error)

        self._when_written = written
        self._go_on()

    @property
    def is_idle(self) -> bool:
        """Whether it waits for the client, and holds something meanwhile."""
        return bool(self._numbers) and self._error is None and not self.is_writing

    @property
    def is_writing(self) -> bool:
        """Whether it waits for the disk."""
        return self._is_writing or self._is_flushing

    def expire(self, timeout_s: float) -> None:
        """Keep nothing of it any more; its vote will be told why."""
        self._fail(not_heard_of(timeout_s))

    def discard(self) -> None:
        """The transaction has ended: remove what the storage has not taken."""
        if self._is_discarded:
            return
        self._is_discarded = True
        self._when_written = None
        self._forget_queue()
        self._remove_files()

    @property
    def _has_batch(self) -> bool:
        """Whether it is worth while to trouble a thread."""
        return (
            self._queued_bytes >= self._batch_bytes or len(self._queue) >= BATCH_CHUNKS
        )

    def _remove_files(self) -> None:
        try:
            removing = self._workers.write_blobs(self._files.discard)
        except RuntimeError:
            # The server has stopped; nobody waits for the loop any more.
            self._files.discard()
        else:
            removing.add_done_callback(_log_failure)

    def _hold_reading(self) -> None:
        if not self._is_holding:
            self._is_holding = True
            self._peer.hold_reading()

    def _let_read(self) -> None:
        if self._is_holding:
            self._is_holding = False
            self._peer.let_read()

    def _forget_queue(self) -> None:
        self._queue.clear()
        self._queued_bytes = 0

    def _write(self) -> None:
        if self._is_writing or not self._queue:
            return
        batch, self._queue, self._queued_bytes = self._queue, [], 0
        self._is_writing = True
        writing = self._workers.write_blobs(self._files.write, batch)
        writing.add_done_callback(partial(self._written, sum(map(_size, batch))))

    def _written(self, size: int, writing: "asyncio.Future[None]") -> None:
        self._is_writing = False
        self.touched_at = asyncio.get_running_loop().time()
        self._waiting_bytes -= size
        self._unflushed_bytes += size
        self._heed(writing)
        self._flush()
        if not self._queue:
            self._waiting_bytes = 0
        if (
            self._waiting_bytes <= self._limits.blob_backlog_bytes_max // 2
            and len(self._queue) < BATCH_CHUNKS
        ):
            self._let_read()
        self._go_on()

    def _flush(self) -> None:
        if self._unflushed_bytes < FLUSH_BYTES or self._is_flushing:
            return
        if self._is_discarded or self._when_written is not None:
            return
        self._unflushed_bytes = 0
        self._is_flushing = True

        def flushed(flushing: "asyncio.Future[None]") -> None:
            self._is_flushing = False
            self.touched_at = asyncio.get_running_loop().time()
            self._heed(flushing)
            self._go_on()

        self._workers.write_blobs(self._files.flush).add_done_callback(flushed)

    def _heed(self, step: "asyncio.Future[None]") -> None:
        error = step.exception()
        if error is not None and not self._is_discarded:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Remember an error for the vote, and free what the transaction takes."""
        self._error = error
        self._forget_queue()
        # Not at the end of the transaction: the disk may be full.
        self._remove_files()

    def _go_on(self) -> None:
        """Write what is worth it; to the last byte if somebody waits for that."""
        written = self._when_written
        if written is not None or self._has_batch:
            self._write()
        # An error of the disk is told once: to the flush, if one is going on.
        if written is not None and not self._is_writing and not self._is_flushing:
            self._when_written = None
            written()


def discard(peer: "Peer", transaction_id: bytes | None = None) -> None:
    """Let go of what ``peer`` has uploaded, for ``transaction_id`` or for any."""
    upload = peer.upload
    if upload is not None and transaction_id in (None, upload.transaction_id):
        peer.upload = None
        upload.discard()


def vote(
    peer: "Peer",
    served: "Served",
    commit: Commit,
    limits: Limits,
    *,
    names_blobs: bool,
    answer: Answer,
) -> None:
    """Let ``commit`` vote, as soon as its blobs are on disk.

    ``names_blobs``: whether one of its operations wants a file; they are not looked at
    here, for they may be on disk themselves.
    """
    transaction = commit.transaction
    upload = peer.upload
    if upload is not None and upload.transaction_id != transaction.id:
        discard(peer)
        upload = None
    peer.upload = None
    if upload is None:
        if not names_blobs:
            served.committer.vote(commit, answer)
            return
        upload = Uploading(served, peer, transaction.id, limits)
    commit.when_ended.append(upload.discard)
    commit.answer = answer

    def sealed(paths: Paths, error: BaseException | None) -> None:
        if commit.phase is not Phase.WAITING:
            # Its channel is gone.
            return
        if error is None:
            transaction.blobs = paths
            served.committer.vote(commit, answer)
            return
        if isinstance(error, OSError):
            logger.error("a blob of %s could not be written: %s", peer.address, error)
        served.committer.abandon(commit, error, None)  # type: ignore[arg-type]

    upload.seal(transaction.operations, sealed)


def not_heard_of(timeout_s: float) -> TransactionTimeout:
    """What the vote is told of a transaction for which the server waited too long."""
    return TransactionTimeout(
        f"the server has heard nothing of the transaction for {timeout_s:g} s"
        " before its vote (transaction-timeout); nothing of it was kept"
    )


def _size(chunk: tuple[int, bytes]) -> int:
    return len(chunk[1])


def _log_failure(removing: "asyncio.Future[None]") -> None:
    error = removing.exception()
    if error is not None:
        logger.error("an uploaded blob could not be removed: %s", error)
