"""Loading many objects at once: requests that do not wait for each other's answers.

``load_many`` is called by whichever thread needs the objects. What is not in the cache
is asked for in requests small enough that the server has time for others in between;
several of them are on their way at once, so that neither end waits for the other, and
what is on its way is bounded. A server answers only for the first objects of a request
if they are large; the others are asked for again.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any

from ZODB.POSException import StorageError

from zeolith.client.cache import Cache
from zeolith.client.downloads import Conversation, Converse
from zeolith.client.errors import ChannelLost
from zeolith.protocol.limits import Limits

# Of one request: a millisecond or two of the server's.
REQUEST_OIDS = 250
# The others are on their way while the server works on one of them.
REQUESTS_AHEAD = 3

# Data, tid, and the end of a revision.
Found = tuple[bytes, bytes, bytes | None]


def load_many(
    converse: Converse,
    cache: Cache,
    oids: Iterable[bytes],
    before: bytes,
    limits: Limits,
    take: Callable[[bytes, Found], object],
) -> None:
    """Call ``take(oid, found)`` for all of ``oids`` that are there, in no given order.

    Raises ClientDisconnected; StorageError if the server answers nonsense.
    """
    wanted = []
    for oid in dict.fromkeys(oids):
        found = cache.load(oid, before)
        if found is None:
            wanted.append(oid)
        else:
            take(oid, found)
    loading = _Loading(cache, wanted, before, limits, take)
    while loading.wanted:
        loading.begin()
        converse(loading.go_on)


class _Loading:
    """What is still to be loaded."""

    def __init__(
        self,
        cache: Cache,
        wanted: list[bytes],
        before: bytes,
        limits: Limits,
        take: Callable[[bytes, Found], object],
    ):
        self._cache = cache
        self.wanted = wanted
        self._before = before
        self._take = take
        self._oids_max = min(
            REQUEST_OIDS, limits.load_many_max, limits.load_many_answered_max
        )
        self._history = cache.history

    def begin(self) -> None:
        """Before a session is chosen: what it answers is of this history, or older."""
        self._history = self._cache.history

    def go_on(self, session: Conversation) -> None:
        """Ask once for everything; raises ChannelLost if nothing of it comes.

        What comes before the connection is lost counts, as in ``downloads``.
        """
        batches = list(self._batches())
        rest: list[bytes] = []
        answered = 0
        try:
            with closing(self._answers(session, batches)) as answers:
                for batch, (as_of, revisions) in zip(batches, answers, strict=False):
                    rest += self._keep(batch, as_of, revisions)
                    answered += 1
        except ChannelLost:
            if not answered:
                raise
        for batch in batches[answered:]:
            rest += batch
        self.wanted = rest

    def _answers(self, session: Conversation, batches: list[list[bytes]]) -> Any:
        if len(batches) == 1:
            return _once(session.call("load_many", batches[0], self._before))
        calls = ((batch, self._before) for batch in batches)
        return session.answers("load_many", calls, REQUESTS_AHEAD)

    def _batches(self) -> Iterator[list[bytes]]:
        for start in range(0, len(self.wanted), self._oids_max):
            yield self.wanted[start : start + self._oids_max]

    def _keep(
        self, batch: list[bytes], as_of: bytes, revisions: list[Any]
    ) -> list[bytes]:
        """Take what was answered; what was not is returned."""
        if not revisions:
            raise StorageError(f"the server answers for none of {len(batch)} objects")
        for oid, revision in zip(batch, revisions, strict=False):
            if revision is not None:
                data, start, end = revision
                self._cache.store(oid, start, end, data, as_of, self._history)
                self._take(oid, (data, start, end))
        return batch[len(revisions) :]


def _once(value: Any) -> Iterator[Any]:
    yield value
