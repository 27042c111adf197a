"""Reaching a server: addresses, the hello, and how long to wait before trying again.

Blocking calls, each bounded; used by the connector's thread, and by any thread for
one more channel of a session that is there already.
"""

import errno
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from queue import SimpleQueue
from typing import Any, NamedTuple

from zeolith.client.channel import Channel, is_silence, limit_silence
from zeolith.client.forks import shaking_hands
from zeolith.client.round_trip import RECEIVE_BYTES
from zeolith.protocol import errors
from zeolith.protocol.addresses import Address, format_address
from zeolith.protocol.connection import Connection, Role
from zeolith.protocol.limits import Limits
from zeolith.protocol.login import NO_CREDENTIALS, Credentials, Login
from zeolith.protocol.messages import Challenge, Failure, Message, Welcome
from zeolith.protocol.methods import hello_fields
from zeolith.protocol.tls import ClientTls, HandshakeFailed, explained

CONNECT_TIMEOUT_S = 5.0
RETRY_FIRST_S = 0.05
RETRY_MAX_S = 2.0
# After a login that failed.
LOCKED_OUT_S = 15.0
# Why this process, or its machine, can have no more sockets for now.
_NONE_LEFT = (
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOBUFS,
    errno.ENOMEM,
    errno.EADDRNOTAVAIL,
)


class TurnedAway(ConnectionResetError):
    """The server is there, and has no place for one more socket now."""


class Wish(NamedTuple):
    """What a client says of itself in the hello of a stream."""

    storage: str
    is_read_only: bool
    label: str | None
    database_id: bytes | None
    epoch: int | None
    position: bytes | None
    credentials: Credentials = NO_CREDENTIALS


class Resumption(NamedTuple):
    """How the next sockets to a server are encrypted, cheaper than the first one."""

    tls: ClientTls
    session: ssl.SSLSession | None = None


class Reached(NamedTuple):
    """A server that accepted the hello."""

    address: Address
    socket: socket.socket
    connection: Connection
    welcome: dict[str, Any]
    # What came right behind the welcome, in the same piece: the first changes.
    early: list[Message]
    # For its channels; None: they are plain.
    resumption: Resumption | None = None


def delays() -> Iterator[float]:
    """Seconds to wait before each new attempt: growing, bounded, never in step."""
    delay_s = RETRY_FIRST_S
    while True:
        yield delay_s * random.uniform(0.5, 1.0)
        delay_s = min(delay_s * 2, RETRY_MAX_S)


def is_refusal(error: BaseException | None) -> bool:
    """Whether trying again is of no use until somebody changes something.

    Whoever answers a hello with garbage is somebody else, or of another time.
    """
    if isinstance(error, errors.HelloRefused):
        return error.reason != "stopping"
    return isinstance(error, errors.RemoteProtocolError | HandshakeFailed)


def is_locked_out(error: BaseException) -> bool:
    """Whether the server knows us too well, or not at all: it must not be hurried."""
    return isinstance(error, errors.HelloRefused) and error.reason in (
        "access",
        "login",
    )


def has_no_place(error: BaseException) -> bool:
    """Whether the server has turned us away for one of its limits.

    By TLS it cannot say so, and just closes the socket in the handshake.
    """
    if isinstance(error, errors.HelloRefused):
        return error.reason == "limit"
    return isinstance(error, TurnedAway)


def has_none_left(error: BaseException) -> bool:
    """Whether it is here, not at the server, that there are no more sockets."""
    return isinstance(error, OSError) and error.errno in _NONE_LEFT


def dial_any(
    addresses: list[Address], wish: Wish, limits: Limits, tls: ClientTls | None = None
) -> Reached:
    """The first of ``addresses`` that accepts ``wish``; all are tried at once.

    Who is slower is not waited for; its thread ends when its dial does. Raises the
    error of the last one tried, a refusal before a mere absence.
    """
    if len(addresses) == 1:
        return dial(addresses[0], wish, limits, tls)
    arrivals: SimpleQueue[Reached | BaseException] = SimpleQueue()
    is_won = threading.Lock()

    def run(address: Address) -> None:
        try:
            reached = dial(address, wish, limits, tls)
        except BaseException as error:  # noqa: BLE001 - raised by the other thread
            arrivals.put(error)
        else:
            if is_won.acquire(blocking=False):
                arrivals.put(reached)
            else:
                reached.socket.close()

    for address in addresses:
        threading.Thread(
            target=run, args=(address,), name="zeolith-dial", daemon=True
        ).start()
    last: BaseException | None = None
    for _ in addresses:
        arrival = arrivals.get()
        if isinstance(arrival, Reached):
            return arrival
        if last is None or is_refusal(arrival):
            last = arrival
    assert last is not None
    raise last


