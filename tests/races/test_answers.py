"""Answers, notices and changes travel apart; their order in time must not matter."""

from collections.abc import Callable
from typing import Any

import pytest
from ZODB.Connection import TransactionMetaData

from zeolith.client.errors import CommitOutcomeUnknown
from zeolith.client.round_trip import RoundTrip
from zeolith.client.storage import ClientStorage
from zeolith.protocol.limits import Limits
from zeolith.server.peer import Peer
from zeolith.storage.database import WouldBlock

from ..support.gates import Background
from ..support.inprocess import HeldStream, InProcessServer, client_of
from ..support.proxy import Direction
from ..support.records import (
    Listening,
    commit,
    oid_of,
    seen,
    vote,
    wait_for_position,
)
from ..support.waiting import wait_until

X, Y = oid_of("x"), oid_of("y")


def committing_channel(server: InProcessServer) -> Peer:
    """The server's end of the channel of the transaction under way."""

    def find() -> Peer:
        (holder,) = server.served.committer.holders
        (peer,) = (
            peer
            for peer in server.service.peers
            if peer.transactions.commit is not None
            and peer.transactions.commit is holder
        )
        return peer

    peer: Peer = server.on_loop(find)
    return peer


class HeldAnswers:
    """Answers on one channel that stay in the server until `release`."""

    def __init__(self, server: InProcessServer, peer: Peer):
        self._server = server
        self._peer: Any = peer
        self._reply = peer.reply
        self._held: list[tuple[int, Any]] = []

    def hold(self) -> None:
        def hold(number: int, value: Any) -> None:
            self._held.append((number, value))

        def begin() -> None:
            self._peer.reply = hold
            # Nor may another thread send one.
            self._peer.offer = lambda *_args: None

        self._server.on_loop(begin)

    def wait_for_one(self) -> None:
        wait_until(lambda: self._held, "an answer to hold")

    def release(self) -> None:
        def release() -> None:
            self._peer.reply = self._reply
            for number, value in self._held:
                self._reply(number, value)

        self._server.on_loop(release)


def finish(storage: ClientStorage, transaction: Any, told: list[bytes]) -> bytes:
    tid: bytes = storage.tpc_finish(transaction, told.append)
    return tid


# The answer to finish against the stream


@pytest.mark.parametrize("others", [0, 1, 3])
def test_the_answer_to_finish_may_come_before_everything_on_the_stream(
    server, writer, reader, others: int
):
    """The answer itself brings what it must be preceded by."""
    database = Listening()
    reader.registerDB(database)
    commit(writer, x=b"old", y=b"old")
    wait_for_position(reader, writer.lastTransaction())
    assert seen(reader, "y") == b"old"
    del database.told[:]
    stream = HeldStream(server, reader).hold()
    tids = [commit(writer, y=b"%d" % n) for n in range(others)]
    told: list[bytes] = []
    own = finish(reader, vote(reader, x=b"own"), told)
    assert told == [own]
    assert reader.lastTransaction() == own
    assert database.told == [(tid, {Y}) for tid in tids]
    assert seen(reader, "x") == b"own"
    assert seen(reader, "y") == (b"%d" % (others - 1) if others else b"old")
    stream.release()
    later = commit(writer, y=b"later")
    wait_for_position(reader, later)
    assert database.tids == [*tids, later]
    assert told == [own]
    assert reader.is_connected()


@pytest.mark.parametrize("others", [0, 3])
def test_the_stream_may_bring_what_follows_a_commit_before_its_answer(
    server, writer, reader, others: int
):
    """The thread that commits keeps its place; what comes after it waits."""
    database = Listening()
    reader.registerDB(database)
    commit(reader, x=b"old")
    old = reader.lastTransaction()
    transaction = vote(reader, x=b"own")
    answers = HeldAnswers(server, committing_channel(server))
    answers.hold()
    told: list[bytes] = []
    finishing = Background(finish, reader, transaction, told)
    answers.wait_for_one()
    tids = [commit(writer, y=b"%d" % n) for n in range(others)]
    position = reader.position
    # Its own one is not among them: it is told with the answer.
    wait_until(lambda: len(position._pending) == others, "the changes on the stream")
    assert reader.lastTransaction() == old
    assert not database.told
    answers.release()
    own = finishing.result()
    assert told == [own]
    last = tids[-1] if tids else own
    wait_for_position(reader, last)
    assert database.told == [(tid, {Y}) for tid in tids]
    assert seen(reader, "x") == b"own"


