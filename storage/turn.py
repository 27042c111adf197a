"""The right to vote: one transaction at a time, first come first served.

ZODB's storages take one transaction from vote to finish at a time. A Turn says whose
turn it is, who waits, and whose time ran out. It is pure: it belongs to the server's
loop, holders are compared by identity, and the time comes in as ``now``.

Invariants:

1. At most one holder; whoever waits got in line later than the holder did.
2. A holder that leaves, for whatever reason, hands the turn to the first in line in
   the same call: there is no state in which the line waits for nobody.
3. Time runs only from ``started_at``, which the owner sets when the holder is done
   waiting for the server and the server waits for the holder, until ``stop_clock``.
   All of it counts: a holder that is asked several times has one timeout, not several.
"""

from collections import deque
from typing import Generic, TypeVar

Holder = TypeVar("Holder")


class Turn(Generic[Holder]):
    """Who holds the right to vote and who stands in line for it."""

    def __init__(self) -> None:
        self.holder: Holder | None = None
        # When the clock of the holder began; None while the server works for it.
        self.started_at: float | None = None
        # What the holder has taken before that.
        self._taken_s = 0.0
        self._line: deque[Holder] = deque()

    @property
    def waiting(self) -> tuple[Holder, ...]:
        """Those in line, first come first."""
        return tuple(self._line)

    def request(self, holder: Holder) -> bool:
        """Get in line; true if it is ``holder``'s turn at once."""
        if self.holder is None:
            self.holder = holder
            return True
        self._line.append(holder)
        return False

    def leave(self, holder: Holder) -> Holder | None:
        """Give up the turn or the place in line.

        Returns whose turn it is now if that changed, else None. Leaving twice, or
        without having requested, changes nothing.
        """
        if self.holder is not holder:
            self._line = deque(each for each in self._line if each is not holder)
            return None
        self.started_at = None
        self._taken_s = 0.0
        self.holder = self._line.popleft() if self._line else None
        return self.holder

    def stop_clock(self, now: float) -> None:
        """The server works for the holder again; harmless if it did already."""
        if self.started_at is not None:
            self._taken_s += now - self.started_at
            self.started_at = None

    def expired(self, now: float, timeout_s: float) -> Holder | None:
        """The holder, if the server has waited for it longer than ``timeout_s``."""
        if self.started_at is None:
            return None
        if self._taken_s + now - self.started_at < timeout_s:
            return None
        return self.holder
