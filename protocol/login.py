"""Proving who a client is: the client's side of a login, without a socket.

Used by whoever says hello, in the thread that connects: the client's own and that of
the commands. A ``Login`` is one attempt; ``hello_login`` goes into the hello,
``respond`` answers the server's challenge, ``check_welcome`` sees to it that the
server knew the password, too. Credentials are asked for their secret at each attempt,
so one that was changed in its file is used at the next; no repr and no error shows it.
"""

import socket
import ssl
from abc import ABC, abstractmethod
from ipaddress import ip_address
from typing import Any

from zeolith.protocol.errors import HelloRefused, RemoteProtocolError

TOKEN, SCRAM = "token", "scram"
MECHANISM = "SCRAM-SHA-256"
# With it, who can listen and speak between client and server gains nothing.
BOUND_MECHANISM = "SCRAM-SHA-256-PLUS"
BINDING_NAME = "tls-server-end-point"


class LoginError(HelloRefused):
    """A login that cannot succeed; raised before anything secret was sent."""

    def __init__(self, text: str):
        super().__init__("login", text)


class Login(ABC):
    """One attempt to log in."""

    @abstractmethod
    def hello_login(self) -> list[str] | None:
        """The field ``login`` of the hello."""

    def respond(self, challenge: str) -> str:
        """The response to ``challenge``; raises RemoteProtocolError if it is none."""
        raise RemoteProtocolError("a challenge to a client that has nothing to prove")

    def check_welcome(self, welcome: dict[str, Any]) -> None:
        """Raise LoginError unless the welcome is what this login leads to."""
        return


class NoLogin(Login):
    """Of somebody who does not say who he is."""

    def hello_login(self) -> None:
        """Nothing."""


class _TokenLogin(Login):
    def __init__(self, token: str):
        self._token = token

    def hello_login(self) -> list[str]:
        return [TOKEN, self._token]


class _PasswordLogin(Login):
    """SCRAM; the derivation from the password takes some 50 ms of this thread."""

    def __init__(self, username: str, password: str, tls: ssl.SSLSocket | None):
        # To import it takes a tenth of a second, which not every client needs.
        from scramp import ScramClient, ScramException

        self._error = ScramException
        mechanisms = [MECHANISM] if tls is None else [MECHANISM, BOUND_MECHANISM]
        binding = None if tls is None else (BINDING_NAME, tls)
        try:
            self._client = ScramClient(
                mechanisms, username, password, channel_binding=binding
            )
        except ScramException as error:
            raise LoginError(f"the password cannot be used: {error}") from None

    def hello_login(self) -> list[str]:
        return [SCRAM, self._client.get_client_first()]

    def respond(self, challenge: str) -> str:
        try:
            self._client.set_server_first(challenge)
            response: str = self._client.get_client_final()
        except self._error as error:
            raise RemoteProtocolError(f"the server's challenge: {error}") from None
        return response

    def check_welcome(self, welcome: dict[str, Any]) -> None:
        try:
            self._client.set_server_final(welcome["proof"] or "")
        except self._error:
            raise LoginError(
                "whoever answers there does not know the password: it is not the server"
            ) from None


class Credentials(ABC):
    """What a client can prove who it is with."""

    @abstractmethod
    def login(self, sock: socket.socket) -> Login:
        """A new attempt over ``sock``, which is connected; raises LoginError."""


def is_private(sock: socket.socket) -> bool:
    """Whether what goes over ``sock`` is encrypted, or does not leave the machine."""
    if isinstance(sock, ssl.SSLSocket) or sock.family == socket.AF_UNIX:
        return True
    # An IPv6 address may have a scope behind it.
    return ip_address(sock.getpeername()[0].partition("%")[0]).is_loopback


class Nobody(Credentials):
    """Those of a client that does not say who it is."""

    def login(self, sock: socket.socket) -> Login:
        """Nothing to prove."""
        return NoLogin()


NO_CREDENTIALS = Nobody()


class Secret(ABC):
    """A password or a token, wherever it is kept."""

    @abstractmethod
    def read(self) -> str:
        """What it is now; raises LoginError, which does not show it."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


class Password(Credentials):
    """A user's name and password; the password never leaves the client."""

    def __init__(self, username: str, password: Secret):
        self._username = username
        self._password = password

    def __repr__(self) -> str:
        return f"<Password of {self._username}>"

    def login(self, sock: socket.socket) -> Login:
        """By SCRAM; bound to the certificate of the server, if it has shown one."""
        tls = sock if isinstance(sock, ssl.SSLSocket) else None
        return _PasswordLogin(self._username, self._password.read(), tls)


class Token(Credentials):
    """A bearer token: who has it is let in."""

    def __init__(self, token: Secret):
        self._token = token

    def __repr__(self) -> str:
        return "<Token>"

    def login(self, sock: socket.socket) -> Login:
        """Only where nobody can listen."""
        if not is_private(sock):
            raise LoginError(
                "a token is not sent unencrypted over a network: use TLS, or a"
                " password, which is never sent"
            )
        return _TokenLogin(self._token.read())
