"""A Data.fs: ZODB's file with our read path, at every moment one that ZODB can open."""

import io
import json
import os
import pickle
import shutil
import sys
import tempfile
import threading
import time
from base64 import decodebytes
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from BTrees.OOBTree import OOBucket
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from ZODB._compat import PersistentPickler
from ZODB.FileStorage import FileStorage
from ZODB.FileStorage.FileStorage import FileStorageQuotaError
from ZODB.POSException import (
    POSKeyError,
    ReadOnlyError,
    StorageTransactionError,
    UndoError,
)

from zeolith.storage import commit as commit_module
from zeolith.storage import filestore, indexed
from zeolith.storage.adapted import TIDS_SKIPPED
from zeolith.storage.changes import Change, Changes
from zeolith.storage.database import (
    BrokenDatabase,
    Conflict,
    Finished,
    Revision,
    Unresolved,
    Voted,
    WouldBlock,
)
from zeolith.storage.filestore import FileStore
from zeolith.storage.identity import IdentityError
from zeolith.storage.tids import MAX_TID, Z64, advanced, following, tid_at

from ..support.ids import number
from .histories import MISSING, OIDS, histories, moments, outcome, write
from .transactions import (
    ROOT,
    A,
    B,
    C,
    length,
    plain,
    record,
    state_of,
    store,
    transaction,
    undo,
)

# The module, which the package hides behind the class.
ZODB_FILE_STORAGE = sys.modules[FileStorage.__module__]


def commit(database: FileStore, *operations: Any, **others: Any) -> Finished:
    voted = database.vote(transaction(*operations, **others))
    assert isinstance(voted, Voted)
    finished = database.finish()
    assert finished.tid == voted.tid
    return finished


def as_after_a_crash(database: FileStore, folder: Path) -> Path:
    """A copy of the files as they are on disk while the database is open."""
    folder.mkdir()
    for path in Path(database._path).parent.glob("Data.fs*"):
        if path.suffix not in (".lock", ".tmp") and ".tr" not in path.name:
            shutil.copy(path, folder)
    return folder


def read_by_zodb(folder: Path) -> dict[bytes, bytes]:
    """All current records, read without our code and without a saved index."""
    (folder / "Data.fs.index").unlink(missing_ok=True)
    storage = FileStorage(str(folder / "Data.fs"))
    try:
        assert not list(folder.glob("*.tr*")), "something had to be cut off"
        return {oid: storage.load(oid)[0] for oid in storage._index}
    finally:
        storage.close()


# Reads


@settings(max_examples=40)
@given(histories)
def test_any_history_reads_as_file_storage_reads_it(tmp_path_factory, history):
    folder = tmp_path_factory.mktemp("filestore")
    storage = FileStorage(str(folder / "Data.fs"))
    tids = write(storage, history)
    storage.close()
    database = FileStore("main", str(folder / "Data.fs"))
    reference = FileStorage(str(folder / "Data.fs"), read_only=True)
    try:
        for oid in (*OIDS, MISSING):
            for moment in moments(tids):
                expected = outcome(reference.loadBefore, oid, moment)
                assert outcome(database.load, oid, moment) == expected
            assert outcome(database.get_tid, oid) == outcome(reference.getTid, oid)
            for size in (1, 2, 100):
                assert_same_history(database, reference, oid, size)
        assert_same_log(database, reference, tids)
        assert_changes_are_the_log(database, reference, tids)
    finally:
        reference.close()
        database.close()


def assert_same_history(database: Any, reference: Any, oid: bytes, size: int) -> None:
    expected = outcome(reference.history, oid, size)
    entries = outcome(database.history, oid, size)
    if expected is POSKeyError:
        assert entries is POSKeyError
        return
    assert [
        (each.tid, each.user, each.description, each.size, pickle.loads(each.extension))
        for each in entries
    ] == [
        (
            each["tid"],
            each["user_name"],
            each["description"],
            each["size"],
            {"step": each["step"]},
        )
        for each in expected
    ]


