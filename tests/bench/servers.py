"""The peers: how a server of each is started, and how a client opens its storage.

A ``Running`` server is a process of its own; in-process FileStorage has none, and its
clients open the file themselves. ``Endpoint`` is what a client process is told. The
peer ``socket`` is no storage but the floor for all that have a server: see echo.py.
RelStorage's server is PostgreSQL: see postgres.py.
"""

import importlib
import importlib.util
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from zeolith.protocol.tls import client_context

from ..support.certificates import HOST, Authority
from . import costs, postgres
from .postgres import CannotRun as CannotRun

START_S = 30
STOP_S = 60
LOG_LINES_SHOWN = 20


class Tls(NamedTuple):
    """Files: an authority, and a certificate of it for server and clients."""

    ca: str
    certificate: str
    key: str


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the storage of a peer is; ``place`` is an address or a file."""

    peer: str
    place: Any
    # What clients show and trust, if they speak TLS.
    tls: Tls | None = None

    def open(self, **options: Any) -> Any:
        """A fresh storage with its peer's defaults, and so with an empty cache."""
        if self.tls is not None:
            options.update(ssl=client_context(*self.tls), ssl_server_hostname=HOST)
        return _client(self.peer)(self.place, **options)


class Observer:
    """Who looks at a server while a crew is measured; this one does not look."""

    def watch(self, running: "Running") -> AbstractContextManager[object]:
        """Entered just before the crew starts, left when all have answered."""
        return nullcontext()

    def saw(self, measured: Any) -> None:
        """Called with what came out, a crews.Measured."""


@dataclass(frozen=True, slots=True)
class Running:
    """A peer that is ready for clients."""

    endpoint: Endpoint
    process: subprocess.Popen[str] | None = None
    observer: Observer = field(default_factory=Observer)

    def cost(self) -> costs.Cost:
        """What the server has cost since it started."""
        if self.process is None:
            return costs.Cost()
        return costs.of_family(self.process.pid)

    def memory_bytes(self) -> int:
        """The memory that the server has now."""
        return costs.memory_bytes(self._pids())

    def keep_to(self, cores: set[int]) -> None:
        """Let every thread of the server run on ``cores`` only."""
        costs.keep_to(self._pids(), cores)

    def _pids(self) -> list[int]:
        return [] if self.process is None else costs.family(self.process.pid)


# Where each peer's client is: module and class.
_CLIENTS = {
    "zeolith": ("zeolith.client.storage", "ClientStorage"),
    "zeo": ("ZEO.ClientStorage", "ClientStorage"),
    "zeo-msgpack": ("ZEO.ClientStorage", "ClientStorage"),
    "relstorage": ("relstorage.storage", "RelStorage"),
    "filestorage": ("ZODB.FileStorage.FileStorage", "FileStorage"),
    "socket": ("socket", "create_connection"),
}


def _python(module: str, profile: Path | None) -> list[str]:
    """How a module is run as a program, below cProfile if there is a file for it."""
    if profile is None:
        return [sys.executable, "-m", module]
    program = Path(__file__).with_name("profiled.py")
    return [sys.executable, "-P", str(program), str(profile), module]


@contextmanager
def _zeolith(
    folder: Path,
    blob_dir: Path | None = None,
    profile: Path | None = None,
    tls: Tls | None = None,
    sections: str = "",
) -> Iterator[Running]:
    command = [*_python("zeolith.server", profile), "serve"]
    if tls is None and not sections:
        command += ["--address", "127.0.0.1:0", "--path", str(folder / "Data.fs")]
    else:
        if tls is not None:
            sections += (
                f" <tls>\n  certificate {tls.certificate}\n  key {tls.key}\n </tls>\n"
            )
        conf = folder / "server.conf"
        conf.write_text(
            f"<zeolith>\n address 127.0.0.1:0\n{sections}"
            f"</zeolith>\n<filestorage 1>\n path {folder / 'Data.fs'}\n</filestorage>\n"
        )
        command += ["-C", str(conf)]
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
        yield Running(Endpoint("zeolith", address, tls), process)


@contextmanager
def _zeo(
    folder: Path,
    msgpack: bool = False,
    blob_dir: Path | None = None,
    profile: Path | None = None,
    tls: Tls | None = None,
) -> Iterator[Running]:
    secured = (
        ""
        if tls is None
        else f" <ssl>\n  certificate {tls.certificate}\n  key {tls.key}\n"
        f"  authenticate {tls.ca}\n </ssl>\n"
    )
    blobs = "" if blob_dir is None else f" blob-dir {blob_dir}\n"
    address = "127.0.0.1", _free_port()
    conf = folder / "zeo.conf"
    conf.write_text(
        f"<zeo>\n address {address[0]}:{address[1]}\n"
        f" msgpack {'true' if msgpack else 'false'}\n{secured}</zeo>\n"
        f"<filestorage 1>\n path {folder / 'Data.fs'}\n{blobs}</filestorage>\n"
    )
    command = [*_python("ZEO.runzeo", profile), "-C", str(conf)]
    with _process(command, folder, stdout=subprocess.DEVNULL) as process:
        _wait_until(lambda: _is_accepting(address), process)
        peer = "zeo-msgpack" if msgpack else "zeo"
        yield Running(Endpoint(peer, address, tls), process)


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


