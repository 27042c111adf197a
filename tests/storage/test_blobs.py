"""Files of blobs on the server's side, and what a client could do to them."""

import errno
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ZODB.blob
from ZODB.blob import Blob, BlobStorage
from ZODB.DemoStorage import DemoStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import (
    ConflictError,
    POSKeyError,
    StorageTransactionError,
    Unsupported,
)

from zeolith.storage import blobs
from zeolith.storage.adapted import AdaptedStorage
from zeolith.storage.blobs import Upload, is_blob_record
from zeolith.storage.database import Transaction
from zeolith.storage.filestore import FileStore
from zeolith.storage.tids import MAX_TID, Z64

from .transactions import A, B, plain, record, store, transaction, undo

BLOB = record(Blob, None)


class Served:
    """A database with blobs, and the shortest way to commit one."""

    def __init__(self, database: AdaptedStorage):
        self.database = database

    def voted(self, *operations: list[Any], **files: bytes) -> Upload:
        """Files are written by number (_0) and the operations voted on."""
        upload = self.database.uploads.begin()
        upload.write((int(name[1:]), data) for name, data in files.items())
        asked: Transaction = transaction(*operations)
        try:
            asked.blobs = upload.seal(asked.operations)
            self.database.vote(asked)
        except BaseException:
            upload.discard()
            raise
        return upload

    def commit(self, *operations: list[Any], **files: bytes) -> bytes:
        upload = self.voted(*operations, **files)
        tid = self.database.finish().tid
        upload.discard()
        return tid

    def blob(self, oid: bytes, tid: bytes) -> bytes:
        piece = self.database.load_blob(oid, tid, 0, 2**30)
        assert piece.size == len(piece.data)
        return piece.data


def store_blob(oid: bytes, name: int | str, serial: bytes = Z64) -> list[Any]:
    operation = "store_blob" if isinstance(name, int) else "store_shared_blob"
    return [operation, oid, serial, BLOB, name]


def open_file(tmp_path: Path) -> FileStore:
    folder = str(tmp_path / "blobs")
    return FileStore("1", str(tmp_path / "Data.fs"), blob_dir=folder)


def open_wrapped(tmp_path: Path) -> AdaptedStorage:
    storage = BlobStorage(str(tmp_path / "blobs"), MappingStorage())
    return AdaptedStorage("1", storage, b"0" * 16)


def open_demo(_tmp_path: Path) -> AdaptedStorage:
    return AdaptedStorage("1", DemoStorage(), b"0" * 16)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    database = open_file(tmp_path)
    yield Served(database)
    database.close()


@pytest.fixture(params=[open_file, open_wrapped, open_demo])
def any_served(tmp_path: Path, request: Any) -> Iterator[Served]:
    database = request.param(tmp_path)
    yield Served(database)
    database.close()


def temporary_files(served: Served) -> list[str]:
    """What is in the blob directory, but for blobs, folders and their locks."""
    return [
        path.name
        for path in served.database.uploads.shared.parent.rglob("*")
        if path.is_file() and path.name not in ("lock", ".layout")
        if path.suffix != ".blob"
    ]


# From chunks to a blob


def test_chunks_become_a_blob(any_served):
    upload = any_served.database.uploads.begin()
    for chunk in (b"one ", b"two ", b"three"):
        upload.write([(0, chunk)])
    asked = transaction(store_blob(A, 0))
    asked.blobs = upload.seal(asked.operations)
    any_served.database.vote(asked)
    tid = any_served.database.finish().tid
    upload.discard()
    assert any_served.blob(A, tid) == b"one two three"
    assert any_served.database.load(A, MAX_TID).data == BLOB
    assert not temporary_files(any_served)


def test_chunks_of_several_blobs_may_be_mixed(served):
    upload = served.database.uploads.begin()
    upload.write([(0, b"a"), (1, b"x"), (0, b"b"), (7, b""), (1, b"y")])
    upload.write([(1, b"z"), (0, b"c")])
    paths = upload.seal([])
    assert {name: path.read_bytes() for name, path in paths.items()} == {
        0: b"abc",
        1: b"xyz",
        7: b"",
    }
    upload.discard()
    assert not temporary_files(served)


