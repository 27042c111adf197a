"""A server that has no descriptors left goes on with those who are connected."""

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from zeolith.client.storage import ClientStorage

from ..support.records import commit, seen
from ..support.serving import ServerProcess
from ..support.waiting import wait_until

# Of a processor, of a server that nobody asks for anything.
BUSY_SHARE = 0.5
WAIT_S = 30


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path) as server:
        yield server


def limit_descriptors(pid: int, count: int) -> None:
    _soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (count, hard))


def cpu_s(pid: int) -> float:
    """What the process has computed so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def uptime_s() -> float:
    return float(Path("/proc/uptime").read_text().split()[0])


def test_it_goes_on_without_spinning_and_says_so_once(server):
    pid = server.process.pid
    with closing(ClientStorage(server.address)) as storage, ExitStack() as stack:
        commit(storage, x=b"before")
        open_now = len(os.listdir(f"/proc/{pid}/fd"))
        limit_descriptors(pid, open_now + 3)
        began_s, used_s = uptime_s(), cpu_s(pid)
        for _ in range(20):
            stack.enter_context(socket.create_connection(server.address, WAIT_S))
        wait_until(lambda: "no file descriptors left" in server.stderr_text(), "told")
        # Two more ticks of its clock.
        wait_until(lambda: uptime_s() - began_s > 3, "some seconds")
        assert cpu_s(pid) - used_s < BUSY_SHARE * (uptime_s() - began_s)
        assert server.stderr_text().count("no file descriptors left") == 1
        commit(storage, x=b"meanwhile")
        assert seen(storage, "x") == b"meanwhile"
        limit_descriptors(pid, 1000)
        wait_until(lambda: "descriptors again" in server.stderr_text(), "told")
        with closing(ClientStorage(server.address)) as other:
            assert seen(other, "x") == b"meanwhile"
            commit(other, x=b"after")


def fill(process: "subprocess.Popen[str]", address: tuple[str, int]) -> str:
    """Take all places of a server, commit, and stop it; returns its log."""
    with closing(ClientStorage(address)) as storage, ExitStack() as stack:
        commit(storage, x=b"before")
        silent = [
            stack.enter_context(socket.create_connection(address, WAIT_S))
            for _ in range(300)
        ]
        assert b"connections_max" in silent[0].recv(1000)
        # A large one needs a file of its own.
        commit(storage, x=b"after", y=bytes(3_000_000), z=bytes(3_000_000))
    process.terminate()
    _out, log = process.communicate(timeout=WAIT_S)
    return log


def test_there_are_files_left_when_no_more_can_connect(tmp_path):
    """One too many is told so: there is a descriptor to tell it."""
    command = [sys.executable, "-m", "zeolith.server", "serve", "--path", "Data.fs"]
    limited = ["sh", "-c", 'ulimit -n 200; exec "$0" "$@"', *command]
    with subprocess.Popen(
        [*limited, "--address", "127.0.0.1:0"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().removeprefix("listening on ").strip()
        host, port = address.split(":")
        try:
            log = fill(process, (host, int(port)))
        finally:
            process.kill()
    assert "only 102 connections are possible, not 10000 (connections_max)" in log
    assert process.returncode == 0
