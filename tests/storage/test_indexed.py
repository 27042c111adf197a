"""A FileStorage whose index is saved at any time; by it a file is never misread."""

import logging
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.fsIndex import fsIndex
from ZODB.POSException import POSError
from ZODB.serialize import referencesf
from ZODB.utils import z64

from zeolith.storage import index, indexed, scanning
from zeolith.storage.filestore import FileStore
from zeolith.storage.indexed import IndexedFile

from ..support.gates import Background, Gate
from ..support.ids import number
from ..support.waiting import wait_until
from .histories import histories, write

WAIT_S = 30


@pytest.fixture(autouse=True)
def any_growth(monkeypatch) -> None:
    monkeypatch.setattr(indexed, "GROWTH_MIN_BYTES", 1)
    monkeypatch.setattr(indexed, "GROWTH_MIN_OF_INDEX", 0)


@pytest.fixture
def open_file(tmp_path) -> Iterator[Callable[..., IndexedFile]]:
    opened: list[IndexedFile] = []

    def open_file(folder: Path = tmp_path, **options: Any) -> IndexedFile:
        opened.append(IndexedFile(str(folder / "Data.fs"), **options))
        return opened[-1]

    yield open_file
    for each in opened:
        each.close()


def store(storage: Any, *oids: int) -> bytes:
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    for oid in oids:
        try:
            serial = storage.getTid(number(oid))
        except KeyError:
            serial = z64
        storage.store(number(oid), serial, b"data", "", transaction)
    storage.tpc_vote(transaction)
    tid: bytes = storage.tpc_finish(transaction)
    return tid


def crashed(storage: IndexedFile, folder: Path) -> Path:
    """The files as a crash at this moment would leave them."""
    folder.mkdir()
    source = Path(storage._file_name)
    for each in (source, *source.parent.glob("Data.fs.index*")):
        shutil.copy(each, folder)
    return folder / "Data.fs"


def index_end(path: Path) -> int:
    end: int = fsIndex.load(f"{path}.index")["pos"]
    return end


def contents(storage: Any) -> tuple[dict[bytes, int], int, bytes]:
    return dict(storage._index.items()), storage._pos, storage._ltid


def by_zodb(path: Path) -> tuple[dict[bytes, int], int, bytes]:
    """What FileStorage finds in the file, without a saved index."""
    copy = path.with_name("copy.fs")
    shutil.copy(path, copy)
    storage = FileStorage(str(copy))
    try:
        return contents(storage)
    finally:
        storage.close()
        for each in path.parent.glob("copy.fs*"):
            each.unlink()


def zodb_believes(path: Path) -> bool:
    """Whether plain FileStorage makes use of the index."""
    storage = FileStorage(str(path), read_only=True)
    try:
        return bool(storage._used_index)
    finally:
        storage.close()


# Saving


def test_the_saved_index_is_one_that_file_storage_uses(open_file, tmp_path):
    storage = open_file()
    for n in range(10):
        # One object changes every time: the index is of no use with another's position.
        store(storage, 1, n + 2, n * 70_000 + 5)
    assert storage.save_index_if_grown()
    path = crashed(storage, tmp_path / "crashed")
    assert index_end(path) == path.stat().st_size
    assert zodb_believes(path)


def test_commits_go_on_while_it_is_saved(open_file, tmp_path, monkeypatch):
    storage = open_file()
    store(storage, 1, 70_000)
    buckets = indexed._Source.bucket

    def slow(source: indexed._Source, prefix: bytes) -> bytes:
        contents = buckets(source, prefix)
        if threading.current_thread() is saving:
            Background(store, storage, 1, 140_000, 3).result()
        return contents

    saving = threading.current_thread()
    monkeypatch.setattr(indexed._Source, "bucket", slow)
    changed = indexed._Source.changed

    def unwatched(source: indexed._Source, limit: int) -> Any:
        monkeypatch.setattr(indexed._Source, "bucket", buckets)
        return changed(source, limit)

    monkeypatch.setattr(indexed._Source, "changed", unwatched)
    assert storage.save_index_if_grown()
    path = crashed(storage, tmp_path / "crashed")
    assert index_end(path) == path.stat().st_size
    assert zodb_believes(path)
    assert dict(fsIndex.load(f"{path}.index")["index"].items()) == by_zodb(path)[0]


