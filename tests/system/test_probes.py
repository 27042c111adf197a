"""`zeolith ping` and `zeolith status`: what they say, and their exit status."""

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.utils import z64

from zeolith.client.storage import ClientStorage

from ..support.commanding import complaint, zeolith
from ..support.serving import ServerProcess
from ..support.waiting import wait_until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("served")
    storages = "<filestorage main>\npath Data.fs\n</filestorage>\n<mappingstorage/>\n"
    options = f"address {folder}/zeolith.sock"
    with ServerProcess(folder, storages=storages, options=options) as started:
        yield started


@pytest.fixture
def address(server: ServerProcess) -> str:
    return server.listening[0]


def status_of(address: str) -> Any:
    done = zeolith("status", address, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.mark.parametrize("command", ["ping", "status"])
def test_a_server_that_answers_is_exit_status_0(server: ServerProcess, command: str):
    for address in server.listening:
        done = zeolith(command, address)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout


@pytest.mark.parametrize("command", ["ping", "status"])
def test_nobody_there_is_exit_status_1_and_one_line(tmp_path: Path, command: str):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nowhere = "{}:{}".format(*closed.getsockname())
    for address in (nowhere, str(tmp_path / "no.sock")):
        done = zeolith(command, address)
        assert done.returncode == 1
        assert address in complaint(done)


@pytest.mark.parametrize("command", ["ping", "status"])
def test_a_host_that_nobody_knows_is_exit_status_1_and_one_line(command: str):
    done = zeolith(command, "no.such.host.invalid:8100")
    assert done.returncode == 1
    assert "no.such.host.invalid" in complaint(done)


def test_a_server_that_is_silent_is_exit_status_1_and_one_line():
    # Connections wait in the backlog, and nobody ever accepts them.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = "{}:{}".format(*silent.getsockname())
        done = zeolith("ping", address, "--timeout", "0.2")
    assert done.returncode == 1
    assert address in complaint(done)


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"\x00\x00\x00\x05Z\xff\xff\xff\xff"],
    ids=["another protocol", "nothing", "garbage"],
)
def test_a_stranger_who_answers_is_exit_status_1_and_one_line(answer: bytes):
    with socket.create_server(("127.0.0.1", 0)) as stranger:

        def talk() -> None:
            client, _address = stranger.accept()
            with client:
                client.recv(1)
                client.sendall(answer)
                client.shutdown(socket.SHUT_WR)
                while client.recv(4096):
                    pass

        talking = threading.Thread(target=talk)
        talking.start()
        address = "{}:{}".format(*stranger.getsockname())
        done = zeolith("ping", address)
        talking.join()
    assert done.returncode == 1
    assert address in complaint(done)


def test_status_knows_storages_and_who_uses_them(address: str):
    storage = ClientStorage(address, storage="main", client_label="the label")
    metadata = TransactionMetaData()
    storage.tpc_begin(metadata)
    storage.store(z64, z64, b"state", "", metadata)
    storage.tpc_vote(metadata)
    tid = storage.tpc_finish(metadata)
    status = status_of(address)
    text = zeolith("status", address).stdout
    storage.close()
    assert set(status["storages"]) == {"main", "1"}
    main, other = (status["storages"][name] for name in ("main", "1"))
    assert main["objects"] == 1
    assert main["size_bytes"] > 0
    assert main["last_tid"] == tid.hex()
    assert main["counters"]["commits"] == 1
    assert main["transactions"] == []
    assert not other["clients"]
    (client,) = main["clients"]
    assert client["label"] == "the label"
    # The client's address, which is not the server's.
    assert client["address"].startswith("127.0.0.1:")
    assert client["address"] != address
    for word in ("main", "the label", client["address"], tid.hex()):
        assert word in text


def test_status_knows_who_waits_for_whom(address: str):
    holder, waiter = (
        ClientStorage(address, storage="main", client_label=label)
        for label in ("holder", "waiter")
    )
    held, waiting = TransactionMetaData(), TransactionMetaData()
    oid = holder.new_oid()
    for storage, metadata in ((holder, held), (waiter, waiting)):
        storage.tpc_begin(metadata)
        storage.store(oid, z64, b"state", "", metadata)
    holder.tpc_vote(held)
    with ThreadPoolExecutor() as pool:
        voting = pool.submit(waiter.tpc_vote, waiting)
        wait_until(lambda: main_of(address)["waiting"], "somebody who waits")
        main = main_of(address)
        text = zeolith("status", address).stdout
        holder.tpc_abort(held)
        voting.result()
    waiter.tpc_abort(waiting)
    assert "holder" in main["transactions"][0]["client"]
    (waiting_one,) = main["waiting"]
    assert "waiter" in waiting_one["client"]
    assert "holder" in text
    assert "waiter" in text
    assert main_of(address)["transactions"] == []
    for storage in (holder, waiter):
        storage.close()
    wait_until(lambda: not main_of(address)["clients"], "the end of the clients")


def main_of(address: str) -> Any:
    return status_of(address)["storages"]["main"]
