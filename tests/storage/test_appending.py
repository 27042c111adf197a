"""Groups of transactions on their way to the end of a Data.fs.

What a crash leaves of it is in test_crash_images.
"""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.POSException import POSKeyError

from zeolith.storage import appending
from zeolith.storage.database import BrokenDatabase, Finished, NotCommitted
from zeolith.storage.disk import Disk
from zeolith.storage.filestore import FileStore
from zeolith.storage.preparing import Preparation
from zeolith.storage.tids import MAX_TID, Z64, advanced, tid_at

from ..support.gates import Gate
from ..support.ids import number
from .transactions import A, B, C, plain, store, transaction

WAIT_S = 30


class Diary(Disk):
    """A disk that tells what was done, and fails where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[str] = []
        # Step -> what it raises, or how many bytes it takes.
        self.failing: dict[str, OSError | int] = {}

    def write(
        self, fd: int, buffers: Sequence[bytes | memoryview], position: int
    ) -> int:
        failure = self._step("write")
        if isinstance(failure, int):
            buffers = [bytes(buffers[0])[:failure]]
        return super().write(fd, buffers, position)

    def sync(self, fd: int) -> None:
        self._step("sync")
        super().sync(fd)

    def truncate(self, fd: int, size: int) -> None:
        self._step("truncate")
        super().truncate(fd, size)

    def _step(self, name: str) -> OSError | int | None:
        self.steps.append(name)
        failure = self.failing.pop(name, None)
        if isinstance(failure, OSError):
            raise failure
        return failure


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
BROKEN = OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.fixture
def disk() -> Diary:
    return Diary()


@pytest.fixture
def open_store(tmp_path: Path, disk: Diary) -> Iterator[Callable[..., FileStore]]:
    opened: list[FileStore] = []

    def open_it(**options: Any) -> FileStore:
        database = FileStore("main", str(tmp_path / "Data.fs"), **options)
        database._file.disk = disk
        opened.append(database)
        return database

    yield open_it
    for database in opened:
        database.close()


@pytest.fixture
def database(open_store: Callable[..., FileStore]) -> FileStore:
    return open_store()


def voted(database: FileStore, *operations: list[Any], **others: Any) -> Preparation:
    preparation = database.prepare(transaction(*operations, **others))
    assert isinstance(preparation, Preparation)
    preparation.vote({})
    return preparation


def tids_of(outcomes: Sequence[Any]) -> list[bytes]:
    assert all(isinstance(each, Finished) for each in outcomes), outcomes
    return [each.tid for each in outcomes]


def data_of(database: FileStore, oid: bytes) -> bytes | None:
    try:
        found = database.load(oid, MAX_TID)
    except POSKeyError:
        return None
    return found and found.data


def log_of(path: Path) -> list[tuple[bytes, list[tuple[bytes, bytes]]]]:
    """What plain ZODB reads: tids, and the records of each."""
    storage = FileStorage(str(path), read_only=True)
    found = [
        (each.tid, [(record.oid, record.data) for record in each])
        for each in storage.iterator()
    ]
    storage.close()
    return found


def test_a_group_is_one_write_and_one_sync(database, disk):
    group = [voted(database, store(number(n), plain(n))) for n in range(1, 6)]
    disk.steps.clear()
    tids = tids_of(database.append(group))
    assert disk.steps == ["write", "sync"]
    assert tids == sorted(set(tids))
    assert all(data_of(database, number(n)) == plain(n) for n in range(1, 6))


def test_the_file_is_as_if_a_filestorage_had_written_it(database, tmp_path):
    texts = {"user": b"u", "description": b"d", "extension": b"\x80\x03}."}
    first = voted(database, store(A, plain(1)), store(B, plain(2)), **texts)
    (tid,) = tids_of(database.append([first]))
    group = [
        voted(database, store(B, plain(3), tid)),
        voted(database, store(C, plain(4))),
        voted(database),
    ]
    database.append(group)
    theirs = FileStorage(str(tmp_path / "theirs.fs"))
    for tid, records in log_of(tmp_path / "Data.fs"):
        metadata = TransactionMetaData()
        if A in dict(records):
            metadata = TransactionMetaData(b"u", b"d")
            metadata.extension_bytes = texts["extension"]
        theirs.tpc_begin(metadata, tid)
        for oid, data in records:
            serial = theirs.getTid(oid) if oid in theirs._index else Z64
            theirs.store(oid, serial, data, "", metadata)
        theirs.tpc_vote(metadata)
        theirs.tpc_finish(metadata)
    ours = (tmp_path / "Data.fs").read_bytes()
    assert ours == (tmp_path / "theirs.fs").read_bytes()
    assert dict(database._file._index) == dict(theirs._index)
    assert database._file.lastTransaction() == theirs.lastTransaction()
    assert database.info() == (theirs.getSize(), len(theirs))
    theirs.close()


def test_tids_are_greater_than_all_that_clients_have_seen(database):
    floor = tid_at(time.time() + 60)
    database.raise_tid_floor(floor)
    group = [voted(database, store(number(n), plain(n))) for n in (1, 2)]
    assert tids_of(database.append(group)) == [advanced(floor, 1), advanced(floor, 2)]


def test_appended_and_alone_take_turns(database, tmp_path):
    (first,) = tids_of(database.append([voted(database, store(A, plain(1)))]))
    database.vote(transaction(["undo", first], store(B, plain(1))))
    second = database.finish().tid
    (third,) = tids_of(database.append([voted(database, store(C, plain(3)))]))
    database.vote(transaction(["undo", third]))
    database.abort()
    (fourth,) = tids_of(database.append([voted(database, store(A, plain(4)))]))
    assert first < second < third < fourth
    assert log_of(tmp_path / "Data.fs") == [
        (first, [(A, plain(1))]),
        (second, [(A, None), (B, plain(1))]),
        (third, [(C, plain(3))]),
        (fourth, [(A, plain(4))]),
    ]


def test_nothing_is_loaded_before_it_is_on_the_disk(database, disk):
    gate = Gate()
    gate.shut()
    disk.sync = gate.before(disk.sync)
    group = [voted(database, store(A, plain(1)))]
    thread = threading.Thread(target=database.append, args=(group,))
    thread.start()
    gate.wait_until_reached()
    assert data_of(database, A) is None
    gate.open()
    thread.join(WAIT_S)
    assert data_of(database, A) == plain(1)


def test_an_index_that_is_saved_meanwhile_hears_of_it(database):
    database._file._changed = set()
    database.append([voted(database, store(number(2**16 + 1), plain(1)))])
    assert database._file._changed == {number(2**16 + 1)[:6]}


def test_what_clients_call_their_transactions_is_known_after_a_restart(
    database, open_store
):
    group = [voted(database, store(number(n), plain(n))) for n in (1, 2)]
    first, second = tids_of(database.append(group))
    alone = transaction(["undo", second])
    database.vote(alone)
    third = database.finish().tid
    database.close()
    _last, changes = open_store().last_changes()
    assert [(each.tid, each.transaction) for each in changes] == [
        (first, group[0].transaction.id),
        (second, group[1].transaction.id),
        (third, alone.id),
    ]


# Large groups


@pytest.fixture
def small_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appending, "AT_ONCE_BYTES_MAX", 2000)
    monkeypatch.setattr(appending, "PIECE_BYTES", 1000)


def test_a_large_group_is_marked_until_all_of_it_is_on_the_disk(
    database, disk, small_writes, tmp_path
):
    group = [voted(database, store(number(n), b"x" * 900)) for n in range(1, 6)]
    disk.steps.clear()
    statuses: list[bytes] = []
    sync = disk.sync

    def look_and_sync(fd: int) -> None:
        statuses.append(os.pread(fd, 1, 4 + 16))
        sync(fd)

    disk.sync = look_and_sync
    tids = tids_of(database.append(group))
    assert disk.steps == ["write", "sync", *["write"] * 3, "sync", "write", "sync"]
    assert statuses == [b"c", b"c", b" "]
    assert [tid for tid, _records in log_of(tmp_path / "Data.fs")] == tids


def test_a_large_group_that_the_disk_does_not_take_leaves_nothing(
    database, disk, small_writes
):
    (before,) = tids_of(database.append([voted(database, store(A, plain(1)))]))
    size = os.path.getsize(database._path)
    group = [voted(database, store(number(n), b"x" * 900)) for n in range(2, 6)]
    disk.write = failing_at(disk, 3)
    (error, *_others) = database.append(group)
    assert isinstance(error, NotCommitted)
    assert os.path.getsize(database._path) == size
    again = voted(database, store(B, plain(1)))
    disk.write = Diary.write.__get__(disk)
    assert tids_of(database.append([again]))[0] > before


def failing_at(disk: Diary, at: int) -> Callable[..., int]:
    """The disk's write, that fails when it is called for the ``at``-th time."""
    left = at

    def write(fd: int, buffers: Any, position: int) -> int:
        nonlocal left
        left -= 1
        if not left:
            raise FULL
        return Diary.write(disk, fd, buffers, position)

    return write


