"""Transactions that vote side by side and go to the disk together."""

import asyncio
from typing import Any

import pytest
from ZODB.POSException import (
    ConflictError,
    ReadConflictError,
    StorageSystemError,
    StorageTransactionError,
)

from zeolith.protocol.codec import decode
from zeolith.protocol.errors import ShuttingDown, TransactionTimeout
from zeolith.protocol.frames import PREFIX_BYTES
from zeolith.server import committer
from zeolith.server.committer import Commit, Phase
from zeolith.storage.database import (
    Conflict,
    Finished,
    NotCommitted,
    Transaction,
    Unresolved,
    Voted,
)

from ..support.ids import number, transaction_id
from ..support.model import ModelServer

A, B, C = number(101), number(102), number(103)
VOTED = Voted(None, [])
CONFLICT = Conflict(A, number(2), number(1), b"committed", b"old", b"new")


class Client:
    """One transaction of stores, and what its client was answered."""

    def __init__(self, server: ModelServer, id_: int, *operations: list[Any]):
        self._committer = server.committer
        transaction = Transaction(transaction_id(id_), operations=list(operations))
        self.commit = Commit(transaction, f"client {id_}")
        self.answers: list[Any] = []

    @property
    def phase(self) -> Phase:
        return self.commit.phase

    def vote(self) -> None:
        self._committer.vote(self.commit, self.answer)

    def resolve(self) -> None:
        self._committer.resolve(self.commit, {A: b"resolved"}, self.answer)

    def finish(self) -> None:
        self._committer.finish(self.commit, self.answer)

    def abort(self) -> None:
        reason = StorageTransactionError("the transaction was aborted")
        self._committer.abandon(self.commit, reason, self.answer)

    def lose(self) -> None:
        gone = StorageTransactionError("the connection was lost")
        self._committer.abandon(self.commit, gone, None)

    def answer(self, value: Any, error: BaseException | None) -> None:
        self.answers.append(value if error is None else error)


@pytest.fixture
async def server() -> ModelServer:
    server = ModelServer()
    server.database.side_by_side = True
    return server


def store(*oids: bytes) -> list[list[Any]]:
    return [["store", oid, number(0), b"data"] for oid in oids]


def clients(server: ModelServer, *operations: list[list[Any]]) -> list[Client]:
    made = [Client(server, id_, *each) for id_, each in enumerate(operations, 1)]
    for client in made:
        client.vote()
    return made


def finish_meanwhile(server: ModelServer, first: Client, *others: Client) -> None:
    """``first`` finishes, and the others while it is written."""
    first.finish()
    server.database.meanwhile = [each.finish for each in others]


def phases(those: list[Client]) -> list[Phase]:
    return [client.phase for client in those]


def tids(those: list[Client]) -> list[bytes]:
    assert all(isinstance(client.answers[-1], Finished) for client in those)
    return [client.answers[-1].tid for client in those]


class Told:
    """A follower that reads what it is sent."""

    is_lagging = False

    def __init__(self) -> None:
        self.notices: list[list[Any]] = []

    def send_shared(self, data: bytes) -> None:
        self.notices.append(decode(data[PREFIX_BYTES:]).args[0])  # type: ignore[union-attr]


# Votes


async def test_a_vote_needs_no_thread_if_all_is_in_memory(server):
    (client,) = clients(server, store(A))
    assert client.answers == [VOTED]
    assert server.database.steps == ["prepare"]


async def test_those_who_share_nothing_vote_side_by_side(server):
    several = clients(server, store(A), store(B), store(C))
    assert phases(several) == [Phase.VOTED] * 3
    assert server.committer.holders == tuple(each.commit for each in several)


async def test_those_who_share_an_object_vote_one_after_the_other(server):
    first, second, third = clients(server, store(A), store(A, B), store(C))
    assert phases([first, second, third]) == [
        Phase.VOTED,
        Phase.WAITING,
        Phase.VOTED,
    ]
    assert server.committer.waiting == (second.commit,)
    first.finish()
    await server.workers.write_step()
    # Its object was changed.
    assert isinstance(second.answers[-1], ConflictError)
    assert not server.committer.waiting


