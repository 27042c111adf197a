"""A client of the server's pieces without a socket: bytes go from list to list.

Everything happens on the test's own loop, when the test says so. The transport keeps
to asyncio's contract: after `close` it is closing at once and lost when everything
was read, after `abort` it is lost, and the protocol hears of it in a later step of
the loop. What the other end does not read stays in the buffer.
"""

import asyncio
import socket
from dataclasses import replace
from functools import partial
from typing import Any

from zeolith.protocol.connection import Connection, Role
from zeolith.protocol.limits import DEFAULT, Limits
from zeolith.protocol.login import Login
from zeolith.protocol.messages import (
    Challenge,
    Failure,
    Goodbye,
    Message,
    Notice,
    Reply,
    Welcome,
)
from zeolith.protocol.methods import VERSION
from zeolith.server.peer import Peer
from zeolith.server.service import Service

# The client has no bounds of its own: a test breaks the server's on purpose.
UNBOUNDED = Limits(frame_bytes_max=2**31)
# Whatever has come is looked at, however slow the machine: a test that says nothing
# else has its answers at once.
UNHURRIED = replace(DEFAULT, turn_s=3600.0, guest_burst_s=3600.0)


class MemoryTransport(asyncio.Transport):
    """The server's end of a socket of which the other end is a list."""

    def __init__(
        self,
        protocol: asyncio.Protocol,
        address: Any,
        sock: socket.socket | None = None,
    ):
        super().__init__({"peername": address, "socket": sock})
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._arrived: list[bytes] = []
        self._unread: list[bytes] = []
        self._is_read = True
        self._is_closing = False
        self._is_lost = False
        self._high = 64 * 1024
        self._is_full = False
        # Whether the protocol wants no more data.
        self.is_paused = False
        # How often `write` was called.
        self.writes = 0

    # For the protocol

    def write(self, data: Any) -> None:
        assert not self._is_closing, "written after the end"
        self.writes += 1
        (self._arrived if self._is_read else self._unread).append(bytes(data))
        if not self._is_full and self.get_write_buffer_size() > self._high:
            self._is_full = True
            self._protocol.pause_writing()

    def set_write_buffer_limits(
        self, high: int | None = None, low: int | None = None
    ) -> None:
        assert high is not None
        self._high = high

    def get_write_buffer_size(self) -> int:
        return sum(map(len, self._unread))

    def is_closing(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        if not self._is_closing:
            self._is_closing = True
            self._lose_when_read()

    def abort(self) -> None:
        self._is_closing = True
        self._unread.clear()
        self._lose_when_read()

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

    # For the test

    def stop_reading(self) -> None:
        """From now on the other end reads nothing."""
        self._is_read = False

    def read_on(self) -> None:
        """The other end reads what has come meanwhile, and goes on."""
        self._is_read = True
        self._drain()
        if self._is_closing:
            self._lose_when_read()

    def read_once(self) -> None:
        """The other end reads what has come, and no more."""
        self._drain()

    def take(self) -> bytes:
        """What the other end has read since the last time."""
        taken = b"".join(self._arrived)
        self._arrived.clear()
        return taken

    @property
    def is_lost(self) -> bool:
        """Whether the protocol was told that the connection is lost."""
        return self._is_lost

    def _drain(self) -> None:
        self._arrived += self._unread
        self._unread.clear()
        if self._is_full:
            self._is_full = False
            self._protocol.resume_writing()

    def _lose_when_read(self) -> None:
        if not self._unread:
            self._loop.call_soon(self._lose)

    def _lose(self) -> None:
        if not self._is_lost:
            self._is_lost = True
            self._protocol.connection_lost(None)


class MemoryClient:
    """The client's end of one socket: says what the test wants said."""

    def __init__(
        self,
        service: Service,
        limits: Limits = UNHURRIED,
        address: Any = ("192.0.2.7", 4567),
        sock: socket.socket | None = None,
    ):
        self._loop = asyncio.get_running_loop()
        self.peer = Peer(service, limits)
        self.transport = MemoryTransport(self.peer, address, sock)
        self.connection = Connection(Role.CLIENT, self._loop.time(), UNBOUNDED)
        # Everything that came and was not taken.
        self._received: list[Message] = []
        self.peer.connection_made(self.transport)

    def send(self, data: bytes) -> None:
        """Give the server bytes, whatever they are."""
        self.peer.data_received(data)

    def hello(self, **fields: Any) -> Welcome | Failure:
        """Introduce a stream, or what ``fields`` say; returns the answer."""
        self.send(self.connection.hello(hello_fields(**fields), self._loop.time()))
        answer = self.received()[0]
        assert isinstance(answer, Welcome | Failure)
        return answer

    def log_in(self, login: Login, **fields: Any) -> Message | None:
        """Introduce a stream with a login; the answer, or None if it is to come."""
        said = login.hello_login()
        hello = hello_fields(login=said, **fields)
        self.send(self.connection.hello(hello, self._loop.time()))
        received = self.received()
        if received and isinstance(received[0], Challenge):
            response = login.respond(received[0].text)
            self.send(self.connection.respond(response, self._loop.time()))
            received = self.received()
        if received and isinstance(received[0], Welcome):
            login.check_welcome(received[0].fields)
        return received[0] if received else None

    def ask(self, method: str, *args: Any) -> int:
        """Send a request; returns its number."""
        self.send(self.connection.request(method, list(args), self._loop.time()))
        return self.connection.last_request

    def tell(self, method: str, *args: Any) -> None:
        """Send a notice."""
        self.send(self.connection.notice(method, list(args), self._loop.time()))

    def received(self) -> list[Message]:
        """The messages that came since the last time."""
        self._receive()
        received, self._received = self._received, []
        return received

    def changes(self) -> list[list[Any]]:
        """The changes that came since the last time, one by one."""
        notices = [each for each in self.received() if isinstance(each, Notice)]
        return [change for notice in notices for change in notice.args[0]]

    def answer(self, number: int) -> Reply | Failure | None:
        """The answer to request ``number`` if it is here."""
        self._receive()
        for message in self._received:
            if isinstance(message, Reply | Failure) and message.id == number:
                self._received.remove(message)
                return message
        return None

    def value(self, number: int) -> Any:
        """What request ``number`` returned; it must have."""
        answer = self.answer(number)
        assert isinstance(answer, Reply), answer
        return answer.value

    def failure(self, number: int) -> Failure:
        """How request ``number`` failed; it must have."""
        answer = self.answer(number)
        assert isinstance(answer, Failure), answer
        return answer

    def goodbye(self) -> Goodbye:
        """The server's last words; it must have said some, and nothing after them."""
        *_before, last = self.received()
        assert isinstance(last, Goodbye), last
        return last

    async def lose(self) -> None:
        """The socket breaks."""
        self.transport.abort()
        await asyncio.sleep(0)

    def _receive(self) -> None:
        data = self.transport.take()
        self._received += self.connection.receive_data(data, self._loop.time())


def hello_fields(**fields: Any) -> dict[str, Any]:
    """The fields of a Hello: a stream of storage "1", if ``fields`` do not differ."""
    return {
        "version": VERSION,
        "capabilities": [],
        "kind": "stream",
        "storage": "1",
        "database_id": None,
        "epoch": None,
        "position": None,
        "read_only": False,
        "label": None,
        "session": None,
        "login": None,
        **fields,
    }


class MemorySession:
    """A stream that was welcomed, and channels that join it."""

    def __init__(self, service: Service, limits: Limits = UNHURRIED, **fields: Any):
        self._new_client = partial(MemoryClient, service, limits)
        self.stream = self._new_client()
        welcome = self.stream.hello(**fields)
        assert isinstance(welcome, Welcome), welcome
        self.welcome = welcome.fields

    def channel(self, sock: socket.socket | None = None) -> MemoryClient:
        """One more channel; ``sock`` is where other threads than the loop write."""
        channel = self._new_client(sock=sock)
        welcome = channel.hello(kind="channel", session=self.welcome["session"])
        assert isinstance(welcome, Welcome), welcome
        return channel
