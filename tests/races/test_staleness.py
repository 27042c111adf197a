"""No snapshot shows an object as it was before a change that the snapshot contains."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from persistent.mapping import PersistentMapping
from transaction import TransactionManager
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ConflictError, POSKeyError, StorageSystemError

from zeolith.client.errors import CommitOutcomeUnknown
from zeolith.client.storage import ClientStorage
from zeolith.client.tids import MAX_TID, following
from zeolith.storage.adapted import AdaptedStorage
from zeolith.storage.database import WouldBlock
from zeolith.storage.disk import Disk

from ..support.gates import Background, Gate
from ..support.inprocess import (
    HeldStream,
    InProcessServer,
    client_of,
)
from ..support.records import (
    Listening,
    commit,
    oid_of,
    seen,
    vote,
    wait_for_position,
)
from ..support.waiting import wait_until

X = oid_of("x")


@pytest.fixture
def cached(in_memory_and_on_disk: dict[str, Any]) -> dict[str, Any]:
    return in_memory_and_on_disk


def load_before(storage: ClientStorage, tid: bytes) -> Any:
    return storage.loadBefore(X, tid)


def load_current(storage: ClientStorage, _tid: bytes) -> Any:
    return storage.load(X)


def load_many(storage: ClientStorage, tid: bytes) -> Any:
    return storage.load_many([X], tid)[X]


def prefetch(storage: ClientStorage, tid: bytes) -> Any:
    storage.prefetch([X], tid)
    return storage.loadBefore(X, tid)


LOADS = [load_before, load_current, load_many, prefetch]
Load = Callable[[ClientStorage, bytes], Any]


# Loads and changes cross


@pytest.mark.parametrize("load", LOADS)
def test_an_answer_that_reaches_the_cache_late_is_not_taken_for_current(
    reader, writer, gate, monkeypatch, load: Load
):
    """A change is applied between the arrival of an answer and its entering the cache.

    The cache must not keep the answer as the current revision: nobody would ever
    tell it that the revision has ended.
    """
    old = commit(writer, x=b"old")
    wait_for_position(reader, old)
    monkeypatch.setattr(reader.cache, "store", gate.before(reader.cache.store))
    gate.shut()
    loading = Background(load, reader, following(old))
    gate.wait_until_reached()
    new = commit(writer, x=b"new")
    wait_for_position(reader, new)
    gate.open()
    assert loading.result()[:2] == (b"old", old)
    assert reader.loadBefore(X, following(new))[:2] == (b"new", new)
    assert reader.loadBefore(X, following(old))[:2] == (b"old", old)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("slow", ["the reading", "the answering"])
def test_an_answer_computed_before_a_commit_and_sent_after_it_is_judged_by_its_age(
    server, reader, writer, gate, monkeypatch, load: Load, slow: str
):
    """A slow load: the server announces a change before it sends the older answer.

    On separate sockets the order of arrival says nothing; only the tid as of which
    the answer is true does.
    """
    old = commit(writer, x=b"old")
    wait_for_position(reader, old)

    def would_block(*_args: Any) -> None:
        raise WouldBlock

    database = server.database
    around = gate.before if slow == "the reading" else gate.after
    monkeypatch.setattr(database, "near", lambda: None)
    monkeypatch.setattr(database, "load_nowait", would_block)
    monkeypatch.setattr(database, "load", around(database.load))
    gate.shut()
    loading = Background(load, reader, following(old))
    gate.wait_until_reached()
    new = commit(writer, x=b"new")
    wait_for_position(reader, new)
    gate.open()
    assert loading.result()[:2] == (b"old", old)
    assert reader.loadBefore(X, following(new))[:2] == (b"new", new)
    assert reader.loadBefore(X, following(old))[:2] == (b"old", old)


def test_an_answer_may_arrive_before_the_change_that_it_shows(server, reader, writer):
    """The load is quick, the stream is slow."""
    old = commit(writer, x=b"old")
    wait_for_position(reader, old)
    stream = HeldStream(server, reader).hold()
    new = commit(writer, x=b"new")
    assert reader.load(X) == (b"new", new)
    # The snapshot of today does not contain it.
    assert seen(reader, "x") == b"old"
    stream.release()
    wait_for_position(reader, new)
    assert seen(reader, "x") == b"new"


def test_what_a_slow_stream_will_bring_is_known_to_be_unknown(server, reader, writer):
    """An object that is cached as current stays what it was in today's snapshot."""
    old = commit(writer, x=b"old")
    wait_for_position(reader, old)
    assert seen(reader, "x") == b"old"
    stream = HeldStream(server, reader).hold()
    new = commit(writer, x=b"new")
    assert reader.loadBefore(X, following(new)) == (b"new", new, None)
    assert reader.loadBefore(X, following(old))[:2] == (b"old", old)
    stream.release()
    wait_for_position(reader, new)
    assert reader.loadBefore(X, following(old)) == (b"old", old, new)


