"""ClientStorage: ZODB's interfaces over a server, with and without one."""

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import transaction
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.interfaces import (
    IBlobStorage,
    IMultiCommitStorage,
    IPrefetchStorage,
    IStorage,
    IStorageUndoable,
)
from ZODB.POSException import (
    POSKeyError,
    ReadOnlyError,
    StorageTransactionError,
    Unsupported,
)
from ZODB.utils import p64, u64
from zope.interface.verify import verifyObject

from zeolith.client import connector as connector_module
from zeolith.client.errors import ClientDisconnected
from zeolith.client.loading import REQUEST_OIDS, REQUESTS_AHEAD
from zeolith.client.storage import NEW_OIDS, NEW_OIDS_MAX, ClientStorage
from zeolith.client.tids import MAX_TID, Z64
from zeolith.protocol.errors import HelloRefused, LocalProtocolError
from zeolith.protocol.limits import Limits

from ..support.gates import Background
from ..support.script import (
    DATABASE_ID,
    Act,
    Held,
    ScriptedServer,
    refused_address,
    scripted,
    tid,
)
from ..support.serving import ServerProcess
from ..support.waiting import wait_until

A, B, C = p64(1), p64(2), p64(3)
T1, T2, T3, T4 = map(tid, range(1, 5))


@contextmanager
def storage_at(address: Any, **options: Any) -> Iterator[ClientStorage]:
    storage = ClientStorage(address, **options)
    try:
        yield storage
    finally:
        storage.close()


@pytest.fixture
def storage(server: ScriptedServer) -> Iterator[ClientStorage]:
    with storage_at(server.address) as storage:
        yield storage


# Arguments


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"tls": False, "tls_ca": "ca.pem"}, "tls is off, so tls_ca means nothing"),
        ({"tls_ca": "/nowhere"}, "/nowhere: No such file"),
        ({"ssl_server_hostname": "."}, "no name of a server"),
        ({"ssl": object()}, "ssl is an ssl.SSLContext"),
    ],
)
def test_wrong_arguments_of_tls_are_told_before_anything_begins(options, complaint):
    with pytest.raises((ValueError, TypeError), match=complaint):
        ClientStorage(8100, **options)


def test_the_defaults_may_be_said(server):
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(ClientStorage).parameters.items()
        if name != "addr"
    }
    with storage_at(server.address, **defaults) as storage:
        assert storage.is_connected()


def test_a_wrong_address_is_a_wrong_argument(nothing_left_behind):
    with pytest.raises(ValueError, match="not an address"):
        ClientStorage(None)


def test_the_hello_tells_what_was_asked_for(server):
    with storage_at(
        server.address, storage="main", client_label="web-1", read_only=True
    ):
        (hello,) = server.hellos
        assert hello["storage"] == "main"
        assert hello["label"] == "web-1"
        assert hello["read_only"] is True


def test_a_constructor_that_fails_leaves_nothing_behind(server):
    server.hello = HelloRefused("storage", "there is no storage 'main' here")
    with pytest.raises(ClientDisconnected, match="no storage 'main'"):
        ClientStorage(server.address, storage="main", wait_timeout=1000)


def test_without_a_server_the_constructor_waits_only_so_long(nothing_left_behind):
    with pytest.raises(ClientDisconnected, match=r"within 0\.2 s: Connection refused"):
        ClientStorage(refused_address(), wait_timeout=0.2)


def test_a_constructor_need_not_wait(server):
    server.refuse()
    with storage_at(server.address, wait=False, wait_timeout=0.05) as storage:
        assert not storage.is_connected()
        with pytest.raises(ClientDisconnected):
            storage.ping()
        server.start()
        wait_until(storage.is_connected, "a session")
        storage.ping()


# What it is


def test_it_provides_what_it_says(server, storage):
    for interface in (IStorage, IMultiCommitStorage, IPrefetchStorage):
        assert verifyObject(interface, storage)
    assert not IStorageUndoable.providedBy(storage)


def test_it_can_undo_if_the_servers_storage_can(server):
    server.hello = {"interfaces": ["IStorageUndoable", "ISomethingNew"]}
    with storage_at(server.address) as storage:
        assert verifyObject(IStorageUndoable, storage)
    server.hello = {"supports_undo": False}
    with storage_at(server.address) as storage:
        assert not storage.supportsUndo()


