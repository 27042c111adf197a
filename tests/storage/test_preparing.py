"""Votes beside others, on a Data.fs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from BTrees.Length import Length
from BTrees.OOBTree import OOBucket
from hypothesis import given
from hypothesis import strategies as st
from ZODB.FileStorage.FileStorage import FileStorageError, FileStorageQuotaError
from ZODB.POSException import (
    ConflictError,
    POSKeyError,
    ReadConflictError,
    ReadOnlyError,
    StorageTransactionError,
    Unsupported,
)

from zeolith.storage import filestore
from zeolith.storage.conflicts import QUICK_BYTES_MAX
from zeolith.storage.database import Finished, Unresolved, Voted, WouldBlock
from zeolith.storage.filestore import FileStore
from zeolith.storage.locks import ALONE, Claim
from zeolith.storage.plain import PLAIN_OPERATIONS_MIN
from zeolith.storage.preparing import NOWAIT_OPERATIONS_MAX, Preparation, claim_of
from zeolith.storage.records import NOWAIT_NEWER_MAX
from zeolith.storage.room import AHEAD_BYTES
from zeolith.storage.tids import MAX_TID, Z64
from zeolith.storage.validation import OID_MAX

from ..support.ids import number
from .transactions import (
    A,
    B,
    C,
    check,
    length,
    plain,
    record,
    state_of,
    store,
    transaction,
    undo,
)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[FileStore]:
    opened = FileStore("main", str(tmp_path / "Data.fs"))
    # So that a vote need not ask the disk.
    opened.room.make(1, 0)
    opened.room.give_back(1)
    yield opened
    opened.close()


def prepared(database: FileStore, *operations: list[Any], **others: Any) -> Preparation:
    made = database.prepare(transaction(*operations, **others))
    assert isinstance(made, Preparation)
    return made


def committed(database: FileStore, *operations: list[Any]) -> bytes:
    """The tid of a transaction that does this."""
    preparation = prepared(database, *operations)
    preparation.vote({})
    (finished,) = database.append([preparation])
    preparation.end()
    assert isinstance(finished, Finished)
    return finished.tid


def vote_nowait(preparation: Preparation) -> Any:
    return preparation.vote_nowait()


def vote(preparation: Preparation) -> Any:
    return preparation.vote({})


def bucket(count: int, **more: Any) -> bytes:
    """The record of a bucket with so many keys."""
    keys = {f"key {number}": "value" for number in range(count)}
    return record(OOBucket, OOBucket({**keys, **more}).__getstate__())


WAYS = pytest.mark.parametrize("way", [vote_nowait, vote])
# Of few operations each is looked at, of many all together.
MANY = pytest.mark.parametrize("many", [0, PLAIN_OPERATIONS_MIN])


def others(many: int) -> list[list[Any]]:
    """So many stores of objects that nobody else uses."""
    return [store(number(100 + each), plain(each)) for each in range(many)]


# What a transaction claims


def test_a_transaction_claims_what_it_writes_and_what_it_depends_on():
    both = transaction(store(A, b"1"), check(B, Z64), store(A, b"2"), check(A, Z64))
    assert claim_of(both) == Claim({A}, {A, B})
    blobs = transaction(["store_blob", A, Z64, b"", 1], store(C, b"1"))
    assert claim_of(blobs) == Claim({A, C}, set())


@pytest.mark.parametrize(
    "wanted",
    [
        transaction(store(A, b"1"), undo(Z64)),
        transaction(["delete", A, Z64]),
        transaction(["restore", A, Z64, b"1", None], tid=Z64),
        transaction(store(A, b"1"), tid=number(5)),
        transaction(store(A, b"1"), status="p"),
    ],
)
def test_what_changes_more_than_it_names_is_alone(wanted):
    assert claim_of(wanted) == ALONE


# Votes


@WAYS
@MANY
def test_new_objects_are_voted_on(database, way, many):
    stores = [store(A, plain(1)), store(B, plain(2)), *others(many)]
    preparation = prepared(database, *stores)
    assert way(preparation) == Voted(None, [])
    assert list(preparation.written) == [oid for _name, oid, *_rest in stores]
    written = [(oid, data) for _name, oid, _serial, data in stores]
    assert list(preparation.records()) == written


@WAYS
def test_of_several_stores_of_an_object_the_last_is_written(database, way):
    tid = committed(database, store(A, plain(0)))
    again = [store(A, plain(n), tid) for n in range(3)]
    preparation = prepared(database, *again)
    way(preparation)
    assert list(preparation.records()) == [(A, plain(2))]


@WAYS
def test_nothing_of_a_vote_is_seen_before_it_finishes(database, way):
    before = database.info()
    way(prepared(database, store(A, plain(1))))
    assert database.info() == before
    with pytest.raises(POSKeyError):
        database.load(A, MAX_TID)


@WAYS
def test_what_was_read_must_be_current(database, way):
    old = committed(database, store(A, plain(1)))
    new = committed(database, store(A, plain(2), old))
    way(prepared(database, check(A, new), store(B, plain(1))))
    with pytest.raises(ReadConflictError):
        way(prepared(database, check(A, old), store(B, plain(1))))
    with pytest.raises(POSKeyError):
        way(prepared(database, check(C, Z64), store(B, plain(1))))


@WAYS
@MANY
def test_what_the_server_can_resolve_is_written_as_resolved(database, way, many):
    old = committed(database, store(A, length(1)))
    committed(database, store(A, length(2), old))
    preparation = prepared(database, *others(many), store(A, length(5), old))
    assert way(preparation) == Voted(None, [A])
    *_others, (oid, data) = preparation.records()
    assert (oid, state_of(data)) == (A, 6)
    assert Length.__module__.encode() in data


@WAYS
def test_what_the_server_cannot_resolve_the_client_is_asked_for(database, way):
    old = committed(database, store(A, plain(1)))
    new = committed(database, store(A, plain(2), old))
    preparation = prepared(database, store(A, plain(3), old), store(B, plain(1)))
    unresolved = way(preparation)
    assert isinstance(unresolved, Unresolved)
    ((oid, committed_tid, old_tid, theirs, first, ours),) = unresolved.conflicts
    assert (oid, committed_tid, old_tid) == (A, new, old)
    assert (theirs, first, ours) == (plain(2), plain(1), plain(3))
    assert preparation.vote({A: plain(23)}) == Voted(None, [A])
    assert list(preparation.records()) == [(A, plain(23)), (B, plain(1))]


@WAYS
def test_what_no_client_could_resolve_either_it_is_not_asked_for(database, way):
    old = committed(database, store(A, bucket(2)))
    new = committed(database, store(A, bucket(2, added="theirs"), old))
    preparation = prepared(database, store(A, bucket(2, added="ours"), old))
    with pytest.raises(ConflictError) as raised:
        way(preparation)
    assert (raised.value.oid, raised.value.serials) == (A, (new, old))
    assert database.room._taken_bytes == 0


@WAYS
def test_a_client_must_resolve_all_that_it_was_asked_for(database, way):
    old = committed(database, store(A, plain(1)))
    committed(database, store(A, plain(2), old))
    preparation = prepared(database, store(A, plain(3), old))
    way(preparation)
    with pytest.raises(StorageTransactionError, match="not all of the conflicts"):
        preparation.vote({B: plain(1)})


@WAYS
def test_a_conflict_that_nobody_can_resolve_is_refused(database, way):
    committed(database, store(A, plain(1)))
    with pytest.raises(ConflictError):
        way(prepared(database, store(A, plain(2))))


@WAYS
@pytest.mark.parametrize(
    ("texts", "what"),
    [
        ({"user": b"u" * 65536}, "user name"),
        ({"description": b"d" * 65536}, "description"),
        ({"extension": b"e" * 65536}, "extension data"),
    ],
)
def test_texts_that_a_file_has_no_room_for_are_refused(database, way, texts, what):
    with pytest.raises(FileStorageError, match=f"{what} too long"):
        way(prepared(database, store(A, plain(1)), **texts))


@WAYS
@MANY
def test_an_empty_record_is_refused(database, way, many):
    with pytest.raises(StorageTransactionError, match="is empty"):
        way(prepared(database, *others(many), store(A, b"")))


def test_an_empty_record_of_a_client_that_resolves_is_refused(database):
    old = committed(database, store(A, plain(1)))
    committed(database, store(A, plain(2), old))
    preparation = prepared(database, store(A, plain(3), old))
    preparation.vote({})
    with pytest.raises(StorageTransactionError, match="is empty"):
        preparation.vote({A: b""})


@WAYS
def test_an_oid_that_leaves_none_for_others_is_refused(database, way):
    with pytest.raises(StorageTransactionError, match="beyond all"):
        way(prepared(database, store(b"\xff" * 8, plain(1))))
    way(prepared(database, store(OID_MAX, plain(1))))


@WAYS
def test_oids_that_clients_bring_are_not_given_out(database, way):
    way(prepared(database, store(number(1000), plain(1))))
    assert database.new_oids(1) == [number(1001)]


@WAYS
def test_a_storage_without_blobs_takes_none(database, way):
    with pytest.raises(Unsupported, match="no blobs"):
        way(prepared(database, ["store_blob", A, Z64, plain(1), 1]))


def test_a_blob_that_was_not_sent_is_refused(tmp_path):
    database = FileStore("main", str(tmp_path / "b.fs"), blob_dir=str(tmp_path / "b"))
    with pytest.raises(StorageTransactionError, match="no blob 7"):
        prepared(database, ["store_blob", A, Z64, plain(1), 7]).vote({})
    database.close()


def test_a_read_only_storage_prepares_nothing(tmp_path):
    FileStore("main", str(tmp_path / "Data.fs")).close()
    database = FileStore("main", str(tmp_path / "Data.fs"), read_only=True)
    with pytest.raises(ReadOnlyError):
        database.prepare(transaction(store(A, plain(1))))
    database.close()


# On the loop or not


def test_many_operations_are_not_looked_at_on_the_loop(database):
    many = [store(number(n), plain(n)) for n in range(NOWAIT_OPERATIONS_MAX + 1)]
    vote_nowait(prepared(database, *many[1:]))
    preparation = prepared(database, *many)
    with pytest.raises(WouldBlock):
        preparation.vote_nowait()
    assert preparation.vote({}) == Voted(None, [])


def test_a_small_conflict_is_merged_on_the_loop_and_a_large_one_is_not(database):
    def conflicting(count: int) -> tuple[Preparation, int]:
        oid = number(count)
        old = committed(database, store(oid, bucket(count)))
        committed(database, store(oid, bucket(count, theirs=1), old))
        data = bucket(count, ours=1)
        return prepared(database, store(oid, data, old)), 3 * len(data)

    small, small_bytes = conflicting(30)
    assert small_bytes < QUICK_BYTES_MAX
    assert small.vote_nowait() == Voted(None, [number(30)])
    large, large_bytes = conflicting(100)
    assert large_bytes > QUICK_BYTES_MAX
    with pytest.raises(WouldBlock):
        large.vote_nowait()
    assert large.vote({}) == Voted(None, [number(100)])


def test_what_is_left_to_a_thread_is_resolved_there_from_the_start(database):
    old = committed(database, store(A, length(1)), store(B, bucket(100)))
    committed(database, store(A, length(2), old), store(B, bucket(100, theirs=1), old))
    ours = [store(A, length(5), old), store(B, bucket(100, ours=1), old)]
    preparation = prepared(database, *ours)
    with pytest.raises(WouldBlock):
        preparation.vote_nowait()
    assert preparation.vote({}) == Voted(None, [A, B])
    (_a, data), _b = preparation.records()
    assert state_of(data) == 6


def test_a_revision_of_long_ago_is_looked_for_in_a_thread(database):
    tid = old = committed(database, store(A, length(0)))
    for value in range(NOWAIT_NEWER_MAX + 1):
        tid = committed(database, store(A, length(value), tid))
    preparation = prepared(database, store(A, length(5), old))
    with pytest.raises(WouldBlock):
        preparation.vote_nowait()
    assert preparation.vote({}) == Voted(None, [A])


def test_where_nobody_says_what_is_in_memory_conflicts_are_for_threads(
    database, monkeypatch
):
    old = committed(database, store(A, length(1)))
    committed(database, store(A, length(2), old))
    monkeypatch.setattr(filestore, "NOWAIT", 0)
    preparation = prepared(database, store(A, length(5), old))
    with pytest.raises(WouldBlock):
        preparation.vote_nowait()
    assert preparation.vote({}) == Voted(None, [A])


def test_what_is_not_in_memory_is_read_in_a_thread_as_often_as_needed(database):
    class OnDisk:
        def __init__(self, *operations: list[Any]):
            self._operations = operations

        def __len__(self) -> int:
            return len(self._operations)

        def __iter__(self) -> Iterator[list[Any]]:
            return iter(self._operations)

    made = transaction()
    made.operations = OnDisk(store(A, plain(1)), store(B, plain(2)))  # type: ignore[assignment]
    preparation = database.prepare(made)
    with pytest.raises(WouldBlock):
        preparation.vote_nowait()
    preparation.vote({})
    (finished,) = database.append([preparation])
    assert isinstance(finished, Finished)
    assert finished.oids == [A, B]
    assert database.load(B, MAX_TID).data == plain(2)


# Room


@WAYS
def test_a_vote_takes_room_until_its_end(database, way):
    preparation = prepared(database, store(A, plain(1)))
    way(preparation)
    assert database.room._taken_bytes == preparation.file_bytes > len(plain(1))
    preparation.end()
    preparation.end()
    assert database.room._taken_bytes == 0


@WAYS
def test_a_vote_that_fails_takes_no_room(database, way):
    committed(database, store(A, plain(1)))
    with pytest.raises(ConflictError):
        way(prepared(database, store(A, plain(2))))
    assert database.room._taken_bytes == 0


@WAYS
@MANY
def test_what_is_beyond_the_quota_is_refused_at_the_vote(tmp_path, way, many):
    database = FileStore("main", str(tmp_path / "q.fs"), quota=1000)
    database.room.make(1, 0)
    database.room.give_back(1)
    with pytest.raises(FileStorageQuotaError):
        way(prepared(database, *others(many), store(A, b"x" * 1000), store(B, b"x")))
    # What counts is where the last record begins.
    way(prepared(database, *others(many), store(B, b"x" * 1000)))
    database.close()


def test_room_is_asked_of_the_file_that_is_open_whatever_has_its_name(database):
    path = Path(database._path)
    # As ZODB's own pack does, for a moment.
    path.rename(path.with_suffix(".old"))
    # More than is reserved.
    large = prepared(database, store(A, bytes(AHEAD_BYTES + 1)))
    assert isinstance(large.vote({}), Voted)
    path.with_suffix(".old").rename(path)


def test_the_disk_is_not_asked_for_room_that_is_there(database, monkeypatch):
    asked: list[int] = []
    make = database.room.make

    def ask(size: int, last_at: int) -> None:
        asked.append(size)
        make(size, last_at)

    monkeypatch.setattr(database.room, "make", ask)
    prepared(database, store(A, plain(1))).vote({})
    assert not asked
    large = prepared(database, store(B, b"x" * (AHEAD_BYTES + 1)))
    with pytest.raises(WouldBlock):
        large.vote_nowait()
    assert not asked
    large.vote({})
    assert asked == [large.file_bytes]


# Few operations are voted on in a way of their own

_oids = st.sampled_from([A, B, C, OID_MAX, b"\xff" * 8])
_serials = st.sampled_from(["none", "old", "current", "other"])
_records = st.sampled_from([b"", length(1), plain(2), plain("x" * 500)])
_few = st.lists(
    st.tuples(st.sampled_from(["store", "check"]), _oids, _serials, _records),
    max_size=PLAIN_OPERATIONS_MIN,
)
_texts = st.sampled_from([b"", b"text", b"t" * 40_000, b"t" * 70_000])


def vote_as_a_server_does(preparation: Preparation) -> Any:
    try:
        return preparation.vote_nowait()
    except WouldBlock:
        return preparation.vote({})


def outcome_of(way: Any, preparation: Preparation) -> Any:
    """What a vote comes to, and what it leaves."""
    try:
        result = way(preparation)
    except Exception as error:
        result = type(error), str(error)
    told = [result]
    if isinstance(result, Voted):
        told += [
            preparation.file_bytes,
            preparation._last_at,
            list(preparation.written),
            list(preparation.records()),
            preparation._has_room,
        ]
    preparation.end()
    return told


@given(_few, _texts, _texts)
def test_few_are_voted_on_as_many_are(tmp_path_factory, few, user, description):
    database = FileStore("main", str(tmp_path_factory.mktemp("few") / "Data.fs"))
    try:
        database.room.make(1, 0)
        database.room.give_back(1)
        old = committed(database, store(A, length(0)), store(B, plain(0)))
        new = committed(
            database, store(A, length(5), old), store(B, plain(1), old), *others(2)
        )
        tids = {"none": Z64, "old": old, "current": new, "other": number(1)}
        operations = [
            [name, oid, tids[serial], *([data] if name == "store" else [])]
            for name, oid, serial, data in few
        ]
        texts = {"user": user, "description": description}
        seen = database._seen_oid
        here, there = (
            outcome_of(way, prepared(database, *operations, **texts))
            for way in (vote_as_a_server_does, vote)
        )
        assert here == there
        assert database.room._taken_bytes == 0
        assert database._seen_oid >= seen
    finally:
        database.close()
