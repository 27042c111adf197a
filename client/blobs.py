"""Where the files of blobs are: a cache of this host's, or the server's own directory.

``BlobCache`` keeps what it downloaded in a directory that all processes of a host share
and that outlives them. ``SharedBlobs`` reads the server's directory through a file
system that both have. Neither knows how to ask a server: the caller gives
``fetch(oid, tid, file)``, which writes the blob's bytes to ``file`` and may raise.

A revision (oid, tid) of a blob never changes. Its file has its name only when it is
whole. Two threads or processes that want the same one download it once: one holds the
lock on the part file, the others wait, as long as it grows.

All methods may be called by any thread at any time, also in a forked child; ``fetch``
is called by the thread that asks, with no lock held but the one on the blob's own part
file. A path stays for the grace period after it was given (see blob_cleaner); a file
that was opened stays readable for as long as it is open.
"""

import contextlib
import io
import logging
import os
import secrets
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

from ZODB.blob import (
    LAYOUT_MARKER,
    LAYOUTS,
    BlobFile,
    FilesystemHelper,
    set_not_writable,
)
from ZODB.POSException import POSKeyError

from zeolith.client import blob_directory
from zeolith.client.blob_cleaner import GRACE_S, Bound, Cleaner, idle_s, touch
from zeolith.client.blob_directory import READ_ONLY, BlobDirectory, discard, is_full
from zeolith.client.file_locks import is_still_at, open_lockable, release, try_lock

logger = logging.getLogger(__name__)

Fetch = Callable[[bytes, bytes, BinaryIO], object]
T = TypeVar("T")

# A use is marked this often, at most.
TOUCH_INTERVAL_S = 5.0
# A download of somebody else's that does not grow for so long is not waited for.
STALLED_S = 30.0
# Between two looks whether somebody else's download has ended.
LOOK_INTERVAL_S = 0.02
# Caches are no blob directories of a server, even if some software has registered them.
_CACHE_LAYOUTS = {blob_directory.LAYOUT, "zeocache"}


class SharedBlobs:
    """The server's blob directory; only its directory for temporary files is written.

    Raises ValueError if there is no such directory, or if it is a cache.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        path = os.path.abspath(os.fspath(directory))
        if not os.path.isdir(path):
            raise ValueError(
                f"the shared blob directory {path} is not there: it is the server's own"
                " directory, and has to be mounted here"
            )
        with contextlib.suppress(FileNotFoundError):
            with open(os.path.join(path, LAYOUT_MARKER), encoding="utf-8") as file:
                layout = file.read(100).strip()
            if layout in _CACHE_LAYOUTS or layout not in LAYOUTS:
                raise ValueError(
                    f"{path} has the blob layout {layout!r}: it is not the blob"
                    " directory of a server"
                )
        self.directory = path
        self._files = FilesystemHelper(path)

    def path_of(self, oid: bytes, tid: bytes, fetch: Fetch | None = None) -> str:
        """The path of a committed blob.

        Raises POSKeyError if it is not there; ``fetch`` is not used.
        """
        path: str = self._files.getBlobFilename(oid, tid)
        if not os.path.exists(path):
            self._look_again(path)
            if not os.path.exists(path):
                raise POSKeyError(f"no blob file at {path}", oid, tid)
        return path

    def open(
        self, oid: bytes, tid: bytes, blob: Any = None, fetch: Fetch | None = None
    ) -> Any:
        """The committed blob's file, open for reading; see BlobCache.open."""
        path = self.path_of(oid, tid)
        try:
            return _opened(path, blob)
        except FileNotFoundError:
            # A pack removed it.
            raise POSKeyError(f"no blob file at {path}", oid, tid) from None

    def temporary_directory(self) -> str:
        """The server's directory for uncommitted blobs; it is on its file system."""
        return str(self._files.temp_dir)

    def take(self, path: str) -> str:
        """Take over a file for the server; returns where it is now.

        It gets a name of its own in the temporary directory, readable for whoever may
        read that directory. Raises OSError.
        """
        target = os.path.join(self._files.temp_dir, f"{secrets.token_hex(8)}.tmp")
        _move(path, target)
        set_not_writable(target)
        return target

    def adopt(self, oid: bytes, tid: bytes, path: str) -> None:
        """The server has its copy now: remove ours if it is still there."""
        discard(path)

    def close(self) -> None:
        """Nothing is held."""

    def _look_again(self, path: str) -> None:
        """Have a network file system forget what it believes not to be there.

        It asks the server about a directory when it is opened.
        """
        directory = self.directory
        for name in os.path.relpath(os.path.dirname(path), directory).split(os.sep):
            with contextlib.suppress(OSError):
                os.scandir(directory).close()
            directory = os.path.join(directory, name)
        with contextlib.suppress(OSError):
            os.scandir(directory).close()


