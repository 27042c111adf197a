"""What reads bytes of others without a disk: each target is a function of bytes.

A target returns, whatever the bytes are; an exception is what a fuzzer looks for.
"""

import asyncio
import pickle
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from BTrees.IIBTree import IISet
from BTrees.Length import Length
from BTrees.LOBTree import LOBTree
from BTrees.OOBTree import OOBTree, OOBucket

from zeolith.client.cache_trace import blocks
from zeolith.client.extensions import load_extension
from zeolith.client.record_class import class_of, is_blob_record
from zeolith.protocol.codec import decode, encode
from zeolith.protocol.connection import (
    RECEIVING,
    SENDING,
    Connection,
    Role,
    SocketKind,
    State,
)
from zeolith.protocol.errors import LocalProtocolError, RemoteProtocolError
from zeolith.protocol.frames import PREFIX_BYTES
from zeolith.protocol.methods import METHODS, Kind
from zeolith.protocol.references import link_of
from zeolith.storage import index
from zeolith.storage.conflicts import (
    Quickly,
    TakesLong,
    Unresolvable,
    class_alone,
    resolve,
)
from zeolith.storage.wrapping import PLAIN

from ..support.memory import UNHURRIED, MemoryClient, hello_fields
from ..support.model import ModelServer
from ..support.pair import Pair
from .choices import Choices, pieces

Target = Callable[[bytes], None]
SMALL = replace(
    UNHURRIED,
    hello_frame_bytes_max=1000,
    frame_bytes_max=5000,
    batch_bytes_max=1000,
    requests_open_max=3,
    output_bytes_max=16 * 1024,
    lag_bytes_max=8 * 1024,
)
STATES = [State.OPENING, State.GREETED, State.STREAM, State.CHANNEL]


# The wire


def decoder(data: bytes) -> None:
    """One payload: a message, or a protocol error; a message can be said again."""
    message = error = None
    try:
        message = decode(data)
    except RemoteProtocolError as raised:
        error = raised
    assert error is None or len(str(error)) < 1000
    if message is not None:
        encode(message)


def server_connection(data: bytes) -> None:
    """What a server's end receives, in any state, in any pieces."""
    _receive(Role.SERVER, data)


def client_connection(data: bytes) -> None:
    """What a client's end receives, in any state, in any pieces."""
    _receive(Role.CLIENT, data)


def _receive(role: Role, data: bytes) -> None:
    end = _in_state(role, STATES[data[0] % len(STATES)] if data else State.OPENING)
    received_bytes = 0
    for piece in pieces(data[1:]):
        was_closed = end.is_closed
        received = end.receive_data(piece, 1.0)
        received_bytes += len(piece)
        check(end, received_bytes)
        assert not (was_closed and received), "received after the end"
    if end.is_closed:
        assert isinstance(end.error, Exception)
        kept = end._reader.have_bytes
        assert end.receive_data(encode_any(end), 2.0) == []
        assert end._reader.have_bytes == kept, "it keeps what it does not read"
        end.farewell()
    else:
        assert end.error is None


def check(end: Connection, received_bytes: int) -> None:
    """What holds after whatever was received."""
    limits = end.limits
    assert end.state in RECEIVING[end.role]
    assert end.state in SENDING[end.role]
    assert len(end.open_requests) <= limits.requests_open_max
    largest = max(limits.frame_bytes_max, limits.hello_frame_bytes_max)
    have_bytes = end._reader.have_bytes
    assert have_bytes <= received_bytes
    if not end.is_closed:
        assert have_bytes < PREFIX_BYTES + largest
    assert have_bytes == sum(map(len, end._reader._fragments))


def encode_any(end: Connection) -> bytes:
    """A frame that was all right a moment ago."""
    pair = Pair(SMALL)
    return pair.client.hello(hello_fields(), 0.0)