def test_a_blob_is_read_in_pieces(served):
    tid = served.commit(store_blob(A, 0), _0=b"0123456789")
    load = served.database.load_blob
    assert load(A, tid, 0, 4) == (10, b"0123")
    assert load(A, tid, 8, 4) == (10, b"89")
    assert load(A, tid, 10, 4) == load(A, tid, 2**62, 4) == (10, b"")


def test_a_revision_of_a_blob_is_one_record(served):
    first = served.commit(store_blob(A, 0), _0=b"old")
    second = served.commit(store_blob(A, 0, first), _0=b"new")
    assert len(served.database.history(A, 10)) == 2
    assert (served.blob(A, first), served.blob(A, second)) == (b"old", b"new")


def test_a_vote_that_is_repeated_has_its_blobs_again(served):
    """An undo in the same transaction asks the client, after the blob was stored."""
    first = served.commit(store(B, plain(1)))
    second = served.commit(store(B, plain(2), first))
    served.commit(store(B, plain(3), second))
    upload = served.voted(store_blob(A, 0), undo(second), _0=b"data")
    served.database.resolve({B: plain(4)})
    tid = served.database.finish().tid
    upload.discard()
    assert temporary_files(served) == []
    assert served.blob(A, tid) == b"data"
    assert served.database.load_serial(B, tid) == plain(4)


def test_what_is_not_there_is_a_missing_key(served):
    tid = served.commit(store(A, plain(1)))
    with pytest.raises(POSKeyError):
        served.database.load_blob(A, tid, 0, 1)
    with pytest.raises(POSKeyError):
        served.database.load_blob(B, tid, 0, 1)


def test_a_storage_without_blobs_says_so(tmp_path):
    served = Served(FileStore("1", str(tmp_path / "Data.fs")))
    assert not served.database.takes_blobs
    with pytest.raises(Unsupported):
        served.database.load_blob(A, Z64, 0, 1)
    with pytest.raises(Unsupported):
        served.database.vote(transaction(store_blob(A, 0)))
    served.database.close()


def test_files_are_on_the_disk_before_the_vote_is_answered(served, monkeypatch):
    synced: list[int] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    upload = served.voted(store_blob(A, 0), _0=b"data")
    (path,) = Path(served.database._storage.blob_dir).rglob("*.blob")
    assert {path.stat().st_ino, path.parent.stat().st_ino} <= set(synced)
    served.database.finish()
    upload.discard()


# What does not become one


def test_an_abort_leaves_nothing(any_served):
    upload = any_served.voted(store_blob(A, 0), _0=b"data")
    any_served.database.abort()
    upload.discard()
    assert not temporary_files(any_served)
    folder = any_served.database.uploads.shared.parent
    assert not list(folder.rglob("*.blob"))


def test_nothing_is_written_after_the_end(served):
    upload = served.database.uploads.begin()
    upload.write([(0, b"data")])
    upload.discard()
    upload.write([(0, b"late"), (1, b"later")])
    assert upload.seal([store_blob(A, "x")]) == {}
    upload.discard()
    assert not temporary_files(served)


def test_a_blob_that_was_never_sent_is_not_stored(served):
    with pytest.raises(StorageTransactionError, match="no blob 1"):
        served.commit(store_blob(A, 1), _0=b"data")
    assert not temporary_files(served)


def test_a_file_is_not_stored_twice(served):
    with pytest.raises(StorageTransactionError, match="no blob 0"):
        served.commit(store_blob(A, 0), store_blob(B, 0), _0=b"data")
    assert not temporary_files(served)


def test_of_two_blobs_of_an_object_the_last_one_counts(served):
    tid = served.commit(store_blob(A, 0), store_blob(A, 1), _0=b"one", _1=b"two")
    assert served.blob(A, tid) == b"two"
    assert len(served.database.history(A, 10)) == 1
    assert not temporary_files(served)


