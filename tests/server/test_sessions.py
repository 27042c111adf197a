import asyncio

import pytest
from ZODB.POSException import StorageTransactionError

from zeolith.server.committer import Commit
from zeolith.server.sessions import OPERATION_BYTES, ChannelTransactions, Session
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


def test_staged_operations_gather_until_the_vote():
    transactions = ChannelTransactions(10_000)
    transactions.stage(ONE, [store(1), store(2)])
    transactions.stage(ONE, [store(3)])
    assert transactions.take(ONE).operations == [store(1), store(2), store(3)]
    assert transactions.take(ONE).operations == []


def test_a_transaction_that_was_given_up_leaves_nothing_to_the_next():
    transactions = ChannelTransactions(1000)
    transactions.stage(ONE, [store(700)])
    transactions.stage(TWO, [store(700)])
    assert transactions.take(TWO).operations == [store(700)]


def test_what_is_staged_for_one_is_not_taken_by_another():
    transactions = ChannelTransactions(1000)
    transactions.stage(ONE, [store(1)])
    taken = transactions.take(TWO)
    assert taken.id == TWO
    assert not taken.operations


def test_what_is_staged_is_bounded():
    transactions = ChannelTransactions(2 * (100 + OPERATION_BYTES))
    transactions.stage(ONE, [store(100), store(100)])
    with pytest.raises(StorageTransactionError, match="transaction_bytes_max"):
        transactions.stage(ONE, [store(0)])
    assert transactions.take(ONE).operations == []


def test_operations_without_data_are_bounded_too():
    transactions = ChannelTransactions(1_000_000)
    check = ["check", number(1), number(0)]
    with pytest.raises(StorageTransactionError, match="transaction_bytes_max"):
        transactions.stage(ONE, [check] * 10_000)


def test_only_the_transaction_of_the_channel_is_found():
    transactions = ChannelTransactions(1000)
    with pytest.raises(StorageTransactionError):
        transactions.commit_of(ONE)
    commit = transactions.commit = Commit(Transaction(ONE), "somebody")
    assert transactions.commit_of(ONE) is commit
    with pytest.raises(StorageTransactionError):
        transactions.commit_of(TWO)
