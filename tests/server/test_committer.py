import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from ZODB.POSException import ConflictError, StorageSystemError, StorageTransactionError

from zeolith.protocol.errors import ShuttingDown, TransactionTimeout
from zeolith.server import committer
from zeolith.server.committer import Commit, Phase
from zeolith.storage.database import (
    BrokenDatabase,
    Conflict,
    Finished,
    OutcomeUnknown,
    Transaction,
    Unavailable,
    Unresolved,
    Voted,
)

from ..support.ids import number, transaction_id
from ..support.model import ModelServer

CONFLICT = Conflict(number(1), number(2), number(1), b"committed", b"old", b"new")
GONE = StorageTransactionError("the connection was lost")


class Client:
    """One transaction, and what its client was answered."""

    def __init__(self, server: ModelServer, id_: int):
        self._committer = server.committer
        oid = number(100 + id_)
        transaction = Transaction(
            transaction_id(id_), operations=[["store", oid, number(0), b"data"]]
        )
        self.commit = Commit(transaction, f"client {id_}")
        self.answers: list[Any] = []

    @property
    def phase(self) -> Phase:
        return self.commit.phase

    def is_in(self, phase: Phase) -> bool:
        return self.commit.phase is phase

    def vote(self) -> None:
        self._committer.vote(self.commit, self.answer)

    def resolve(self) -> None:
        self._committer.resolve(self.commit, {number(1): b"resolved"}, self.answer)

    def finish(self) -> None:
        self._committer.finish(self.commit, self.answer)

    def abort(self) -> None:
        reason = StorageTransactionError("the transaction was aborted")
        self._committer.abandon(self.commit, reason, self.answer)

    def lose(self) -> None:
        """Its channel is gone."""
        self._committer.abandon(self.commit, GONE, None)

    def answer(self, value: Any, error: BaseException | None) -> None:
        self.answers.append(value if error is None else error)


class Follower:
    is_lagging = False

    def __init__(self, phases: Callable[[], list[Phase]]):
        self._phases = phases
        self.phases_at_announcement: list[list[Phase]] = []

    def send_shared(self, data: bytes) -> None:
        self.phases_at_announcement.append(self._phases())

    def fall_behind(self) -> None:
        raise AssertionError("it does not lag")


@pytest.fixture
async def server() -> ModelServer:
    return ModelServer()


def clients(server: ModelServer, count: int) -> list[Client]:
    return [Client(server, number) for number in range(count)]


async def voted(server: ModelServer, id_: int = 0) -> Client:
    client = Client(server, id_)
    client.vote()
    await server.workers.write_step()
    assert client.is_in(Phase.VOTED)
    return client


async def test_a_transaction_goes_from_vote_to_finish(server):
    client = Client(server, 0)
    client.vote()
    assert client.is_in(Phase.VOTING)
    assert not client.answers
    await server.workers.write_step()
    assert client.is_in(Phase.VOTED)
    assert client.answers == [Voted(number(1), [])]
    client.finish()
    assert client.is_in(Phase.FINISHING)
    assert len(client.answers) == 1
    await server.workers.write_step()
    assert client.is_in(Phase.ENDED)
    assert client.answers[1:] == [Finished(number(1), [number(100)])]
    assert server.database.steps == ["vote", "finish"]
    assert server.served.counters.commits == 1
    assert server.served.counters.stores == 1


async def test_votes_are_taken_in_the_order_in_which_they_came(server):
    first, *waiting = all_of_them = clients(server, 4)
    for client in all_of_them:
        client.vote()
    assert server.committer.holders == (first.commit,)
    assert server.committer.waiting == tuple(each.commit for each in waiting)
    for client in all_of_them:
        await server.workers.write_step()
        assert client.is_in(Phase.VOTED)
        client.finish()
        await server.workers.write_step()
    assert [client.answers[1].tid for client in all_of_them] == [
        number(n) for n in (1, 2, 3, 4)
    ]
    assert not server.committer.holders