def _in_state(role: Role, state: State) -> Connection:
    pair = Pair(SMALL)
    end = pair.client if role is Role.CLIENT else pair.server
    if state is State.GREETED:
        pair.deliver(pair.client, pair.client.hello(hello_fields(), 0.0))
    elif state is not State.OPENING:
        kind = SocketKind.STREAM if state is State.STREAM else SocketKind.CHANNEL
        pair.greet(kind.value)
        if role is Role.CLIENT and state is State.CHANNEL:
            pair.client.request("load", [bytes(8), b"\xff" * 8], 0.0)
            pair.client.request("ping", [], 0.0)
    return end


# The server behind it

_METHODS = sorted(METHODS)


class _Sessions:
    """A server that is used by one input after the other."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(self._heard)
        self._errors: list[str] = []
        self._server: ModelServer

    def _heard(self, _loop: Any, context: dict[str, Any]) -> None:
        self._errors.append(str(context))

    def feed(self, data: bytes) -> None:
        self._loop.run_until_complete(self._feed(data))
        assert not self._errors, self._errors

    async def _feed(self, data: bytes) -> None:
        self._server = ModelServer(limits=SMALL)
        self._server.commit(bytes(8), b"data")
        choices = Choices(data)
        stream = MemoryClient(self._server.service, SMALL)
        stream.hello(read_only=bool(choices.number() & 1))
        token = next(iter(self._server.service.sessions), bytes(16))
        channel = MemoryClient(self._server.service, SMALL)
        channel.hello(kind="channel", session=token)
        while choices:
            await self._step(choices, stream if choices.number() & 1 else channel)
        await self._work()
        for each in (stream, channel):
            assert len(each.peer.connection.open_requests) <= SMALL.requests_open_max
            unread = each.transport.get_write_buffer_size()
            assert unread <= SMALL.output_bytes_max + SMALL.frame_bytes_max
            await each.lose()
        other = MemoryClient(self._server.service, SMALL)
        other.hello()
        assert other.peer.connection.is_open, "somebody else is harmed"
        await other.lose()
        await self._work()
        assert not self._server.service.peers

    async def _step(self, choices: Choices, client: MemoryClient) -> None:
        kind = choices.number() % 4
        if kind == 0:
            client.send(choices.some(choices.number()))
        elif kind == 1:
            await self._work()
        else:
            name = _METHODS[choices.number() % len(_METHODS)]
            args = [_argument(kind, choices) for _, kind in METHODS[name].arguments]
            say = client.ask if METHODS[name].answers else client.tell
            # The client's end knows that it is over.
            if client.connection.is_open and not client.transport.is_closing():
                _unless_forbidden(say, name, args)

    async def _work(self) -> None:
        """Let the workers do all that they have got, and all who wait go on."""
        # What waits for one of them may want another then.
        for _ in range(3):
            await self._server.workers.work()
            await asyncio.sleep(0)


def _unless_forbidden(say: Callable[..., Any], name: str, args: list[Any]) -> None:
    try:
        say(name, *args)
    except LocalProtocolError:
        # On a stream nothing is asked; what is would be raw bytes, above.
        return


# One of a few, so that two calls may be about the same.
_FEW = {
    "oid": 8,
    "tid": 8,
    "transaction id": 16,
    "token": 16,
}


def _argument(kind: Kind, choices: Choices) -> Any:
    """A value that the method takes; sometimes any."""
    if choices.number() > 240:
        return _value(choices)
    return _of(kind.name, choices)


def _of(name: str, choices: Choices) -> Any:
    if name.endswith(" or nil"):
        wants = choices.number() & 1
        return _of(name.removesuffix(" or nil"), choices) if wants else None
    if name.startswith("list of "):
        inner = name.removeprefix("list of ")
        return [_of(inner, choices) for _ in range(choices.number() % 5)]
    if name in _FEW:
        return (choices.number() % 4).to_bytes(_FEW[name], "big")
    if name == "operation":
        oid, tid = _of("oid", choices), _of("tid", choices)
        data = choices.some(choices.number() % 20)
        forms = (["store", oid, tid, data], ["check", oid, tid], ["undo", tid])
        return list(forms[choices.number() % 3])
    if name == "metadata":
        texts = [choices.some(choices.number() % 9) for _ in range(3)]
        return [*texts, _of("tid or nil", choices), " "]
    if name in ("[oid, tid]", "[oid, bytes]"):
        second = name.strip("[]").split(", ")[1]
        return [_of("oid", choices), _of(second, choices)]
    simple = {
        "bytes": lambda: choices.some(choices.number() % 40),
        "text": lambda: choices.some(choices.number() % 20).decode("latin-1"),
        "count": lambda: choices.number(choices.number() % 9),
        "bool": lambda: bool(choices.number() & 1),
        "time": lambda: choices.number(4),
    }
    return simple[name]() if name in simple else _value(choices)


def _value(choices: Choices) -> Any:
    kind = choices.number()
    if kind < 40:
        return choices.some(8).ljust(8, b"\0")
    if kind < 60:
        return choices.some(16).ljust(16, b"\0")
    if kind < 80:
        return choices.number(kind % 9)
    if kind < 100:
        return [_value(choices) for _ in range(kind % 5)]
    if kind < 110:
        return None
    if kind < 120:
        return choices.some(kind % 11).decode("latin-1")
    if kind < 130:
        return bool(kind & 1)
    if kind < 150:
        names = ("store", "check", "undo", "delete", "restore", "store_blob")
        size = choices.number() % 6
        return [names[kind % len(names)], *(_value(choices) for _ in range(size))]
    return choices.some(kind - 150)


_sessions: list[_Sessions] = []


def session(data: bytes) -> None:
    """A stream and a channel of a server: any calls, any bytes between them."""
    if not _sessions:
        _sessions.append(_Sessions())
    _sessions[0].feed(data)


# Pickles of others

_CLASSES = [
    pickle.dumps(of_class, 3)
    for of_class in (OOBucket, OOBTree, LOBTree, IISet, Length)
]


def conflict(data: bytes) -> None:
    """Three states of a class that the server knows, or three records."""
    choices = Choices(data)
    first = choices.number()
    sizes = choices.number(), choices.number()
    head = _CLASSES[first % len(_CLASSES)] + b"\x80\x03" if first & 128 else b""
    records = [head + choices.some(size) for size in sizes]
    records.append(head + choices.rest())
    with suppress(Unresolvable):
        assert type(resolve(*records)) is bytes
    with suppress(Unresolvable, TakesLong):
        assert type(Quickly()(PLAIN, *records)) is bytes
    class_alone(data)


def extension(data: bytes) -> None:
    """The extension of a transaction; nothing but plain values comes of it."""
    _try(load_extension, data)


def record(data: bytes) -> None:
    """A record that is looked at for its class and its references."""
    assert class_of(data).isprintable()
    is_blob_record(data)
    link_of(data)


# Files that are only read


def trace(data: bytes) -> None:
    """A trace of a cache: blocks that are whole, and the rest left out."""
    with _file(data) as path:
        for block in blocks(path):
            assert len(list(block.events())) == block.event_count


def saved_index(data: bytes) -> None:
    """The index of a Data.fs; its owner catches whatever it raises."""
    if b"r" in data or b"p" in data:
        # Whoever writes the server's own file may take its memory: the unpickler in C
        # makes its memo as large as a pickle says.
        return
    with _file(data) as path:
        _try(index.load, path)


def _try(load: Callable[[Any], Any], argument: Any) -> None:
    """Call what may raise whatever a damaged pickle does, but nothing worse."""
    failed: Exception | None = None
    try:
        load(argument)
    except Exception as error:
        failed = error
    assert not isinstance(failed, SystemError), failed


class _file:
    def __init__(self, data: bytes):
        self._file = tempfile.NamedTemporaryFile(suffix=".fuzz")  # noqa: SIM115
        self._file.write(data)
        self._file.flush()

    def __enter__(self) -> Path:
        return Path(self._file.name)

    def __exit__(self, *_exc_info: object) -> None:
        self._file.close()
