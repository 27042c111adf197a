"""A database's transactions and current records, read in batches.

Nothing is kept between two batches: what is needed to go on travels as a *cursor*,
which is the client's to keep and opaque to it. So a client that vanishes leaves
nothing behind, and one that comes back, or finds another server with the same log, goes
on. A cursor is a hint that is checked: where the log has been packed since, or the
cursor was made up, the place is found again by its tid.

Called in reader threads. ``iterate_file`` reads a Data.fs by itself, from a
descriptor of its own; ``iterate_storage`` asks any storage for its iterator.
Extensions are passed on as bytes, never unpickled.
"""

import pickle
from collections.abc import Iterator
from contextlib import closing
from struct import Struct
from struct import error as StructError
from typing import Any

from ZODB.POSException import POSKeyError, StorageError, Unsupported

from zeolith.storage.database import (
    Batch,
    CurrentRecord,
    DataRecord,
    TransactionPiece,
    Wish,
)
from zeolith.storage.log import Entry, LogReader
from zeolith.storage.records import HEADER_BYTES, Generation, Header, parse_header
from zeolith.storage.tids import Z64, following

# What a record and a transaction take in a batch beside their data, about.
_OVERHEAD_BYTES = 64
MAX_TID = b"\xff" * 8

# In a file: tid, position of the transaction, position and oid of the record to go on
# behind (0 and _NO_OID: at the beginning). Of that record, not of the next one: a pack
# may leave the transaction where it is and move the records that it keeps of it.
_FILE_CURSOR = Struct(">8sQQ8s")
# In any other storage: tid, how many records were read, the oid of the last of them.
_STORAGE_CURSOR = Struct(">8sQ8s")
_position = Struct(">Q").unpack_from


# A Data.fs


def iterate_file(
    generation: Generation, end: int, wish: Wish, cursor: bytes | None
) -> Batch:
    """A batch of the log before position ``end``; raises StorageError for a bad cursor.

    A cursor to the rest of a transaction brings that rest alone.
    """
    with LogReader(generation.duplicate(), end) as log:
        reader = _FileReader(generation, log, wish)
        if cursor is None:
            return reader.batch(_first_at(log, wish.start))
        tid, position, record, oid = _unpack(_FILE_CURSOR, cursor)
        entry = log.entry_if_at(position, tid)
        if entry is None:
            # Packed since: positions are others, and the transaction may be gone.
            record = 0
            found = _first_at(log, tid)
            entry = found if found is not None and found.tid == tid else None
            if oid == _NO_OID:
                return reader.batch(found)
        elif oid == _NO_OID:
            return reader.batch(entry)
        if entry is None:
            raise _packed_away(tid)
        return reader.rest(entry, record, oid)


# No object has it: oids are smaller.
_NO_OID = b"\xff" * 8


