"""How the records of a Data.fs are found and read, without a lock.

A Generation is one state of the file: an open descriptor and the index that belongs
to it. A pack replaces both at once, by a new Generation; whoever reads an old one
goes on reading the old file. Records are read with ``preadv``: there is no file
position to share. What is found is on disk, because FileStorage adds a position to
its index only after the fsync, and what the caller has not announced yet is skipped
by ``before``.

Any thread may read; the loop passes ``RWF_NOWAIT`` and gets WouldBlock instead of
waiting for the disk.

The layout of a record (ZODB.FileStorage.format)::

    oid 8 | tid 8 | position of previous record 8 | position of transaction 8 |
    0 2 | length 8 | data, or 8 bytes position of the record that holds the data
"""

import os
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from struct import Struct
from typing import Any, NamedTuple

from ZODB.FileStorage.format import CorruptedDataError
from ZODB.fsIndex import fsIndex
from ZODB.POSException import POSKeyError

from zeolith.storage.database import Revision, WouldBlock

_HEADER = Struct(">8s8sQQHQ")
HEADER_BYTES = 42
assert _HEADER.size == HEADER_BYTES
parse_header = _HEADER.unpack_from
_position = Struct(">Q").unpack_from
# oid and tid, and what tells a record that was removed: length and place of the data.
_parse_tid = Struct(">8s8s18x16s").unpack_from

# A header, and the place of the data where they are in another record.
_HEADER_AND_PLACE = HEADER_BYTES + 8
_LENGTH_AT = HEADER_BYTES - 8
# Of a longer one it is looked up whether there can be a record of that length.
_DOUBTED_BYTES = 1024 * 1024
# What a transaction begins with: its tid, and its length less 8.
_TRANSACTION = Struct(">8sQ")
# A length of zero, and no place either: undo took the object away.
_REMOVED = bytes(16)
# One read gets a header and, for most objects, all of the record.
_READ_BYTES = 4096
NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)
# How many newer revisions the loop looks at to find one: 3 us each.
NOWAIT_NEWER_MAX = 32
# Headers that are not farther apart are read with what is between them: to copy that
# takes no longer than another call.
_GAP_BYTES = 8 * 1024
# What is read at once, about.
_WINDOW_BYTES = 64 * 1024

_Place = tuple[int, bytes]


class Header(NamedTuple):
    """The fixed part of a record."""

    oid: bytes
    tid: bytes
    previous: int
    transaction: int
    version_length: int
    length: int


