"""The log and the current records over the wire, as of what was announced."""

from typing import Any

import pytest

from zeolith.protocol.messages import Reply

from ..support.ids import number
from ..support.memory import MemoryClient, MemorySession
from ..support.model import ModelServer

A, B = number(1), number(2)


@pytest.fixture
async def server() -> ModelServer:
    server = ModelServer()
    server.commit(A, b"a")
    server.commit(B, b"b")
    return server


@pytest.fixture
async def channel(server: ModelServer) -> MemoryClient:
    return MemorySession(server.service).channel()


async def asked(server: ModelServer, channel: MemoryClient, *request: Any) -> Any:
    number_of_request = channel.ask(*request)
    await server.workers.work()
    reply = channel.answer(number_of_request)
    assert isinstance(reply, Reply)
    return reply.value


async def tids_of(server: ModelServer, channel: MemoryClient, *bounds: Any) -> Any:
    tids = []
    cursor = None
    while True:
        pieces, _rest, cursor = await asked(
            server, channel, "transactions", *bounds, cursor
        )
        tids += [piece[0] for piece in pieces]
        if cursor is None:
            return tids


async def test_the_transactions_come_in_order_with_their_records(server, channel):
    last = server.database.last_tid
    pieces, rest, cursor = await asked(
        server, channel, "transactions", last, None, None
    )
    assert (rest, cursor) == (None, None)
    assert pieces == [[last, " ", b"", b"", b"", [[B, last, b"b", None]]]]
    tids = await tids_of(server, channel, None, None)
    assert tids == sorted(tids)
    assert tids[-1] == last
    assert await tids_of(server, channel, tids[0], tids[0]) == tids[:1]


async def test_what_is_not_announced_is_not_iterated(server, channel):
    announced = await tids_of(server, channel, None, None)
    server.database.put(A, number(2**40), b"on disk, but not announced")
    assert await tids_of(server, channel, None, None) == announced
    assert await tids_of(server, channel, None, b"\x7f" * 8) == announced
    as_of, records, following = await asked(server, channel, "records", A)
    assert as_of == announced[-1]
    assert records == [[A, announced[0], b"a"]]
    assert following == B


async def test_an_iteration_leaves_nothing_in_the_server(server, channel):
    """A client may vanish in the middle of one."""
    before = vars(channel.peer).copy()
    await asked(server, channel, "transactions", None, None, None)
    await asked(server, channel, "records", None)
    after = vars(channel.peer).copy()
    for attribute in ("connection", "_batch"):
        before.pop(attribute), after.pop(attribute)
    assert after == before