def test_its_name_is_given_or_where_it_is(server, storage):
    host, port = server.address
    assert storage.getName() == storage.__name__ == f"{host}:{port}"
    with storage_at(server.address, name="shop") as named:
        assert named.getName() == "shop"
    with storage_at([("::1", 1), server.address], name=None) as several:
        assert several.getName() == f"[::1]:1, {host}:{port}"


def test_its_sort_key_is_the_same_for_everybody(server, storage):
    """Or two programs that commit to two databases would wait for each other."""
    with storage_at([refused_address(), server.address], name="other") as other:
        assert storage.sortKey() == other.sortKey()
    assert DATABASE_ID.hex() in storage.sortKey()
    with storage_at(server.address, storage="2") as second:
        assert second.sortKey() != storage.sortKey()


def test_size_and_length_are_the_servers(server, storage):
    server.answers["info"] = [4096, 7]
    assert storage.getSize() == 4096
    assert len(storage) == 7


def test_its_truth_asks_nobody(server, storage):
    server.answers["info"] = [0, 0]
    assert storage
    assert server.requests == []


def test_the_last_transaction_is_the_one_we_were_told_of(server):
    server.last_tid = T3
    with storage_at(server.address) as storage:
        assert storage.lastTransaction() == T3
        server.publish([T3, T4, [A], None])
        wait_until(lambda: storage.lastTransaction() == T4, "the change")
        assert server.requests == []


def test_the_last_transaction_waits_for_the_first_session(server):
    accept = threading.Event()
    server.hello = Held(accept, {"last_tid": T3})
    with storage_at(server.address, wait=False) as storage:
        asking = Background(storage.lastTransaction)
        assert not asking.returns_soon()
        accept.set()
        assert asking.result() == T3


def test_the_status_of_the_server_is_handed_on(server, storage):
    server.answers["status"] = {"storages": {}}
    assert storage.server_status() == {"storages": {}}


def test_a_program_can_read_how_it_was_connected(server):
    storage = ClientStorage(server.address, wait=False)
    try:
        wait_until(lambda: storage.connection_info() is not None, "a connection")
        info = storage.connection_info()
        assert info is not None
        assert info["ready_s"] > 0
        assert info["changes_replayed"] == info["records_verified"] == 0
    finally:
        storage.close()


# Reading


def test_what_was_loaded_once_is_not_loaded_again(server, storage):
    server.answers["load"] = [b"data", T1, None, T1]
    for _ in range(3):
        assert storage.loadBefore(A, T2) == (b"data", T1, None)
    assert server.asked("load") == [[A, T2]]


def test_an_answer_is_kept_only_for_what_it_is_good_for(server, storage):
    """It is true as of T1; what comes after is another matter."""
    server.answers["load"] = [b"data", T1, None, T1]
    storage.loadBefore(A, T2)
    storage.loadBefore(A, T3)
    storage.loadBefore(A, MAX_TID)
    assert len(server.asked("load")) == 3


def test_a_change_of_others_ends_what_was_loaded(server, storage):
    server.answers["load"] = [b"old", T1, None, T1]
    storage.loadBefore(A, T2)
    server.publish([T1, T2, [A], None])
    wait_until(lambda: storage.lastTransaction() == T2, "the change")
    server.answers["load"] = [b"new", T2, None, T2]
    assert storage.loadBefore(A, T3) == (b"new", T2, None)
    assert storage.loadBefore(A, T2) == (b"old", T1, T2)
    assert len(server.asked("load")) == 2


def test_an_answer_from_before_a_fresh_start_is_not_kept(server, storage):
    """The server was restored from an older copy while it was on its way."""
    answer = threading.Event()
    server.answers["load"] = Held(answer, [b"from the lost history", T3, None, T3])
    loading = Background(storage.loadBefore, A, T4)
    server.wait_for("load")
    storage.position.adopt(storage.current_session, T1, None)
    answer.set()
    assert loading.result() == (b"from the lost history", T3, None)
    assert len(storage.cache) == 0


def test_a_snapshot_may_be_older_than_the_object(server, storage):
    server.answers["load"] = [None, None, None, T1]
    assert storage.loadBefore(A, T1) is None
    with pytest.raises(POSKeyError):
        storage.load(A)


def test_an_object_that_never_was_is_an_error(server, storage):
    server.answers["load"] = POSKeyError(A)
    with pytest.raises(POSKeyError) as caught:
        storage.loadBefore(A, T2)
    assert caught.value.args == (A,)
    assert len(server.asked("load")) == 1, "an error is an answer"


