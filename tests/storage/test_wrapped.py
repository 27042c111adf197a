"""A Data.fs below wrappers is a FileStore in everything but its records."""

import time
from contextlib import closing
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import ZConfig
import ZODB.config
from zc.zlibstorage import ServerZlibStorage, ZlibStorage
from ZODB.blob import Blob
from ZODB.DemoStorage import DemoStorage
from ZODB.POSException import POSKeyError, UndoError
from ZODB.tests.hexstorage import HexStorage, ServerHexStorage

from zeolith.storage.adapted import AdaptedStorage
from zeolith.storage.database import Revision, Unresolved, Voted, WouldBlock
from zeolith.storage.opening import OpeningError, open_database
from zeolith.storage.tids import MAX_TID, Z64
from zeolith.storage.wrapped import LOOP_BYTES_MAX, NotAWrapper, WrappedFileStore

from ..support.ids import number
from .transactions import (
    A,
    B,
    length,
    plain,
    record,
    references,
    state_of,
    store,
    transaction,
    undo,
)


def encoded(data: bytes) -> bytes:
    return b".h" + data.hex().encode()


def opened(path: Path, wrap: Any = HexStorage, **options: Any) -> WrappedFileStore:
    return WrappedFileStore("main", str(path / "Data.fs"), wrap, **options)


@pytest.fixture
def database(tmp_path):
    database = opened(tmp_path)
    yield database
    database.close()


def commit(database: AdaptedStorage, *operations: list[Any]) -> bytes:
    voted = database.vote(transaction(*operations))
    assert isinstance(voted, Voted), voted
    finished = database.finish()
    assert voted.tid == finished.tid
    return finished.tid


def test_records_are_converted_on_their_way_in_and_out(tmp_path, database):
    tid = commit(database, store(A, plain(1)))
    assert database.load(A, MAX_TID) == Revision(plain(1), tid, None)
    assert database.load_nowait(A, MAX_TID) == Revision(plain(1), tid, None)
    assert database.load_serial(A, tid) == plain(1)
    assert database.load(A, tid) is None
    assert database.get_tid(A) == tid
    assert encoded(plain(1)) in (tmp_path / "Data.fs").read_bytes()


def test_what_is_in_the_file_is_not_what_clients_know(database):
    """Nobody may answer a load with it."""
    commit(database, store(A, plain(1)))
    assert database.near() is None


def test_what_is_long_to_convert_is_not_converted_on_the_loop(database):
    data = plain("x" * LOOP_BYTES_MAX)
    tid = commit(database, store(A, data))
    with pytest.raises(WouldBlock):
        database.load_nowait(A, MAX_TID)
    assert database.load(A, MAX_TID) == Revision(data, tid, None)


def test_wrappers_of_both_kinds_are_asked_themselves(tmp_path):
    database = opened(tmp_path, lambda file: ServerHexStorage(HexStorage(file)))
    tid = commit(database, store(A, encoded(plain(1))))
    with pytest.raises(WouldBlock):
        database.load_nowait(A, MAX_TID)
    assert database.load(A, MAX_TID) == Revision(encoded(plain(1)), tid, None)
    assert database.load(A, tid) is None
    assert database.load_serial(A, tid) == encoded(plain(1))
    with pytest.raises(POSKeyError):
        database.load(B, MAX_TID)
    database.close()


def test_identity_oids_and_changes_outlive_a_restart(tmp_path, database):
    tid = commit(database, store(A, plain(1)))
    (given,) = database.new_oids(1)
    identity = database.database_id
    database.close()
    again = opened(tmp_path)
    assert again.database_id == identity
    assert again.last_changes()[0] == tid
    assert again.committed(tid)
    assert again.new_oids(1)[0] >= given
    again.close()


@pytest.mark.parametrize(
    ("wrap", "encode"),
    [
        (HexStorage, bytes),
        (ServerHexStorage, encoded),
        (ZlibStorage, bytes),
        (ServerZlibStorage, bytes),
        (lambda file: HexStorage(ZlibStorage(file)), bytes),
    ],
    ids=["hex", "hex at the client", "zlib", "zlib at the client", "both"],
)
def test_the_server_resolves_what_it_can_whatever_records_look_like(
    tmp_path, wrap, encode
):
    database = opened(tmp_path, wrap)
    first = commit(database, store(A, encode(length(0))))
    commit(database, store(A, encode(length(10)), first))
    last = commit(database, store(A, encode(length(5)), first))
    found = database.load_serial(A, last)
    if encode is encoded:
        found = bytes.fromhex(found[2:].decode())
    assert state_of(found) == 15
    database.close()


