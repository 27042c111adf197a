"""A transaction from begin to its end, with a server that goes astray at each step."""

import pickle
import threading
from base64 import encodebytes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from transaction.interfaces import TransientError
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import (
    ConflictError,
    POSKeyError,
    StorageError,
    StorageSystemError,
    StorageTransactionError,
    UndoError,
)
from ZODB.tests.ConflictResolution import PCounter, PCounter2
from ZODB.utils import p64

from zeolith.client.channel import Channel
from zeolith.client.commit import Phase
from zeolith.client.errors import ClientDisconnected, CommitOutcomeUnknown
from zeolith.client.round_trip import RoundTrip
from zeolith.client.storage import ClientStorage
from zeolith.client.tids import Z64, following
from zeolith.protocol.codec import encode
from zeolith.protocol.errors import TransactionTimeout
from zeolith.protocol.limits import DEFAULT, Limits
from zeolith.protocol.messages import Goodbye, Reply

from ..support.gates import Background
from ..support.script import (
    IMPATIENT,
    Act,
    Cut,
    Held,
    Raw,
    ScriptedPeer,
    ScriptedServer,
    tid,
)
from ..support.waiting import wait_until

A, B, C = p64(1), p64(2), p64(3)
T1, T2, T3, T4 = map(tid, range(1, 5))
SMALL = Limits(batch_bytes_max=1000)


@contextmanager
def storage_at(
    server: ScriptedServer, limits: Limits = DEFAULT, **options: Any
) -> Iterator[ClientStorage]:
    storage = ClientStorage(server.address, limits=limits, **options)
    try:
        yield storage
    finally:
        storage.close()


@pytest.fixture
def server(server: ScriptedServer) -> ScriptedServer:
    """It votes for everything and commits it as T2."""
    server.answers["vote"] = ["voted", None, []]
    server.answers["finish"] = [T2, []]
    return server


@pytest.fixture
def storage(server: ScriptedServer) -> Iterator[ClientStorage]:
    with storage_at(server) as storage:
        yield storage


class Told:
    """Who is registered with the storage, and the callback of a finish."""

    def __init__(self, storage: ClientStorage):
        self.log: list[Any] = []
        self._storage = storage
        storage.registerDB(self)

    def invalidate(self, tid: bytes, oids: list[bytes]) -> None:
        self.log.append((tid, oids))

    # The name is ZODB's.
    def invalidateCache(self) -> None:
        self.log.append("everything")

    def callback(self, tid: bytes) -> None:
        position = self._storage.position.tid
        assert position is not None
        told = [each[0] for each in self.log if isinstance(each, tuple)]
        assert position < tid or tid in told, "it is seen before it is told"
        self.log.append(tid)

    references = transform_record_data = untransform_record_data = None


def begun(storage: ClientStorage, **records: bytes) -> TransactionMetaData:
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    for name, data in records.items():
        oid = {"a": A, "b": B, "c": C}[name]
        storage.store(oid, T1, data, "", transaction)
    return transaction


def voted(storage: ClientStorage, **records: bytes) -> TransactionMetaData:
    transaction = begun(storage, **(records or {"a": b"data"}))
    storage.tpc_vote(transaction)
    return transaction


def peer_of(server: ScriptedServer, method: str) -> ScriptedPeer:
    """The server's end of the channel on which `method` was called."""
    (peer,) = [each for each in tuple(server.peers) if method in each.methods]
    return peer


# All goes well


def test_a_transaction_is_a_vote_and_a_finish(server, storage):
    transaction = TransactionMetaData("ann", "what she did", {"why": "she could"})
    storage.tpc_begin(transaction)
    storage.store(A, T1, b"a", "", transaction)
    storage.store(B, None, b"b", "", transaction)
    storage.checkCurrentSerialInTransaction(C, T1, transaction)
    assert server.requests == [], "nothing is sent before the vote"
    assert storage.tpc_vote(transaction) == []
    assert storage.tpc_finish(transaction) == T2
    (number, metadata, operations), (number_again, position) = server.asked(
        "vote"
    ) + server.asked("finish")
    assert number == number_again
    assert len(number) == 16
    assert metadata == [
        b"ann",
        b"what she did",
        transaction.extension_bytes,
        None,
        " ",
    ]
    assert operations == [
        ["store", A, T1, b"a"],
        ["store", B, Z64, b"b"],
        ["check", C, T1],
    ]
    assert position == T1
    assert [method for method, _args in server.requests] == ["vote", "finish"]


def test_a_copied_transaction_keeps_its_tid_and_status(server, storage):
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction, T4, "p")
    storage.tpc_vote(transaction)
    ((_number, metadata, _operations),) = server.asked("vote")
    assert metadata[3:] == [T4, "p"]


def test_metadata_may_be_text(server, storage):
    transaction = TransactionMetaData()
    transaction.user, transaction.description = "ann \N{SNOWMAN}", "what"
    storage.tpc_begin(transaction)
    storage.tpc_vote(transaction)
    ((_number, metadata, _operations),) = server.asked("vote")
    assert metadata[:2] == ["ann \N{SNOWMAN}".encode(), b"what"]