def test_a_lost_race_is_not_lost_for_ever(reader, writer, monkeypatch):
    """A change that never reached the cache must not make every commit a conflict.

    Whatever the reason for a wrong copy: after the conflict it is not used again.
    """
    old = commit(writer, x=b"old")
    wait_for_position(reader, old)
    assert seen(reader, "x") == b"old"
    apply = reader.cache.apply
    monkeypatch.setattr(
        reader.cache,
        "apply",
        lambda changes: apply([each._replace(oids=[]) for each in changes]),
    )
    new = commit(writer, x=b"new")
    wait_for_position(reader, new)
    assert seen(reader, "x") == b"old"
    transaction = vote_on_what_is_seen(reader)
    with pytest.raises(ConflictError) as raised:
        reader.tpc_vote(transaction)
    assert raised.value.oid == X
    reader.tpc_abort(transaction)
    assert seen(reader, "x") == b"new"
    transaction = vote_on_what_is_seen(reader)
    reader.tpc_vote(transaction)
    reader.tpc_finish(transaction)


def vote_on_what_is_seen(storage: ClientStorage) -> Any:
    found = storage.loadBefore(X, following(storage.lastTransaction()))
    assert found is not None
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    storage.store(X, found[1], found[0] + b" and more", "", transaction)
    return transaction


# What is visible, and when


def test_a_change_of_others_is_visible_only_when_the_database_has_been_told(
    reader, writer, gate
):
    """The last tid must not reach a change before its objects are invalidated."""
    database = Listening()
    reader.registerDB(database)
    old = commit(writer, x=b"old")
    wait_for_position(reader, old)
    gate.shut()
    database.on_invalidate = lambda _tid: gate.pass_through()
    new = commit(writer, x=b"new")
    gate.wait_until_reached()
    assert reader.position.tid_now == old
    asking = Background(reader.lastTransaction)
    if asking.returns_soon():
        assert asking.result() == old
    gate.open()
    assert asking.result() in (old, new)
    wait_for_position(reader, new)
    assert database.told[-1] == (new, {X})


def test_an_own_commit_is_visible_only_when_its_callback_has_returned(reader, gate):
    """ZODB tells a database's other connections of a commit in that callback."""
    old = commit(reader, x=b"old")
    transaction = vote(reader, x=b"new")
    gate.shut()
    finishing = Background(
        reader.tpc_finish, transaction, lambda _tid: gate.pass_through()
    )
    gate.wait_until_reached()
    assert reader.position.tid_now == old
    asking = Background(reader.lastTransaction)
    if asking.returns_soon():
        assert asking.result() == old
    gate.open()
    new = finishing.result()
    assert asking.result() in (old, new)
    assert reader.lastTransaction() == new


def test_changes_of_others_wait_while_an_own_commit_is_told(reader, writer, gate):
    """Two tids must not be told at once, nor the later one first."""
    database = Listening()
    reader.registerDB(database)
    told: list[bytes] = []
    database.on_invalidate = told.append
    commit(reader, x=b"old")
    transaction = vote(reader, x=b"new")

    def tell(tid: bytes) -> None:
        gate.pass_through()
        told.append(tid)

    gate.shut()
    finishing = Background(reader.tpc_finish, transaction, tell)
    gate.wait_until_reached()
    others = [commit(writer, y=b"%d" % n) for n in range(3)]
    assert not told
    gate.open()
    own = finishing.result()
    wait_for_position(reader, others[-1])
    assert told == [own, *others]


class Twins:
    """Two objects that are equal in every snapshot."""

    def __init__(self, storage: ClientStorage):
        self.db = DB(storage)
        self.connection = self.db.open(TransactionManager())
        self._begin()
        root = self.connection.root()
        if "a" not in root:
            root["a"] = PersistentMapping({"n": 0})
            root["b"] = PersistentMapping({"n": 0})
            self._tm.commit()

    @property
    def _tm(self) -> TransactionManager:
        return self.connection.transaction_manager

    def _begin(self) -> None:
        self._tm.begin()

    def write(self, value: int) -> None:
        self._begin()
        root = self.connection.root()
        root["a"]["n"] = root["b"]["n"] = value
        self._tm.commit()

    def warm_one(self) -> None:
        """Have one of them in memory, and the other not."""
        self._begin()
        root = self.connection.root()
        assert root["a"]["n"] == root["b"]["n"]
        root["b"]._p_deactivate()

    def read(self) -> tuple[int, int]:
        self._begin()
        root = self.connection.root()
        return root["a"]["n"], root["b"]["n"]

    def open_and_read(self) -> tuple[int, int]:
        """The same with a connection that comes from the pool."""
        connection = self.db.open(TransactionManager())
        root = connection.root()
        read = root["a"]["n"], root["b"]["n"]
        connection.transaction_manager.abort()
        connection.close()
        return read

    def close(self) -> None:
        self._tm.abort()
        self.db.close()


