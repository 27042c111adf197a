"""What the server said one after the other may reach the client in one piece."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.utils import p64, z64

from zeolith.client.storage import ClientStorage

from ..support.proxy import Direction, proxied
from ..support.serving import ServerProcess
from ..support.waiting import wait_until


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path) as started:
        yield started


@pytest.fixture
def witness(server: ServerProcess) -> Iterator[ClientStorage]:
    opened = ClientStorage(server.address)
    yield opened
    opened.close()


def write(storage: ClientStorage, oid: bytes = p64(1), serial: bytes = z64) -> bytes:
    metadata = TransactionMetaData()
    storage.tpc_begin(metadata)
    storage.store(oid, serial, b"state", "", metadata)
    storage.tpc_vote(metadata)
    tid: bytes = storage.tpc_finish(metadata)
    return tid


def test_changes_that_come_together_with_the_welcome_are_applied(server, witness):
    write(witness)
    with proxied(server.address) as proxy, ThreadPoolExecutor() as pool:
        proxy.stall(Direction.TO_CLIENT)
        opening = pool.submit(ClientStorage, proxy.address)
        wait_until(lambda: proxy.held_back(Direction.TO_CLIENT), "the welcome")
        tids = [write(witness, p64(number)) for number in (2, 3)]
        # The witness has them over the same kind of stream, so they are under way.
        wait_until(lambda: witness.lastTransaction() == tids[-1], "the changes")
        proxy.restore()
        storage = opening.result()
        wait_until(lambda: storage.lastTransaction() == tids[-1], "the changes")
        storage.close()


def test_a_goodbye_that_comes_together_with_an_answer_harms_no_later_call(server):
    with proxied(server.address) as proxy, ThreadPoolExecutor() as pool:
        storage = ClientStorage(proxy.address)
        tid = write(storage)
        proxy.stall(Direction.TO_CLIENT)
        loading = pool.submit(storage.load, p64(1))
        # The answer to the load, then the last words on the same socket.
        wait_until(lambda: proxy.held_back(Direction.TO_CLIENT), "the answer")
        server.restart()
        proxy.restore()
        assert loading.result() == (b"state", tid)
        assert storage.load(p64(1)) == (b"state", tid)
        assert write(storage, serial=tid) > tid
        storage.close()
