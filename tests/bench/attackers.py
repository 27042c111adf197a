"""What attackers do, as sockets see it; attack.py measures what others notice of it.

A script is a generator for one socket: it yields what to say next, and gets what was
heard since. When it ends, or the server hangs up, the next socket begins it anew. A
``Crowd`` plays one script on many sockets at once, as fast as the server lets it; it
runs in a process of its own, on its one thread.
"""

import random
import select
import socket
import ssl
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import msgpack

from zeolith.protocol.codec import decode, encode
from zeolith.protocol.connection import HEARTBEAT
from zeolith.protocol.frames import FrameReader, frame
from zeolith.protocol.limits import DEFAULT
from zeolith.protocol.messages import (
    Challenge,
    Hello,
    Message,
    Notice,
    Request,
    Response,
    Welcome,
)
from zeolith.protocol.methods import METHODS, hello_fields

NEVER = b"\x7f" + b"\xff" * 7
# Sent before the first of them is answered, and how many of these at a time.
WINDOW = DEFAULT.requests_open_max
BATCH = WINDOW // 2
RECEIVE_BYTES = 256 * 1024
PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class Target:
    """The server, and what the attacker knows."""

    address: tuple[str, int]
    # Of one who may read.
    token: str
    oids: list[bytes]


@dataclass(frozen=True, slots=True)
class Say:
    """Send ``data``, and go on when so many frames were heard in all, or anything."""

    data: bytes
    frames: int = 0
    anything: bool = False
    # There is nothing more to say: the server will hang up.
    is_last: bool = False
    # The same, and it hears nothing any more.
    is_deaf: bool = False


Script = Generator[Say, list[bytes], None]


@dataclass(frozen=True, slots=True)
class Attack:
    """A script, and on how many sockets it is played at once."""

    key: str
    title: str
    script: Callable[["Visit"], Script]
    sockets: int = 1
    # Whether it is played against the server that has TLS.
    is_encrypted: bool = False
    # Whether each socket says something only now and then.
    is_slow: bool = False


class Visit:
    """What the scripts of one attack share: a session of one who may read."""

    def __init__(self, target: Target):
        self.target = target
        self._stream: socket.socket | None = None
        self._session: bytes | None = None
        self.turn = 0

    def hello(self) -> bytes:
        """What a channel of the session says first."""
        if self._session is None:
            self._session = self._begin()
        return encode(Hello(hello_fields(kind="channel", session=self._session)))

    def some_oids(self, count: int) -> list[bytes]:
        """Others each time."""
        return random.sample(self.target.oids, count)

    def _begin(self) -> bytes:
        login = ["token", self.target.token]
        hello = hello_fields(kind="stream", storage="1", login=login, read_only=True)
        self._stream = socket.create_connection(self.target.address, PATIENCE_S)
        self._stream.sendall(encode(Hello(hello)))
        frames = FrameReader(2**31)
        while not (heard := frames.feed(self._stream.recv(RECEIVE_BYTES))):
            pass
        welcome = decode(heard[0])
        assert isinstance(welcome, Welcome), welcome
        return welcome.fields["session"]

    def close(self) -> None:
        """End the session."""
        if self._stream is not None:
            self._stream.close()


def requests(first: int, count: int, method: str, args: list[Any]) -> bytes:
    """Frames of as many requests, whose numbers begin with ``first``."""
    rest = msgpack.packb(method) + msgpack.packb(args)
    length = (7 + len(rest)).to_bytes(4, "big")
    head = length + b"\x94\x02\xce"
    return b"".join(
        head + number.to_bytes(4, "big") + rest
        for number in range(first, first + count)
    )


# Scripts


def flood(method: str, *args: Any) -> Callable[[Visit], Script]:
    """As many open requests as the server takes, and one for each answer."""

    def script(visit: Visit) -> Script:
        yield Say(visit.hello(), 1)
        sent = 0
        while True:
            data = requests(sent + 1, BATCH, method, list(args))
            sent += BATCH
            # The first frame was the welcome.
            yield Say(data, 1 + sent - BATCH)

    return script


