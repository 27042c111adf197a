"""A server that follows a script: late, silent, wrong, or gone at a chosen moment.

It speaks through `protocol.Connection` as a server does, and knows nothing of storages:
what it answers to a hello or to a method is what the test has put into `hello`,
`channel_hello` and `answers`, a value or one of the classes below. One thread accepts,
one thread serves each socket; what goes wrong in one of them is raised by `close`.
"""

import itertools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ZODB.utils import p64

from zeolith.protocol.connection import Connection, Role, SocketKind
from zeolith.protocol.errors import HelloRefused
from zeolith.protocol.limits import DEFAULT, Limits
from zeolith.protocol.messages import Hello, Message, Notice, Request
from zeolith.protocol.methods import VERSION

from .waiting import wait_until

# A client with these finds out quickly that nobody speaks to it.
IMPATIENT = Limits(
    heartbeat_interval_s=0.05, heartbeat_timeout_s=0.2, hello_timeout_s=0.2
)
DATABASE_ID = b"scripted-databas"
CHUNK_BYTES = 65536

tid = oid = p64


class Act(Enum):
    """Answers that are none."""

    # Only heartbeats.
    SILENCE = "silence"
    # Not even heartbeats, from now on.
    FREEZE = "freeze"
    HANG_UP = "hang up"


@dataclass(frozen=True)
class Held:
    """The answer `then`, once the test sets `gate`; heartbeats go on meanwhile."""

    gate: threading.Event
    then: Any = None


@dataclass(frozen=True)
class Raw:
    """These bytes in the place of an answer."""

    data: bytes


@dataclass(frozen=True)
class Cut:
    """The first `size_bytes` bytes of the answer `value`, then the end."""

    size_bytes: int
    value: Any = None


def welcome(**fields: Any) -> dict[str, Any]:
    """The fields of a Welcome."""
    return {
        "version": VERSION,
        "capabilities": [],
        "session": None,
        "database_id": DATABASE_ID,
        "epoch": 1,
        "last_tid": tid(1),
        "changes": [],
        "size": 0,
        "length": 0,
        "name": "scripted",
        "interfaces": [],
        "supports_undo": True,
        "read_only": False,
        "roles": ["admin", "pack", "read", "undo", "write"],
        "proof": None,
        **fields,
    }


class ScriptedPeer:
    """The server's end of one socket, and the thread that serves it."""

    def __init__(self, server: "ScriptedServer", sock: socket.socket):
        self.server = server
        self.hello: dict[str, Any] = {}
        # The methods that were called on this socket, with an answer or without.
        self.methods: list[str] = []
        self.connection = Connection(Role.SERVER, time.monotonic(), server.limits)
        self._socket = sock
        self._is_frozen = False
        self._is_hung_up = False
        # The thread of the peer and the test's both send.
        self._lock = threading.Lock()
        self.thread = threading.Thread(target=self._run, name="scripted-peer")

    def send(self, data: bytes) -> None:
        with self._lock:
            self._socket.sendall(data)

    def notice(self, method: str, *args: Any) -> None:
        with self._lock:
            now = time.monotonic()
            self._socket.sendall(self.connection.notice(method, list(args), now))

    def goodbye(self, reason: str, text: str = "") -> None:
        with self._lock:
            now = time.monotonic()
            self._socket.sendall(self.connection.goodbye(reason, text, now))

    def freeze(self) -> None:
        """Say nothing any more, and listen to nothing."""
        self._is_frozen = True

    def hang_up(self) -> None:
        self._is_hung_up = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        try:
            self._serve()
        except OSError:
            # The client or the test has ended the conversation.
            pass
        except BaseException as error:
            self.server.errors.append(error)
        finally:
            self.server.peers.remove(self)
            self._socket.close()

    def _serve(self) -> None:
        self._socket.settimeout(self.server.limits.heartbeat_interval_s / 4)
        while not self.connection.is_closed:
            with suppress(TimeoutError):
                data = self._socket.recv(CHUNK_BYTES)
                if not data:
                    return
                now = time.monotonic()
                for message in self.connection.receive_data(data, now):
                    self._heed(message)
                if self.connection.error and self.connection.goodbye_rcvd is None:
                    self.send(self.connection.farewell())
            self._beat()

    def _beat(self) -> None:
        if not self._is_frozen:
            with self._lock:
                self._socket.sendall(self.connection.tick(time.monotonic()))

    def _heed(self, message: Message) -> None:
        if self._is_frozen:
            return
        server = self.server
        if isinstance(message, Hello):
            self.hello = message.fields
            is_channel = self.connection.kind is SocketKind.CHANNEL
            answer = server.channel_hello if is_channel else server.hello
            if is_channel and answer is None and server.has_forgotten(message.fields):
                answer = HelloRefused("session", "the session has ended")
            server.hellos.append(message.fields)
            self._answer(answer, message, 0)
        elif isinstance(message, Request):
            self.methods.append(message.method)
            server.requests.append((message.method, message.args))
            self._answer(server.answers.get(message.method), message, message.id)
        elif isinstance(message, Notice):
            self.methods.append(message.method)
            server.notices.append((message.method, message.args))

    def _answer(self, answer: Any, message: Message, number: int) -> None:
        while callable(answer) and not isinstance(answer, type):
            answer = answer(*(message.args if isinstance(message, Request) else ()))
        if isinstance(answer, Held):
            while not answer.gate.wait(self.server.limits.heartbeat_interval_s / 4):
                if self._is_hung_up or self.connection.is_closed:
                    return
                self._beat()
            self._answer(answer.then, message, number)
        elif answer is Act.FREEZE:
            self._is_frozen = True
        elif answer is Act.HANG_UP:
            self.hang_up()
        elif isinstance(answer, Raw):
            self.send(answer.data)
        elif isinstance(answer, Cut):
            self.send(self._encoded(answer.value, number)[: answer.size_bytes])
            self.hang_up()
        elif answer is not Act.SILENCE:
            with self._lock:
                self._socket.sendall(self._encoded(answer, number))

    def _encoded(self, answer: Any, number: int) -> bytes:
        now = time.monotonic()
        if isinstance(answer, Exception):
            if number:
                return self.connection.failure(number, answer, now)
            return self.connection.refuse(answer, now)
        if number:
            return self.connection.reply(number, answer, now)
        fields = welcome(
            session=self.server.next_token(), last_tid=self.server.last_tid
        )
        return self.connection.welcome({**fields, **(answer or {})}, now)


