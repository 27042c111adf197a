"""Clients that come back: what they have missed, and what they know that is still true.

Called on the loop by the service, for a hello and for the methods that belong to it,
with messages that protocol.methods has checked. Whatever reads much of the log does so
in the one thread that looks back; hellos of others are not held up.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from zeolith.protocol.limits import Limits
from zeolith.server.served import Served
from zeolith.storage.changes import Change
from zeolith.storage.commit import FUTURE_MAX_S
from zeolith.storage.tids import tid_at

if TYPE_CHECKING:
    from zeolith.server.peer import Peer


def is_of_history(served: Served, fields: dict[str, Any]) -> bool:
    """Whether the position in a hello is one in the history of ``served``."""
    database = served.database
    return fields["database_id"] in (None, database.database_id) and (
        fields["epoch"] in (None, database.epoch)
    )


def missed_since(served: Served, position: bytes | None) -> list[Change] | None:
    """The changes since a client's position; None if nobody can tell, now."""
    if position is None:
        return []
    latest = tid_at(time.time() + FUTURE_MAX_S)
    if served.changes.last_tid < position <= latest:
        # We are an older copy of what the client knows. It forgets what we do not have,
        # and must not meet the tids that it knows with other contents. They may be
        # ahead of our clock: it may have been set back, or tids were skipped.
        served.workers.write(served.database.raise_tid_floor, position)
    missed = served.replays.since(position)
    if missed is not None and not served.changes.remembers(position):
        served.counters.replays += 1
    return missed


class Returning:
    """Answers to ``changes_since``, ``last_known`` and ``verify``."""

    def __init__(
        self,
        read: Callable[..., object],
        answer_with: Callable[..., object],
        reply: Callable[["Peer", int, Any], object],
        limits: Limits,
        *,
        later: object,
    ):
        self._read = read
        self._answer_with = answer_with
        self._reply = reply
        self._limits = limits
        self._later = later
        self.handlers: dict[str, Callable[..., Any]] = {
            "changes_since": self._changes_since,
            "last_known": self._last_known,
            "verify": self._verify,
        }

    def _changes_since(self, peer: "Peer", number: int, position: bytes) -> object:
        served = _served(peer)

        def told(_caught_up: None = None) -> tuple[bytes, list[Change] | None]:
            changes = served.replays.since(position)
            # The rest comes on the stream.
            first = None if changes is None else next(served.pieces(changes), [])
            return served.changes.last_tid, first

        if served.database.tells_own:
            # What was committed elsewhere may not be here yet.
            return self._read(peer, number, served.database.catch_up, then=told)
        if served.replays.may_be_told(position):
            served.replays.ask(position, lambda: self._reply(peer, number, told()))
            return self._later
        return told()

    def _last_known(self, peer: "Peer", number: int, tids: list[bytes]) -> object:
        if len(tids) > self._limits.last_known_max:
            raise ValueError(f"more than {self._limits.last_known_max} tids at once")
        served = _served(peer)
        looking = served.workers.look_back(
            served.database.last_known,
            tids,
            served.changes.last_tid,
            served.replays.bytes_max,
        )
        return self._answer_with(peer, number, "last_known", looking)

    def _verify(self, peer: "Peer", number: int, revisions: list[Any]) -> object:
        if len(revisions) > self._limits.verify_max:
            raise ValueError(f"more than {self._limits.verify_max} revisions at once")
        served = _served(peer)
        served.counters.verified += len(revisions)
        # What is committed from here on may be told as well, for it is not current.
        then = partial(_as_of, served.changes.last_tid)
        return self._read(peer, number, served.database.outdated, revisions, then=then)


def _as_of(as_of: bytes, value: Any) -> tuple[bytes, Any]:
    return as_of, value


def _served(peer: "Peer") -> Served:
    assert peer.session is not None
    return peer.session.served
