"""Records that will be asked for next, loaded together with one that is missed.

``ReadAhead.load`` is called by whichever thread has missed an object in the cache. If
the thread's ``Trail`` says that it walks through a BTree or a list, more is asked for
than the one object, with ``load_ahead``. What comes beside it is *held* here, not in
the cache: it goes there when it is used, so that wrong guesses throw nothing out of the
cache, and what was used can be counted without anything on the way of a cache hit.

What is held is never wrong. A record is kept with the tid as of which it is true and
with the cache's history at that time, and goes into the cache by the same rules as the
answer to a load that took as long (``Cache.store``). It is used for a snapshot that
ended when it was true, for that does not change any more; else the cache decides.

What is held is bounded, and the oldest goes first. There is one lock, never held while
somebody waits, and not on the way of an object that is in the cache.

Where a walk goes on for long, the answer after the next is on its way while the thread
uses what it has, so that it does not wait for the server or the network at all: see
``asking``. Each thread waits for one of these at most; one that nobody takes is dropped
when others need its place, or at the end.

The client guesses, because it knows what it has missed and what was used; the server
only follows links from bucket to bucket, which would cost the client a round trip each.
Rejected: a server that sends along whatever a record refers to, which sends most of it
in vain and what the client has already.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ZODB.POSException import StorageError

from zeolith.client.asking import Asked, Lender, ask
from zeolith.client.cache import ENTRY_BYTES, Cache
from zeolith.client.errors import ChannelLost
from zeolith.client.tids import MAX_TID, following
from zeolith.client.trails import Batch, Trail, Walk, Wish

if TYPE_CHECKING:
    from zeolith.client.storage import ClientStorage

# Of one answer, beside the object that is needed.
AHEAD_BYTES = 128 * 1024
# Of all that is held for the threads of a storage.
HELD_BYTES_MAX = 4 * 1024 * 1024
# Answers that are waited for, or that nobody waits for any more, of all threads.
FORWARDS_MAX = 50

# Data, tid, and the end of a revision.
Found = tuple[bytes, bytes, bytes | None]


@dataclass(slots=True)
class Counters:
    """What reading ahead has brought; threads may count at the same time."""

    # Answers, the records that came in them ahead of time, and those that were used.
    answers: int = 0
    sent: int = 0
    sent_bytes: int = 0
    used: int = 0


class _Answer(NamedTuple):
    """What the records of one answer have in common."""

    as_of: bytes
    # Its records are good for snapshots up to this one, if they have not ended before.
    until: bytes
    # The cache's, when the server was asked.
    history: int


# What is held of a record: the revision, whence it came, where it is counted when it is
# used.
_Held = tuple[Found, _Answer, Batch | None]


class _Forward(NamedTuple):
    """What was asked for before it is needed."""

    asked: Asked
    wish: Wish
    # The cache's, before it was asked.
    history: int


class _OfThread(threading.local):
    """What belongs to the thread that looks at it."""

    def __init__(self) -> None:
        self.trail = Trail()
        self.forward: _Forward | None = None


class ReadAhead:
    """The reading ahead of one storage.

    ``call`` is its ``ClientStorage.call``; ``session`` gives the session now, if there
    is one.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        session: Callable[[], Lender | None],
        cache: Cache,
    ):
        self._call = call
        self._session = session
        self._cache = cache
        self.counters = Counters()
        self.forget()

    def forget(self) -> None:
        """Hold nothing; also in a forked child, whose parent had the lock perhaps."""
        self._lock = threading.Lock()
        self._held: dict[bytes, _Held] = {}
        self.held_bytes = 0
        self._own = _OfThread()
        # Of all threads, the oldest first; whoever takes one out may use it.
        self._forwards: dict[Asked, None] = {}
        self._forwards_max = FORWARDS_MAX

    def close(self) -> None:
        """Wait for nothing any more; before the session ends."""
        with self._lock:
            self._forwards_max = 0
            forwards, self._forwards = self._forwards, {}
        for asked in forwards:
            asked.drop()

    def load(self, oid: bytes, before: bytes) -> Found | None:
        """What ``loadBefore`` is to return; None: it must be loaded as ever.

        Raises as ``ClientStorage.call`` does.
        """
        if oid in self._held:
            found = self._take(oid, before)
            if found is not None:
                return found
        if before == MAX_TID:
            # Of what is current whenever nothing is known ahead of time.
            return None
        own = self._own
        step = own.trail.missed(oid)
        if step is None:
            return None
        walk, wish = step
        answer = self._came_forward(own, wish)
        if answer is not None:
            self._keep(answer, walk, wish)
            found = self._take(oid, before)
        elif oid != wish.oids[0]:
            # It was asked for as one of others, and the answer is lost.
            return None
        else:
            history = self._cache.history
            args = wish.oids, before, wish.links, AHEAD_BYTES
            answer = history, *self._call("load_ahead", *args)
            found = self._keep(answer, walk, wish, needed=oid)
        self._go_forward(own, walk, before)
        return found

    def loaded(self, oid: bytes, record: bytes) -> None:
        """The calling thread has loaded ``record``, as ever."""
        self._own.trail.latest = oid, record

    def _take(self, oid: bytes, before: bytes) -> Found | None:
        with self._lock:
            held = self._held.pop(oid, None)
            if held is None:
                return None
            found, answer, batch = held
            data, tid, end = found
            self.held_bytes -= len(data) + ENTRY_BYTES
        as_of, until, history = answer
        cache = self._cache
        if history != cache.history:
            return None
        cache.store(oid, tid, end, data, as_of, history)
        if not tid < before <= (until if end is None else min(end, until)):
            # It was not known then what that snapshot is. Perhaps the cache knows.
            kept = cache.load(oid, before)
            if kept is None:
                return None
            found = kept
        self.counters.used += 1
        if batch is not None:
            batch.used += 1
        self._own.trail.latest = oid, data
        return found

    def _keep(
        self, answer: Any, walk: Walk, wish: Wish, needed: bytes | None = None
    ) -> Found | None:
        """Hold what was answered, but for what is ``needed``, which is returned."""
        history, as_of, revisions, linked = answer
        if not revisions:
            raise StorageError("the server answers for no object")
        came = list(zip(wish.oids, map(_found, revisions), strict=False))
        came += [(oid, (data, tid, end)) for oid, data, tid, end in linked]
        # What the server knows and we do not may be lost, and nothing given up for it.
        known = min(as_of, self._cache.valid_through)
        common = _Answer(known, following(known), history)
        held: dict[bytes, _Held] = {}
        batch = walk.batch
        taken = None
        for oid, found in came:
            if found is None:
                continue
            is_link = oid == walk.link
            if is_link:
                walk.enter(found[0])
            if oid == needed:
                taken = data, tid, end = found
                self._cache.store(oid, tid, end, data, as_of, history)
                continue
            # Of a walk through what buckets refer to, the buckets come much earlier
            # than they are used.
            counted = None if is_link and walk.steps else batch
            held[oid] = found, common, counted
            if counted is not None:
                batch.sent += 1
        self._hold(held)
        return taken

    def _go_forward(self, own: _OfThread, walk: Walk, before: bytes) -> None:
        """Let the server work meanwhile, if it is sure enough what comes next."""
        wish = walk.go_forward()
        session = self._session() if wish is not None else None
        if wish is None or session is None:
            return
        self._drop_forward(own)
        history = self._cache.history
        args = wish.oids, before, wish.links, AHEAD_BYTES
        try:
            asked = ask(session, "load_ahead", *args)
        except ChannelLost:
            # Whoever needs it will see.
            return
        own.forward = _Forward(asked, wish, history)
        with self._lock:
            self._forwards[asked] = None
            oldest = None
            if len(self._forwards) > self._forwards_max:
                oldest = next(iter(self._forwards))
                del self._forwards[oldest]
        if oldest is not None:
            oldest.drop()

    def _came_forward(self, own: _OfThread, wish: Wish) -> Any:
        """The answer to ``wish`` if it was asked for before, and not lost."""
        forward = own.forward
        if forward is None or forward.wish is not wish:
            return None
        own.forward = None
        if not self._is_ours(forward.asked):
            return None
        try:
            return forward.history, *forward.asked.answer()
        except ChannelLost:
            return None

    def _drop_forward(self, own: _OfThread) -> None:
        """Of a walk that has come to nothing."""
        forward, own.forward = own.forward, None
        if forward is not None and self._is_ours(forward.asked):
            forward.asked.drop()

    def _is_ours(self, asked: Asked) -> bool:
        """Whether nobody else has dropped it; then nobody will."""
        with self._lock:
            is_ours = asked in self._forwards
            self._forwards.pop(asked, None)
            return is_ours

    def _hold(self, new: dict[bytes, _Held]) -> None:
        counters, held = self.counters, self._held
        size = sum(len(each[0][0]) for each in new.values())
        with self._lock:
            counters.answers += 1
            counters.sent += len(new)
            counters.sent_bytes += size
            for oid in new:
                if oid in held:
                    self._drop(oid)
            held.update(new)
            self.held_bytes += size + ENTRY_BYTES * len(new)
            while self.held_bytes > HELD_BYTES_MAX:
                self._drop(next(iter(held)))

    def _drop(self, oid: bytes) -> None:
        """Under the lock: what is held of ``oid`` is not held any more."""
        found = self._held.pop(oid)[0]
        self.held_bytes -= len(found[0]) + ENTRY_BYTES


def reading_ahead(storage: "ClientStorage") -> ReadAhead:
    """That of ``storage``, which has a cache already."""
    return ReadAhead(storage.call, lambda: storage.current_session, storage.cache)


def _found(revision: list[Any] | None) -> Found | None:
    if revision is None:
        return None
    data, tid, end = revision
    return data, tid, end