def test_many_threads_commit_and_every_index_on_the_way_is_whole(open_file, tmp_path):
    """The last resort after the gates above: nothing is provoked, all is checked."""
    storage = open_file()
    is_over = threading.Event()

    def commit() -> None:
        n = 0
        while not is_over.is_set():
            n += 1
            store(storage, 1, n * 1000, 5)

    committing = Background(commit)
    for turn in range(20):
        storage.save_index_if_grown()
        path = crashed(storage, tmp_path / f"crashed{turn}")
        # More is in the file, some of it not yet durable.
        path.write_bytes(path.read_bytes()[: index_end(path)])
        assert zodb_believes(path) or path.stat().st_size < 100
        saved = dict(fsIndex.load(f"{path}.index")["index"].items())
        assert saved == by_zodb(path)[0]
    is_over.set()
    committing.result()


def test_it_is_saved_only_if_the_log_has_grown_enough(open_file, monkeypatch):
    storage = open_file()
    store(storage, 1)
    monkeypatch.setattr(indexed, "GROWTH_MIN_BYTES", 200)
    assert storage._pos < 200
    assert not storage.save_index_if_grown()
    store(storage, 1)
    store(storage, 1)
    assert storage.save_index_if_grown()
    assert not storage.save_index_if_grown()
    # And if that is much, compared with the index.
    store(storage, *range(100))
    assert storage.save_index_if_grown()
    monkeypatch.setattr(indexed, "GROWTH_MIN_OF_INDEX", 1)
    store(storage, *range(4))
    assert not storage.save_index_if_grown()
    store(storage, *range(20))
    assert storage.save_index_if_grown()


def test_what_is_being_saved_is_given_up_when_a_pack_takes_the_file(
    open_file, tmp_path, monkeypatch
):
    storage = open_file()
    for _ in range(5):
        store(storage, 0, 1, 2)
    gate, buckets = Gate(), indexed._Source.bucket

    def gated(source: indexed._Source, prefix: bytes) -> bytes:
        gate.pass_through()
        return buckets(source, prefix)

    monkeypatch.setattr(indexed._Source, "bucket", gated)
    gate.shut()
    in_vain = Background(storage.save_index_if_grown)
    gate.wait_until_reached()
    before = storage._index
    packing = Background(storage.pack, time.time() + 1, referencesf, gc=False)
    wait_until(lambda: storage._index is not before, "the new file")
    gate.open()
    assert in_vain.result() is False
    packing.result()
    path = crashed(storage, tmp_path / "crashed")
    assert index_end(path) == path.stat().st_size == storage._pos
    assert zodb_believes(path)
    assert not list(tmp_path.glob("*.new"))


def test_a_file_store_packs_while_its_index_is_saved(tmp_path, monkeypatch):
    database = FileStore("main", str(tmp_path / "Data.fs"))
    try:
        for _ in range(5):
            store(database._file, 0, 1, 2)
        gate = Gate()
        monkeypatch.setattr(
            indexed._Source, "bucket", gate.before(indexed._Source.bucket)
        )
        gate.shut()
        in_vain = Background(database.save_index)
        gate.wait_until_reached()
        database.pack(time.time() + 1, gc=False)
        gate.open()
        assert in_vain.result() is False
        path = crashed(database._file, tmp_path / "crashed")
        assert index_end(path) == path.stat().st_size == database._file._pos
        assert zodb_believes(path)
        # And then the new one's turn comes.
        store(database._file, 0, 70_000)
        assert database.save_index() is True
        path = crashed(database._file, tmp_path / "again")
        assert index_end(path) == path.stat().st_size
        assert zodb_believes(path)
    finally:
        database.close()


