"""One socket to the server, used by one thread at a time, without any other thread.

A call is one send and, usually, one receive; nobody else is woken. The socket blocks,
with a time limit in the kernel (``SO_RCVTIMEO``), for Python's own time-outs cost a
poll before every receive. While a call is under way the server sends heartbeats, so a
receive that times out means that the network or the server is gone, however long the
call may take.
"""

import errno
import os
import socket
import ssl
import struct
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

from zeolith.client.errors import ChannelLost, ClientDisconnected
from zeolith.client.round_trip import RECEIVE_BYTES, RoundTrip
from zeolith.protocol import errors
from zeolith.protocol.connection import Connection
from zeolith.protocol.messages import Failure, Reply

_SILENT = (errno.EAGAIN, errno.EWOULDBLOCK)

_monotonic = time.monotonic


def limit_silence(sock: socket.socket, timeout_s: float) -> None:
    """Make ``sock`` block, but no receive or send longer than ``timeout_s``."""
    if isinstance(sock, ssl.SSLSocket):
        # It tries again what the kernel has given up, unless its own limit has passed,
        # which costs nothing as long as the descriptor blocks.
        sock.settimeout(timeout_s * 0.9)
        os.set_blocking(sock.fileno(), True)
    else:
        sock.settimeout(None)
    timeval = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1_000_000))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)


def is_silence(error: OSError) -> bool:
    """Whether ``error`` is that of a receive or send that took too long."""
    # The kernel's own TimeoutError has a number: the connection is gone.
    return error.errno in _SILENT or (
        isinstance(error, TimeoutError) and error.errno is None
    )


def shut_down(sock: socket.socket) -> None:
    """End both directions of ``sock``, so that whoever waits on it wakes."""
    shutdown = sock.shutdown
    if isinstance(sock, ssl.SSLSocket):
        # Its own method would first forget that it is one: another thread that sends
        # at this moment would send plain bytes.
        shutdown = super(ssl.SSLSocket, sock).shutdown
    try:
        shutdown(socket.SHUT_RDWR)
    except OSError as error:
        if error.errno not in (errno.ENOTCONN, errno.EBADF):
            raise


def value_of(answer: Reply | Failure) -> Any:
    """What was answered; raises what the server raised."""
    if type(answer) is Reply:
        return answer.value
    assert isinstance(answer, Failure)
    error = errors.error_of(answer.name, answer.attributes, answer.text)
    if isinstance(error, errors.Unavailable):
        # To the application it is the same whose server is away.
        raise ClientDisconnected(str(error))
    raise error