def load_flood(visit: Visit) -> Script:
    """Loads, of other objects each time."""
    yield Say(visit.hello(), 1)
    sent = 0
    while True:
        data = b"".join(
            requests(sent + number + 1, 1, "load", [oid, NEVER])
            for number, oid in enumerate(visit.some_oids(BATCH))
        )
        sent += BATCH
        yield Say(data, 1 + sent - BATCH)


def one_load_at_a_time(visit: Visit) -> Script:
    """What a reader in a hurry does, and any client."""
    yield Say(visit.hello(), 1)
    for number, oid in enumerate(cycle(visit.some_oids(BATCH)), 1):
        yield Say(requests(number, 1, "load", [oid, NEVER]), 1 + number)


def many_flood(method: str, count: int, *args: Any) -> Callable[[Visit], Script]:
    """Requests for many objects each."""

    def script(visit: Visit) -> Script:
        yield Say(visit.hello(), 1)
        sent = 0
        while True:
            oids = visit.some_oids(count)
            data = requests(sent + 1, BATCH, method, [oids, *args])
            sent += BATCH
            yield Say(data, 1 + sent - BATCH)

    return script


def verify_flood(visit: Visit) -> Script:
    """Whether a thousand revisions are current, as often as may be."""
    revisions = [[oid, bytes(8)] for oid in visit.some_oids(DEFAULT.verify_max)]
    yield from flood("verify", revisions)(visit)


def each_method(visit: Visit) -> Script:
    """Whatever there is, as nobody and as one who may read."""
    visit.turn += 1
    if visit.turn % 2:
        yield Say(encode(Hello(hello_fields(kind="channel"))), 1)
    else:
        yield Say(visit.hello(), 1)
    oid = visit.target.oids[0]
    names = sorted(name for name, each in METHODS.items() if each.sender == "client")
    # A notice ends the socket: another one each time, and nothing behind it.
    names = names[visit.turn % len(names) :] + names[: visit.turn % len(names)]
    for number, name in enumerate(names, 1):
        args = [ARGUMENTS[kind.name](oid) for _name, kind in METHODS[name].arguments]
        answers = METHODS[name].answers
        message: Message = (
            Request(number, name, args) if answers else Notice(name, args)
        )
        yield Say(encode(message), 1 + number)


ARGUMENTS: dict[str, Callable[[bytes], Any]] = {
    "oid": lambda oid: oid,
    "tid": lambda oid: NEVER,
    "list of oid": lambda oid: [oid],
    "list of tid": lambda oid: [NEVER],
    "list of [oid, tid]": lambda oid: [[oid, NEVER]],
    "list of operation": lambda oid: [["store", oid, NEVER, b"no"]],
    "list of [oid, bytes]": lambda oid: [[oid, b"no"]],
    "count": lambda oid: 100,
    "bytes": lambda oid: b"no",
    "time": lambda oid: 0,
    "metadata": lambda oid: [b"", b"", b"", None, " "],
    "transaction id": lambda oid: b"t" * 16,
    "tid or nil": lambda oid: None,
    "oid or nil": lambda oid: None,
    "bytes or nil": lambda oid: None,
    "bool or nil": lambda oid: None,
}


def garbage(visit: Visit) -> Script:
    """Bytes that are no hello, from one socket after the other."""
    visit.turn += 1
    yield Say(_GARBAGE[visit.turn % len(_GARBAGE)], anything=True)


_GARBAGE = [
    frame(bytes(range(256))),
    b"GET / HTTP/1.1\r\n\r\n" * 10,
    frame(b"\x92\x00\x80"),
    frame(b"\xdd\0\0\x10\0" * 1000),
    frame(b"\x91" * 7000 + b"\xc0"),
    encode(Request(1, "ping", [])),
]


def oversized(visit: Visit) -> Script:
    """Lengths that are too long, before the hello and behind the welcome."""
    visit.turn += 1
    if visit.turn % 2:
        yield Say(visit.hello(), 1)
    yield Say(b"\xff\xff\xff\xff" + bytes(16_000), is_last=True)


