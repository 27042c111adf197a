"""The answer to a commit that is alone, sent by the thread that brings it to the disk.

When nobody else commits, the loop sleeps while the writer thread waits for the disk,
and to wake it takes as long as most of what it does for a commit. So the writer sends
the answer itself. What the loop has to do for the commit it does before it looks at
whatever has come later (``Committer.catch_up``), so nobody who knows of the answer is
told of the time before it.

A Delivery is one answer, which is sent by the writer thread (``send``) or by the loop
(after ``take_back``), whoever is first. Invariants:

1. The answer is not sent into another message, nor another into it: when the loop
   offers it, all that it wrote before has left; it takes it back before it writes
   again, and what the socket did not take of it is what it writes first.
2. The descriptor is that of the socket: the loop takes it back when the socket is lost,
   and nothing closes it before that.
3. The lock is held for one send that does not wait.
"""

import os
import threading
from collections.abc import Callable

# What is longer may not leave at once; the loop waits until it has.
BYTES_MAX = 16 * 1024
# More changes of others than this are hardly shorter.
CHANGES_MAX = 100


class Delivery:
    """One answer, that somebody else than the loop may send."""

    def __init__(
        self,
        number: int,
        fd: int,
        after_tid: bytes,
        make: Callable[[bytes], bytes],
        bytes_max: int = BYTES_MAX,
    ):
        """``make`` encodes the answer for a tid; only for one after ``after_tid``.

        ``number``: of the request. ``fd``: a stream socket's, which does not block.
        ``make`` is called in the writer thread. Only an answer of up to ``bytes_max``.
        """
        self.number = number
        # Whether the writer has sent it, or began to; does not change any more when it
        # was taken back.
        self.was_sent = False
        self._fd = fd
        self._after_tid = after_tid
        self._make = make
        self._bytes_max = min(bytes_max, BYTES_MAX)
        self._lock = threading.Lock()
        self._is_open = True
        self._rest = b""

    def send(self, tid: bytes) -> None:
        """In the writer thread: it was committed as ``tid``, and is on the disk."""
        if tid <= self._after_tid:
            # A disaster, of which the loop will tell.
            return
        try:
            data = self._make(tid)
        except Exception:  # noqa: BLE001 - it is committed, and the loop makes it again
            return
        if len(data) > self._bytes_max:
            return
        with self._lock:
            if self._is_open:
                self._is_open = False
                self._write(data)

    def take_back(self) -> bytes:
        """On the loop: from now on it is not sent. What must be written before others.

        That is what is left of an answer that the writer began to send; it is returned
        once.
        """
        with self._lock:
            self._is_open = False
            rest, self._rest = self._rest, b""
            return rest

    def _write(self, data: bytes) -> None:
        try:
            sent = os.write(self._fd, data)
        except OSError:
            # Its buffers are full, or the client is gone: the loop knows what to do.
            return
        self.was_sent = True
        self._rest = data[sent:]