def test_the_current_record_is_the_servers(server, storage):
    server.answers["load"] = [b"data", T1, None, T1]
    assert storage.load(A) == (b"data", T1)
    assert storage.load(A, "") == (b"data", T1)
    assert server.asked("load") == [[A, MAX_TID]] * 2


def test_other_methods_are_handed_on(server, storage):
    server.answers["load_serial"] = b"data"
    server.answers["get_tid"] = T1
    server.answers["history"] = [[T1, b"ann", b"what", b"", 17]]
    assert storage.loadSerial(A, T1) == b"data"
    assert storage.getTid(A) == T1
    (entry,) = storage.history(A, 5)
    assert (entry["tid"], entry["user_name"], entry["size"]) == (T1, b"ann", 17)
    assert server.asked("history") == [[A, 5]]


def test_a_storage_without_a_blob_dir_says_what_it_needs(server, storage):
    for use in (
        lambda: storage.loadBlob(A, T1),
        lambda: storage.openCommittedBlobFile(A, T1),
        storage.temporaryDirectory,
    ):
        with pytest.raises(Unsupported, match="need a blob_dir"):
            use()
    assert not IBlobStorage.providedBy(storage)


def test_a_shared_blob_dir_needs_a_directory(nothing_left_behind):
    with pytest.raises(ValueError, match="shared_blob_dir without blob_dir"):
        ClientStorage(8100, shared_blob_dir=True)


# Many at once


def revisions(oids: list[bytes], _before: bytes) -> Any:
    """Of each object but A, which is not there."""
    return [T1, [None if oid == A else [b"of " + oid, T1, None] for oid in oids]]


def test_many_are_loaded_in_one_round_trip(server, storage):
    server.answers["load_many"] = revisions
    loaded = storage.load_many([C, A, B, C], T2)
    assert loaded == {B: (b"of " + B, T1, None), C: (b"of " + C, T1, None)}
    assert server.asked("load_many") == [[[C, A, B], T2]]


def test_very_many_are_asked_for_before_anything_is_answered(server, storage):
    """No request waits for the answer to the one before it."""
    go_on = threading.Event()
    server.answers["load_many"] = Held(
        go_on, [T1, [[b"data", T1, None]] * REQUEST_OIDS]
    )
    oids = [p64(number) for number in range(REQUESTS_AHEAD * REQUEST_OIDS)]
    loading = Background(storage.load_many, oids, T2)
    server.wait_for("load_many")
    (channel,) = server.channels()
    wait_until(
        lambda: len(channel.connection.open_requests) == REQUESTS_AHEAD, "every request"
    )
    assert len(server.asked("load_many")) == 1
    go_on.set()
    assert list(loading.result()) == oids


def test_of_many_only_those_are_asked_for_that_are_not_here(server, storage):
    server.answers["load_many"] = revisions
    storage.prefetch([B], T2)
    storage.load_many([B, C], T2)
    storage.prefetch([B, C], T2)
    assert [oids for oids, _before in server.asked("load_many")] == [[B], [C]]
    assert storage.loadBefore(C, T2) == (b"of " + C, T1, None)


def test_a_server_may_answer_for_a_part_and_is_asked_again(server, storage):
    server.answers["load_many"] = lambda oids, before: revisions(oids[:2], before)
    oids = [p64(number) for number in range(10, 15)]
    assert list(storage.load_many(oids, T2)) == oids
    asked = [len(oids) for oids, _before in server.asked("load_many")]
    assert asked == [5, 3, 1]


def test_no_more_are_asked_for_than_the_limit_allows(server):
    server.answers["load_many"] = revisions
    with storage_at(server.address, limits=Limits(load_many_answered_max=4)) as storage:
        oids = [p64(number) for number in range(10, 20)]
        assert list(storage.load_many(oids, T2)) == oids
    asked = [len(oids) for oids, _before in server.asked("load_many")]
    assert asked == [4, 4, 2]


# Calls and lost connections


def test_a_call_whose_channel_is_lost_is_made_again(server, storage):
    answers: list[Any] = [Act.HANG_UP, b"data"]
    server.answers["load_serial"] = lambda *_args: answers.pop(0)
    assert storage.loadSerial(A, T1) == b"data"
    assert storage.is_connected()