async def test_nobody_votes_while_another_is_between_vote_and_finish(server):
    first, second = clients(server, 2)
    first.vote()
    second.vote()
    await server.workers.work()
    assert (first.phase, second.phase) == (Phase.VOTED, Phase.WAITING)
    first.finish()
    assert second.is_in(Phase.WAITING)
    await server.workers.write_step()
    assert second.is_in(Phase.VOTING)


async def test_nothing_is_announced_before_the_writer_has_finished(server):
    client = await voted(server)
    follower = Follower(lambda: [client.phase])
    server.served.follow(follower)
    client.finish()
    await asyncio.sleep(0)
    assert server.served.changes.last_tid == number(0)
    assert not follower.phases_at_announcement
    await server.workers.write_step()
    assert server.served.changes.last_tid == number(1)
    assert len(follower.phases_at_announcement) == 1


async def test_the_next_turn_and_the_answer_come_before_the_announcement(server):
    first, second = clients(server, 2)
    follower = Follower(lambda: [first.phase, second.phase])
    server.served.follow(follower)
    first.vote()
    second.vote()
    await server.workers.write_step()
    first.finish()
    await server.workers.write_step()
    assert follower.phases_at_announcement == [[Phase.ENDED, Phase.VOTING]]


async def test_a_commit_is_appended_answered_and_announced_in_one_step(server):
    """Whoever hears of it first, by whatever way, finds it to be the last one."""
    client = await voted(server)
    seen: list[tuple[str, bytes]] = []

    class Announced(Follower):
        def send_shared(self, data: bytes) -> None:
            see("announced")

    def see(what: str) -> None:
        seen.append((what, server.served.changes.last_tid))

    server.served.follow(Announced(list))
    server.committer.finish(client.commit, lambda _value, _error: see("answered"))
    server.committer.settle(transaction_id(0), lambda: see("settled"))
    assert not seen
    await server.workers.write_step()
    assert sorted(seen) == [
        ("announced", number(1)),
        ("answered", number(1)),
        ("settled", number(1)),
    ]


async def test_a_failed_vote_gives_the_turn_on_and_leaves_nothing(server):
    server.database.vote_error = ConflictError(oid=number(1))
    first, second = clients(server, 2)
    first.vote()
    second.vote()
    await server.workers.write_step()
    assert first.answers == [server.database.vote_error]
    assert first.is_in(Phase.ENDED)
    assert second.is_in(Phase.VOTING)
    assert server.served.counters.conflicts == 1
    assert server.served.counters.aborts == 1
    server.database.vote_error = None
    await server.workers.write_step()
    assert second.is_in(Phase.VOTED)


async def test_a_client_resolves_while_it_holds_the_turn(server):
    server.database.unresolved = Unresolved([CONFLICT])
    first, second = clients(server, 2)
    first.vote()
    second.vote()
    await server.workers.work()
    assert first.is_in(Phase.RESOLVING)
    assert first.answers == [server.database.unresolved]
    assert second.is_in(Phase.WAITING)
    first.resolve()
    assert first.is_in(Phase.VOTING)
    await server.workers.write_step()
    assert first.is_in(Phase.VOTED)
    assert server.served.counters.conflicts_resolved == 1
    first.finish()
    await server.workers.write_step()
    assert first.answers[-1].tid == number(1)


@pytest.mark.parametrize(
    ("what", "phase"),
    [
        ("finish", "waiting"),
        ("finish", "voting"),
        ("finish", "resolving"),
        ("finish", "finishing"),
        ("finish", "ended"),
        ("resolve", "voting"),
        ("resolve", "voted"),
        ("resolve", "ended"),
    ],
)
async def test_what_is_out_of_order_is_refused(server, what, phase):
    client = await client_in(Phase(phase), server)
    steps = list(server.database.steps)
    answers = len(client.answers)
    getattr(client, what)()
    assert len(client.answers) == answers + 1
    assert isinstance(client.answers[-1], StorageTransactionError)
    assert client.is_in(Phase(phase))
    assert server.database.steps == steps


