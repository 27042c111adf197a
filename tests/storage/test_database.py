"""The inner interface: who implements it, and that its values are what they say."""

import inspect
from typing import Any

import pytest

from zeolith.storage.adapted import AdaptedStorage
from zeolith.storage.database import (
    Conflict,
    Database,
    Finished,
    LogEntry,
    Revision,
    Transaction,
    Unresolved,
    Voted,
)
from zeolith.storage.filestore import FileStore

METHODS = [
    name
    for name, value in vars(Database).items()
    if inspect.isfunction(value) and not name.startswith("_")
]
ATTRIBUTES = list(inspect.get_annotations(Database))


def served(database: Database) -> Database:
    """Only to be type-checked: both are databases."""
    return database


@pytest.mark.parametrize("of_class", [AdaptedStorage, FileStore])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_there_with_the_same_arguments(of_class, name):
    implemented = inspect.signature(getattr(of_class, name))
    assert implemented == inspect.signature(getattr(Database, name))


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_attribute_is_there(name, tmp_path):
    store = FileStore("1", str(tmp_path / "Data.fs"))
    try:
        assert hasattr(served(store), name)
    finally:
        store.close()


def test_every_method_says_what_it_does():
    assert METHODS
    for name in METHODS:
        assert inspect.getdoc(getattr(Database, name)), name


TUPLES: list[tuple[Any, tuple[str, ...]]] = [
    (Revision, ("data", "tid", "end")),
    (LogEntry, ("tid", "user", "description", "extension", "size")),
    (Conflict, ("oid", "committed_tid", "old_tid", "committed", "old", "new")),
    (Unresolved, ("conflicts",)),
    (Voted, ("tid", "resolved")),
    (Finished, ("tid", "oids")),
]


@pytest.mark.parametrize(("kind", "fields"), TUPLES, ids=lambda each: str(each))
def test_what_goes_to_the_wire_is_a_tuple_in_this_order(kind, fields):
    assert kind._fields == fields


def test_a_transaction_has_nothing_but_its_id_at_first():
    one, other = Transaction(b"1"), Transaction(b"2")
    one.operations += [["undo", b"tid"]]  # type: ignore[operator]
    assert other.operations == []
    assert (one.user, one.description, one.extension) == (b"", b"", b"")
    assert (one.tid, one.status) == (None, " ")
