"""A database as the loop sees it: its changes, its followers, its counters.

Everything here belongs to the loop. Two invariants carry the design:

1. ``changes`` alone says which tid is the last one. What the storage has committed
   but the loop has not appended yet does not exist for clients: ``horizon`` bounds
   every load.
2. Following the changes and reading the last tid are one step (``follow``), so no
   change can fall between them.
3. A follower is sent every change once and in order. One that does not keep up is
   sent nothing more; where it stands is kept (``_behind``), and when it has read, it is
   sent all that it missed, together. When that is not known any more, it must go.
"""

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Protocol

from zeolith.protocol.codec import encode
from zeolith.protocol.limits import DEFAULT, Limits
from zeolith.protocol.messages import Notice
from zeolith.server.answering import answering
from zeolith.server.committer import Committer
from zeolith.server.readings import Readings
from zeolith.server.replays import Replays
from zeolith.server.workers import Workers
from zeolith.storage.changes import Change, Changes
from zeolith.storage.database import Database, Standing
from zeolith.storage.pack_progress import Packing
from zeolith.storage.tids import following

# How often changes are announced while others are on their way to the disk; one that a
# follower was told a moment ago lets it wait for the next time.
ANNOUNCE_WAIT_S = 0.005
# More followers than these few wait so long in any case.
FEW_MAX = 50
MANY_WAIT_S = 0.001

_since = attrgetter("since")


class Follower(Protocol):
    """Whoever is sent the changes of a database."""

    # Whether more waits for it than it should be sent.
    is_lagging: bool
    # It was sent all changes up to this one, by a notice or with an answer.
    told_tid: bytes

    def send_shared(self, data: bytes) -> None:
        """Send ``data``, which was encoded once for all followers."""

    def fall_behind(self) -> None:
        """It cannot be told any more what it has missed."""


@dataclass
class Counters:
    """What happened since the server started."""

    loads: int = 0
    commits: int = 0
    aborts: int = 0
    stores: int = 0
    conflicts: int = 0
    conflicts_resolved: int = 0
    timeouts: int = 0
    # Clients that were told what changed before the server remembers, and revisions
    # that others had to verify.
    replays: int = 0
    verified: int = 0


