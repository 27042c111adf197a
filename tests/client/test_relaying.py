"""A ClientStorage as a relay sees it."""

import threading
from collections.abc import Iterator

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import ConflictError, StorageTransactionError

from zeolith.client.relaying import Upstream, Vote
from zeolith.client.storage import ClientStorage

from ..support.script import DATABASE_ID, Held, ScriptedServer, oid, tid

A = oid(1)
T1, T2, T3 = map(tid, range(1, 4))
CONFLICT = [A, T2, T1, b"committed", b"old", b"new"]


@pytest.fixture
def storage(server: ScriptedServer) -> Iterator[ClientStorage]:
    storage = ClientStorage(server.address)
    yield storage
    storage.close()


@pytest.fixture
def upstream(storage: ClientStorage) -> Upstream:
    return storage.for_relay()


def begun(storage: ClientStorage, **attributes: bytes) -> TransactionMetaData:
    transaction = TransactionMetaData()
    for name, value in attributes.items():
        setattr(transaction, name, value)
    storage.tpc_begin(transaction)
    storage.store(A, T1, b"new", "", transaction)
    return transaction


def test_the_identity_is_the_servers(upstream):
    assert upstream.identity() == (DATABASE_ID, 1)


def test_the_identity_of_a_server_that_was_never_reached_is_waited_for(server):
    gate = threading.Event()
    server.hello = Held(gate, server.hello)
    storage = ClientStorage(server.address, wait=False)
    gate.set()
    assert storage.for_relay().identity() == (DATABASE_ID, 1)
    storage.close()


def test_a_relay_does_not_guess_what_its_clients_will_read(storage):
    assert storage.read_ahead is not None
    storage.for_relay()
    assert storage.read_ahead is None


def test_what_is_at_hand_is_given_without_asking(server, storage, upstream):
    assert upstream.load_cached(A, T2) is None
    server.answers["load"] = [b"data", T1, None, T1]
    storage.loadBefore(A, T2)
    assert upstream.load_cached(A, T2) == (b"data", T1, None)
    assert len(server.asked("load")) == 1


def test_questions_are_passed_on_as_they_are(server, upstream):
    entry = [T1, b"user", b"description", b"not a pickle", 7]
    server.answers.update(
        new_oids=[A],
        history=[entry],
        undo_log=[entry],
        outcome=["committed", T2],
        verify=[T3, [A]],
    )
    assert upstream.new_oids(5) == [A]
    assert upstream.history(A, 3) == [entry]
    assert upstream.undo_log(None, 3) == [entry]
    assert upstream.outdated([(A, T1), (oid(2), T2)]) == [A]
    assert upstream.outcome(b"t" * 16, None, T1) == ("committed", T2)
    assert server.asked("new_oids") == [[5]]
    assert server.asked("outcome") == [[b"t" * 16, None, T1]]


def test_a_vote_tells_the_tid_and_what_was_resolved(server, storage, upstream):
    server.answers["vote"] = ["voted", T3, [A]]
    assert upstream.vote(begun(storage)) == Vote(T3, [A], [])


def test_conflicts_are_handed_back_and_resolutions_taken(server, storage, upstream):
    server.answers["vote"] = ["conflicts", [CONFLICT]]
    server.answers["resolve"] = ["voted", T3, [A]]
    transaction = begun(storage)
    assert upstream.vote(transaction) == Vote(None, [], [CONFLICT])
    assert upstream.resolve(transaction, {A: b"merged"}) == Vote(T3, [A], [])
    ((_number, resolutions),) = server.asked("resolve")
    assert resolutions == [[A, b"merged"]]


def test_a_transaction_votes_once(server, storage, upstream):
    server.answers["vote"] = ["voted", T3, []]
    transaction = begun(storage)
    upstream.vote(transaction)
    with pytest.raises(StorageTransactionError):
        upstream.vote(transaction)


def test_a_relay_does_not_resolve_by_itself(server, storage, upstream, monkeypatch):
    monkeypatch.setattr("zeolith.client.commit.tryToResolveConflict", None)
    server.answers["vote"] = ["conflicts", [CONFLICT]]
    server.answers["abort"] = None
    with pytest.raises(ConflictError) as caught:
        storage.tpc_vote(begun(storage))
    assert caught.value.oid == A
    assert caught.value.serials == (T2, T1)


def test_a_transaction_of_a_relays_client_keeps_its_id(server, storage, upstream):
    server.answers["vote"] = ["voted", T3, []]
    upstream.vote(begun(storage, transaction_id=b"chosen by client"))
    ((number, *_rest),) = server.asked("vote")
    assert number == b"chosen by client"


def test_a_callback_in_its_place_is_told_from_one_that_is_not(storage, upstream):
    assert not upstream.is_in_place(T3)
    storage.position.in_place = T3
    assert upstream.is_in_place(T3)
    assert not upstream.is_in_place(T2)
