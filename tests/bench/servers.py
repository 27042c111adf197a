"""The peers: how a server of each is started, and how a client opens its storage.

A ``Running`` server is a process of its own; in-process FileStorage has none, and its
clients open the file themselves. ``Endpoint`` is what a client process is told. The
peer ``socket`` is no storage but the floor for all that have a server: see echo.py.
"""

import importlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

START_S = 30
STOP_S = 60


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the storage of a peer is; ``place`` is an address or a file."""

    peer: str
    place: Any

    def open(self, **options: Any) -> Any:
        """A fresh storage with its peer's defaults, and so with an empty cache."""
        return _client(self.peer)(self.place, **options)


@dataclass(frozen=True, slots=True)
class Running:
    """A peer that is ready for clients."""

    endpoint: Endpoint
    process: subprocess.Popen[str] | None = None

    def cpu_s(self) -> float:
        """The processor time that the server has used."""
        if self.process is None:
            return 0.0
        # The clock of another process, as clock_getcpuclockid(3) numbers it.
        return time.clock_gettime((~self.process.pid << 3) | 2)

    def keep_to(self, cores: set[int]) -> None:
        """Let every thread of the server run on ``cores`` only."""
        if self.process is not None:
            for thread in os.listdir(f"/proc/{self.process.pid}/task"):
                os.sched_setaffinity(int(thread), cores)


# Where each peer's client is: module and class.
_CLIENTS = {
    "zeolith": ("zeolith.client.storage", "ClientStorage"),
    "zeo": ("ZEO.ClientStorage", "ClientStorage"),
    "zeo-msgpack": ("ZEO.ClientStorage", "ClientStorage"),
    "filestorage": ("ZODB.FileStorage.FileStorage", "FileStorage"),
    "socket": ("socket", "create_connection"),
}


@contextmanager
def _zeolith(folder: Path, blob_dir: Path | None = None) -> Iterator[Running]:
    command = [sys.executable, "-m", "zeolith.server", "serve"]
    command += ["--address", "127.0.0.1:0", "--path", str(folder / "Data.fs")]
    if blob_dir is not None:
        command += ["--blob-dir", str(blob_dir)]
    with _process(command, folder, stdout=subprocess.PIPE) as process:
        address = None
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("listening on "):
                host, _colon, port = line.split()[-1].rpartition(":")
                address = host, int(port)
            if line == "ready\n":
                break
        if address is None:
            raise RuntimeError("the server listens nowhere")
        yield Running(Endpoint("zeolith", address), process)


@contextmanager
def _zeo(
    folder: Path, msgpack: bool = False, blob_dir: Path | None = None
) -> Iterator[Running]:
    blobs = "" if blob_dir is None else f" blob-dir {blob_dir}\n"
    address = "127.0.0.1", _free_port()
    conf = folder / "zeo.conf"
    conf.write_text(
        f"<zeo>\n address {address[0]}:{address[1]}\n"
        f" msgpack {'true' if msgpack else 'false'}\n</zeo>\n"
        f"<filestorage 1>\n path {folder / 'Data.fs'}\n{blobs}</filestorage>\n"
    )
    command = [sys.executable, "-m", "ZEO.runzeo", "-C", str(conf)]
    with _process(command, folder, stdout=subprocess.DEVNULL) as process:
        _wait_until_accepting(address, process)
        peer = "zeo-msgpack" if msgpack else "zeo"
        yield Running(Endpoint(peer, address), process)


@contextmanager
def _zeo_msgpack(folder: Path) -> Iterator[Running]:
    with _zeo(folder, msgpack=True) as running:
        yield running


@contextmanager
def _filestorage(folder: Path) -> Iterator[Running]:
    yield Running(Endpoint("filestorage", str(folder / "Data.fs")))


@contextmanager
def _socket(folder: Path) -> Iterator[Running]:
    echo = Path(__file__).with_name("echo.py")
    command = [sys.executable, str(echo)]
    with _process(command, folder, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        yield Running(Endpoint("socket", ("127.0.0.1", port)), process)


_STARTERS: dict[str, Callable[[Path], Any]] = {
    "zeolith": _zeolith,
    "zeo": _zeo,
    "zeo-msgpack": _zeo_msgpack,
    "filestorage": _filestorage,
    "socket": _socket,
}
PEERS = tuple(_STARTERS)
_WITH_BLOBS: dict[str, Callable[..., Any]] = {"zeolith": _zeolith, "zeo": _zeo}


def title(peer: str) -> str:
    """How the table calls a peer."""
    if peer == "filestorage":
        return "FileStorage, in process"
    if peer == "socket":
        return "bare round trip"
    if peer.startswith("zeo-") or peer == "zeo":
        return f"ZEO {version('ZEO')}{peer.removeprefix('zeo').replace('-', ', ')}"
    return peer


def is_installed(peer: str) -> bool:
    """Whether this environment has ``peer``; if so, its client is imported."""
    package = _CLIENTS[peer][0].partition(".")[0]
    return importlib.util.find_spec(package) is not None and bool(_client(peer))


def _client(peer: str) -> Any:
    module, name = _CLIENTS[peer]
    return getattr(importlib.import_module(module), name)


@contextmanager
def running(peer: str, folder: Path, data: Path) -> Iterator[Running]:
    """``peer`` with a copy of ``data`` in ``folder`` of its own."""
    folder.mkdir()
    for each in data.parent.iterdir():
        if each.name.startswith(data.name) and not each.name.endswith(".lock"):
            shutil.copy(each, folder / each.name.replace(data.name, "Data.fs"))
    with _STARTERS[peer](folder) as found:
        yield found


@contextmanager
def running_with_blobs(peer: str, folder: Path) -> Iterator[Running]:
    """``peer`` with an empty Data.fs and a blob directory in ``folder``."""
    with _WITH_BLOBS[peer](folder, blob_dir=folder / "blobs") as found:
        yield found


@contextmanager
def _process(
    command: list[str], folder: Path, stdout: int
) -> Iterator[subprocess.Popen[str]]:
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=stdout, stderr=log, text=True, cwd=folder
        )
    try:
        yield process
    except Exception as error:
        error.add_note((folder / "log").read_text())
        raise
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _wait_until_accepting(
    address: tuple[str, int], process: subprocess.Popen[str]
) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError), socket.create_connection(address, 1):
            return
        time.sleep(0.05)
    raise RuntimeError("the server accepts nobody")