def assert_same_log(database: Any, reference: Any, tids: list[bytes]) -> None:
    for before in (None, *tids):
        for size in (0, 1, 100):
            expected = [
                (decodebytes(each["id"] + b"\n"), each["user_name"], each["size"])
                for each in reference.undoLog(0, -1000)
            ]
            if before is not None:
                expected = [each for each in expected if each[0] < before]
            listed = database.undo_log(before, size)
            assert [(each.tid, each.user, each.size) for each in listed] == expected[
                :size
            ]


def assert_changes_are_the_log(
    database: FileStore, reference: Any, tids: list[bytes]
) -> None:
    last_tid, changes = database.last_changes()
    assert last_tid == (tids[-1] if tids else Z64)
    assert [change.tid for change in changes] == tids
    assert [set(change.oids) for change in changes] == [
        {each.oid for each in transaction} for transaction in reference.iterator()
    ]
    kept = Changes(Z64)
    kept.extend(changes)
    assert kept.last_tid == last_tid
    for tid in (Z64, *tids, *map(following, tids)):
        assert database.committed(tid) is (tid in tids)


def test_the_loop_reads_what_is_in_memory_or_would_block(database):
    tid = commit(database, store(A, plain(1))).tid
    try:
        revision = database.load_nowait(A, MAX_TID)
    except WouldBlock:
        revision = database.load(A, MAX_TID)
    assert revision == Revision(plain(1), tid, None)


def test_what_is_being_written_is_not_seen_before_it_is_durable(database, monkeypatch):
    first = commit(database, store(A, plain(1))).tid
    seen: list[Any] = []
    fsync = os.fsync

    def watched_fsync(fd: int) -> None:
        seen.append(database.load(A, MAX_TID))
        seen.append(database.get_tid(A))
        seen.append(outcome(database.load, B, MAX_TID))
        seen.append(database.info()[1])
        seen.append([entry.tid for entry in database.undo_log(None, 9)])
        fsync(fd)

    monkeypatch.setattr(ZODB_FILE_STORAGE, "fsync", watched_fsync)
    second = commit(database, store(A, plain(2), first), store(B, plain(2))).tid
    before = Revision(plain(1), first, None)
    assert seen == [before, first, POSKeyError, 1, [first]]
    assert database.load(A, MAX_TID) == Revision(plain(2), second, None)


def test_a_read_waits_for_nothing_that_a_commit_holds(database):
    tid = commit(database, store(A, plain(1))).tid
    database.vote(transaction(store(A, plain(2), tid)))
    loaded: list[Any] = []
    with database._file._lock, database._file._files.write_lock():
        reader = threading.Thread(
            target=lambda: loaded.append(database.load(A, MAX_TID))
        )
        reader.start()
        reader.join(30)
    assert loaded == [Revision(plain(1), tid, None)]
    database.abort()


def test_a_packed_transaction_ends_the_undo_log(database):
    first = commit(database, store(ROOT, plain(1))).tid
    commit(database, store(ROOT, plain(2), first))
    database.pack(time.time() + 1)
    assert database.undo_log(None, 10) == []
    third = commit(database, store(A, plain(1))).tid
    assert [entry.tid for entry in database.undo_log(None, 10)] == [third]


def test_only_the_end_of_a_long_log_is_read_at_the_start(open_store, monkeypatch):
    database = open_store()
    tids = [commit(database, store(number(n), plain(n))).tid for n in range(1, 8)]
    monkeypatch.setattr(filestore, "CHANGES_READ_MAX", 4)
    last_tid, changes = database.last_changes()
    assert last_tid == tids[-1]
    assert [(change.since, change.tid) for change in changes] == list(
        pairwise(tids[-4:])
    )
    monkeypatch.setattr(filestore, "OIDS_READ_MAX", 2)
    assert [change.tid for change in database.last_changes()[1]] == tids[-1:]


def test_what_led_to_a_packed_transaction_is_not_known_any_more(database):
    """The pack took ROOT out of the second transaction, which changed it."""
    first = commit(database, store(ROOT, plain(1)), store(A, plain(1))).tid
    second = commit(database, store(ROOT, plain(2), first), store(B, plain(1))).tid
    third = commit(database, store(ROOT, references(A, B), second)).tid
    database.pack(time.time() + 1)
    fourth = commit(database, store(A, plain(2), first)).tid
    assert database.last_changes() == (fourth, [Change(third, fourth, [A], None)])


