"""The server as its operator sees it: start, signals, stop, and what goes wrong."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.fsIndex import fsIndex
from ZODB.POSException import POSKeyError, StorageError
from ZODB.utils import p64, z64

from zeolith.client.errors import ClientDisconnected
from zeolith.client.opening import connection
from zeolith.client.storage import ClientStorage

from ..support.commanding import complaint, zeolith
from ..support.serving import ServerProcess
from ..support.waiting import wait_until

# A test that needed so much time would be a failure.
FOR_EVER_S = 3600


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path) as started:
        yield started


def vote(storage: ClientStorage, oid: bytes = p64(1)) -> TransactionMetaData:
    """A transaction that has voted, and holds up all that want the same object."""
    metadata = TransactionMetaData()
    storage.tpc_begin(metadata)
    storage.store(oid, z64, b"state", "", metadata)
    storage.tpc_vote(metadata)
    return metadata


def has(storage: ClientStorage, oid: bytes = p64(1)) -> bool:
    try:
        storage.load(oid)
    except POSKeyError:
        return False
    return True


def count_up(address: object) -> int:
    """One more than the last time, committed."""
    opened = connection(address)
    with opened.transaction_manager:
        opened.root()["n"] = opened.root().get("n", 0) + 1
    count: int = opened.root()["n"]
    opened.close()
    return count


# Starting


def test_port_0_becomes_a_port_that_is_printed(server: ServerProcess):
    (listening,) = server.listening
    host, port = listening.split(":")
    assert host == "127.0.0.1"
    assert int(port) > 0
    assert count_up(listening) == 1


def test_a_server_may_have_several_addresses_and_storages(tmp_path: Path):
    path = tmp_path / "zeolith.sock"
    server = ServerProcess(
        tmp_path,
        options=f"address {path}\naddress 127.0.0.1:0",
        storages="<mappingstorage a/>\n<mappingstorage b/>",
    )
    with server:
        assert len(server.listening) == 3
        assert str(path) in server.listening
        storages = [
            ClientStorage(address, storage=name)
            for address in server.listening
            for name in "ab"
        ]
        metadata = vote(storages[0])
        storages[0].tpc_finish(metadata)
        for number, storage in enumerate(storages):
            assert has(storage) is (number % 2 == 0)
            storage.close()


def test_a_server_needs_no_file(tmp_path: Path):
    """--address and --path, as `make serve` has them."""
    path = tmp_path / "zeolith.sock"
    command = [sys.executable, "-W", "error", "-m", "zeolith.server", "serve"]
    options = ["--address", "127.0.0.1:0", "--address", str(path), "--path", "Data.fs"]
    with subprocess.Popen(
        [*command, *options], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            lines = [server.stdout.readline().strip() for _ in range(3)]
            assert lines[1:] == [f"listening on {path}", "ready"]
            tcp = lines[0].removeprefix("listening on ")
            assert [count_up(address) for address in (tcp, str(path))] == [1, 2]
            server.terminate()
            assert server.wait(FOR_EVER_S) == 0
        finally:
            server.kill()
    assert (tmp_path / "Data.fs.index").exists()


def test_a_unix_socket_goes_with_the_server_and_is_replaced_after_a_kill(
    tmp_path: Path,
):
    path = tmp_path / "zeolith.sock"
    with ServerProcess(tmp_path, options=f"address {path}") as server:
        assert count_up(str(path)) == 1
        server.kill()
        assert path.exists()
        server.restart()
        assert count_up(str(path)) == 2
        server.terminate()
        assert not path.exists()


# What cannot be started: one line, exit status 1


def served_in_vain(path: str, address: str = "127.0.0.1:0", *options: str) -> str:
    done = zeolith("serve", "--address", address, "--path", path, *options)
    assert done.returncode == 1, done
    return complaint(done)


def test_an_address_in_use_is_one_line(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = "{}:{}".format(*taken.getsockname())
        assert address in served_in_vain(str(tmp_path / "Data.fs"), address)


def test_a_unix_socket_in_use_is_one_line_and_stays(tmp_path: Path):
    path = tmp_path / "zeolith.sock"
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(path))
        taken.listen()
        assert str(path) in served_in_vain(str(tmp_path / "Data.fs"), str(path))
        assert path.exists()


def test_a_file_in_the_place_of_a_unix_socket_is_one_line_and_stays(tmp_path: Path):
    path = tmp_path / "zeolith.sock"
    path.write_text("precious")
    assert str(path) in served_in_vain(str(tmp_path / "Data.fs"), str(path))
    assert path.read_text() == "precious"


def test_an_address_that_is_not_ours_is_one_line(tmp_path: Path):
    # Of the block that is for documentation only.
    address = "192.0.2.1:8100"
    assert address in served_in_vain(str(tmp_path / "Data.fs"), address, "--insecure")


def test_an_address_for_strangers_is_refused_before_anything_is_opened(tmp_path: Path):
    done = zeolith(
        "serve", "--address", "0.0.0.0:0", "--path", str(tmp_path / "Data.fs")
    )
    assert done.returncode == 2
    assert "insecure true" in complaint(done)
    assert not list(tmp_path.iterdir())


def test_an_address_for_strangers_is_served_if_that_is_written_down(tmp_path: Path):
    options = "insecure true\naddress 0.0.0.0:0"
    with ServerProcess(tmp_path, options=options) as server:
        _local, everywhere = server.listening
        assert everywhere.startswith("0.0.0.0:")
        assert count_up(f"127.0.0.1:{everywhere.rpartition(':')[2]}") == 1


def test_a_missing_directory_is_one_line(tmp_path: Path):
    path = str(tmp_path / "missing" / "Data.fs")
    assert path in served_in_vain(path)


def test_a_data_fs_that_is_served_already_is_one_line(server: ServerProcess):
    said = served_in_vain(str(server.data_path))
    assert str(server.data_path) in said
    assert "lock" in said
    assert count_up(server.address) == 1


def test_a_file_that_is_no_data_fs_is_one_line_and_stays(tmp_path: Path):
    path = tmp_path / "Data.fs"
    path.write_text("precious")
    assert str(path) in served_in_vain(str(path))
    assert path.read_text() == "precious"


def test_a_directory_in_the_place_of_a_data_fs_is_one_line(tmp_path: Path):
    path = tmp_path / "Data.fs"
    path.mkdir()
    assert str(path) in served_in_vain(str(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_data_fs_that_may_not_be_read_is_one_line(tmp_path: Path):
    path = tmp_path / "Data.fs"
    path.touch(0)
    assert str(path) in served_in_vain(str(path))


def test_one_bad_storage_among_good_ones_leaves_none_locked(tmp_path: Path):
    good = "<filestorage good>\npath Good.fs\n</filestorage>\n"
    bad = "<filestorage bad>\npath Bad.fs\n</filestorage>\n"
    (tmp_path / "Bad.fs").write_text("no data")
    server = ServerProcess(tmp_path, storages=good + bad)
    with pytest.raises(AssertionError, match="exit status 1"):
        server.start()
    assert "Bad.fs" in server.stderr_text()
    assert "Traceback" not in server.stderr_text()
    with ServerProcess(tmp_path, storages=good):
        pass


# Whom a server refuses is told why, at once


def test_a_wrong_storage_name_is_told_at_once(server: ServerProcess):
    with pytest.raises(ClientDisconnected, match="no storage 'other'"):
        ClientStorage(server.address, storage="other", wait_timeout=FOR_EVER_S)


def test_a_read_only_server_refuses_writers_and_serves_readers(tmp_path: Path):
    with ServerProcess(tmp_path) as server:
        count_up(server.address)
    with ServerProcess(tmp_path, options="read-only true") as server:
        with pytest.raises(ClientDisconnected, match="read-only"):
            ClientStorage(server.address, wait_timeout=FOR_EVER_S)
        for storage in (
            ClientStorage(server.address, read_only=True),
            ClientStorage(server.address, read_only_fallback=True),
        ):
            assert storage.isReadOnly()
            assert has(storage, z64)
            storage.close()


# Stopping


def index_end(server: ServerProcess) -> int:
    """Up to where in Data.fs its index goes."""
    end: int = fsIndex.load(str(server.data_path) + ".index")["pos"]
    return end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_stopped_saves_its_index(server: ServerProcess, number):
    assert count_up(server.address) == 1
    server.send(number)
    server.wait_for_end()
    assert "Traceback" not in server.stderr_text()
    assert index_end(server) == server.data_path.stat().st_size
    server.restart()
    assert count_up(server.address) == 2


def test_a_server_that_is_killed_loses_no_more_than_its_index(server: ServerProcess):
    assert count_up(server.address) == 1
    server.kill()
    server.restart()
    assert count_up(server.address) == 2
    server.terminate()
    assert index_end(server) == server.data_path.stat().st_size


def test_a_server_that_is_stopped_lets_a_voted_transaction_finish(
    server: ServerProcess,
):
    storage = ClientStorage(server.address)
    metadata = vote(storage)
    server.send(signal.SIGTERM)
    # It accepts nobody any more; nothing else shows that the signal has arrived.
    wait_until(lambda: not answers(server), "the end of listening")
    tid = storage.tpc_finish(metadata)
    storage.close()
    server.wait_for_end()
    server.restart()
    storage = ClientStorage(server.address)
    assert storage.load(p64(1)) == (b"state", tid)
    storage.close()


def test_a_server_that_is_stopped_waits_for_nobody_for_ever(tmp_path: Path):
    with ServerProcess(tmp_path, options="shutdown-timeout 1s") as server:
        storage = ClientStorage(server.address)
        metadata = vote(storage)
        server.terminate()
        with pytest.raises(StorageError):
            storage.tpc_finish(metadata)
        storage.tpc_abort(metadata)
        storage.close()
        assert "Traceback" not in server.stderr_text()
        server.restart()
        storage = ClientStorage(server.address)
        assert not has(storage)
        storage.close()


def test_idle_clients_do_not_hold_up_the_end(tmp_path: Path):
    with ServerProcess(tmp_path, options="shutdown-timeout 1h") as server:
        storages = [ClientStorage(server.address) for _ in range(5)]
        stranger = socket.create_connection(server.address)
        server.terminate()
        stranger.close()
        for storage in storages:
            storage.close()


def answers(server: ServerProcess) -> bool:
    try:
        socket.create_connection(server.address).close()
    except OSError:
        return False
    return True


def test_a_second_signal_does_not_end_the_first_ones_work(server: ServerProcess):
    """Whoever is impatient does not lose the index."""
    assert count_up(server.address) == 1
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        server.send(number)
    # From here on the loop is at its end, or after it.
    wait_until(lambda: "stopping" in server.stderr_text(), "the stop")
    while server.is_running():
        server.send(signal.SIGTERM)
    server.wait_for_end()
    assert "Traceback" not in server.stderr_text()
    assert index_end(server) == server.data_path.stat().st_size


# Reading the configuration again


def timeout_of(storage: ClientStorage) -> float:
    timeout: float = storage.server_status()["transaction_timeout_s"]
    return timeout


def test_a_hangup_changes_the_transaction_timeout(tmp_path: Path):
    with ServerProcess(tmp_path, options="transaction-timeout 1h") as server:
        holder, other = ClientStorage(server.address), ClientStorage(server.address)
        metadata = vote(holder)
        assert timeout_of(other) == 3600
        server.rewrite("transaction-timeout 1h", "transaction-timeout 1s")
        server.send(signal.SIGHUP)
        wait_until(lambda: timeout_of(other) == 1, "the new time-out")
        # The holder is over the new limit; that it voted under the old is no excuse.
        other.tpc_finish(vote(other))
        with pytest.raises(StorageError, match="transaction-timeout"):
            holder.tpc_finish(metadata)
        holder.tpc_abort(metadata)
        assert has(other, p64(1))
        # It can go on.
        holder.tpc_finish(vote(holder, p64(3)))
        for storage in (holder, other):
            storage.close()


def test_a_hangup_with_a_mistake_in_the_file_changes_nothing(tmp_path: Path):
    with ServerProcess(tmp_path, options="transaction-timeout 1h") as server:
        storage = ClientStorage(server.address)
        server.rewrite("transaction-timeout 1h", "transaction-timeout soon")
        server.send(signal.SIGHUP)
        wait_until(lambda: "soon" in server.stderr_text(), "a complaint")
        assert "Traceback" not in server.stderr_text()
        assert timeout_of(storage) == 3600
        storage.tpc_finish(vote(storage))
        storage.close()


def test_a_hangup_without_a_file_is_harmless(tmp_path: Path):
    command = [sys.executable, "-W", "error", "-m", "zeolith.server", "serve"]
    options = ["--address", "127.0.0.1:0", "--path", str(tmp_path / "Data.fs")]
    with subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip().removeprefix("listening on ")
            assert server.stdout.readline() == "ready\n"
            server.send_signal(signal.SIGHUP)
            assert count_up(address) == 1
            server.terminate()
            assert server.wait(FOR_EVER_S) == 0
        finally:
            server.kill()
