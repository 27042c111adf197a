"""What the log of a Data.fs says of long ago: exact changes, and which tids it has.

A client that was away for long is told what changed meanwhile, so that it keeps what
did not. Read backwards in large pieces, by a worker thread of the server; nothing here
waits for anybody but the disk, and what is read is bounded.

What a pack has been over is not exact: it takes records out of transactions, and whole
transactions out of the log. It marks those that it leaves ("p"), so nothing is said of
the newest one that has the mark, nor of what is before it.
"""

import logging
from collections.abc import Callable, Collection
from itertools import pairwise
from struct import Struct
from typing import Any, NamedTuple

from zeolith.storage.changes import Change, Known, Past
from zeolith.storage.log import LogReader
from zeolith.storage.records import HEADER_BYTES, parse_header
from zeolith.storage.tids import Z64

logger = logging.getLogger(__name__)

# Read at once, backwards; and forwards in transactions that are larger.
PIECE_BYTES = 1024 * 1024
AHEAD_BYTES = 64 * 1024
# What is told of all at once takes memory: some 100 bytes for each oid.
OIDS_MAX = 2_000_000

_HEADER = Struct(">8sQcHHH")
_LENGTH = Struct(">Q")
# Before the first transaction there are only the four bytes of the magic number.
_START = 4
_PACKED = b"p"


class Damaged(Exception):
    """The log is not one here, so nothing is known of what is before."""


class _Transaction(NamedTuple):
    tid: bytes
    status: bytes
    records: int
    end: int


class _Backwards:
    """A log, from its end to its beginning."""

    def __init__(self, log: LogReader, end: int):
        self._log = log
        # Where the transaction ends that was not read yet.
        self._end = end
        self._data = b""
        self._base = end
        self.bytes_read = 0

    def next(self) -> _Transaction | None:
        """The transaction before the last one; None at the beginning."""
        end = self._end - _LENGTH.size
        if end < _START + _HEADER.size:
            return None
        (length,) = self._unpack(_LENGTH, end, self._end)
        start = end - length
        if start < _START or length < _HEADER.size:
            raise Damaged(f"before position {self._end}")
        tid, said, status, *texts = self._unpack(_HEADER, start, self._end)
        records = start + _HEADER.size + sum(texts)
        if said != length or records > end:
            raise Damaged(f"at position {start}")
        self._end = start
        return _Transaction(tid, status, records, end)

    def oids(self, transaction: _Transaction) -> list[bytes]:
        """The oids that ``transaction`` wrote, each once."""
        oids: dict[bytes, None] = {}
        position, end = transaction.records, transaction.end
        while position < end:
            if position + HEADER_BYTES > end:
                raise Damaged(f"at position {position}")
            offset = self._ahead(position)
            oid, _tid, _previous, _start, _version, length = parse_header(
                self._data, offset
            )
            oids[oid] = None
            position += HEADER_BYTES + (length or 8)
        if position != end:
            raise Damaged(f"before position {end}")
        return list(oids)

    def _unpack(self, struct: Struct, start: int, until: int) -> tuple[Any, ...]:
        """What is at ``start``, of what ends at ``until``: it will be wanted next."""
        data, base = self._data, self._base
        if start < base or start + struct.size > base + len(data):
            base = max(_START, until - PIECE_BYTES)
            if start < base:
                self._read(start, AHEAD_BYTES)
            else:
                self._read(base, until - base)
        return struct.unpack_from(self._data, start - self._base)

    def _ahead(self, position: int) -> int:
        """Where in the data the header at ``position`` is."""
        base = self._base
        if position < base or position + HEADER_BYTES > base + len(self._data):
            self._read(position, AHEAD_BYTES)
        return position - self._base

    def _read(self, position: int, size: int) -> None:
        self._data, self._base = self._log.read(position, size), position
        self.bytes_read += len(self._data)
        if len(self._data) < min(size, self._log.end - position):
            raise Damaged(f"the file ends before position {position + size}")


def changes_before(
    log: LogReader,
    last: bytes,
    position: bytes,
    bytes_max: int,
    id_of: Callable[[bytes], bytes | None] = lambda tid: None,
) -> Past:
    """The changes up to that of ``last``, back to ``position`` if that can be told.

    ``id_of`` tells what clients called transactions. Raises OSError.
    """
    backwards = _Backwards(log, log.end)
    # Newest first: tids, and what each changed; of the last one only the tid counts.
    found: list[tuple[bytes, list[bytes]]] = []
    # Objects change often: one oid is kept for all the changes of each.
    known: dict[bytes, bytes] = {}
    oids_found = 0
    is_all = True
    try:
        while transaction := backwards.next():
            tid = transaction.tid
            if found and tid >= found[-1][0]:
                raise Damaged(f"tids decrease after {tid.hex()}")
            if tid > last:
                if transaction.status == _PACKED or backwards.bytes_read > bytes_max:
                    break
                continue
            if not found and tid != last:
                break
            if tid <= position or _is_enough(transaction, backwards, bytes_max):
                found.append((tid, []))
                is_all = tid > position or transaction.status == _PACKED
                break
            oids = [known.setdefault(oid, oid) for oid in backwards.oids(transaction)]
            found.append((tid, oids))
            oids_found += len(oids)
            if oids_found > OIDS_MAX:
                break
        else:
            # Nothing is before the first transaction.
            found.append((Z64, []))
    except Damaged as error:
        logger.error("the log is damaged: %s", error)
    changes = [
        Change(since, tid, oids, id_of(tid))
        for (tid, oids), (since, _oids) in pairwise(found)
    ]
    changes.reverse()
    return Past(changes, is_all)


def _is_enough(
    transaction: _Transaction, backwards: _Backwards, bytes_max: int
) -> bool:
    return transaction.status == _PACKED or backwards.bytes_read > bytes_max


def last_known(
    log: LogReader, tids: Collection[bytes], last: bytes, bytes_max: int
) -> Known:
    """The last one of ``tids`` that the log up to ``last`` has. Raises OSError."""
    wanted = set(tids)
    oldest = min(wanted, default=last)
    backwards = _Backwards(log, log.end)
    # Below it a transaction may be missing.
    complete_from: bytes | None = None
    at = last
    try:
        while transaction := backwards.next():
            at = transaction.tid
            if at > last:
                continue
            if transaction.status == _PACKED and complete_from is None:
                complete_from = at
            if at in wanted:
                return Known(at, complete_from or at)
            if at < oldest or backwards.bytes_read > bytes_max:
                break
        else:
            at = Z64
    except Damaged as error:
        logger.error("the log is damaged: %s", error)
    return Known(None, complete_from or at)
