"""Batches of a log, put together again: against ZODB's own iterators."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from persistent.TimeStamp import TimeStamp
from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage import FileStorage
from ZODB.FileStorage.format import CorruptedDataError
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import StorageError, Unsupported
from ZODB.serialize import referencesf

from zeolith.storage.adapted import AdaptedStorage
from zeolith.storage.database import Batch, DataRecord, TransactionPiece, Wish
from zeolith.storage.filestore import FileStore
from zeolith.storage.tids import MAX_TID, Z64, following

from ..support.ids import number
from .histories import histories, write
from .transactions import A, B, C, store, transaction

EVERYTHING = Wish(Z64, MAX_TID, 1)


def put_together(database: Any, wish: Wish) -> list[TransactionPiece]:
    """All transactions, each whole, as a client gets them that follows all cursors."""
    whole: list[TransactionPiece] = []
    cursor = None
    while True:
        pieces, rest, cursor = database.transactions(wish, cursor)
        whole.extend(pieces)
        while rest is not None:
            ((*_same, records),), rest, none = database.transactions(wish, rest)
            assert none is None
            assert records
            whole[-1].records.extend(records)
        if cursor is None:
            return whole


def as_zodb_has_it(storage: Any, start: Any = None, stop: Any = None) -> list[Any]:
    return [
        TransactionPiece(
            each.tid,
            each.status,
            each.user,
            each.description,
            each.extension_bytes,
            [DataRecord(r.oid, r.tid, r.data, r.data_txn) for r in each],
        )
        for each in storage.iterator(start, stop)
    ]


def commit(database: Any, *operations: Any, **others: Any) -> bytes:
    database.vote(transaction(*operations, **others))
    tid: bytes = database.finish().tid
    return tid


@pytest.fixture
def database(tmp_path: Path) -> Any:
    opened = FileStore("main", str(tmp_path / "Data.fs"))
    yield opened
    opened.close()


@settings(max_examples=60, deadline=None)
@given(histories, st.sampled_from([1, 500, 5000, 10**6]), st.data())
def test_any_history_is_iterated_as_zodb_iterates_it(
    tmp_path_factory, history, bytes_max, data
):
    path = tmp_path_factory.mktemp("iteration") / "Data.fs"
    storage = FileStorage(str(path))
    try:
        tids = write(storage, history)
        bounds = st.sampled_from([Z64, *tids, *map(following, tids), MAX_TID])
        start, stop = data.draw(bounds), data.draw(bounds)
        expected = as_zodb_has_it(storage, start, stop)
    finally:
        storage.close()
    database = FileStore("main", str(path))
    try:
        assert put_together(database, Wish(start, stop, bytes_max)) == expected
    finally:
        database.close()


def adapted(kind: str) -> AdaptedStorage:
    storage = MappingStorage()
    if kind == "demo":
        storage = DemoStorage(base=storage)
    return AdaptedStorage("main", storage, b"i" * 16)


@pytest.mark.parametrize("kind", ["mapping", "demo"])
@pytest.mark.parametrize("bytes_max", [1, 150, 10**6])
def test_any_storage_is_iterated(kind, bytes_max):
    database = adapted(kind)
    extension = pickle.dumps({"key": 1}, 3)
    tids = [
        commit(
            database,
            store(number(count), b"data"),
            store(number(count + 100), b"more" * 20),
            extension=extension,
            user=b"user",
        )
        for count in range(1, 4)
    ]
    whole = put_together(database, Wish(tids[1], tids[2], bytes_max))
    assert [each.tid for each in whole] == tids[1:]
    for count, each in enumerate(whole, 2):
        assert each[1:5] == (" ", b"user", b"", extension)
        assert each.records == [
            DataRecord(number(count), each.tid, b"data", None),
            DataRecord(number(count + 100), each.tid, b"more" * 20, None),
        ]
    database.close()


def test_a_storage_that_minds_a_commit_meanwhile_is_asked_again(monkeypatch):
    database = adapted("mapping")
    tid = commit(database, store(A, b"data"))
    iterator = database._storage.iterator
    failures = [RuntimeError("the bucket being iterated changed size")] * 2

    def failing(*args: Any) -> Any:
        if failures:
            raise failures.pop()
        return iterator(*args)

    monkeypatch.setattr(database._storage, "iterator", failing)
    assert [each.tid for each in put_together(database, EVERYTHING)] == [tid]
    failures.extend([RuntimeError("changed size")] * 100)
    with pytest.raises(StorageError, match="changed size"):
        database.transactions(EVERYTHING, None)
    database.close()


def test_a_storage_without_an_iterator_says_so():
    database = AdaptedStorage("main", MappingStorage(), b"i" * 16)
    database._storage = object()
    with pytest.raises(Unsupported):
        database.transactions(EVERYTHING, None)
    with pytest.raises(Unsupported):
        database.current_records(None, MAX_TID, 1)


def test_a_batch_has_at_least_one_record_and_little_too_much(database):
    records = [store(number(count), b"x" * 1000) for count in range(1, 30)]
    commit(database, *records)
    sizes = []
    wish = Wish(Z64, MAX_TID, 5000)
    batch = database.transactions(wish, None)
    while True:
        sizes.append(len(batch.pieces[-1].records))
        if batch.rest is None:
            break
        batch = database.transactions(wish, batch.rest)
    assert sum(sizes) == 29
    assert all(1 <= size <= 5 for size in sizes)


# Cursors


def halfway(database: Any, bytes_max: int = 1) -> tuple[list[bytes], Batch]:
    """Three transactions of two records each, and a batch with the first record."""
    tids = [
        commit(database, store(A, b"%d" % n, serial), store(B, b"%d" % n, serial))
        for n, serial in _serials(database)
    ]
    batch = database.transactions(Wish(Z64, MAX_TID, bytes_max), None)
    assert len(batch.pieces) == len(batch.pieces[0].records) == 1
    return tids, batch


def _serials(database: Any) -> Any:
    for n in range(3):
        yield n, database.get_tid(A) if n else Z64


def test_a_cursor_outlives_a_restart(tmp_path, database):
    tids, batch = halfway(database)
    database.close()
    again = FileStore("main", str(tmp_path / "Data.fs"))
    try:
        ((tid, *_rest, records),), rest, _next = again.transactions(
            EVERYTHING, batch.rest
        )
        assert (tid, [each.oid for each in records]) == (tids[0], [B])
        assert rest is None
        assert again.transactions(EVERYTHING, batch.next).pieces[0].tid == tids[1]
    finally:
        again.close()


def pack(database: Any, tid: bytes) -> None:
    """Pack to just after ``tid``, with what is stored reachable or not."""
    database._file.pack(TimeStamp(tid).timeTime() + 1e-6, referencesf, gc=False)


def test_a_cursor_to_what_a_pack_has_moved_finds_it_again(database):
    commit(database, store(C, b"to be packed away"))
    commit(database, store(C, b"kept", database.get_tid(C)))
    first = database.transactions(Wish(Z64, MAX_TID, 10**6), None)
    last = commit(database, store(A, b"a"), store(B, b"b"))
    wish = Wish(last, MAX_TID, 1)
    batch = database.transactions(wish, None)
    assert batch.rest is not None
    packed_to = first.pieces[-1].tid
    pack(database, packed_to)
    assert len(put_together(database, EVERYTHING)) == 2
    ((tid, *_rest, records),), rest, _next = database.transactions(wish, batch.rest)
    assert (tid, [each.oid for each in records], rest) == (last, [B], None)


def test_a_cursor_to_what_a_pack_has_removed_goes_on_behind_it(database):
    tids, batch = halfway(database)
    pack(database, tids[2])
    # All of it was overwritten by the last one.
    assert database.transactions(EVERYTHING, batch.next).pieces[0].tid == tids[2]
    with pytest.raises(StorageError, match="packed away while it was read"):
        database.transactions(EVERYTHING, batch.rest)


def test_a_record_that_a_pack_has_removed_from_around_a_cursor_is_missed(database):
    first = commit(database, store(A, b"a"), store(B, b"b"))
    batch = database.transactions(EVERYTHING, None)
    commit(database, store(A, b"aa", first))
    last = commit(database, store(C, b"c"))
    pack(database, last)
    with pytest.raises(StorageError, match="packed away while it was read"):
        database.transactions(EVERYTHING, batch.rest)


def test_records_that_a_pack_moves_within_their_transaction_are_not_missed(database):
    oids = [number(each) for each in range(6)]
    first = commit(database, *(store(oid, b"same size") for oid in oids))
    wish = Wish(Z64, MAX_TID, 200)
    ((*_same, records),), rest, _next = database.transactions(wish, None)
    # The transaction stays where it is, and so do the sizes of its records: where the
    # next record was there is the one after it.
    last = commit(database, store(oids[0], b"later", first))
    pack(database, last)
    assert 1 < len(records) < 5
    while rest is not None:
        ((*_same, more),), rest, _next = database.transactions(wish, rest)
        records.extend(more)
    assert [each.oid for each in records] == oids


def test_records_that_a_pack_moves_in_another_storage_are_not_missed():
    database = adapted("mapping")
    oids = [number(each) for each in range(6)]
    first = commit(database, *(store(oid, b"same size") for oid in oids))
    rest = database.transactions(Wish(Z64, MAX_TID, 200), None).rest
    last = commit(database, store(oids[0], b"later", first))
    database.pack(TimeStamp(last).timeTime() + 1e-6, False)
    with pytest.raises(StorageError, match="packed away while it was read"):
        database.transactions(Wish(Z64, MAX_TID, 200), rest)


@settings(max_examples=300, deadline=None)
@given(cursor=st.binary(max_size=40) | st.binary(min_size=32, max_size=32))
def test_any_bytes_are_a_cursor_that_leads_nowhere_else(one_database, cursor):
    _check_cursor(one_database, cursor)


@settings(max_examples=300, deadline=None)
@given(
    tid=st.integers(-1, 3),
    position=st.integers(0, 1000) | st.integers(0, 2**64 - 1),
    record=st.integers(0, 1000) | st.integers(0, 2**64 - 1),
    oid=st.sampled_from([A, B, C, b"\xff" * 8]),
)
def test_a_cursor_that_was_made_up_leads_to_a_record_or_nowhere(
    one_database, tid, position, record, oid
):
    _database, whole = one_database
    real = whole[tid].tid if 0 <= tid < len(whole) else number(7)
    cursor = real + position.to_bytes(8, "big") + record.to_bytes(8, "big") + oid
    _check_cursor(one_database, cursor)


@pytest.fixture(scope="module")
def one_database(tmp_path_factory) -> Any:
    path = tmp_path_factory.mktemp("cursors") / "Data.fs"
    database = FileStore("main", str(path))
    halfway(database)
    yield database, put_together(database, EVERYTHING)
    database.close()


def _check_cursor(one_database: Any, cursor: bytes) -> None:
    database, whole = one_database
    try:
        batch = database.transactions(Wish(Z64, MAX_TID, 10**6), cursor)
    except StorageError:
        return
    for piece in batch.pieces:
        (real,) = (each for each in whole if each.tid == piece.tid)
        assert set(piece.records) <= set(real.records)


def test_a_cursor_to_a_transaction_that_was_made_up_has_an_end(database):
    """Its one record, inside a record that somebody stored, points to itself."""
    # The headers of the transaction and of the record that it will be in.
    start = database.info()[0] + 23 + 42
    length = 23 + 42 + 8
    made_up = [
        number(5) + length.to_bytes(8, "big") + b" " + bytes(6),
        A + number(5) + bytes(8) + start.to_bytes(8, "big") + bytes(2 + 8),
        (start + 23).to_bytes(8, "big"),
        length.to_bytes(8, "big"),
    ]
    commit(database, store(B, b"".join(made_up)))
    cursor = number(5) + start.to_bytes(8, "big") + bytes(8) + b"\xff" * 8
    with pytest.raises(CorruptedDataError):
        database.transactions(EVERYTHING, cursor)


@pytest.mark.parametrize("cursor", [b"", b"short", b"x" * 17])
def test_a_cursor_of_another_kind_of_storage_is_refused(cursor):
    database = adapted("mapping")
    with pytest.raises(StorageError, match="none of this storage's"):
        database.transactions(EVERYTHING, cursor)
    database.close()


@pytest.mark.parametrize("tid", [Z64, number(5), MAX_TID])
def test_the_rest_of_a_transaction_that_is_not_there_is_an_error(tid):
    database = adapted("mapping")
    commit(database, store(A, b"data"))
    with pytest.raises(StorageError, match="packed away while it was read"):
        database.transactions(EVERYTHING, tid + number(1) + A)
    database.close()


def test_an_iteration_leaves_no_file_open(tmp_path):
    storage = FileStorage(str(tmp_path / "Data.fs"))
    database = AdaptedStorage("main", storage, b"i" * 16)
    for count in range(3):
        commit(database, store(number(count + 1), b"data"))
    before = len(os.listdir("/proc/self/fd"))
    put_together(database, EVERYTHING)
    assert len(os.listdir("/proc/self/fd")) == before
    database.close()


# Current records


@pytest.mark.parametrize("bytes_max", [1, 10**6])
def test_the_current_records_are_those_of_the_snapshot(database, bytes_max):
    tids = {oid: commit(database, store(oid, b"1")) for oid in (A, B, C)}
    gone = commit(database, ["delete", B, tids[B]])
    again = commit(database, store(C, b"2", tids[C]))

    def walk(before: bytes) -> list[Any]:
        found, oid = [], None
        while True:
            records, oid = database.current_records(oid, before, bytes_max)
            found.extend(records)
            if oid is None:
                return found

    assert walk(following(again)) == [(A, tids[A], b"1"), (C, again, b"2")]
    assert walk(following(gone)) == [(A, tids[A], b"1"), (C, tids[C], b"1")]
    assert walk(following(tids[A])) == [(A, tids[A], b"1")]
    assert walk(Z64) == []


def test_the_current_records_of_another_storage(tmp_path):
    storage = FileStorage(str(tmp_path / "Data.fs"))
    database = AdaptedStorage("main", storage, b"i" * 16)
    tids = {oid: commit(database, store(oid, b"1")) for oid in (A, B)}
    assert database.current_records(None, MAX_TID, 1) == ([(A, tids[A], b"1")], B)
    assert database.current_records(B, MAX_TID, 1) == ([(B, tids[B], b"1")], None)
    database.close()
