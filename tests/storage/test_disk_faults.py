"""A disk that is full, or fails, at every step of a vote once.

The faults are below Python's write buffers, where the kernel has them: what was
refused stays in the buffer and is tried again by whatever touches the file next.
"""

import errno
import io
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ZODB.FileStorage import FileStorage

from zeolith.storage.database import BrokenDatabase
from zeolith.storage.filestore import FileStore
from zeolith.storage.tids import MAX_TID, Z64

from ..support.ids import number
from .transactions import A, plain, store, transaction

SIZES = [50, 3000, 100_000]


class Disk:
    """Counts what is done to a file, and fails at the step that it is told to."""

    def __init__(self, fails_at: int, *, stays_full: bool, steps: tuple[str, ...]):
        self._fails_at = fails_at
        self._stays_full = stays_full
        self._steps = steps
        self._count = 0
        self.failures = 0

    def step(self, name: str) -> None:
        if name not in self._steps:
            return
        self._count += 1
        if self._count == self._fails_at or (
            self._stays_full and self._count > self._fails_at
        ):
            self.failures += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def is_repaired(self) -> None:
        self._steps = ()


class FileOnDisk(io.FileIO):
    """A file on a `Disk`."""

    disk: Disk

    def write(self, data: Any) -> int:
        self.disk.step("write")
        return super().write(data)

    def truncate(self, size: int | None = None) -> int:
        self.disk.step("truncate")
        return super().truncate(size)


def put_on(disk: Disk, database: FileStore) -> None:
    """Put the data file and the temporary one of `database` on `disk`."""
    file = database._file
    for name in ("_file", "_tfile"):
        opened = getattr(file, name)
        raw = FileOnDisk(opened.name, "r+b")
        raw.disk = disk
        opened.close()
        setattr(file, name, io.BufferedRandom(raw))
    file._tfmt._file = file._tfile


def objects(first: int, size: int) -> list[list[Any]]:
    """Stores of five objects; `first` tells them from those of others."""
    data = plain("x" * size)
    return [store(number(first + offset), data) for offset in range(5)]


def oids_of(first: int) -> set[bytes]:
    return {number(first + offset) for offset in range(5)}


def commit(database: FileStore, *operations: Any) -> None:
    database.vote(transaction(*operations))
    database.finish()


def read_by_zodb(database: FileStore, folder: Path) -> set[bytes]:
    """The oids that ZODB finds in what is on disk now, without a saved index.

    Whatever is behind the last transaction it would cut off, into a file of its own.
    """
    folder.mkdir()
    shutil.copy(database._path, folder)
    storage = FileStorage(str(folder / "Data.fs"))
    try:
        for oid in storage._index:
            storage.load(oid)
        assert not list(folder.glob("*.tr*")), "something is behind the last one"
        return set(storage._index)
    finally:
        storage.close()


@pytest.fixture
def databases(tmp_path) -> Iterator[Any]:
    """Databases with one transaction in them, each in a folder of its own."""
    opened: list[FileStore] = []

    def databases() -> Iterator[FileStore]:
        while True:
            folder = tmp_path / str(len(opened))
            folder.mkdir()
            opened.append(FileStore("main", str(folder / "Data.fs")))
            commit(opened[-1], *objects(100, 100))
            yield opened[-1]
            opened[-1].close()

    yield databases()
    for each in opened:
        each.close()


def vote_fails(database: FileStore, size: int) -> bool:
    try:
        database.vote(transaction(*objects(200, size)))
    except OSError:
        return True
    return False


