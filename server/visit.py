"""A session with a server, from the command line: a stream and one channel.

For commands that need a storage and may wait long (``zeolith pack``). One thread looks
after both sockets: what is to be sent is sent at once, everything else happens in
``wait``, which must be called often enough for the heartbeats. What the stream brings
is of no interest here.
"""

import selectors
import socket
import time
from types import TracebackType
from typing import Any, Self

from zeolith.protocol import errors
from zeolith.protocol.addresses import Address, format_address
from zeolith.protocol.connection import Connection, Role
from zeolith.protocol.limits import DEFAULT, Limits
from zeolith.protocol.login import NO_CREDENTIALS, Credentials
from zeolith.protocol.messages import Challenge, Failure, Message, Reply, Welcome
from zeolith.protocol.methods import hello_fields
from zeolith.protocol.tls import ClientTls
from zeolith.server.probe import NoAnswer, connected, reason_of

_RECEIVE_BYTES = 65536


class Refused(Exception):
    """The server has answered, with an error; the text is one line."""


class _Socket:
    """One of the two sockets."""

    def __init__(self, sock: socket.socket, limits: Limits):
        self.socket = sock
        self.connection = Connection(Role.CLIENT, time.monotonic(), limits)

    def greet(self, credentials: Credentials, **fields: Any) -> dict[str, Any]:
        """Say hello; returns the welcome."""
        login = credentials.login(self.socket)
        hello = hello_fields(login=login.hello_login(), **fields)
        self.socket.sendall(self.connection.hello(hello, time.monotonic()))
        while True:
            for message in self.receive():
                if isinstance(message, Challenge):
                    response = self.connection.respond(
                        login.respond(message.text), time.monotonic()
                    )
                    self.socket.sendall(response)
                if isinstance(message, Welcome):
                    login.check_welcome(message.fields)
                    return message.fields
                if isinstance(message, Failure):
                    raise errors.error_of(
                        message.name, message.attributes, message.text
                    )

    def receive(self) -> list[Message]:
        """What has come; waits for it."""
        data = self.socket.recv(_RECEIVE_BYTES)
        messages = self.connection.receive_data(data, time.monotonic()) if data else []
        if not messages and (not data or self.connection.is_closed):
            raise self.connection.error or errors.RemoteProtocolError(
                "the server closed the connection"
            )
        return messages

    def beat(self) -> None:
        """Send a heartbeat if one is due; raises if the server is silent."""
        due = self.connection.tick(time.monotonic())
        if self.connection.is_closed:
            raise self.connection.error or errors.RemoteProtocolError("closed")
        if due:
            self.socket.sendall(due)


class Visit:
    """A session; raises NoAnswer whenever the server is not there (any more)."""

    def __init__(
        self,
        address: Address,
        storage: str,
        label: str,
        timeout_s: float,
        limits: Limits = DEFAULT,
        tls: ClientTls | None = None,
        credentials: Credentials = NO_CREDENTIALS,
    ):
        """Connect, to write; also raises Refused."""
        self._address = address
        self._tls = tls
        self._limits = limits
        self._selector = selectors.DefaultSelector()
        self._sockets: list[_Socket] = []
        try:
            hello = {"kind": "stream", "storage": storage, "label": label}
            welcome = self._join(address, timeout_s, credentials, **hello)
            hello = {"kind": "channel", "session": welcome["session"]}
            self._join(address, timeout_s, NO_CREDENTIALS, **hello)
        except TimeoutError as error:
            self.close()
            raise NoAnswer(
                f"{format_address(address)} does not answer within {timeout_s:g} s"
            ) from error
        except errors.HelloRefused as error:
            self.close()
            if error.reason == "read-only":
                raise Refused(f"storage {storage!r} is read-only there") from error
            raise Refused(str(error)) from error
        except (OSError, errors.ZeolithError) as error:
            self.close()
            raise self._no_answer(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the session."""
        self._selector.close()
        for each in self._sockets:
            each.socket.close()

    def ask(self, method: str, *args: Any) -> int:
        """Ask for something; returns the number under which ``wait`` has the answer."""
        channel = self._sockets[1]
        try:
            channel.socket.sendall(
                channel.connection.request(method, list(args), time.monotonic())
            )
        except OSError as error:
            raise self._no_answer(error) from error
        return channel.connection.last_request

    def wait(self, timeout_s: float) -> dict[int, Any]:
        """The answers that come within ``timeout_s``, as soon as there are any.

        An answer that is an error is a Refused.
        """
        deadline = time.monotonic() + timeout_s
        answers: dict[int, Any] = {}
        beat_s = self._limits.heartbeat_interval_s / 4
        try:
            while not answers:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    break
                for key, _events in self._selector.select(min(left_s, beat_s)):
                    answers.update(_answers_among(key.data.receive()))
                for each in self._sockets:
                    each.beat()
        except (OSError, errors.ZeolithError) as error:
            raise self._no_answer(error) from error
        return answers

    def call(self, method: str, timeout_s: float) -> Any:
        """The value of ``method``; raises Refused."""
        number = self.ask(method)
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            answers = self.wait(left_s)
            if number in answers:
                if isinstance(answers[number], Refused):
                    raise answers[number]
                return answers[number]
        raise NoAnswer(
            f"{format_address(self._address)} does not answer within {timeout_s:g} s"
        )

    def _join(
        self,
        address: Address,
        timeout_s: float,
        credentials: Credentials,
        **fields: Any,
    ) -> dict[str, Any]:
        sock = connected(address, timeout_s, self._tls)
        added = _Socket(sock, self._limits)
        self._sockets.append(added)
        welcome = added.greet(credentials, **fields)
        self._selector.register(added.socket, selectors.EVENT_READ, added)
        return welcome

    def _no_answer(self, error: Exception) -> NoAnswer:
        return NoAnswer(f"{format_address(self._address)}: {reason_of(error)}")


def _answers_among(messages: list[Message]) -> dict[int, Any]:
    answers: dict[int, Any] = {}
    for message in messages:
        if isinstance(message, Reply):
            answers[message.id] = message.value
        elif isinstance(message, Failure):
            error = errors.error_of(message.name, message.attributes, message.text)
            answers[message.id] = Refused(" ".join(str(error).split()))
    return answers
