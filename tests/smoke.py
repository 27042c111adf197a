"""The least that an installed zeolith must do; needs nothing but the wheel.

Run as a program, by an environment that holds the wheel and in a folder that is
not the checkout. It serves a new Data.fs, lets another process change an object,
sees the change, stops the server and reads the file with ZODB alone.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path

from ZODB.DB import DB as PlainDB
from ZODB.FileStorage import FileStorage

import zeolith.client

ZEOLITH = str(Path(sys.executable).with_name("zeolith"))
WAIT_S = 30


@contextmanager
def served(data: Path) -> Iterator[str]:
    """The address of a server for `data`, which must stop with status 0."""
    command = [ZEOLITH, "serve", "--address", "127.0.0.1:0", "--path", str(data)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        lines = []
        for line in server.stdout:
            lines.append(line.strip())
            if lines[-1] == "ready":
                break
        listening = [line for line in lines if line.startswith("listening on ")]
        assert len(listening) == 1, lines
        yield listening[0].removeprefix("listening on ")
        server.send_signal(signal.SIGTERM)
        assert server.wait(WAIT_S) == 0, server.returncode
    finally:
        with suppress(ProcessLookupError):
            server.kill()
        server.communicate()


def write(address: str) -> None:
    """What the other process does."""
    connection = zeolith.client.connection(address)
    with connection.transaction_manager:
        connection.root()["greeting"] = "hello from elsewhere"
    connection.close()


def sees_the_change(connection) -> bool:
    connection.transaction_manager.begin()
    return connection.root().get("greeting") == "hello from elsewhere"


def check_sharing(address: str) -> None:
    connection = zeolith.client.connection(address)
    assert not sees_the_change(connection)
    other = [sys.executable, "-P", "-W", "error", __file__, address]
    subprocess.run(other, check=True, timeout=WAIT_S)
    deadline = time.monotonic() + WAIT_S
    while not sees_the_change(connection):
        assert time.monotonic() < deadline, "the change did not arrive"
        time.sleep(0.01)
    connection.close()


def check_tools(address: str) -> None:
    subprocess.run([ZEOLITH, "ping", address], check=True, timeout=WAIT_S)
    status = [ZEOLITH, "status", address, "--json"]
    shown = subprocess.run(status, check=True, timeout=WAIT_S, capture_output=True)
    assert json.loads(shown.stdout)


def check_the_file(data: Path) -> None:
    db = PlainDB(FileStorage(str(data), read_only=True))
    with db.transaction() as connection:
        assert connection.root()["greeting"] == "hello from elsewhere"
    db.close()


def main() -> None:
    if sys.argv[1:]:
        return write(sys.argv[1])
    for package in ("client", "protocol", "server", "storage"):
        where = files(f"zeolith.{package}")
        assert Path(str(where)).is_relative_to(sys.prefix), where
        assert where.joinpath("py.typed").is_file(), where
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "Data.fs")
        with served(data) as address:
            check_sharing(address)
            check_tools(address)
        check_the_file(data)
    print("a change crossed from process to process and is in the file")
    return None


if __name__ == "__main__":
    main()
