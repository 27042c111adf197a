"""Sending a request and receiving its answer, without losing the interpreter for it.

A thread that lets go of the interpreter while another one computes waits for up to
``sys.getswitchinterval()``, 5 ms, to get it back. A socket's methods let go at every
call. The compiled ``exchange`` of ``_round_trip`` does so once for sending and
receiving, in however many pieces the answer comes; and where that turned out to be dear
it looks for the answer first, for a moment in which no other thread runs. (To look
always was tried: threads that only load get in each other's way.) Where the server is
too far away, or has to share a busy core, it looks in vain, and soon hardly ever.

The answer to a load comes sooner than a processor falls asleep and wakes again, if the
server is near and has a core of its own: 65 us a load became 33, with no more of the
processor's time. So that answer is *watched* for by a thread that stays awake for a
moment; other threads run meanwhile, and whoever else wants the core gets it. This, too,
is done less and less often where it is in vain.

``exchange`` below is its twin, for sockets that are more than a socket and for
installations without the compiled module. A ``RoundTrip`` belongs to a channel, and so
to one thread at a time.
"""

import errno
import socket
import ssl
from collections.abc import Callable
from typing import cast

from zeolith.protocol.compiled import compiled_module

RECEIVE_BYTES = 64 * 1024
# More is not in a record of TLS (RFC 8446, section 5.1).
RECORD_BYTES = 16 * 1024
# How long an answer is looked for. More than a server nearby takes, and little against
# what it costs to let go when this is done at all.
LOOK_NS = 200_000
# To wait longer than this for the interpreter is dear: somebody computes. Threads that
# only load get it back sooner, but for one whose core was taken by another process, so
# it must have been dear twice.
DEAR_NS = 2_500_000
DEAR_TIMES = 2
# After so many answers that were found by looking it is tried whether it is still dear.
FOUND_MAX = 200
# How long an answer is watched for: about what it takes to fall asleep and wake. Who
# waits for longer has lost no more than as much again.
WATCH_NS = 50_000
# How many answers at most are not looked or watched for after it was in vain again and
# again.
SKIPPED_MAX = 15
# Sends all, and receives something, nothing if the peer has ended; looks for it, and
# then watches, for so many nanoseconds. Also returned: what it took to get the
# interpreter back, negative if it was not let go of or that is not known; and whether
# it was watched for in vain. Raises OSError, and what a signal's handler raises.
Exchange = Callable[[socket.socket, bytes, int, int], tuple[bytes, int, bool]]


def exchange(
    sock: socket.socket, data: bytes, _look_ns: int, _watch_ns: int
) -> tuple[bytes, int, bool]:
    """The twin, which only waits; what it returns may be less than a frame."""
    sock.sendall(data)
    return sock.recv(RECEIVE_BYTES), -1, False


def exchange_encrypted(
    sock: ssl.SSLSocket, data: bytes, _look_ns: int, _watch_ns: int
) -> tuple[bytes, int, bool]:
    """The same for a socket that speaks TLS, and no other any more.

    Its ``sendall`` and ``recv`` go over to plain bytes when it has been closed.
    """
    try:
        sent = sock.write(data)
        while sent < len(data):
            sent += sock.write(memoryview(data)[sent:])
        return sock.read(RECORD_BYTES), -1, False
    except ValueError as error:
        raise OSError(errno.EBADF, str(error)) from error


def compiled() -> Exchange | None:
    """The compiled function; None if it is switched off or was not built."""
    module = compiled_module("zeolith.client._round_trip")
    return None if module is None else module.exchange


_compiled = compiled()


def exchange_for(sock: socket.socket) -> Exchange:
    """The one for ``sock``: what is more than a plain socket has methods of its own."""
    if _compiled is not None and type(sock) is socket.socket:
        return _compiled
    if isinstance(sock, ssl.SSLSocket):
        # Its socket is one of its own kind.
        return cast(Exchange, exchange_encrypted)
    return exchange


class Trial:
    """Something that pays or not: less and less often when it was in vain."""

    __slots__ = ("_pause", "skip")

    def __init__(self) -> None:
        # How many times it is not done now, and when it is in vain the next time.
        self.skip = self._pause = 0

    def is_due(self) -> bool:
        """Whether to do it this time."""
        if self.skip:
            self.skip -= 1
            return False
        return True

    def ended(self, was_in_vain: bool) -> None:
        """It was done."""
        if was_in_vain:
            self.skip = self._pause
            self._pause = min(2 * self._pause + 1, SKIPPED_MAX)
        else:
            self._pause = 0


class RoundTrip:
    """Round trips on ``sock``; call it with what is to be sent."""

    __slots__ = (
        "_dear",
        "_exchange",
        "_found",
        "_look",
        "_regain_ns",
        "_socket",
        "_watch",
    )

    def __init__(self, sock: socket.socket, exchange: Exchange | None = None):
        self._socket = sock
        self._exchange = exchange or exchange_for(sock)
        # How often it was dear in a row, and how many answers were found meanwhile.
        self._dear = self._found = 0
        # What the last one took to get it back; negative as in Exchange.
        self._regain_ns = -1
        self._look, self._watch = Trial(), Trial()

    @property
    def regained_s(self) -> float:
        """What it took to get the interpreter back; 0 if it was not let go of."""
        return max(self._regain_ns, 0) / 1e9

    def __call__(
        self, data: bytes, is_quick: bool = False, may_look: bool = True
    ) -> bytes:
        """What came after ``data`` was sent; nothing if the peer has ended.

        ``is_quick``: a server has the answer at once. Without ``may_look`` other
        threads run in any case. Raises OSError, and what a signal's handler raises.
        """
        look_ns = watch_ns = 0
        if may_look and self._dear >= DEAR_TIMES:
            if self._look.is_due():
                look_ns = LOOK_NS
        elif is_quick and self._watch.is_due():
            watch_ns = WATCH_NS
        received, regain_ns, is_late = self._exchange(
            self._socket, data, look_ns, watch_ns
        )
        self._regain_ns = regain_ns
        if watch_ns:
            self._watch.ended(is_late)
        if regain_ns >= 0:
            self._dear = self._dear + 1 if regain_ns > DEAR_NS else 0
            if look_ns:
                self._look.ended(True)
        elif look_ns:
            self._look.ended(False)
            self._found += 1
            if self._found == FOUND_MAX:
                self._found, self._look.skip = 0, 1
        return received
