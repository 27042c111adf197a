"""The steps of one transaction: validate, resolve, store, finish, or leave nothing."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from BTrees.OOBTree import OOBucket
from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage import FileStorage
from ZODB.FileStorage.FileStorage import FileStorageError
from ZODB.interfaces import IStorageUndoable
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import (
    ConflictError,
    POSKeyError,
    ReadConflictError,
    StorageTransactionError,
    UndoError,
    Unsupported,
)
from ZODB.serialize import referencesf
from zope.interface import implementer

from zeolith.storage.commit import FUTURE_MAX_S, Committing
from zeolith.storage.database import (
    BrokenDatabase,
    Conflict,
    Finished,
    Transaction,
    Unresolved,
    Voted,
)
from zeolith.storage.tids import MAX_TID, Z64, following, tid_at
from zeolith.storage.validation import OID_MAX

from .transactions import (
    ROOT,
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

KINDS = ["file", "mapping", "demo", "demo over file"]


def opened(kind: str, directory: Path) -> Any:
    if kind == "file":
        return FileStorage(str(directory / "Data.fs"))
    if kind == "mapping":
        return MappingStorage()
    if kind == "demo":
        return DemoStorage()
    return DemoStorage(changes=FileStorage(str(directory / "changes.fs")))


@pytest.fixture(params=KINDS)
def storage(request, tmp_path) -> Iterator[Any]:
    storage = opened(request.param, tmp_path)
    yield storage
    storage.close()


@pytest.fixture
def file_storage(tmp_path) -> Iterator[Any]:
    storage = opened("file", tmp_path)
    yield storage
    storage.close()


def begun(
    storage: Any, *operations: Any, floor: bytes = Z64, **metadata: Any
) -> Committing:
    committing = Committing(storage, transaction(*operations, **metadata), floor)
    committing.begin(True)
    return committing


def commit(storage: Any, *operations: Any, **metadata: Any) -> Finished:
    committing = begun(storage, *operations, **metadata)
    voted = committing.vote({})
    assert isinstance(voted, Voted)
    return committing.finish()


def refused(storage: Any, *operations: Any, **metadata: Any) -> Any:
    """The error of a vote, of which nothing is left after the abort."""
    before = everything(storage)
    committing = Committing(storage, transaction(*operations, **metadata), Z64)
    try:
        committing.begin(True)
        answer = committing.vote({})
    except Exception as error:
        committing.abort()
        assert everything(storage) == before
        # The storage is free for the next one.
        commit(storage, store(ROOT, plain("next")))
        return error
    raise AssertionError(f"it was not refused but answered {answer}")


def everything(storage: Any) -> Any:
    """All that is in a storage, transaction by transaction."""
    return [
        (each.tid, each.user, [(data.oid, data.data) for data in each])
        for each in storage.iterator()
    ], storage.lastTransaction()


def current(storage: Any, oid: bytes) -> bytes:
    data: bytes = storage.loadBefore(oid, MAX_TID)[0]
    return data


# A transaction that nothing is wrong with


def test_what_is_stored_is_there_under_the_tid_that_was_told_at_the_vote(storage):
    committing = begun(storage, store(A, plain(1)), store(B, plain(2)))
    voted = committing.vote({})
    assert voted == Voted(committing.tid, [])
    assert committing.tid is not None
    with pytest.raises(POSKeyError):
        storage.loadBefore(A, MAX_TID)
    assert committing.finish() == Finished(committing.tid, [A, B])
    assert storage.loadBefore(A, MAX_TID) == (plain(1), committing.tid, None)
    assert storage.lastTransaction() == committing.tid


def test_an_empty_transaction_is_one_too(storage):
    finished = commit(storage)
    assert finished.oids == []
    assert storage.lastTransaction() == finished.tid


def test_metadata_arrive_bit_for_bit(file_storage):
    extension = b"cos\nsystem\n(S'exit 1'\ntR."
    metadata = {"user": b"\xff user", "description": b"\0\xfe", "extension": extension}
    commit(file_storage, store(A, plain(1)), **metadata)
    [stored] = file_storage.iterator()
    assert stored.user == b"\xff user"
    assert stored.description == b"\0\xfe"
    assert stored.extension_bytes == extension


def test_a_storage_that_chooses_its_tids_tells_them_at_the_end():
    storage = MappingStorage()
    committing = Committing(storage, transaction(store(A, plain(1))), Z64)
    committing.begin(False)
    assert committing.vote({}) == Voted(None, [])
    assert committing.finish().tid == storage.lastTransaction()


def test_a_storage_that_answers_as_those_of_old_did_resolved_nothing():
    class OfOld(MappingStorage):
        def tpc_vote(self, transaction: Any) -> Any:
            super().tpc_vote(transaction)
            return [(A, b"tid45678")]

        def tpc_finish(self, *args: Any) -> None:
            super().tpc_finish(*args)

    finished = commit(OfOld(), store(A, plain(1)))
    assert finished.oids == [A]
    assert len(finished.tid) == 8


def test_what_the_storage_resolved_itself_is_told():
    class Resolving(MappingStorage):
        def tpc_vote(self, transaction: Any) -> Any:
            super().tpc_vote(transaction)
            return [B]

    committing = begun(Resolving(), store(A, plain(1)))
    voted = committing.vote({})
    assert isinstance(voted, Voted)
    assert voted.resolved == [B]
    assert committing.finish().oids == [A, B]


# The tid


def test_a_tid_is_greater_than_the_floor_and_the_last_one(storage, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    floor = tid_at(2000.0)
    first = commit(storage, store(A, plain(1)), floor=floor).tid
    assert first == following(floor)
    assert commit(storage, store(B, plain(1))).tid == following(first)


def test_a_copied_transaction_keeps_its_tid(storage):
    tid = tid_at(1000.0)
    assert commit(storage, store(A, plain(1)), tid=tid).tid == tid
    assert storage.loadBefore(A, MAX_TID)[1] == tid


def test_a_copied_transaction_does_not_care_for_the_floor(storage):
    """The floor is there for tids that are new."""
    tid = tid_at(1000.0)
    assert commit(storage, store(A, plain(1)), tid=tid, floor=MAX_TID).tid == tid


@pytest.mark.parametrize("seconds", [0, -1])
def test_a_tid_that_is_not_after_the_last_one_is_refused(storage, seconds):
    commit(storage, store(A, plain(1)), tid=tid_at(1000.0))
    error = refused(storage, store(B, plain(1)), tid=tid_at(1000.0 + seconds))
    assert isinstance(error, StorageTransactionError)
    assert "is not after the last one" in str(error)


@pytest.mark.parametrize("tid", [MAX_TID, b"\x80" + bytes(7), b"\xff" * 8])
def test_a_tid_that_leaves_none_for_the_others_is_refused(storage, tid):
    error = refused(storage, store(A, plain(1)), tid=tid)
    assert isinstance(error, StorageTransactionError)


def test_a_tid_of_a_clock_that_is_a_little_ahead_is_accepted(storage):
    tid = tid_at(time.time() + FUTURE_MAX_S / 2)
    assert commit(storage, store(A, plain(1)), tid=tid).tid == tid


@pytest.mark.parametrize("status", ["c", "", "u", "x", "  ", " " * 100, "é", "\0"])
def test_a_status_that_would_take_the_transaction_away_is_refused(storage, status):
    error = refused(storage, store(A, plain(1)), status=status)
    assert isinstance(error, StorageTransactionError)
    assert len(str(error)) < 100


def test_a_packed_transaction_stays_one_where_a_storage_can_say_so(storage):
    tid = tid_at(1000.0)
    commit(storage, store(A, plain(1)), tid=tid, status="p")
    [stored] = storage.iterator()
    assert stored.tid == tid
    if isinstance(storage, FileStorage):
        assert stored.status == "p"


def test_an_oid_that_leaves_none_for_the_others_is_refused(storage):
    error = refused(storage, store(A, plain(1)), store(b"\x80" + bytes(7), plain(1)))
    assert isinstance(error, StorageTransactionError)
    assert commit(storage, store(OID_MAX, plain(1))).oids == [OID_MAX]


@pytest.mark.parametrize("field", ["user", "description", "extension"])
def test_texts_too_long_for_the_file_are_refused_and_the_storage_stays_free(
    file_storage, field
):
    error = refused(file_storage, store(A, plain(1)), **{field: b"x" * 65536})
    assert isinstance(error, FileStorageError)


# Conflicts


def test_a_conflict_that_the_server_can_resolve_is_resolved(storage):
    first = commit(storage, store(A, length(0)), store(B, plain(0))).tid
    second = commit(storage, store(A, length(10), first)).tid
    committing = begun(storage, store(A, length(1), first), store(B, plain(1), first))
    assert committing.vote({}) == Voted(committing.tid, [A])
    assert committing.finish().oids == [A, B]
    assert state_of(current(storage, A)) == 11
    assert state_of(current(storage, B)) == 1
    assert storage.loadSerial(A, second) == length(10)


def test_an_unresolved_conflict_shows_the_three_states(storage):
    first = commit(storage, store(A, plain("old")), store(B, plain("old"))).tid
    second = commit(
        storage, store(A, plain("theirs"), first), store(B, plain("theirs"), first)
    ).tid
    committing = begun(
        storage, store(A, plain("mine"), first), store(B, plain("mine"), first)
    )
    three = (plain("theirs"), plain("old"), plain("mine"))
    assert committing.vote({}) == Unresolved(
        [Conflict(oid, second, first, *three) for oid in (A, B)]
    )
    committing.abort()


def test_what_the_client_made_of_a_conflict_is_stored(storage):
    first = commit(storage, store(A, plain("old"))).tid
    commit(storage, store(A, plain("theirs"), first))
    committing = begun(storage, store(A, plain("mine"), first), store(B, plain("mine")))
    assert isinstance(committing.vote({}), Unresolved)
    assert committing.vote({A: plain("both")}) == Voted(committing.tid, [A])
    assert committing.finish().oids == [A, B]
    assert current(storage, A) == plain("both")
    assert current(storage, B) == plain("mine")


def test_a_client_that_resolves_a_part_is_not_asked_for_the_rest(storage):
    """One at a time, of very many, the others would wait for days."""
    first = commit(storage, store(A, plain("old")), store(B, plain("old"))).tid
    commit(storage, store(A, plain("theirs"), first), store(B, plain("theirs"), first))
    mine = [store(A, plain("mine"), first), store(B, plain("mine"), first)]
    committing = begun(storage, *mine)
    assert isinstance(committing.vote({}), Unresolved)
    with pytest.raises(StorageTransactionError, match="not all of the conflicts"):
        committing.vote({B: plain("both B")})
    committing.abort()
    committing = begun(storage, *mine)
    committing.vote({})
    voted = committing.vote({B: plain("both B"), A: plain("both A")})
    assert isinstance(voted, Voted)
    assert sorted(voted.resolved) == [A, B]
    committing.finish()
    assert current(storage, A) == plain("both A")
    assert current(storage, B) == plain("both B")


def test_a_conflict_with_a_state_that_is_packed_away_cannot_be_resolved(file_storage):
    first = commit(file_storage, store(ROOT, length(0))).tid
    second = commit(file_storage, store(ROOT, length(1), first)).tid
    file_storage.pack(time.time() + 1, referencesf)
    third = commit(file_storage, store(ROOT, length(2), second)).tid
    committing = begun(file_storage, store(ROOT, length(5), first))
    with pytest.raises(ConflictError) as raised:
        committing.vote({})
    committing.abort()
    assert raised.value.oid == ROOT
    assert raised.value.serials == (third, first)


def test_a_serial_that_never_was_cannot_be_resolved(storage):
    first = commit(storage, store(A, length(0))).tid
    commit(storage, store(A, length(1), first))
    error = refused(storage, store(A, length(5), following(first)))
    assert isinstance(error, ConflictError)
    assert error.serials is not None
    assert error.serials[1] == following(first)


def test_two_new_objects_of_one_oid_have_no_common_state(storage):
    tid = commit(storage, store(A, length(0))).tid
    error = refused(storage, store(A, length(1)))
    assert type(error) is ConflictError
    assert error.serials == (tid, Z64)


def test_two_that_made_the_same_object_agree(storage):
    """Two that open an empty database at once both make its root."""
    commit(storage, store(ROOT, plain("root")))
    committing = begun(storage, store(ROOT, plain("root")))
    voted = committing.vote({})
    assert isinstance(voted, Voted)
    assert voted.resolved == [ROOT]
    finished = committing.finish()
    assert storage.loadBefore(ROOT, MAX_TID)[:2] == (plain("root"), finished.tid)


def test_a_record_that_is_no_pickle_is_a_conflict_for_the_client(storage):
    first = commit(storage, store(A, b"one")).tid
    commit(storage, store(A, b"two", first))
    committing = begun(storage, store(A, b"three", first))
    assert isinstance(committing.vote({}), Unresolved)
    committing.abort()


# All is validated before anything is stored


class Watched:
    """Notes what is called of a storage, and fails when its time has come."""

    def __init__(self, storage: Any, fails_at: int = -1):
        self.calls: list[str] = []
        self._storage = storage
        self._fails_at = fails_at

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._storage, name)

        def watched(*args: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) == self._fails_at:
                raise OSError(5, "Input/output error")
            return attribute(*args)

        return watched


@pytest.mark.parametrize(
    "late",
    [
        lambda first: store(A, plain("conflict"), first),
        lambda first: store(A, length(1)),
        lambda first: check(A, first),
        lambda first: check(C, first),
    ],
    ids=["conflict", "new object twice", "stale read", "missing"],
)
def test_nothing_is_stored_before_all_is_validated(file_storage, late):
    first = commit(file_storage, store(A, plain(0))).tid
    commit(file_storage, store(A, plain(1), first))
    watched = Watched(file_storage)
    committing = begun(watched, store(B, plain(1)), late(first))
    try:
        assert isinstance(committing.vote({}), Unresolved)
    except (ConflictError, POSKeyError):
        assert late(first)[0] == "check" or late(first)[2] == Z64
    assert "store" not in watched.calls
    assert "tpc_vote" not in watched.calls
    committing.abort()


def test_an_object_that_is_stored_twice_is_stored_as_it_was_last(storage):
    first = commit(storage, store(A, plain(0)), store(B, plain(0))).tid
    watched = Watched(storage)
    committing = Committing(
        watched,
        transaction(
            store(A, plain(1), first),
            store(B, plain(2), first),
            store(A, plain(3), first),
        ),
        Z64,
    )
    committing.begin(True)
    committing.vote({})
    assert committing.finish().oids == [A, B]
    assert watched.calls.count("store") == 2
    assert current(storage, A) == plain(3)
    assert current(storage, B) == plain(2)


def test_an_object_that_is_stored_twice_is_resolved_as_it_was_last(storage):
    first = commit(storage, store(A, length(0))).tid
    commit(storage, store(A, length(10), first))
    commit(storage, store(A, length(1), first), store(A, length(5), first))
    assert state_of(current(storage, A)) == 15


def test_an_undo_in_between_makes_no_difference_to_that(file_storage):
    first = commit(file_storage, store(A, length(0))).tid
    commit(file_storage, store(A, length(10), first))
    undone = commit(file_storage, store(B, plain(0))).tid
    commit(
        file_storage,
        store(A, length(1), first),
        undo(undone),
        store(A, length(5), first),
    )
    assert state_of(current(file_storage, A)) == 15


# Reads that must still be true


def test_what_was_read_and_is_current_passes(storage):
    first = commit(storage, store(A, plain(0))).tid
    finished = commit(storage, check(A, first), store(B, plain(1)))
    assert finished.oids == [B]
    assert storage.getTid(A) == first


def test_what_was_read_and_has_changed_is_a_read_conflict(storage):
    first = commit(storage, store(A, plain(0))).tid
    second = commit(storage, store(A, plain(1), first)).tid
    error = refused(storage, store(B, plain(1)), check(A, first))
    assert isinstance(error, ReadConflictError)
    assert (error.oid, error.serials) == (A, (second, first))


def test_what_was_read_and_is_gone_is_an_error(storage):
    error = refused(storage, check(A, Z64))
    assert isinstance(error, POSKeyError)


def test_an_object_may_be_read_and_written_in_one_transaction(storage):
    first = commit(storage, store(A, plain(0))).tid
    finished = commit(storage, check(A, first), store(A, plain(1), first))
    assert storage.getTid(A) == finished.tid


# Undo


def test_a_transaction_is_undone(file_storage):
    first = commit(file_storage, store(A, plain(0)), store(B, plain(0))).tid
    second = commit(file_storage, store(A, plain(1), first), store(C, plain(1))).tid
    committing = begun(file_storage, undo(second))
    voted = committing.vote({})
    assert isinstance(voted, Voted)
    assert sorted(voted.resolved) == [A, C]
    assert sorted(committing.finish().oids) == [A, C]
    assert current(file_storage, A) == plain(0)
    with pytest.raises(POSKeyError):
        file_storage.loadBefore(C, MAX_TID)


def test_several_transactions_are_undone_with_stores_between(file_storage):
    first = commit(file_storage, store(A, plain(0))).tid
    second = commit(file_storage, store(A, plain(1), first)).tid
    third = commit(file_storage, store(B, plain(1))).tid
    finished = commit(
        file_storage, undo(second), store(C, plain(5)), undo(third), store(C, plain(6))
    )
    assert sorted(finished.oids) == [A, B, C]
    assert current(file_storage, A) == plain(0)
    assert current(file_storage, C) == plain(6)
    with pytest.raises(POSKeyError):
        file_storage.loadBefore(B, MAX_TID)


def test_an_undo_that_is_impossible_leaves_nothing(file_storage):
    first = commit(file_storage, store(A, plain(0))).tid
    second = commit(file_storage, store(A, plain(1), first)).tid
    commit(file_storage, store(A, plain(2), second))
    error = refused(file_storage, store(B, plain(9)), undo(second))
    assert isinstance(error, UndoError)


@pytest.mark.parametrize("tid", [Z64, MAX_TID, b"\xff" * 8])
def test_what_never_was_cannot_be_undone(file_storage, tid):
    error = refused(file_storage, undo(tid))
    assert isinstance(error, UndoError)


@pytest.mark.parametrize("kind", ["mapping", "demo"])
def test_a_storage_that_cannot_undo_says_so(kind, tmp_path):
    storage = opened(kind, tmp_path)
    tid = commit(storage, store(A, plain(1))).tid
    assert isinstance(refused(storage, undo(tid)), Unsupported)


def test_an_undo_that_tells_nothing_is_believed():
    @implementer(IStorageUndoable)
    class Quiet(MappingStorage):
        def undo(self, *_args: Any) -> None:
            return None

    assert commit(Quiet(), undo(Z64)).oids == []


# Abort and failure


def test_what_is_aborted_leaves_nothing(storage):
    first = commit(storage, store(A, length(0))).tid
    before = everything(storage)
    committing = begun(storage, store(A, length(1), first), store(B, plain(1)))
    committing.vote({})
    committing.abort()
    assert everything(storage) == before
    assert commit(storage, store(A, length(2), first)).tid > first


def test_what_waits_for_its_client_is_aborted_as_well(storage):
    first = commit(storage, store(A, plain(0))).tid
    commit(storage, store(A, plain(1), first))
    before = everything(storage)
    committing = begun(storage, store(A, plain(2), first))
    assert isinstance(committing.vote({}), Unresolved)
    committing.abort()
    assert everything(storage) == before
    commit(storage, store(B, plain(1)))


def test_aborting_too_often_or_too_early_is_harmless(storage):
    committing = Committing(storage, transaction(store(A, plain(1))), Z64)
    committing.abort()
    committing.begin(True)
    committing.abort()
    committing.abort()
    other = begun(storage, store(B, plain(1)))
    committing.abort()
    other.vote({})
    assert other.finish().oids == [B]
    other.abort()


SCENARIO: list[Any] = [
    lambda first: store(A, length(5), first),
    lambda first: store(B, record(OOBucket, OOBucket({"a": 1}).__getstate__())),
    lambda first: check(C, first),
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_fails_once(kind, tmp_path):
    """With the fault at the first call of the storage, the second, and so on."""
    outcomes: list[str] = []
    while not outcomes or outcomes[-1] != "committed":
        directory = tmp_path / str(len(outcomes))
        directory.mkdir()
        storage = opened(kind, directory)
        outcomes.append(commit_with_a_fault(storage, 1 + len(outcomes)))
        storage.close()
    assert outcomes[:-2] == ["aborted"] * (len(outcomes) - 2)
    assert outcomes[-2] == "broken"
    assert len(outcomes) > 8


def commit_with_a_fault(storage: Any, fails_at: int) -> str:
    first = commit(storage, store(A, length(0)), store(C, plain(0))).tid
    commit(storage, store(A, length(10), first))
    before = everything(storage)
    operations = [step(first) for step in SCENARIO]
    committing = Committing(Watched(storage, fails_at), transaction(*operations), Z64)
    try:
        committing.begin(True)
        committing.vote({})
    except OSError:
        committing.abort()
        assert everything(storage) == before
        commit(storage, store(B, plain("next")))
        return "aborted"
    try:
        committing.finish()
    except BrokenDatabase:
        return "broken"
    assert state_of(current(storage, A)) == 15
    return "committed"


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ValueError("no")])
def test_a_finish_that_fails_is_a_disaster(error):
    class Failing(MappingStorage):
        def tpc_finish(self, *_args: Any) -> None:
            raise error

    committing = begun(Failing(), store(A, plain(1)))
    committing.vote({})
    with pytest.raises(BrokenDatabase) as raised:
        committing.finish()
    assert raised.value.__cause__ is error


def test_a_transaction_begins_empty():
    assert Transaction(b"").operations is not Transaction(b"").operations