async def client_in(phase: Phase, server: ModelServer) -> Client:
    """A client whose transaction is in ``phase``; nobody else is waiting."""
    if phase is Phase.WAITING:
        await voted(server, 9)
    client = Client(server, 0)
    if phase is Phase.RESOLVING:
        server.database.unresolved = Unresolved([CONFLICT])
    client.vote()
    if phase not in (Phase.WAITING, Phase.VOTING):
        await server.workers.write_step()
    if phase in (Phase.FINISHING, Phase.ENDED):
        client.finish()
    elif phase is Phase.ABORTING:
        client.lose()
    if phase is Phase.ENDED:
        await server.workers.write_step()
    assert client.is_in(phase)
    return client


@pytest.mark.parametrize("phase", list(Phase))
async def test_a_lost_channel_lets_the_next_one_go_on(server, phase):
    client = await client_in(phase, server)
    succeeding = Client(server, 1)
    succeeding.vote()
    client.lose()
    if phase is Phase.WAITING:
        # The one that it waited for goes away, too.
        (holder,) = server.committer.holders
        server.committer.abandon(holder, GONE, None)
    await server.workers.work()
    assert client.is_in(Phase.ENDED)
    assert succeeding.phase in (Phase.VOTED, Phase.RESOLVING)
    assert server.committer.holders == (succeeding.commit,)
    assert server.committer.waiting == ()


@pytest.mark.parametrize("phase", list(Phase))
async def test_losing_a_channel_twice_is_like_losing_it_once(server, phase):
    client = await client_in(phase, server)
    client.lose()
    client.lose()
    await server.workers.work()
    client.lose()
    await server.workers.work()
    assert client.is_in(Phase.ENDED)
    assert server.database.steps.count("abort") <= 1
    # Nobody holds the turn, or the one whom it waited for.
    assert client.commit not in server.committer.holders
    assert client.commit not in server.committer.waiting


async def test_what_is_lost_while_it_votes_is_aborted_after_the_vote(server):
    client = await client_in(Phase.VOTING, server)
    client.lose()
    assert client.is_in(Phase.VOTING)
    await server.workers.write_step()
    assert client.is_in(Phase.ABORTING)
    await server.workers.write_step()
    assert client.is_in(Phase.ENDED)
    assert server.database.steps == ["vote", "abort"]
    assert not server.database.is_in_transaction


async def test_what_is_lost_while_it_finishes_is_committed_and_announced(server):
    client = await client_in(Phase.FINISHING, server)
    client.lose()
    await server.workers.work()
    assert server.database.steps == ["vote", "finish"]
    assert server.served.changes.last_tid == number(1)


@pytest.mark.parametrize("phase", [Phase.WAITING, Phase.VOTING])
async def test_the_vote_of_an_abandoned_transaction_is_answered(server, phase):
    client = await client_in(phase, server)
    client.lose()
    if phase is Phase.VOTING:
        await server.workers.work()
    assert client.answers == [GONE]


@pytest.mark.parametrize(
    "phase", [Phase.WAITING, Phase.VOTING, Phase.RESOLVING, Phase.VOTED]
)
async def test_an_abort_is_answered_when_nothing_is_left_of_it(server, phase):
    client = await client_in(phase, server)
    ended: list[Phase] = []
    reason = StorageTransactionError("the transaction was aborted")
    server.committer.abandon(
        client.commit, reason, lambda _value, _error: ended.append(client.phase)
    )
    if phase is not Phase.WAITING:
        await server.workers.work()
        assert not server.database.is_in_transaction
    assert ended == [Phase.ENDED]


async def test_a_failing_abort_is_told_and_gives_the_turn_on(server, caplog):
    server.database.abort_error = OSError("no space")
    client = await voted(server)
    succeeding = Client(server, 1)
    succeeding.vote()
    client.abort()
    await server.workers.write_step()
    assert client.answers[-1] is server.database.abort_error
    assert "aborting a transaction failed" in caplog.text
    assert succeeding.is_in(Phase.VOTING)


# Time


