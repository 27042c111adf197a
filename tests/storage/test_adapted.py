"""Any ZODB storage behind the inner interface."""

import pickle
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ZODB import _compat
from ZODB.blob import BlobStorage
from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage import FileStorage
from ZODB.interfaces import IStorageUndoable
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import (
    POSKeyError,
    ReadConflictError,
    ReadOnlyError,
    UndoError,
    Unsupported,
)
from zope.interface import alsoProvides

from zeolith.storage.adapted import TIDS_SKIPPED, AdaptedStorage, forbid_unpickling
from zeolith.storage.changes import Known, Past
from zeolith.storage.database import (
    Finished,
    LogEntry,
    Revision,
    Unresolved,
    Voted,
    WouldBlock,
)
from zeolith.storage.pack_progress import Packing
from zeolith.storage.tids import MAX_TID, Z64, advanced, following, tid_at

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

DATABASE_ID = b"d" * 16
# What a hostile extension would have done.
executed: list[str] = []


class Hostile:
    """Executes something when it is unpickled."""

    def __reduce__(self) -> Any:
        return executed.append, ("unpickled",)


HOSTILE = pickle.dumps({"key": Hostile()}, 2)


class OfAnotherMake:
    """A storage of a class that is not ZODB's: it takes no tid and has no undo."""

    def __init__(self) -> None:
        self._storage = MappingStorage()

    def tpc_begin(self, transaction: Any) -> None:
        self._storage.tpc_begin(transaction)

    def __len__(self) -> int:
        return len(self._storage)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)


KINDS = ["mapping", "demo", "demo over data", "changes in a file", "file", "another"]


@pytest.fixture
def make(tmp_path) -> Iterator[Callable[[str], AdaptedStorage]]:
    made = []

    def make(kind: str) -> AdaptedStorage:
        storage: Any
        if kind == "mapping":
            storage = MappingStorage()
        elif kind == "demo":
            storage = DemoStorage()
        elif kind == "demo over data":
            storage = DemoStorage(base=FileStorage(str(tmp_path / "base.fs")))
        elif kind == "changes in a file":
            storage = DemoStorage(changes=FileStorage(str(tmp_path / "changes.fs")))
        elif kind == "file":
            storage = FileStorage(str(tmp_path / "Data.fs"))
        else:
            storage = OfAnotherMake()
        made.append(AdaptedStorage("main", storage, DATABASE_ID, 3))
        return made[-1]

    yield make
    for database in made:
        database.close()


@pytest.fixture(params=KINDS)
def database(request, make) -> AdaptedStorage:
    adapted: AdaptedStorage = make(request.param)
    return adapted


@pytest.fixture
def nothing_is_unpickled(monkeypatch) -> Iterator[None]:
    """As in a server's process, but for one test."""
    module = sys.modules[FileStorage.__module__]
    monkeypatch.setattr(module, "loads", module.loads)
    monkeypatch.setattr(_compat, "loads", _compat.loads)
    forbid_unpickling()
    executed.clear()
    yield
    assert not executed


def commit(database: AdaptedStorage, *operations: Any, **others: Any) -> Finished:
    voted = database.vote(transaction(*operations, **others))
    assert isinstance(voted, Voted)
    finished = database.finish()
    assert voted.tid in (finished.tid, None)
    return finished


# What it says of itself


def test_it_has_the_name_and_identity_it_was_given(database):
    assert database.name == "main"
    assert database.database_id == DATABASE_ID
    assert database.epoch == 3
    assert not database.is_read_only


@pytest.mark.parametrize(
    ("kind", "can"),
    [
        ("mapping", False),
        ("demo", False),
        ("changes in a file", True),
        ("file", True),
        ("another", False),
    ],
)
def test_it_can_undo_if_the_storage_can(make, kind, can):
    assert make(kind).supports_undo is can


def test_it_names_the_interfaces_of_zodb_that_the_storage_provides(make):
    assert "IStorage" in make("mapping").interfaces
    assert "IStorageUndoable" not in make("mapping").interfaces
    assert {"IStorage", "IStorageUndoable", "IExternalGC"} <= set(
        make("file").interfaces
    )


def test_size_and_number_of_objects_are_the_storages(database):
    commit(database, store(A, plain(1)), store(B, plain(2)))
    size, objects = database.info()
    assert size > 0
    assert objects == 2


# Reads


def test_nobody_knows_whether_it_would_wait(database):
    commit(database, store(A, plain(1)))
    assert database.near() is None
    for oid in (A, B):
        with pytest.raises(WouldBlock):
            database.load_nowait(oid, MAX_TID)