def heartbeats(visit: Visit) -> Script:
    """Signs of life until the server has heard enough of them."""
    yield Say(visit.hello(), 1)
    while True:
        yield Say(HEARTBEAT * 1000)


def large(payload: bytes) -> Callable[[Visit], Script]:
    """A frame that is within all limits, and no message."""

    def script(visit: Visit) -> Script:
        yield Say(visit.hello(), 1)
        yield Say(frame(payload), is_last=True)

    return script


def _tiny_values() -> bytes:
    """A request with an array of arrays of nothing, of some 20 MB."""
    inner = b"\xdd" + (100_000).to_bytes(4, "big") + b"\x90" * 100_000
    return b"\x94\x02\x01\xa4ping" + b"\xdc\x00\xc8" + inner * 200


def _nested() -> bytes:
    """Heads of arrays of 100,000 elements each, one in the other, 1000 deep."""
    return (b"\xdd" + (100_000).to_bytes(4, "big")) * 1000


def slowloris(visit: Visit) -> Script:
    """A hello of which a byte comes now and then."""
    hello = encode(Hello(hello_fields(kind="channel")))
    for at in range(len(hello)):
        yield Say(hello[at : at + 1])


def failing_login(visit: Visit) -> Script:
    """A password that is guessed; the refusal is not waited for."""
    nonce = f"{random.getrandbits(80):x}"
    login = ["scram", f"n,,n=ann,r={nonce}"]
    hello = hello_fields(kind="stream", storage="1", login=login)
    (challenge,) = yield Say(encode(Hello(hello)), 1)
    message = decode(challenge)
    assert isinstance(message, Challenge), message
    theirs = message.text.split(",")[0]
    guess = "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVphYmNkZWY="
    yield Say(encode(Response(f"c=biws,{theirs},p={guess}")))


def handshake(visit: Visit) -> Script:
    """The first message of TLS; the server's answer is not used for anything."""
    yield Say(_client_hello(), anything=True)


_hellos: list[bytes] = []


def _client_hello() -> bytes:
    # The same again costs the attacker nothing, and the server as much.
    if not _hellos:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        outgoing = ssl.MemoryBIO()
        tls = context.wrap_bio(ssl.MemoryBIO(), outgoing)
        with suppress(ssl.SSLWantReadError):
            tls.do_handshake()
        _hellos.append(outgoing.read())
    return _hellos[0]


def deaf(visit: Visit) -> Script:
    """Asks for megabytes, and reads nothing."""
    yield Say(visit.hello(), 1)
    oids = visit.some_oids(400)
    yield Say(requests(1, WINDOW, "load_many", [oids, NEVER]), is_deaf=True)


ATTACKS = [
    Attack("methods", "every method, as nobody and as a reader", each_method, 10),
    Attack("garbage", "garbage, and again", garbage, 10),
    Attack("oversized", "frames beyond the limit, and again", oversized, 10),
    Attack("heartbeats", "heartbeats without end, and again", heartbeats, 10),
    Attack("ping", "pings on 1 socket", flood("ping")),
    Attack("ping-100", "pings on 100 sockets", flood("ping"), 100),
    Attack("load", "loads on 1 socket", load_flood),
    Attack("load-100", "loads on 100 sockets", load_flood, 100),
    Attack("readers", "one load at a time, 10 sockets", one_load_at_a_time, 10),
    Attack("readers-100", "the same on 100 sockets", one_load_at_a_time, 100),
    Attack("load-many", "load_many of 400", many_flood("load_many", 400, NEVER), 10),
    Attack(
        "ahead",
        "load_ahead of 150",
        many_flood("load_ahead", 150, NEVER, 150, 2**20),
        10,
    ),
    Attack("verify", "verify of 1000", verify_flood),
    Attack("history", "history", flood("history", bytes(8), 1000)),
    Attack("undo-log", "undo_log of 1000", flood("undo_log", None, 1000)),
    Attack("records", "records", flood("records", None)),
    Attack("transactions", "transactions", flood("transactions", None, None, None)),
    Attack("tiny", "20 MB of empty arrays in a frame", large(_tiny_values())),
    Attack("nested", "arrays in arrays, 5 KB", large(_nested()), 10),
    Attack("deaf", "answers that are not read", deaf, 10),
    Attack("slowloris", "a thousand slow hellos", slowloris, 1000, is_slow=True),
    Attack("login", "passwords guessed", failing_login, 100),
    Attack("handshake", "handshakes of TLS given up", handshake, 10, is_encrypted=True),
]


