import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage

from zeolith.client import ClientStorage
from zeolith.client.errors import ClientDisconnected
from zeolith.server.config import Options
from zeolith.server.daemon import _configure
from zeolith.server.indexing import IndexSaver
from zeolith.server.probe import ask

from ..support.gates import Background
from ..support.model import ModelServer
from ..support.serving import ServerProcess
from ..support.waiting import wait_until

WAIT_S = 30
OID = b"\0" * 8


def begin(storage: ClientStorage) -> TransactionMetaData:
    """A transaction that has voted."""
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    storage.store(OID, None, b"data", "", transaction)
    storage.tpc_vote(transaction)
    return transaction


def has_logged(server: ServerProcess, text: str) -> None:
    wait_until(lambda: text in server.stderr_text(), text)


def no_complaints(server: ServerProcess) -> None:
    text = server.stderr_text()
    for word in ("Traceback", "ERROR", "CRITICAL", "Warning"):
        assert word not in text, text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_and_the_index_is_saved(tmp_path, number):
    with ServerProcess(tmp_path) as server:
        storage = ClientStorage(server.address)
        tid = storage.tpc_finish(begin(storage))
        storage.close()
        server.send(number)
        assert server.process.wait(WAIT_S) == 0
        server.process.communicate()
    assert (tmp_path / "Data.fs.index").exists()
    plain = FileStorage(str(tmp_path / "Data.fs"), read_only=True)
    assert plain.load(OID) == (b"data", tid)
    plain.close()
    no_complaints(server)


