"""Blob files on the server's side: uploads on their way in, and reading what is there.

An upload is a file in a folder of this process's own in the storage's blob directory,
and so on the file system of the blobs: to store a blob is to rename it. ``Uploads``
is the folder, ``Upload`` the files of one transaction. All of it waits for the disk and
is called in worker threads; ``Upload`` may be used by several, one after the other.

Invariants:

1. The folder is locked as long as its process lives. One that nobody has locked was
   left by a process that was killed, and goes at the next opening.
2. After ``discard`` nothing of an upload is left but what the storage has taken, and
   nothing comes: ``write`` and ``seal`` do nothing any more, whoever is late.
3. What ``seal`` has returned is on the disk.
"""

import fcntl
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import IO, Any, NamedTuple

from ZODB.interfaces import IBlobStorage
from ZODB.POSException import POSKeyError, StorageTransactionError, Unsupported

from zeolith.storage import conflicts
from zeolith.storage.syncing import sync_path

_PREFIX = ".zeolith-uploads-"
_LOCK = "lock"
_MARK = ".voted"
# Operations that carry a blob, and where what names its file is in them.
_NAME_AT = {"store_blob": 4, "store_shared_blob": 4, "restore_blob": 5}
NAMING_FILES = frozenset(_NAME_AT)
# A blob's record is its class and None: forty bytes. What is longer is not looked into.
BLOB_RECORD_BYTES_MAX = 4096
# For the names of files; next() is atomic.
_numbers = count(1)


class Piece(NamedTuple):
    """A part of a blob: of one size and one text, as read at some place in it."""

    # Of the whole blob.
    size: int
    data: bytes


def name_in(operation: list[Any]) -> int | str | None:
    """What names the file of ``operation``: a number, a file's name; None: no file."""
    at = _NAME_AT.get(operation[0])
    return None if at is None else operation[at]


def has_blobs(storage: Any) -> bool:
    """Whether ``storage`` takes blobs."""
    return bool(IBlobStorage.providedBy(storage))


def is_blob_record(record: bytes) -> bool:
    """ZODB.blob.is_blob_record for records that anybody may have written."""
    if not record or len(record) > BLOB_RECORD_BYTES_MAX:
        return False
    if b"ZODB.blob" not in record:
        return False
    return conflicts.class_alone(record) == ("ZODB.blob", "Blob")


def read_piece(storage: Any, oid: bytes, tid: bytes, offset: int, size: int) -> Piece:
    """Up to ``size`` bytes of a committed blob; raises POSKeyError, Unsupported."""
    if not has_blobs(storage):
        raise Unsupported("this storage has no blobs")
    try:
        with storage.openCommittedBlobFile(oid, tid) as file:
            descriptor = file.fileno()
            whole = os.fstat(descriptor).st_size
            return Piece(whole, os.pread(descriptor, size, offset))
    except FileNotFoundError:
        # Packed away since the storage found it.
        raise POSKeyError(oid) from None


def sync_stored(storage: Any) -> None:
    """See to it that the blob files of a voted transaction survive a power failure.

    FileStorage and BlobStorage list them; ZODB syncs records, but not blobs. Files
    that were uploaded are on the disk already and cost nothing here. A file system
    with a journal brings the directories above with the last one.
    """
    if not has_blobs(storage):
        return
    directories = set()
    for oid, tid in getattr(storage, "dirty_oids", ()):
        path = storage.fshelper.getBlobFilename(oid, tid)
        sync_path(path)
        directories.add(os.path.dirname(path))
    for directory in directories:
        sync_path(directory)


def mark(path: str, oid: bytes, tid: bytes) -> Path:
    """Link the file that a storage is about to take, beside it; see Uploads.sweep.

    Where there are no hard links there is no mark.
    """
    link = Path(path).with_name(f"{oid.hex()}.{tid.hex()}{_MARK}")
    with suppress(OSError):
        os.link(path, link)
    return link


def unmark(marks: list[Path]) -> None:
    """The transaction has ended."""
    while marks:
        with suppress(OSError):
            marks.pop().unlink()