async def test_a_voted_transaction_is_aborted_when_its_time_is_over(server, caplog):
    client = await voted(server)
    now = asyncio.get_running_loop().time()
    server.committer.tick(now + 29, 30)
    assert client.is_in(Phase.VOTED)
    server.committer.tick(now + 31, 30)
    await server.workers.work()
    assert client.is_in(Phase.ENDED)
    assert not server.database.is_in_transaction
    assert server.served.counters.timeouts == 1
    assert "client 0" in caplog.text
    client.finish()
    assert isinstance(client.answers[-1], TransactionTimeout)


async def test_the_next_one_votes_when_the_time_of_the_first_is_over(server):
    client = await voted(server)
    succeeding = Client(server, 1)
    succeeding.vote()
    now = asyncio.get_running_loop().time()
    server.committer.tick(now + 31, 30)
    await server.workers.work()
    assert client.is_in(Phase.ENDED)
    assert succeeding.is_in(Phase.VOTED)
    # Its time begins when it has voted, not when it got in line.
    server.committer.tick(now + 29, 30)
    assert succeeding.is_in(Phase.VOTED)


async def test_a_client_that_does_not_resolve_runs_out_of_time_too(server):
    client = await client_in(Phase.RESOLVING, server)
    server.committer.tick(asyncio.get_running_loop().time() + 31, 30)
    await server.workers.work()
    assert client.is_in(Phase.ENDED)
    assert not server.database.is_in_transaction


async def test_a_client_that_resolves_has_one_timeout_until_it_finishes(
    server, monkeypatch
):
    loop = asyncio.get_running_loop()
    client = await client_in(Phase.RESOLVING, server)
    resolved_at = loop.time() + 20
    monkeypatch.setattr(loop, "time", lambda: resolved_at)
    client.resolve()
    await server.workers.work()
    monkeypatch.undo()
    server.committer.tick(resolved_at + 9, 30)
    assert client.is_in(Phase.VOTED)
    server.committer.tick(resolved_at + 11, 30)
    await server.workers.work()
    assert client.is_in(Phase.ENDED)
    assert server.served.counters.timeouts == 1


@pytest.mark.parametrize("phase", [Phase.VOTING, Phase.FINISHING, Phase.ABORTING])
async def test_time_does_not_run_while_the_server_works(server, phase):
    client = await client_in(phase, server)
    server.committer.tick(asyncio.get_running_loop().time() + 1000, 30)
    assert client.is_in(phase)
    assert server.served.counters.timeouts == 0


# Settling: what became of it


@pytest.mark.parametrize("phase", list(Phase))
async def test_settling_waits_until_a_transaction_has_ended(server, phase):
    client = await client_in(phase, server)
    settled: list[Phase] = []
    server.committer.settle(transaction_id(0), lambda: settled.append(client.phase))
    if phase not in (Phase.WAITING, Phase.ENDED):
        assert not settled
    await server.workers.work()
    assert settled == [Phase.ENDED]


async def test_settling_lets_finish_what_is_being_finished(server):
    await client_in(Phase.FINISHING, server)
    last_tids: list[bytes] = []
    server.committer.settle(
        transaction_id(0), lambda: last_tids.append(server.served.changes.last_tid)
    )
    await server.workers.work()
    assert last_tids == [number(1)]


async def test_settling_aborts_what_nobody_will_finish(server):
    client = await voted(server)
    server.committer.settle(transaction_id(0), lambda: None)
    await server.workers.work()
    assert server.database.steps == ["vote", "abort"]
    client.finish()
    assert isinstance(client.answers[-1], StorageTransactionError)


async def test_settling_leaves_other_transactions_alone(server):
    client = await voted(server)
    settled: list[bool] = []
    server.committer.settle(transaction_id(1), lambda: settled.append(True))
    assert settled == [True]
    assert client.is_in(Phase.VOTED)


# Disasters


async def test_a_disaster_in_finish_is_told_and_nothing_is_announced(server, caplog):
    server.database.finish_error = OSError("the disk is gone")
    client = await voted(server)
    client.finish()
    await server.workers.write_step()
    assert isinstance(client.answers[-1], StorageSystemError)
    assert "the disk is gone" in str(client.answers[-1])
    assert "the disk is gone" in str(server.committer.broken)
    assert server.served.changes.last_tid == number(0)
    assert "nothing is written any more" in caplog.text


