"""Transactions that waited together go to the end of a Data.fs together.

An Appender belongs to the writer thread of its database; it holds FileStorage's commit
lock while it appends, so undo, restore and a pack's swap are not in its way, and it is
not in theirs. What it writes is what FileStorage would have written.

A file may be cut anywhere by a crash, and any ZODB must open it then. ZODB believes a
transaction whose status is blank and whose length ends before the file does. So

* a group is *one* write, then one sync. What a crash leaves of an append is a part of
  its beginning, and ZODB cuts off the transaction that is not whole. (File systems
  write the data of an append before the new size of the file: ext4, XFS, Btrfs, ZFS.)
* what is too large for one write goes in pieces, with ZODB's mark for a transaction
  under way, "c", in the first one; that is made a blank when all of it is on the disk.
* what a disk took only in part is cut off again, and the cut synced, before anything
  else is written there.

Invariants:

1. Nothing is in the index, and so nothing is loaded, before it is on the disk.
2. A group that could not be written has left nothing, and is told so; the next one may
   go better. If that cannot be said for sure the database is broken: BrokenDatabase.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from struct import Struct
from typing import Any

from ZODB.blob import remove_committed
from ZODB.FileStorage.format import DATA_HDR, DATA_HDR_LEN, TRANS_HDR

from zeolith.storage import blobs
from zeolith.storage.database import BrokenDatabase, Finished, NotCommitted
from zeolith.storage.preparing import Preparation
from zeolith.storage.recent import RecentIds
from zeolith.storage.tids import next_tid

# What is put together in memory for one write; a larger group is written in pieces.
AT_ONCE_BYTES_MAX = 16 * 1024 * 1024
PIECE_BYTES = 1024 * 1024

_WHOLE, _UNDER_WAY = b" ", b"c"
_STATUS_AT = 16
_transaction_header = Struct(TRANS_HDR).pack
_record_header = Struct(DATA_HDR).pack
_length = Struct(">Q").pack

Appended = Finished | Exception
_Member = tuple[bytes, Preparation]


class _Short(Exception):
    """The disk took a part of a write."""


class Appender:
    """Writes groups of transactions to one Data.fs."""

    def __init__(self, file: Any, recent: RecentIds):
        """``file`` is a filestore._DataFile."""
        self._file = file
        self._recent = recent

    def append(self, group: Sequence[Preparation], tid_floor: bytes) -> list[Appended]:
        """Commit ``group`` in its order; the outcome of each, in that order.

        Tids are greater than ``tid_floor`` and than all before. An exception among the
        outcomes says that nothing of that transaction was committed. Raises
        BrokenDatabase if nobody can say what is on the disk.
        """
        file = self._file
        with file._commit_lock:
            tid = max(tid_floor, file._ltid)
            outcomes: list[Appended] = []
            members: list[_Member] = []
            for preparation in group:
                tid = next_tid(time.time(), tid)
                if preparation.transaction.blobs:
                    try:
                        self._place_blobs(tid, preparation)
                    except Exception as error:  # noqa: BLE001 - it is this one's outcome
                        outcomes.append(error)
                        continue
                members.append((tid, preparation))
                outcomes.append(Finished(tid, list(preparation.written)))
            if not members:
                return outcomes
            try:
                self._append(members)
            except NotCommitted as error:
                return [
                    error if isinstance(each, Finished) else each for each in outcomes
                ]
        return outcomes

    def _append(self, members: list[_Member]) -> None:
        file = self._file
        try:
            if file.dirty_oids:
                blobs.sync_stored(file)
            self._recent.note([(tid, each.transaction.id) for tid, each in members])
            places, end = self._write(members)
        except OSError as error:
            file._blob_tpc_abort()
            self._unmark(members)
            raise NotCommitted(
                f"the disk does not take it: {error}; nothing was committed"
            ) from error
        file.extend(places, end, members[-1][0])
        self._unmark(members)

    def _write(self, members: list[_Member]) -> tuple[dict[bytes, int], int]:
        """Have ``members`` on the disk; where their records are, and the new end."""
        file = self._file
        start: int = file._pos
        self._cut_what_is_left(start)
        size = sum(preparation.file_bytes for _tid, preparation in members)
        if size <= AT_ONCE_BYTES_MAX:
            places: dict[bytes, int] = {}
            image = b"".join(self._image(start, members, places, _WHOLE))
            assert len(image) == size, "a transaction changed after its vote"
            try:
                self._put(image, start)
            except (OSError, _Short) as error:
                self._take_back(start)
                if isinstance(error, OSError):
                    raise
            else:
                self._sync()
                return places, start + size
        return self._write_in_pieces(start, members)

    def _write_in_pieces(
        self, start: int, members: list[_Member]
    ) -> tuple[dict[bytes, int], int]:
        places: dict[bytes, int] = {}
        end = start
        try:
            image = self._image(start, members, places, _UNDER_WAY)
            for count, piece in enumerate(_pieces(image)):
                if count == 1:
                    # The mark: no ZODB opens a file that has the rest and not it.
                    self._sync()
                end += self._put_all(piece, end)
        except OSError:
            self._take_back(start)
            raise
        self._sync()
        try:
            self._put_all(_WHOLE, start + _STATUS_AT)
        except OSError as error:
            raise _broken(error) from error
        self._sync()
        return places, end

    def _image(
        self,
        start: int,
        members: list[_Member],
        places: dict[bytes, int],
        status: bytes,
    ) -> Iterator[bytes]:
        """What is to be written at ``start``; ``places`` gets each record's position.

        ``status`` is that of the first transaction; ZODB cuts off all after one that is
        under way.
        """
        find: Callable[[bytes], int | None] = self._file.generation.position_of
        position = start
        for tid, preparation in members:
            transaction = preparation.transaction
            user, description = transaction.user, transaction.description
            extension = transaction.extension
            length = preparation.file_bytes - 8
            at = position
            header = _transaction_header(
                tid, length, status, len(user), len(description), len(extension)
            )
            texts = user + description + extension
            yield header + texts
            position += len(header) + len(texts)
            for oid, data in preparation.records():
                places[oid] = position
                size = len(data)
                yield _record_header(oid, tid, find(oid) or 0, at, 0, size)
                yield data
                position += DATA_HDR_LEN + size
            yield _length(length)
            position += 8
            status = _WHOLE

    # The disk

    @property
    def _fd(self) -> int:
        fd: int = self._file._file.fileno()
        return fd

    def _put(self, data: bytes, position: int) -> None:
        """Write ``data`` with one call; raises _Short, OSError."""
        if self._file.disk.write(self._fd, [data], position) != len(data):
            raise _Short

    def _put_all(self, data: bytes, position: int) -> int:
        """Write all of ``data``; a disk nearly full says so at the second call."""
        rest = memoryview(data)
        while rest:
            written = self._file.disk.write(self._fd, [rest], position)
            rest = rest[written:]
            position += written
        return len(data)

    def _sync(self) -> None:
        try:
            self._file.disk.sync(self._fd)
        except OSError as error:
            # The kernel may have dropped what it could not write, and say so once.
            raise _broken(error) from error

    def _cut_what_is_left(self, end: int) -> None:
        """Of a vote that failed on a full disk, and whose undoing failed, too."""
        file = self._file
        if not file.is_end_clean:
            with file._lock:
                # What FileStorage could not write it would write over this group.
                file._file.flush()
            if os.fstat(self._fd).st_size > end:
                self._take_back(end)
        file.is_end_clean = False

    def _take_back(self, end: int) -> None:
        """Cut off what was written behind ``end``, for good.

        Or a crash might mix it with what is written there next.
        """
        try:
            self._file.disk.truncate(self._fd, end)
            self._file.disk.sync(self._fd)
        except OSError as error:
            raise _broken(error) from error
        self._file.forget_tail()

    # Blobs

    def _place_blobs(self, tid: bytes, preparation: Preparation) -> None:
        """Give the files of the transaction their places; raises OSError and others."""
        marks = preparation.marks
        try:
            for oid, path in preparation.blobs():
                marks.append(blobs.mark(str(path), oid, tid))
                self._file._blob_storeblob(oid, tid, str(path))
        except BaseException:
            self._remove_blobs(tid)
            blobs.unmark(marks)
            raise

    def _remove_blobs(self, tid: bytes) -> None:
        file = self._file
        others = [each for each in file.dirty_oids if each[1] != tid]
        for oid, serial in file.dirty_oids:
            if serial == tid:
                with suppress(FileNotFoundError):
                    remove_committed(file.fshelper.getBlobFilename(oid, serial))
        file.dirty_oids = others

    @staticmethod
    def _unmark(members: list[_Member]) -> None:
        for _tid, preparation in members:
            if preparation.marks:
                blobs.unmark(preparation.marks)


def _pieces(parts: Iterator[bytes]) -> Iterator[bytes]:
    """``parts`` put together to pieces of about PIECE_BYTES."""
    gathered: list[bytes] = []
    size = 0
    for part in parts:
        gathered.append(part)
        size += len(part)
        if size >= PIECE_BYTES:
            yield b"".join(gathered)
            gathered, size = [], 0
    if gathered:
        yield b"".join(gathered)


def _broken(error: OSError) -> BrokenDatabase:
    return BrokenDatabase(
        f"the disk failed while transactions were committed: {error}; whether they were"
        " is known after a restart"
    )
