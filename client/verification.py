"""Finding out what of a cache is still right, when the server cannot say what changed.

Called by the connector, in a thread of its own, with a session that was just welcomed.
What its stream brings meanwhile waits in the position. Nothing here is asked while a
lock is held, the cache's seam for processes that share it apart (``verifying``).

Two questions, in this order:

* Is what we know of the history that the server has? If it was restored from an older
  copy, we go back to the last change that both have, and say hello from there.
* Which of the cached revisions are not current any more? They are asked for in
  batches, several on their way at once. All others are right as of the welcome's last
  tid, for the answers are as of that one or a later one.
"""

from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

from zeolith.client.cache import Cache
from zeolith.client.position import Position
from zeolith.client.session import Session
from zeolith.client.tids import Z64
from zeolith.protocol.limits import Limits

# So many requests are on their way while the server works on one of them.
REQUESTS_AHEAD = 3


class Verified(NamedTuple):
    """What came of it."""

    revisions: int
    dropped: int


def verify(
    session: Session, position: Position, cache: Cache, limits: Limits
) -> Verified | None:
    """Verify ``cache`` and let ``position`` go on with ``session``.

    None: another session has to be opened first, from where the position is now; this
    one has ended. Raises ChannelLost, and whatever the server answers.
    """
    with cache.verifying():
        at = position.tid
        assert at is not None, "there is no position to verify"
        if cache.valid_through not in (at, Z64):
            # Another process did it while we waited.
            position.stand_at_cache(session)
            session.close("the cache was verified by another process")
            return None
        tids = [at, *(tid for tid in cache.known_tids() if tid < at)]
        known, complete_from = session.call("last_known", tids[: limits.last_known_max])
        if known != at and at > complete_from:
            return _go_back(session, position, known)
        return _compare(session, position, cache)


def _go_back(
    session: Session, position: Position, known: bytes | None
) -> Verified | None:
    """Our last change is not in the server's history: to the last one that is."""
    if known is None:
        position.verified(session, session.welcome["last_tid"], None)
        return Verified(0, 0)
    position.cut_back(session, known)
    session.close(f"our history was cut back to {known.hex()}")
    return None


def _compare(session: Session, position: Position, cache: Cache) -> Verified:
    revisions = 0

    def calls() -> Iterator[tuple[list[tuple[bytes, bytes]]]]:
        nonlocal revisions
        # Not all of them in memory: there may be millions.
        for batch in cache.open_revisions():
            revisions += len(batch)
            yield (batch,)

    stale: set[bytes] = set()
    with closing(session.answers("verify", calls(), REQUESTS_AHEAD)) as answers:
        for _as_of, oids in answers:
            stale.update(oids)
    position.verified(session, session.welcome["last_tid"], stale)
    return Verified(revisions, len(stale))