async def test_a_slow_vote_is_in_nobodys_way(server):
    server.database.would_block = True
    (slow,) = clients(server, store(A))
    assert slow.phase is Phase.VOTING
    server.database.would_block = False
    (_same, quick) = clients(server, store(A), store(B))
    quick.finish()
    await server.workers.write_step()
    assert tids([quick]) == [number(1)]
    await server.workers.vote_step()
    assert slow.answers == [VOTED]


async def test_a_voter_that_never_finishes_delays_only_who_wants_its_objects(server):
    never, same, other = clients(server, store(A), store(A), store(B))
    other.finish()
    await server.workers.write_step()
    assert tids([other]) == [number(1)]
    assert phases([same]) == [Phase.WAITING]
    now = asyncio.get_running_loop().time()
    never.commit.patience.begins(now - 29)
    server.committer.tick(now, 30)
    assert phases([same]) == [Phase.WAITING]
    server.committer.tick(now + 1, 30)
    assert phases([same]) == [Phase.VOTED]
    never.finish()
    assert isinstance(never.answers[-1], TransactionTimeout)
    assert server.served.counters.timeouts == 1


async def test_each_voter_has_a_timeout_of_its_own(server):
    first, second = clients(server, store(A), store(B))
    now = asyncio.get_running_loop().time()
    second.commit.patience.pauses(now)
    second.commit.patience.begins(now + 20)
    server.committer.tick(now + 31, 30)
    assert phases([first, second]) == [Phase.ENDED, Phase.VOTED]


async def test_a_vote_that_fails_at_once_lets_the_next_one_vote(server):
    """However many fail one after the other."""
    server.database.put(A, number(5), b"newer")
    holder = Client(server, 0, ["store", A, number(5), b"data"])
    holder.vote()
    many = clients(server, *[store(A)] * 2000)
    last = Client(server, 9999, ["store", A, number(5), b"data"])
    last.vote()
    assert phases([last]) == [Phase.WAITING]
    holder.abort()
    assert all(isinstance(each.answers[0], ConflictError) for each in many)
    assert server.served.counters.conflicts == len(many)
    assert phases([last]) == [Phase.VOTED]


async def test_what_claims_much_is_looked_at_in_a_thread(server, monkeypatch):
    monkeypatch.setattr(committer, "CLAIMED_NOWAIT_MAX", 1)
    large, same, other = clients(server, store(A, B), store(A), store(C))
    # The thread has not looked yet, so nobody knows what it claims.
    assert phases([large, same, other]) == [Phase.VOTING, Phase.VOTED, Phase.VOTED]
    await server.workers.vote_step()
    assert phases([large]) == [Phase.WAITING]
    same.abort()
    assert phases([large]) == [Phase.VOTED]


async def test_what_is_lost_while_a_thread_looks_at_it_ends_afterwards(
    server, monkeypatch
):
    monkeypatch.setattr(committer, "CLAIMED_NOWAIT_MAX", 1)
    (large,) = clients(server, store(A, B))
    large.lose()
    assert phases([large]) == [Phase.VOTING]
    await server.workers.vote_step()
    assert phases([large]) == [Phase.ENDED]
    assert not server.database.prepared


async def test_operations_that_cannot_be_read_fail_the_vote(server, monkeypatch):
    monkeypatch.setattr(committer, "CLAIMED_NOWAIT_MAX", 1)

    def fail(_transaction: Transaction) -> Any:
        raise OSError(5, "Input/output error")

    server.database.claim = fail
    (large,) = clients(server, store(A, B))
    await server.workers.vote_step()
    assert isinstance(large.answers[0], OSError)
    assert large.phase is Phase.ENDED


async def test_a_client_resolves_while_it_keeps_its_objects(server):
    server.database.unresolved = Unresolved([CONFLICT])
    (first,) = clients(server, store(A))
    await server.workers.vote_step()
    assert first.answers == [server.database.unresolved]
    server.database.unresolved = None
    _same, other = clients(server, store(A), store(B))
    assert phases([_same, other]) == [Phase.WAITING, Phase.VOTED]
    first.resolve()
    await server.workers.vote_step()
    assert first.answers[-1] == Voted(None, [A])
    assert server.served.counters.conflicts_resolved == 1


