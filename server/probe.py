"""Asking a server one thing, from the command line.

A plain blocking socket and a channel without a session: what ``zeolith ping`` and
``zeolith status`` need, and no more.
"""

import socket
import ssl
import time
from typing import Any

from zeolith.protocol import errors
from zeolith.protocol.addresses import Address, format_address
from zeolith.protocol.connection import Connection, Role
from zeolith.protocol.login import NO_CREDENTIALS, Credentials, Login
from zeolith.protocol.messages import Challenge, Failure, Message, Reply, Welcome
from zeolith.protocol.methods import hello_fields
from zeolith.protocol.tls import ClientTls, explained

_RECEIVE_BYTES = 65536


class NoAnswer(Exception):
    """The server did not answer; the text is one line that says why."""


def ask(
    address: Address,
    method: str,
    timeout_s: float,
    tls: ClientTls | None = None,
    credentials: Credentials = NO_CREDENTIALS,
) -> Any:
    """The value of ``method``, which needs no session; raises NoAnswer."""
    try:
        with connected(address, timeout_s, tls) as sock:
            return _Dialogue(sock, timeout_s).ask(method, credentials.login(sock))
    except TimeoutError as error:
        raise NoAnswer(
            f"{format_address(address)} does not answer within {timeout_s:g} s"
        ) from error
    except (OSError, errors.ZeolithError) as error:
        raise NoAnswer(f"{format_address(address)}: {reason_of(error)}") from error


def connected(
    address: Address, timeout_s: float, tls: ClientTls | None = None
) -> socket.socket:
    """A socket that is connected to ``address``; raises OSError.

    With ``tls`` it is encrypted, but for a Unix socket.
    """
    if isinstance(address, str):
        sock = socket.socket(socket.AF_UNIX)
    else:
        sock = socket.create_connection(address, timeout_s)
    try:
        sock.settimeout(timeout_s)
        if isinstance(address, str):
            sock.connect(address)
        elif tls is not None:
            encrypted = tls.wrap(sock, address[0])
            sock = encrypted
            encrypted.do_handshake()
    except BaseException:
        sock.close()
        raise
    return sock


def reason_of(error: Exception) -> object:
    """Why there is no answer, for a person."""
    if isinstance(error, ssl.SSLError):
        return explained(error)
    return getattr(error, "strerror", None) or error


class _Dialogue:
    """One conversation over a connected socket."""

    def __init__(self, sock: socket.socket, timeout_s: float):
        self._socket = sock
        self._deadline = time.monotonic() + timeout_s
        self._connection = Connection(Role.CLIENT, time.monotonic())

    def ask(self, method: str, login: Login) -> Any:
        hello = hello_fields(kind="channel", read_only=True, login=login.hello_login())
        self._socket.sendall(self._connection.hello(hello, time.monotonic()))
        answer = self._receive(Welcome, Challenge)
        if isinstance(answer, Challenge):
            response = login.respond(answer.text)
            self._socket.sendall(self._connection.respond(response, time.monotonic()))
            answer = self._receive(Welcome)
        assert isinstance(answer, Welcome)
        login.check_welcome(answer.fields)
        self._socket.sendall(self._connection.request(method, [], time.monotonic()))
        answer = self._receive(Reply)
        assert isinstance(answer, Reply)
        return answer.value

    def _receive(self, *wanted: type[Message]) -> Message:
        while True:
            self._socket.settimeout(max(0.001, self._deadline - time.monotonic()))
            data = self._socket.recv(_RECEIVE_BYTES)
            if not data:
                raise errors.RemoteProtocolError("the connection was closed")
            for message in self._connection.receive_data(data, time.monotonic()):
                if type(message) in wanted:
                    return message
                if isinstance(message, Failure):
                    raise errors.error_of(
                        message.name, message.attributes, message.text
                    )
            if self._connection.is_closed:
                raise self._connection.error or errors.RemoteProtocolError("closed")
