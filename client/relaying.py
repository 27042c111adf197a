"""A ClientStorage as the server sees it that serves it to others.

What a relay needs and ZODB's interfaces do not have: it must not wait, must not
unpickle, has no application classes, and passes questions on rather than answer them.
A server finds ``ClientStorage.for_relay`` by its name: it does not import this package.
Called from the relay's threads, ``load_cached`` and ``is_in_place`` also where nothing
may wait.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from zeolith.client.commit import Commit
    from zeolith.client.storage import ClientStorage


class Vote(NamedTuple):
    """The answer to a vote: it has voted, unless there are conflicts."""

    tid: bytes | None
    # Oids whose records are now others than those sent.
    resolved: list[bytes]
    # [oid, committed tid, old tid, committed, old, new]
    conflicts: list[list[bytes]]


class Upstream:
    """The part of a ClientStorage that only a relay calls."""

    def __init__(self, storage: "ClientStorage"):
        self._storage = storage

    def identity(self) -> tuple[bytes, int]:
        """Database id and epoch of what the server serves, as of the last session.

        Waits for one if there was none yet.
        """
        return self._storage.identity()

    def is_in_place(self, tid: bytes) -> bool:
        """Whether tpc_finish calls its callback in the place of ``tid``.

        To be asked in that callback. It is not if changes before ``tid`` are missing:
        then it is told again, like anybody's change.
        """
        return self._storage.position.in_place == tid

    # Reading

    def catch_up(self) -> None:
        """Be told what the server has committed until now, if it is there."""
        self._storage.catch_up()

    def load_cached(
        self, oid: bytes, before: bytes
    ) -> tuple[bytes, bytes, bytes | None] | None:
        """``loadBefore`` if the answer is at hand, else None; never waits."""
        return self._storage.cache.load(oid, before)

    def outdated(self, revisions: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        """The oids of those (oid, tid) that are not current revisions any more."""
        _as_of, oids = self._storage.call("verify", revisions)
        return list(oids)

    def prefetch(self, oids: list[bytes], before: bytes) -> None:
        """Have the revisions of ``oids`` in the cache, by few round trips."""
        self._storage.prefetch(oids, before)

    def new_oids(self, count: int) -> list[bytes]:
        """Oids of the server's, as many as it likes to give at once."""
        oids: list[bytes] = self._storage.call("new_oids", count)
        return oids

    def history(self, oid: bytes, size: int) -> list[list[Any]]:
        """The server's log entries of an object, extensions as they are."""
        entries: list[list[Any]] = self._storage.call("history", oid, size)
        return entries

    def undo_log(self, before: bytes | None, size: int) -> list[list[Any]]:
        """The server's log entries of what can be undone."""
        entries: list[list[Any]] = self._storage.call("undo_log", before, size)
        return entries

    def outcome(
        self, transaction_id: bytes, tid: bytes | None, position: bytes
    ) -> tuple[str, bytes | None]:
        """What became of a transaction; for the database of ``identity`` before."""
        outcome, committed_tid = self._storage.call(
            "outcome", transaction_id, tid, position
        )
        return outcome, committed_tid

    # Committing

    def vote(self, transaction: Any) -> Vote:
        """tpc_vote, but conflicts are handed back instead of resolved here."""
        commit = self._storage.commit_to_vote(transaction)
        return _vote(commit, commit.begin_vote())

    def resolve(self, transaction: Any, resolutions: dict[bytes, bytes]) -> Vote:
        """Go on with somebody else's resolutions."""
        commit = self._storage.commit_to_vote(transaction)
        return _vote(
            commit, commit.resolve([list(item) for item in resolutions.items()])
        )


def _vote(commit: "Commit", conflicts: list[list[bytes]]) -> Vote:
    return Vote(commit.tid, commit.resolved, conflicts)