async def test_what_is_lost_while_it_votes_leaves_nothing(server):
    server.database.would_block = True
    first, second = clients(server, store(A), store(A))
    first.lose()
    assert phases([first, second]) == [Phase.VOTING, Phase.WAITING]
    await server.workers.vote_step()
    assert phases([first, second]) == [Phase.ENDED, Phase.VOTING]
    assert server.database.prepared[0].has_ended


@pytest.mark.parametrize("end", ["abort", "lose"])
async def test_whoever_has_voted_and_goes_leaves_nothing(server, end):
    first, second = clients(server, store(A), store(A))
    getattr(first, end)()
    assert phases([first, second]) == [Phase.ENDED, Phase.VOTED]
    assert server.database.prepared[0].has_ended
    assert not server.workers.writes_waiting
    first.finish()
    assert isinstance(first.answers[-1], StorageTransactionError)


async def test_what_is_read_must_not_change_until_the_end(server):
    reader, writer = clients(server, [["check", A, number(0)], *store(B)], store(A))
    assert phases([reader, writer]) == [Phase.VOTED, Phase.WAITING]
    reader.finish()
    await server.workers.write_step()
    assert writer.phase is Phase.VOTED


async def test_a_read_that_is_out_of_date_is_a_conflict(server):
    server.database.vote_error = ReadConflictError(oid=A)
    (reader,) = clients(server, [["check", A, number(0)]])
    assert isinstance(reader.answers[0], ReadConflictError)
    assert server.served.counters.conflicts == 1


# Those who are alone


async def test_one_who_is_alone_waits_for_all_before_it_and_all_wait_for_it(server):
    undo = [["undo", number(0)]]
    first, alone, late = clients(server, store(A), undo, store(B))
    assert phases([first, alone, late]) == [
        Phase.VOTED,
        Phase.WAITING,
        Phase.WAITING,
    ]
    first.finish()
    assert alone.phase is Phase.WAITING
    await server.workers.write_step()
    await server.workers.write_step()
    assert phases([alone, late]) == [Phase.VOTED, Phase.WAITING]
    alone.finish()
    await server.workers.write_step()
    assert late.phase is Phase.VOTED
    assert server.database.steps == ["prepare", "append 1", "vote", "finish", "prepare"]


# Groups


async def test_those_who_finish_while_the_disk_is_busy_are_the_next_group(server):
    told = Told()
    server.served.follow(told)
    several = clients(server, *(store(oid) for oid in (A, B, C, number(104))))
    finish_meanwhile(server, *several)
    assert server.workers.writes_waiting == 1
    await server.workers.write_step()
    assert phases(several) == [Phase.ENDED, *[Phase.FINISHING] * 3]
    await server.workers.write_step()
    assert server.database.steps[4:] == ["append 1", "append 3"]
    assert tids(several) == [number(n) for n in (1, 2, 3, 4)]
    # They are told together, too.
    assert [[change[1] for change in each] for each in told.notices] == [
        [number(1), number(2), number(3), number(4)]
    ]
    assert server.served.counters.commits == 4
    assert all(each.has_ended for each in server.database.prepared)


async def test_who_finishes_while_the_writer_is_not_awake_goes_with_the_group(server):
    """It takes whoever is there when it begins, not when it was called."""
    several = clients(server, store(A), store(B), store(C))
    for client in several:
        client.finish()
    assert server.workers.writes_waiting == 1
    await server.workers.write_step()
    assert not server.workers.writes_waiting
    assert server.database.steps[3:] == ["append 3"]
    assert tids(several) == [number(1), number(2), number(3)]


async def test_a_group_is_seen_as_a_whole_by_whoever_hears_of_it_first(server):
    """Locks, changes, answers: nobody sees a part."""
    several = clients(server, store(A), store(B), store(C))
    seen: list[Any] = []

    def look(*_args: Any) -> None:
        ended = sum(each.phase is Phase.ENDED for each in several)
        seen.append((ended, server.served.changes.last_tid))

    class Follower(Told):
        def send_shared(self, _data: bytes) -> None:
            look()

    server.served.follow(Follower())
    for client in several:
        server.committer.finish(client.commit, look)
    await server.workers.write_step()
    assert seen == [(3, number(3))] * 4