def test_two_new_blobs_of_one_oid_are_a_conflict_though_their_records_are_equal(served):
    tid = served.commit(store_blob(A, 0), _0=b"first")
    with pytest.raises(ConflictError):
        served.commit(store_blob(A, 0), _0=b"second")
    assert served.blob(A, tid) == b"first"
    assert not temporary_files(served)


def test_a_disk_that_takes_half_of_a_chunk_does_not_lose_the_rest(served):
    """The kernel then says how much it took, and only the next time what is wrong."""
    upload = served.database.uploads.begin()
    upload.write([(0, bytes(100_000))])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            upload.write([(0, bytes(100_000))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    upload.discard()


def test_a_full_disk_is_an_error_of_the_write(served, monkeypatch):
    upload = served.database.uploads.begin()
    upload.write([(0, b"data")])

    class Full:
        def write(self, _data: bytes) -> int:
            raise OSError(errno.ENOSPC, "no space")

        def close(self) -> None:
            file.close()

    file, upload._file = upload._file, Full()
    with pytest.raises(OSError, match="no space"):
        upload.write([(0, b"more")])
    upload.discard()
    assert not temporary_files(served)


# Undo


def test_an_undone_blob_is_what_it_was(served):
    first = served.commit(store_blob(A, 0), _0=b"old")
    second = served.commit(store_blob(A, 0, first), _0=b"new")
    undone = served.commit(undo(second))
    assert served.blob(A, undone) == b"old"


def test_what_is_a_blob_is_found_without_loading_classes():
    assert is_blob_record(BLOB)
    assert ZODB.blob.is_blob_record(BLOB)
    assert not is_blob_record(plain(b"ZODB.blob"))
    assert not is_blob_record(b"ZODB.blob")
    assert not is_blob_record(b"")
    # A memo of many gigabytes, if an unpickler takes it at its word.
    assert not is_blob_record(b"\x80\x03Nr\xff\xff\xff\xff" + b"ZODB.blob.")


def test_what_is_too_large_for_a_blobs_record_is_not_looked_into():
    large = plain(b"x" * blobs.BLOB_RECORD_BYTES_MAX)
    assert not is_blob_record(BLOB + large)
    assert is_blob_record(BLOB + b"x" * (blobs.BLOB_RECORD_BYTES_MAX - len(BLOB)))


# Restoring


@pytest.mark.parametrize("previous", [None, Z64, b"nowhere!"])
def test_a_blob_is_restored_in_its_transaction(served, previous):
    tid = (1000).to_bytes(8, "big")
    asked = transaction(["restore_blob", A, tid, BLOB, previous, 0], tid=tid)
    upload = served.database.uploads.begin()
    upload.write([(0, b"copied")])
    asked.blobs = upload.seal(asked.operations)
    served.database.raise_tid_floor(Z64)
    served.database.vote(asked)
    finished = served.database.finish()
    upload.discard()
    assert finished == (tid, [A])
    assert served.blob(A, tid) == b"copied"


def test_a_blob_of_another_transaction_is_not_restored(served):
    tid, other = (number.to_bytes(8, "big") for number in (1000, 999))
    upload = served.database.uploads.begin()
    upload.write([(0, b"copied")])
    asked = transaction(["restore_blob", A, other, BLOB, None, 0], tid=tid)
    asked.blobs = upload.seal(asked.operations)
    with pytest.raises(StorageTransactionError, match="in another transaction"):
        served.database.vote(asked)
    upload.discard()
    assert not temporary_files(served)


# Files that clients leave in the directory


def test_a_file_in_the_storages_own_directory_is_taken(served):
    left = served.database.uploads.shared / "client.tmp"
    left.write_bytes(b"shared")
    tid = served.commit(store_blob(A, "client.tmp"))
    assert served.blob(A, tid) == b"shared"
    assert not left.exists()
    assert not temporary_files(served)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/etc/passwd", "a/b", ".layout", "a\0b", "gone"]
)
def test_no_other_file_can_be_named(served, name):
    shared = served.database.uploads.shared
    (shared.parent / "x").write_bytes(b"secret")
    (shared / "a").mkdir()
    (shared / "a" / "b").write_bytes(b"secret")
    with pytest.raises(StorageTransactionError):
        served.commit(store_blob(A, name))
    assert (shared.parent / "x").exists()
    assert (shared / "a" / "b").exists()
    assert Path("/etc/passwd").exists()


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_only_a_file_is_taken(served, kind, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    left = served.database.uploads.shared / "left"
    if kind == "link":
        left.symlink_to(secret)
    elif kind == "folder":
        left.mkdir()
    else:
        os.mkfifo(left)
    with pytest.raises(StorageTransactionError, match="is no file"):
        served.commit(store_blob(A, "left"))
    assert secret.read_bytes() == b"secret"


def test_a_link_that_takes_the_place_of_a_file_is_not_taken(
    served, tmp_path, monkeypatch
):
    left = served.database.uploads.shared / "left"
    left.write_bytes(b"mine")
    rename = Path.rename

    def swapped(self: Path, target: Path) -> Path:
        self.unlink()
        self.symlink_to("/etc/passwd")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", swapped)
    with pytest.raises(StorageTransactionError, match="is no file"):
        served.commit(store_blob(A, "left"))
    assert not temporary_files(served)


# What a process leaves


def kill(database: FileStore) -> FileStore:
    """Go on as after a kill; returns the database, opened again."""
    if database.uploads._lock_file is not None:
        database.uploads._lock_file.close()
    file = database._storage
    # Nothing is aborted: what was voted is where the vote has left it.
    file._file.truncate(file._pos)
    file.close()
    database._identity.return_oids(1)
    return FileStore("1", database._path, blob_dir=file.blob_dir)


@pytest.mark.parametrize("finished", [False, True])
def test_a_blob_that_was_voted_and_not_committed_goes_at_the_next_opening(
    tmp_path, finished
):
    served = Served(open_file(tmp_path))
    upload = served.voted(store_blob(A, 0), _0=b"data")
    folder = served.database.uploads.shared.parent
    (blob,) = folder.rglob("*.blob")
    (link,) = folder.glob(".zeolith-uploads-*/*.voted")
    if finished:
        # The process is killed before it removes the mark.
        committing: Any = served.database._committing
        committing._marks.clear()
        served.database.finish()
    database: Any = served.database
    reopened = kill(database)
    assert not link.exists()
    assert blob.exists() is finished
    upload.discard()
    reopened.close()


def test_a_store_that_fails_takes_the_blobs_before_it_along(served):
    upload = served.database.uploads.begin()
    upload.write([(0, b"data")])
    asked = transaction(store_blob(A, 0), store_blob(B, 1))
    asked.blobs = upload.seal(asked.operations)
    with pytest.raises(StorageTransactionError, match="no blob 1"):
        served.database.vote(asked)
    upload.discard()
    assert not temporary_files(served)
    assert not list(served.database.uploads.shared.parent.rglob("*.blob"))


def test_leftovers_of_a_killed_process_go_at_the_next_opening(tmp_path):
    database = open_file(tmp_path)
    upload = database.uploads.begin()
    upload.write([(0, b"data")])
    (folder,) = database.uploads.shared.parent.glob(".zeolith-uploads-*")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    # As a kill does.
    database.uploads._lock_file.close()  # type: ignore[union-attr]
    database._storage.close()
    database._identity.return_oids(1)
    reopened = open_file(tmp_path)
    assert not folder.exists()
    upload.discard()
    reopened.close()


def test_what_another_process_uploads_is_left_alone(served):
    upload = served.database.uploads.begin()
    upload.write([(0, b"data")])
    other = blobs.Uploads(served.database._storage)
    other.sweep(lambda _tid: False)
    assert upload.seal([])[0].read_bytes() == b"data"
    upload.discard()


def test_closing_leaves_no_folder(tmp_path):
    database = open_file(tmp_path)
    upload = database.uploads.begin()
    upload.write([(0, b"data")])
    folder = database.uploads.shared.parent
    database.close()
    upload.discard()
    assert {path.name for path in folder.iterdir()} == {".layout", "tmp"}