class Uploads:
    """The folder of what is being uploaded to one storage."""

    def __init__(self, storage: Any):
        self._storage = storage
        self._lock = threading.Lock()
        self._folder: Path | None = None
        self._lock_file: IO[bytes] | None = None

    @property
    def shared(self) -> Path:
        """Where clients with the storage's own blob directory leave their files."""
        return Path(self._storage.temporaryDirectory())

    @property
    def _has_directory(self) -> bool:
        # That of a cache has none, nor has that of a FileStorage without blobs.
        return hasattr(getattr(self._storage, "fshelper", None), "base_dir")

    @property
    def _parent(self) -> Path:
        """Where the folder is; not among the temporary files, for those are listed."""
        if self._has_directory:
            return Path(self._storage.fshelper.base_dir)
        return self.shared

    def sweep(self, committed: Callable[[bytes], bool | None]) -> None:
        """Remove what a process that was killed has left.

        What was about to be committed has its place already: a mark tells of it. It
        goes, too, if ``committed`` says that its transaction is not in the log.
        """
        if not self._has_directory:
            # A storage that makes its directory when it is asked for it.
            return
        for folder in self._parent.glob(f"{_PREFIX}*"):
            with suppress(OSError), (folder / _LOCK).open("wb") as lock_file:
                fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for link in folder.glob(f"*{_MARK}"):
                    self._remove_voted(link, committed)
                shutil.rmtree(folder)

    def _remove_voted(
        self, link: Path, committed: Callable[[bytes], bool | None]
    ) -> None:
        oid, tid = map(bytes.fromhex, link.name.removesuffix(_MARK).split("."))
        if committed(tid) is False:
            blob = Path(self._storage.fshelper.getBlobFilename(oid, tid))
            with suppress(FileNotFoundError):
                if blob.samefile(link):
                    blob.unlink()

    def begin(self) -> "Upload":
        """The files of a transaction; nothing is on the disk yet. Any thread."""
        return Upload(self)

    def folder(self) -> Path:
        """The folder, which is made at the first call; raises OSError."""
        with self._lock:
            if self._folder is None:
                folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._parent))
                self._lock_file = (folder / _LOCK).open("wb")
                fcntl.flock(self._lock_file, fcntl.LOCK_EX)
                self._folder = folder
            return self._folder

    def close(self) -> None:
        """Remove the folder and whatever is in it."""
        with self._lock:
            if self._folder is not None and self._lock_file is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._lock_file.close()
                self._folder = None


class Upload:
    """The blob files of one transaction, by the number or the name of each."""

    def __init__(self, uploads: Uploads):
        self._uploads = uploads
        self._lock = threading.Lock()
        self._paths: dict[int | str, Path] = {}
        # Chunks of a blob come together, as a rule: the file written last stays open.
        self._number: int | None = None
        self._file: IO[bytes] | None = None
        self._is_discarded = False

    def write(self, chunks: Iterable[tuple[int, bytes]]) -> None:
        """Append each chunk to the file of its number; raises OSError."""
        with self._lock:
            if self._is_discarded:
                return
            for number, data in chunks:
                if number != self._number:
                    self._open(number)
                assert self._file is not None
                _write_all(self._file, data)

    def flush(self) -> None:
        """Bring what was written so far to the disk, while more is written.

        So the sync at the end is short. Raises OSError.
        """
        with self._lock:
            if self._file is None:
                return
            descriptor = os.dup(self._file.fileno())
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def seal(self, operations: Iterable[list[Any]]) -> dict[int | str, Path]:
        """Everything is written: the file of each name in ``operations``, synced.

        Takes the files that clients have left for ``store_shared_blob``. Raises
        StorageTransactionError for what is not there or is no file, OSError.
        """
        with self._lock:
            if self._is_discarded:
                return {}
            self._finish_file()
            for operation in operations:
                if operation[0] == "store_shared_blob":
                    self._take(operation[4])
            return dict(self._paths)

    def discard(self) -> None:
        """Remove what the storage has not taken; may be called again."""
        with self._lock:
            self._is_discarded = True
            if self._file is not None:
                self._file.close()
                self._file = None
            for path in self._paths.values():
                with suppress(FileNotFoundError):
                    path.unlink()
            self._paths.clear()

    def _open(self, number: int) -> None:
        self._finish_file()
        path = self._paths.get(number)
        if path is None:
            name = f"{next(_numbers)}.upload"
            path = self._paths[number] = self._uploads.folder() / name
        # Unbuffered: a chunk is large, and an error belongs to its write.
        self._file = path.open("ab", buffering=0)
        self._number = number

    def _finish_file(self) -> None:
        file, self._file, self._number = self._file, None, None
        if file is not None:
            with file:
                os.fsync(file.fileno())

    def _take(self, name: str) -> None:
        """Move the file that a client has left into our folder, and look at it there.

        There nobody can put another in its place between the look and the rename.
        """
        shared = self._uploads.shared
        if not name or name.startswith(".") or os.path.basename(name) != name:
            raise StorageTransactionError(f"{name!r:.100} is no name for a blob's file")
        if "\0" in name:
            raise StorageTransactionError("a zero in the name of a blob's file")
        path = self._uploads.folder() / f"{next(_numbers)}.upload"
        source = shared / name
        try:
            if not stat.S_ISREG(source.lstat().st_mode):
                raise StorageTransactionError(f"{name!r:.100} is no file")
            source.rename(path)
        except FileNotFoundError:
            raise StorageTransactionError(
                f"there is no {name!r:.100} among the storage's temporary files; is"
                " blob_dir of the client the server's own blob directory?"
            ) from None
        self._paths[name] = path
        if not stat.S_ISREG(path.lstat().st_mode):
            raise StorageTransactionError(f"{name!r:.100} is no file")
        sync_path(path)


def _write_all(file: IO[bytes], data: bytes) -> None:
    """Write all of ``data``; an unbuffered file may write less, on a disk nearly full.

    What is in the way then, the next write says.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