def references(*oids: bytes) -> bytes:
    """A record with references, so that a pack lets their objects live."""
    file = io.BytesIO()
    pickler = PersistentPickler(
        lambda value: value if isinstance(value, bytes) else None, file, 3
    )
    pickler.dump(("an.application", "Class"))
    pickler.dump(list(oids))
    return file.getvalue()


def changes_of(database: FileStore) -> tuple[bytes, list[Any]]:
    """What a start reads, but for the names that clients have given."""
    last_tid, changes = database.last_changes()
    return last_tid, [change[:3] for change in changes]


def test_the_index_is_saved_before_a_crash(open_store, tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "GROWTH_MIN_BYTES", 200)
    database = open_store()
    assert not database.save_index()
    first = commit(database, store(A, plain(1)), store(B, b"x" * 200)).tid
    assert database.save_index()
    end = database.info()[0]
    commit(database, store(A, plain(2), first))
    folder = as_after_a_crash(database, tmp_path / "crashed")
    again = open_store(folder)
    assert (again._file._saved_upto, again._file._used_index) == (end, 1)
    assert again.load(A, MAX_TID).data == plain(2)
    assert again.load(B, MAX_TID).data == b"x" * 200
    assert changes_of(again) == changes_of(database)


# Transactions


def test_conflicts_are_resolved_here_or_by_the_client(database):
    first = commit(database, store(A, length(0)), store(B, plain("old"))).tid
    commit(database, store(A, length(10), first), store(B, plain("theirs"), first))
    mine = [store(A, length(1), first), store(B, plain("mine"), first)]
    unresolved = database.vote(transaction(*mine))
    assert isinstance(unresolved, Unresolved)
    assert [conflict.oid for conflict in unresolved.conflicts] == [B]
    database.resolve({B: plain("both")})
    tid = database.finish().tid
    assert state_of(database.load_serial(A, tid)) == 11
    assert database.load_serial(B, tid) == plain("both")


def test_an_undo_is_a_transaction_like_others(database):
    first = commit(database, store(A, plain(1))).tid
    second = commit(database, store(A, plain(2), first), store(B, plain(2))).tid
    finished = commit(database, undo(second), description=b"undo")
    assert sorted(finished.oids) == [A, B]
    assert database.load(A, MAX_TID) == Revision(plain(1), finished.tid, None)
    with pytest.raises(POSKeyError):
        database.load(B, MAX_TID)
    with pytest.raises(POSKeyError):
        database.get_tid(B)
    # And it can be undone itself.
    commit(database, undo(finished.tid))
    assert database.load(B, MAX_TID).data == plain(2)


@pytest.mark.parametrize("rounds_max", [2, 3])
def test_an_undo_does_not_ask_the_client_for_ever(database, monkeypatch, rounds_max):
    """Each round begins anew, while everybody else waits."""
    monkeypatch.setattr(commit_module, "UNDO_ROUNDS_MAX", rounds_max)
    tids = [commit(database, store(A, plain(0))).tid]
    for n in range(1, 6):
        tids.append(commit(database, store(A, plain(n), tids[-1])).tid)

    def merged() -> Any:
        answer = database.vote(transaction(*(undo(tid) for tid in tids[1:4])))
        for n in range(100):
            if not isinstance(answer, Unresolved):
                break
            answer = database.resolve({A: plain(f"merged {n}")})
        return answer

    if rounds_max < 3:
        with pytest.raises(UndoError, match="fewer transactions at a time"):
            merged()
        database.abort()
        commit(database, store(A, plain(6), tids[-1]))
    else:
        assert isinstance(merged(), Voted)
        tid = database.finish().tid
        assert database.load_serial(A, tid) == plain("merged 2")


def bucket(**items: Any) -> bytes:
    return record(OOBucket, OOBucket(items).__getstate__())


def test_an_undo_merges_what_came_later(database):
    first = commit(database, store(A, bucket(a=1))).tid
    second = commit(database, store(A, bucket(a=1, b=2), first)).tid
    commit(database, store(A, bucket(a=1, b=2, c=3), second))
    tid = commit(database, undo(second)).tid
    assert state_of(database.load_serial(A, tid)) == state_of(bucket(a=1, c=3))


