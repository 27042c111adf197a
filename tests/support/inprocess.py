"""A server in a thread of the test's process, so that a test can reach into it.

The pieces are the daemon's (Service, Listener, Peer, Served, Workers) on uvloop; only
signals and standard output are left out. A test looks and acts on the loop with
`on_loop`, and may replace methods of the databases before or while it runs. Nothing is
left when it has stopped: no thread, no socket, no open file, and no error that only
the loop's exception handler heard of.
"""

import asyncio
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import uvloop

from zeolith.client.storage import ClientStorage
from zeolith.protocol.limits import DEFAULT, Limits
from zeolith.server import daemon
from zeolith.server.access import OPEN, Access
from zeolith.server.listener import Listener
from zeolith.server.peer import Peer
from zeolith.server.relay import Relay
from zeolith.server.served import Served
from zeolith.server.service import Service
from zeolith.storage.adapted import AdaptedStorage
from zeolith.storage.filestore import FileStore

START_TIMEOUT_S = 30
SHUTDOWN_TIMEOUT_S = 10
STOP_TIMEOUT_S = 60
# Often, so that what a clock brings about is soon to be seen.
TICK_INTERVAL_S = 0.02


class InProcessServer:
    """A server that a test starts, looks into, stops and starts again.

    ``storages`` are as in config.Options: how to open what, by name. A restart opens
    them again, on the same port.
    """

    def __init__(
        self,
        storages: Mapping[str, Callable[[], AdaptedStorage]],
        *,
        limits: Limits = DEFAULT,
        is_read_only: bool = False,
        transaction_timeout_s: float = 30,
        access: Access = OPEN,
        tls: ssl.SSLContext | None = None,
    ):
        self._storages = storages
        self._limits = limits
        self._is_read_only = is_read_only
        self._transaction_timeout_s = transaction_timeout_s
        self._access = access
        # What new clients are shown; a test may change it.
        self.tls = tls
        self._thread: threading.Thread | None = None
        self._started = threading.Event()
        self._failures: list[str] = []
        self._have_workers_ended = False
        self._stop: asyncio.Event
        self._loop: asyncio.AbstractEventLoop
        self.service: Service
        self.databases: dict[str, AdaptedStorage] = {}
        self.address = ("127.0.0.1", 0)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if self.is_running:
            self.stop()

    @property
    def is_running(self) -> bool:
        return self._thread is not None

    @property
    def database(self) -> AdaptedStorage:
        """The database named "1"."""
        return self.databases["1"]

    @property
    def served(self) -> Served:
        """The database named "1", as the loop sees it; to be used on the loop."""
        return self.service.databases["1"]

    def start(self) -> None:
        """Return when clients can connect."""
        assert not self.is_running
        self.databases = {name: open_() for name, open_ in self._storages.items()}
        self._started.clear()
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)
        self._thread.start()
        assert self._started.wait(START_TIMEOUT_S), "the server did not start"

    def stop(self) -> None:
        """Stop it as a signal would; nothing may be left of it."""
        thread, self._thread = self._thread, None
        assert thread is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        thread.join(STOP_TIMEOUT_S)
        assert not thread.is_alive(), "the server does not stop"
        for database in self.databases.values():
            database.close()
        assert self._have_workers_ended, "a worker thread goes on"
        assert not self._failures, self._failures

    def restart(self) -> None:
        self.stop()
        self.start()

    def on_loop(self, function: Callable[..., Any], *args: Any) -> Any:
        """What ``function`` returns on the server's loop.

        As for whatever comes from a client, all that was answered before is seen there.
        """

        async def call() -> Any:
            self.service.catch_up()
            return function(*args)

        calling = asyncio.run_coroutine_threadsafe(call(), self._loop)
        return calling.result(START_TIMEOUT_S)

    def status(self) -> Any:
        """Numbers that say whether anything is left of anybody."""
        return self.on_loop(
            lambda: {
                "peers": len(self.service.peers),
                "sessions": len(self.service.sessions),
                "followers": sum(
                    len(served.followers) for served in self.service.databases.values()
                ),
                "in transaction": sum(
                    len(served.committer.holders)
                    for served in self.service.databases.values()
                ),
            }
        )

    def cut_off(self) -> None:
        """Break every connection without a word; the server goes on."""

        def cut_off() -> None:
            for peer in tuple(self.service.peers):
                peer.cut_off()

        self.on_loop(cut_off)

    def stream_of(self, storage: ClientStorage) -> Peer:
        """The server's end of the stream of a client."""
        session = storage.current_session
        assert session is not None
        token = session.welcome["session"]
        peer: Peer = self.on_loop(lambda: self.service.sessions[token].stream)
        return peer

    def _tls_context(self) -> ssl.SSLContext:
        assert self.tls is not None
        return self.tls

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(
            lambda _loop, context: self._failures.append(str(context))
        )
        self._stop = asyncio.Event()
        served = {
            name: await daemon._prepare(name, database, self._is_read_only)
            for name, database in self.databases.items()
        }
        self.service = Service(served, self._limits, self._access)
        for each in served.values():
            Relay(self.service, each)
        self.service.transaction_timeout_s = self._transaction_timeout_s
        listener = Listener(
            lambda: Peer(self.service, self._limits),
            None if self.tls is None else self._tls_context,
        )
        await listener.listen(self.address)
        (address,) = listener.addresses
        assert not isinstance(address, str)
        self.address = address
        self._started.set()
        while not self._stop.is_set():
            self.service.tick(self._loop.time())
            try:
                await asyncio.wait_for(self._stop.wait(), TICK_INTERVAL_S)
            except TimeoutError:
                continue
        await listener.close()
        self._have_workers_ended = await daemon._wind_down(
            self.service, SHUTDOWN_TIMEOUT_S
        )


@contextmanager
def serving(path: Any, **options: Any) -> Iterator[InProcessServer]:
    """A running server of the Data.fs at ``path``."""
    with InProcessServer({"1": lambda: FileStore("1", str(path))}, **options) as server:
        yield server


@contextmanager
def client_of(server: InProcessServer, **options: Any) -> Iterator[ClientStorage]:
    """A storage that is closed at the end."""
    storage = ClientStorage(options.pop("addr", server.address), **options)
    try:
        yield storage
    finally:
        storage.close()


class HeldStream:
    """Between `hold` and `release` the changes for one client stay in the server."""

    def __init__(self, server: InProcessServer, storage: ClientStorage):
        self._server = server
        self._peer: Any = server.stream_of(storage)
        self._send = self._peer.send_shared
        self._held: list[bytes] = []

    def hold(self) -> Self:
        def hold() -> None:
            self._peer.send_shared = self._held.append

        self._server.on_loop(hold)
        return self

    def release(self) -> None:
        def release() -> None:
            self._peer.send_shared = self._send
            while self._held:
                self._send(self._held.pop(0))

        self._server.on_loop(release)
