"""Where cache files are: a directory of one host, which many processes share.

A database has a file of its own in it, by its id and epoch, so what was cached of one
is never served as another's, even if two databases were given the same directory by
mistake. Beside it lies LMDB's lock file, and one with marks of what was used lately::

    <database id, hex>-<epoch>.lmdb        revisions, see client/cache_file.py
    <database id, hex>-<epoch>.lmdb-lock   LMDB's
    <database id, hex>-<epoch>.used        see client/cache_eviction.py
    <database id, hex>-<epoch>.users       see Presence
    <database id, hex>-<epoch>.verifying   see verifying
    <database id, hex>-<epoch>.hot         see client/warming.py
    <storage>.last                         the name of the file used last as <storage>
    lock                                   held while a file is made, judged or removed

A client must know what is cached before it has a connection, for it says in its hello
where it stands; ``last`` tells it. Called while a storage is opened or connects; any
thread, any process.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import lmdb

from zeolith.client import file_locks

FILE_MODE, DIRECTORY_MODE = 0o600, 0o700
SUFFIX = ".lmdb"
# What shares a file between hosts maps it into memory of each, and they differ.
NETWORK_FILE_SYSTEMS = frozenset(
    {
        "9p",
        "acfs",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "coda",
        "davfs",
        "fuse.ceph",
        "fuse.cephfs",
        "fuse.glusterfs",
        "fuse.s3fs",
        "fuse.sshfs",
        "gfs",
        "gfs2",
        "glusterfs",
        "gpfs",
        "lustre",
        "ncpfs",
        "nfs",
        "nfs4",
        "ocfs2",
        "orangefs",
        "panfs",
        "pvfs2",
        "smb2",
        "smb3",
        "smbfs",
        "vboxsf",
        "virtiofs",
        "webdav",
    }
)
_MOUNTS = Path("/proc/self/mountinfo")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CLEAN = b"clean"
VERIFYING_WAIT_S = 60.0
VERIFYING_POLL_S = 0.05


class Identity(NamedTuple):
    """Which database it is."""

    database_id: bytes
    epoch: int


class CachePlace:
    """A directory of cache files."""

    def __init__(self, directory: str | os.PathLike[str]):
        """Make ``directory`` if need be.

        Raises ValueError if it is on a network file system, and OSError if there can
        be no files in it.
        """
        self.directory = Path(directory)
        self.directory.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        kind = file_system_of(self.directory)
        if kind in NETWORK_FILE_SYSTEMS:
            raise ValueError(
                f"the cache directory {self.directory} is on a network file system"
                f" ({kind}); a cache is shared by the processes of one host: name a"
                " directory on a local disk"
            )
        with self.locked():
            # That files can be made here is found out now, not at the first miss.
            pass

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let nobody else make, judge or remove a file meanwhile; takes moments."""
        with file_locks.locked(str(self.directory / "lock")):
            yield

    def path_of(self, identity: Identity) -> Path:
        """The file of a database."""
        database_id, epoch = identity
        return self.directory / f"{database_id.hex()}-{epoch}{SUFFIX}"

    def files(self) -> Iterator[tuple[Identity, Path]]:
        """All that are here."""
        for path in sorted(self.directory.glob(f"*{SUFFIX}")):
            identity = identity_of(path)
            if identity is not None:
                yield identity, path

    def last(self, storage: str) -> Identity | None:
        """Which database was used last as ``storage``, if it is still cached."""
        try:
            name = self._last_path(storage).read_text()
        except (OSError, UnicodeDecodeError):
            return None
        path = self.directory / name
        return identity_of(path) if name == path.name and path.exists() else None

    def remember(self, storage: str, identity: Identity) -> None:
        """``identity`` is now the one that is used as ``storage``; raises OSError."""
        if self.last(storage) == identity:
            return
        path = self._last_path(storage)
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        fresh.write_text(self.path_of(identity).name)
        fresh.replace(path)

    def _last_path(self, storage: str) -> Path:
        return self.directory / f"{quote(storage, safe='')}.last"


