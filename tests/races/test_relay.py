"""A server that serves another server's storage: what its clients may rely on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import ConflictError, ReadOnlyError
from ZODB.tests.hexstorage import HexStorage

from zeolith.client.errors import (
    ClientDisconnected,
    CommitOutcomeUnknown,
)
from zeolith.client.storage import ClientStorage
from zeolith.client.tids import following
from zeolith.storage.filestore import FileStore
from zeolith.storage.relayed import RelayedStorage

from ..support.gates import Background
from ..support.inprocess import HeldStream, InProcessServer, client_of
from ..support.proxy import Direction, Proxy
from ..support.records import (
    Listening,
    begin,
    commit,
    current_tid,
    oid_of,
    seen,
    vote,
    wait_for_position,
)
from ..support.waiting import wait_until

X, Y = oid_of("x"), oid_of("y")
WAIT_S = 0.2


@contextmanager
def relaying(address: Any, **options: Any) -> Iterator[InProcessServer]:
    """A server of the storage of the server at ``address``."""

    def open_relayed() -> RelayedStorage:
        return RelayedStorage("1", ClientStorage(address, **options))

    with InProcessServer({"1": open_relayed}) as relay:
        yield relay


@pytest.fixture
def relay(server: InProcessServer, proxy: Proxy) -> Iterator[InProcessServer]:
    """A relay behind the proxy, that does not wait long for its upstream."""
    with relaying(proxy.address) as relay:
        # From now on: to connect may take a busy machine longer.
        upstream_of(relay)._wait_timeout_s = WAIT_S
        yield relay


@pytest.fixture
def near(relay: InProcessServer) -> Iterator[ClientStorage]:
    """A client of the relay."""
    with client_of(relay) as storage:
        yield storage


@pytest.fixture
def beside(relay: InProcessServer) -> Iterator[ClientStorage]:
    """Another client of the relay."""
    with client_of(relay) as storage:
        yield storage


def upstream_of(relay: InProcessServer) -> ClientStorage:
    storage: ClientStorage = relay.database._storage
    return storage


def wait_until_away(relay: InProcessServer) -> None:
    storage = upstream_of(relay)
    wait_until(lambda: not storage.is_connected(), "the loss of the upstream")


def changes_of(relay: InProcessServer) -> list[Any]:
    found: list[Any] = relay.on_loop(lambda: list(relay.served.changes._changes))
    return found


# One list of changes


def test_a_commit_elsewhere_reaches_the_clients_of_the_relay(writer, near):
    listening = Listening()
    near.registerDB(listening)
    tid = commit(writer, x=b"1", y=b"1")
    wait_for_position(near, tid)
    assert listening.told == [(tid, {X, Y})]
    assert seen(near, "x") == b"1"


def test_a_commit_at_the_relay_reaches_everybody_once(writer, near, beside):
    here, there, by = Listening(), Listening(), Listening()
    near.registerDB(here)
    beside.registerDB(by)
    writer.registerDB(there)
    tid = commit(near, x=b"1")
    wait_for_position(writer, tid)
    wait_for_position(beside, tid)
    assert (here.tids, by.tids, there.tids) == ([], [tid], [tid])
    assert near.lastTransaction() == tid


def test_all_commits_come_in_one_order_whoever_makes_them(relay, writer, near, beside):
    far, by = Listening(), Listening()
    writer.registerDB(far)
    beside.registerDB(by)

    def write(storage: ClientStorage, name: str) -> list[bytes]:
        return [commit(storage, **{name: b"%d" % n}) for n in range(50)]

    elsewhere = Background(write, writer, "x")
    here = Background(write, near, "y")
    tids = sorted([*elsewhere.result(), *here.result()])
    wait_for_position(beside, tids[-1])
    assert by.tids == tids
    changes = changes_of(relay)
    assert [change.tid for change in changes][-100:] == tids
    assert all(a.tid == b.since for a, b in pairwise(changes))


def test_changes_before_an_own_commit_are_told_before_it(
    server, relay, writer, near, beside
):
    by = Listening()
    beside.registerDB(by)
    held = HeldStream(server, upstream_of(relay)).hold()
    first = commit(writer, x=b"1")
    second = commit(near, y=b"1")
    # The answer to finish has brought what the stream has not.
    wait_for_position(beside, second)
    assert by.tids == [first, second]
    assert near.lastTransaction() == second
    held.release()


def test_a_change_after_an_own_commit_waits_for_it(relay, writer, near, beside, gate):
    by = Listening()
    beside.registerDB(by)
    storage = upstream_of(relay)
    transaction = vote(near, y=b"1")
    gate.shut()
    finished = storage.position.finished
    storage.position.finished = gate.before(finished)  # type: ignore[method-assign]
    finishing = Background(near.tpc_finish, transaction)
    gate.wait_until_reached()
    # It is on the upstream's disk, and here nobody has heard of it.
    later = commit(writer, x=b"1")
    assert not by.told
    gate.open()
    own = finishing.result()
    wait_for_position(beside, later)
    assert by.tids == [own, later]


def test_a_snapshot_at_the_relay_has_nothing_that_was_not_announced(
    relay, writer, near, gate
):
    commit(writer, x=b"1", y=b"1")
    wait_until(lambda: current_tid(near, X) is not None, "x")
    before = commit(writer, x=b"2")
    wait_for_position(near, before)
    peer = relay.stream_of(near)
    held: list[bytes] = []
    relay.on_loop(lambda: setattr(peer, "send_shared", held.append))
    after = commit(writer, x=b"3", y=b"3")
    wait_until(lambda: held, "the change that is held back")
    assert near.lastTransaction() == before
    assert (seen(near, "x"), seen(near, "y")) == (b"2", b"1")
    assert near.loadSerial(X, after) == b"3"


def test_a_sync_sees_what_was_committed_at_the_far_server(server, relay, writer):
    with client_of(relay, server_sync=True) as near:
        held = HeldStream(server, upstream_of(relay)).hold()
        for n in range(3):
            tid = commit(writer, x=b"%d" % n)
            near.sync()
            assert near.lastTransaction() == tid
            assert seen(near, "x") == b"%d" % n
        held.release()


# Identity, oids, passing through


def test_the_relay_has_the_identity_of_its_upstream(writer, near, relay):
    assert near.sortKey() == writer.sortKey()
    assert relay.database.database_id == relay.database.standing().database_id


def test_oids_come_from_the_upstream(writer, near, beside):
    given = {storage.new_oid() for storage in (writer, near, beside) for _ in range(50)}
    assert len(given) == 150


def test_a_transaction_keeps_its_id_and_its_metadata(server, near):
    transaction = TransactionMetaData("ann", "a note", {"key": "value"})
    near.tpc_begin(transaction)
    near.store(X, None, b"1", "", transaction)
    stores = near._commits[transaction].stores
    near.tpc_vote(transaction)
    tid = near.tpc_finish(transaction)
    (change,) = server.on_loop(lambda: list(server.served.changes._changes))[-1:]
    assert (change.tid, change.transaction) == (tid, stores.id)
    (entry,) = near.undoLog(0, 1)
    assert (entry["user_name"], entry["description"]) == (b"ann", b"a note")
    assert entry["key"] == "value"


def test_the_extension_of_a_transaction_is_not_unpickled_on_the_way(
    near, relay, monkeypatch
):
    commit(near, x=b"1")
    monkeypatch.setattr("zeolith.client.log.describe", None)
    assert relay.database.history(X, 1)
    assert relay.database.undo_log(None, 1)


def test_undo_goes_through(writer, near):
    first = commit(near, x=b"1")
    commit(near, x=b"2")
    (entry,) = near.undoLog(0, 1)
    transaction = TransactionMetaData()
    near.tpc_begin(transaction)
    near.undo(entry["id"], transaction)
    assert list(near.tpc_vote(transaction)) == [X]
    tid = near.tpc_finish(transaction)
    wait_for_position(writer, tid)
    assert seen(writer, "x") == seen(near, "x") == b"1"
    assert near.history(X, 5)[0]["tid"] == tid
    assert near.loadSerial(X, first) == b"1"


# Conflicts


def test_what_the_upstream_cannot_resolve_comes_down_to_the_client(
    writer, near, monkeypatch
):
    base = commit(writer, x=b"old")
    wait_for_position(near, base)
    asked: list[tuple[bytes, ...]] = []

    def resolve(
        states: Any, oid: bytes, committed: bytes, old: bytes, new: bytes, data: bytes
    ) -> bytes:
        asked.append((states.loadSerial(oid, old), data, new))
        return b"merged"

    monkeypatch.setattr("zeolith.client.commit.tryToResolveConflict", resolve)
    transaction = TransactionMetaData()
    near.tpc_begin(transaction)
    near.store(X, base, b"mine", "", transaction)
    commit(writer, x=b"theirs")
    assert list(near.tpc_vote(transaction)) == [X]
    tid = near.tpc_finish(transaction)
    assert asked == [(b"old", b"theirs", b"mine")]
    wait_for_position(writer, tid)
    assert seen(writer, "x") == seen(near, "x") == b"merged"


def test_a_conflict_that_nobody_resolves_leaves_the_way_free(writer, near, beside):
    base = commit(writer, x=b"old")
    wait_for_position(near, base)
    transaction = TransactionMetaData()
    near.tpc_begin(transaction)
    near.store(X, base, b"mine", "", transaction)
    commit(writer, x=b"theirs")
    with pytest.raises(ConflictError):
        near.tpc_vote(transaction)
    near.tpc_abort(transaction)
    commit(beside, y=b"1")
    commit(writer, y=b"2")


# The upstream is away


def test_what_is_at_hand_is_read_while_the_upstream_is_away(
    proxy, relay, writer, near, beside
):
    tid = commit(writer, x=b"1", y=b"1")
    wait_for_position(near, tid)
    assert seen(near, "x") == b"1"
    proxy.refuse()
    proxy.cut()
    wait_until_away(relay)
    wait_for_position(beside, tid)
    # Not in this client's cache, but in the relay's.
    assert seen(beside, "x") == b"1"
    with pytest.raises(ClientDisconnected, match="the upstream server is away"):
        seen(beside, "y")
    proxy.restore()
    wait_until(upstream_of(relay).is_connected, "the upstream")
    assert seen(beside, "y") == b"1"


def test_only_the_first_waits_for_an_upstream_that_is_away(proxy, relay, near):
    commit(near, x=b"1")
    proxy.refuse()
    proxy.cut()
    wait_until_away(relay)
    with pytest.raises(ClientDisconnected):
        near.getTid(X)
    calls: list[str] = []
    upstream_of(relay).call = (  # type: ignore[method-assign]
        lambda method, *_args: calls.append(method)
    )
    for _ in range(3):
        with pytest.raises(ClientDisconnected):
            near.getTid(X)
    assert not calls


def test_a_commit_without_an_upstream_fails_and_the_next_one_does_not(
    proxy, relay, writer, near, beside
):
    tid = commit(writer, x=b"1")
    wait_for_position(near, tid)
    transaction = TransactionMetaData()
    near.tpc_begin(transaction)
    near.store(X, tid, b"2", "", transaction)
    proxy.refuse()
    proxy.cut()
    wait_until_away(relay)
    with pytest.raises(ClientDisconnected):
        near.tpc_vote(transaction)
    near.tpc_abort(transaction)
    proxy.restore()
    wait_until(upstream_of(relay).is_connected, "the upstream")
    last = commit(beside, x=b"3")
    wait_for_position(writer, last)
    assert seen(writer, "x") == b"3"


def test_a_transaction_that_has_voted_does_not_survive_the_upstream(
    proxy, relay, near, beside
):
    commit(near, x=b"1")
    transaction = vote(near, x=b"2")
    proxy.cut()
    with pytest.raises(ClientDisconnected, match="nothing was committed"):
        near.tpc_finish(transaction)
    wait_until(upstream_of(relay).is_connected, "the upstream")
    commit(beside, y=b"1")
    assert seen(near, "x") == b"1"


def finish_without_an_answer(
    proxy: Proxy, near: ClientStorage, then: Callable[[], None]
) -> Background:
    """The answer to finish stays in the proxy until ``then`` has cut it off."""
    transaction = vote(near, x=b"2")
    proxy.stall(Direction.TO_CLIENT)
    finishing = Background(near.tpc_finish, transaction)
    then()
    return finishing


def test_a_lost_answer_of_the_upstream_is_found_out(
    server, proxy, relay, writer, near, beside
):
    by = Listening()
    base = commit(near, x=b"1")
    wait_for_position(beside, base)
    beside.registerDB(by)

    def until_committed() -> None:
        wait_until(lambda: writer.lastTransaction() > base, "the commit")
        proxy.cut()
        proxy.restore_passage()

    finishing = finish_without_an_answer(proxy, near, until_committed)
    tid = finishing.result()
    wait_for_position(beside, tid)
    assert by.tids == [tid]
    assert seen(beside, "x") == seen(near, "x") == b"2"
    commit(beside, x=b"3")


def test_nobody_says_what_nobody_knows(proxy, relay, writer, near, beside):
    base = commit(near, x=b"1")

    def until_gone() -> None:
        wait_until(lambda: writer.lastTransaction() > base, "the commit")
        proxy.refuse()
        proxy.cut()
        proxy.restore_passage()

    finishing = finish_without_an_answer(proxy, near, until_gone)
    assert isinstance(finishing.error(), CommitOutcomeUnknown)
    proxy.restore()
    wait_until(upstream_of(relay).is_connected, "the upstream")
    # The relay is in order, and tells everybody what had become of it.
    wait_until(lambda: seen(beside, "x") == b"2", "the commit")
    commit(beside, x=b"3")


def test_a_client_that_lost_the_relay_is_told_what_the_upstream_knows(
    server, relay, near, gate
):
    commit(near, x=b"1")
    transaction = vote(near, x=b"2")
    gate.shut()
    storage = upstream_of(relay)
    finish = storage.tpc_finish
    storage.tpc_finish = gate.after(finish)  # type: ignore[method-assign]
    finishing = Background(near.tpc_finish, transaction)
    gate.wait_until_reached()
    relay.cut_off()
    gate.open()
    tid = finishing.result()
    assert seen(near, "x") == b"2"
    assert near.getTid(X) == tid


def test_a_relay_that_was_restarted_asks_its_upstream(server, relay, near, gate):
    base = commit(near, x=b"1")
    transaction = vote(near, x=b"2")
    stores = near._commits[transaction].stores
    sent_at = near.lastTransaction()
    tid = near.tpc_finish(transaction)
    relay.restart()
    for known in (tid, None):
        answer = near.call("outcome", stores.id, known, sent_at)
        assert answer == ["committed", tid]
    unknown = near.call("outcome", b"?" * 16, None, base)
    assert unknown == ["not committed", None]


# A fresh start


def test_when_changes_were_missed_everybody_starts_afresh(
    server, proxy, relay, writer, near
):
    listening = Listening()
    near.registerDB(listening)
    tid = commit(near, x=b"1", y=b"1")
    proxy.refuse()
    proxy.cut()
    wait_until_away(relay)
    last = commit(writer, x=b"2")
    # As after thousands of commits, and a pack: the way to here is forgotten.
    server.on_loop(server.served.changes._changes.clear)
    server.on_loop(setattr, server.served.replays, "bytes_max", 0)
    proxy.restore()
    wait_until(lambda: listening.afresh, "the fresh start")
    wait_until(near.is_connected, "the client")
    assert near.lastTransaction() == last > tid
    assert (seen(near, "x"), seen(near, "y")) == (b"2", b"1")
    assert relay.on_loop(lambda: relay.served.changes.last_tid) == last
    commit(near, y=b"3")


def test_what_comes_during_a_fresh_start_waits_for_it(relay, writer, near, gate):
    listening = Listening()
    near.registerDB(listening)
    commit(near, x=b"1")
    gate.shut()
    database: Any = relay.database
    database.standing = gate.after(database.standing)
    upstream_of(relay).position._listener.invalidateCache()
    gate.wait_until_reached()
    tid = commit(writer, x=b"2")
    assert not near.is_connected()
    gate.open()
    wait_until(near.is_connected, "the client")
    wait_for_position(near, tid)
    # The client's position was the storage's, so it has missed nothing.
    assert (listening.tids, listening.afresh) == ([tid], 0)
    assert seen(near, "x") == b"2"


def test_another_database_upstream_is_another_database_at_the_relay(
    tmp_path: Path, server, proxy, relay, near
):
    listening = Listening()
    near.registerDB(listening)
    commit(near, x=b"1")
    was = near.sortKey()
    other = {"1": lambda: FileStore("1", str(tmp_path / "Other.fs"))}
    with InProcessServer(other) as second, client_of(second) as writer:
        last = commit(writer, x=b"other")
        upstream_of(relay).new_addr(second.address)
        wait_until(lambda: listening.afresh, "the fresh start")
        wait_until(near.is_connected, "the client")
        assert near.sortKey() == writer.sortKey() != was
        assert near.lastTransaction() == last
        assert seen(near, "x") == b"other"


def test_the_answer_of_another_database_denies_nothing(
    tmp_path: Path, server, relay, near
):
    base = commit(near, x=b"1")
    database = relay.database
    database.database_id = b"of another time."
    assert database.outcome(b"?" * 16, None, base) == ("unknown", None)


# Read-only


def test_a_read_only_upstream_makes_a_read_only_relay(writer, server):
    tid = commit(writer, x=b"1")
    with relaying(server.address, read_only=True) as relay:
        with pytest.raises(ClientDisconnected, match="read-only"):
            ClientStorage(relay.address)
        with client_of(relay, read_only=True) as reader:
            assert reader.lastTransaction() == tid
            assert seen(reader, "x") == b"1"
            with pytest.raises(ReadOnlyError):
                begin(reader, x=b"2")


def test_a_relay_that_fell_back_takes_writes_when_its_upstream_does(
    tmp_path: Path, writer, server
):
    commit(writer, x=b"1")
    with relaying(server.address, read_only_fallback=True) as relay:
        storage = upstream_of(relay)
        with client_of(relay, read_only_fallback=True) as near:
            assert not near.isReadOnly()
            server.stop()
            server._is_read_only = True
            server.start()
            wait_until(storage.isReadOnly, "the fallback")
            with pytest.raises((ReadOnlyError, ClientDisconnected)):
                commit(near, x=b"2")
            server.stop()
            server._is_read_only = False
            server.start()
            wait_until(lambda: not storage.isReadOnly(), "the upgrade")
            wait_until(storage.is_connected, "the upstream")
            commit(near, x=b"3")


# Stopping


def test_a_relay_stops_while_its_upstream_is_away(proxy, relay, near):
    commit(near, x=b"1")
    proxy.refuse()
    proxy.cut()
    wait_until_away(relay)
    near.close()
    relay.stop()


def test_a_relay_that_stops_waits_for_nobody(server, proxy, gate):
    with (
        relaying(proxy.address, wait_timeout=600) as relay,
        client_of(relay) as near,
    ):
        near._wait_timeout_s = WAIT_S
        commit(near, x=b"1")
        proxy.refuse()
        proxy.cut()
        wait_until_away(relay)
        storage: Any = upstream_of(relay)
        gate.shut()
        storage.call = gate.before(storage.call)
        asking = Background(near.getTid, X)
        gate.wait_until_reached()
        gate.open()
        # Within the time that a server has for its threads, or it complains.
        relay.stop()
        assert isinstance(asking.error(), ClientDisconnected)


# Other things between the relay and its upstream


def hexed(data: bytes) -> bytes:
    return b".h" + data.hex().encode()


def test_a_relay_may_change_records_on_their_way(server, writer, monkeypatch):
    def open_wrapped() -> RelayedStorage:
        return RelayedStorage("1", HexStorage(ClientStorage(server.address)))

    # What a record names is not imported in a server, so nothing is resolved there.
    monkeypatch.setattr("zeolith.client.commit.tryToResolveConflict", None)
    with InProcessServer({"1": open_wrapped}) as relay, client_of(relay) as near:
        first = commit(near, x=b"1")
        wait_for_position(writer, first)
        assert seen(writer, "x") == hexed(b"1")
        second = commit(writer, x=hexed(b"2"))
        wait_for_position(near, second)
        assert seen(near, "x") == b"2"
        assert near.sortKey() == writer.sortKey()
        transaction = TransactionMetaData()
        near.tpc_begin(transaction)
        near.store(X, first, b"3", "", transaction)
        with pytest.raises(ConflictError):
            near.tpc_vote(transaction)
        near.tpc_abort(transaction)
        assert near.history(X, 5)[0]["tid"] == second
        commit(near, y=b"1")


def test_relays_may_stand_in_a_row(relay, writer, near):
    with relaying(relay.address) as second, client_of(second) as far:
        listening = Listening()
        far.registerDB(listening)
        tid = commit(writer, x=b"1")
        wait_for_position(far, tid)
        last = commit(far, x=b"2")
        wait_for_position(writer, last)
        wait_for_position(near, last)
        assert seen(writer, "x") == seen(near, "x") == b"2"
        assert listening.tids == [tid]
        assert far.sortKey() == writer.sortKey()
        assert far.call("outcome", b"?" * 16, None, last) == ["not committed", None]


def test_a_client_may_go_from_the_relay_to_its_server_and_keep_what_it_has(
    server, relay, near, writer
):
    listening = Listening()
    near.registerDB(listening)
    commit(near, x=b"1")
    near.new_addr(server.address)
    last = commit(writer, y=b"1")
    wait_for_position(near, last)
    assert (listening.tids, listening.afresh) == ([last], 0)
    assert near.cache.load(X, last) is not None


def test_many_objects_come_through_in_one_request(server, relay, writer, near):
    names = [f"n{number}" for number in range(100)]
    tid = commit(writer, **{name: name.encode() for name in names})
    wait_for_position(near, tid)
    asked: list[str] = []
    session: Any = upstream_of(relay).current_session
    ask = session.call

    def call(method: str, *args: Any) -> Any:
        asked.append(method)
        return ask(method, *args)

    session.call = call
    loaded = near.load_many(map(oid_of, names), following(tid))
    assert len(loaded) == 100
    assert asked == ["load_many"]