class ScriptedServer:
    """Listens, and does what the script says."""

    def __init__(self, path: Path | None = None, limits: Limits = DEFAULT):
        self.limits = limits
        # What the default welcome says.
        self.last_tid = tid(1)
        # What to answer to the hello of a stream and of a channel: fields that differ
        # from `welcome`, an exception (a refusal), an Act, Held, Raw, Cut, or a
        # function without arguments that returns one of these.
        self.hello: Any = None
        self.channel_hello: Any = None
        # The same for methods; a function gets the arguments of the request.
        self.answers: dict[str, Any] = {
            # Nothing that the client did not know.
            "changes_since": lambda position: [position, []],
            # It never lost a transaction, and nothing was changed.
            "last_known": lambda tids: [max(tids, default=None), bytes(8)],
            "verify": lambda revisions: [self.last_tid, []],
        }
        # What came, in the order in which it came.
        self.hellos: list[dict[str, Any]] = []
        self.requests: list[tuple[str, list[Any]]] = []
        self.notices: list[tuple[str, list[Any]]] = []
        self.peers: list[ScriptedPeer] = []
        self.errors: list[BaseException] = []
        self.address: Any = ("127.0.0.1", 0) if path is None else str(path)
        self._tokens = itertools.count(1)
        self._first_token = 0
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None

    def start(self) -> None:
        if isinstance(self.address, str):
            Path(self.address).unlink(missing_ok=True)
            listener = socket.create_server(self.address, family=socket.AF_UNIX)
        else:
            listener = socket.create_server(self.address)
            self.address = listener.getsockname()
        self._listener = listener
        self._acceptor = threading.Thread(target=self._accept, args=(listener,))
        self._acceptor.start()

    def refuse(self) -> None:
        """Take no more connections, as if no process were there."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.shutdown(socket.SHUT_RDWR)
            assert self._acceptor is not None
            self._acceptor.join()
            listener.close()

    def close(self) -> None:
        self.refuse()
        peers = tuple(self.peers)
        for peer in peers:
            peer.hang_up()
        for peer in peers:
            peer.thread.join()
        if self.errors:
            raise self.errors[0]

    def die(self) -> None:
        """Take no more connections, and end those that are there."""
        self.refuse()
        self.lose_sessions()

    def lose_sessions(self) -> None:
        """End all connections; no channel joins a session of before."""
        self._first_token = next(self._tokens)
        for peer in tuple(self.peers):
            peer.hang_up()

    def next_token(self) -> bytes:
        return next(self._tokens).to_bytes(16, "big")

    def has_forgotten(self, hello: dict[str, Any]) -> bool:
        """Whether the channel is of a session that was lost."""
        return int.from_bytes(hello["session"] or b"\xff", "big") < self._first_token

    def streams(self) -> list[ScriptedPeer]:
        return self._of_kind(SocketKind.STREAM)

    def channels(self) -> list[ScriptedPeer]:
        return self._of_kind(SocketKind.CHANNEL)

    def publish(self, *changes: Any) -> None:
        """Send changes over every stream."""
        for stream in self.streams():
            stream.notice("changes", list(changes))

    def asked(self, method: str) -> list[list[Any]]:
        """The arguments of the requests for `method`."""
        return [args for name, args in tuple(self.requests) if name == method]

    def wait_for(self, method: str, times: int = 1) -> None:
        """Return when `method` was asked that many times."""
        wait_until(lambda: len(self.asked(method)) >= times, f"a request for {method}")

    def _of_kind(self, kind: SocketKind) -> list[ScriptedPeer]:
        return [
            peer
            for peer in tuple(self.peers)
            if peer.connection.kind is kind and peer.connection.is_open
        ]

    def _accept(self, listener: socket.socket) -> None:
        # Ends with an error when `refuse` shuts the listener down.
        with suppress(OSError):
            while True:
                sock, _address = listener.accept()
                peer = ScriptedPeer(self, sock)
                self.peers.append(peer)
                peer.thread.start()


@contextmanager
def scripted(
    path: Path | None = None, limits: Limits = DEFAULT, **script: Any
) -> Iterator[ScriptedServer]:
    """A running scripted server; `script` sets its attributes."""
    server = ScriptedServer(path, limits)
    for name, value in script.items():
        assert hasattr(server, name), name
        setattr(server, name, value)
    server.start()
    try:
        yield server
    finally:
        server.close()


def refused_address() -> tuple[str, int]:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
    return host, port