# Disks that fail


def test_a_disk_that_refuses_is_told_to_all_and_the_next_group_is_written(
    database, disk, tmp_path
):
    group = [voted(database, store(number(n), plain(n))) for n in (1, 2)]
    disk.failing = {"write": FULL}
    outcomes = database.append(group)
    assert all(isinstance(each, NotCommitted) for each in outcomes)
    assert "No space left on device; nothing was committed" in str(outcomes[0])
    (tid,) = tids_of(database.append([voted(database, store(A, plain(5)))]))
    assert log_of(tmp_path / "Data.fs") == [(tid, [(A, plain(5))])]


def test_a_disk_that_takes_a_part_gets_the_rest_after_that_is_cut_off(
    database, disk, tmp_path
):
    """And synced: what was written first must not be mixed with the second try."""
    group = [voted(database, store(number(n), plain(n))) for n in (1, 2)]
    disk.steps.clear()
    disk.failing = {"write": 30}
    tids = tids_of(database.append(group))
    assert disk.steps == [
        *("write", "truncate", "sync"),
        *("write", "sync", "write", "sync"),
    ]
    assert [tid for tid, _records in log_of(tmp_path / "Data.fs")] == tids


@pytest.mark.parametrize(
    "failing",
    [
        {"sync": BROKEN},
        {"write": FULL, "truncate": BROKEN},
        {"write": FULL, "sync": BROKEN},
    ],
)
def test_a_disk_of_which_nothing_is_known_is_written_no_more(database, disk, failing):
    group = [voted(database, store(A, plain(1)))]
    disk.failing = dict(failing)
    with pytest.raises(BrokenDatabase, match=r"Input/output error.*after a restart"):
        database.append(group)
    assert data_of(database, A) is None


