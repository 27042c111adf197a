"""A directory of blobs that the processes of a host share, and what lies where in it.

::

    .layout              says that this is such a directory, and nothing else may be
    .lock                held for a moment by who sets up or tidies
    .boot                the boot of the host during which it was used last
    .cleaner             held by the one process that removes blobs
    00 ... ff/OID.TID.blob   the blobs, by the last byte of their oid; read-only
    parts/OID.TID.part   downloads; the downloader holds the lock on its file
    tmp/NAME/            temporary files of one process, which holds tmp/NAME.lock

A blob that has its name is whole and never changes. Who removes one holds the lock on
it, so nobody removes what somebody has locked. Files of other names belong to somebody
else and are left alone.

All methods may be called by any thread; ``temporary`` makes a directory for the process
that calls it, so a forked child has its own.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import threading
from collections.abc import Iterator

from zeolith.client.file_locks import (
    is_still_at,
    locked,
    open_lockable,
    release,
    try_lock,
)

# ZODB and ZEO look into a file of this name, too, and refuse a layout they do not know.
MARKER = ".layout"
LAYOUT = "zeolith-blob-cache-1"
# What may be in a directory that is new to us: what we make before the marker, and what
# a file system has at its top.
_NOBODYS = {".lock", MARKER + ".new", "lost+found"}
_BLOB = re.compile(r"[0-9a-f]{16}\.[0-9a-f]{16}\.blob")
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
# A file that was written so long before the host died was on the disk by then.
UNWRITTEN_S = 120
READ_ONLY = 0o400
# By the path of a blob directory: temporary directories that were given up and not
# empty, with the descriptors of their locks. The next one there is taken from here.
_given_up: dict[str, list[tuple[str, int]]] = {}


class BlobDirectory:
    """The blob directory at ``path``; ``claim`` it before anything else."""

    def __init__(self, path: str | os.PathLike[str]):
        # An application may change its working directory.
        self.path = os.path.abspath(os.fspath(path))
        self.parts = os.path.join(self.path, "parts")
        self.cleaner_lock = os.path.join(self.path, ".cleaner")
        self.knows_boot = os.path.exists(_BOOT_ID)
        self._lock = threading.Lock()
        self._temporary: str | None = None
        self._temporary_fd = -1

    def claim(self) -> None:
        """Make the directory, or see that it is ours; tidy up after the dead.

        Raises ValueError if it is somebody else's or holds something else.
        """
        with contextlib.suppress(FileExistsError):
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            os.mkdir(self.path, 0o700)
        self._check()
        with locked(os.path.join(self.path, ".lock")):
            # Somebody else may have been faster.
            if not self._check():
                _write(os.path.join(self.path, MARKER), LAYOUT)
            os.chmod(self.path, 0o700)
            for name in ("parts", "tmp"):
                os.makedirs(os.path.join(self.path, name), 0o700, exist_ok=True)
            self._distrust_after_boot()
        self.remove_leftovers()

    def blob_path(self, oid: bytes, tid: bytes) -> str:
        """Where the revision is, or would be; always the same."""
        return f"{self.path}/{oid[-1]:02x}/{oid.hex()}.{tid.hex()}.blob"

    def part_path(self, oid: bytes, tid: bytes) -> str:
        """Where the revision is while it is downloaded."""
        return f"{self.parts}/{oid.hex()}.{tid.hex()}.part"

    def make_room_for(self, path: str) -> None:
        """Make the directories on the way to ``path``, even if somebody removed all."""
        parent = os.path.dirname(path)
        if not os.path.isdir(self.parts) or not os.path.isdir(self.path):
            self.claim()
        os.makedirs(parent, 0o700, exist_ok=True)

    def blobs(self) -> Iterator[tuple[float, int, str]]:
        """``(mtime, size in bytes, path)`` of every blob, in no order."""
        for number in range(256):
            try:
                bucket = os.scandir(f"{self.path}/{number:02x}")
            except OSError:
                continue
            with bucket:
                for entry in bucket:
                    if _BLOB.fullmatch(entry.name) is None:
                        continue
                    try:
                        found = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    if stat.S_ISREG(found.st_mode):
                        yield found.st_mtime, found.st_size, entry.path

    def temporary(self) -> str:
        """This process's own directory for temporary files, on the same file system."""
        with self._lock:
            if self._temporary is None or not os.path.isdir(self._temporary):
                if self._temporary_fd >= 0:
                    os.close(self._temporary_fd)
                    self._temporary_fd = -1
                self._temporary = self._make_temporary()
            return self._temporary

    def remove_leftovers(self) -> None:
        """Remove what processes that are dead were writing."""
        for name in _names(self.parts):
            _remove_if_free(os.path.join(self.parts, name))
        tmp = os.path.join(self.path, "tmp")
        for name in _names(tmp):
            if name.endswith(".lock"):
                _remove_if_free(os.path.join(tmp, name), name.removesuffix(".lock"))

    def close(self) -> None:
        """Give up the temporary directory.

        If it is not empty the application has a file there: it stays for whoever opens
        the blob directory next in this process, and goes when the process has.
        """
        with self._lock:
            path, fd = self._temporary, self._temporary_fd
            self._temporary, self._temporary_fd = None, -1
            if path is None:
                return
            try:
                os.rmdir(path)
                os.unlink(path + ".lock")
            except OSError:
                _given_up.setdefault(self.path, []).append((path, fd))
            else:
                os.close(fd)

    def forget_parent(self) -> None:
        """In a forked child: let go of what is the parent's."""
        self._lock = threading.Lock()
        # The copy of the lock is kept: the parent's files may be in use here.
        self._temporary = None
        self._temporary_fd = -1

    def _check(self) -> bool:
        """Whether the directory has our marker; raises ValueError if it is not ours."""
        found = os.stat(self.path)
        if not stat.S_ISDIR(found.st_mode):
            raise ValueError(f"the blob cache {self.path} is not a directory")
        if found.st_uid != os.geteuid():
            raise ValueError(
                f"the blob cache {self.path} belongs to the user {found.st_uid} and"
                f" this process runs as {os.geteuid()}: a blob cache is private"
            )
        try:
            with open(os.path.join(self.path, MARKER), encoding="utf-8") as file:
                layout = file.read(100).strip()
        except FileNotFoundError:
            names = set(os.listdir(self.path))
            if MARKER in names:
                # Another process has claimed it in between.
                return self._check()
            if strangers := sorted(names - _NOBODYS):
                raise ValueError(
                    f"{self.path} is no blob cache and not empty (there is"
                    f" {strangers[0]!r}): a blob cache needs a directory of its own"
                ) from None
            return False
        if layout != LAYOUT:
            raise ValueError(
                f"{self.path} has the blob layout {layout!r} and not {LAYOUT!r}: it is"
                " the blob directory of a server or of other software, and a blob"
                " cache needs a directory of its own"
            )
        return True

    def _distrust_after_boot(self) -> None:
        """Remove blobs that a crash of the host may have cut short.

        Blobs are not synced when they are renamed into place. What was used last before
        the host went down may have been written then; everything older was written out.
        """
        if not self.knows_boot:
            return
        with open(_BOOT_ID, encoding="ascii") as file:
            boot = file.read().strip()
        path = os.path.join(self.path, ".boot")
        try:
            with open(path, encoding="ascii") as file:
                if file.read().strip() == boot:
                    return
        except (FileNotFoundError, UnicodeDecodeError):
            pass
        newest = max((mtime for mtime, _size, _path in self.blobs()), default=0.0)
        for mtime, _size, blob in self.blobs():
            if mtime >= newest - UNWRITTEN_S:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(blob)
        _write(path, boot)

    def _make_temporary(self) -> str:
        given_up = _given_up.get(self.path, [])
        while given_up:
            path, fd = given_up.pop()
            if os.path.isdir(path):
                self._temporary_fd = fd
                return path
            os.close(fd)
        tmp = os.path.join(self.path, "tmp")
        if not os.path.isdir(tmp):
            self.claim()
        while True:
            path = os.path.join(tmp, f"{os.getpid()}-{secrets.token_hex(4)}")
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            # Not opened as other locks are: see forget_parent.
            fd = os.open(path + ".lock", flags, 0o600)
            if try_lock(fd) and is_still_at(path + ".lock", fd):
                os.mkdir(path, 0o700)
                self._temporary_fd = fd
                return path
            # It was taken for a dead process's before it was locked.
            os.close(fd)


def forget_given_up() -> None:
    """In a forked child: they are the parent's."""
    _given_up.clear()


def discard(path: str) -> None:
    """Remove a file that is of no more use, if that is possible."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def remove_locked(path: str, fd: int) -> bool:
    """Remove the file whose lock the caller holds by ``fd``; whether it was there."""
    if not is_still_at(path, fd):
        return False
    os.unlink(path)
    return True


def is_full(error: OSError) -> bool:
    """Whether ``error`` says that a file system or a quota has no more room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _remove_if_free(path: str, beside: str | None = None) -> None:
    """Remove a file that nobody has locked, and the directory ``beside`` it before."""
    try:
        fd = open_lockable(path, os.O_RDWR)
    except OSError:
        return
    try:
        if try_lock(fd) and is_still_at(path, fd):
            if beside is not None:
                directory = os.path.join(os.path.dirname(path), beside)
                shutil.rmtree(directory, ignore_errors=True)
                if os.path.exists(directory):
                    return
            os.unlink(path)
    finally:
        release(fd)


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _write(path: str, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    with open(path + ".new", "w", encoding="ascii") as file:
        file.write(text + "\n")
    os.replace(path + ".new", path)
