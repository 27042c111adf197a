"""Packs on the wire: one at a time, looked at by all, given up by those who may."""

import asyncio
from typing import Any

import pytest
from ZODB.FileStorage.FileStorage import FileStorageError

from zeolith.storage.pack_progress import Packed, Packing

from ..support.ids import number
from ..support.memory import MemoryClient, MemorySession
from ..support.model import ModelServer


class Course:
    """What the storage has been asked for, in the place of a pack."""

    def __init__(self, server: ModelServer):
        self.calls: list[tuple[float, bool | None]] = []
        self.packing: Packing | None = None
        self.result: Any = Packed(True, 20, 10)
        server.database.pack = self.pack  # type: ignore[method-assign,assignment]

    def pack(self, time_s: float, gc: bool | None, packing: Packing) -> Packed:
        self.calls.append((time_s, gc))
        packing.refuse_if_cancelled()
        if isinstance(self.result, Exception):
            raise self.result
        result: Packed = self.result
        return result


@pytest.fixture
async def server() -> ModelServer:
    server = ModelServer()
    server.commit(number(1), b"data")
    return server


@pytest.fixture
async def course(server: ModelServer) -> Course:
    return Course(server)


@pytest.fixture
async def client(server: ModelServer) -> MemoryClient:
    return MemorySession(server.service, label="zope-3").channel()


def value(client: MemoryClient, method: str, *args: Any) -> Any:
    return client.value(client.ask(method, *args))


async def test_a_pack_is_answered_when_it_is_over(server, course, client):
    request = client.ask("pack", 5.0, False)
    assert client.answer(request) is None
    await server.workers.work()
    assert client.value(request) == [True, 20, 10]
    assert course.calls == [(5.0, False)]


async def test_everybody_may_look_at_it(server, course, client):
    reader = MemorySession(server.service, read_only=True).channel()
    assert value(reader, "pack_progress") is None
    client.ask("pack", 5.0, None)
    progress = value(reader, "pack_progress")
    assert progress["phase"] == "starting"
    assert progress["fraction"] == 0
    assert "zope-3" in progress["who"]
    await server.workers.work()
    assert value(reader, "pack_progress") is None


async def test_a_second_one_is_refused_and_told_whose_the_first_is(
    server, course, client
):
    client.ask("pack", 5.0, None)
    refusal = client.failure(client.ask("pack", 6.0, None))
    assert refusal.name == "FileStorageError"
    assert "is being packed already, for" in refusal.text
    assert "zope-3" in refusal.text
    await server.workers.work()
    assert course.calls == [(5.0, None)]


async def test_a_pack_that_is_given_up_fails(server, course, client):
    other = MemorySession(server.service, label="operator").channel()
    assert value(other, "pack_cancel") is False
    request = client.ask("pack", 5.0, None)
    assert value(other, "pack_cancel") is True
    await server.workers.work()
    failure = client.failure(request)
    assert failure.name == "FileStorageError"
    assert "cancelled by" in failure.text
    assert "operator" in failure.text
    assert value(other, "pack_cancel") is False


async def test_a_failure_is_told_and_the_next_pack_may_come(server, course, client):
    course.result = FileStorageError("packing failed: of all things")
    request = client.ask("pack", 5.0, None)
    await server.workers.work()
    assert client.failure(request).text == "packing failed: of all things"
    course.result = Packed(False, 10, 10)
    request = client.ask("pack", 5.0, None)
    await server.workers.work()
    assert client.value(request) == [False, 10, 10]


async def test_it_goes_on_when_its_client_is_gone(server, course, client):
    client.ask("pack", 5.0, None)
    client.transport.abort()
    await asyncio.sleep(0)
    assert server.served.packing is not None
    await server.workers.work()
    assert course.calls == [(5.0, None)]
    assert server.served.packing is None


async def test_a_server_that_stops_gives_it_up_and_begins_no_other(
    server, course, client
):
    request = client.ask("pack", 5.0, None)
    server.service.packs.give_up("the server is stopping")
    server.service.is_stopping = True
    assert client.failure(client.ask("pack", 5.0, None)).name == "ShuttingDown"
    await server.workers.work()
    assert client.failure(request).text == "the server is stopping"