class BlobCache:
    """Downloaded blobs, up to ``size_bytes`` (None: no bound) in ``directory``.

    Its size is checked when ``check_percent`` of the bound was added by this process.
    The directory is made if need be. Raises ValueError if it belongs to somebody else
    or holds anything but a blob cache.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        size_bytes: int | None = None,
        check_percent: int = 10,
        *,
        grace_s: float = GRACE_S,
    ):
        bound = None
        if size_bytes is not None:
            bound = Bound(size_bytes, check_percent, grace_s)
        self._directory = BlobDirectory(directory)
        self._directory.claim()
        self.directory = self._directory.path
        self.downloads = 0
        self.cleaner = None
        if bound is not None:
            self.cleaner = Cleaner(self._directory, bound)
            self.cleaner.look_unless_lately()
        self._touch_interval_s = min(TOUCH_INTERVAL_S, grace_s / 4)
        # Set when a download of this process's ends.
        self._downloading: dict[str, threading.Event] = {}
        _caches.add(self)

    def path_of(self, oid: bytes, tid: bytes, fetch: Fetch) -> str:
        """The path of a committed blob, downloaded if it is not here.

        It is always the same one, and the file stays for the grace period. Raises what
        ``fetch`` raises, and OSError if there is no room.
        """
        return self._provide(oid, tid, fetch, lambda path: path)

    def open(self, oid: bytes, tid: bytes, blob: Any, fetch: Fetch) -> Any:
        """The committed blob's file, open for reading, downloaded if it is not here.

        A BlobFile of ``blob``; an ordinary file if that is None. Raises what ``fetch``
        raises, and OSError if there is no room; that the file was removed in between
        is no error.
        """
        return self._provide(oid, tid, fetch, lambda path: _opened(path, blob))

    def temporary_directory(self) -> str:
        """This process's directory for uncommitted blobs; it is on our file system."""
        return self._directory.temporary()

    def take(self, path: str) -> str:
        """Take over a file that was handed in; returns where it is now.

        It gets a name of its own in the temporary directory; it is copied if it comes
        from another file system. Raises OSError.
        """
        target = os.path.join(self.temporary_directory(), secrets.token_hex(8))
        _move(path, target)
        return target

    def adopt(self, oid: bytes, tid: bytes, path: str) -> None:
        """Keep the file of a blob that was just committed, or remove it.

        Never raises: the transaction is committed, and the blob can be downloaded.
        """
        try:
            target = self._directory.blob_path(oid, tid)
            os.chmod(path, READ_ONLY)
            os.utime(path)
            size = os.stat(path).st_size
            try:
                os.rename(path, target)
            except FileNotFoundError:
                self._directory.make_room_for(target)
                os.rename(path, target)
            self._count(size)
        except Exception as error:  # noqa: BLE001 - the commit must not look failed
            logger.warning("a committed blob is not kept in the cache: %s", error)
            discard(path)

    def close(self) -> None:
        """Stop cleaning and give up the temporary directory; may be called twice."""
        if self.cleaner is not None:
            self.cleaner.close()
        self._directory.close()

    def _provide(
        self, oid: bytes, tid: bytes, fetch: Fetch, use: Callable[[str], T]
    ) -> T:
        """``use(path)`` while the file is certain to be there."""
        path = self._directory.blob_path(oid, tid)
        part = self._directory.part_path(oid, tid)
        stalled = _Stalled()
        while True:
            if self._is_marked(path):
                # Removed by the cleaner, if the grace period is short, or by hand.
                with contextlib.suppress(FileNotFoundError):
                    return use(path)
            fd = self._open_part(part)
            try:
                if not try_lock(fd):
                    if stalled.is_it_now(os.fstat(fd).st_size):
                        part = os.path.join(
                            self.temporary_directory(), secrets.token_hex(8)
                        )
                    else:
                        self._wait(path)
                elif is_still_at(part, fd):
                    if os.path.exists(path):
                        os.unlink(part)
                    elif self._download(fd, part, path, lambda f: fetch(oid, tid, f)):
                        # The lock on the file is ours until the end of this block.
                        with contextlib.suppress(FileNotFoundError):
                            return use(path)
            finally:
                release(fd)

    def _is_marked(self, path: str) -> bool:
        """Whether the blob is there; then it is marked as used."""
        try:
            mtime = os.stat(path).st_mtime
        except FileNotFoundError:
            return False
        return idle_s(mtime, time.time()) < self._touch_interval_s or touch(path)

    def _open_part(self, part: str) -> int:
        flags = os.O_RDWR | os.O_CREAT
        try:
            return open_lockable(part, flags)
        except FileNotFoundError:
            self._directory.make_room_for(part)
            return open_lockable(part, flags)

    def _download(
        self, fd: int, part: str, path: str, fill: Callable[[BinaryIO], object]
    ) -> bool:
        """Fill the part file, whose lock we hold, and give it its name.

        Returns False if somebody removed it meanwhile. The file is gone if this raises.
        """
        ended = self._downloading.setdefault(path, threading.Event())
        try:
            # A downloader that was killed may have left something.
            os.ftruncate(fd, 0)
            with _Part(fd) as file:
                fill(file)
            os.fchmod(fd, READ_ONLY)
            os.utime(fd)
            if not self._directory.knows_boot:
                os.fsync(fd)
            self._directory.make_room_for(path)
            os.rename(part, path)
        except BaseException as error:
            if not is_still_at(part, fd) and isinstance(error, FileNotFoundError):
                return False
            discard(part)
            if isinstance(error, OSError) and is_full(error):
                raise OSError(
                    error.errno,
                    f"no room for a blob in the cache ({error.strerror})",
                    path,
                ) from error
            raise
        finally:
            self._downloading.pop(path, None)
            ended.set()
        self.downloads += 1
        self._count(os.fstat(fd).st_size)
        return True

    def _wait(self, path: str) -> None:
        """Until a download of this process's has ended, or for a moment."""
        ended = self._downloading.get(path)
        if ended is None:
            time.sleep(LOOK_INTERVAL_S)
        else:
            ended.wait(LOOK_INTERVAL_S)

    def _count(self, size: int) -> None:
        if self.cleaner is not None:
            self.cleaner.added(size)

    def _forget_parent(self) -> None:
        self._downloading = {}
        self._directory.forget_parent()
        if self.cleaner is not None:
            self.cleaner.forget_parent()


class _Part(io.FileIO):
    """The part file, for ``fetch``; nothing is left to write when it is closed."""

    def __init__(self, fd: int):
        super().__init__(fd, "wb", closefd=False)

    def write(self, data: Any, /) -> int:
        """Write all of ``data``; a plain FileIO may write less."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            rest = rest[super().write(rest) :]
        return size


class _Stalled:
    """Whether somebody else's download has stopped growing."""

    def __init__(self) -> None:
        self._size = -1
        self._since = 0.0

    def is_it_now(self, size: int) -> bool:
        now = time.monotonic()
        if size != self._size:
            self._size = size
            self._since = now
        return now - self._since > STALLED_S


def _opened(path: str, blob: Any) -> Any:
    return open(path, "rb") if blob is None else BlobFile(path, "r", blob)


def _move(path: str, target: str) -> None:
    try:
        os.rename(path, target)
    except OSError:
        # Another file system, most likely; if not, this raises the same again.
        try:
            shutil.copyfile(path, target)
        except BaseException:
            discard(target)
            raise
        discard(path)


# Caches of this process, so that a forked child can start with locks of its own.
_caches: "weakref.WeakSet[BlobCache]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    blob_directory.forget_given_up()
    for cache in tuple(_caches):
        cache._forget_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
