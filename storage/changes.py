"""The recent changes of one database: which oids each transaction changed.

Belongs to the server's loop: the last tid that clients are told comes from here and
from nowhere else, so a client that is told tid T is also sent every change after T.

A change names its predecessor: ``(since, tid, oids, transaction)``. Whoever has
applied everything up to ``since`` may apply it; everybody else has missed something.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from operator import attrgetter
from typing import NamedTuple

OIDS_MAX = 1_000_000
CHANGES_MAX = 10_000

_since = attrgetter("since")


class Change(NamedTuple):
    """One committed transaction, as clients hear of it."""

    # The tid of the transaction before this one.
    since: bytes
    tid: bytes
    oids: list[bytes]
    # The id that the client chose for it; None where it is not known (any more).
    transaction: bytes | None


class Past(NamedTuple):
    """What a log tells of the changes that lead to one of them."""

    # Without a gap, the oldest first.
    changes: list[Change]
    # Whether nothing can be told of what is before them.
    is_all: bool


class Known(NamedTuple):
    """Which one of several tids a log has."""

    tid: bytes | None
    # Of what is not before this one it has everything: what is not found never was.
    complete_from: bytes


class Changes:
    """A contiguous piece of the list of changes, up to the last one."""

    def __init__(
        self,
        last_tid: bytes,
        oids_max: int = OIDS_MAX,
        changes_max: int = CHANGES_MAX,
    ):
        self.last_tid = last_tid
        self._oids_max = oids_max
        self._changes_max = changes_max
        self._changes: deque[Change] = deque()
        self._oids = 0

    def extend(self, changes: Iterable[Change]) -> None:
        """Append changes that continue the list; see ``append``."""
        for change in changes:
            self.append(change)

    def append(self, change: Change) -> None:
        """Add the change that follows the last one."""
        assert change.since == self.last_tid < change.tid, "a gap in the changes"
        self._changes.append(change)
        self._oids += len(change.oids)
        self.last_tid = change.tid
        while self._changes and (
            len(self._changes) > self._changes_max or self._oids > self._oids_max
        ):
            self._oids -= len(self._changes.popleft().oids)

    def since(self, position: bytes) -> list[Change] | None:
        """All changes after ``position``, or None if it is not in the list.

        None means too long ago, or a tid that this database never had: either way
        nothing can be concluded from what was known at ``position``.
        """
        if position == self.last_tid:
            return []
        changes = self._changes
        start = bisect_left(changes, position, key=_since)
        if start == len(changes) or changes[start].since != position:
            return None
        return [changes[index] for index in range(start, len(changes))]

    def others_since(self, position: bytes, tid: bytes) -> list[Change] | None:
        """As ``since``, but without the change ``tid``; None if that is not there."""
        if self._changes and self._changes[-1][:2] == (position, tid):
            # Nearly always nobody else was there meanwhile.
            return []
        changes = self.since(position)
        if changes is None:
            return None
        others = [change for change in changes if change.tid != tid]
        return others if len(others) < len(changes) else None

    @property
    def begins(self) -> bytes:
        """The oldest position from which all changes are in the list."""
        return self._changes[0].since if self._changes else self.last_tid

    def remembers(self, position: bytes) -> bool:
        """Whether all after ``position``, which was the last tid once, is here."""
        return self.begins <= position

    def tid_of(self, transaction: bytes) -> bytes | None:
        """The tid under which ``transaction`` was committed, if that was lately."""
        for change in reversed(self._changes):
            if change.transaction == transaction:
                return change.tid
        return None
