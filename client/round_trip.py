"""Sending a request and receiving its answer, without losing the interpreter for it.

A thread that lets go of the interpreter while another one computes waits for up to
``sys.getswitchinterval()``, 5 ms, to get it back. A socket's methods let go at every
call. The compiled ``exchange`` of ``_round_trip`` does so once for sending and
receiving, in however many pieces the answer comes; and where that turned out to be dear
it looks for the answer first, for a moment in which no other thread runs. (To look
always was tried: threads that only load get in each other's way.)

``exchange`` below is its twin, for sockets that are more than a socket and for
installations without the compiled module. A ``RoundTrip`` belongs to a channel, and so
to one thread at a time.
"""

import os
import socket
from collections.abc import Callable

RECEIVE_BYTES = 64 * 1024
# How long an answer is looked for. More than a server nearby takes, and little against
# what it costs to let go when this is done at all.
LOOK_NS = 200_000
# To wait longer than this for the interpreter is dear: somebody computes. Threads that
# only load get it back sooner.
DEAR_NS = 2_500_000
# After so many answers that were found by looking it is tried whether it is still dear.
LOOKS_MAX = 100
# "0" in the environment, for a diagnosis: use the twin.
SWITCH = "ZEOLITH_COMPILED"

# Sends all, and receives something, nothing if the peer has ended; looks so many
# nanoseconds for it. Also returned: what it took to get the interpreter back, negative
# if it was not let go of or that is not known. Raises OSError, and what a signal's
# handler raises.
Exchange = Callable[[socket.socket, bytes, int], tuple[bytes, int]]


def exchange(sock: socket.socket, data: bytes, _look_ns: int) -> tuple[bytes, int]:
    """The twin, which never looks; what it returns may be less than a frame."""
    sock.sendall(data)
    return sock.recv(RECEIVE_BYTES), -1


def compiled() -> Exchange | None:
    """The compiled function; None if it is switched off or was not built."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        from zeolith.client import _round_trip
    except ImportError:
        return None
    return _round_trip.exchange


_compiled = compiled()


def exchange_for(sock: socket.socket) -> Exchange:
    """The one for ``sock``: what is more than a plain socket has methods of its own."""
    if _compiled is not None and type(sock) is socket.socket:
        return _compiled
    return exchange


class RoundTrip:
    """Round trips on ``sock``; call it with what is to be sent."""

    __slots__ = ("_exchange", "_looks", "_socket")

    def __init__(self, sock: socket.socket, exchange: Exchange | None = None):
        self._socket = sock
        self._exchange = exchange or exchange_for(sock)
        # How often the answer will be looked for.
        self._looks = 0

    def __call__(self, data: bytes) -> bytes:
        """What came after ``data`` was sent; nothing if the peer has ended.

        Raises OSError, and what a signal's handler raises.
        """
        look_ns = LOOK_NS if self._looks else 0
        received, regain_ns = self._exchange(self._socket, data, look_ns)
        if regain_ns >= 0:
            self._looks = LOOKS_MAX if regain_ns > DEAR_NS else 0
        elif look_ns:
            self._looks -= 1
        return received
