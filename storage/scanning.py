"""The end of a Data.fs that its saved index does not know, read fast.

Called while a Data.fs is opened, in the thread that opens it. What ZODB's
``read_index`` does record by record, with three reads each, is done here over large
pieces of the file, and for whole, ordinary transactions only: at the first thing that
is not as it should be the scan ends before that transaction, and ``read_index`` goes
on from there, with all its warnings, its recovery and its errors. So a scan never
decides that a file is damaged, and never changes one.

The layouts are described in ``log`` and ``records``.
"""

import logging
import os
import time
from struct import Struct
from typing import Any, NamedTuple

from BTrees.fsBTree import fsBucket
from ZODB._compat import FILESTORAGE_MAGIC

logger = logging.getLogger(__name__)

MAGIC: bytes = FILESTORAGE_MAGIC
# Read at once: enough for a disk to be busy, little enough for the processor's cache.
PIECE_BYTES = 1024**2
PROGRESS_INTERVAL_S = 5.0
# A scan of less is over before anybody asks what takes so long.
TOLD_FROM_BYTES = 64 * 1024**2

_TRANSACTION = Struct(">8sQcHHH")
# oid (as the index splits it), tid, previous record (likewise), transaction with the
# length of the version, length.
_RECORD = Struct(">6s2s8xH6s10sQ")
_NO_VERSION = bytes(2)
_LENGTH = Struct(">Q")
_NOWHERE = bytes(6)


class Scanned(NamedTuple):
    """How far the index is complete now."""

    # Just behind the last transaction that is in the index.
    position: int
    # Of that transaction; None if there was none.
    tid: bytes | None


class _Odd(Exception):
    """A transaction that is for ``read_index`` to judge."""


def scan(fd: int, name: str, index: Any, start: int) -> Scanned:
    """Add what is at and after position ``start`` of a Data.fs to ``index``.

    ``name`` is what the log calls the file; ``index`` is an fsIndex of all transactions
    before ``start``, which nobody else uses meanwhile. Raises OSError if the file
    cannot be read.
    """
    size = os.fstat(fd).st_size
    if os.pread(fd, len(MAGIC), 0) != MAGIC or size <= start:
        return Scanned(start, None)
    scanner = _Scanner(_Window(fd, name, start, size), index)
    scanned = scanner.run(start)
    scanner.window.tell(scanned.position)
    if scanner.inconsistent:
        # FileStorage says so for each of them, and goes on.
        logger.warning(
            "%s: %d records point to a wrong previous revision, the first is at %d",
            name,
            scanner.inconsistent,
            scanner.first_inconsistent,
        )
    return scanned


class _Window:
    """A piece of the file, and how fast it moves."""

    def __init__(self, fd: int, name: str, start: int, size: int):
        self.name = name
        self.size = size
        self.position = start
        self.data = b""
        self._fd = fd
        self._first = start
        self._began = self._told = time.monotonic()
        self._is_told = size - start >= TOLD_FROM_BYTES
        if self._is_told:
            logger.info(
                "%s: %d MB are not in the saved index and have to be read",
                name,
                (size - start) // 10**6,
            )

    def at(self, position: int, size: int) -> int:
        """Where in ``data`` the ``size`` bytes at ``position`` are."""
        offset = position - self.position
        if offset + size > len(self.data):
            self.data = os.pread(self._fd, max(PIECE_BYTES, size), position)
            self.position = position
            if len(self.data) < size:
                raise _Odd
            self._progress()
            return 0
        return offset

    def _progress(self) -> None:
        now = time.monotonic()
        if now - self._told >= PROGRESS_INTERVAL_S:
            self._told = now
            read = self.position - self._first
            logger.info(
                "%s: %d %% of them are read, %d MB/s",
                self.name,
                100 * read // (self.size - self._first),
                read / 10**6 / (now - self._began),
            )

    def tell(self, position: int) -> None:
        """Log that the scan ended at ``position``."""
        if self._is_told:
            took_s = max(time.monotonic() - self._began, 1e-6)
            read_mb = (position - self._first) / 10**6
            logger.info(
                "%s: %d MB were read in %.1f s, %d MB/s",
                self.name,
                read_mb,
                took_s,
                read_mb / took_s,
            )


class _Scanner:
    """Reads transactions into an index."""

    def __init__(self, window: _Window, index: Any):
        self.window = window
        self._name = window.name
        self.inconsistent = 0
        self.first_inconsistent = 0
        # An fsIndex is a tree of buckets: first six bytes of the oid -> other two ->
        # six bytes of the position. Its own methods would take twice the time.
        self._tree = index._data
        self._buckets: dict[bytes, Any] = dict(index._data)

    def run(self, position: int) -> Scanned:
        """Read on from ``position`` as far as everything is in order."""
        tid: bytes | None = None
        size = self.window.size
        try:
            while position < size:
                next_tid, end = self._transaction(position)
                if tid is not None and next_tid <= tid:
                    logger.warning("%s: tids decrease at %d", self._name, position)
                tid, position = next_tid, end
        except _Odd:
            logger.info("%s: not a whole transaction at %d", self._name, position)
        return Scanned(position, tid)

    def _transaction(self, start: int) -> tuple[bytes, int]:
        """Add the transaction at ``start``: its tid, and where the next begins."""
        window = self.window
        offset = window.at(start, _TRANSACTION.size)
        tid, length, status, *texts = _TRANSACTION.unpack_from(window.data, offset)
        records, end = start + _TRANSACTION.size + sum(texts), start + length
        if records > end or end + _LENGTH.size > window.size or status not in b" up":
            raise _Odd
        found: list[tuple[Any, bytes, bytes]] = []
        fresh: dict[bytes, Any] = {}
        if status != b"u":
            self._records(start, records, end, found, fresh)
        offset = window.at(end, _LENGTH.size)
        if _LENGTH.unpack_from(window.data, offset)[0] != length:
            raise _Odd
        # Not before all of it was seen to be in order.
        for bucket, suffix, position in found:
            bucket[suffix] = position
        if fresh:
            self._tree.update(fresh)
            self._buckets.update(fresh)
        return tid, end + _LENGTH.size

    def _records(
        self,
        start: int,
        position: int,
        end: int,
        found: list[tuple[Any, bytes, bytes]],
        fresh: dict[bytes, Any],
    ) -> None:
        """What the records from ``position`` to ``end`` put into the index.

        One loop, for all of the time of a scan is spent here.
        """
        window, buckets, header_bytes = self.window, self._buckets, _RECORD.size
        data, base, unpack = window.data, window.position, _RECORD.unpack_from
        last_offset, append = len(data) - header_bytes, found.append
        where, last_prefix = _LENGTH.pack(start) + _NO_VERSION, b""
        while position < end:
            if position - base > last_offset:
                window.at(position, header_bytes)
                data, base = window.data, window.position
                last_offset = len(data) - header_bytes
            prefix, suffix, high, previous, transaction, length = unpack(
                data, position - base
            )
            if transaction != where or high:
                raise _Odd
            if prefix != last_prefix:
                # The next record is mostly of the same bucket.
                last_prefix, bucket = prefix, buckets.get(prefix)
                if bucket is None:
                    bucket = fresh.setdefault(prefix, fsBucket())
                position_of = bucket.get
            if position_of(suffix, _NOWHERE) != previous:
                self.first_inconsistent = self.first_inconsistent or position
                self.inconsistent += 1
            append((bucket, suffix, position.to_bytes(6, "big")))
            position += header_bytes + (length or 8)
        if position != end:
            raise _Odd