def test_the_callback_is_called_before_the_transaction_is_seen(server, storage):
    told = Told(storage)
    storage.tpc_finish(voted(storage), told.callback)
    assert told.log == [T2]
    assert storage.lastTransaction() == T2


def test_what_others_committed_before_is_told_before(server, storage):
    server.answers["finish"] = [T3, [[T1, T2, [C], None]]]
    told = Told(storage)
    storage.tpc_finish(voted(storage), told.callback)
    assert told.log == [(T2, [C]), T3]
    assert storage.lastTransaction() == T3


def test_the_stream_may_bring_the_transaction_first(server, storage):
    told = Told(storage)
    answer = threading.Event()
    server.answers["finish"] = Held(answer, [T3, [[T1, T2, [C], None]]])
    finishing = Background(storage.tpc_finish, voted(storage), told.callback)
    server.wait_for("finish")
    (number, _position) = server.asked("finish")[0]
    server.publish([T1, T2, [C], None], [T2, T3, [A], number])
    wait_until(lambda: told.log, "the change of the other")
    assert not finishing.returns_soon()
    answer.set()
    finishing.result()
    assert told.log == [(T2, [C]), T3]


def test_what_was_written_is_in_the_cache(server, storage):
    storage.tpc_finish(voted(storage, a=b"new", b=b"other"))
    assert storage.loadBefore(A, T3) == (b"new", T2, None)
    assert storage.loadBefore(B, T3) == (b"other", T2, None)
    assert server.asked("load") == []


def test_what_the_server_resolved_is_not_in_the_cache(server, storage):
    server.answers["vote"] = ["voted", None, [A]]
    transaction = begun(storage, a=b"ours", b=b"other")
    assert storage.tpc_vote(transaction) == [A]
    storage.tpc_finish(transaction)
    assert storage.cache.load(A, T3) is None
    assert storage.cache.load(B, T3) == (b"other", T2, None)


def test_a_resolved_object_is_told_to_have_changed(server, storage):
    """An undo, too: its objects are known only from the vote."""
    storage.cache.store(C, T1, None, b"undone", T1)
    server.answers["vote"] = ["voted", None, [C]]
    storage.tpc_finish(voted(storage))
    assert storage.cache.load(C, T2) == (b"undone", T1, T2)
    assert storage.cache.load(C, T3) is None


def test_a_large_transaction_is_staged_before_its_vote(server):
    with storage_at(server, SMALL) as storage:
        transaction = TransactionMetaData()
        storage.tpc_begin(transaction)
        for number in range(10):
            storage.store(p64(number), T1, b"x" * 600, "", transaction)
        assert server.notices == []
        storage.tpc_vote(transaction)
        peer = peer_of(server, "vote")
        assert peer.methods == ["stage"] * 9 + ["vote"]
        sent = [args for _method, args in server.notices] + [
            [number, operations]
            for number, _metadata, operations in server.asked("vote")
        ]
        assert len({number for number, _operations in sent}) == 1
        oids = [operation[1] for _number, each in sent for operation in each]
        assert oids == [p64(number) for number in range(10)]


def test_from_vote_to_finish_it_is_one_channel(server, storage):
    first = voted(storage, a=b"first")
    second = voted(storage, b=b"second")
    storage.call("ping")
    storage.tpc_finish(second)
    server.answers["finish"] = [T3, []]
    storage.tpc_finish(first)
    methods = [each.methods for each in server.channels()]
    assert sorted(methods) == [["ping"], ["vote", "finish"], ["vote", "finish"]]
    server.requests.clear()
    storage.call("ping")
    assert len(server.channels()) == 3


def test_transactions_do_not_wait_for_each_other(server, storage):
    go_on = threading.Event()
    server.answers["vote"] = Held(go_on, ["voted", None, []])
    voting = [Background(voted, storage, a=b"data") for _ in range(3)]
    server.wait_for("vote", times=3)
    go_on.set()
    transactions = [each.result() for each in voting]
    numbers = {number for number, *_rest in server.asked("vote")}
    assert len(numbers) == 3
    for transaction in transactions:
        storage.tpc_abort(transaction)
    assert len(server.asked("abort")) == 3


def test_a_cache_that_fails_does_not_fail_the_commit(server, storage, monkeypatch):
    def fail(*_args: Any) -> None:
        raise OSError("no space left on device")

    told = Told(storage)
    monkeypatch.setattr(storage.cache, "store_committed", fail)
    assert storage.tpc_finish(voted(storage), told.callback) == T2
    assert told.log == [T2]
    assert storage.cache.load(A, T3) is None


def test_a_callback_that_fails_is_heard_and_holds_nobody_up(server, storage):
    def fail(tid: bytes) -> None:
        raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        storage.tpc_finish(voted(storage), fail)
    assert storage.lastTransaction() == T2
    assert storage.tpc_transaction() is None
    server.answers["finish"] = [T3, []]
    assert storage.tpc_finish(voted(storage)) == T3


# Out of order