def test_what_was_left_behind_the_end_is_cut_off_before_anything_is_written(
    database, disk, tmp_path
):
    (first,) = tids_of(database.append([voted(database, store(A, plain(1)))]))
    group = [voted(database, store(B, plain(2)))]
    database.vote(transaction(["undo", first]))
    database.abort()
    with (tmp_path / "Data.fs").open("ab") as file:
        file.write(b"x" * 1000)
    disk.steps.clear()
    (second,) = tids_of(database.append(group))
    assert disk.steps == ["truncate", "sync", "write", "sync"]
    assert [tid for tid, _ in log_of(tmp_path / "Data.fs")] == [first, second]


# Blobs


def uploaded(database: FileStore, oid: bytes, data: bytes) -> Preparation:
    """A transaction with a blob, that has voted."""
    upload = database.uploads.begin()
    upload.write([(1, data)])
    made = transaction(["store_blob", oid, Z64, plain(1), 1])
    made.blobs = upload.seal(made.operations)
    preparation = database.prepare(made)
    assert isinstance(preparation, Preparation)
    preparation.vote({})
    return preparation


def blob_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "blobs").rglob("*.blob"))


def marks(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "blobs").rglob("*.voted"))


def test_a_blob_gets_its_place_with_its_record(open_store, tmp_path):
    database = open_store(blob_dir=str(tmp_path / "blobs"))
    group = [uploaded(database, A, b"one"), voted(database, store(B, plain(2)))]
    assert not blob_files(tmp_path)
    first, _second = tids_of(database.append(group))
    assert database.load_blob(A, first, 0, 10).data == b"one"
    assert len(blob_files(tmp_path)) == 1
    assert not marks(tmp_path)


def test_a_blob_that_finds_no_place_refuses_its_transaction_alone(open_store, tmp_path):
    database = open_store(blob_dir=str(tmp_path / "blobs"))
    lost = uploaded(database, A, b"one")
    lost.transaction.blobs[1].unlink()
    group = [lost, uploaded(database, B, b"two")]
    error, finished = database.append(group)
    assert isinstance(error, OSError)
    assert isinstance(finished, Finished)
    assert len(blob_files(tmp_path)) == 1
    assert not marks(tmp_path)
    assert data_of(database, A) is None


def test_blobs_of_a_group_that_the_disk_does_not_take_go(open_store, disk, tmp_path):
    database = open_store(blob_dir=str(tmp_path / "blobs"))
    group = [uploaded(database, A, b"one")]
    disk.failing = {"write": FULL}
    (error,) = database.append(group)
    assert isinstance(error, NotCommitted)
    assert not blob_files(tmp_path)
    assert not marks(tmp_path)
    database.append([uploaded(database, A, b"two")])
    assert len(blob_files(tmp_path)) == 1


def test_a_blob_of_a_crash_before_its_record_is_removed_at_the_next_start(
    open_store, disk, tmp_path
):
    database = open_store(blob_dir=str(tmp_path / "blobs"))
    disk.failing = {"sync": BROKEN}
    with pytest.raises(BrokenDatabase):
        database.append([uploaded(database, A, b"one")])
    os.truncate(tmp_path / "Data.fs", 4)
    assert len(blob_files(tmp_path)) == len(marks(tmp_path)) == 1
    database.uploads._lock_file.close()
    database._file._lock_file.close()
    again = FileStore(
        "again", str(tmp_path / "Data.fs"), blob_dir=str(tmp_path / "blobs")
    )
    assert not blob_files(tmp_path)
    again.close()