def test_after_a_pack_that_could_not_save_it_is_saved(
    open_file, tmp_path, monkeypatch, caplog
):
    storage = open_file()
    for _ in range(9):
        store(storage, 0)
    storage.save_index_if_grown()

    def full(*_args: Any) -> int:
        raise OSError("no space")

    with monkeypatch.context() as patched:
        patched.setattr(index, "save_still", full)
        storage.pack(time.time() + 1, referencesf, gc=False)
    assert "Data.fs.index is not saved: no space" in caplog.text
    assert storage._pos < index_end(tmp_path / "Data.fs")
    assert storage.save_index_if_grown()
    assert index_end(tmp_path / "Data.fs") == storage._pos


def test_two_do_not_save_at_once(open_file, monkeypatch):
    storage = open_file()
    store(storage, 1)
    seen: list[bool] = []
    buckets = indexed._Source.bucket

    def again(source: indexed._Source, prefix: bytes) -> bytes:
        seen.append(storage.save_index_if_grown())
        return buckets(source, prefix)

    monkeypatch.setattr(indexed._Source, "bucket", again)
    assert storage.save_index_if_grown()
    assert seen == [False]


def test_closing_saves_the_last_word(open_file, tmp_path, monkeypatch):
    storage = open_file()
    store(storage, 1)
    buckets = indexed._Source.bucket

    def close_first(source: indexed._Source, prefix: bytes) -> bytes:
        store(storage, 2)
        storage.close()
        return buckets(source, prefix)

    monkeypatch.setattr(indexed._Source, "bucket", close_first)
    assert not storage.save_index_if_grown()
    assert index_end(tmp_path / "Data.fs") == (tmp_path / "Data.fs").stat().st_size
    assert not list(tmp_path.glob("*.new"))


def test_a_commit_that_hangs_does_not_keep_close_from_ending(
    open_file, tmp_path, monkeypatch, caplog
):
    storage = open_file()
    monkeypatch.setattr(indexed, "LOCK_TIMEOUT_S", 0.01)
    held, release = threading.Event(), threading.Event()

    def hang() -> None:
        with storage._lock:
            held.set()
            release.wait(WAIT_S)

    hanging = Background(hang)
    held.wait(WAIT_S)
    storage.close()
    release.set()
    hanging.result()
    assert "is not saved: a commit hangs" in caplog.text