def test_the_steps_have_an_order(server, storage):
    transaction = begun(storage)
    with pytest.raises(StorageTransactionError, match="before tpc_vote"):
        storage.tpc_finish(transaction)
    with pytest.raises(StorageTransactionError, match="Duplicate tpc_begin"):
        storage.tpc_begin(transaction)
    storage.tpc_vote(transaction)
    with pytest.raises(StorageTransactionError, match="has voted"):
        storage.store(A, T1, b"late", "", transaction)
    with pytest.raises(StorageTransactionError, match="has voted"):
        storage.tpc_vote(transaction)
    storage.tpc_finish(transaction)
    for call in (
        lambda: storage.tpc_vote(transaction),
        lambda: storage.tpc_finish(transaction),
        lambda: storage.store(A, T1, b"late", "", transaction),
        lambda: storage.checkCurrentSerialInTransaction(A, T1, transaction),
    ):
        with pytest.raises(StorageTransactionError):
            call()
    assert len(server.requests) == 2


def test_an_abort_before_the_vote_asks_nobody(server, storage):
    transaction = begun(storage, a=b"data")
    storage.tpc_abort(transaction)
    storage.tpc_abort(transaction)
    assert storage.tpc_transaction() is None
    assert server.requests == []


def test_an_abort_after_the_vote_tells_the_server(server, storage):
    transaction = voted(storage)
    storage.tpc_abort(transaction)
    assert storage.tpc_transaction() is None
    ((number,),) = server.asked("abort")
    assert number == server.asked("vote")[0][0]
    assert peer_of(server, "vote").methods == ["vote", "abort"]


def test_an_abort_that_is_not_answered_is_one(server):
    """The server aborts what it loses sight of."""
    server.answers["abort"] = Act.FREEZE
    with storage_at(server, IMPATIENT) as storage:
        session = storage.current_session
        assert session is not None
        transaction = voted(storage)
        storage.tpc_abort(transaction)
        assert storage.tpc_transaction() is None
        assert session._pool.channels == set()


@pytest.mark.parametrize("error", [StorageTransactionError("gone"), POSKeyError(A)])
def test_an_abort_that_is_refused_is_one(server, storage, error):
    server.answers["abort"] = error
    transaction = voted(storage)
    storage.tpc_abort(transaction)
    assert storage.tpc_transaction() is None


# The vote fails


def test_a_conflict_is_told_and_aborted(server, storage):
    storage.cache.store(A, T1, None, b"stale?", T1)
    storage.cache.store(B, T1, None, b"other", T1)
    server.answers["vote"] = ConflictError(oid=A, serials=(T2, T1))
    transaction = begun(storage, a=b"ours")
    with pytest.raises(ConflictError) as caught:
        storage.tpc_vote(transaction)
    assert caught.value.oid == A
    assert caught.value.serials == (T2, T1)
    assert len(server.asked("abort")) == 1
    assert storage.tpc_transaction() is None
    # The next attempt reads it from the server, in case that our copy was wrong.
    assert storage.cache.load(A, T2) is None
    assert storage.cache.load(B, T2) == (b"other", T1, None)
    storage.tpc_abort(transaction)
    assert len(server.asked("abort")) == 1


def test_a_conflict_without_an_object_is_told(server, storage):
    storage.cache.store(A, T1, None, b"data", T1)
    server.answers["vote"] = ConflictError("somewhere")
    with pytest.raises(ConflictError, match="somewhere"):
        voted(storage)
    assert storage.cache.load(A, T2) == (b"data", T1, None)


@pytest.mark.parametrize(
    "error", [StorageError("no space"), POSKeyError(A), TypeError("what?")]
)
def test_an_error_of_the_vote_is_told_and_aborted(server, storage, error):
    server.answers["vote"] = error
    with pytest.raises(type(error)):
        voted(storage)
    assert len(server.asked("abort")) == 1
    assert storage.tpc_transaction() is None
    server.answers["vote"] = ["voted", None, []]
    assert storage.tpc_finish(voted(storage)) == T2
    assert len(server.channels()) == 1


def nothing_was_committed(error: BaseException) -> None:
    assert isinstance(error, ClientDisconnected)
    assert isinstance(error, TransientError)
    assert "nothing" in str(error)
    assert "committed" in str(error)


def test_a_channel_lost_in_the_vote_is_told(server, storage):
    server.answers["vote"] = Act.HANG_UP
    transaction = begun(storage, a=b"data")
    with pytest.raises(ClientDisconnected) as caught:
        storage.tpc_vote(transaction)
    nothing_was_committed(caught.value)
    assert storage.tpc_transaction() is None
    storage.tpc_abort(transaction)
    assert server.asked("abort") == []


def test_a_session_lost_in_the_vote_says_why(server, storage):
    server.answers["vote"] = Act.SILENCE
    voting = Background(voted, storage)
    server.wait_for("vote")
    server.streams()[0].goodbye("stopping", "for a rest")
    error = voting.error()
    nothing_was_committed(error)
    assert "for a rest" in str(error)


def test_a_server_silent_in_the_vote_is_not_waited_for(server):
    server.answers["vote"] = Act.FREEZE
    # The stream is quiet too: either may be noticed first.
    with storage_at(server, IMPATIENT) as storage:
        with pytest.raises(ClientDisconnected) as caught:
            voted(storage)
        nothing_was_committed(caught.value)