async def test_nothing_is_written_after_a_disaster_by_those_who_come(server):
    server.database.finish_error = OSError("the disk is gone")
    client = await voted(server)
    client.finish()
    await server.workers.write_step()
    late = Client(server, 1)
    late.vote()
    assert isinstance(late.answers[0], StorageSystemError)
    assert server.database.steps == ["vote", "finish"]


async def test_nothing_is_written_after_a_disaster_by_those_who_waited(server):
    server.database.finish_error = OSError("the disk is gone")
    client = await voted(server)
    waiting = [Client(server, 1), Client(server, 2)]
    for each in waiting:
        each.vote()
    client.finish()
    await server.workers.work()
    assert server.database.steps == ["vote", "finish"]
    for each in waiting:
        assert isinstance(each.answers[0], StorageSystemError)
        assert each.is_in(Phase.ENDED)
    assert not server.committer.holders


# Stopping


async def test_draining_waits_for_those_who_hold_the_turn(server):
    client = await voted(server)
    draining = asyncio.ensure_future(server.committer.drain(60))
    await asyncio.sleep(0)
    client.finish()
    await asyncio.sleep(0)
    assert not draining.done()
    await server.workers.write_step()
    await draining
    assert client.answers[-1] == Finished(number(1), [number(100)])


async def test_draining_refuses_those_in_line_and_those_who_come(server):
    holder = await voted(server)
    waiting, late = Client(server, 1), Client(server, 2)
    waiting.vote()
    draining = asyncio.ensure_future(server.committer.drain(60))
    await asyncio.sleep(0)
    late.vote()
    assert isinstance(waiting.answers[0], ShuttingDown)
    assert isinstance(late.answers[0], ShuttingDown)
    holder.finish()
    await server.workers.work()
    await draining


async def test_draining_with_nothing_to_do_is_done_at_once(server):
    await server.committer.drain(60)


async def test_draining_does_not_wait_for_ever(server, caplog):
    await voted(server)
    await server.committer.drain(0.001)
    assert "client 0" in caplog.text


async def test_after_draining_nothing_is_left_in_the_database(server):
    await voted(server)
    await server.committer.drain(0.001)
    await server.workers.work()
    assert not server.database.is_in_transaction
    assert not server.committer.holders


# A database that is another server's


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OutcomeUnknown("perhaps"), StorageSystemError),
        (Unavailable("nothing was committed"), Unavailable),
        (StorageTransactionError("it was aborted"), StorageTransactionError),
    ],
)
async def test_a_finish_that_fails_elsewhere_is_no_disaster_here(server, error, told):
    server.database.tells_own = True
    client, next_one = await voted(server), Client(server, 1)
    next_one.vote()
    server.database.finish_error = error
    client.finish()
    await server.workers.write_step()
    assert isinstance(client.answers[-1], told)
    assert str(client.answers[-1]) == str(error)
    assert client.is_in(Phase.ENDED)
    assert server.committer.broken is None
    await server.workers.write_step()
    assert next_one.is_in(Phase.VOTED)


async def test_a_disaster_is_one_everywhere(server):
    server.database.tells_own = True
    client = await voted(server)
    server.database.finish_error = BrokenDatabase("the disk")
    client.finish()
    await server.workers.write_step()
    assert server.committer.broken is not None


async def test_an_own_commit_is_appended_where_it_is_told(server):
    server.database.tells_own = True
    client = await voted(server)
    before = server.served.changes.last_tid
    client.finish()
    await server.workers.write_step()
    assert isinstance(client.answers[-1], Finished)
    assert server.served.changes.last_tid == before
    assert server.served.counters.commits == 1


async def test_only_so_many_are_remembered_that_never_came(server, monkeypatch):
    monkeypatch.setattr(committer, "GIVEN_UP_MAX", 2)
    for number_of_it in (1, 2, 3):
        server.committer.settle(transaction_id(number_of_it), lambda: None)
    assert list(server.committer._given_up) == [transaction_id(2), transaction_id(3)]