class Channel:
    """A socket for calls; its owner is the thread that borrowed it."""

    def __init__(self, sock: socket.socket, connection: Connection):
        self._socket = sock
        self._connection = connection
        self._round_trip = RoundTrip(sock)
        self.is_lost = False

    @property
    def is_busy(self) -> bool:
        """Whether an answer is still to come: the call was interrupted."""
        return bool(self._connection.open_requests)

    @property
    def used_at(self) -> float:
        """When something was sent last."""
        return self._connection.sent_at

    def call(self, method: str, *args: Any) -> Any:
        """The value of ``method``.

        Raises what the server raised; LocalProtocolError for what cannot be sent, or
        was refused as nonsense; or ChannelLost: then the channel is of no more use,
        and it is not known whether the server did it.
        """
        connection = self._connection
        if connection.is_closed:
            # A goodbye came right behind the last answer.
            raise self._lost(connection.error)
        data = connection.request(method, list(args), _monotonic())
        # What ask and answer do, spelled out, for this is the hot path.
        try:
            received = self._round_trip(data, method == "load")
            while received:
                for message in connection.receive_data(received, _monotonic()):
                    if type(message) is Reply:
                        return message.value
                    if type(message) is Failure:
                        return value_of(message)
                if connection.is_closed:
                    break
                received = self._socket.recv(RECEIVE_BYTES)
        except OSError as error:
            raise self._lost(error) from error
        raise self._lost(connection.error)

    def answers(
        self, method: str, calls: Iterable[Sequence[Any]], ahead: int
    ) -> Iterator[Any]:
        """The values of ``method`` for each of ``calls``, its arguments, in that order.

        Up to ``ahead`` calls are on their way at once. Raises as ``call`` does; what
        is still to come is then lost, and the channel too.
        """
        calls = iter(calls)
        expected: deque[int] = deque()
        # The server answers in the order in which it is ready.
        came: dict[int, Any] = {}
        while True:
            requests = []
            for args in islice(calls, ahead - len(expected)):
                requests.append(self._request(method, args))
                expected.append(self._connection.last_request)
            if requests:
                self.send(b"".join(requests))
            if not expected:
                return
            while expected[0] not in came:
                for answer in self.more_answers():
                    came[answer.id] = value_of(answer)
            yield came.pop(expected.popleft())

    def requests(
        self, method: str, calls: Iterable[Sequence[Any]]
    ) -> tuple[bytes, list[int]]:
        """What asks for ``method`` for each of ``calls``, and their numbers.

        It is to be sent by ``exchange``. Raises as ``call`` does.
        """
        requests, numbers = [], []
        for args in calls:
            requests.append(self._request(method, args))
            numbers.append(self._connection.last_request)
        return b"".join(requests), numbers

    def exchange(self, requests: bytes) -> tuple[list[Reply | Failure], float, float]:
        """Send ``requests``; the answers that came first, and how long they took.

        In seconds, without and then only what it took to get the interpreter back, as
        far as that is known. Raises ChannelLost; what the server raised is an answer.
        """
        began_s = _monotonic()
        try:
            # To look would hide what it takes to get the interpreter back.
            received = self._round_trip(requests, True, may_look=False)
        except OSError as error:
            raise self._lost(error) from error
        regained_s = self._round_trip.regained_s
        took_s = _monotonic() - began_s - regained_s
        return self._answers_in(received), took_s, regained_s

    def more_answers(self) -> list[Reply | Failure]:
        """What comes next, which may be nothing; raises ChannelLost."""
        if self._connection.is_closed:
            raise self._lost(self._connection.error)
        try:
            received = self._socket.recv(RECEIVE_BYTES)
        except OSError as error:
            raise self._lost(error) from error
        return self._answers_in(received)

    def _answers_in(self, received: bytes) -> list[Reply | Failure]:
        connection = self._connection
        now = _monotonic()
        answers: list[Reply | Failure] = []
        start = 0
        # One by one, for that is the short way of the answer to a load.
        while start < len(received) and not connection.is_closed:
            end = connection.frame_end(received, start)
            for message in connection.receive_data(received[start:end], now):
                if isinstance(message, Reply | Failure):
                    answers.append(message)
            start = end
        if not answers and (connection.is_closed or not received):
            raise self._lost(connection.error)
        return answers

    def ask(self, method: str, *args: Any) -> None:
        """Ask for ``method`` without waiting; ``answer`` must follow."""
        self.send(self._request(method, args))

    def _request(self, method: str, args: Sequence[Any]) -> bytes:
        connection = self._connection
        if connection.is_closed:
            raise self._lost(connection.error)
        return connection.request(method, list(args), _monotonic())

    def answer(self) -> Any:
        """What was asked for; raises as ``call`` does."""
        while True:
            for answer in self.more_answers():
                return value_of(answer)

    def send(self, data: bytes) -> None:
        """Send a message that is not answered; raises ChannelLost."""
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise self._lost(error) from error
        except BaseException:
            # Interrupted: the server may have half of it, and waits for the rest.
            self.close()
            raise

    def send_patiently(self, data: bytes) -> None:
        """Send to a server that may be busy with its disk; raises ChannelLost.

        It takes nothing then, and says nothing here, while the stream of the session
        tells whether it lives; whoever ends the session shuts the channel.
        """
        rest = memoryview(data)
        try:
            while rest:
                try:
                    rest = rest[self._socket.send(rest) :]
                except OSError as error:
                    if not is_silence(error):
                        raise
        except OSError as error:
            raise self._lost(error) from error
        except BaseException:
            self.close()
            raise

    def shut(self) -> None:
        """Wake whoever waits on the socket; from any thread."""
        self.is_lost = True
        shut_down(self._socket)

    def close(self) -> None:
        """Let go of the socket; by its owner, or when it has none."""
        self.is_lost = True
        self._socket.close()

    def _lost(self, error: Exception | None) -> Exception:
        """The error for whoever called: the channel is of no more use."""
        if isinstance(error, ConnectionError | ssl.SSLError):
            error = self._last_words() or error
        self.close()
        goodbye = self._connection.goodbye_rcvd
        if goodbye is not None and goodbye.reason == "protocol":
            # It is what we said that was wrong; it would be the next time, too.
            return errors.LocalProtocolError(goodbye.text)
        if goodbye is not None and goodbye.reason == "forbidden":
            return errors.Forbidden(goodbye.text)
        if isinstance(error, OSError) and is_silence(error):
            silence_s = self._connection.limits.heartbeat_timeout_s
            return ChannelLost(f"the server was silent for {silence_s:g} s")
        if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            # It sounds like a riddle, and is the same.
            error = None
        return ChannelLost(str(error or "the server closed the connection"))

    def _last_words(self) -> Exception | None:
        """Why the server hung up, if it has said so while we were sending."""
        connection = self._connection
        # The connection is broken: what is there is read, and nothing waited for.
        with suppress(OSError):
            while not connection.is_closed:
                received = self._socket.recv(RECEIVE_BYTES)
                if not received:
                    break
                connection.receive_data(received, _monotonic())
        return connection.error