def test_an_undo_never_imports_a_class(database, monkeypatch):
    first = commit(database, store(A, plain(1))).tid
    second = commit(database, store(A, plain(2), first)).tid
    commit(database, store(A, plain(3), second))

    def find_global(*_names: str) -> None:
        raise AssertionError("a class is imported")

    monkeypatch.setattr("ZODB.ConflictResolution.find_global", find_global)
    asked = database.vote(transaction(undo(second)))
    assert isinstance(asked, Unresolved)
    database.abort()
    assert database.load(A, MAX_TID).data == plain(3)


def chain(database: FileStore, *values: Any) -> list[bytes]:
    """The tids of transactions that gave an object these values, one each."""
    tids = [Z64]
    for value in values:
        tids.append(commit(database, store(A, plain(value), tids[-1])).tid)
    return tids[1:]


def test_what_an_undo_cannot_merge_is_shown_to_the_client(database):
    _first, second, third = chain(database, 1, 2, 3)
    voting = transaction(store(B, plain("b")), undo(second))
    states = (plain(3), plain(2), plain(1))
    assert database.vote(voting) == Unresolved([Conflict(A, third, second, *states)])
    voted = database.resolve({A: plain("merged")})
    assert voted.resolved == [A]
    finished = database.finish()
    assert finished.tid == voted.tid
    assert finished.oids == [B, A]
    assert database.load(A, MAX_TID).data == plain("merged")
    assert database.load(B, MAX_TID).data == plain("b")


def test_each_of_several_undos_may_need_the_client(database):
    _first, second, third, _fourth = chain(database, 1, 2, 3, 4)
    assert isinstance(database.vote(transaction(undo(second), undo(third))), Unresolved)
    again = database.resolve({A: plain("without two")})
    (conflict,) = again.conflicts
    # What the first undo has made is what the second one starts from.
    assert conflict[3:] == (plain("without two"), plain(3), plain(2))
    assert isinstance(database.resolve({A: plain("without both")}), Voted)
    database.finish()
    assert database.load(A, MAX_TID).data == plain("without both")
    # And it is a Data.fs that can be undone once more.
    commit(database, undo(database.last_changes()[0]))
    assert database.load(A, MAX_TID).data == plain(4)


@pytest.mark.parametrize("resolutions", [{}, {B: plain("another object")}])
def test_a_client_that_resolves_nothing_is_not_asked_again(database, resolutions):
    _first, second, _third = chain(database, 1, 2, 3)
    database.vote(transaction(undo(second)))
    with pytest.raises(StorageTransactionError, match="not all of the conflicts"):
        database.resolve(resolutions)
    commit(database, store(B, plain("next")))
    assert database.load(A, MAX_TID).data == plain(3)


def test_nothing_is_left_of_an_undo_that_the_client_gave_up(database, tmp_path):
    _first, second, _third = chain(database, 1, 2, 3)
    database.vote(transaction(store(B, plain("b")), undo(second)))
    database.abort()
    folder = as_after_a_crash(database, tmp_path / "copy")
    assert read_by_zodb(folder) == {A: plain(3)}


def test_an_undo_of_an_undo_is_a_redo(database):
    _first, second = chain(database, 1, 2)
    undone = commit(database, undo(second)).tid
    assert database.load(A, MAX_TID).data == plain(1)
    finished = commit(database, undo(undone))
    assert finished.oids == [A]
    assert database.load(A, MAX_TID).data == plain(2)


def test_a_quota_is_an_error_that_leaves_nothing(open_store, tmp_path):
    database = open_store(quota=2000)
    tid = commit(database, store(A, plain(1))).tid
    size = database.info()
    with pytest.raises(FileStorageQuotaError):
        database.vote(transaction(store(B, b"x" * 3000), store(C, plain(1))))
    assert database.info() == size
    commit(database, store(A, plain(2), tid))
    folder = as_after_a_crash(database, tmp_path / "copy")
    assert read_by_zodb(folder) == {A: plain(2)}


def test_what_was_voted_and_not_finished_is_gone_after_a_crash(
    database, open_store, tmp_path
):
    tid = commit(database, store(A, plain(1))).tid
    database.vote(transaction(store(A, plain(2), tid), store(B, plain(2))))
    folder = as_after_a_crash(database, tmp_path / "crashed")
    again = open_store(folder)
    assert changes_of(again) == (tid, [(Z64, tid, [A])])
    assert again.load(A, MAX_TID).data == plain(1)
    assert again.info()[1] == 1
    commit(again, store(B, plain(3)))