def test_systemd_is_told(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(WAIT_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with ServerProcess(tmp_path):
            assert systemd.recv(100) == b"READY=1"
        assert systemd.recv(100) == b"STOPPING=1"


def test_every_address_is_announced(tmp_path):
    path = tmp_path / "server.sock"
    with ServerProcess(tmp_path, options=f"address {path}") as server:
        tcp, unix = server.listening
        assert tcp.startswith("127.0.0.1:")
        assert unix == str(path)
        for address in (server.address, str(path)):
            assert ask(address, "ping", WAIT_S) is None
    assert not path.exists()


def test_a_hangup_puts_the_new_configuration_into_force(tmp_path):
    with ServerProcess(tmp_path, options="transaction-timeout 30s") as server:
        server.rewrite("transaction-timeout 30s", "transaction-timeout 7s")
        server.send(signal.SIGHUP)
        has_logged(server, "the configuration was read again")
        status = ask(server.address, "status", WAIT_S)
        assert status["transaction_timeout_s"] == 7


def test_a_hangup_with_a_wrong_file_changes_nothing(tmp_path):
    with ServerProcess(tmp_path, options="transaction-timeout 30s") as server:
        server.rewrite("transaction-timeout 30s", "transaction-timeout soon")
        server.send(signal.SIGHUP)
        has_logged(server, "the configuration is not used")
        status = ask(server.address, "status", WAIT_S)
        assert status["transaction_timeout_s"] == 30


def test_a_voted_transaction_may_finish_while_the_server_stops(tmp_path):
    with ServerProcess(tmp_path) as server:
        storage = ClientStorage(server.address, wait_timeout=1)
        transaction = begin(storage)
        server.send(signal.SIGTERM)
        has_logged(server, "stopping")
        tid = storage.tpc_finish(transaction)
        assert server.process.wait(WAIT_S) == 0
        server.process.communicate()
        storage.close()
    plain = FileStorage(str(tmp_path / "Data.fs"), read_only=True)
    assert plain.load(OID) == (b"data", tid)
    plain.close()
    no_complaints(server)


def test_a_transaction_that_does_not_finish_holds_up_nothing(tmp_path):
    with ServerProcess(tmp_path, options="shutdown-timeout 1s") as server:
        storage = ClientStorage(server.address, wait_timeout=0.1)
        transaction = begin(storage)
        server.terminate()
        wait_until(lambda: not storage.is_connected(), "the end of the session")
        with pytest.raises(ClientDisconnected, match="nothing was committed"):
            storage.tpc_finish(transaction)
        storage.close()
    assert "did not finish in 1 s and is aborted" in server.stderr_text()
    no_complaints(server)
    plain = FileStorage(str(tmp_path / "Data.fs"), read_only=True)
    assert len(plain) == 0
    plain.close()


def test_those_in_line_are_told_that_the_server_stops(tmp_path):
    with ServerProcess(tmp_path, options="shutdown-timeout 1s") as server:
        holder = ClientStorage(server.address, wait_timeout=0.1)
        waiting = ClientStorage(server.address, wait_timeout=0.1)
        begin(holder)
        voting = Background(begin, waiting)
        wait_until(
            lambda: ask(server.address, "status", WAIT_S)["storages"]["1"]["waiting"],
            "the second one in line",
        )
        server.send(signal.SIGTERM)
        assert "the server is stopping" in str(voting.error())
        assert server.process.wait(WAIT_S) == 0
        server.process.communicate()
        waiting.close()
        holder.close()
    no_complaints(server)


def start(directory: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """A server that must not come up."""
    return subprocess.run(
        [sys.executable, "-m", "zeolith.server", "serve", *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )


def test_a_second_server_of_the_same_file_is_refused_in_one_line(tmp_path):
    with ServerProcess(tmp_path):
        second = start(tmp_path, "--address", "127.0.0.1:0", "--path", "Data.fs")
    assert second.returncode == 1
    assert "another process has it open" in second.stderr
    assert second.stderr.count("\n") == 1
    assert not second.stdout


def test_an_address_in_use_is_told_in_one_line_and_the_file_is_released(tmp_path):
    with ServerProcess(tmp_path) as server:
        (address,) = server.listening
        other = start(tmp_path, "--address", address, "--path", "Other.fs")
    assert other.returncode == 1
    last_line = other.stderr.splitlines()[-1]
    assert last_line.startswith(f"zeolith: cannot listen on {address}: ")
    assert "Traceback" not in other.stderr
    FileStorage(str(tmp_path / "Other.fs")).close()


def test_a_file_that_is_no_database_is_told_in_one_line(tmp_path):
    (tmp_path / "Data.fs").write_bytes(b"this is no database at all" * 100)
    done = start(tmp_path, "--address", "127.0.0.1:0", "--path", "Data.fs")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("zeolith: ")


STUCK_PACK = """
import threading
from zeolith.storage.filestore import FileStore
from zeolith.server.cli import main

def pack(self, *_args):
    print("packing", flush=True)
    threading.Event().wait()

FileStore.pack = pack
main()
"""


def test_a_pack_does_not_hold_up_the_end(tmp_path):
    """A pack may take hours; the databases are closed and the process ends."""
    conf = tmp_path / "server.conf"
    conf.write_text(
        "<zeolith>\naddress 127.0.0.1:0\nshutdown-timeout 1s\n</zeolith>\n"
        "<filestorage>\npath Data.fs\n</filestorage>\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", STUCK_PACK, "serve", "-C", str(conf)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip().removeprefix("listening on ")
        assert process.stdout.readline() == "ready\n"
        storage = ClientStorage(address, wait_timeout=1)
        packing = Background(storage.pack)
        assert process.stdout.readline() == "packing\n"
        process.terminate()
        assert "while packing" in str(packing.error())
        _stdout, stderr = process.communicate(timeout=WAIT_S)
        storage.close()
    assert process.returncode == 0
    assert "a pack is given up" in stderr
    assert "Traceback" not in stderr
    assert (tmp_path / "Data.fs.index").exists()


def test_the_status_of_a_process(tmp_path):
    with ServerProcess(tmp_path) as server:
        status = ask(server.address, "status", WAIT_S)
        assert status["pid"] == server.process.pid != os.getpid()
        assert json.dumps(status)


def test_clients_that_said_nothing_do_not_hold_up_the_end(tmp_path):
    with (
        ServerProcess(tmp_path) as server,
        socket.create_connection(server.address) as silent,
    ):
        ask(server.address, "ping", WAIT_S)
        server.terminate()
        silent.settimeout(WAIT_S)
        while silent.recv(4096):
            pass


IMPATIENT = """
import os, signal, sys
from zeolith.server import config, daemon

change = signal.signal

def change_in_vain(number, handler):
    if handler is signal.SIG_IGN and is_ready:
        os.kill(os.getpid(), number)
    return change(number, handler)

def announce(line):
    if line == "ready":
        is_ready.append(True)
        signal.raise_signal(signal.SIGTERM)

is_ready = []
options = config.quick_options([("127.0.0.1", 0)], sys.argv[1], None)
signal.signal = change_in_vain
daemon.run(options, announce, lambda: None)
"""


def test_no_signal_kills_between_being_heeded_and_being_ignored(tmp_path):
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        IMPATIENT,
        str(tmp_path / "Data.fs"),
    ]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=WAIT_S
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


async def test_how_much_is_replayed_changes_while_the_server_runs():
    server = ModelServer()
    level = logging.getLogger().level
    options = Options([], {}, replay_bytes=1000, log_level=level)
    _configure(server.service, IndexSaver([], 600), options)
    assert server.served.replays.bytes_max == 1000
