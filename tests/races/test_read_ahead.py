"""A walk through a real tree: few round trips, and no object as it was before."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from BTrees.OOBTree import OOBTree, OOTreeSet
from persistent.mapping import PersistentMapping
from transaction import TransactionManager
from ZODB.DB import DB

from zeolith.client.storage import ClientStorage
from zeolith.client.tids import following

from ..support.gates import Background, Gate
from ..support.inprocess import InProcessServer, client_of
from ..support.records import wait_for_position

OBJECTS = 2000


def key(number: int) -> str:
    return f"key {number:06}"


@pytest.fixture(autouse=True)
def _tree(server: InProcessServer) -> None:
    with client_of(server) as storage:
        db = DB(storage)
        with db.transaction() as connection:
            root = connection.root()
            root["tree"] = OOBTree()
            root["set"] = OOTreeSet(map(key, range(OBJECTS)))
            for number in range(OBJECTS):
                root["tree"][key(number)] = PersistentMapping(value="old")
        db.close()


class Counting(ClientStorage):
    """Counts its calls by method."""

    def __init__(self, *args: Any, **options: Any):
        self.calls: Counter[str] = Counter()
        super().__init__(*args, **options)

    def call(self, method: str, *args: Any) -> Any:
        self.calls[method] += 1
        return super().call(method, *args)

    def _load(self, oid: bytes, tid: bytes) -> Any:
        self.calls["load"] += 1
        return super()._load(oid, tid)


@contextmanager
def counting(
    server: InProcessServer, **options: Any
) -> Iterator[tuple[Any, Counter[str]]]:
    """A ZODB connection over an empty cache, and the calls of its storage."""
    storage = Counting(server.address, **options)
    db = DB(storage, cache_size=10 * OBJECTS)
    connection = db.open(TransactionManager())
    connection.root()["tree"]._p_activate()
    connection.root()["set"]._p_activate()
    storage.calls.clear()
    yield connection, storage.calls
    connection.close()
    db.close()


def walk(connection: Any) -> int:
    values = [value["value"] for value in connection.root()["tree"].values()]
    assert values == ["old"] * OBJECTS
    return len(values)


def keys(connection: Any) -> int:
    found = list(connection.root()["set"])
    assert found == list(map(key, range(OBJECTS)))
    return len(found)


@pytest.mark.parametrize(("step", "part"), [(walk, 50), (keys, 200)])
def test_a_walk_takes_far_fewer_round_trips_than_it_sees_objects(server, step, part):
    with counting(server) as (connection, calls):
        objects = step(connection)
        assert calls.total() < objects / part
        counters = connection.db().storage.read_ahead.counters
        assert counters.used > 0.9 * counters.sent


def test_a_walk_that_is_given_up_leaves_nothing_when_the_storage_is_closed(server):
    with counting(server) as (connection, _calls):
        values = connection.root()["tree"].values()
        for value, _number in zip(values, range(OBJECTS // 2), strict=False):
            value._p_activate()
        session = connection.db().storage.current_session
        assert session._pool._lent
    assert not session._pool._lent
    assert not session._pool.channels


def test_without_it_every_object_is_a_round_trip(server):
    with counting(server, read_ahead=False) as (connection, calls):
        walk(connection)
        assert calls["load"] > OBJECTS
        assert calls["load_ahead"] == 0
        assert connection.db().storage.read_ahead is None


def test_random_access_takes_no_more_round_trips_than_without(server):
    totals = []
    for read_ahead in (False, True):
        numbers = random.Random(7).sample(range(OBJECTS), 300)
        with counting(server, read_ahead=read_ahead) as (connection, calls):
            tree = connection.root()["tree"]
            for number in numbers:
                tree[key(number)]._p_activate()
            totals.append(calls.total())
            if read_ahead:
                counters = connection.db().storage.read_ahead.counters
                assert counters.sent < len(numbers) / 5
    without, reading = totals
    assert reading <= without


def test_the_cache_is_not_filled_with_what_nobody_uses(server):
    with counting(server) as (connection, _calls):
        values = connection.root()["tree"].values()
        used = [value for value, _number in zip(values, range(12), strict=False)]
        for value in used:
            value._p_activate()
        storage = connection.db().storage
        counters = storage.read_ahead.counters
        assert counters.sent > counters.used
        # And the root, the tree, the set, a bucket or two.
        assert len(storage.cache) <= len(used) + 6


def change(writer: ClientStorage, numbers: range) -> bytes:
    """Commit new values for some of the objects; returns the tid."""
    db = DB(writer)
    manager = TransactionManager()
    connection = db.open(manager)
    for number in numbers:
        connection.root()["tree"][key(number)]["value"] = "new"
    manager.commit()
    connection.close()
    return writer.lastTransaction()


def oids_of(reader: ClientStorage) -> list[bytes]:
    """The objects in the order of the keys, without having loaded one of them."""
    db = DB(reader)
    connection = db.open(TransactionManager())
    oids = [value._p_oid for value in connection.root()["tree"].values()]
    connection.close()
    return oids


def values(storage: ClientStorage, oids: list[bytes], tid: bytes) -> list[bytes]:
    """Which of old and new the records have, as of ``tid``."""
    loaded = [storage.loadBefore(oid, following(tid)) for oid in oids]
    return [b"new" if b"new" in found[0] else b"old" for found in loaded if found]


@pytest.fixture
def walking(reader: ClientStorage) -> Callable[[], tuple[list[bytes], bytes]]:
    """Begins a walk: some of the next records are held; the oids and the snapshot."""

    def walking() -> tuple[list[bytes], bytes]:
        oids = oids_of(reader)
        old = reader.lastTransaction()
        first = reader.load(oids_parent(reader))[0]
        assert oids[0] in first
        ahead = reader.read_ahead
        assert ahead is not None
        ahead.forget()
        reader.cache.forget_all(old)
        reader.loadBefore(oids_parent(reader), following(old))
        values(reader, oids[:2], old)
        assert ahead.counters.sent
        return oids, old

    return walking


def oids_parent(storage: ClientStorage) -> bytes:
    """The oid of the first bucket."""
    db = DB(storage)
    connection = db.open(TransactionManager())
    oid: bytes = connection.root()["tree"]._firstbucket._p_oid
    connection.close()
    return oid


def test_what_came_before_a_change_is_not_seen_in_a_snapshot_after_it(
    reader, writer, walking
):
    """Read ahead, then invalidated, then used (R2)."""
    oids, old = walking()
    new = change(writer, range(2, 6))
    wait_for_position(reader, new)
    assert values(reader, oids[2:8], new) == [b"new"] * 4 + [b"old"] * 2
    assert values(reader, oids[2:8], old) == [b"old"] * 6


def test_nor_is_it_later_when_it_was_used_for_the_old_snapshot_first(
    reader, writer, walking
):
    oids, old = walking()
    new = change(writer, range(2, 6))
    wait_for_position(reader, new)
    assert values(reader, oids[2:8], old) == [b"old"] * 6
    assert values(reader, oids[2:8], new) == [b"new"] * 4 + [b"old"] * 2


@pytest.mark.parametrize("where", ["before it is made", "before it arrives"])
def test_an_answer_crosses_a_change(
    server, reader, writer, gate: Gate, monkeypatch, where
):
    """The answer is older than what has been applied when it comes."""
    oids, parent = oids_of(reader), oids_parent(reader)
    old = reader.lastTransaction()
    reader.cache.forget_all(old)
    ahead = reader.read_ahead
    around = gate.before if where == "before it is made" else gate.after
    call = around(ahead._call)
    monkeypatch.setattr(ahead, "_call", call)
    gate.shut()
    loading = Background(values, reader, [parent, *oids[:2]], old)
    gate.wait_until_reached()
    new = change(writer, range(1, 6))
    wait_for_position(reader, new)
    gate.open()
    assert loading.result() == [b"old"] * 3
    assert ahead.counters.sent
    assert values(reader, oids[1:8], new) == [b"new"] * 5 + [b"old"] * 2
    assert values(reader, oids[1:8], old) == [b"old"] * 7


def test_nothing_of_a_lost_session_is_mistaken(server, proxy, reader, writer, walking):
    """What changed while the client was away is not taken from what it holds."""
    oids, old = walking()
    proxy.cut()
    new = change(writer, range(2, 6))
    wait_for_position(reader, new)
    assert values(reader, oids[2:8], new) == [b"new"] * 4 + [b"old"] * 2
    assert values(reader, oids[2:8], old) == [b"old"] * 6