def dial(
    address: Address, wish: Wish, limits: Limits, tls: ClientTls | None = None
) -> Reached:
    """Open a stream at ``address``; raises OSError or a ZeolithError.

    With ``tls`` it is encrypted, but for a Unix socket.
    """
    hello = hello_fields(
        kind="stream",
        storage=wish.storage,
        read_only=wish.is_read_only,
        label=wish.label,
        database_id=wish.database_id,
        epoch=wish.epoch,
        position=wish.position,
    )
    resumption = None if tls is None else Resumption(tls)
    return _greet(address, hello, limits, resumption, wish.credentials)


def dial_channel(
    address: Address,
    token: bytes,
    limits: Limits,
    resumption: Resumption | None = None,
) -> Channel:
    """Open one more channel of the session ``token``; raises as ``dial``."""
    hello = hello_fields(kind="channel", session=token)
    reached = _greet(address, hello, limits, resumption, NO_CREDENTIALS)
    limit_silence(reached.socket, limits.heartbeat_timeout_s)
    return Channel(reached.socket, reached.connection)


def _greet(
    address: Address,
    hello: dict[str, Any],
    limits: Limits,
    resumption: Resumption | None,
    credentials: Credentials,
) -> Reached:
    sock = _connect(address)
    is_secret = resumption is not None or credentials is not NO_CREDENTIALS
    with shaking_hands() if is_secret else nullcontext():
        return _introduce(sock, address, hello, limits, resumption, credentials)


def _introduce(
    sock: socket.socket,
    address: Address,
    hello: dict[str, Any],
    limits: Limits,
    resumption: Resumption | None,
    credentials: Credentials,
) -> Reached:
    """Say hello, with all that goes before; ``sock`` is closed if that fails."""
    try:
        connection = Connection(Role.CLIENT, time.monotonic(), limits)
        with _turned_away_without_a_word():
            if resumption is not None and not isinstance(address, str):
                sock = resumption.tls.wrap(sock, address[0], resumption.session)
            limit_silence(sock, limits.hello_timeout_s)
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
        login = credentials.login(sock)
        hello["login"] = login.hello_login()
        # Who is turned away before he has said hello may still read why.
        with suppress(ConnectionError):
            sock.sendall(connection.hello(hello, time.monotonic()))
        welcome, early = _await_welcome(sock, connection, login)
        if resumption is not None and isinstance(sock, ssl.SSLSocket):
            # Before a thread listens: the ticket came with the welcome at the latest.
            resumption = resumption._replace(session=sock.session)
        return Reached(address, sock, connection, welcome, early, resumption)
    except BaseException as error:
        sock.close()
        if isinstance(error, ssl.SSLError):
            raise explained(error) from error
        if isinstance(error, OSError) and is_silence(error):
            raise TimeoutError(
                f"{format_address(address)} did not answer the hello within"
                f" {limits.hello_timeout_s:g} s"
            ) from None
        raise


@contextmanager
def _turned_away_without_a_word() -> Iterator[None]:
    try:
        yield
    except (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
        raise TurnedAway(
            "the server closed the connection in the TLS handshake"
        ) from error


def _await_welcome(
    sock: socket.socket, connection: Connection, login: Login
) -> tuple[dict[str, Any], list[Message]]:
    while data := sock.recv(RECEIVE_BYTES):
        received = connection.receive_data(data, time.monotonic())
        if received:
            first = received[0]
            if isinstance(first, Challenge):
                response = login.respond(first.text)
                sock.sendall(connection.respond(response, time.monotonic()))
            if isinstance(first, Welcome):
                login.check_welcome(first.fields)
                return first.fields, received[1:]
            if isinstance(first, Failure):
                raise errors.error_of(first.name, first.attributes, first.text)
        goodbye = connection.goodbye_rcvd
        if goodbye is not None:
            is_limit = goodbye.reason == "limit"
            kind = TurnedAway if is_limit else ConnectionResetError
            raise kind(f"{goodbye.reason}: {goodbye.text}")
        if connection.is_closed:
            raise connection.error or errors.RemoteProtocolError("no welcome")
    raise ConnectionResetError("the server closed the connection at the hello")


def _connect(address: Address) -> socket.socket:
    if isinstance(address, str):
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(CONNECT_TIMEOUT_S)
            sock.connect(address)
        except BaseException:
            sock.close()
            raise
        return sock
    sock = socket.create_connection(address, CONNECT_TIMEOUT_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return sock