def identity_of(path: Path) -> Identity | None:
    """Whose file it is, by its name; None if it is no such file."""
    database_id, _dash, epoch = path.name.removesuffix(SUFFIX).partition("-")
    try:
        return Identity(bytes.fromhex(database_id), int(epoch))
    except ValueError:
        return None


class Presence:
    """A process at a file, as long as it has it open: known to all, ended by death.

    LMDB does not sync here. What was written survives every death of a process, but not
    that of the machine, unless the last who left has synced. ``.users`` tells: it says
    "clean" then, and else in which run of the machine the file was used last.
    """

    def __init__(self, path: Path):
        """Come to ``path``, be it there or not; the place is locked. Raises OSError."""
        self._path = path.with_suffix(".users")
        self._fd = file_locks.open_lockable(str(self._path), os.O_RDWR | os.O_CREAT)
        # Whether nobody else has it open.
        self.is_alone = file_locks.try_lock(self._fd)
        found = os.pread(self._fd, 100, 0)
        # Whether what is there may be used.
        self.is_trusted = not self.is_alone or found in (_CLEAN, boot_id())

    def stay(self) -> None:
        """The file is used from now on; the place is still locked. Raises OSError."""
        if self.is_alone:
            self._note(boot_id() or b"?")
        file_locks.try_lock(self._fd, shared=True)

    def leave(self, sync: Callable[[], None]) -> None:
        """The file is used no more; calls ``sync`` if nobody else has it open."""
        try:
            if file_locks.try_lock(self._fd):
                sync()
                self._note(_CLEAN)
        finally:
            file_locks.release(self._fd)

    def abandon(self) -> None:
        """Go without a word."""
        file_locks.release(self._fd)

    def _note(self, text: bytes) -> None:
        os.pwrite(self._fd, text, 0)
        os.ftruncate(self._fd, len(text))
        os.fsync(self._fd)


@contextmanager
def verifying(path: Path) -> Iterator[None]:
    """Of all processes only one is inside, for the file ``path``; raises OSError.

    Whoever is may wait for a server, and may have been stopped: nobody waits for ever.
    """
    fd = file_locks.open_lockable(
        str(path.with_suffix(".verifying")), os.O_RDWR | os.O_CREAT
    )
    try:
        deadline = time.monotonic() + VERIFYING_WAIT_S
        while not file_locks.try_lock(fd) and time.monotonic() < deadline:
            time.sleep(VERIFYING_POLL_S)
        yield
    finally:
        file_locks.release(fd)


def companions(path: Path) -> tuple[Path, ...]:
    """What belongs to the file ``path``, but for the mark of who uses it."""
    return path.with_name(f"{path.name}-lock"), path.with_suffix(".used")


def remove(path: Path) -> None:
    """Remove the file of a database; whoever has it open keeps what he has."""
    for each in (path, *companions(path)):
        each.unlink(missing_ok=True)


def is_whole(path: Path) -> bool:
    """Whether all pages are there that the file says it has; LMDB itself does not look.

    To read one that is not there would be a signal that ends the process.
    """
    try:
        size = path.stat().st_size
        with lmdb.open(
            str(path), subdir=False, readonly=True, lock=False, map_size=max(size, 1)
        ) as env:
            pages: int = env.info()["last_pgno"] + 1
            return size >= pages * int(env.stat()["psize"])
    except FileNotFoundError:
        return True
    except (lmdb.Error, OSError):
        return False


def boot_id() -> bytes:
    """What is another one after the next start of the machine; nothing if unknown."""
    try:
        return _BOOT_ID.read_bytes().strip()
    except OSError:
        return b""


def file_system_of(path: Path, mounts: Path = _MOUNTS) -> str:
    """The kind of file system that ``path`` is on; nothing if nobody says."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return ""
    where = path.resolve()
    found, kind = Path(), ""
    for line in lines:
        before, _dash, after = line.partition(" - ")
        # Spaces are written in octal.
        mounted = Path(before.split()[4].encode().decode("unicode_escape"))
        is_ours = mounted == where or mounted in where.parents
        # Of two at one place the later one is on top.
        if is_ours and len(mounted.parts) >= len(found.parts):
            found, kind = mounted, after.split()[0]
    return kind
