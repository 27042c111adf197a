"""The two ends of one socket, without the socket: what one says, the other hears.

A Pair is a link that delivers in pieces of any size, as TCP does. ``cut`` makes the
pieces; tests that have bytes of their own to deliver use it too.
"""

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any

from zeolith.protocol.connection import Connection, Role
from zeolith.protocol.limits import DEFAULT, Limits
from zeolith.protocol.messages import Message
from zeolith.protocol.methods import VERSION

# The whole of what is sent in one piece.
WHOLE = (2**31,)


def cut(data: bytes, sizes: Sequence[int]) -> Iterator[bytes]:
    """`data` in pieces of `sizes`, over and over; sizes are greater than 0."""
    position = 0
    for size in cycle(sizes):
        if position >= len(data):
            return
        yield data[position : position + size]
        position += size


def hello_fields(kind: str = "channel", **others: Any) -> dict[str, Any]:
    """The fields of a Hello that the protocol accepts."""
    return {
        "version": VERSION,
        "capabilities": [],
        "kind": kind,
        "storage": "1",
        "database_id": None,
        "epoch": None,
        "position": None,
        "read_only": False,
        "label": None,
        "session": None,
        "login": None,
        **others,
    }


def welcome_fields(**others: Any) -> dict[str, Any]:
    """The fields of a Welcome that the protocol accepts."""
    return {
        "version": VERSION,
        "capabilities": [],
        "session": b"s" * 16,
        "database_id": b"d" * 16,
        "epoch": 1,
        "last_tid": bytes(8),
        "changes": [],
        "size": 0,
        "length": 0,
        "name": "1",
        "interfaces": [],
        "supports_undo": False,
        "read_only": False,
        "roles": ["admin"],
        "proof": None,
        **others,
    }


class Pair:
    """A client's and a server's Connection, and the time that both see."""

    def __init__(
        self,
        limits: Limits = DEFAULT,
        *,
        server_limits: Limits | None = None,
        sizes: Sequence[int] = WHOLE,
    ):
        self.now = 0.0
        # In which pieces bytes arrive; may be set at any time.
        self.sizes = sizes
        self.client = Connection(Role.CLIENT, self.now, limits)
        self.server = Connection(Role.SERVER, self.now, server_limits or limits)

    def other(self, end: Connection) -> Connection:
        """The end that `end` talks to."""
        return self.client if end is self.server else self.server

    def deliver(self, sender: Connection, data: bytes) -> list[Message]:
        """What the other end makes of `data`; pieces arrive until it hangs up."""
        receiver = self.other(sender)
        received = []
        for piece in cut(data, self.sizes):
            received += receiver.receive_data(piece, self.now)
        return received

    def greet(self, kind: str = "channel") -> None:
        """Exchange Hello and Welcome."""
        hello = self.client.hello(hello_fields(kind), self.now)
        assert len(self.deliver(self.client, hello)) == 1
        welcome = self.server.welcome(welcome_fields(), self.now)
        assert len(self.deliver(self.server, welcome)) == 1
        assert self.client.is_open
        assert self.server.is_open

    def ask(self, method: str, *args: Any) -> list[Message]:
        """The client's request as the server hears it."""
        sent = self.client.request(method, list(args), self.now)
        return self.deliver(self.client, sent)