def test_a_call_whose_session_is_lost_is_made_in_the_next(server, storage):
    def lose(*_args: Any) -> Any:
        server.answers["load_serial"] = b"data"
        server.lose_sessions()
        return Act.SILENCE

    server.answers["load_serial"] = lose
    assert storage.loadSerial(A, T1) == b"data"
    assert len([each for each in server.hellos if each["kind"] == "stream"]) == 2


def test_a_call_waits_for_the_server_only_so_long(server):
    with storage_at(server.address, wait_timeout=0.1) as storage:
        server.die()
        wait_until(lambda: not storage.is_connected(), "the end of the session")
        with pytest.raises(ClientDisconnected):
            storage.ping()


def test_a_call_that_is_lost_each_time_ends(server):
    with storage_at(server.address, wait_timeout=0.3) as storage:
        server.answers["ping"] = Act.HANG_UP
        with pytest.raises(ClientDisconnected):
            storage.ping()
        # It was tried again, but not in a hurry.
        assert 2 <= len(server.asked("ping")) < 20


def test_a_call_that_the_server_cannot_understand_is_not_made_again(server, storage):
    with pytest.raises(LocalProtocolError, match="oid must be oid"):
        storage.loadSerial(b"short", T1)
    assert storage.is_connected()
    assert len([each for each in server.hellos if each["kind"] == "channel"]) == 1


def test_without_a_server_the_cache_still_answers(server):
    server.answers["load"] = [b"data", T1, None, T1]
    with storage_at(server.address, wait_timeout=0.05) as storage:
        storage.loadBefore(A, T2)
        server.die()
        wait_until(lambda: not storage.is_connected(), "the end of the session")
        assert storage.loadBefore(A, T2) == (b"data", T1, None)
        assert storage.load_many([A], T2) == {A: (b"data", T1, None)}
        assert storage.lastTransaction() == T1
        with pytest.raises(ClientDisconnected):
            storage.loadBefore(B, T2)


def test_a_new_address_is_followed(server, storage):
    with scripted(last_tid=T2) as other:
        other.hello = {"changes": [[T1, T2, [A], None]]}
        storage.new_addr("{}:{}".format(*other.address))
        wait_until(other.streams, "the stream at the new address")
        wait_until(lambda: storage.lastTransaction() == T2, "the changes there")
        with pytest.raises(ValueError, match="not an address"):
            storage.new_addr(None)


# Oids


def oids_from(server: ScriptedServer) -> None:
    """Make it give out oids, each once."""
    last = 0

    def new_oids(count: int) -> list[bytes]:
        nonlocal last
        last += count
        return [p64(number) for number in range(last - count + 1, last + 1)]

    server.answers["new_oids"] = new_oids


def test_oids_come_in_order_and_the_more_at_once_the_more_are_used(server, storage):
    oids_from(server)
    oids = [u64(storage.new_oid()) for _ in range(5 * NEW_OIDS_MAX)]
    assert oids == list(range(1, 5 * NEW_OIDS_MAX + 1))
    (first,), (second,), *_others, (before,), (last,) = server.asked("new_oids")
    assert (first, second, before, last) == (
        NEW_OIDS,
        2 * NEW_OIDS,
        NEW_OIDS_MAX,
        NEW_OIDS_MAX,
    )


def test_unused_oids_are_dropped_with_the_session_that_gave_them(server, storage):
    """The server, restarted, may give them to somebody else."""
    oids_from(server)
    for _ in range(NEW_OIDS + 1):
        storage.new_oid()
    first = storage.current_session
    server.streams()[0].hang_up()
    wait_until(lambda: storage.current_session not in (None, first), "the next session")
    assert u64(storage.new_oid()) == 3 * NEW_OIDS + 1
    assert server.asked("new_oids") == [[NEW_OIDS], [2 * NEW_OIDS], [NEW_OIDS]]


def test_oids_that_came_from_the_next_session_are_used_once(server, storage):
    """The session is lost between the look at it and the answer."""
    oids_from(server)

    def lose(count: int) -> Any:
        oids_from(server)
        server.streams()[0].hang_up()
        return Act.HANG_UP

    server.answers["new_oids"] = lose
    oids = [storage.new_oid() for _ in range(2 * NEW_OIDS)]
    assert len(set(oids)) == len(oids)