class Served:
    """One database and everything the loop keeps about it."""

    def __init__(
        self,
        database: Database,
        workers: Workers,
        changes: Changes,
        *,
        info: tuple[int, int],
        is_read_only: bool,
        limits: Limits = DEFAULT,
    ):
        self.name = database.name
        self.database = database
        self.workers = workers
        self.changes = changes
        self._is_read_only = is_read_only
        # Nobody may come while nobody knows where the storage stands.
        self.is_starting_afresh = False
        # As of opening; a client that wants to know today's asks with ``info``.
        self.size, self.length = info
        self.counters = Counters()
        self.followers: set[Follower] = set()
        self._limits = limits
        # What was appended and not everybody was told of yet, and what will see to
        # that. Up to the overdue tid it has waited once before.
        self._unannounced: list[Change] = []
        self._announcing: asyncio.TimerHandle | None = None
        self._overdue_tid = changes.last_tid
        # What changed long ago.
        # A hello waits for them, and has to be answered in time.
        wait_s = limits.hello_timeout_s / 2
        self.replays = Replays(database, workers, changes, wait_s)
        # The last change that was sent to those who do not keep up.
        self._behind: dict[Follower, bytes] = {}
        # What they are to be sent of before ``changes``: of those who came back.
        self._long_ago: dict[Follower, Sequence[Change]] = {}
        # The last notice that was made for one of them: what it follows, leads to, is.
        self._gathered: tuple[bytes, bytes, bytes] | None = None
        # The first tid that clients have not heard of is at or after this.
        self.horizon = following(changes.last_tid)
        # The pack under way, if there is one.
        self.packing: Packing | None = None
        self.committer = Committer(self)
        # The short way of a load, if there is one.
        self.answer = answering(self)
        # What clients want of reader threads; from the service, which knows its guests.
        self.readings: Readings

    @property
    def is_read_only(self) -> bool:
        """Whether nothing can be written now; of some storages that changes."""
        return self._is_read_only or self.database.is_read_only

    def start_afresh(self, standing: Standing) -> None:
        """Forget all changes: the storage stands there now; nobody follows."""
        self.database.database_id = standing.database_id
        self.database.epoch = standing.epoch
        self.changes = Changes(standing.last_tid)
        self.horizon = following(standing.last_tid)
        self._gathered = None
        self._unannounced = []
        self._overdue_tid = standing.last_tid
        self.is_starting_afresh = False
        self.replays.start_afresh(self.changes)

    def follow(self, follower: Follower) -> bytes:
        """Send ``follower`` every change from now on; returns the last tid."""
        self.followers.add(follower)
        follower.told_tid = self.changes.last_tid
        return self.changes.last_tid

    def follow_after(
        self, follower: Follower, missed: Sequence[Change]
    ) -> tuple[bytes, list[Change]]:
        """``follow``, by one who has ``missed`` these, the last of them included.

        Also returns as much of it as is told at once; the rest it will be sent by
        ``catch_up``, as if it had lagged.
        """
        last_tid = self.follow(follower)
        first = next(self.pieces(missed), [])
        if first and first[-1].tid != last_tid:
            follower.told_tid = self._behind[follower] = first[-1].tid
            self._long_ago[follower] = missed
        return last_tid, first

    def unfollow(self, follower: Follower) -> None:
        """Send ``follower`` no more; harmless if it does not follow."""
        self.followers.discard(follower)
        self._behind.pop(follower, None)
        self._long_ago.pop(follower, None)

    def append(
        self, tid: bytes, oids: list[bytes], transaction: bytes | None
    ) -> Change:
        """Let a transaction that is on disk be the last one."""
        change = Change(self.changes.last_tid, tid, oids, transaction)
        self.changes.append(change)
        self.horizon = following(tid)
        return change

    def announce(self, changes: Sequence[Change], *, more_soon: bool = False) -> None:
        """Announce the changes that were just appended, in their order.

        The bytes are the same for everybody. ``more_soon``: others are on their way to
        the disk. Then all are told together, for to hear of one change takes a client
        as long as to hear of many; and whoever commits itself hears of them with its
        answers. But nobody later than after twice ANNOUNCE_WAIT_S. Many are told a
        moment later in any case: once they wake, whoever committed has to wait for a
        processor.
        """
        self._unannounced += changes
        if more_soon:
            self._announce_in(ANNOUNCE_WAIT_S, self._announce_overdue)
        elif len(self.followers) > FEW_MAX:
            self._announce_in(MANY_WAIT_S, self._announce_all)
        else:
            self._announce_all()

    def _announce_in(self, wait_s: float, announce: Callable[[], None]) -> None:
        """Announce after so long, or when it was to be done before."""
        loop = asyncio.get_running_loop()
        announcing = self._announcing
        if announcing is not None:
            if announcing.when() <= loop.time() + wait_s:
                return
            announcing.cancel()
        self._announcing = loop.call_later(wait_s, announce)

    def _announce_overdue(self) -> None:
        """Tell those who lack something that has waited once before."""
        self._announcing = None
        overdue = self._overdue_tid
        self._tell_all_below(overdue)
        self._unannounced = [each for each in self._unannounced if each.tid > overdue]
        if self._unannounced:
            self._overdue_tid = self._unannounced[-1].tid
            self._announce_in(ANNOUNCE_WAIT_S, self._announce_overdue)

    def _announce_all(self) -> None:
        announcing, self._announcing = self._announcing, None
        if announcing is not None:
            announcing.cancel()
        if self._unannounced:
            self._overdue_tid = self._unannounced[-1].tid
            self._tell_all_below(self._overdue_tid)
            self._unannounced = []

    def _tell_all_below(self, tid: bytes) -> None:
        """Tell those of what is unannounced who were not told of all up to ``tid``."""
        # What they were told of last differs, but not much.
        notices: dict[bytes, list[tuple[bytes, bytes]]] = {}
        # A follower whose output is full leaves the set meanwhile.
        for follower in tuple(self.followers):
            told_tid = follower.told_tid
            if follower in self._behind:
                self._check(follower)
            elif told_tid < tid:
                if told_tid not in notices:
                    notices[told_tid] = self._notices_after(told_tid)
                self._tell(follower, notices[told_tid])

    def _notices_after(self, tid: bytes) -> list[tuple[bytes, bytes]]:
        """What is unannounced after ``tid``, with the last tid of each notice."""
        missed = [change for change in self._unannounced if change.tid > tid]
        return [
            (piece[-1].tid, encode(Notice("changes", [piece])))
            for piece in self.pieces(missed)
        ]

    def _tell(self, follower: Follower, notices: list[tuple[bytes, bytes]]) -> None:
        for last_tid, notice in notices:
            if follower.is_lagging:
                if follower in self.followers:
                    self._behind[follower] = follower.told_tid
                return
            follower.told_tid = last_tid
            follower.send_shared(notice)

    def _check(self, follower: Follower) -> None:
        """Let go of ``follower`` if what it missed is not known any more."""
        long_ago = self._long_ago.get(follower)
        known_to = long_ago[-1].tid if long_ago else self._behind[follower]
        if not self.changes.remembers(known_to):
            self.unfollow(follower)
            follower.fall_behind()

    def catch_up(self, follower: Follower) -> None:
        """Send ``follower``, which reads again, what it missed, or a part of it."""
        if follower not in self._behind:
            return
        self._check(follower)
        position = self._behind.pop(follower, self.changes.last_tid)
        while position != self.changes.last_tid and follower in self.followers:
            if follower.is_lagging:
                self._behind[follower] = position
                return
            position, data = self._gather(follower, position)
            follower.told_tid = position
            follower.send_shared(data)
        self._long_ago.pop(follower, None)
        if not self._behind:
            self._gathered = None

    def _gather(self, follower: Follower, position: bytes) -> tuple[bytes, bytes]:
        """One notice of what comes after ``position``, and the tid it leads to."""
        known = self._gathered
        if known is not None and known[0] == position:
            # Others lag alike. If there is more by now, that comes next.
            return known[1:]
        missed: Sequence[Change] | None = self.changes.since(position)
        if missed is None:
            long_ago = self._long_ago[follower]
            start = bisect_left(long_ago, position, key=_since)
            missed = long_ago[start : start + self._limits.notice_changes_max]
        assert missed, "whoever is behind has been checked"
        piece = next(self.pieces(missed))
        data = encode(Notice("changes", [piece]))
        self._gathered = position, piece[-1].tid, data
        return piece[-1].tid, data

    def pieces(self, changes: Sequence[Change]) -> Iterator[list[Change]]:
        """``changes`` in pieces for one message each; a change is not divided."""
        limits = self._limits
        piece: list[Change] = []
        oids = 0
        for change in changes:
            if piece and (
                oids + len(change.oids) > limits.notice_oids_max
                or len(piece) >= limits.notice_changes_max
            ):
                yield piece
                piece, oids = [], 0
            piece.append(change)
            oids += len(change.oids)
        if piece:
            yield piece