def test_loads_are_the_storages_own(database):
    first = commit(database, store(A, plain(1))).tid
    second = commit(database, store(A, plain(2), first)).tid
    assert database.load(A, MAX_TID) == Revision(plain(2), second, None)
    assert database.load(A, second) == Revision(plain(1), first, second)
    assert database.load(A, first) is None
    assert database.load_serial(A, first) == plain(1)
    assert database.load_serial(A, second) == plain(2)
    assert database.get_tid(A) == second


def test_what_is_not_there_is_an_error(database):
    tid = commit(database, store(A, plain(1))).tid
    for read in (
        lambda: database.load(B, MAX_TID),
        lambda: database.load_serial(B, tid),
        lambda: database.load_serial(A, following(tid)),
        lambda: database.get_tid(B),
        lambda: database.history(B, 1),
    ):
        with pytest.raises(POSKeyError):
            read()


def test_what_was_there_before_is_read_through_a_demostorage(tmp_path):
    base = FileStorage(str(tmp_path / "base.fs"))
    below = AdaptedStorage("base", base, DATABASE_ID)
    first = commit(below, store(A, plain("base"))).tid
    database = AdaptedStorage("demo", DemoStorage(base=base), DATABASE_ID)
    assert database.last_changes() == (first, [])
    assert database.load(A, MAX_TID) == Revision(plain("base"), first, None)
    second = commit(database, store(A, plain("demo"), first)).tid
    assert second > first
    assert database.load(A, second) == Revision(plain("base"), first, second)
    assert below.load(A, MAX_TID) == Revision(plain("base"), first, None)
    database.close()


def test_the_last_tid_is_known_and_nothing_of_what_led_to_it(database):
    assert database.last_changes() == (Z64, [])
    tid = commit(database, store(A, plain(1))).tid
    assert database.last_changes() == (tid, [])


def test_nothing_is_certain_of_what_changed_long_ago(database):
    first = commit(database, store(A, plain(1))).tid
    second = commit(database, store(A, plain(2), first)).tid
    assert database.changes_before(second, first, 2**30) == Past([], True)
    assert database.last_known([first], second, 2**30) == Known(None, second)


def test_revisions_that_are_not_current_are_told(database):
    first = commit(database, store(A, plain(1)), store(C, plain(1))).tid
    second = commit(database, store(A, plain(2), first)).tid
    revisions = [(A, first), (A, second), (B, first), (C, first)]
    assert database.outdated(revisions) == [A, B]


def test_nobody_remembers_whether_a_transaction_was_committed(database):
    tid = commit(database, store(A, plain(1))).tid
    assert database.committed(tid) is None


# Histories and logs


def test_a_history_is_listed_from_the_newest(database):
    first = commit(database, store(A, plain(1)), user=b"ann", description=b"one").tid
    second = commit(database, store(A, plain(2), first), description=b"two").tid
    assert database.history(A, 10) == [
        LogEntry(second, b"", b"two", b"", len(plain(2))),
        LogEntry(first, b"ann", b"one", b"", len(plain(1))),
    ]
    assert [entry.tid for entry in database.history(A, 1)] == [second]


@pytest.mark.usefixtures("nothing_is_unpickled")
def test_an_extension_goes_in_and_out_and_is_never_unpickled(database):
    commit(database, store(A, plain(1)), extension=HOSTILE)
    [entry] = database.history(A, 10)
    assert entry.extension == HOSTILE
    if database.supports_undo:
        [entry] = database.undo_log(None, 10)
        assert entry.extension == HOSTILE
        commit(database, undo(entry.tid), extension=HOSTILE)


@pytest.mark.usefixtures("nothing_is_unpickled")
def test_an_extension_that_is_no_pickle_is_nobodys_concern(database):
    commit(database, store(A, plain(1)), extension=b"no pickle")
    [entry] = database.history(A, 10)
    assert entry.extension == b"no pickle"


def test_what_another_storage_says_of_a_transaction_is_kept(make):
    """It was written before, by ZODB."""
    database = make("another")
    database._storage._storage.history = lambda _oid, size: [
        {
            "tid": MAX_TID,
            "time": 0.0,
            "user_name": "ann",
            "description": "text",
            "size": 7,
            "path": "/a",
        }
    ]
    [entry] = database.history(A, 1)
    assert entry[:3] == (MAX_TID, b"ann", b"text")
    assert pickle.loads(entry.extension) == {"path": "/a"}
    assert entry.size == 7


@pytest.mark.parametrize("kind", ["file", "changes in a file"])
def test_an_undo_log_is_bounded_in_time_and_number(make, kind):
    database = make(kind)
    tids = [commit(database, store(oid, plain(1))).tid for oid in (A, B, C)]
    newest_first = tids[::-1]
    assert [entry.tid for entry in database.undo_log(None, 10)] == newest_first
    assert [entry.tid for entry in database.undo_log(None, 2)] == newest_first[:2]
    assert [entry.tid for entry in database.undo_log(tids[2], 1)] == [tids[1]]
    assert database.undo_log(tids[0], 10) == []