@pytest.mark.parametrize("steps", [("write",), ("write", "truncate")], ids="-".join)
@pytest.mark.parametrize("stays_full", [False, True], ids=["once", "for a while"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("next_size", [50, 3000])
def test_every_write_of_a_vote_fails_once(
    databases, tmp_path, steps, stays_full, size, next_size
):
    """Until a vote passes; then the next write is that of finish."""
    for fails_at, database in enumerate(databases, 1):
        disk = Disk(fails_at, stays_full=stays_full, steps=steps)
        put_on(disk, database)
        if not vote_fails(database, size):
            assert disk.failures == 0
            disk.is_repaired()
            database.finish()
            break
        assert disk.failures > 0
        assert database.load(number(100), MAX_TID) is not None
        disk.is_repaired()
        commit(database, *objects(300, next_size))
        on_disk = read_by_zodb(database, tmp_path / f"copy {fails_at}")
        assert on_disk == oids_of(100) | oids_of(300)
    assert fails_at > 2
    assert read_by_zodb(database, tmp_path / "copy") == oids_of(100) | oids_of(200)


@pytest.mark.parametrize("size", SIZES)
def test_a_disk_that_stays_full_refuses_every_vote_and_loses_nothing(
    databases, tmp_path, size
):
    database = next(databases)
    disk = Disk(1, stays_full=True, steps=("write",))
    put_on(disk, database)
    for _ in range(3):
        assert vote_fails(database, size)
    disk.is_repaired()
    database.abort()
    commit(database, store(A, plain("next")))
    assert read_by_zodb(database, tmp_path / "copy") == oids_of(100) | {A}


@pytest.mark.parametrize("size", SIZES)
def test_what_a_full_disk_left_in_a_buffer_is_not_written_over_the_next_group(
    databases, tmp_path, size
):
    """That group is written below the buffer, to the same place in the file."""
    for fails_at, database in enumerate(databases, 1):
        disk = Disk(fails_at, stays_full=True, steps=("write", "truncate"))
        put_on(disk, database)
        has_failed = vote_fails(database, size)
        disk.is_repaired()
        if not has_failed:
            database.abort()
            break
        prepared = database.prepare(transaction(*objects(300, 3000)))
        prepared.vote({})
        (finished,) = database.append([prepared])
        prepared.end()
        for oid in oids_of(300):
            assert database.load(oid, MAX_TID).tid == finished.tid
        on_disk = read_by_zodb(database, tmp_path / f"copy {fails_at}")
        assert on_disk == oids_of(100) | oids_of(300)
    assert fails_at > 2


@pytest.mark.parametrize("stays_full", [False, True], ids=["once", "for a while"])
def test_a_write_that_fails_in_finish_is_a_disaster(databases, tmp_path, stays_full):
    """The mark that the transaction is whole did not get to the disk, or it did."""
    database = next(databases)
    database.vote(transaction(*objects(200, 50)))
    disk = Disk(1, stays_full=stays_full, steps=("write",))
    put_on(disk, database)
    with pytest.raises(BrokenDatabase, match="No space left"):
        database.finish()
    folder = tmp_path / "copy"
    folder.mkdir()
    shutil.copy(database._path, folder)
    disk.is_repaired()
    again = FileStore("main", str(folder / "Data.fs"))
    there = {oid for oid in oids_of(100) | oids_of(200) if is_there(again, oid)}
    assert there in (oids_of(100), oids_of(100) | oids_of(200))
    commit(again, store(A, plain("next")))
    again.close()


def is_there(database: FileStore, oid: bytes) -> bool:
    try:
        return database.get_tid(oid) > Z64
    except KeyError:
        return False


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_sync_that_fails_in_finish_is_a_disaster(
    databases, tmp_path, monkeypatch, error
):
    database = next(databases)
    database.vote(transaction(*objects(200, 3000)))

    def fsync(_fd: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(sys.modules[FileStorage.__module__], "fsync", fsync)
    with pytest.raises(BrokenDatabase, match=os.strerror(error)):
        database.finish()
    monkeypatch.undo()
    assert read_by_zodb(database, tmp_path / "copy") in (
        oids_of(100),
        oids_of(100) | oids_of(200),
    )
    # The file is closed, for nobody knows what is in it: nothing is written any more.
    with pytest.raises(ValueError, match="closed"):
        database.vote(transaction(store(A, plain("next"))))