def test_a_disk_that_is_full_is_told(open_file, tmp_path, monkeypatch, caplog):
    storage = open_file()
    store(storage, 1)

    def full(_fd: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        storage.save_index_if_grown()
    assert not list(tmp_path.glob("*.new"))
    # Nobody waits for a save at the end.
    storage.close()
    assert "Data.fs.index is not saved: no space" in caplog.text


def test_a_crash_at_any_moment_of_saving_leaves_the_old_one_or_the_new_one(
    open_file, tmp_path, monkeypatch
):
    storage = open_file()
    for _ in range(3):
        store(storage, 1, 2)
    storage.save_index_if_grown()
    store(storage, 1, 70_000)
    ends = {index_end(tmp_path / "Data.fs"), storage._pos}
    copies: list[Path] = []

    def crashing(function: Callable[..., Any]) -> Callable[..., Any]:
        def before_and_after(*args: Any) -> Any:
            copies.append(crashed(storage, tmp_path / f"before{len(copies)}"))
            value = function(*args)
            copies.append(crashed(storage, tmp_path / f"after{len(copies)}"))
            return value

        return before_and_after

    monkeypatch.setattr(os, "fsync", crashing(os.fsync))
    monkeypatch.setattr(Path, "replace", crashing(Path.replace))
    monkeypatch.setattr(indexed._Source, "bucket", crashing(indexed._Source.bucket))
    assert storage.save_index_if_grown()
    monkeypatch.undo()
    # At least two buckets, the file, its name, its folder.
    assert len(copies) >= 10
    assert {index_end(path) for path in copies} == ends
    for path in copies:
        assert zodb_believes(path)
        check_opening(path)


# Opening


@settings(max_examples=60)
@given(histories, histories, st.booleans(), st.booleans())
def test_after_a_crash_everything_is_found(
    tmp_path_factory, before, after, is_saved, is_packed
):
    folder = tmp_path_factory.mktemp("indexed")
    storage = IndexedFile(str(folder / "Data.fs"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(indexed, "GROWTH_MIN_BYTES", 1)
        write(storage, before)
        if is_packed:
            storage.pack(time.time() + 1, referencesf, gc=False)
        if is_saved:
            storage.save_index_if_grown()
        write(storage, after)
        path = crashed(storage, folder / "crashed")
    storage.close()
    again = IndexedFile(str(path))
    try:
        assert contents(again) == by_zodb(path)
    finally:
        again.close()
    assert zodb_believes(path) or path.stat().st_size < 100


@pytest.fixture
def saved(open_file, tmp_path) -> Path:
    """A file with an index that goes as far as the third of five transactions."""
    storage = open_file()
    for oid in (1, 2, 3):
        store(storage, oid, 100)
    storage.save_index_if_grown()
    for oid in (2, 70_000):
        store(storage, oid, 100)
    return crashed(storage, tmp_path / "saved")


def check_opening(path: Path) -> IndexedFile:
    """Open and close it: it is as FileStorage finds it."""
    expected = by_zodb(path)
    storage = IndexedFile(str(path))
    try:
        assert contents(storage) == expected
    finally:
        storage.close()
    assert index_end(path) == path.stat().st_size
    return storage


def test_a_stale_index_is_completed_and_saved_later(saved):
    end = index_end(saved)
    assert end < saved.stat().st_size
    storage = IndexedFile(str(saved))
    try:
        assert storage._used_index
        assert index_end(saved) == end
        assert storage.save_index_if_grown()
        assert index_end(saved) == saved.stat().st_size
    finally:
        storage.close()


def test_only_what_is_missing_is_read(saved, monkeypatch):
    began: list[int] = []
    scan = scanning.scan

    def noted(fd: int, name: str, objects: Any, start: int) -> Any:
        began.append(start)
        return scan(fd, name, objects, start)

    monkeypatch.setattr(scanning, "scan", noted)
    end = index_end(saved)
    check_opening(saved)
    check_opening(saved)
    assert began == [end, saved.stat().st_size]


def pickled(objects: Any, position: Any) -> bytes:
    return pickle.dumps({"index": objects, "pos": position}, 3)


@pytest.mark.parametrize("kind", ["empty", "cut", "text", "flipped", "old", "folder"])
def test_a_damaged_index_is_not_used(saved, caplog, kind):
    path = Path(f"{saved}.index")
    whole = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
        storage = IndexedFile(str(saved))
        try:
            assert contents(storage) == by_zodb(saved)
        finally:
            storage.close()
    else:
        path.write_bytes(
            {
                "empty": b"",
                "cut": whole[:-40],
                "text": b"something else\n" * 20,
                "flipped": bytes(each ^ 255 for each in whole),
                "old": pickled({number(1): 7}, 500),
            }[kind]
        )
        check_opening(saved)
    [told] = [each for each in caplog.records if "is not used" in each.getMessage()]
    assert "\n" not in told.getMessage()
    assert told.exc_info is None


def test_an_index_of_another_database_is_not_used(saved, open_file, tmp_path, caplog):
    (tmp_path / "other").mkdir()
    other = open_file(tmp_path / "other")
    for oid in (5, 6):
        store(other, oid, oid + 1, oid + 2)
    other.save_index_if_grown()
    assert index_end(tmp_path / "other" / "Data.fs") < saved.stat().st_size
    shutil.copy(tmp_path / "other" / "Data.fs.index", f"{saved}.index")
    check_opening(saved)
    assert "Ignoring index" in caplog.text or "is not used" in caplog.text


def test_an_index_whose_position_is_elsewhere_is_not_used(saved):
    found = index.load(Path(f"{saved}.index"))
    assert found is not None
    size = saved.stat().st_size
    for position in [*range(5, size + 100, 7), -1, 2**47, 2**62]:
        if position == found.position:
            continue
        with open(f"{saved}.index", "wb") as file:
            file.write(pickle.dumps(position, 3))
            for each, bucket in found.objects._data.items():
                file.write(pickle.dumps((each, bucket.toString()), 3))
            file.write(pickle.dumps(None, 3))
        check_opening(saved)


def test_an_index_of_the_future_is_not_used(saved, caplog):
    """The file is an older one, from a backup; its index is not."""
    end = index_end(saved)
    IndexedFile(str(saved)).close()
    assert index_end(saved) > end
    saved.write_bytes(saved.read_bytes()[:end])
    check_opening(saved)
    assert "Ignoring index" in caplog.text


def test_an_index_of_the_future_is_gone_before_the_file_grows_up_to_it(
    saved, monkeypatch
):
    """A new history of the same lengths would fit it at the end, and only there."""
    end = index_end(saved)
    older = saved.read_bytes()[:end]
    storage = FileStorage(str(saved))
    store(storage, 7)
    for _ in range(6):
        store(storage, 1)
    storage.close()
    future = index_end(saved)
    saved.write_bytes(older)
    monkeypatch.setattr(indexed, "GROWTH_MIN_BYTES", 10**9)
    storage = IndexedFile(str(saved))
    # What the first history has from here on, less the first of its transactions.
    for oid in (2, 70_000):
        store(storage, oid, 100)
    store(storage, 8)
    for _ in range(6):
        store(storage, 1)
    assert not storage.save_index_if_grown()
    path = crashed(storage, saved.parent / "crashed")
    storage.close()
    assert path.stat().st_size == future
    again = check_opening(path)
    assert number(7) not in again._index
    assert number(8) in again._index


def test_an_index_of_a_file_that_was_packed_behind_its_back_is_not_used(
    saved, open_file, caplog
):
    stale = Path(f"{saved}.index").read_bytes()
    storage = FileStorage(str(saved))
    for _ in range(3):
        store(storage, 0, 1)
    storage.pack(time.time() + 1, referencesf, gc=False)
    for _ in range(9):
        store(storage, 0)
    storage.close()
    Path(f"{saved}.index").write_bytes(stale)
    check_opening(saved)
    assert "Ignoring index" in caplog.text or "is not used" in caplog.text


@pytest.mark.parametrize("torn", [1, 8, 30, 60])
def test_a_torn_tail_is_cut_off_by_file_storage(saved, torn, caplog):
    whole = saved.read_bytes()
    saved.write_bytes(whole[:-torn])
    check_opening(saved)
    assert "truncated" in caplog.text
    assert list(saved.parent.glob("Data.fs.tr*"))
    assert saved.stat().st_size < len(whole) - torn


def test_what_file_storage_refuses_is_refused(saved):
    data = bytearray(saved.read_bytes())
    # The length of a transaction that the index does not have.
    data[index_end(saved) + 8 : index_end(saved) + 16] = number(3)
    saved.write_bytes(data)
    with pytest.raises(POSError, match="invalid transaction header"):
        FileStore("main", str(saved))


def test_reading_only_writes_nothing(saved, caplog):
    caplog.set_level(logging.INFO)
    expected = by_zodb(saved)
    saved.with_name("Data.fs.index").write_bytes(b"damaged")
    before = {each.name: each.read_bytes() for each in saved.parent.iterdir()}
    storage = IndexedFile(str(saved), read_only=True)
    try:
        assert contents(storage) == expected
        assert not storage.save_index_if_grown()
    finally:
        storage.close()
    assert {e.name: e.read_bytes() for e in saved.parent.iterdir()} == before


def test_a_file_is_opened_as_of_an_earlier_time(saved):
    whole = IndexedFile(str(saved), read_only=True)
    tids = [each.tid for each in whole.iterator()]
    whole.close()
    Path(f"{saved}.index").unlink()
    storage = IndexedFile(str(saved), read_only=True, stop=tids[3])
    try:
        plain = FileStorage(str(saved), read_only=True, stop=tids[3])
        assert contents(storage) == contents(plain)
        plain.close()
    finally:
        storage.close()


def test_a_new_file_has_an_index(tmp_path):
    IndexedFile(str(tmp_path / "Data.fs")).close()
    check_opening(tmp_path / "Data.fs")