def test_a_server_that_gives_up_in_the_middle_of_the_stores_says_why(server):
    """It answers a notice with a goodbye; nobody reads that before the vote."""
    with storage_at(server, SMALL) as storage:
        server.answers["vote"] = Raw(encode(Goodbye("stage", "too much")))
        transaction = TransactionMetaData()
        storage.tpc_begin(transaction)
        for number in range(10):
            storage.store(p64(number), T1, b"x" * 600, "", transaction)
        with pytest.raises(ClientDisconnected, match="too much"):
            storage.tpc_vote(transaction)


def test_a_transaction_does_not_move_into_the_next_session(server, storage):
    transaction = begun(storage, a=b"data")
    first = storage.current_session
    server.streams()[0].hang_up()
    wait_until(lambda: storage.current_session not in (None, first), "the next session")
    with pytest.raises(ClientDisconnected) as caught:
        storage.tpc_vote(transaction)
    nothing_was_committed(caught.value)
    assert server.requests == []
    storage.tpc_abort(transaction)
    assert storage.tpc_finish(voted(storage)) == T2


def test_an_interrupted_vote_waits_for_nothing(server, storage, monkeypatch):
    """The answer to the vote must not be taken for that to an abort."""
    sent = threading.Event()

    class Interrupted:
        def __init__(self, sock: Any):
            self.sock = sock

        def recv(self, size: int) -> bytes:
            sent.set()
            raise KeyboardInterrupt

        def __getattr__(self, name: str) -> Any:
            return getattr(self.sock, name)

    transaction = begun(storage, a=b"data")
    call = Channel.call

    def interrupted(channel: Channel, method: str, *args: Any) -> Any:
        if method == "vote":
            channel._round_trip = RoundTrip(Interrupted(channel._socket))  # type: ignore[arg-type]
        return call(channel, method, *args)

    monkeypatch.setattr(Channel, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage.tpc_vote(transaction)
    assert sent.is_set()
    assert server.asked("abort") == []
    assert storage.tpc_transaction() is None
    wait_until(lambda: not server.channels(), "the end of the channel")


# Conflicts that the application resolves


def counter(value: int, cls: type = PCounter) -> bytes:
    return pickle.dumps(cls, 3) + pickle.dumps({"_value": value}, 3)


def value_of(record: bytes) -> int:
    state: int = pickle.loads(record[len(pickle.dumps(PCounter, 3)) :])["_value"]
    return state


def conflict(oid: bytes, cls: type = PCounter) -> list[bytes]:
    """Both have counted on from 1: somebody to 5, we to 3."""
    return [oid, T2, T1, counter(5, cls), counter(1, cls), counter(3, cls)]


def test_the_applications_classes_resolve_a_conflict(server, storage):
    server.answers["vote"] = ["conflicts", [conflict(A), conflict(B)]]
    server.answers["resolve"] = ["voted", None, [A, B]]
    transaction = begun(storage, a=counter(3), b=counter(3), c=b"other")
    assert storage.tpc_vote(transaction) == [A, B]
    ((number, resolutions),) = server.asked("resolve")
    assert number == server.asked("vote")[0][0]
    assert [(oid, value_of(record)) for oid, record in resolutions] == [(A, 7), (B, 7)]
    assert peer_of(server, "vote").methods == ["vote", "resolve"]
    storage.tpc_finish(transaction)
    assert storage.cache.load(A, T3) is None
    assert storage.cache.load(C, T3) == (b"other", T2, None)


def test_conflicts_may_come_in_several_rounds(server, storage):
    server.answers["vote"] = ["conflicts", [conflict(A)]]
    answers: list[Any] = [["conflicts", [conflict(B)]], ["voted", None, [A, B]]]
    server.answers["resolve"] = lambda *_args: answers.pop(0)
    transaction = begun(storage, a=counter(3), b=counter(3))
    assert storage.tpc_vote(transaction) == [A, B]
    resolved = [resolutions[0][0] for _number, resolutions in server.asked("resolve")]
    assert resolved == [A, B]


def test_what_cannot_be_resolved_is_a_conflict(server, storage):
    server.answers["vote"] = ["conflicts", [conflict(A), conflict(B, PCounter2)]]
    with pytest.raises(ConflictError) as caught:
        voted(storage, a=counter(3), b=counter(3, PCounter2))
    assert caught.value.oid == B
    assert caught.value.serials == (T2, T1)
    assert server.asked("resolve") == []
    assert len(server.asked("abort")) == 1
    assert storage.tpc_transaction() is None


def test_what_cannot_be_resolved_of_an_undo_is_not_tried_again(server, storage):
    """A ConflictError would make the application repeat it, in vain."""
    server.answers["vote"] = ["conflicts", [conflict(A, PCounter2)]]
    transaction = begun(storage, b=counter(3))
    storage.undo(encodebytes(T1).rstrip(), transaction)
    with pytest.raises(UndoError) as caught:
        storage.tpc_vote(transaction)
    assert not isinstance(caught.value, TransientError)
    assert len(server.asked("abort")) == 1


def test_an_undo_is_merged_with_the_applications_classes(server, storage):
    server.answers["vote"] = ["conflicts", [conflict(A)]]
    server.answers["resolve"] = ["voted", None, [A]]
    transaction = begun(storage)
    storage.undo(encodebytes(T1).rstrip(), transaction)
    assert storage.tpc_vote(transaction) == [A]
    ((_number, ((oid, record),)),) = server.asked("resolve")
    assert (oid, value_of(record)) == (A, 7)


def test_records_are_transformed_for_the_resolution(server, storage):
    """A storage wrapped in one that changes records, as compression does."""

    class Wrapper:
        def invalidate(self, *_args: Any) -> None: ...

        def references(self, *_args: Any) -> None: ...

        def transform_record_data(self, data: bytes) -> bytes:
            return data[::-1]

        def untransform_record_data(self, data: bytes) -> bytes:
            return data[::-1]

    storage.registerDB(Wrapper())
    there = (
        [oid, T2, T1, *(each[::-1] for each in conflict(A)[3:])] if (oid := A) else []
    )
    server.answers["vote"] = ["conflicts", [there]]
    server.answers["resolve"] = ["voted", None, [A]]
    voted(storage, a=counter(3)[::-1])
    ((_number, [[_oid, record]]),) = server.asked("resolve")
    assert value_of(record[::-1]) == 7


def test_a_channel_lost_in_the_resolution_is_told(server, storage):
    server.answers["vote"] = ["conflicts", [conflict(A)]]
    server.answers["resolve"] = Act.HANG_UP
    with pytest.raises(ClientDisconnected) as caught:
        voted(storage, a=counter(3))
    nothing_was_committed(caught.value)


# Lost between vote and finish


def test_a_session_lost_before_finish_was_sent_has_committed_nothing(server, storage):
    transaction = voted(storage)
    first = storage.current_session
    server.streams()[0].goodbye("stopping", "for a rest")
    wait_until(lambda: storage.current_session not in (None, first), "the next session")
    with pytest.raises(ClientDisconnected, match="for a rest") as caught:
        storage.tpc_finish(transaction)
    nothing_was_committed(caught.value)
    assert server.asked("finish") == server.asked("outcome") == []
    assert storage.tpc_transaction() is None


def test_without_a_server_nothing_was_committed_before_finish_was_sent(server):
    with storage_at(server, wait_timeout=0.1) as storage:
        transaction = voted(storage)
        server.die()
        wait_until(lambda: not storage.is_connected(), "the end of the session")
        with pytest.raises(ClientDisconnected) as caught:
            storage.tpc_finish(transaction)
        nothing_was_committed(caught.value)


# The answer to finish is lost: the server is asked


class Asked:
    """A server that loses the answer to finish, and knows what became of it."""

    def __init__(self, server: ScriptedServer, *outcome: Any):
        self.server = server
        server.answers["vote"] = ["voted", T2, []]
        server.answers["finish"] = Act.HANG_UP
        server.answers["outcome"] = list(outcome)


def test_a_lost_answer_is_looked_up_and_the_truth_is_committed(server, storage):
    Asked(server, "committed", T2)
    told = Told(storage)
    transaction = voted(storage)
    # The stream lives, but may be spared what the answer told: another session has it.
    server.hello = lambda: {
        "last_tid": T2,
        "changes": [[T1, T2, [A], server.asked("finish")[0][0]]],
    }
    assert storage.tpc_finish(transaction, told.callback) == T2
    (number, told_tid, position) = server.asked("outcome")[0]
    assert number == server.asked("finish")[0][0]
    assert (told_tid, position) == (T2, T1)
    assert told.log.count(T2) == 1
    assert storage.lastTransaction() == T2
    assert storage.tpc_transaction() is None


def test_a_lost_answer_is_looked_up_and_the_truth_is_not_committed(server, storage):
    Asked(server, "not committed", None)
    told = Told(storage)
    with pytest.raises(ClientDisconnected) as caught:
        storage.tpc_finish(voted(storage), told.callback)
    nothing_was_committed(caught.value)
    assert told.log == []
    assert storage.tpc_transaction() is None
    assert storage.lastTransaction() == T1


def test_a_server_that_does_not_know_leaves_the_outcome_unknown(server, storage):
    Asked(server, "unknown", None)
    with pytest.raises(
        CommitOutcomeUnknown, match=f"may have been committed as {T2.hex()}"
    ):
        storage.tpc_finish(voted(storage))
    assert storage.tpc_transaction() is None


def test_the_outcome_may_be_unknown_without_a_tid(server, storage):
    Asked(server, "unknown", None)
    server.answers["vote"] = ["voted", None, []]
    with pytest.raises(CommitOutcomeUnknown, match="may have been committed:"):
        storage.tpc_finish(voted(storage))


def die_at(server: ScriptedServer) -> Any:
    """An answer that ends stream and channels, as the end of the process does."""

    def die(*_args: Any) -> Any:
        for peer in tuple(server.peers):
            peer.hang_up()
        return Act.SILENCE

    return die


@pytest.mark.parametrize(
    ("outcome", "error"),
    [
        (["committed", T2], None),
        (["not committed", None], ClientDisconnected),
        (["unknown", None], CommitOutcomeUnknown),
    ],
)
def test_the_successor_is_asked(server, storage, outcome, error):
    Asked(server, *outcome)
    server.answers["finish"] = die_at(server)
    told = Told(storage)
    transaction = voted(storage)
    if error is None:
        server.hello = lambda: {
            "last_tid": T2,
            "changes": [[T1, T2, [A], server.asked("finish")[0][0]]],
        }
        assert storage.tpc_finish(transaction, told.callback) == T2
        assert told.log == [(T2, [A]), T2] or told.log == [T2, (T2, [A])]
        assert storage.lastTransaction() == T2
    else:
        with pytest.raises(error):
            storage.tpc_finish(transaction, told.callback)
        assert told.log == []


@pytest.mark.parametrize(
    "difference", [{"database_id": b"another-database"}, {"epoch": 2}]
)
def test_another_database_cannot_say_that_it_was_not_committed(
    server, storage, difference
):
    """It does not have it; the one that was asked to finish may."""
    Asked(server, "not committed", None)
    server.answers["finish"] = die_at(server)
    transaction = voted(storage)
    server.hello = {**difference, "changes": None}
    with pytest.raises(CommitOutcomeUnknown):
        storage.tpc_finish(transaction)


def test_no_server_leaves_the_outcome_unknown(server):
    with storage_at(server, wait_timeout=0.1) as storage:
        Asked(server, "committed", T2)

        def die(*_args: Any) -> Any:
            server.hello = Act.HANG_UP
            return die_at(server)()

        server.answers["finish"] = die
        with pytest.raises(CommitOutcomeUnknown) as caught:
            storage.tpc_finish(voted(storage))
        assert isinstance(caught.value.__cause__, ClientDisconnected)
        assert not isinstance(caught.value, TransientError)
        assert storage.tpc_transaction() is None


@pytest.mark.parametrize(
    "error", [StorageError("read error"), TypeError("what?"), POSKeyError(A)]
)
def test_a_server_that_cannot_look_it_up_leaves_the_outcome_unknown(
    server, storage, error
):
    Asked(server)
    server.answers["outcome"] = error
    with pytest.raises(CommitOutcomeUnknown):
        storage.tpc_finish(voted(storage))
    assert storage.tpc_transaction() is None


@pytest.mark.parametrize("size_bytes", range(19))
def test_an_answer_to_finish_may_be_cut_off_anywhere(server, storage, size_bytes):
    whole = encode(Reply(2, [T2, []]))
    assert len(whole) == 19
    Asked(server, "committed", T2)
    server.answers["finish"] = Cut(size_bytes, [T2, []])
    transaction = voted(storage)
    finishing = Background(storage.tpc_finish, transaction)
    server.wait_for("outcome")
    server.publish([T1, T2, [A], server.asked("finish")[0][0]])
    assert finishing.result() == T2


def test_a_server_silent_in_finish_is_asked_again(server):
    Asked(server, "not committed", None)
    server.answers["finish"] = Act.FREEZE
    limits = Limits(heartbeat_interval_s=0.3, heartbeat_timeout_s=1)
    with storage_at(server, limits) as storage:
        with pytest.raises(ClientDisconnected) as caught:
            storage.tpc_finish(voted(storage))
        nothing_was_committed(caught.value)


# The server refuses to finish


def test_a_transaction_that_took_too_long_may_be_tried_again(server, storage):
    server.answers["finish"] = TransactionTimeout("it took too long")
    told = Told(storage)
    transaction = voted(storage)
    with pytest.raises(TransactionTimeout):
        storage.tpc_finish(transaction, told.callback)
    assert told.log == []
    assert storage.tpc_transaction() is None
    server.answers["finish"] = [T2, []]
    assert storage.tpc_finish(voted(storage)) == T2
    assert len(server.channels()) == 1


def test_after_a_disaster_in_finish_nobody_knows(server, storage):
    server.answers["finish"] = StorageSystemError("the disk is gone")
    with pytest.raises(CommitOutcomeUnknown, match="the disk is gone"):
        storage.tpc_finish(voted(storage))
    assert storage.tpc_transaction() is None


@pytest.mark.parametrize(
    "answer", [TransactionTimeout("too long"), StorageSystemError("gone"), Act.HANG_UP]
)
def test_a_finish_that_failed_leaves_its_change_to_the_stream(server, storage, answer):
    """If it was committed all the same, it comes like anybody's."""
    Asked(server, "unknown", None)
    server.answers["finish"] = answer
    told = Told(storage)
    with pytest.raises(StorageError):
        storage.tpc_finish(voted(storage), told.callback)
    number = server.asked("finish")[0][0]
    server.publish([T1, T2, [A], number], [T2, T3, [B], None])
    wait_until(lambda: storage.lastTransaction() == T3, "the changes")
    assert told.log == [(T2, [A]), (T3, [B])]


# Vote and finish in one


@pytest.fixture
def at_once(server: ScriptedServer) -> ScriptedServer:
    """It commits everything as T2, without a vote of its own."""
    server.answers["commit"] = ["committed", T2, [], []]
    return server


def committed(storage: ClientStorage, **records: bytes) -> TransactionMetaData:
    transaction = begun(storage, **(records or {"a": b"data"}))
    storage.commit_to_vote(transaction).vote_and_finish()
    return transaction


def test_where_nobody_else_takes_part_there_is_one_question(at_once, storage):
    told = Told(storage)
    transaction = committed(storage, a=b"new")
    assert storage.position.tid == T1, "it is seen before it is told"
    assert storage.tpc_finish(transaction, told.callback) == T2
    assert told.log == [T2]
    assert storage.position.tid == T2
    assert storage.loadBefore(A, T3) == (b"new", T2, None)
    assert at_once.asked("vote") == at_once.asked("finish") == []
    (_number, _metadata, operations, position) = at_once.asked("commit")[0]
    assert operations == [["store", A, T1, b"new"]]
    assert position == T1
    assert storage.tpc_transaction() is None


def test_a_large_transaction_is_staged_before_that(at_once):
    with storage_at(at_once, SMALL) as storage:
        transaction = TransactionMetaData()
        storage.tpc_begin(transaction)
        for number in range(3):
            storage.store(p64(number), T1, b"x" * 600, "", transaction)
        storage.commit_to_vote(transaction).vote_and_finish()
        assert peer_of(at_once, "commit").methods == ["stage", "stage", "commit"]
        assert storage.tpc_finish(transaction) == T2


def test_what_was_merged_then_is_told_and_not_kept(at_once, storage):
    at_once.answers["commit"] = ["committed", T2, [A], []]
    transaction = begun(storage, a=b"ours", b=b"other")
    assert storage.commit_to_vote(transaction).vote_and_finish() == [A]
    storage.tpc_finish(transaction)
    assert storage.cache.load(A, T3) is None
    assert storage.cache.load(B, T3) == (b"other", T2, None)


def test_changes_that_come_between_the_phases_wait_for_the_second(at_once, storage):
    at_once.answers["commit"] = ["committed", T3, [], [[T1, T2, [C], None]]]
    told = Told(storage)
    transaction = committed(storage)
    (number, *_) = at_once.asked("commit")[0]
    at_once.publish([T2, T3, [A], number], [T3, T4, [B], None])
    storage.tpc_finish(transaction, told.callback)
    wait_until(lambda: storage.lastTransaction() == T4, "the change after it")
    assert told.log == [(T2, [C]), T3, (T4, [B])]


def test_what_the_application_must_merge_is_voted_and_finished(at_once, storage):
    at_once.answers["commit"] = ["conflicts", [conflict(A)]]
    at_once.answers["resolve"] = ["voted", None, [A]]
    transaction = begun(storage, a=counter(3))
    assert storage.commit_to_vote(transaction).vote_and_finish() == [A]
    # Nobody waits for it meanwhile: it is not being finished.
    at_once.publish([T1, T2, [B], None])
    wait_until(lambda: storage.lastTransaction() == T2, "the change of another")
    at_once.answers["finish"] = [T3, []]
    assert storage.tpc_finish(transaction) == T3
    ((_number, resolutions),) = at_once.asked("resolve")
    assert [(oid, value_of(data)) for oid, data in resolutions] == [(A, 7)]


def test_what_cannot_be_merged_then_is_a_conflict(at_once, storage):
    at_once.answers["commit"] = ["conflicts", [conflict(A, PCounter2)]]
    with pytest.raises(ConflictError):
        committed(storage, a=counter(3))
    assert len(at_once.asked("abort")) == 1
    assert storage.tpc_transaction() is None


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (ConflictError(oid=A, serials=(T2, T1)), ConflictError),
        (StorageError("no room"), StorageError),
        (StorageSystemError("the disk is gone"), CommitOutcomeUnknown),
    ],
)
def test_a_refusal_leaves_the_position_free(at_once, storage, failure, error):
    storage.cache.store(A, T1, None, b"wrong", T1)
    at_once.answers["commit"] = failure
    with pytest.raises(error):
        committed(storage)
    if error is ConflictError:
        assert storage.cache.load(A, T2) is None
    assert storage.tpc_transaction() is None
    (number, *_) = at_once.asked("commit")[0]
    at_once.publish([T1, T2, [A], number])
    wait_until(lambda: storage.lastTransaction() == T2, "the change")