@pytest.fixture
def twins(reader: ClientStorage) -> Iterator[Twins]:
    twins = Twins(reader)
    yield twins
    twins.close()


@pytest.mark.parametrize("how", ["begin", "open"])
def test_a_snapshot_taken_in_the_middle_of_a_change_of_others_is_whole(
    server, twins, gate, monkeypatch, how
):
    """The snapshot's tid and the invalidations that go with it are one."""
    pooled = twins.db.open(TransactionManager())
    assert pooled.root()["a"]["n"] == 0
    pooled.close()
    twins.warm_one()
    told = twins.db._mvcc_storage
    monkeypatch.setattr(told, "invalidate", gate.before(told.invalidate))
    gate.shut()
    with client_of(server) as storage:
        others = Twins(storage)
        others.write(1)
        gate.wait_until_reached()
        reading = Background(twins.read if how == "begin" else twins.open_and_read)
        if reading.returns_soon():
            assert reading.result() == (0, 0)
        gate.open()
        assert reading.result() in ((0, 0), (1, 1))
        wait_until(lambda: twins.read() == (1, 1), "the change")
        assert twins.open_and_read() == (1, 1)
        others.close()


@pytest.mark.parametrize("how", ["begin", "open"])
def test_a_snapshot_taken_in_the_middle_of_an_own_commit_is_whole(
    twins, gate, monkeypatch, how
):
    """As above, the change being that of another thread of the same process."""
    pooled = twins.db.open(TransactionManager())
    assert pooled.root()["a"]["n"] == 0
    pooled.close()
    twins.warm_one()
    told = twins.db._mvcc_storage
    monkeypatch.setattr(
        told, "_invalidate_finish", gate.before(told._invalidate_finish)
    )

    def write() -> None:
        with twins.db.transaction() as connection:
            root = connection.root()
            root["a"]["n"] = root["b"]["n"] = 1

    gate.shut()
    writing = Background(write)
    gate.wait_until_reached()
    reading = Background(twins.read if how == "begin" else twins.open_and_read)
    if reading.returns_soon():
        assert reading.result() == (0, 0)
    gate.open()
    writing.result()
    assert reading.result() in ((0, 0), (1, 1))
    assert twins.read() == (1, 1)
    assert twins.open_and_read() == (1, 1)


# Nothing is announced before it is durable


@pytest.fixture
def fsync_gate(gate: Gate, monkeypatch) -> Gate:
    """The server's sync of its Data.fs."""
    monkeypatch.setattr(Disk, "sync", gate.before(Disk.sync))
    return gate


def test_nobody_sees_a_commit_before_it_is_on_disk(server, reader, writer, fsync_gate):
    """A crash in the middle would leave clients with a tid the server never had."""
    old = commit(writer, x=b"old")
    wait_for_position(reader, old)
    transaction = vote(writer, x=b"new")
    fsync_gate.shut()
    finishing = Background(writer.tpc_finish, transaction)
    fsync_gate.wait_until_reached()
    assert server.on_loop(lambda: server.served.changes.last_tid) == old
    assert reader.load(X) == (b"old", old)
    assert reader.loadBefore(X, MAX_TID) == (b"old", old, None)
    assert reader.load_many([X], MAX_TID)[X] == (b"old", old, None)
    with client_of(server) as newcomer:
        assert newcomer.lastTransaction() == old
        assert newcomer.load(X) == (b"old", old)
    assert reader.lastTransaction() == old
    assert finishing.returns_soon() is False
    fsync_gate.open()
    new = finishing.result()
    wait_for_position(reader, new)
    assert reader.load(X) == (b"new", new)


def test_a_commit_that_the_disk_refuses_was_seen_by_nobody(
    server, reader, writer, monkeypatch
):
    """And afterwards nothing is written, while everything can still be read."""
    database = Listening()
    reader.registerDB(database)
    old = commit(writer, x=b"old")
    wait_for_position(reader, old)
    transaction = vote(writer, x=b"new")

    def fail(_disk: Disk, _fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Disk, "sync", fail)
    with pytest.raises(CommitOutcomeUnknown, match="Input/output error"):
        writer.tpc_finish(transaction)
    with pytest.raises(StorageSystemError, match="Input/output error"):
        commit(reader, y=b"other")
    assert reader.load(X) == (b"old", old)
    assert reader.lastTransaction() == old
    assert database.tids == [old]
    with client_of(server) as newcomer:
        assert newcomer.lastTransaction() == old
        with pytest.raises(POSKeyError):
            newcomer.load(oid_of("y"))


