"""Blobs go with their revisions, and no others, whatever a list says."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transaction
from ZODB import DB
from ZODB.blob import Blob
from ZODB.FileStorage import FileStorage

from zeolith.storage.filestore import FileStore
from zeolith.storage.packing import finish_leftovers
from zeolith.storage.superfluous import remove_blobs

from ..support.ids import number
from .transactions import plain, store
from .transactions import transaction as transaction_of


def make(folder: Path) -> None:
    """Plain ZODB makes a blob with two revisions, one that is garbage, and one more."""
    storage = FileStorage(str(folder / "Data.fs"), blob_dir=str(folder / "blobs"))
    database = DB(storage)
    with database.transaction() as connection:
        root = connection.root()
        root["a"], root["b"], root["c"] = Blob(b"a1"), Blob(b"b1"), Blob(b"c1")
    with database.transaction() as connection:
        root = connection.root()
        with root["a"].open("w") as file:
            file.write(b"a2")
        del root["b"]
    transaction.abort()
    database.close()


def contents(folder: Path) -> list[bytes]:
    return sorted(path.read_bytes() for path in folder.rglob("*.blob"))


@pytest.fixture(params=[True, False], ids=["keep", "do not keep"])
def keeps_old(request) -> bool:
    keeps: bool = request.param
    return keeps


@pytest.fixture
def database(tmp_path, keeps_old) -> Iterator[FileStore]:
    make(tmp_path)
    opened = FileStore(
        "main",
        str(tmp_path / "Data.fs"),
        blob_dir=str(tmp_path / "blobs"),
        pack_keep_old=keeps_old,
    )
    yield opened
    opened.close()


def can_be_read(folder: Path, data: str, blobs: str) -> dict[str, bytes]:
    """The blobs as plain ZODB reads them."""
    storage = FileStorage(str(folder / data), blob_dir=str(folder / blobs))
    database = DB(storage)
    with database.transaction() as connection:
        found = {}
        for name, blob in connection.root().items():
            with blob.open("r") as file:
                found[name] = file.read()
    database.close()
    return found


def test_blobs_go_with_their_revisions(database, tmp_path, keeps_old):
    assert contents(tmp_path / "blobs") == [b"a1", b"a2", b"b1", b"c1"]
    database.pack(time.time() + 1)
    assert contents(tmp_path / "blobs") == [b"a2", b"c1"]
    database.close()
    assert can_be_read(tmp_path, "Data.fs", "blobs") == {"a": b"a2", "c": b"c1"}
    if keeps_old:
        assert contents(tmp_path / "blobs.old") == [b"a1", b"a2", b"b1", b"c1"]
        old = can_be_read(tmp_path, "Data.fs.old", "blobs.old")
        assert old == {"a": b"a2", "c": b"c1"}
    else:
        assert not (tmp_path / "blobs.old").exists()
    assert not list(tmp_path.glob("*.pack*"))


def test_garbage_that_is_stored_again_meanwhile_keeps_its_blob(
    database, tmp_path, monkeypatch
):
    """A client that still has the object may do that; here, between vote and finish."""
    (oid,) = (
        oid for oid in database._file._index if contents_of(database, oid) == [b"b1"]
    )
    data = database.load_serial(oid, database.get_tid(oid))
    upload = database.uploads.begin()
    upload.write([(0, b"b2")])
    vote = transaction_of(["store_blob", oid, database.get_tid(oid), data, 0])

    def vote_first(file: Any, list_path: str) -> None:
        if Path(list_path).exists():
            vote.blobs = upload.seal(vote.operations)
            database.vote(vote)
        remove_blobs(file, list_path)

    monkeypatch.setattr("zeolith.storage.packing.remove_blobs", vote_first)
    assert database.pack(time.time() + 1).has_changed
    tid = database.finish().tid
    assert database.load_blob(oid, tid, 0, 100).data == b"b2"
    assert contents(tmp_path / "blobs") == [b"a2", b"b2", b"c1"]


def contents_of(database: FileStore, oid: bytes) -> list[bytes]:
    return contents(Path(database._file.fshelper.getPathForOID(oid)))


def test_without_garbage_collection_only_old_revisions_go(database, tmp_path):
    database.pack(time.time() + 1, False)
    assert contents(tmp_path / "blobs") == [b"a2", b"b1", b"c1"]


def test_a_second_pack_begins_a_new_old(database, tmp_path):
    database.pack(time.time() + 1, False)
    database.vote(transaction_of(store(number(99), plain(1))))
    database.finish()
    database.pack(time.time() + 1, True)
    assert contents(tmp_path / "blobs") == [b"a2", b"c1"]


def test_what_could_not_be_removed_is_removed_at_the_next_start(
    database, tmp_path, monkeypatch
):
    def die(_file: Any, list_path: str) -> None:
        if Path(list_path).exists():
            raise OSError("the disk is ill")

    monkeypatch.setattr("zeolith.storage.packing.remove_blobs", die)
    assert database.pack(time.time() + 1).has_changed
    monkeypatch.undo()
    database.close()
    assert len(contents(tmp_path / "blobs")) == 4
    again = FileStore(
        "main", str(tmp_path / "Data.fs"), blob_dir=str(tmp_path / "blobs")
    )
    assert contents(tmp_path / "blobs") == [b"a2", b"c1"]
    assert not list(tmp_path.glob("*.pack*"))
    again.close()


def test_a_list_is_not_believed(database, tmp_path):
    """All that it names is alive, or nonsense."""
    index = database._file._index
    lines = [oid.hex() for oid in index]
    lines += [(oid + database.get_tid(oid)).hex() for oid in index]
    lines += ["ff" * 8, "ff" * 16, "0123", "no hexadecimal", ""]
    path = tmp_path / "Data.fs.pack.removed"
    path.write_text("\n".join(lines))
    finish_leftovers(database._file)
    assert len(contents(tmp_path / "blobs")) == 4
    assert not path.exists()


def test_the_list_of_a_pack_that_is_not_over_is_not_heeded(database, tmp_path):
    database.pack(time.time() + 1, False)
    (tmp_path / "Data.fs.pack").touch()
    (tmp_path / "Data.fs.pack.removed").write_text("ff" * 8)
    finish_leftovers(database._file)
    assert contents(tmp_path / "blobs") == [b"a2", b"b1", b"c1"]


def test_no_list_is_no_work(database, tmp_path):
    remove_blobs(database._file, str(tmp_path / "nothing"))
    assert not (tmp_path / "blobs.old").exists()
