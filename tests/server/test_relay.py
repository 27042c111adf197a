"""What a storage tells becomes changes of ours, in one order."""

import asyncio
import threading
from typing import Any

import pytest

from zeolith.server import relay as relay_module
from zeolith.server.relay import Relay
from zeolith.storage.database import Standing
from zeolith.storage.feed import Told

from ..support.ids import number, transaction_id
from ..support.model import ModelServer
from .test_served import Listener

OID = number(7)


class Gated:
    """A database that says where it stands when the test lets it."""

    def __init__(self, server: ModelServer):
        self.gate = threading.Event()
        self.answers: list[Any] = []
        server.database.standing = self.standing  # type: ignore[method-assign]

    def standing(self) -> Standing:
        assert self.gate.wait(10)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Standing)
        return answer


@pytest.fixture
async def server() -> ModelServer:
    server = ModelServer()
    Relay(server.service, server.served)
    return server


@pytest.fixture
def follower(server: ModelServer) -> Listener:
    follower = Listener()
    server.served.follow(follower)
    return follower


def told(value: int, transaction: bytes | None = None) -> Told:
    return Told(number(value), [OID], transaction)


async def tell(server: ModelServer, *events: Told | None) -> None:
    """As from a thread of the storage."""
    assert server.database.listener is not None
    for event in events:
        server.database.listener(event)
    await asyncio.sleep(0)


async def until_it_stands(server: ModelServer, let: threading.Event) -> None:
    """Let the storage say where it stands, and wait until it is heard."""
    stands = asyncio.Event()
    start_afresh = server.served.start_afresh

    def started(standing: Standing) -> None:
        start_afresh(standing)
        stands.set()

    server.served.start_afresh = started  # type: ignore[method-assign]
    let.set()
    async with asyncio.timeout(10):
        await stands.wait()


async def test_a_change_is_appended_and_announced(server, follower):
    await tell(server, told(3), told(5, transaction_id(1)))
    assert follower.tids() == [number(3), number(5)]
    changes = server.served.changes.since(number(0))
    assert [change.transaction for change in changes] == [None, transaction_id(1)]
    assert server.served.horizon == number(6)


async def test_what_is_told_twice_is_announced_once(server, follower):
    await tell(server, told(3), told(3, transaction_id(1)), told(2))
    assert follower.tids() == [number(3)]


async def test_a_fresh_start_forgets_everything(server):
    gated = Gated(server)
    gated.answers = [Standing(number(9), b"another-database", 4)]
    await tell(server, told(3), None)
    assert server.served.is_starting_afresh
    await until_it_stands(server, gated.gate)
    served = server.served
    assert served.changes.last_tid == number(9)
    assert served.horizon == number(10)
    assert served.changes.since(number(3)) is None
    assert (served.database.database_id, served.database.epoch) == (
        b"another-database",
        4,
    )


async def test_what_is_told_meanwhile_waits(server, follower):
    gated = Gated(server)
    gated.answers = [Standing(number(4), b"d" * 16, 1)]
    await tell(server, None, told(3), told(4), told(5))
    assert follower.tids() == []
    await until_it_stands(server, gated.gate)
    # What was told of before is in where it stands.
    assert follower.tids() == [number(5)]


async def test_only_the_answer_to_the_last_question_counts(server):
    gated = Gated(server)
    relay: Any = server.database.listener.__self__
    gated.answers = [Standing(number(5), b"d" * 16, 1)]
    await tell(server, None)
    early: asyncio.Future[Standing] = asyncio.get_running_loop().create_future()
    early.set_result(Standing(number(3), b"d" * 16, 1))
    relay._answered(0, early)
    relay._ask(0)
    assert server.served.is_starting_afresh
    await until_it_stands(server, gated.gate)
    assert server.served.changes.last_tid == number(5)


async def test_a_storage_that_cannot_say_is_asked_again(server, monkeypatch, caplog):
    monkeypatch.setattr(relay_module, "RETRY_S", 0)
    gated = Gated(server)
    gated.answers = [OSError("no server"), Standing(number(3), b"d" * 16, 1)]
    await tell(server, None)
    await until_it_stands(server, gated.gate)
    assert server.served.changes.last_tid == number(3)
    assert "no server" in caplog.text


async def test_what_comes_after_the_end_is_nobodys(server):
    listener = server.database.listener
    assert listener is not None
    relay: Any = listener.__self__
    relay._loop = asyncio.new_event_loop()
    relay._loop.close()
    listener(told(3))
    assert server.served.changes.last_tid == number(0)
