"""The list of transactions: against FileStorage's own iterator and undo log."""

import os
from base64 import decodebytes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.utils import z64

from zeolith.storage import log as log_module
from zeolith.storage.log import LogReader

from ..support.ids import number
from .histories import histories, opened, write


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[FileStorage]:
    storage = opened(tmp_path / "Data.fs")
    yield storage
    storage.close()


def log_of(storage: Any, end: int | None = None) -> LogReader:
    fd = os.open(storage._file_name, os.O_RDONLY)
    return LogReader(fd, storage.getSize() if end is None else end)


def store(storage: Any, *oids: int, status: str = " ", **metadata: bytes) -> bytes:
    transaction = TransactionMetaData(
        metadata.get("user", b""), metadata.get("description", b""), b""
    )
    transaction.extension_bytes = metadata.get("extension", b"")
    storage.tpc_begin(transaction, None, status)
    for oid in oids:
        serial = storage.getTid(number(oid)) if number(oid) in storage._index else z64
        storage.store(number(oid), serial, b"data", "", transaction)
    storage.tpc_vote(transaction)
    tid: bytes = storage.tpc_finish(transaction)
    return tid


@settings(max_examples=60)
@given(histories)
def test_any_history_is_listed_as_zodb_lists_it(tmp_path_factory, history):
    storage = opened(tmp_path_factory.mktemp("log") / "Data.fs")
    try:
        tids = write(storage, history)
        listed = []
        with log_of(storage) as log:
            for entry in log.backwards():
                listed.append((entry, log.oids(entry)))
        listed.reverse()
        assert [entry.tid for entry, _oids in listed] == tids
        for (entry, oids), transaction in zip(listed, storage.iterator(), strict=True):
            assert entry.user == transaction.user
            assert entry.description == transaction.description
            assert entry.extension == transaction.extension_bytes
            assert entry.status == transaction.status.encode()
            assert oids == list(dict.fromkeys(record.oid for record in transaction))
        undo_log = storage.undoLog(0, -1000)
        assert [entry.as_log_entry().size for entry, _oids in reversed(listed)] == [
            each["size"] for each in undo_log
        ]
        assert [entry.tid for entry, _oids in reversed(listed)] == [
            decodebytes(each["id"] + b"\n") for each in undo_log
        ]
    finally:
        storage.close()


def test_an_empty_file_has_an_empty_log(storage):
    with log_of(storage) as log:
        assert list(log.backwards()) == []


@pytest.mark.parametrize("length", [0, 1, 400, 489, 490, 600, 65_000])
def test_texts_of_any_length_are_read_whole(storage, length):
    texts = {"user": b"u" * 3, "description": b"d" * length, "extension": b"e" * length}
    store(storage, 1, **texts)
    with log_of(storage) as log:
        [entry] = log.backwards()
    assert entry.user == texts["user"]
    assert entry.description == texts["description"]
    assert entry.extension == texts["extension"]


def test_an_extension_is_passed_on_as_it_is(storage):
    """Unpickling it would raise."""
    store(storage, 1, extension=b"cos\nsystem\n(S'exit 1'\ntR.")
    with log_of(storage) as log:
        [entry] = log.backwards()
    assert entry.as_log_entry().extension == b"cos\nsystem\n(S'exit 1'\ntR."


def test_an_entry_is_found_by_its_position(storage):
    for oid in (1, 2, 3):
        store(storage, oid, description=b"d" * 1000)
    with log_of(storage) as log:
        entries = list(log.backwards())
        for oid, entry in zip((3, 2, 1), entries, strict=True):
            record = storage._read_data_header(storage._index[number(oid)])
            assert log.entry_at(record.tloc) == entry


def test_an_oid_that_was_stored_twice_is_listed_once(storage):
    transaction = TransactionMetaData(b"", b"", b"")
    storage.tpc_begin(transaction)
    for data in (b"one", b"two"):
        storage.store(number(7), z64, data, "", transaction)
    storage.tpc_vote(transaction)
    storage.tpc_finish(transaction)
    with log_of(storage) as log:
        [entry] = log.backwards()
        assert log.oids(entry) == [number(7)]


@pytest.mark.parametrize("piece_bytes", [42, 50, 100, 1000])
def test_the_oids_are_read_in_pieces(storage, monkeypatch, piece_bytes):
    monkeypatch.setattr(log_module, "_PIECE_BYTES", piece_bytes)
    store(storage, *range(1, 30))
    with log_of(storage) as log:
        [entry] = log.backwards()
        assert log.oids(entry) == [number(each) for each in range(1, 30)]


def test_nothing_beyond_the_end_is_seen(storage):
    first = store(storage, 1)
    end = storage.getSize()
    store(storage, 2)
    with log_of(storage, end) as log:
        assert [entry.tid for entry in log.backwards()] == [first]


def test_the_status_of_a_transaction_is_told(storage):
    store(storage, 1)
    store(storage, 2, status="p")
    with log_of(storage) as log:
        assert [entry.status for entry in log.backwards()] == [b"p", b" "]


def test_a_length_that_leads_out_of_the_file_is_damage(storage, tmp_path):
    store(storage, 1)
    store(storage, 2)
    data = (tmp_path / "Data.fs").read_bytes()
    damaged = tmp_path / "damaged.fs"
    damaged.write_bytes(data[:-8] + (len(data) * 2).to_bytes(8, "big"))
    with (
        LogReader(os.open(damaged, os.O_RDONLY), len(data)) as log,
        pytest.raises(OSError, match=f"damaged before position {len(data)}"),
    ):
        list(log.backwards())


def test_the_descriptor_is_closed_with_the_log(storage):
    with log_of(storage) as log:
        fd = log._fd
        os.fstat(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