def test_what_a_lost_answer_told_comes_with_the_next_session(server, writer, reader):
    """The stream was spared it, and nobody commits afterwards."""
    commit(writer, y=b"old")
    transaction = vote(reader, x=b"own")
    peer = committing_channel(server)
    answers = HeldAnswers(server, peer)
    answers.hold()
    told: list[bytes] = []
    finishing = Background(finish, reader, transaction, told)
    answers.wait_for_one()
    server.on_loop(peer.cut_off)
    own = finishing.result()
    assert told == [own]
    wait_for_position(reader, own)
    assert seen(reader, "x") == b"own"
    assert commit(reader, x=b"later") > own


def test_what_nobody_waits_for_any_more_comes_with_the_next_session(server, reader):
    """The thread that finishes is interrupted while the answer is on its way."""
    transaction = vote(reader, x=b"own")
    channel: Any = reader._commits[transaction]._channel
    before = reader.lastTransaction()
    socket = channel._socket

    def last_tid() -> bytes:
        tid: bytes = server.on_loop(lambda: server.served.changes.last_tid)
        return tid

    def interrupted(data: bytes, _is_quick: bool) -> bytes:
        socket.sendall(data)
        wait_until(lambda: last_tid() > before, "the commit")
        raise KeyboardInterrupt

    channel._round_trip = interrupted
    with pytest.raises(KeyboardInterrupt):
        reader.tpc_finish(transaction)
    wait_for_position(reader, last_tid())
    assert seen(reader, "x") == b"own"


def test_two_threads_may_finish_and_be_answered_in_the_wrong_order(server, reader):
    """The second commit's answer comes first: its thread waits for the first one's."""
    database = Listening()
    reader.registerDB(database)
    commit(reader, x=b"old")
    first_told: list[bytes] = []
    second_told: list[bytes] = []
    first = vote(reader, x=b"first")
    answers = HeldAnswers(server, committing_channel(server))
    answers.hold()
    finishing_first = Background(finish, reader, first, first_told)
    answers.wait_for_one()
    finishing_second = Background(
        lambda: finish(reader, vote(reader, y=b"second"), second_told)
    )
    served = server.served
    wait_until(
        lambda: server.on_loop(lambda: served.counters.commits) == 3, "both commits"
    )
    assert not finishing_second.returns_soon()
    assert not second_told
    answers.release()
    tids = [finishing_first.result(), finishing_second.result()]
    assert tids == sorted(tids)
    assert [*first_told, *second_told] == tids
    assert reader.lastTransaction() == tids[1]
    assert not database.told


def test_an_own_commit_whose_answer_is_lost_is_told_to_its_thread(
    server, writer, reader, proxy
):
    """The stream has brought it already; the thread asks, and is told once."""
    database = Listening()
    reader.registerDB(database)
    commit(reader, x=b"old")
    transaction = vote(reader, x=b"own")
    answers = HeldAnswers(server, committing_channel(server))
    answers.hold()
    told: list[bytes] = []
    finishing = Background(finish, reader, transaction, told)
    answers.wait_for_one()
    proxy.cut()
    own = finishing.result()
    assert told == [own]
    assert writer.load(X) == (b"own", own)
    later = commit(writer, y=b"later")
    wait_for_position(reader, later)
    assert reader.load(X) == (b"own", own)
    assert own in [*database.tids, *told]
    assert later in database.tids


# Requests and notices on one channel


SMALL = Limits(batch_bytes_max=1000)


@pytest.mark.parametrize("stores", [1, 10, 100])
def test_a_vote_does_not_overtake_what_was_staged_for_it(server, stores: int):
    """A large transaction is sent in pieces that are not answered."""
    with client_of(server, limits=SMALL) as storage:
        records = {f"n{n}": b"%d" % n * 200 for n in range(stores)}
        tid = commit(storage, **records)
        loaded = storage.load_many(map(oid_of, records), b"\x7f" + b"\xff" * 7)
    assert {oid: found[:2] for oid, found in loaded.items()} == {
        oid_of(name): (data, tid) for name, data in records.items()
    }


