"""Room on the disk for what has voted, so that a full disk is noticed at the vote.

A transaction that votes beside others is written when it finishes, and then it is too
late to refuse it. So the vote reserves what it will take, behind the end of the file,
which does not change the file's size: any ZODB may open it. Where the file system
cannot reserve, a finish on a full disk says that nothing was committed.

``take`` and ``give_back`` are called on the loop and never wait; ``make``, ``forget``
and ``release`` in worker threads. No lock is held while the disk is waited for.
Invariant: what is taken fits into what is reserved, unless the disk cannot promise it.
"""

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ZODB.FileStorage.FileStorage import FileStorageQuotaError

from zeolith.storage.disk import Disk

logger = logging.getLogger(__name__)

# So much more is reserved than is wanted, so that most votes need not ask the disk.
AHEAD_BYTES = 8 * 1024 * 1024
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)


class Room:
    """The room behind the end of one Data.fs."""

    def __init__(
        self,
        disk: Disk,
        duplicate: Callable[[], tuple[int, int]],
        end: Callable[[], int],
        quota_bytes: int | None,
    ):
        """``end`` is where the next transaction will begin.

        ``duplicate`` gives a new descriptor of the file, which may be written to, and
        the end that goes with it; it may wait for a pack that replaces the file, and is
        called in worker threads.
        """
        self._disk = disk
        self._duplicate = duplicate
        self._end = end
        self._quota_bytes = quota_bytes
        self._lock = threading.Lock()
        # Of those who have voted and are not in the file yet.
        self._taken_bytes = 0
        # Up to here the disk has promised room.
        self._reserved_upto = 0
        # How often that was forgotten.
        self._round = 0
        self._can_reserve = True

    def take(self, size: int, last_at: int) -> bool:
        """Take room if it is there; raises FileStorageQuotaError.

        ``last_at`` is where in it the last record begins, which is what counts for the
        quota, as FileStorage has it.
        """
        with self._lock:
            wanted_upto = self._wanted_upto(size, last_at)
            if self._can_reserve and wanted_upto > self._reserved_upto:
                return False
            self._taken_bytes += size
            return True

    def make(self, size: int, last_at: int) -> None:
        """Take room, and have the disk find it; raises OSError if it is full.

        And as ``take`` does.
        """
        with self._lock:
            # Raises what is over the quota.
            self._wanted_upto(size, last_at)
            self._taken_bytes += size
            wanted = self._taken_bytes
            before = self._round
        try:
            upto = self._reserve(wanted)
        except BaseException:
            self.give_back(size)
            raise
        with self._lock:
            if self._round == before:
                self._reserved_upto = max(self._reserved_upto, upto)

    def give_back(self, size: int) -> None:
        """Who took room has ended, in the file or not."""
        with self._lock:
            self._taken_bytes -= size

    def forget(self) -> None:
        """The file was cut or replaced: nothing is reserved any more."""
        with self._lock:
            self._reserved_upto = 0
            self._round += 1

    def release(self) -> None:
        """At the end: give back what was reserved; raises OSError."""
        if self._reserved_upto:
            self.forget()
            with self._opened() as (fd, end):
                self._disk.truncate(fd, end)

    def _wanted_upto(self, size: int, last_at: int) -> int:
        # While a group is being appended it counts twice: that is on the safe side.
        start = self._end() + self._taken_bytes
        if self._quota_bytes is not None and start + last_at > self._quota_bytes:
            raise FileStorageQuotaError("The storage quota has been exceeded.")
        return start + size

    def _reserve(self, size: int) -> int:
        """Reserve at least ``size``; where the room ends now."""
        if not self._can_reserve:
            return 0
        try:
            return self._reserve_behind(size)
        except OSError as error:
            if error.errno not in _NO_DESCRIPTOR:
                raise
            # Who is there goes on: what is open can be written. The disk promises
            # nothing for now.
            return 0

    def _reserve_behind(self, size: int) -> int:
        with self._opened() as (fd, end):
            try:
                ahead = size + AHEAD_BYTES
                is_reserved = self._disk.reserve(fd, end, ahead)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                ahead = size
                is_reserved = self._disk.reserve(fd, end, ahead)
        if not is_reserved:
            logger.info("the file system reserves no room; a full disk shows at finish")
            self._can_reserve = False
        return end + ahead

    @contextmanager
    def _opened(self) -> Iterator[tuple[int, int]]:
        """The file, of our own: a pack may close what others have opened.

        Not by its name, which for a moment of ZODB's own pack no file has.
        """
        fd, end = self._duplicate()
        try:
            yield fd, end
        finally:
            os.close(fd)