async def test_the_next_group_is_on_its_way_before_the_last_one_is_told(server):
    first, second = clients(server, store(A), store(B))
    waiting: list[int] = []
    server.committer.finish(
        first.commit,
        lambda _value, _error: waiting.append(server.workers.writes_waiting),
    )
    server.database.meanwhile = [second.finish]
    await server.workers.write_step()
    assert waiting == [1]


async def test_who_is_lost_while_it_waits_for_the_disk_is_committed(server):
    first, second = clients(server, store(A), store(B))
    first.finish()
    second.finish()
    second.lose()
    await server.workers.work()
    assert tids([first, second]) == [number(1), number(2)]


async def test_settling_waits_for_the_disk(server):
    first, second = clients(server, store(A), store(B))
    finish_meanwhile(server, first, second)
    settled: list[bool] = []
    await server.workers.write_step()
    server.committer.settle(transaction_id(2), lambda: settled.append(True))
    assert not settled
    await server.workers.write_step()
    assert settled


async def test_what_the_disk_does_not_take_is_told_and_the_others_go_on(server, caplog):
    refused = NotCommitted("the disk is full; nothing was committed")
    server.database.append_errors = {1: refused}
    zeroth, *group = clients(server, *(store(number(n)) for n in range(4)))
    finish_meanwhile(server, zeroth, *group)
    await server.workers.work()
    assert group[1].answers[-1] is refused
    assert tids([zeroth, group[0], group[2]]) == [number(1), number(2), number(3)]
    assert "the disk is full" in caplog.text
    assert server.committer.broken is None
    (again,) = clients(server, store(number(2)))
    assert again.phase is Phase.VOTED


async def test_a_disaster_is_told_to_each_as_it_is_for_it(server, caplog):
    """In the group nobody knows; behind it, and before the vote, everybody does."""
    server.database.finish_error = OSError(5, "Input/output error")
    several = clients(server, store(A), store(B), store(C), store(C))
    group, behind, holder, waiting = several
    finish_meanwhile(server, group, behind)
    await server.workers.write_step()
    assert isinstance(group.answers[-1], StorageSystemError)
    assert isinstance(behind.answers[-1], NotCommitted)
    assert isinstance(waiting.answers[-1], StorageSystemError)
    holder.finish()
    assert isinstance(holder.answers[-1], StorageSystemError)
    assert phases(several) == [Phase.ENDED] * 4
    assert server.database.steps.count("prepare") == 3
    assert not server.workers.writes_waiting
    assert "nothing is written any more" in caplog.text
    (late,) = clients(server, store(A))
    assert isinstance(late.answers[-1], StorageSystemError)
    for refused in (behind, waiting, holder, late):
        assert "nothing of this transaction was committed" in str(refused.answers[-1])
    assert "nothing of this transaction" not in str(group.answers[-1])
    assert server.served.changes.last_tid == number(0)


async def test_tids_that_do_not_grow_are_a_disaster(server, caplog):
    (client,) = clients(server, store(A))
    server.served.append(number(7), [B], None)
    client.finish()
    await server.workers.write_step()
    assert isinstance(client.answers[-1], StorageSystemError)
    assert "must grow" in caplog.text


# The end of the server


async def test_draining_lets_all_finish_who_have_voted(server):
    first, second, waiting = clients(server, store(A), store(B), store(B))
    draining = asyncio.ensure_future(server.committer.drain(30))
    await asyncio.sleep(0)
    assert isinstance(waiting.answers[-1], ShuttingDown)
    first.finish()
    second.finish()
    await server.workers.work()
    await draining
    assert tids([first, second]) == [number(1), number(2)]


async def test_draining_aborts_all_who_do_not_finish(server, caplog):
    first, second = clients(server, store(A), store(B))
    await server.committer.drain(0.001)
    assert phases([first, second]) == [Phase.ENDED] * 2
    assert caplog.text.count("did not finish in") == 2