def everything(storage: ClientStorage, oid: bytes) -> Any:
    """The data of ``oid``'s revisions, newest first, by every way to read them."""
    tids = [entry["tid"] for entry in storage.history(oid, 10)]
    loaded = [storage.loadSerial(oid, tid) for tid in tids]
    assert storage.load(oid) == (loaded[0], tids[0])
    assert storage.loadBefore(oid, following(tids[0])) == (loaded[0], tids[0], None)
    iterated = [r.data for t in storage.iterator() for r in t if r.oid == oid]
    assert iterated[::-1] == loaded
    assert len(storage.undoLog(0, 10)) == len(list(storage.iterator()))
    found = storage.record_iternext(oid)
    assert found[:3] == (oid, tids[0], loaded[0])
    return loaded


def test_what_an_aborted_transaction_wrote_is_read_by_nobody(server, writer, reader):
    """Its bytes were in the file, behind the last record, where the next ones come."""
    far = commit(writer, far=bytes(200_000))
    commit(writer, x=b"first")
    for n in range(3):
        aborted = vote(writer, x=b"given up " * 50, y=b"given up " * 50)
        # Whoever reads ahead was elsewhere, comes here, and has some of them now.
        reader.loadSerial(oid_of("far"), far)
        before = everything(reader, X)
        writer.tpc_abort(aborted)
        tid = commit(writer, x=b"committed %d" % n)
        wait_for_position(reader, tid)
        assert everything(reader, X) == [b"committed %d" % n, *before]
    undoing = TransactionMetaData()
    writer.tpc_begin(undoing)
    writer.undo(writer.undoLog(0, 1)[0]["id"], undoing)
    writer.tpc_vote(undoing)
    tid = writer.tpc_finish(undoing)
    wait_for_position(reader, tid)
    assert everything(reader, X)[0] == b"committed 1"


def test_a_storage_that_shows_a_commit_early_is_held_back(gate, monkeypatch):
    """Some storages can be read before their finish has returned."""
    storage = MappingStorage()
    storages = {"1": lambda: AdaptedStorage("1", storage, b"a mapping-storag")}
    with (
        InProcessServer(storages) as server,
        client_of(server) as writer,
        client_of(server) as reader,
    ):
        old = commit(writer, x=b"old")
        wait_for_position(reader, old)
        transaction = vote(writer, x=b"new")
        database = server.database
        monkeypatch.setattr(database, "finish", gate.after(database.finish))
        gate.shut()
        finishing = Background(writer.tpc_finish, transaction)
        gate.wait_until_reached()
        # It is there, and nobody was told.
        assert storage.load(X)[0] == b"new"
        assert reader.load(X) == (b"old", old)
        assert reader.lastTransaction() == old
        gate.open()
        new = finishing.result()
        wait_for_position(reader, new)
        assert reader.load(X) == (b"new", new)


# Asking to see everything


TRANSACTIONS = 300


@pytest.mark.parametrize("stream", ["natural", "held"])
def test_with_server_sync_no_transaction_begins_in_the_past(server, writer, stream):
    """What was acknowledged to another client before a begin is in its snapshot.

    Also when the stream, which would bring it one day, brings nothing at all.
    """
    with client_of(server, server_sync=True) as storage:
        commit(writer, x=b"0")
        held = HeldStream(server, storage)
        if stream == "held":
            held.hold()
        stale = []
        for n in range(1, TRANSACTIONS + 1):
            acknowledged = commit(writer, x=b"%d" % n)
            storage.sync()
            if storage.lastTransaction() < acknowledged or seen(storage, "x") != (
                b"%d" % n
            ):
                stale.append(n)
        assert not stale
        held.release()
        assert storage.is_connected()


def test_a_sync_brings_no_more_than_what_is_new(server, writer):
    with client_of(server, server_sync=True) as storage:
        database = Listening()
        storage.registerDB(database)
        held = HeldStream(server, storage).hold()
        tids = [commit(writer, x=b"%d" % n) for n in range(3)]
        storage.sync()
        assert database.tids == tids
        tids += [commit(writer, x=b"%d" % n) for n in range(3)]
        storage.sync()
        held.release()
        tids.append(commit(writer, x=b"last"))
        wait_for_position(storage, tids[-1])
        assert database.tids == tids


# Packing


def test_a_revision_that_a_pack_takes_away_is_a_conflict_not_a_loss(server, twins):
    """A transaction reads what it saw at its begin; a pack has removed it.

    The transaction can be tried again, so the error must be one that says so.
    """
    twins.warm_one()
    storage = twins.db.storage
    with client_of(server) as other:
        others = Twins(other)
        others.write(1)
        others.write(2)
        storage.cache.forget_all(storage.lastTransaction())
        other.pack()
        with pytest.raises(ConflictError):
            _ = twins.connection.root()["b"]["n"]
        twins._tm.abort()
        wait_until(lambda: twins.read() == (2, 2), "the change")
        others.close()