def test_a_session_lost_before_that_has_committed_nothing(at_once):
    with storage_at(at_once, wait_timeout=0.1) as storage:
        transaction = begun(storage, a=b"data")
        commit = storage.commit_to_vote(transaction)
        at_once.die()
        wait_until(lambda: not storage.is_connected(), "the end of the session")
        with pytest.raises(ClientDisconnected) as caught:
            commit.vote_and_finish()
        nothing_was_committed(caught.value)
        assert storage.tpc_transaction() is None


def test_of_a_lost_answer_the_truth_is_told_and_what_was_merged_is_not_known(
    at_once, storage
):
    at_once.answers["commit"] = Act.HANG_UP
    at_once.answers["outcome"] = ["committed", T2]
    told = Told(storage)
    transaction = begun(storage, a=b"ours", b=b"other")
    at_once.hello = lambda: {
        "last_tid": T2,
        "changes": [[T1, T2, [A, B], at_once.asked("commit")[0][0]]],
    }
    # Of each the server may have something else than what was sent.
    assert sorted(storage.commit_to_vote(transaction).vote_and_finish()) == [A, B]
    assert storage.tpc_finish(transaction, told.callback) == T2
    assert told.log.count(T2) == 1
    assert storage.cache.load(A, T3) is None
    assert storage.lastTransaction() == T2
    (number, tid_told, position) = at_once.asked("outcome")[0]
    assert (number, tid_told, position) == (at_once.asked("commit")[0][0], None, T1)