def test_conflicts_go_down_in_the_form_in_which_they_came(tmp_path):
    database = opened(tmp_path, ServerHexStorage)
    states = [encoded(plain(n)) for n in range(3)]
    first = commit(database, store(A, states[0]))
    commit(database, store(A, states[1], first))
    unresolved = database.vote(transaction(store(A, states[2], first)))
    assert isinstance(unresolved, Unresolved)
    (conflict,) = unresolved.conflicts
    assert [conflict.old, conflict.committed, conflict.new] == states
    assert database.resolve({A: encoded(plain("merged"))}) == Voted(
        database.tid_floor, [A]
    )
    database.finish()
    database.close()


def test_a_record_that_cannot_be_decoded_is_a_conflict_for_the_client(tmp_path):
    database = opened(tmp_path, ServerHexStorage)
    first = commit(database, store(A, b"one"))
    commit(database, store(A, b"two", first))
    unresolved = database.vote(transaction(store(A, b"three", first)))
    assert isinstance(unresolved, Unresolved)
    database.close()


@pytest.mark.parametrize(
    ("wrap", "encode"), [(HexStorage, bytes), (ServerHexStorage, encoded)]
)
def test_an_undo_merges_converted_records(tmp_path, wrap, encode):
    database = opened(tmp_path, wrap)
    first = commit(database, store(A, encode(length(1))))
    second = commit(database, store(A, encode(length(11)), first))
    commit(database, store(A, encode(length(111)), second))
    commit(database, undo(second))
    found = database.load(A, MAX_TID)
    assert found is not None
    assert found.data == encode(length(101))
    database.close()


@pytest.mark.parametrize(
    ("wrap", "encode"),
    [
        (HexStorage, bytes),
        (ServerHexStorage, encoded),
        (lambda file: HexStorage(HexStorage(file)), bytes),
    ],
    ids=["hex", "hex at the client", "twice"],
)
def test_an_undo_that_the_server_cannot_merge_is_merged_by_the_client(
    tmp_path, wrap, encode
):
    database = opened(tmp_path, wrap)
    first = commit(database, store(A, encode(plain(1))))
    second = commit(database, store(A, encode(plain(2)), first))
    commit(database, store(A, encode(plain(3)), second))
    unresolved = database.vote(transaction(undo(second)))
    assert isinstance(unresolved, Unresolved)
    (conflict,) = unresolved.conflicts
    shown = [conflict.old, conflict.committed, conflict.new]
    assert shown == [encode(plain(n)) for n in (2, 3, 1)]
    voted = database.resolve({A: encode(plain("merged"))})
    assert isinstance(voted, Voted)
    tid = database.finish().tid
    assert database.load_serial(A, tid) == encode(plain("merged"))
    database.close()


def test_an_undo_below_wrappers_of_both_kinds_is_merged_by_the_server_or_nobody(
    tmp_path,
):
    database = opened(tmp_path, lambda file: HexStorage(ServerHexStorage(file)))
    first = commit(database, store(A, plain(1)))
    second = commit(database, store(A, plain(2), first))
    commit(database, store(A, plain(3), second))
    with pytest.raises(UndoError):
        database.vote(transaction(undo(second)))
    database.close()


def test_a_packed_file_that_cannot_be_read_is_not_written(
    tmp_path, database, monkeypatch
):
    """Nobody would find what is committed from then on."""
    commit(database, store(bytes(8), references()))
    commit(database, store(A, plain(2)))

    def fail(*_args: Any) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("zeolith.storage.filestore.Generation", fail)
    with pytest.raises(OSError, match="Too many open files"):
        database.pack(4_000_000_000 - 1)
    with pytest.raises(ValueError, match="closed file"):
        database.vote(transaction(store(B, plain(3))))
    monkeypatch.undo()
    database.close()
    with closing(opened(tmp_path)) as again:
        assert again.load(bytes(8), MAX_TID)
        commit(again, store(B, plain(3)))