@pytest.mark.parametrize(
    "tail",
    [
        bytes(7),
        bytes(5000),
        b"\xff" * 10,
        MAX_TID + (10_000).to_bytes(8, "big") + b"c" + bytes(6),
        MAX_TID + (23).to_bytes(8, "big") + b"c" + bytes(14),
    ],
)
def test_what_a_crash_left_behind_the_last_transaction_is_cut_off(
    database, open_store, tmp_path, tail
):
    """Blocks that were written, or only reserved, in any order."""
    tid = commit(database, store(A, plain(1))).tid
    folder = as_after_a_crash(database, tmp_path / "crashed")
    with (folder / "Data.fs").open("ab") as file:
        file.write(tail)
    again = open_store(folder)
    assert changes_of(again) == (tid, [(Z64, tid, [A])])
    assert again.load(A, MAX_TID) == Revision(plain(1), tid, None)
    next_tid = commit(again, store(A, plain(2), tid)).tid
    assert tid < next_tid < tid_at(time.time() + 60)
    assert read_by_zodb(as_after_a_crash(again, tmp_path / "then")) == {A: plain(2)}


def test_it_is_a_plain_data_file_whenever_one_looks(database, tmp_path):
    first = commit(database, store(ROOT, plain(1)), store(A, length(0))).tid
    second = commit(database, store(A, length(5), first), user=b"ann").tid
    commit(database, undo(second))
    commit(database, store(A, length(3), second), store(B, plain(2)))
    copy = read_by_zodb(as_after_a_crash(database, tmp_path / "copy"))
    assert copy == {oid: database.load(oid, MAX_TID).data for oid in (ROOT, A, B)}
    database.pack(time.time() + 1)
    assert set(read_by_zodb(as_after_a_crash(database, tmp_path / "packed"))) == {ROOT}


# Read-only


def test_a_read_only_database_reads_and_takes_nothing(open_store, database, tmp_path):
    commit(database, store(A, plain(1)))
    database.close()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    read_only = open_store(read_only=True)
    assert read_only.is_read_only
    assert read_only.database_id == database.database_id
    assert read_only.load(A, MAX_TID).data == plain(1)
    for write_ in (
        lambda: read_only.vote(transaction(store(B, plain(1)))),
        lambda: read_only.new_oids(1),
        lambda: read_only.pack(time.time()),
    ):
        with pytest.raises(ReadOnlyError):
            write_()
    read_only.close()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_read_only_database_that_never_had_an_identity_gets_none(
    open_store, tmp_path
):
    FileStorage(str(tmp_path / "Data.fs")).close()
    read_only = open_store(read_only=True)
    assert len(read_only.database_id) == 16
    assert not (tmp_path / "Data.fs.zeolith").exists()


# Identity


def test_a_database_is_the_same_when_it_is_opened_again(open_store):
    first = open_store()
    first.close()
    again = open_store()
    assert again.database_id == first.database_id
    assert again.epoch == first.epoch == 1


def test_a_damaged_identity_lets_the_file_go(open_store, tmp_path):
    open_store().close()
    beside = tmp_path / "Data.fs.zeolith"
    good = beside.read_text()
    beside.write_text("{}")
    with pytest.raises(IdentityError):
        open_store()
    beside.write_text(good)
    open_store()


# Tids


def test_tids_grow_when_the_clock_jumps_back(open_store, monkeypatch):
    clock = [2_000_000_000.0, 1_000_000_000.0, 1_000_000_000.0, 1_500_000_000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    database = open_store()
    tids = []
    while clock:
        tids.append(commit(database, store(number(len(clock)), plain(1))).tid)
        del clock[0]
        if not clock:
            break
    assert tids == sorted(set(tids))
    assert tids[0] == tid_at(2_000_000_000.0)
    assert tids[1] == following(tids[0])


@pytest.mark.parametrize("end", ["abort", "crash"])
def test_a_tid_that_was_told_at_a_vote_is_never_another_transactions(
    open_store, tmp_path, monkeypatch, end
):
    """Also when the clock stands still and the server comes back from a crash."""
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)
    database = open_store()
    commit(database, store(A, plain(1)))
    told = []
    for oid in (B, C):
        told.append(database.vote(transaction(store(oid, plain(1)))).tid)
        if end == "abort":
            database.abort()
        else:
            database = open_store(as_after_a_crash(database, tmp_path / oid.hex()))
    tid = commit(database, store(B, plain(2))).tid
    assert told[0] < tid
    assert tid not in told