@pytest.mark.parametrize(
    ("outcome", "error"),
    [("not committed", ClientDisconnected), ("unknown", CommitOutcomeUnknown)],
)
def test_of_a_lost_answer_the_vote_tells_the_truth(at_once, storage, outcome, error):
    at_once.answers["commit"] = Act.HANG_UP
    at_once.answers["outcome"] = [outcome, None]
    with pytest.raises(error):
        committed(storage)
    assert storage.tpc_transaction() is None


def test_given_up_between_the_phases_it_is_somebody_elses_change(
    at_once, storage, caplog
):
    at_once.answers["commit"] = ["committed", T3, [], [[T1, T2, [C], None]]]
    told = Told(storage)
    storage.tpc_abort(committed(storage))
    assert told.log == [(T2, [C]), (T3, [A])]
    assert storage.lastTransaction() == T3
    assert storage.cache.load(A, T4) is None
    assert f"committed as {T3.hex()}" in caplog.text
    assert at_once.asked("abort") == []
    assert storage.tpc_transaction() is None


@pytest.mark.parametrize("is_alone", [True, False], ids=["at once", "two phases"])
@pytest.mark.parametrize("place", ["behind the answer", "before its turn"])
def test_interrupted_after_the_answer_the_next_session_brings_it(
    at_once, storage, monkeypatch, is_alone, place
):
    """The stream was spared it; if nobody else commits, nothing else would bring it."""

    def interrupt(*_args: Any) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    told = Told(storage)
    transaction = begun(storage, a=b"data")
    commit = storage.commit_to_vote(transaction)
    if place == "behind the answer":
        monkeypatch.setattr("zeolith.client.commit._Committed", interrupt)
    else:
        monkeypatch.setattr(storage.cache, "apply", interrupt)
    asked = "commit" if is_alone else "finish"
    at_once.hello = lambda: {
        "last_tid": T2,
        "changes": [[T1, T2, [A], at_once.asked(asked)[0][0]]],
    }

    def go() -> None:
        (commit.vote_and_finish if is_alone else commit.vote)()
        commit.finish(told.callback)

    with pytest.raises(KeyboardInterrupt):
        go()
    storage.tpc_abort(transaction)
    assert storage.tpc_transaction() is None
    wait_until(lambda: storage.position.tid == T2, "the next session")
    assert told.log == [(T2, [A])]


