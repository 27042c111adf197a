"""What a transaction says of itself, and what is legal though few programs do it."""

import datetime
from typing import Any

import pytest
from persistent.mapping import PersistentMapping
from transaction import TransactionManager
from transaction.interfaces import TransientError
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.FileStorage.FileStorage import FileStorageError
from ZopeUndo.Prefix import Prefix

from ..support.inprocess import client_of
from ..support.records import Listening, commit, oid_of, seen, wait_for_position

X = oid_of("x")


class Thing:
    """A class that only the application has."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Thing)

    __hash__ = object.__hash__


EXTENSIONS: dict[str, dict[Any, Any]] = {
    "text": {"path": "/folder/\N{SNOWMAN}"},
    "a key that is a number": {1: "one"},
    "a key that is a tuple": {(1, 2): None},
    "a date": {"when": datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.UTC)},
    "nested": {"list": [1, {"set": {1, 2}}, (b"\xff", None, 1.5, 2**100)]},
    "large": {"large": b"x" * 60_000},
    "empty": {},
}


def metadata(extension: dict[Any, Any]) -> TransactionMetaData:
    return TransactionMetaData(
        "user \N{SNOWMAN}", "description \N{LATIN SMALL LETTER E WITH ACUTE}", extension
    )


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_an_extension_arrives_bit_for_bit(server, writer, tmp_path, extension: str):
    """Whatever the application puts there is its own business."""
    transaction = metadata(EXTENSIONS[extension])
    written = transaction.extension_bytes
    writer.tpc_begin(transaction)
    writer.store(X, None, b"data", "", transaction)
    writer.tpc_vote(transaction)
    tid = writer.tpc_finish(transaction)
    (told,) = writer.undoLog(0, 1)
    for key, value in EXTENSIONS[extension].items():
        assert told[key] == value
    server.stop()
    plain = FileStorage(str(tmp_path / "Data.fs"), read_only=True)
    (record,) = plain.iterator()
    assert record.tid == tid
    assert record.user == transaction.user
    assert record.description == transaction.description
    assert record.extension_bytes == written
    plain.close()


def test_a_class_that_an_extension_names_is_nothing_to_whoever_reads_it(
    server, writer, tmp_path, caplog
):
    """It may be anybody's who may write; what is written is the application's."""
    transaction = metadata({"thing": Thing()})
    written = transaction.extension_bytes
    writer.tpc_begin(transaction)
    writer.store(X, None, b"data", "", transaction)
    writer.tpc_vote(transaction)
    writer.tpc_finish(transaction)
    (told,) = writer.undoLog(0, 1)
    assert "thing" not in told
    assert told["description"] == transaction.description
    assert "test_metadata.Thing" in caplog.text
    server.stop()
    plain = FileStorage(str(tmp_path / "Data.fs"), read_only=True)
    (record,) = plain.iterator()
    assert record.extension_bytes == written
    plain.close()


def test_a_transaction_that_cannot_be_sent_is_told_at_once_and_harms_nobody(
    server, writer
):
    """Not a lost connection, after which the program would try for ever."""
    session = writer.current_session
    transaction = metadata({})
    transaction.user = b"u" * 70_000
    writer.tpc_begin(transaction)
    writer.store(X, None, b"data", "", transaction)
    with pytest.raises(FileStorageError, match="too long") as raised:
        writer.tpc_vote(transaction)
    assert not isinstance(raised.value, TransientError)
    writer.tpc_abort(transaction)
    assert writer.current_session is session
    commit(writer, x=b"data")


@pytest.fixture
def db(writer):
    db = DB(writer)
    yield db
    db.close()


def change(db: DB, user: str, path: str, note: str) -> None:
    manager = TransactionManager()
    connection = db.open(manager)
    manager.begin()
    transaction = manager.get()
    transaction.setUser(user, path)
    transaction.note(note)
    transaction.setExtendedInfo("number", 7)
    connection.root()[note] = PersistentMapping()
    manager.commit()
    connection.close()


@pytest.mark.parametrize(
    ("specification", "notes"),
    [
        ({"user_name": Prefix("/plone")}, ["in a folder", "at the top"]),
        ({"user_name": Prefix("/plone/folder")}, ["in a folder"]),
        ({"user_name": Prefix("/elsewhere")}, []),
        ({"description": "at the top"}, ["at the top"]),
        ({"description": "at the top", "user_name": "/plone jane"}, ["at the top"]),
        ({"number": 7}, ["in a folder", "at the top"]),
        ({"number": 8}, []),
        (None, ["in a folder", "at the top", "initial database creation"]),
    ],
)
def test_the_undo_form_finds_transactions_by_what_they_say(db, specification, notes):
    """It asks with objects of its own classes, which compare themselves."""
    change(db, "jane", "/plone", "at the top")
    change(db, "joe", "/plone/folder", "in a folder")
    found = db.undoInfo(0, 20, specification)
    assert [each["description"] for each in found] == notes


# Storing an object twice in one transaction


@pytest.mark.parametrize("others", [0, 100])
def test_an_object_stored_twice_is_one_change_and_harms_no_cache(
    server, writer, reader, others: int
):
    """The last store counts; afterwards everything goes on, for many commits."""
    database = Listening()
    reader.registerDB(database)
    with client_of(server, cache_size=20_000) as storage:
        old = commit(storage, x=b"old")
        transaction = TransactionMetaData()
        storage.tpc_begin(transaction)
        for data in (b"first", b"second", b"third"):
            storage.store(X, old, data, "", transaction)
        storage.tpc_vote(transaction)
        tid = storage.tpc_finish(transaction)
        assert seen(storage, "x") == b"third"
        assert storage.load(X) == (b"third", tid)
        for n in range(others):
            # Each evicts something from the small cache.
            commit(storage, **{f"o{n % 30}": b"%04d" % n * 200})
            assert seen(storage, "x") == b"third"
        again = commit(storage, x=b"again")
        assert seen(storage, "x") == b"again"
    wait_for_position(reader, again)
    assert (tid, {X}) in database.told
    change_of_it = server.on_loop(
        lambda: [c for c in server.served.changes.since(old) if c.tid == tid]
    )
    assert change_of_it[0].oids == [X]


def test_an_object_stored_twice_is_in_the_file_once(server, writer, tmp_path):
    transaction = TransactionMetaData()
    writer.tpc_begin(transaction)
    for data in (b"first", b"second"):
        writer.store(X, None, data, "", transaction)
    writer.tpc_vote(transaction)
    writer.tpc_finish(transaction)
    server.stop()
    plain = FileStorage(str(tmp_path / "Data.fs"), read_only=True)
    assert [
        [record.data for record in transaction] for transaction in plain.iterator()
    ] == [[b"second"]]
    plain.close()


def test_a_cache_that_fails_does_not_fail_a_commit(writer, monkeypatch, caplog):
    """Nothing that happens after the server has committed may look like a failure."""
    commit(writer, x=b"old")

    def fail(*_args: Any) -> None:
        raise KeyError("a bug in a cache")

    monkeypatch.setattr(writer.cache, "store_committed", fail)
    tid = commit(writer, x=b"new")
    monkeypatch.undo()
    assert "the cache failed" in caplog.text
    assert writer.load(X) == (b"new", tid)
    assert seen(writer, "x") == b"new"
