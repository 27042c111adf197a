"""How the transactions of a Data.fs are found and listed.

Reads headers, of records only where they are asked for, and unpickles nothing. A
reader has a descriptor of its own, so any thread may use one while the file grows or is
replaced by a pack; ``end`` bounds what it sees to what is committed.

The layout of a transaction (ZODB.FileStorage.format)::

    tid 8 | length - 8 8 | status 1 | user length 2 | description length 2 |
    extension length 2 | user | description | extension | records | length - 8 8
"""

import os
from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple, Self

from zeolith.storage.database import LogEntry
from zeolith.storage.records import HEADER_BYTES, Header, parse_header

_HEADER = Struct(">8sQcHHH")
_LENGTH = Struct(">Q")
# Read at once of a transaction's records, for their headers.
_PIECE_BYTES = 64 * 1024
# Before the first transaction there are only the four bytes of the magic number.
_START = 4


class Entry(NamedTuple):
    """One transaction in the file."""

    tid: bytes
    status: bytes
    user: bytes
    description: bytes
    extension: bytes
    # Of the file: where the records begin, and where they end.
    records: int
    end: int
    # Where the transaction begins.
    position: int

    def as_log_entry(self) -> LogEntry:
        """The entry as the inner interface gives it away."""
        header_bytes = (
            _HEADER.size + len(self.user) + len(self.description) + len(self.extension)
        )
        return LogEntry(
            self.tid,
            self.user,
            self.description,
            self.extension,
            self.end - self.records + header_bytes,
        )


class LogReader:
    """Lists the transactions before position ``end`` of a file.

    ``fd`` is the reader's own from now on, and closed at the end of the with block.
    """

    def __init__(self, fd: int, end: int):
        self.end = end
        self._fd = fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc_info: object) -> None:
        os.close(self._fd)

    def backwards(self) -> Iterator[Entry]:
        """The transactions, newest first."""
        end = self.end
        while end > _START + _HEADER.size:
            (length,) = _LENGTH.unpack(os.pread(self._fd, 8, end - 8))
            start = end - 8 - length
            if start < _START:
                raise OSError(f"the log is damaged before position {end}")
            yield self._entry(start, length)
            end = start

    def forwards(self) -> Iterator[Entry]:
        """The transactions, oldest first."""
        entry = self._entry_from(_START)
        while entry is not None:
            yield entry
            entry = self.entry_after(entry)

    def entry_after(self, entry: Entry) -> Entry | None:
        """The transaction that follows ``entry``; None at the end."""
        return self._entry_from(entry.end + _LENGTH.size)

    def entry_if_at(self, position: int, tid: bytes) -> Entry | None:
        """The transaction ``tid`` if it begins at ``position``, which may be any."""
        least = _HEADER.size + _LENGTH.size
        if not _START <= position <= self.end - least:
            return None
        found, length, *_rest = _HEADER.unpack(
            os.pread(self._fd, _HEADER.size, position)
        )
        end = position + length
        if found != tid or length < _HEADER.size or end + _LENGTH.size > self.end:
            return None
        if _LENGTH.unpack(os.pread(self._fd, _LENGTH.size, end)) != (length,):
            return None
        return self._entry(position, length)

    def read(self, position: int, size: int) -> bytes:
        """Up to ``size`` bytes from ``position`` on; fewer at the end."""
        return os.pread(self._fd, min(size, max(0, self.end - position)), position)

    def entry_at(self, position: int) -> Entry:
        """The transaction that begins at ``position``."""
        head = os.pread(self._fd, _HEADER.size, position)
        return self._entry(position, _HEADER.unpack(head)[1])

    def oids(self, entry: Entry) -> list[bytes]:
        """The oids that the transaction wrote, each once."""
        oids: dict[bytes, None] = {}
        position = base = entry.records
        piece = b""
        while position < entry.end:
            if position - base + HEADER_BYTES > len(piece):
                base = position
                size = min(max(entry.end - base, HEADER_BYTES), _PIECE_BYTES)
                piece = os.pread(self._fd, size, base)
            header = Header._make(parse_header(piece, position - base))
            oids[header.oid] = None
            position += HEADER_BYTES + (header.length or 8)
        return list(oids)

    def _entry_from(self, position: int) -> Entry | None:
        if position >= self.end:
            return None
        entry = self.entry_at(position)
        if not entry.records <= entry.end < self.end:
            raise OSError(f"the log is damaged at position {position}")
        return entry

    def _entry(self, start: int, length: int) -> Entry:
        head = os.pread(self._fd, 512, start)
        tid, _length, status, *lengths = _HEADER.unpack_from(head)
        records = start + _HEADER.size + sum(lengths)
        if records - start > len(head):
            head = os.pread(self._fd, records - start, start)
        texts = []
        position = _HEADER.size
        for text_length in lengths:
            texts.append(head[position : position + text_length])
            position += text_length
        user, description, extension = texts
        end = start + length
        return Entry(tid, status, user, description, extension, records, end, start)
