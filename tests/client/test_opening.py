"""From an address to an open database, in one call."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import transaction
import ZODB
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ConflictError

from zeolith.client import opening
from zeolith.client.errors import ClientDisconnected
from zeolith.client.opening import DB, connection
from zeolith.client.storage import ClientStorage

from ..support.gates import Background
from ..support.script import refused_address
from ..support.serving import ServerProcess


class StandIn(MappingStorage):
    """A ClientStorage that needs no server."""

    made: list["StandIn"]

    def __init__(self, addr: Any, **arguments: Any):
        super().__init__()
        self.addr = addr
        self.arguments = arguments
        self.is_closed = False
        self.made.append(self)

    def close(self) -> None:
        self.is_closed = True
        super().close()


@pytest.fixture
def storages(monkeypatch) -> list[StandIn]:
    """What was made in the place of a ClientStorage."""
    made: list[StandIn] = []
    monkeypatch.setattr(StandIn, "made", made, raising=False)
    monkeypatch.setattr(opening, "ClientStorage", StandIn)
    return made


def test_arguments_go_where_they_belong(storages):
    db = DB(("a", 1), wait_timeout=5, storage="main", pool_size=3, database_name="shop")
    (storage,) = storages
    assert storage.addr == ("a", 1)
    assert storage.arguments == {"wait_timeout": 5, "storage": "main"}
    assert db.getPoolSize() == 3
    assert db.database_name == "shop"
    db.close()
    assert storage.is_closed


def test_the_size_of_the_cache_is_that_of_the_storage(storages):
    """Both have it, in bytes and in objects; everything else belongs to one of them."""
    for_storage = set(inspect.signature(ClientStorage).parameters)
    for_database = set(inspect.signature(ZODB.DB).parameters)
    assert for_storage & for_database == {"storage", "cache_size"}
    DB(("a", 1), cache_size=10**6).close()
    assert storages[0].arguments == {"cache_size": 10**6}


def test_an_argument_that_nobody_has_is_an_error(storages):
    with pytest.raises(TypeError, match="there is no argument no_such_argument"):
        DB(("a", 1), no_such_argument=1)
    assert storages == []


def test_a_database_that_cannot_be_opened_leaves_no_storage_open(storages, monkeypatch):
    def fail(*_args: Any, **_arguments: Any) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(ZODB, "DB", fail)
    with pytest.raises(RuntimeError, match="out of order"):
        DB(("a", 1))
    assert storages[0].is_closed


def test_without_a_server_the_cause_is_told(nothing_left_behind):
    with pytest.raises(ClientDisconnected, match="Connection refused"):
        DB(refused_address(), wait_timeout=0.1)


def test_a_connection_closes_its_database(storages):
    opened = connection(("a", 1), wait_timeout=5, cache_size=10**6)
    opened.root()["here"] = 1
    transaction.commit()
    assert not storages[0].is_closed
    opened.close()
    assert storages[0].is_closed


class LostRace:
    """ZODB.DB, which finds the first time that somebody else has made the root."""

    def __init__(self, times: int):
        self.left = times
        self.database = ZODB.DB

    def __call__(self, storage: Any, **arguments: Any) -> Any:
        if self.left:
            self.left -= 1
            databases = arguments.get("databases")
            if databases is not None:
                # As far as ZODB.DB has come when it makes the root.
                databases[arguments.get("database_name", "unnamed")] = self
            raise ConflictError("the root")
        return self.database(storage, **arguments)


@pytest.mark.parametrize("more", [{}, {"databases": None}])
def test_a_root_that_somebody_else_has_just_made_is_found(storages, monkeypatch, more):
    monkeypatch.setattr(ZODB, "DB", LostRace(1))
    db = DB(("a", 1), **more)
    assert len(storages) == 1
    db.close()


@pytest.mark.parametrize("more", [{}, {"database_name": "shop"}])
def test_a_lost_race_leaves_no_half_database_among_the_others(
    storages, monkeypatch, more
):
    monkeypatch.setattr(ZODB, "DB", LostRace(1))
    databases: dict[str, Any] = {}
    db = DB(("a", 1), databases=databases, **more)
    assert databases == {more.get("database_name", "unnamed"): db}
    db.close()


def test_a_race_that_is_lost_again_is_an_error(storages, monkeypatch):
    monkeypatch.setattr(ZODB, "DB", LostRace(2))
    with pytest.raises(ConflictError):
        DB(("a", 1))
    assert storages[0].is_closed


# With a real server


@pytest.fixture
def served(tmp_path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path) as server:
        yield server


def test_what_one_writes_another_reads(served, nothing_left_behind):
    writer = connection(served.address)
    writer.root()["visits"] = 1
    transaction.commit()
    writer.close()
    reader = connection("{}:{}".format(*served.address))
    assert reader.root()["visits"] == 1
    transaction.abort()
    reader.close()


def test_many_open_an_empty_database_at_once(served, nothing_left_behind):
    opening = [Background(DB, served.address) for _ in range(8)]
    for number, each in enumerate(opening):
        db = each.result()
        opened = db.open()
        # The first ones may find the root as it was before somebody else used it.
        for attempt in transaction.manager.attempts(100):
            with attempt:
                opened.root()[number] = number
        opened.close()
        db.close()
    last = connection(served.address)
    assert sorted(last.root()) == list(range(8))
    transaction.abort()
    last.close()