def test_blobs_are_known_as_such_below_wrappers(tmp_path):
    """An undo brings the old file back, and a pack takes those of garbage."""
    blobs = tmp_path / "blobs"
    database = opened(tmp_path, blob_dir=str(blobs), pack_keep_old=False)
    first = commit_blob(database, b"first")
    second = commit_blob(database, b"second", first)
    undone = commit(database, undo(second))
    assert database.load_blob(A, undone, 0, 100).data == b"first"
    commit(database, store(number(0), references()))
    database.pack(time.time() + 1)
    assert not list(blobs.rglob("*.blob"))
    database.close()


def test_what_cannot_be_decoded_is_no_blob(tmp_path):
    database = opened(tmp_path, ServerHexStorage, blob_dir=str(tmp_path / "blobs"))
    first = commit(database, store(A, encoded(plain(1))))
    second = commit(database, store(A, b".hodd", first))
    third = commit(database, undo(second))
    commit(database, undo(third))
    assert database.load_serial(A, second) == b".hodd"
    assert database.load_serial(A, database.get_tid(A)) == b".hodd"
    database.close()


def commit_blob(database: AdaptedStorage, data: bytes, serial: bytes = Z64) -> bytes:
    upload = database.uploads.begin()
    upload.write([(0, data)])
    asked = transaction(["store_blob", A, serial, record(Blob, None), 0])
    asked.blobs = upload.seal(asked.operations)
    database.vote(asked)
    tid = database.finish().tid
    upload.discard()
    return tid


def test_what_is_packed_is_found_through_the_wrapper(database):
    commit(database, store(bytes(8), plain(1)))
    commit(database, store(A, plain(2)))
    database.pack(4_000_000_000 - 1)
    with pytest.raises(POSKeyError):
        database.load(A, MAX_TID)
    assert database.load(bytes(8), MAX_TID)


def test_a_storage_that_is_no_wrapper_is_refused_and_the_file_let_go(tmp_path):
    with pytest.raises(NotAWrapper):
        opened(tmp_path, lambda file: DemoStorage(base=file))
    opened(tmp_path).close()


# From a configuration


def from_text(text: str, *, is_read_only: bool = False) -> AdaptedStorage:
    schema = ZODB.config.getStorageSchema()
    document, _handlers = ZConfig.loadConfigFile(schema, StringIO(text))
    return open_database("main", document.storage, is_read_only=is_read_only)


HEX = "%import ZODB.tests\n<hexstorage>\n{}</hexstorage>\n"
FILE = "<filestorage>\npath {}\n</filestorage>\n"


def test_a_filestorage_below_a_wrapper_is_opened_as_one(tmp_path):
    text = HEX.format(FILE.format(tmp_path / "Data.fs"))
    for _ in range(2):
        database = from_text(text)
        assert isinstance(database, WrappedFileStore)
        database.close()


def test_a_server_that_is_read_only_reads_below_the_wrapper_too(tmp_path):
    text = HEX.format(FILE.format(tmp_path / "Data.fs"))
    with pytest.raises(OpeningError, match="not there to read"):
        from_text(text, is_read_only=True)
    from_text(text).close()
    database = from_text(text, is_read_only=True)
    assert database.is_read_only
    database.close()


@pytest.mark.parametrize("below", ["<mappingstorage/>\n", "<demostorage/>\n"])
def test_anything_else_below_a_wrapper_is_adapted(below):
    database = from_text(HEX.format(below))
    assert type(database) is AdaptedStorage
    commit_without_a_tid = database.vote(transaction(store(A, plain(1))))
    assert isinstance(commit_without_a_tid, Voted)
    database.finish()
    found = database.load(A, MAX_TID)
    assert found is not None
    assert found.data == plain(1)
    database.close()


def test_a_filestorage_below_something_else_is_no_filestore(tmp_path):
    text = f"%import zc.beforestorage\n<before>\n{FILE}</before>\n"
    from_text(FILE.format(tmp_path / "Data.fs")).close()
    database = from_text(text.format(tmp_path / "Data.fs"))
    assert type(database) is AdaptedStorage
    assert database.is_read_only
    database.close()
