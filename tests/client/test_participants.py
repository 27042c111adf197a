"""Who is alone in a transaction: a database, and who else can be there."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import transaction
from transaction import TransactionManager
from zc.zlibstorage import ZlibStorage
from ZODB.Connection import Connection
from ZODB.DB import DB
from ZODB.MappingStorage import MappingStorage

from zeolith.client.participants import is_alone


class Judging(MappingStorage):
    """Asks at each vote."""

    def __init__(self) -> None:
        super().__init__()
        self.judgements: list[bool] = []

    def tpc_vote(self, metadata: Any) -> Any:
        self.judgements.append(is_alone(self, metadata))
        return super().tpc_vote(metadata)

    # MappingStorage has another one for everybody who asks.
    def tpc_finish(self, metadata: Any, func: Any = lambda tid: None) -> bytes:
        tid: bytes = super().tpc_finish(metadata, func)
        return tid


class Other:
    """Somebody else who takes part, before or after the database."""

    transaction_manager = None

    def __init__(self, key: str):
        self._key = key

    def sortKey(self) -> str:
        return self._key

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_args: None


@pytest.fixture(autouse=True)
def own_transaction() -> Iterator[None]:
    transaction.abort()
    yield
    transaction.abort()


@contextmanager
def opened(storage: Any) -> Iterator[DB]:
    db = DB(storage)
    try:
        yield db
    finally:
        transaction.abort()
        db.close()


@pytest.fixture
def storage() -> Judging:
    return Judging()


@pytest.fixture
def db(storage: Judging) -> Iterator[DB]:
    with opened(storage) as db:
        # The root was made in a transaction of another manager.
        assert storage.judgements == [False]
        storage.judgements.clear()
        yield db


def changed(db: DB, manager: TransactionManager | None = None) -> Any:
    root = db.open(manager).root()
    root["count"] = root.get("count", 0) + 1
    return root


def test_the_only_participant_is_alone(storage, db):
    changed(db)
    transaction.commit()
    assert storage.judgements == [True]


def test_whoever_has_savepoints_is_alone(storage, db):
    root = changed(db)
    transaction.savepoint()
    root["more"] = 1
    transaction.commit()
    assert storage.judgements == [True]


@pytest.mark.parametrize("key", ["!", "~"])
def test_beside_another_nobody_is_alone(storage, db, key):
    changed(db)
    transaction.get().join(Other(key))
    transaction.commit()
    assert storage.judgements == [False]


def test_two_databases_are_not_alone(storage, db):
    second = Judging()
    with opened(second) as other:
        second.judgements.clear()
        changed(db)
        changed(other)
        transaction.commit()
    assert storage.judgements == second.judgements == [False]


@pytest.mark.parametrize("explicit", [False, True])
def test_of_other_managers_it_is_not_known(storage, db, explicit):
    manager = TransactionManager(explicit=explicit)
    manager.begin()
    changed(db, manager)
    manager.commit()
    assert storage.judgements == [False]
    # To close the database takes one.
    manager.begin()


def test_the_thread_may_be_in_another_transaction(storage, db):
    """Of the same connection even: what counts is which one is committed."""
    manager = TransactionManager()
    changed(db)
    changed(db, manager)
    manager.commit()
    assert storage.judgements == [False]


def test_a_thread_that_begins_explicitly_may_have_no_transaction(storage, db):
    judgements = []

    def commit() -> None:
        transaction.manager.explicit = True
        manager = TransactionManager()
        changed(db, manager)
        manager.commit()
        judgements.extend(storage.judgements)

    thread = threading.Thread(target=commit)
    thread.start()
    thread.join()
    assert judgements == [False]


def test_a_wrapper_that_changes_records_only_is_not_there(storage):
    with opened(ZlibStorage(storage)) as db:
        storage.judgements.clear()
        changed(db)
        transaction.commit()
    assert storage.judgements == [True]


class Voting:
    """A wrapper that has a vote of its own."""

    def __init__(self, base: Any):
        self.base = base

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def tpc_vote(self, metadata: Any) -> Any:
        return self.base.tpc_vote(metadata)


class Finishing(Voting):
    """And one that finishes more than what it wraps."""

    def __init__(self, base: Any):
        super().__init__(base)
        vars(self)["tpc_vote"] = base.tpc_vote

    def tpc_finish(self, metadata: Any, func: Any = lambda tid: None) -> Any:
        return self.base.tpc_finish(metadata, func)


@pytest.mark.parametrize("wrapper", [Voting, Finishing])
def test_beside_a_wrapper_that_decides_nobody_is_alone(storage, wrapper):
    with opened(wrapper(storage)) as db:
        storage.judgements.clear()
        changed(db)
        transaction.commit()
    assert storage.judgements == [False]


class Refusing(Connection):
    """A connection with a vote of its own, behind that of the storage."""

    def tpc_vote(self, of: Any) -> None:
        super().tpc_vote(of)
        if self.root().get("count"):
            raise ValueError("it is refused")


class Telling(Connection):
    """A connection with a finish of its own."""

    def tpc_finish(self, of: Any) -> None:
        super().tpc_finish(of)


def test_a_connection_that_finishes_itself_is_not_alone(storage, monkeypatch):
    monkeypatch.setattr(DB, "klass", Telling)
    with opened(storage) as db:
        storage.judgements.clear()
        changed(db)
        transaction.commit()
    assert storage.judgements == [False]


def test_a_connection_that_votes_itself_is_not_alone(storage, monkeypatch):
    monkeypatch.setattr(DB, "klass", Refusing)
    with opened(storage) as db:
        storage.judgements.clear()
        changed(db)
        with pytest.raises(ValueError, match="refused"):
            transaction.commit()
    assert storage.judgements == [False]


def test_to_look_begins_no_transaction(storage, db):
    found = []

    def commit() -> None:
        manager = TransactionManager()
        changed(db, manager)
        manager.commit()
        found.append(transaction.manager.manager._txn)

    thread = threading.Thread(target=commit)
    thread.start()
    thread.join()
    assert found == [None]


def test_a_storage_without_a_database_is_not_alone(storage):
    metadata = transaction.get()
    storage.tpc_begin(metadata)
    storage.tpc_vote(metadata)
    storage.tpc_abort(metadata)
    assert storage.judgements == [False]