class Generation:
    """One state of a Data.fs: a descriptor and its index."""

    fd = -1

    def __init__(self, path: str, index: Any):
        self.index = index
        self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        # What fsIndex keeps: a tree of buckets.
        self.buckets = index._data if type(index) is fsIndex else {}
        self._find = _finder(index)
        # The loop's, for a read that keeps nothing of it.
        self._buffer = bytearray(_READ_BYTES)
        self._view = memoryview(self._buffer)
        self._buffers = [self._buffer]

    def duplicate(self) -> int:
        """A descriptor of the same file, for the caller to close."""
        return os.dup(self.fd)

    def close(self) -> None:
        """Close the descriptor; nobody may read any more."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    # Readers of an old generation may still be at work when a pack replaced it, so
    # the last one closes the door.
    __del__ = close

    def load(self, oid: bytes, before: bytes, flags: int = 0) -> Revision | None:
        """See Database.load; ``flags`` is NOWAIT or 0. Raises WouldBlock."""
        end = None
        for header, position, start in self.revisions(oid, flags):
            if header.tid < before:
                data = self._data(header, position, start, flags)
                if data is None:
                    raise POSKeyError(oid)
                return Revision(data, header.tid, end)
            end = header.tid
        if end is None:
            raise POSKeyError(oid)
        return None

    def load_nowait(self, oid: bytes, before: bytes) -> Revision | None:
        """See Database.load_nowait; on the loop only.

        For what nearly every load asks for, a current record of no more than one read,
        it is ``load`` without its generality; anything else is left to it.
        """
        position = self._find(oid) if NOWAIT else None
        if position:
            try:
                have = os.preadv(self.fd, self._buffers, position, NOWAIT)
            except OSError:
                # See _pread.
                raise WouldBlock from None
            if have > HEADER_BYTES:
                known, tid, _previous, _start, _version, size = parse_header(
                    self._buffer
                )
                end = HEADER_BYTES + size
                if known == oid and tid < before and HEADER_BYTES < end <= have:
                    return Revision(bytes(self._view[HEADER_BYTES:end]), tid, None)
        return self.load(oid, before, NOWAIT)

    def load_serial(self, oid: bytes, tid: bytes, flags: int = 0) -> bytes:
        """See Database.load_serial; ``flags`` as for ``load``.

        With NOWAIT it takes a bounded time: what is large or long ago would block.
        """
        for header, position, start in self.revisions(oid, flags):
            if header.tid <= tid:
                data = None
                if header.tid == tid:
                    if flags and header.length > _READ_BYTES:
                        raise WouldBlock
                    data = self._data(header, position, start, flags)
                if data is None:
                    break
                return data
        raise POSKeyError(oid)

    def get_tid(self, oid: bytes, flags: int = 0) -> bytes:
        """See Database.get_tid; ``flags`` as for ``load``."""
        position = self._find(oid)
        if position:
            start = self._read_bytes(position, _HEADER_AND_PLACE, flags, HEADER_BYTES)
            # Without the parts that are not asked for: a vote asks for many.
            if start[:8] != oid or len(start) < HEADER_BYTES:
                raise CorruptedDataError(oid, start[:HEADER_BYTES], position)
            if start[_LENGTH_AT:] != _REMOVED:
                return start[8:16]
        raise POSKeyError(oid)

    def current_tids(self, oids: Iterable[bytes], flags: int = 0) -> dict[bytes, bytes]:
        """The tids of the current revisions of those of ``oids`` that exist.

        As ``get_tid`` says for each. A vote asks for many, and what was written
        together lies side by side: the headers of a hundred are found with one read.
        """
        find = self._find
        places = [(position, oid) for oid in oids if (position := find(oid))]
        tids: dict[bytes, bytes] = {}
        if not places:
            return tids
        for window in _windows(places) if len(places) > 1 else (places,):
            start = window[0][0]
            size = window[-1][0] + _HEADER_AND_PLACE - start
            headers = self._read_bytes(start, size, flags)
            if len(headers) < size:
                raise CorruptedDataError(window[-1][1], b"", window[-1][0])
            for position, oid in window:
                known, tid, rest = _parse_tid(headers, position - start)
                if known != oid:
                    raise CorruptedDataError(oid, known, position)
                if rest != _REMOVED:
                    tids[oid] = tid
        return tids

    def current_tid_nowait(self, oid: bytes) -> bytes | None:
        """The tid of the current revision of one object, None if there is none.

        On the loop only. ``current_tids`` without its generality, for a commit of one
        object is what there is most of.
        """
        position = self._find(oid)
        if not position:
            return None
        if NOWAIT:
            try:
                have = os.preadv(self.fd, self._buffers, position, NOWAIT)
            except OSError:
                # See _pread.
                raise WouldBlock from None
            if have >= _HEADER_AND_PLACE:
                known, tid, rest = _parse_tid(self._buffer)
                if known == oid and rest != _REMOVED:
                    return tid
        return self.current_tids([oid], NOWAIT).get(oid)

    def record_at(self, position: int, oid: bytes) -> tuple[bytes | None, bytes]:
        """The data of the record of ``oid`` at ``position``, and that record's tid."""
        header, start = self._read(position, oid, 0)
        return self._data(header, position, start, 0), header.tid

    @property
    def position_of(self) -> Callable[[bytes], int | None]:
        """Tells where the current record of an oid is; None if there is none."""
        return self._find

    def oid_from(self, first: bytes) -> bytes | None:
        """The smallest oid not smaller than ``first``; None if there is none."""
        try:
            oid: bytes = self.index.minKey(first)
        except ValueError:
            # What an empty BTree says, and one without such a key.
            return None
        return oid

    def revisions(
        self, oid: bytes, flags: int = 0
    ) -> Iterator[tuple[Header, int, bytes]]:
        """The records of ``oid``, newest first: header, position, first bytes.

        With NOWAIT what is long ago would block: an object may have any number.
        """
        position = self._find(oid)
        newer = 0
        while position:
            if flags and newer > NOWAIT_NEWER_MAX:
                raise WouldBlock
            header, start = self._read(position, oid, flags)
            yield header, position, start
            position = _previous(header, start, position)
            newer += 1

    def _data(
        self, header: Header, position: int, start: bytes, flags: int
    ) -> bytes | None:
        """The data of a record; None where undo removed the object."""
        while not header.length:
            before, position = position, _position_in(start)
            if not position:
                return None
            if position >= before:
                # Whoever made up a cursor may have made up a record, too: one that
                # points to itself would be followed for ever.
                raise CorruptedDataError(header.oid, start[:HEADER_BYTES], before)
            header, start = self._read(position, header.oid, flags)
        end = HEADER_BYTES + header.length
        if end <= len(start):
            return start[HEADER_BYTES:end]
        if header.length > _DOUBTED_BYTES:
            self._check_end(header, position, start, flags)
        have = start[HEADER_BYTES:]
        rest = self._read_bytes(position + len(start), end - len(start), flags)
        if len(have) + len(rest) != header.length:
            raise CorruptedDataError(header.oid, start[:HEADER_BYTES], position)
        return have + rest

    def _check_end(
        self, header: Header, position: int, start: bytes, flags: int
    ) -> None:
        """Refuse a record that is not inside its transaction, before memory is taken.

        A single bit of a length that has changed makes gigabytes of it.
        """
        begin = header.transaction
        is_inside = begin < position
        if is_inside:
            head = self._read_bytes(begin, _TRANSACTION.size, flags)
            is_inside = len(head) == _TRANSACTION.size
        if is_inside:
            tid, length = _TRANSACTION.unpack(head)
            end = position + HEADER_BYTES + header.length
            is_inside = tid == header.tid and end <= begin + length
            # Nor is a transaction longer than the file.
            is_inside = is_inside and end <= os.fstat(self.fd).st_size
        if not is_inside:
            raise CorruptedDataError(header.oid, start[:HEADER_BYTES], position)

    def _read(self, position: int, oid: bytes, flags: int) -> tuple[Header, bytes]:
        start = self._read_bytes(position, _READ_BYTES, flags, _HEADER_AND_PLACE)
        if len(start) < HEADER_BYTES:
            raise CorruptedDataError(oid, start, position)
        header = Header._make(parse_header(start))
        if header.oid != oid:
            raise CorruptedDataError(oid, start[:HEADER_BYTES], position)
        return header, start

    def _read_bytes(
        self, position: int, size: int, flags: int, least: int | None = None
    ) -> bytes:
        """Up to ``size`` bytes; fewer than ``least`` only at the end of the file."""
        if least is None:
            least = size
        parts = []
        have = 0
        while have < least:
            # What is cached may end in the middle; then the rest would wait.
            part = self._pread(position + have, size - have, flags)
            if not part:
                break
            parts.append(part)
            have += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _pread(self, position: int, size: int, flags: int) -> bytes:
        if not flags:
            return os.pread(self.fd, size, position)
        buffer = bytearray(size)
        try:
            got = os.preadv(self.fd, [buffer], position, flags)
        except OSError:
            # EAGAIN: not in the page cache. EOPNOTSUPP: a file system that cannot say.
            # An error of the disk comes again, in the reader thread.
            raise WouldBlock from None
        return bytes(buffer[:got]) if got < size else bytes(buffer)