def test_of_several_stores_of_an_object_the_last_one_counts_in_every_batch(server):
    """Also when the stores are in different messages."""
    with client_of(server, limits=SMALL) as storage:
        transaction = TransactionMetaData()
        storage.tpc_begin(transaction)
        for n in range(20):
            storage.store(X, None, b"%02d" % n * 200, "", transaction)
        storage.tpc_vote(transaction)
        tid = storage.tpc_finish(transaction)
        assert storage.load(X) == (b"19" * 200, tid)


# What is asked, and which method of the database answers it.
QUESTIONS: dict[str, tuple[Callable[[ClientStorage], Any], str]] = {
    "load": (lambda storage: storage.load(X), "load"),
    "getTid": (lambda storage: storage.getTid(X), "get_tid"),
    "history": (lambda storage: storage.history(X), "history"),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_slow_answer_goes_to_the_one_who_asked(
    server, writer, gate, monkeypatch, question
):
    """Meanwhile others ask and are answered, on the same session."""
    tid = commit(writer, x=b"data", y=b"other")
    ask, method = QUESTIONS[question]
    expected = ask(writer)
    step = getattr(server.database, method)

    def gated(oid: bytes, *args: Any) -> Any:
        if oid == X:
            gate.pass_through()
        return step(oid, *args)

    def would_block(*_args: Any) -> None:
        raise WouldBlock

    monkeypatch.setattr(server.database, method, gated)
    monkeypatch.setattr(server.database, "near", lambda: None)
    monkeypatch.setattr(server.database, "load_nowait", would_block)
    with client_of(server) as storage:
        gate.shut()
        asking = Background(ask, storage)
        gate.wait_until_reached()
        for _ in range(3):
            storage.cache.forget(Y)
            assert storage.load(Y) == (b"other", tid)
            storage.ping()
        gate.open()
        assert asking.result() == expected


class Interrupted(BaseException):
    """What a signal handler may raise anywhere."""


class InterruptedSocket:
    """A socket whose user is interrupted when the request is on its way."""

    def __init__(self, sock: Any):
        self._sock = sock

    def sendall(self, data: bytes) -> None:
        self._sock.sendall(data)
        raise Interrupted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def test_an_interrupted_call_leaves_no_answer_to_the_next_one(
    server, writer, monkeypatch
):
    """A Ctrl-C in the middle of a call, say: its answer is still on the way."""
    tid = commit(writer, x=b"data", y=b"other")
    with client_of(server) as storage:
        storage.ping()
        session = storage.current_session
        assert session is not None
        channel: Any = session.borrow()
        session.give_back(channel)
        with monkeypatch.context() as interrupted:
            trip: Any = RoundTrip(InterruptedSocket(channel._socket))  # type: ignore[arg-type]
            interrupted.setattr(channel, "_round_trip", trip)
            with pytest.raises(Interrupted):
                storage.load(X)
        assert storage.load(Y) == (b"other", tid)
        assert storage.load(X) == (b"data", tid)
        assert storage.current_session is session


# What nobody knows


def test_a_commit_of_unknown_outcome_is_heard_of_like_anybodys(server, reader, proxy):
    """Nobody could be asked in time; later the change comes and must not be waited for.

    The thread that might have claimed it has been told that nobody knows.
    """
    database = Listening()
    reader.registerDB(database)
    commit(reader, x=b"old")
    assert seen(reader, "x") == b"old"
    reader._wait_timeout_s = 0.05
    transaction = vote(reader, x=b"own")
    answers = HeldAnswers(server, committing_channel(server))
    answers.hold()
    finishing = Background(finish, reader, transaction, [])
    answers.wait_for_one()
    proxy.stall(Direction.TO_CLIENT)
    proxy.refuse()
    proxy.cut()
    assert isinstance(finishing.error(), CommitOutcomeUnknown)
    reader._wait_timeout_s = 30
    proxy.restore()
    wait_until(lambda: seen(reader, "x") == b"own", "the change")
    assert database.told[-1] == (reader.lastTransaction(), {X})
    later = commit(reader, y=b"later")
    assert reader.lastTransaction() == later
