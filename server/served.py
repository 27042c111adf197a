"""A database as the loop sees it: its changes, its followers, its counters.

Everything here belongs to the loop. Two invariants carry the design:

1. ``changes`` alone says which tid is the last one. What the storage has committed
   but the loop has not appended yet does not exist for clients: ``horizon`` bounds
   every load.
2. Following the changes and reading the last tid are one step (``follow``), so no
   change can fall between them.
"""

from dataclasses import dataclass
from typing import Protocol

from zeolith.protocol.codec import encode
from zeolith.protocol.messages import Notice
from zeolith.server.committer import Committer
from zeolith.server.workers import Workers
from zeolith.storage.changes import Change, Changes
from zeolith.storage.database import Database, Standing
from zeolith.storage.pack_progress import Packing
from zeolith.storage.tids import following


class Follower(Protocol):
    """Whoever is sent the changes of a database."""

    def send_shared(self, data: bytes) -> None:
        """Send ``data``, which was encoded once for all followers."""


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
        # The first tid that clients have not heard of is at or after this.
        self.horizon = following(changes.last_tid)
        # The pack under way, if there is one.
        self.packing: Packing | None = None
        self.committer = Committer(self)

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
        self.is_starting_afresh = False

    def follow(self, follower: Follower) -> bytes:
        """Send ``follower`` every change from now on; returns the last tid."""
        self.followers.add(follower)
        return self.changes.last_tid

    def unfollow(self, follower: Follower) -> None:
        """Send ``follower`` no more; harmless if it does not follow."""
        self.followers.discard(follower)

    def append(
        self, tid: bytes, oids: list[bytes], transaction: bytes | None
    ) -> Change:
        """Let a transaction that is on disk be the last one."""
        change = Change(self.changes.last_tid, tid, oids, transaction)
        self.changes.append(change)
        self.horizon = following(tid)
        return change

    def announce(self, change: Change) -> None:
        """Announce the change that was just appended.

        The bytes are the same for everybody, the committer included: it knows its
        own transaction by the id.
        """
        data = encode(Notice("changes", [[change]]))
        # A follower whose output is full leaves the set meanwhile.
        for follower in tuple(self.followers):
            follower.send_shared(data)
