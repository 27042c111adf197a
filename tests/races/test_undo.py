"""Undo, redo and looking back, with several clients at one database."""

import time
from typing import Any

import pytest
from BTrees.OOBTree import OOBTree
from transaction import TransactionManager
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.POSException import POSKeyError, UndoError
from ZODB.tests.ConflictResolution import PCounter, PCounter2

from ..support.inprocess import client_of
from ..support.records import Listening, commit, oid_of, seen, wait_for_position
from ..support.waiting import wait_until

X, Y = oid_of("x"), oid_of("y")


def undo(storage: Any, *numbers: int) -> bytes:
    """Undo the transactions with these numbers in the undo log; returns the tid."""
    ids = [storage.undoLog()[n]["id"] for n in numbers]
    metadata = TransactionMetaData()
    storage.tpc_begin(metadata)
    for each in ids:
        storage.undo(each, metadata)
    storage.tpc_vote(metadata)
    tid: bytes = storage.tpc_finish(metadata)
    return tid


def test_every_undo_is_told_to_everybody(server, writer, reader):
    """Also to a client that has the undone record in its cache."""
    database, of_the_writer = Listening(), Listening()
    reader.registerDB(database)
    writer.registerDB(of_the_writer)
    commit(writer, x=b"old", y=b"old")
    tid = commit(writer, x=b"new", y=b"new")
    wait_for_position(reader, tid)
    assert (seen(reader, "x"), seen(reader, "y")) == (b"new", b"new")
    undone = undo(writer, 0)
    wait_for_position(reader, undone)
    wait_until(lambda: database.told[-1:] == [(undone, {X, Y})], "it is told")
    assert (seen(reader, "x"), seen(writer, "x")) == (b"old", b"old")
    redone = undo(reader, 0)
    wait_for_position(writer, redone)
    wait_until(lambda: of_the_writer.told[-1:] == [(redone, {X, Y})], "it is told")
    assert (seen(reader, "x"), seen(writer, "x")) == (b"new", b"new")


def test_a_vote_answers_what_was_undone(writer):
    commit(writer, x=b"old", y=b"old")
    commit(writer, x=b"new", y=b"new")
    metadata = TransactionMetaData()
    writer.tpc_begin(metadata)
    assert writer.undo(writer.undoLog()[0]["id"], metadata) is None
    assert sorted(writer.tpc_vote(metadata)) == [X, Y]
    writer.tpc_abort(metadata)
    assert seen(writer, "x") == b"new"


def test_an_object_whose_making_was_undone_is_gone_for_everybody(writer, reader):
    tid = commit(writer, x=b"data")
    wait_for_position(reader, tid)
    assert seen(reader, "x") == b"data"
    undone = undo(writer, 0)
    wait_for_position(reader, undone)
    for storage in (writer, reader):
        with pytest.raises(POSKeyError):
            storage.load(X)
    redone = undo(reader, 0)
    wait_for_position(writer, redone)
    assert seen(writer, "x") == b"data"


# With ZODB.DB


@pytest.fixture
def db(writer):
    db = DB(writer)
    yield db
    db.close()


def change(db: DB, **values: Any) -> None:
    with db.transaction(", ".join(values)) as connection:
        connection.root().update(values)


def undone(db: DB, *numbers: int) -> None:
    manager = TransactionManager()
    log = db.undoLog()
    db.undoMultiple([log[n]["id"] for n in numbers], manager.get())
    manager.commit()


def test_a_connection_of_another_client_sees_an_undo(server, db):
    change(db, x=1)
    change(db, x=2)
    with client_of(server) as storage:
        other = DB(storage)
        manager = TransactionManager()
        connection = other.open(manager)
        assert connection.root()["x"] == 2
        undone(db, 0)
        wait_for_position(storage, db.lastTransaction())
        manager.begin()
        assert connection.root()["x"] == 1
        other.close()


def test_several_transactions_are_undone_at_once_and_redone(db):
    with db.transaction() as connection:
        connection.root()["tree"] = OOBTree()
    for n in range(4):
        with db.transaction() as connection:
            connection.root()["tree"][n] = n
    undone(db, 1, 2)
    with db.transaction() as connection:
        assert list(connection.root()["tree"]) == [0, 3]
    undone(db, 0)
    with db.transaction() as connection:
        assert list(connection.root()["tree"]) == [0, 1, 2, 3]


@pytest.mark.parametrize("numbers", [(1,), (1, 2), (2, 1), (0, 2), (0, 1, 2)])
def test_an_undo_is_merged_by_the_applications_class(db, numbers):
    with db.transaction() as connection:
        connection.root()["x"] = PCounter()
    for _n in range(4):
        with db.transaction() as connection:
            connection.root()["x"].inc()
    undone(db, *numbers)
    with db.transaction() as connection:
        assert connection.root()["x"]._value == 4 - len(numbers)


def test_what_the_application_cannot_merge_cannot_be_undone(db):
    with db.transaction() as connection:
        connection.root()["x"] = PCounter2()
    for _n in range(2):
        with db.transaction() as connection:
            connection.root()["x"].inc()
    with pytest.raises(UndoError, match="modified by a later transaction"):
        undone(db, 1)
    with db.transaction() as connection:
        assert connection.root()["x"]._value == 2
        connection.root()["x"].inc()


# Looking back


def test_a_connection_at_a_moment_sees_what_was_then(db):
    change(db, x=1)
    then = db.lastTransaction()
    change(db, x=2)
    now = db.lastTransaction()
    seen_at = {}
    for option in ({"at": then}, {"before": now}, {"at": now}):
        connection = db.open(TransactionManager(), **option)
        seen_at[next(iter(option.items()))] = connection.root()["x"]
        connection.close()
    assert seen_at == {("at", then): 1, ("before", now): 1, ("at", now): 2}


def test_a_look_back_is_possible_across_a_pack_if_it_was_current_then(db):
    change(db, x=1)
    change(db, x=2)
    then = db.lastTransaction()
    change(db, x=3)
    third, second = (entry["time"] for entry in db.undoLog(0, 2))
    db.pack((second + third) / 2)
    connection = db.open(TransactionManager(), at=then)
    assert connection.root()["x"] == 2
    connection.close()
    assert [each["description"] for each in db.undoLog()] == ["x"]


def test_what_is_packed_away_is_not_there_for_anybody(server, db):
    for n in range(3):
        change(db, x=n)
    root = bytes(8)
    *_, first = db.history(root, 10)
    db.pack(time.time() + 1)
    with client_of(server) as storage:
        (entry,) = storage.history(root, 10)
        assert entry["tid"] == db.lastTransaction()
        assert storage.undoLog() == []
        with pytest.raises(POSKeyError):
            storage.loadSerial(root, first["tid"])


def test_a_history_says_who_and_why(db):
    change(db, x=1)
    manager = TransactionManager()
    connection = db.open(manager)
    manager.begin()
    manager.get().setUser("ann")
    manager.get().note("why")
    connection.root()["x"] = 2
    manager.commit()
    oid = connection.root()._p_oid
    connection.close()
    newest, *older = db.history(oid, 10)
    assert newest["tid"] == db.lastTransaction()
    assert (newest["user_name"], newest["description"]) == ("/ ann", "why")
    assert len(older) == 2
    assert len(db.history(oid, 1)) == 1