class _FileReader:
    """Makes one batch from a log."""

    def __init__(self, generation: Generation, log: LogReader, wish: Wish):
        self._generation = generation
        self._log = log
        self._wish = wish
        self._bytes = 0
        self._window = (0, b"")

    def batch(self, entry: Entry | None) -> Batch:
        """Transactions from ``entry`` on."""
        pieces: list[TransactionPiece] = []
        while entry is not None and entry.tid <= self._wish.stop:
            if pieces and self._is_full:
                return Batch(pieces, None, _file_cursor(entry))
            records, rest = self._records(entry, entry.records)
            pieces.append(_piece_of(entry, records))
            following_entry = self._log.entry_after(entry)
            if rest is not None:
                after = None
                if following_entry and following_entry.tid <= self._wish.stop:
                    after = _file_cursor(following_entry)
                return Batch(pieces, rest, after)
            entry = following_entry
        return Batch(pieces, None, None)

    def rest(self, entry: Entry, record: int, oid: bytes) -> Batch:
        """The records of ``entry`` after that of ``oid``, most likely at ``record``."""
        end = self._end_of_record_at(entry, record, oid)
        if end is None:
            end = self._end_of_record(entry, oid)
        records, rest = self._records(entry, end)
        return Batch([_piece_of(entry, records)], rest, None)

    @property
    def _is_full(self) -> bool:
        return self._bytes >= self._wish.bytes_max

    def _records(
        self, entry: Entry, position: int
    ) -> tuple[list[DataRecord], bytes | None]:
        """The records from ``position`` on, and the cursor to what is too much."""
        records: list[DataRecord] = []
        last = position
        self._bytes += _OVERHEAD_BYTES
        while position < entry.end:
            if records and self._is_full:
                return records, _file_cursor(entry, last, records[-1].oid)
            last = position
            header = self._header(entry, position)
            data_tid: bytes | None = None
            data: bytes | None
            if header.length:
                data = self._read(position + HEADER_BYTES, header.length)
            else:
                (back,) = _position(self._read(position + HEADER_BYTES, 8))
                data, data_tid = self._pointed_to(header.oid, back)
            records.append(DataRecord(header.oid, header.tid, data, data_tid))
            self._bytes += len(data or b"") + _OVERHEAD_BYTES
            position += HEADER_BYTES + (header.length or 8)
        return records, None

    def _pointed_to(self, oid: bytes, back: int) -> tuple[bytes | None, bytes | None]:
        if not back:
            return None, None
        return self._generation.record_at(back, oid)

    def _header(self, entry: Entry, position: int) -> Header:
        header = Header._make(parse_header(self._read(position, HEADER_BYTES)))
        size = HEADER_BYTES + (header.length or 8)
        if header.transaction != entry.position or position + size > entry.end:
            raise StorageError(
                f"the log is damaged at position {position}, in transaction"
                f" {entry.tid.hex()}"
            )
        return header

    def _end_of_record_at(self, entry: Entry, position: int, oid: bytes) -> int | None:
        """Where the record of ``oid`` ends that begins at ``position``, if it does."""
        if not entry.records <= position <= entry.end - HEADER_BYTES:
            return None
        header = Header._make(parse_header(self._read(position, HEADER_BYTES)))
        end = position + HEADER_BYTES + (header.length or 8)
        is_it = header.transaction == entry.position and header.oid == oid
        return end if is_it and header.tid == entry.tid and end <= entry.end else None

    def _end_of_record(self, entry: Entry, oid: bytes) -> int:
        position = entry.records
        while position < entry.end:
            header = self._header(entry, position)
            position += HEADER_BYTES + (header.length or 8)
            if header.oid == oid:
                return position
        raise _packed_away(entry.tid)

    def _read(self, position: int, size: int) -> bytes:
        """Bytes of the file; most come with one large read for many records."""
        start, window = self._window
        offset = position - start
        if not 0 <= offset <= len(window) - size:
            window = self._log.read(position, max(size, self._wish.bytes_max))
            self._window = position, window
            offset = 0
            if len(window) < size:
                raise StorageError(f"the log ends before position {position + size}")
        return window[offset : offset + size]


def _first_at(log: LogReader, tid: bytes) -> Entry | None:
    """The first transaction whose tid is not before ``tid``.

    Looked for from both ends at once: most who ask want the beginning or the end.
    """
    later = None
    backwards = log.backwards()
    for earlier in log.forwards():
        if earlier.tid >= tid:
            return earlier
        last = next(backwards)
        if last.tid < tid:
            return later
        later = last
    return None


def _piece_of(entry: Entry, records: list[DataRecord]) -> TransactionPiece:
    return TransactionPiece(
        entry.tid,
        entry.status.decode("latin-1"),
        entry.user,
        entry.description,
        entry.extension,
        records,
    )


def _file_cursor(entry: Entry, record: int = 0, oid: bytes = _NO_OID) -> bytes:
    return _FILE_CURSOR.pack(entry.tid, entry.position, record, oid)


def _unpack(form: Struct, cursor: bytes) -> tuple[Any, ...]:
    try:
        return form.unpack(cursor)
    except StructError:
        raise StorageError("the cursor is none of this storage's") from None


# Any storage