def test_tids_of_a_former_process_are_skipped(open_store, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)
    database = open_store()
    last = commit(database, store(A, plain(1))).tid
    database.close()
    again = open_store()
    assert commit(again, store(B, plain(1))).tid > advanced(last, TIDS_SKIPPED)


def test_a_copied_transaction_keeps_its_tid(database):
    tid = tid_at(1_000_000_000.0)
    assert commit(database, store(A, plain(1)), tid=tid).tid == tid
    assert database.last_changes()[1][-1].tid == tid
    assert database.committed(tid) is True


# Oids


def test_oids_follow_each_other(database):
    assert database.new_oids(3) == [number(1), number(2), number(3)]
    assert database.new_oids(2) == [number(4), number(5)]
    assert database.new_oids(0) == []


def test_oids_are_reserved_before_they_are_given_out(database, tmp_path, monkeypatch):
    def full(_self: Path, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        database.new_oids(1)
    monkeypatch.undo()
    assert database.new_oids(1) == [number(1)]
    fields = json.loads((tmp_path / "Data.fs.zeolith").read_text())
    assert int(fields["oids_reserved"], 16) >= 1


def test_many_oids_need_few_syncs(database, monkeypatch):
    saved = []
    monkeypatch.setattr(database._identity, "_save", lambda: saved.append(1))
    for _ in range(500):
        database.new_oids(100)
    assert len(saved) <= 500 * 100 / filestore.OIDS_RESERVED + 1


def test_oids_that_a_copied_transaction_brings_are_not_given_out(database):
    commit(database, store(number(1000), plain(1)))
    assert database.new_oids(1) == [number(1001)]


def test_oids_are_given_to_threads_that_ask_at_once(database):
    given_out: list[bytes] = []

    def ask() -> None:
        for _ in range(100):
            given_out.extend(database.new_oids(7))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(given_out) == len(set(given_out)) == 2800


class Oids(RuleBasedStateMachine):
    """Whatever happens to the server, no oid is given out twice, nor one in use."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.folders = [self.folder]
        self.database = FileStore("main", str(self.folder / "Data.fs"))
        self.given_out: set[bytes] = set()
        self.in_use: set[bytes] = set()

    @rule(count=st.integers(0, 300))
    def ask(self, count: int) -> None:
        oids = set(self.database.new_oids(count))
        assert len(oids) == count
        assert not oids & self.given_out
        assert not oids & self.in_use
        self.given_out |= oids

    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        if self.given_out - self.in_use:
            unused = sorted(self.given_out - self.in_use)
            oid = data.draw(st.sampled_from(unused))
            commit(self.database, store(oid, plain(1)))
            self.in_use.add(oid)

    @rule(ahead=st.integers(1, 20_000))
    def copy_a_transaction(self, ahead: int) -> None:
        last = max(self.given_out | self.in_use, default=ROOT)
        oid = number(int.from_bytes(last, "big") + ahead)
        commit(self.database, store(oid, plain(1)))
        self.in_use.add(oid)

    @rule()
    def restart(self) -> None:
        self.database.close()
        self.database = FileStore("main", str(self.folder / "Data.fs"))

    @rule()
    def crash(self) -> None:
        folder = Path(tempfile.mkdtemp()) / "crashed"
        self.folders.append(folder.parent)
        as_after_a_crash(self.database, folder)
        self.database.close()
        self.folder = folder
        self.database = FileStore("main", str(folder / "Data.fs"))

    @invariant()
    def what_is_in_use_is_there(self) -> None:
        for oid in self.in_use:
            assert self.database.get_tid(oid)

    def teardown(self) -> None:
        self.database.close()
        for folder in self.folders:
            shutil.rmtree(folder)


TestOids = Oids.TestCase
TestOids.settings = settings(max_examples=30, stateful_step_count=15)


# Pack


def test_a_pack_gives_readers_a_new_file_and_leaves_the_old_to_those_who_have_it(
    database,
):
    first = commit(database, store(ROOT, plain(1)), store(A, plain("garbage"))).tid
    second = commit(database, store(ROOT, plain(2), first)).tid
    old = database.generation
    database.pack(time.time() + 1)
    assert database.generation is not old
    assert old.load(ROOT, second) == Revision(plain(1), first, second)
    assert old.load(A, MAX_TID) == Revision(plain("garbage"), first, None)
    assert database.load(ROOT, MAX_TID) == Revision(plain(2), second, None)
    assert database.load(ROOT, second) is None
    with pytest.raises(POSKeyError):
        database.load(A, MAX_TID)


def test_a_pack_that_has_nothing_to_do_changes_nothing(database):
    database.pack(time.time())
    tid = commit(database, store(ROOT, plain(1))).tid
    database.pack(1_000_000_000.0)
    assert database.load(ROOT, MAX_TID) == Revision(plain(1), tid, None)


def test_a_log_that_is_being_read_goes_on_through_a_pack(database):
    first = commit(database, store(ROOT, plain(1))).tid
    second = commit(database, store(ROOT, plain(2), first)).tid
    with database._log() as log:
        entries = log.backwards()
        assert next(entries).tid == second
        database.pack(time.time() + 1)
        assert next(entries).tid == first
        assert list(entries) == []


def test_commits_go_on_after_a_pack(database, tmp_path):
    first = commit(database, store(ROOT, plain(1))).tid
    second = commit(database, store(ROOT, plain(2), first)).tid
    database.pack(time.time() + 1)
    third = commit(database, store(ROOT, plain(3), second)).tid
    assert database.load(ROOT, MAX_TID) == Revision(plain(3), third, None)
    assert database.load(ROOT, third) == Revision(plain(2), second, third)
    copy = as_after_a_crash(database, tmp_path / "copy")
    assert read_by_zodb(copy) == {ROOT: plain(3)}


def test_readers_read_on_while_packs_and_commits_replace_the_file_under_them(database):
    tid = commit(database, store(ROOT, plain(0))).tid
    stop = threading.Event()
    wrong: list[Any] = []
    reads = [0] * 3

    def read(reader: int) -> None:
        last = Z64
        while not stop.is_set():
            try:
                revision = database.load(ROOT, MAX_TID)
                assert revision is not None
                assert revision.tid >= last
                assert database.history(ROOT, 1)[0].tid >= revision.tid
                assert database.undo_log(None, 3) is not None
                last = revision.tid
            except BaseException as error:
                wrong.append(error)
                return
            reads[reader] += 1

    readers = [threading.Thread(target=read, args=(n,)) for n in range(len(reads))]
    for reader in readers:
        reader.start()
    for round_ in range(20):
        for step in range(3):
            change = store(ROOT, plain(round_ * 3 + step), tid)
            tid = commit(database, change).tid
        database.pack(time.time() + 1)
    stop.set()
    for reader in readers:
        reader.join(30)
    assert not wrong
    assert all(reads)


def test_files_are_let_go_with_the_database(open_store, tmp_path):
    database = open_store()
    commit(database, store(ROOT, plain(1)))
    generation = database.generation
    database.close()
    assert generation.fd == -1
    assert (tmp_path / "Data.fs.index").exists()
    open_store()


def test_a_disaster_leaves_a_file_that_zodb_opens(database, tmp_path, monkeypatch):
    """The disk fails at the sync: what was voted is there whole or not at all."""
    tid = commit(database, store(A, plain(1))).tid

    def fail(_fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(ZODB_FILE_STORAGE, "fsync", fail)
    database.vote(transaction(store(A, plain(2), tid), store(B, plain(2))))
    with pytest.raises(BrokenDatabase, match="Input/output error"):
        database.finish()
    with pytest.raises(Exception):  # noqa: B017, PT011
        database.vote(transaction(store(C, plain(1))))
    database.close()
    folder = as_after_a_crash(database, tmp_path / "after")
    assert read_by_zodb(folder) in (
        {A: plain(1)},
        {A: plain(2), B: plain(2)},
    )