@pytest.mark.parametrize("kind", ["mapping", "demo", "another"])
def test_a_storage_that_cannot_undo_has_no_undo_log(make, kind):
    with pytest.raises(Unsupported):
        make(kind).undo_log(None, 10)


def test_a_storage_that_could_undo_but_will_not_is_believed():
    storage = MappingStorage()
    alsoProvides(storage, IStorageUndoable)
    storage.supportsUndo = lambda: False
    assert AdaptedStorage("main", storage, DATABASE_ID).supports_undo is False


# Oids


def test_oids_are_never_given_out_twice(database):
    oids = [oid for _ in range(3) for oid in database.new_oids(5)]
    assert len(set(oids)) == 15
    assert all(len(oid) == 8 for oid in oids)
    assert database.new_oids(0) == []


# Transactions


def test_a_transaction_goes_from_vote_to_finish(database):
    voted = database.vote(transaction(store(A, plain(1)), store(B, plain(2))))
    assert isinstance(voted, Voted)
    finished = database.finish()
    assert finished.oids == [A, B]
    assert database.last_changes()[0] == finished.tid


@pytest.mark.parametrize("kind", ["mapping", "demo", "file", "changes in a file"])
def test_the_storages_of_zodb_get_their_tids_from_us(make, kind):
    database = make(kind)
    voted = database.vote(transaction(store(A, plain(1))))
    assert isinstance(voted, Voted)
    assert voted.tid == database.finish().tid


def test_a_storage_of_another_make_gives_its_own_tids(make):
    database = make("another")
    assert database.vote(transaction(store(A, plain(1)))) == Voted(None, [])
    assert database.finish().tid == database.last_changes()[0]


def test_a_conflict_goes_to_the_client_and_comes_back(database):
    first = commit(database, store(A, plain("old")), store(B, length(0))).tid
    commit(database, store(A, plain("theirs"), first), store(B, length(10), first))
    unresolved = database.vote(
        transaction(store(A, plain("mine"), first), store(B, length(1), first))
    )
    assert isinstance(unresolved, Unresolved)
    assert [conflict.oid for conflict in unresolved.conflicts] == [A]
    voted = database.resolve({A: plain("both")})
    assert isinstance(voted, Voted)
    assert sorted(voted.resolved) == [A, B]
    database.finish()
    assert database.load_serial(A, database.get_tid(A)) == plain("both")
    assert state_of(database.load_serial(B, database.get_tid(B))) == 11


@pytest.mark.parametrize("by", ["vote", "abort"])
def test_what_does_not_come_to_its_end_leaves_room_for_the_next(database, by):
    first = commit(database, store(A, plain(1))).tid
    second = commit(database, store(A, plain(2), first)).tid
    if by == "vote":
        with pytest.raises(ReadConflictError):
            database.vote(transaction(store(B, plain(1)), check(A, first)))
    else:
        database.vote(transaction(store(B, plain(1))))
        database.abort()
    assert database.last_changes()[0] == second
    with pytest.raises(POSKeyError):
        database.get_tid(B)
    assert commit(database, store(B, plain(2))).tid > second


def test_aborting_what_waits_for_its_client_leaves_room_for_the_next(database):
    first = commit(database, store(A, plain(1))).tid
    commit(database, store(A, plain(2), first))
    assert isinstance(database.vote(transaction(store(A, plain(3), first))), Unresolved)
    database.abort()
    database.abort()
    commit(database, store(B, plain(1)))


def test_steps_in_another_order_are_a_mistake_of_the_servers(database):
    with pytest.raises(AssertionError):
        database.finish()
    with pytest.raises(AssertionError):
        database.resolve({})
    database.vote(transaction())
    with pytest.raises(AssertionError):
        database.vote(transaction())
    database.abort()


def test_a_resolution_that_fails_leaves_room_for_the_next(make):
    database = make("file")
    first = commit(database, store(A, plain(1))).tid
    second = commit(database, store(A, plain(2), first)).tid
    database.vote(transaction(undo(Z64), store(A, plain(3), first)))
    with pytest.raises(UndoError):
        database.resolve({A: plain("both")})
    assert database.last_changes()[0] == second
    commit(database, store(B, plain(1)))


def test_closing_aborts_what_is_under_way(tmp_path):
    storage = FileStorage(str(tmp_path / "Data.fs"))
    database = AdaptedStorage("main", storage, DATABASE_ID)
    database.vote(transaction(store(A, plain(1))))
    database.close()
    again = FileStorage(str(tmp_path / "Data.fs"))
    assert len(again) == 0
    again.close()


