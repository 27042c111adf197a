import asyncio
from typing import Any

import pytest
from ZODB.POSException import StorageTransactionError

from zeolith.protocol.limits import Limits
from zeolith.server.committer import Commit
from zeolith.server.sessions import ChannelTransactions, Session
from zeolith.server.staging import OPERATION_BYTES, Staged, Stock
from zeolith.storage.database import Transaction

from ..support.ids import number, transaction_id
from ..support.memory import MemorySession
from ..support.model import ModelServer

ONE, TWO = transaction_id(1), transaction_id(2)


def store(size: int) -> list[object]:
    return ["store", number(1), number(0), bytes(size)]


def session_of(session: MemorySession) -> Session:
    found = session.stream.peer.session
    assert found is not None
    return found


@pytest.fixture
async def server() -> ModelServer:
    return ModelServer()


async def test_a_session_is_known_by_the_clients_address_and_label(server):
    plain = MemorySession(server.service)
    labelled = MemorySession(server.service, label="zope-3")
    names = [session.name for session in server.service.sessions.values()]
    assert names == ["192.0.2.7:4567", "192.0.2.7:4567 (zope-3)"]
    assert session_of(plain).name == names[0]
    assert session_of(labelled).name == names[1]


async def test_the_end_unfollows_and_hangs_up(server):
    session = MemorySession(server.service)
    channels = [session.channel() for _ in range(3)]
    session_of(session).end("the session has ended")
    assert not server.served.followers
    for client in (session.stream, *channels):
        assert client.goodbye().reason == "the session has ended"
    await asyncio.sleep(0)
    assert not server.service.peers
    assert not server.service.sessions


async def test_the_end_may_come_twice(server):
    session = MemorySession(server.service)
    channel = session.channel()
    session_of(session).end("once")
    session_of(session).end("twice")
    assert channel.goodbye().reason == "once"
    await asyncio.sleep(0)
    session_of(session).end("and again")
    assert not server.service.peers


def operations_of(staged: Staged | None) -> list[Any]:
    """All of it that fits into memory."""
    if staged is None:
        return []
    sealed: list[Any] = []
    staged.seal(lambda operations, _error: sealed.extend(operations))
    return sealed


def channel_transactions(**limits: int) -> ChannelTransactions:
    return ChannelTransactions(Limits(**limits), Stock(1_000_000_000))


def staging(server: ModelServer, bytes_max: int) -> tuple[ChannelTransactions, Any]:
    """The transactions of a channel, and its way to stage."""
    transactions = channel_transactions(transaction_bytes_max=bytes_max)
    peer = MemorySession(server.service).channel().peer
    workers = server.served.workers
    return transactions, lambda id_, operations: transactions.stage(
        id_, operations, peer, workers
    )


async def test_staged_operations_gather_until_the_vote(server):
    transactions, stage = staging(server, 10_000)
    stage(ONE, [store(1), store(2)])
    stage(ONE, [store(3)])
    assert operations_of(transactions.take(ONE)) == [store(1), store(2), store(3)]
    assert transactions.take(ONE) is None


async def test_a_transaction_that_was_given_up_leaves_nothing_to_the_next(server):
    transactions, stage = staging(server, 1000)
    stage(ONE, [store(700)])
    stage(TWO, [store(700)])
    assert operations_of(transactions.take(TWO)) == [store(700)]


async def test_what_is_staged_for_one_is_not_taken_by_another(server):
    transactions, stage = staging(server, 1000)
    stage(ONE, [store(1)])
    assert transactions.take(TWO) is None
    assert transactions.take(ONE) is None


async def test_what_is_staged_is_bounded(server):
    transactions, stage = staging(server, 2 * (100 + OPERATION_BYTES))
    stage(ONE, [store(100), store(100)])
    with pytest.raises(StorageTransactionError, match="transaction_bytes_max"):
        stage(ONE, [store(0)])
    assert transactions.take(ONE) is None


async def test_operations_without_data_are_bounded_too(server):
    _transactions, stage = staging(server, 1_000_000)
    check = ["check", number(1), number(0)]
    with pytest.raises(StorageTransactionError, match="transaction_bytes_max"):
        stage(ONE, [check] * 10_000)


def test_only_the_transaction_of_the_channel_is_found():
    transactions = channel_transactions()
    with pytest.raises(StorageTransactionError):
        transactions.commit_of(ONE)
    commit = transactions.commit = Commit(Transaction(ONE), "somebody")
    assert transactions.commit_of(ONE) is commit
    with pytest.raises(StorageTransactionError):
        transactions.commit_of(TWO)