def test_given_up_when_the_answer_could_not_tell_all_the_stream_does(at_once, storage):
    at_once.answers["commit"] = ["committed", T3, [], None]
    told = Told(storage)
    transaction = committed(storage)
    (number, *_) = at_once.asked("commit")[0]
    storage.tpc_abort(transaction)
    at_once.publish([T1, T2, [C], None], [T2, T3, [A], number])
    wait_until(lambda: storage.lastTransaction() == T3, "the stream")
    assert told.log == [(T2, [C]), (T3, [A])]


# Closing


def test_closing_aborts_what_was_begun(server, storage):
    transaction = voted(storage)
    storage.close()
    wait_until(lambda: not server.peers, "the end of the channel")
    assert storage.tpc_transaction() is None
    storage.tpc_abort(transaction)


@pytest.mark.parametrize("is_cached", [False, True], ids=["in memory", "on disk"])
def test_what_is_committed_when_the_storage_is_closed_is_told_as_that(
    at_once, tmp_path, is_cached
):
    with storage_at(at_once, cache=str(tmp_path) if is_cached else None) as storage:
        told = Told(storage)
        transaction = committed(storage)
        storage.close()
        assert storage.tpc_finish(transaction, told.callback) == T2
        assert told.log == [T2]
        assert storage.tpc_transaction() is None


@pytest.mark.parametrize("method", ["vote", "finish"])
def test_closing_wakes_a_thread_that_commits(server, storage, method):
    """Nobody but that thread uses its channel, and nobody waits for it."""
    server.answers[method] = Act.SILENCE
    committing = Background(lambda: storage.tpc_finish(voted(storage)))
    server.wait_for(method)
    Background(storage.close).result()
    error = committing.error()
    assert isinstance(error, StorageError)
    assert "the storage is closed" in str(error)
    assert server.asked("abort") == []


def test_a_phase_is_what_a_transaction_has_done(server, storage):
    transaction = begun(storage, a=b"data")
    (commit,) = storage._commits.values()
    phases = [commit.phase]
    storage.tpc_vote(transaction)
    phases.append(commit.phase)
    assert phases == [Phase.BEGUN, Phase.VOTED]
    storage.tpc_finish(transaction)
    assert commit.phase is Phase.ENDED
    commit.end()
    assert following(T1) == storage.lastTransaction()