@contextmanager
def _relstorage(folder: Path) -> Iterator[Running]:
    owner = postgres.owner()
    with (folder / "log").open("a") as log:
        postgres.make_cluster(folder, owner, log)
    command = postgres.command(folder)
    # SIGINT is PostgreSQL's fast shutdown: it does not wait for clients to go.
    with _process(
        command, folder, subprocess.DEVNULL, stop=signal.SIGINT, user=owner
    ) as process:
        _wait_until(lambda: postgres.is_ready(folder), process)
        dsn = postgres.dsn(folder)
        postgres.fill(dsn, folder / "Data.fs")
        yield Running(Endpoint("relstorage", dsn), process)


_STARTERS: dict[str, Callable[[Path], Any]] = {
    "zeolith": _zeolith,
    "zeo": _zeo,
    "zeo-msgpack": _zeo_msgpack,
    "relstorage": _relstorage,
    "filestorage": _filestorage,
    "socket": _socket,
}
PEERS = tuple(_STARTERS)
# Those whose server is a Python program.
PROFILED: dict[str, Callable[..., Any]] = {"zeolith": _zeolith, "zeo": _zeo}
_WITH_BLOBS = _ENCRYPTED = PROFILED


def memory_mb(server: Running, line: str = "VmRSS") -> float:
    """What of the server's memory is in RAM; the most there was with ``VmHWM``."""
    assert server.process is not None
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    (found,) = (each for each in status.splitlines() if each.startswith(f"{line}:"))
    return int(found.split()[1]) / 1024


def title(peer: str) -> str:
    """How the table calls a peer."""
    if peer == "filestorage":
        return "FileStorage, in process"
    if peer == "socket":
        return "bare round trip"
    if peer.startswith("zeo-") or peer == "zeo":
        return f"ZEO {version('ZEO')}{peer.removeprefix('zeo').replace('-', ', ')}"
    if peer == "relstorage":
        return f"RelStorage {_version('RelStorage')}".rstrip()
    return peer


def _version(package: str) -> str:
    """Of what need not be there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def missing(peer: str) -> str:
    """What this machine lacks for ``peer``; if nothing, its client is imported."""
    package = _CLIENTS[peer][0].partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return f"the package {package}"
    if peer == "relstorage" and (lack := postgres.missing()):
        return lack
    _client(peer)
    return ""


def _client(peer: str) -> Any:
    if peer == "relstorage":
        return postgres.open_storage
    module, name = _CLIENTS[peer]
    return getattr(importlib.import_module(module), name)


def let_pass(folder: Path) -> None:
    """Let a server of another user reach what is in a folder of ours."""
    folder.chmod(0o711)


@contextmanager
def running(
    peer: str,
    folder: Path,
    data: Path,
    profile: Path | None = None,
    *,
    is_encrypted: bool = False,
) -> Iterator[Running]:
    """``peer`` with a copy of ``data`` in ``folder`` of its own.

    With a file for its profile, the server is one that profiled.py runs.
    """
    folder.mkdir()
    for each in data.parent.iterdir():
        if each.name.startswith(data.name) and not each.name.endswith(".lock"):
            shutil.copy(each, folder / each.name.replace(data.name, "Data.fs"))
    if is_encrypted:
        authority = Authority(folder)
        signed = authority.sign()
        tls = Tls(authority.ca, signed.certificate, signed.key)
        starting = _ENCRYPTED[peer](folder, tls=tls)
    elif profile is not None:
        starting = PROFILED[peer](folder, profile=profile)
    else:
        starting = _STARTERS[peer](folder)
    with starting as found:
        yield found


@contextmanager
def running_with_blobs(peer: str, folder: Path) -> Iterator[Running]:
    """``peer`` with an empty Data.fs and a blob directory in ``folder``."""
    with _WITH_BLOBS[peer](folder, blob_dir=folder / "blobs") as found:
        yield found


@contextmanager
def running_with_sections(
    folder: Path, sections: str, *, is_encrypted: bool
) -> Iterator[Running]:
    """zeolith with the Data.fs in ``folder``, and ``sections`` in its configuration."""
    tls = None
    if is_encrypted:
        authority = Authority(folder)
        signed = authority.sign()
        tls = Tls(authority.ca, signed.certificate, signed.key)
    with _zeolith(folder, tls=tls, sections=sections) as found:
        yield found


@contextmanager
def _process(
    command: list[str],
    folder: Path,
    stdout: int,
    stop: signal.Signals = signal.SIGTERM,
    user: str | None = None,
) -> Iterator[subprocess.Popen[str]]:
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(
            command, stdout=stdout, stderr=log, text=True, cwd=folder, user=user
        )
    try:
        yield process
    except Exception as error:
        lines = (folder / "log").read_text().splitlines()
        error.add_note("\n".join(lines[-LOG_LINES_SHOWN:]))
        raise
    finally:
        process.send_signal(stop)
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


def _wait_until(is_ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        if is_ready():
            return
        time.sleep(0.05)
    raise RuntimeError("the server accepts nobody")


def _is_accepting(address: tuple[str, int]) -> bool:
    with suppress(OSError), socket.create_connection(address, 1):
        return True
    return False