# Tids that clients have seen


@pytest.fixture
def stopped_clock(monkeypatch) -> float:
    now = 1_700_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    return now


@pytest.mark.parametrize("kind", ["mapping", "demo", "file", "changes in a file"])
def test_a_tid_that_was_told_at_a_vote_is_never_another_transactions(
    make, kind, stopped_clock
):
    database = make(kind)
    told: list[bytes] = []
    for end in ("abort", "finish", "abort", "finish"):
        voted = database.vote(
            transaction(store(ROOT, plain(len(told)), last(database)))
        )
        told.append(voted.tid)
        getattr(database, end)()
    assert told == sorted(set(told))
    assert told[0] == tid_at(stopped_clock)


def last(database: AdaptedStorage) -> bytes:
    try:
        return database.get_tid(ROOT)
    except POSKeyError:
        return Z64


def test_after_opening_the_tids_of_a_former_process_are_skipped(
    tmp_path, stopped_clock
):
    """It may have told some at votes before it crashed."""
    storage = FileStorage(str(tmp_path / "Data.fs"))
    tid = commit(AdaptedStorage("main", storage, DATABASE_ID), store(A, plain(1))).tid
    database = AdaptedStorage("main", storage, DATABASE_ID)
    voted = database.vote(transaction(store(B, plain(1))))
    assert isinstance(voted, Voted)
    assert voted.tid == following(advanced(tid, TIDS_SKIPPED))
    database.close()


@pytest.mark.usefixtures("stopped_clock")
def test_the_floor_can_be_raised_to_what_a_client_has_seen(make):
    database = make("mapping")
    seen = tid_at(1_800_000_000.0)
    database.raise_tid_floor(seen)
    database.raise_tid_floor(tid_at(1.0))
    assert commit(database, store(A, plain(1))).tid == following(seen)


# Read-only, pack


def test_a_read_only_storage_takes_nothing(tmp_path):
    path = str(tmp_path / "Data.fs")
    writer = AdaptedStorage("main", FileStorage(path), DATABASE_ID)
    commit(writer, store(A, plain(1)))
    writer.close()
    database = AdaptedStorage("main", FileStorage(path, read_only=True), DATABASE_ID)
    assert database.is_read_only
    assert database.load(A, MAX_TID)
    for write in (
        lambda: database.vote(transaction(store(B, plain(1)))),
        lambda: database.new_oids(1),
        lambda: database.pack(time.time()),
    ):
        with pytest.raises(ReadOnlyError):
            write()
    database.abort()
    database.close()


@pytest.mark.parametrize("kind", ["mapping", "demo", "file"])
def test_a_pack_removes_what_is_old_and_reads_references_without_importing(make, kind):
    database = make(kind)
    name = ("no.such.module", "Class")
    root = record(name, {"child": ("no.such.module", "Class")})
    first = commit(database, store(ROOT, root), store(A, plain("garbage"))).tid
    commit(database, store(ROOT, record(name, {}), first))
    database.pack(time.time() + 1)
    with pytest.raises(POSKeyError):
        database.load_serial(ROOT, first)
    with pytest.raises(POSKeyError):
        database.get_tid(A)
    assert database.load(ROOT, MAX_TID)


def test_a_pack_is_told_whether_garbage_goes_if_the_storage_can_be_told(
    make, monkeypatch
):
    database = make("mapping")
    commit(database, store(ROOT, plain(1)), store(A, plain("garbage")))
    database.pack(time.time() + 1, False)
    assert database.get_tid(A)
    database.pack(time.time() + 1, True)
    with pytest.raises(POSKeyError):
        database.get_tid(A)
    monkeypatch.setattr(database._storage, "pack", lambda _time, _references: None)
    assert database.pack(time.time()).has_changed
    with pytest.raises(Unsupported, match="cannot be told"):
        database.pack(time.time(), False)


def test_a_storage_that_packs_by_itself_cannot_be_stopped(make):
    database = make("mapping")
    commit(database, store(ROOT, plain(1)))
    packing = Packing()
    assert database.pack(time.time() + 1, None, packing).has_changed
    assert packing.describe()["phase"] == "packing"
    assert not packing.cancel("too late")


def test_a_blob_storage_around_another_is_served_too(tmp_path):
    storage = BlobStorage(str(tmp_path / "blobs"), MappingStorage())
    database = AdaptedStorage("main", storage, DATABASE_ID)
    commit(database, store(A, plain(1)))
    assert database.load(A, MAX_TID)
    database.close()


def test_there_is_no_index_to_save(database):
    assert database.save_index() is False