def _windows(places: list[_Place]) -> Iterator[list[_Place]]:
    """``places``, in order, those together whose headers are read at once."""
    # Numbers are compared in half the time that tuples take.
    places.sort(key=itemgetter(0))
    window: list[_Place] = []
    start = end = places[0][0]
    for place in places:
        position = place[0]
        if position - end > _GAP_BYTES or position - start > _WINDOW_BYTES:
            yield window
            window = []
            start = position
        window.append(place)
        end = position
    yield window


def _finder(index: Any) -> Callable[[bytes], int | None]:
    """How the positions of objects are found: what ``index.get`` does, in one call."""
    if type(index) is not fsIndex:
        find: Callable[[bytes], int | None] = index.get
        return find
    bucket_of = index._data.get

    def position_of(oid: bytes) -> int | None:
        bucket = bucket_of(oid[:6])
        if bucket is None:
            return None
        position = bucket.get(oid[6:])
        return None if position is None else int.from_bytes(position, "big")

    return position_of


def _previous(header: Header, start: bytes, position: int) -> int:
    """Where the revision before the one at ``position`` is: nearer the beginning."""
    if header.previous >= position:
        # It would be followed for ever.
        raise CorruptedDataError(header.oid, start[:HEADER_BYTES], position)
    return header.previous


def _position_in(start: bytes) -> int:
    position: int = _position(start, HEADER_BYTES)[0]
    return position
