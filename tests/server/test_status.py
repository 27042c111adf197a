import asyncio
import json
import os
from typing import Any

import pytest

from zeolith.server.access import EVERYTHING, anonymous
from zeolith.server.status import status_of

from ..support.ids import number, transaction_id
from ..support.memory import MemoryClient, MemorySession
from ..support.model import ModelServer

METADATA: list[Any] = [b"", b"", b"", None, " "]


@pytest.fixture
async def server() -> ModelServer:
    server = ModelServer()
    server.commit(number(1), b"data")
    return server


async def status(server: ModelServer) -> dict[str, Any]:
    collecting = asyncio.ensure_future(status_of(server.service, anonymous(EVERYTHING)))
    await asyncio.sleep(0)
    await server.workers.read_step()
    return await collecting


async def test_the_status_of_an_idle_server(server):
    told = await status(server)
    assert told["uptime_s"] >= 0
    assert told["pid"] == os.getpid()
    assert told["connections"] == 0
    assert told["transaction_timeout_s"] == 30.0
    assert told["storages"] == {
        "1": {
            "size_bytes": 4,
            "objects": 1,
            "last_tid": number(1).hex(),
            "database_id": b"model-database-1".hex(),
            "epoch": 1,
            "read_only": False,
            "broken": None,
            "counters": {
                "loads": 0,
                "commits": 0,
                "aborts": 0,
                "stores": 0,
                "conflicts": 0,
                "conflicts_resolved": 0,
                "timeouts": 0,
                "replays": 0,
                "verified": 0,
            },
            "pack": None,
            "transactions": [],
            "waiting": [],
            "clients": [],
        }
    }


async def test_clients_are_told_by_their_own_address_and_label(server):
    session = MemorySession(server.service, label="zope-3")
    session.channel()
    session.channel()
    MemorySession(server.service, read_only=True)
    MemoryClient(server.service)
    told = await status(server)
    assert told["connections"] == 5
    of_both = {
        "address": "192.0.2.7:4567",
        "identity": "anonymous",
        "roles": ["admin", "pack", "read", "undo", "write"],
    }
    assert told["storages"]["1"]["clients"] == [
        {**of_both, "label": "zope-3", "read_only": False, "channels": 2},
        {**of_both, "label": None, "read_only": True, "channels": 0},
    ]


async def test_the_status_says_who_waits_for_whom(server):
    for n, label in enumerate(("holder", "first", "second")):
        channel = MemorySession(server.service, label=label).channel()
        stores = [["store", number(50 + n), number(0), b""]] * (n + 1)
        channel.ask("vote", transaction_id(n), METADATA, stores)
    await server.workers.work()
    told = (await status(server))["storages"]["1"]
    (holder,) = told["transactions"]
    assert holder == {
        "client": "192.0.2.7:4567 (holder)",
        "phase": "voted",
        "operations": 1,
    }
    assert [each["client"] for each in told["waiting"]] == [
        "192.0.2.7:4567 (first)",
        "192.0.2.7:4567 (second)",
    ]
    assert [each["operations"] for each in told["waiting"]] == [2, 3]


async def test_what_happened_is_counted(server):
    channel = MemorySession(server.service).channel()
    channel.ask("load", number(1), number(2))
    channel.ask("load_many", [number(1), number(2)], number(2))
    store = ["store", number(5), number(0), b"data"]
    channel.ask("vote", transaction_id(1), METADATA, [store])
    await server.workers.work()
    channel.ask("finish", transaction_id(1), number(1))
    await server.workers.work()
    counters = (await status(server))["storages"]["1"]["counters"]
    assert (counters["loads"], counters["commits"], counters["stores"]) == (3, 1, 1)


async def test_a_disaster_is_in_the_status(server):
    server.database.finish_error = OSError("the disk is gone")
    channel = MemorySession(server.service).channel()
    channel.ask("vote", transaction_id(1), METADATA, [])
    await server.workers.work()
    channel.ask("finish", transaction_id(1), number(1))
    await server.workers.work()
    assert "the disk is gone" in (await status(server))["storages"]["1"]["broken"]


async def test_those_who_have_left_are_not_in_the_status(server):
    session = MemorySession(server.service)
    session.channel()
    await session.stream.lose()
    await asyncio.sleep(0)
    told = await status(server)
    assert told["connections"] == 0
    assert told["storages"]["1"]["clients"] == []


async def test_the_status_can_be_told_as_json(server):
    MemorySession(server.service, label="z\N{LATIN SMALL LETTER O WITH DIAERESIS}pe")
    told = await status(server)
    assert json.loads(json.dumps(told)) == told