def iterate_storage(storage: Any, wish: Wish, cursor: bytes | None) -> Batch:
    """A batch of what the ``iterator`` of ``storage`` gives."""
    if not hasattr(storage, "iterator"):
        raise Unsupported("this storage cannot be iterated")
    start, skipped, oid = wish.start, 0, _NO_OID
    if cursor is not None:
        start, skipped, oid = _unpack(_STORAGE_CURSOR, cursor)
    pieces: list[TransactionPiece] = []
    size = 0
    with closing(_Closing(storage.iterator(start, wish.stop))) as transactions:
        for transaction in transactions:
            if pieces and size >= wish.bytes_max:
                return Batch(pieces, None, _storage_cursor(transaction.tid))
            if skipped and transaction.tid != start:
                raise _packed_away(start)
            piece, is_whole = _take(transaction, skipped, oid, wish.bytes_max - size)
            pieces.append(piece)
            size += sum(len(each.data or b"") + _OVERHEAD_BYTES for each in piece[-1])
            size += _OVERHEAD_BYTES
            taken = skipped + len(piece.records)
            rest = None
            if not is_whole:
                last = piece.records[-1].oid
                rest = _storage_cursor(transaction.tid, taken, last)
            if skipped:
                return Batch(pieces, rest, None)
            if rest is not None:
                return Batch(pieces, rest, _storage_cursor(following(transaction.tid)))
    if skipped:
        raise _packed_away(start)
    return Batch(pieces, None, None)


def _storage_cursor(tid: bytes, number: int = 0, oid: bytes = _NO_OID) -> bytes:
    return _STORAGE_CURSOR.pack(tid, number, oid)


def _packed_away(tid: bytes) -> StorageError:
    return StorageError(f"transaction {tid.hex()} was packed away while it was read")


class _Closing:
    """An iterator that is closed if it can be: FileStorage's holds a file."""

    def __init__(self, iterator: Any):
        self._iterator = iterator

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterator)

    def close(self) -> None:
        close = getattr(self._iterator, "close", None)
        if close is not None:
            close()


def _take(
    transaction: Any, skipped: int, oid: bytes, bytes_max: int
) -> tuple[TransactionPiece, bool]:
    """The records after the first ``skipped``; whether that was all.

    The last of them must be that of ``oid``: else a pack has removed some.
    """
    records: list[DataRecord] = []
    size = 0
    is_whole = True
    for number, record in enumerate(transaction):
        if number < skipped:
            if number == skipped - 1 and record.oid != oid:
                raise _packed_away(transaction.tid)
            continue
        if records and size >= bytes_max:
            is_whole = False
            break
        data = record.data
        records.append(DataRecord(record.oid, record.tid, data, record.data_txn))
        size += len(data or b"") + _OVERHEAD_BYTES
    status = transaction.status
    piece = TransactionPiece(
        transaction.tid,
        status.decode("latin-1") if isinstance(status, bytes) else status,
        _as_bytes(transaction.user),
        _as_bytes(transaction.description),
        _extension_of(transaction),
        records,
    )
    return piece, is_whole


def _extension_of(transaction: Any) -> bytes:
    # A MappingStorage keeps what it was given by commit.Metadata.
    kept = getattr(transaction, "extension", None)
    if (
        isinstance(kept, dict)
        and isinstance(kept.get("bytes"), bytes)
        and len(kept) == 1
    ):
        return bytes(kept["bytes"])
    if hasattr(transaction, "extension_bytes"):
        return bytes(transaction.extension_bytes)
    return pickle.dumps(kept, 3) if kept else b""


def _as_bytes(text: bytes | str) -> bytes:
    return text.encode() if isinstance(text, str) else text


# Current records


def current_in_file(
    generation: Generation, first: bytes | None, before: bytes, bytes_max: int
) -> tuple[list[CurrentRecord], bytes | None]:
    """Records in the order of oids from ``first`` on, and the oid to go on with."""
    records: list[CurrentRecord] = []
    size = 0
    oid = generation.oid_from(first or Z64)
    while oid is not None and (size < bytes_max or not records):
        try:
            found = generation.load(oid, before)
        except POSKeyError:
            # Deleted, or its creation was undone.
            found = None
        if found is not None:
            records.append(CurrentRecord(oid, found.tid, found.data))
            size += len(found.data)
        size += _OVERHEAD_BYTES
        oid = generation.oid_from(following(oid))
    return records, oid


def current_in_storage(
    storage: Any, first: bytes | None, bytes_max: int
) -> tuple[list[CurrentRecord], bytes | None]:
    """The same from any storage that has ``record_iternext``."""
    if not hasattr(storage, "record_iternext"):
        raise Unsupported("this storage does not list its records")
    records: list[CurrentRecord] = []
    size = 0
    while True:
        oid, tid, data, first = storage.record_iternext(first)
        records.append(CurrentRecord(oid, tid, data))
        size += len(data) + _OVERHEAD_BYTES
        if first is None or size >= bytes_max:
            return records, first
