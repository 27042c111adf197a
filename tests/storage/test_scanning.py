"""The end of a Data.fs is read as ZODB's read_index reads it, only faster."""

import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.fsIndex import fsIndex
from ZODB.serialize import referencesf
from ZODB.utils import p64, u64, z64

from zeolith.storage import scanning
from zeolith.storage.scanning import MAGIC, Scanned, scan

from ..support.ids import number
from .histories import histories, opened, write
from .transactions import plain

START = len(MAGIC)


def scanned(path: Path, start: int = START, index: Any = None) -> tuple[Any, Scanned]:
    index = fsIndex() if index is None else index
    fd = os.open(path, os.O_RDONLY)
    try:
        return index, scan(fd, "Data.fs", index, start)
    finally:
        os.close(fd)


def index_by_zodb(path: Path) -> tuple[dict[bytes, int], int, bytes]:
    """What FileStorage makes of the file without a saved index."""
    copy = path.with_name("copy.fs")
    shutil.copy(path, copy)
    Path(f"{copy}.index").unlink(missing_ok=True)
    storage = FileStorage(str(copy))
    try:
        return dict(storage._index.items()), storage._pos, storage._ltid
    finally:
        storage.close()


def store(storage: Any, *oids: int, data: bytes = b"data", status: str = " ") -> bytes:
    transaction = TransactionMetaData(b"user", b"description", b"")
    storage.tpc_begin(transaction, None, status)
    for oid in oids:
        serial = storage.getTid(number(oid)) if number(oid) in storage._index else z64
        storage.store(number(oid), serial, data, "", transaction)
    storage.tpc_vote(transaction)
    tid: bytes = storage.tpc_finish(transaction)
    return tid


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of three transactions."""
    storage = opened(tmp_path / "Data.fs")
    for oids in ((1, 2), (2, 3, 70_000), (1,)):
        store(storage, *oids)
    storage.close()
    return tmp_path / "Data.fs"


def starts(path: Path) -> list[int]:
    """Where the transactions begin, and the end of the file."""
    data = path.read_bytes()
    positions = [START]
    while positions[-1] < len(data):
        at = positions[-1]
        positions.append(at + u64(data[at + 8 : at + 16]) + 8)
    return positions


@pytest.fixture
def pieces(monkeypatch) -> Callable[[int], None]:
    return lambda size: monkeypatch.setattr(scanning, "PIECE_BYTES", size)


@settings(max_examples=100)
@given(histories, st.integers(60, 9000), st.booleans())
def test_the_index_of_any_history_is_file_storages(
    tmp_path_factory, history, piece_bytes, is_packed
):
    path = tmp_path_factory.mktemp("scanning") / "Data.fs"
    storage = opened(path)
    write(storage, history)
    if is_packed:
        storage.pack(time.time() + 1, referencesf, gc=False)
        write(storage, history)
    storage.close()
    objects, position, last_tid = index_by_zodb(path)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(scanning, "PIECE_BYTES", piece_bytes)
        index, end = scanned(path)
        assert dict(index.items()) == objects
        assert end.position == position
        assert (end.tid or z64) == last_tid
        # And from the middle of the file.
        for start in starts(path):
            before = fsIndex(_as_of(path, start))
            index, end = scanned(path, start, before)
            assert dict(index.items()) == objects
            assert end.position == position


def _as_of(path: Path, end: int) -> dict[bytes, int]:
    cut = path.with_name("cut.fs")
    cut.write_bytes(path.read_bytes()[:end])
    return dict(scanned(cut)[0].items())


def test_nothing_is_there_to_read(tmp_path):
    opened(tmp_path / "Data.fs").close()
    index, end = scanned(tmp_path / "Data.fs")
    assert (list(index), end) == ([], Scanned(START, None))
    (tmp_path / "empty").write_bytes(b"")
    assert scanned(tmp_path / "empty")[1] == Scanned(START, None)


def test_a_file_that_is_something_else_is_not_read(tmp_path, path):
    path.write_bytes(b"FS21" + path.read_bytes()[4:])
    index, end = scanned(path)
    assert (list(index), end) == ([], Scanned(START, None))


@pytest.mark.parametrize("left", [0, 1, 16, 23, 40, 80, -8, -1])
def test_a_torn_transaction_at_the_end_is_left_to_file_storage(path, left):
    *_, before, last, end = starts(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: last + left if left >= 0 else end + left])
    index, at = scanned(path)
    assert at.position == last
    assert at.tid == whole[before : before + 8]
    assert dict(index.items()) == _as_of(path, last)


def damaged(path: Path, at: int, what: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(what)] = what
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("offset", "what"),
    [
        # Of the transaction: its length and its status.
        (8, p64(5)),
        (8, p64(2**62)),
        (16, b"c"),
        (16, b"x"),
        (16, b"\xff"),
        # Of its first record: previous record, transaction, version, length.
        (38 + 16, b"\1"),
        (38 + 24, p64(7)),
        (38 + 32, b"\0\1"),
        (38 + 34, p64(1)),
        (38 + 34, p64(2**63)),
        # The repetition of the length.
        (-8, p64(6)),
    ],
)
def test_a_scan_ends_before_what_is_odd(path, pieces, offset, what):
    first, second, third, _end = starts(path)
    damaged(path, (second if offset >= 0 else third) + offset, what)
    header = 23 + len(b"user") + len(b"description")
    assert header == 38
    for size in (64, 2**20):
        pieces(size)
        index, end = scanned(path)
        assert end.position == second
        assert end.tid == path.read_bytes()[first : first + 8]
        # Nothing of it is in the index, nor an empty bucket.
        assert dict(index.items()) == _as_of(path, second)
        assert index.maxKey() == number(2)


def test_a_wrong_previous_pointer_and_older_tids_are_only_told(path, caplog):
    first, second, third, end = starts(path)
    objects, _position, _tid = index_by_zodb(path)
    damaged(path, second + 38 + 16, p64(START + 38 + 1))
    damaged(path, third, path.read_bytes()[first : first + 8])
    index, at = scanned(path)
    assert at.position == end
    assert dict(index.items()) == objects
    assert (
        f"1 records point to a wrong previous revision, the first is at {second + 38}"
        in caplog.text
    )
    assert f"tids decrease at {third}" in caplog.text


def test_a_transaction_that_was_undone_by_an_old_zodb_is_skipped(path):
    _first, second, _third, end = starts(path)
    damaged(path, second + 16, b"u")
    index, at = scanned(path)
    assert at.position == end
    assert number(3) not in index
    assert set(index) == set(index_by_zodb(path)[0])


def test_records_larger_than_a_piece_are_skipped(tmp_path, pieces):
    storage = opened(tmp_path / "Data.fs")
    for oid in range(1, 20):
        store(storage, oid, oid + 100, data=bytes(5000) if oid % 3 else plain(oid))
    storage.close()
    pieces(100)
    index, end = scanned(tmp_path / "Data.fs")
    objects, position, tid = index_by_zodb(tmp_path / "Data.fs")
    assert dict(index.items()) == objects
    assert end == (position, tid)


def test_a_long_scan_tells_how_far_it_is(path, pieces, caplog, monkeypatch):
    monkeypatch.setattr(scanning, "TOLD_FROM_BYTES", 100)
    monkeypatch.setattr(scanning, "PROGRESS_INTERVAL_S", 0)
    pieces(64)
    caplog.set_level(logging.INFO)
    scanned(path)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("Data.fs: 0 MB are not in the saved index")
    assert any(" % of them are read, " in line for line in lines[1:-1])
    assert "MB were read in" in lines[-1]