class Line:
    """One socket, and where its script is."""

    def __init__(self, crowd: "Crowd"):
        self._crowd = crowd
        self._script = crowd.attack.script(crowd.visit)
        self._frames = FrameReader(2**31)
        self._heard: list[bytes] = []
        # How many frames have come.
        self._count = 0
        self._has_heard = self._has_begun = False
        self._unsent = b""
        self._say = Say(b"")
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.connect_ex(crowd.visit.target.address)

    def use(self, events: int) -> bool:
        """Go on as far as the socket lets us; false when it is over."""
        try:
            if events & (select.EPOLLHUP | select.EPOLLERR):
                return False
            if events & select.EPOLLIN and not self._receive():
                return False
            self._go_on()
        except (OSError, StopIteration):
            return False
        return True

    @property
    def wanted(self) -> int:
        """What to wait for."""
        wanted = 0 if self._say.is_deaf else select.EPOLLIN
        if self._unsent or not self._has_begun:
            wanted |= select.EPOLLOUT
        return wanted

    def _receive(self) -> bool:
        data = self.socket.recv(RECEIVE_BYTES)
        self._has_heard = True
        if data and not self._crowd.attack.is_encrypted:
            heard = self._frames.feed(data)
            self._count += len(heard)
            self._heard += heard
        return bool(data)

    def _go_on(self) -> None:
        while True:
            if self._unsent:
                with suppress(BlockingIOError):
                    self._unsent = self._unsent[self.socket.send(self._unsent) :]
            if self._unsent or (self._has_begun and not self._may_go_on):
                return
            if self._has_begun:
                heard, self._heard = self._heard, []
                self._has_heard = False
                self._say = self._script.send(heard)
            else:
                self._has_begun = True
                self._say = next(self._script)
            self._unsent = self._say.data
            self._crowd.said += 1
            if self._crowd.attack.is_slow:
                self.socket.send(self._unsent)
                self._unsent = b""
                return

    @property
    def _may_go_on(self) -> bool:
        say = self._say
        if say.is_last or say.is_deaf or (say.anything and not self._has_heard):
            return False
        return self._count >= say.frames


class Crowd:
    """All sockets of an attack, while it lasts."""

    def __init__(self, attack: Attack, target: Target):
        self.attack = attack
        self.visit = Visit(target)
        # How often something was said, and on how many sockets.
        self.said = self.connected = 0
        self._epoll = select.epoll()
        self._lines: dict[int, Line] = {}

    def play(self, is_over: Callable[[], bool]) -> None:
        """Attack until it is over."""
        for _ in range(self.attack.sockets):
            self._begin()
        while not is_over():
            for number, events in self._epoll.poll(0.01):
                self._use(number, events)
            if self.attack.is_slow:
                for number in random.sample(list(self._lines), 20):
                    self._use(number, 0)
        for line in self._lines.values():
            line.socket.close()
        self._epoll.close()
        self.visit.close()

    def _begin(self) -> None:
        line = Line(self)
        self.connected += 1
        self._lines[line.socket.fileno()] = line
        self._epoll.register(line.socket, line.wanted)

    def _use(self, number: int, events: int) -> None:
        line = self._lines[number]
        if line.use(events):
            self._epoll.modify(number, line.wanted)
            return
        del self._lines[number]
        line.socket.close()
        self._begin()
