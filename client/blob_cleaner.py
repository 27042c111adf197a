"""Keeps a blob cache within its bound, in a thread that is there only while it works.

The cache says what was added (``added``, any thread, never raises). When a share of the
bound has come together in this process, a daemon thread looks through the directory and
removes what was used least recently, until a share of the bound is free again.

Rules:

* One process cleans at a time; who finds that another one has begun since it was its
  turn leaves it at that.
* A blob that was used within the grace period stays: somebody may have been given its
  path and not opened it yet. Only when the cache is far above its bound is the period
  cut, to ``FAR_GRACE_S``.
* A blob is removed under its lock, after a second look at when it was used: ``touch``
  marks it under the lock, too, so a mark is never overlooked.
* Whatever goes wrong is logged; nobody waits for the cleaner and nobody is told.
"""

import heapq
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from zeolith.client.blob_directory import BlobDirectory, remove_locked
from zeolith.client.file_locks import is_still_at, open_lockable, release, try_lock

logger = logging.getLogger(__name__)

GRACE_S = 60.0
FAR_GRACE_S = 10.0
# Times the bound.
FAR_ABOVE = 2
# How many blobs are remembered as the next to go, whatever the size of the cache.
CANDIDATES_MAX = 50_000
# Between two looks whether another process has finished cleaning.
BUSY_S = 1.0
# A process that starts looks at the size unless somebody did so lately.
LATELY_S = 600.0
# How long a mark may wait for somebody who holds the lock for a moment.
TOUCH_WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class Bound:
    """How large a cache may be, and how long a blob is safe in it."""

    size_bytes: int
    # In percent of it: what is added between two runs, and free after one.
    check_percent: int
    grace_s: float = GRACE_S
    far_grace_s: float = FAR_GRACE_S

    def __post_init__(self) -> None:
        if self.size_bytes < 0:
            raise ValueError("the size of a blob cache is not negative")
        if not 0 <= self.check_percent <= 100:
            raise ValueError(
                "the check of a blob cache's size is due after 0 to 100 percent of it"
            )

    @property
    def check_bytes(self) -> int:
        """What may be added until the next run."""
        return self.size_bytes * self.check_percent // 100

    @property
    def goal_bytes(self) -> int:
        """What may remain after a run."""
        return self.size_bytes - min(self.check_bytes, self.size_bytes // 2)

    def protection_s(self, used_bytes: int) -> float:
        """How long a blob must have been idle to go, when so much is used."""
        if used_bytes > FAR_ABOVE * self.size_bytes:
            return min(self.far_grace_s, self.grace_s)
        return self.grace_s


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What a run did and left."""

    removed: int
    removed_bytes: int
    remaining_bytes: int


def idle_s(mtime: float, now: float) -> float:
    """For how long a blob was not used.

    A time in the future comes from a clock that was set back since; it must not protect
    a blob for as long as that.
    """
    return abs(now - mtime)


def touch(path: str) -> bool:
    """Mark a blob as used now; returns False if it is not there (any more)."""
    try:
        fd = open_lockable(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        deadline = time.monotonic() + TOUCH_WAIT_S
        while not try_lock(fd, shared=True) and time.monotonic() < deadline:
            time.sleep(0.001)
        if not is_still_at(path, fd):
            return False
        os.utime(fd)
        return True
    finally:
        release(fd)


def clean(
    directory: BlobDirectory, bound: Bound, is_stopped: Callable[[], bool]
) -> Cleaned:
    """Remove what was used least recently until ``bound.goal_bytes`` are left.

    Called by whoever holds the directory's cleaner lock.
    """
    removed = removed_bytes = 0
    while True:
        sizes: list[int] = [0]
        oldest = heapq.nsmallest(CANDIDATES_MAX, _by_use(directory, sizes))
        remaining = sizes[0]
        before = removed
        for minus_idle_s, size, path in oldest:
            protection_s = bound.protection_s(remaining)
            enough = remaining <= bound.goal_bytes or -minus_idle_s < protection_s
            if enough or is_stopped():
                break
            if _remove_idle(path, protection_s):
                removed += 1
                removed_bytes += size
                remaining -= size
        else:
            # All candidates were looked at: more may be behind them.
            if removed > before and len(oldest) == CANDIDATES_MAX:
                continue
        return Cleaned(removed, removed_bytes, remaining)


def _by_use(
    directory: BlobDirectory, sizes: list[int]
) -> Iterator[tuple[float, int, str]]:
    """All blobs with their idle time, negative; adds their sizes to ``sizes[0]``."""
    now = time.time()
    for mtime, size, path in directory.blobs():
        sizes[0] += size
        yield -idle_s(mtime, now), size, path


def _remove_idle(path: str, protection_s: float) -> bool:
    """Remove a blob unless it is in use; whether it is gone by this."""
    try:
        fd = open_lockable(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        if not try_lock(fd):
            return False
        if idle_s(os.fstat(fd).st_mtime, time.time()) < protection_s:
            return False
        return remove_locked(path, fd)
    finally:
        release(fd)


class Cleaner:
    """Decides when to clean, and does it in a thread of its own."""

    def __init__(self, directory: BlobDirectory, bound: Bound):
        self.bound = bound
        self.last: Cleaned | None = None
        self._directory = directory
        self._changed = threading.Condition()
        self._added_bytes = 0
        # When a run was wanted last; None if it was not since the last one.
        self._due_since: float | None = None
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def added(self, size_bytes: int) -> None:
        """So much came into the cache; never raises and never waits."""
        with self._changed:
            self._added_bytes += size_bytes
            if self._added_bytes > self.bound.check_bytes:
                self._want()

    def look(self) -> None:
        """Clean once, whatever was added."""
        with self._changed:
            self._want()

    def look_unless_lately(self) -> None:
        """Clean once, unless some process did lately.

        Processes that do not live long never add much, and the bound may be a new one.
        """
        try:
            found = os.stat(self._directory.cleaner_lock)
        except FileNotFoundError:
            pass
        else:
            if idle_s(found.st_mtime, time.time()) < LATELY_S:
                return
        self.look()

    def close(self) -> None:
        """No more cleaning; the thread ends soon, and nobody waits for it."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def forget_parent(self) -> None:
        """In a forked child: the parent's thread is not here."""
        self._changed = threading.Condition()
        self._added_bytes = 0
        self._due_since = None
        self._thread = None

    def _want(self) -> None:
        if self._is_closed:
            return
        self._added_bytes = 0
        # The last time counts: a run that begins before it does not see all.
        self._due_since = time.time()
        self._changed.notify_all()
        if self._thread is None:
            thread = threading.Thread(
                target=self._run, name="zeolith-blob-cleaner", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:
                # The interpreter ends, or the process may have no more threads.
                logger.warning("the blob cache cannot be cleaned now: %s", error)
            else:
                self._thread = thread

    def _run(self) -> None:
        while (due_since := self._take_turn()) is not None:
            try:
                self._clean(due_since)
            except Exception:
                logger.exception(
                    "the blob cache %s was not cleaned", self._directory.path
                )

    def _take_turn(self) -> float | None:
        """Since when the next run is wanted; None: there is no more to do."""
        with self._changed:
            due_since, self._due_since = self._due_since, None
            if due_since is None or self._is_closed:
                self._thread = None
                return None
            return due_since

    def _clean(self, due_since: float) -> None:
        path = self._directory.cleaner_lock
        fd = open_lockable(path, os.O_RDWR | os.O_CREAT)
        try:
            while not try_lock(fd):
                if self._pauses(BUSY_S, lambda: False):
                    return
            # Whoever cleans marks when it began.
            if os.fstat(fd).st_size and os.fstat(fd).st_mtime > due_since:
                return
            os.pwrite(fd, b"\n", 0)
            self._directory.remove_leftovers()
            cleaned = clean(self._directory, self.bound, lambda: self._is_closed)
        finally:
            release(fd)
        self.last = cleaned
        if cleaned.removed:
            logger.debug(
                "%s: %d blobs (%d bytes) removed, %d bytes remain",
                self._directory.path,
                cleaned.removed,
                cleaned.removed_bytes,
                cleaned.remaining_bytes,
            )
        if cleaned.remaining_bytes > self.bound.size_bytes:
            self._try_again_later()

    def _try_again_later(self) -> None:
        """What is in use now will not be after the grace period."""
        self._pauses(self.bound.grace_s, lambda: self._due_since is not None)
        self.look()

    def _pauses(self, timeout_s: float, is_over: Callable[[], bool]) -> bool:
        """Wait; returns whether the cache was closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or is_over(), timeout=timeout_s
            )
            return self._is_closed