def test_threads_get_different_oids(server, storage):
    oids_from(server)

    def some() -> list[bytes]:
        return [storage.new_oid() for _ in range(500)]

    asking = [Background(some) for _ in range(4)]
    oids = [oid for each in asking for oid in each.result()]
    assert len(set(oids)) == 2000


# Read-only


@pytest.fixture
def writing(server: ScriptedServer) -> Any:
    """Every way to write, begun where that is possible."""

    def ways(storage: ClientStorage) -> list[Any]:
        meta = TransactionMetaData()
        return [
            storage.new_oid,
            lambda: storage.tpc_begin(meta),
            lambda: storage.store(A, T1, b"data", "", meta),
            lambda: storage.checkCurrentSerialInTransaction(A, T1, meta),
            lambda: storage.undo(b"AAAAAAAAAAE=", meta),
            lambda: storage.tpc_vote(meta),
        ]

    return ways


def test_a_read_only_storage_refuses_writes_without_asking(server, writing):
    server.hello = {"read_only": True}
    with storage_at(server.address, read_only=True) as storage:
        assert storage.isReadOnly()
        for write in writing(storage):
            with pytest.raises(ReadOnlyError):
                write()
        assert server.requests == []


def test_a_fallback_refuses_writes_and_a_better_server_takes_them(
    server, writing, monkeypatch
):
    monkeypatch.setattr(connector_module, "UPGRADE_INTERVAL_S", 0.01)
    refusal = HelloRefused("read-only", "no writes here")
    server.hello = lambda: (
        {"read_only": True} if server.hellos[-1]["read_only"] else refusal
    )
    oids_from(server)
    with storage_at(server.address, read_only_fallback=True) as storage:
        assert storage.isReadOnly()
        for write in writing(storage):
            with pytest.raises(ReadOnlyError):
                write()
        server.hello = None
        wait_until(
            lambda: storage.is_connected() and not storage.isReadOnly(), "writes"
        )
        storage.new_oid()
        storage.tpc_begin(TransactionMetaData())


def test_a_storage_that_may_write_is_not_read_only_while_it_is_away(server, storage):
    server.die()
    wait_until(lambda: not storage.is_connected(), "the end of the session")
    assert not storage.isReadOnly()


# Sync


class Told:
    """Who is registered with the storage."""

    def __init__(self, storage: ClientStorage):
        self.log: list[Any] = []
        storage.registerDB(self)

    def invalidate(self, tid: bytes, oids: list[bytes]) -> None:
        self.log.append((tid, oids))

    # The name is ZODB's.
    def invalidateCache(self) -> None:
        self.log.append("everything")

    references = transform_record_data = untransform_record_data = None


def test_without_server_sync_a_transaction_begins_without_a_round_trip(server, storage):
    storage.sync()
    assert server.requests == []


def test_with_server_sync_a_transaction_sees_what_was_committed_before(server):
    with storage_at(server.address, server_sync=True) as storage:
        told = Told(storage)
        server.answers["changes_since"] = [
            T3,
            [[T1, T2, [A], None], [T2, T3, [B], None]],
        ]
        storage.sync()
        assert storage.lastTransaction() == T3
        assert told.log == [(T2, [A]), (T3, [B])]
        assert server.asked("changes_since")[-1] == [T1]


def test_a_sync_without_a_server_leaves_the_snapshot_as_it_is(server):
    with storage_at(server.address, server_sync=True, wait_timeout=1000) as storage:
        server.die()
        wait_until(lambda: not storage.is_connected(), "the end of the session")
        Background(storage.sync).result()
        assert storage.lastTransaction() == T1


def test_a_sync_that_loses_its_channel_leaves_the_snapshot_as_it_is(server):
    with storage_at(server.address, server_sync=True, wait_timeout=1000) as storage:
        server.answers["changes_since"] = Act.HANG_UP
        Background(storage.sync).result()
        assert storage.lastTransaction() == T1


def test_a_sync_that_the_server_cannot_answer_begins_a_new_session(server):
    with storage_at(server.address, server_sync=True) as storage:
        told = Told(storage)
        first = storage.current_session
        server.hello = {"last_tid": T4, "changes": None}
        server.answers["changes_since"] = [T4, None]
        storage.sync()
        wait_until(lambda: storage.lastTransaction() == T4, "the fresh start")
        assert storage.current_session is not first
        assert told.log == ["everything"]


