"""The answer to a commit that is alone, sent by the thread that brings it to the disk.

When nobody else commits, the loop sleeps while the writer thread waits for the disk,
and to wake it takes as long as most of what it does for a commit. So the writer sends
the answer itself. What the loop has to do for the commit it does before it looks at
whatever has come later (``Committer.catch_up``), so nobody sees a difference.

A Delivery is one answer, which is sent by the writer thread (``send``) or by the loop
(after ``take_back``), whoever is first. Invariants:

1. The writer sends a whole message, and not into another one: when the loop offers it,
   all that it wrote before has left, and it takes it back before it writes again.
2. The descriptor is that of the socket: the loop takes it back when the socket is lost,
   and nothing closes it before that.
3. The lock is held for one send that does not wait.
"""

import os
import threading
from collections.abc import Callable
from enum import Enum

# What is longer may not leave at once; the loop waits until it has.
BYTES_MAX = 16 * 1024


class Fate(Enum):
    """What has become of a delivery."""

    OPEN = "open"
    # It is the loop's to answer.
    UNSENT = "unsent"
    SENT = "sent"
    # A part of it has left: of no more use is the socket.
    TORN = "torn"


class Delivery:
    """One answer, that somebody else than the loop may send."""

    __slots__ = ("_after_tid", "_bytes_max", "_fate", "_fd", "_lock", "_make")

    def __init__(
        self,
        fd: int,
        after_tid: bytes,
        make: Callable[[bytes], bytes],
        bytes_max: int = BYTES_MAX,
    ):
        """``make`` encodes the answer for a tid; only for one after ``after_tid``.

        ``fd``: a stream socket's, which does not block. ``make`` is called in the
        writer thread. Only an answer of up to ``bytes_max``.
        """
        self._fd = fd
        self._after_tid = after_tid
        self._make = make
        self._bytes_max = min(bytes_max, BYTES_MAX)
        self._lock = threading.Lock()
        self._fate = Fate.OPEN

    def send(self, tid: bytes) -> None:
        """In the writer thread: it was committed as ``tid``, and is on the disk."""
        if tid <= self._after_tid:
            # A disaster, of which the loop will tell.
            return
        data = self._make(tid)
        if len(data) > self._bytes_max:
            return
        with self._lock:
            if self._fate is Fate.OPEN:
                self._fate = self._sent(data)

    def take_back(self) -> Fate:
        """On the loop: from now on it is not sent; what has become of it until now."""
        with self._lock:
            if self._fate is Fate.OPEN:
                self._fate = Fate.UNSENT
            return self._fate

    def _sent(self, data: bytes) -> Fate:
        try:
            sent = os.write(self._fd, data)
        except OSError:
            # Its buffers are full, or the client is gone: the loop knows what to do.
            return Fate.UNSENT
        return Fate.SENT if sent == len(data) else Fate.TORN