def test_who_is_registered_knows_what_was_committed_before(server, storage):
    """ZODB looks for the root next, which somebody else may just have made."""
    server.answers["changes_since"] = [T2, [[T1, T2, [Z64], None]]]
    told = Told(storage)
    assert told.log == [(T2, [Z64])]
    assert storage.lastTransaction() == T2


# Pack


def test_a_pack_is_told_until_when(server, storage, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1_000_000.0)
    storage.pack()
    storage.pack(500.0)
    storage.pack(days=2)
    storage.pack(900_000.0, lambda *_args: None, days=1)
    storage.pack(gc=False)
    # As wrappers do it, after FileStorage.
    storage.pack(900_000.0, lambda *_args: None, False)
    assert list(map(tuple, server.asked("pack"))) == [
        (1_000_000, None),
        (500, None),
        (1_000_000 - 2 * 86400, None),
        (900_000 - 86400, None),
        (1_000_000, False),
        (900_000, False),
    ]


def test_a_pack_need_not_be_waited_for(server, storage):
    storage.pack(1_000.0, wait=False)
    wait_until(lambda: server.asked("pack"), "the request")


def test_the_pack_under_way_is_looked_at_and_given_up(server, storage):
    server.answers["pack_progress"] = {"phase": "copying"}
    server.answers["pack_cancel"] = True
    assert storage.pack_progress() == {"phase": "copying"}
    assert storage.pack_cancel()


def test_a_pack_that_is_lost_is_not_begun_again(server, storage):
    server.answers["pack"] = Act.HANG_UP
    with pytest.raises(ClientDisconnected, match="while packing"):
        storage.pack()
    assert len(server.asked("pack")) == 1


# The end


def test_a_closed_storage_says_so(server, storage):
    storage.close()
    assert not storage.is_connected()
    with pytest.raises(ClientDisconnected, match="the storage is closed"):
        storage.ping()
    storage.close()


def test_closing_wakes_every_call(server, storage):
    server.answers["ping"] = Act.SILENCE
    calling = [Background(storage.ping) for _ in range(3)]
    server.wait_for("ping", times=3)
    storage.close()
    for each in calling:
        assert isinstance(each.error(), ClientDisconnected)
    wait_until(lambda: not server.peers, "the end of every socket")


def test_a_transaction_of_another_storage_is_none_of_ours(server, storage):
    meta = TransactionMetaData()
    storage.tpc_abort(meta)
    with pytest.raises(StorageTransactionError):
        storage.tpc_vote(meta)
    with pytest.raises(StorageTransactionError):
        storage.tpc_finish(meta)


# With a real server


@pytest.fixture
def served(tmp_path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path) as server:
        yield server


def test_threads_share_a_storage(served, nothing_left_behind):
    """Each has a connection of its own; together they count to the end."""
    threads, times = 6, 15
    with storage_at(served.address) as storage:
        db = DB(storage)
        with db.transaction() as connection:
            connection.root()["all"] = 0
            for number in range(threads):
                connection.root()[number] = connection.root().__class__()

        def count(number: int) -> None:
            manager = transaction.TransactionManager()
            connection = db.open(manager)
            root = connection.root()
            for _ in range(times):
                for attempt in manager.attempts(1000):
                    with attempt:
                        root[number]["own"] = root[number].get("own", 0) + 1
                        root["all"] += 1
            connection.close()

        counting = [Background(count, number) for number in range(threads)]
        for each in counting:
            each.result()
        with db.transaction() as connection:
            root = connection.root()
            assert root["all"] == threads * times
            assert [root[number]["own"] for number in range(threads)] == [
                times
            ] * threads
        db.close()


def test_objects_can_be_read_while_the_server_is_away(served):
    with storage_at(served.address, wait_timeout=0.2) as storage:
        db = DB(storage)
        with db.transaction() as connection:
            connection.root()["here"] = connection.root().__class__(value=1)
            connection.root()["away"] = connection.root().__class__(value=2)
        with db.transaction() as connection:
            connection.cacheMinimize()
            assert connection.root()["here"]["value"] == 1
            away = connection.root()["away"]._p_oid
        storage.cache.forget(away)
        served.kill()
        wait_until(lambda: not storage.is_connected(), "the end of the session")
        with db.transaction() as connection:
            connection.cacheMinimize()
            assert connection.root()["here"]["value"] == 1
            with pytest.raises(ClientDisconnected):
                connection.root()["away"]["value"]
            transaction.abort()
        db.close()
