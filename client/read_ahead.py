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
somebody waits, and on the way of no object that is in the cache, or held.

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


@dataclass(frozen=True, slots=True)
class Counters:
    """What reading ahead has brought so far."""

    # Answers, the records that came in them ahead of time, and those that were used.
    answers: int
    sent: int
    sent_bytes: int
    used: int


class _Answer(NamedTuple):
    """What the records of one answer have in common."""

    as_of: bytes
    # Its records are good for snapshots up to this one, if they have not ended before.
    until: bytes
    # The cache's, when the server was asked.
    history: int


# Data, tid and end of a revision as they came, whence, and where it is counted when it
# is used.
_Held = tuple[list[Any], _Answer, Batch | None]


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
        self._answers = self._sent = self._sent_bytes = self._unused = 0
        # Taken from without the lock.
        self._held: dict[bytes, _Held] = {}
        self.forget()

    def forget(self) -> None:
        """Hold nothing; also in a forked child, whose parent had the lock perhaps."""
        self._lock = threading.Lock()
        self._unused += len(self._held)
        self._held = {}
        # No less than what is held.
        self._bytes = 0
        self._own = _OfThread()
        # Of all threads, the oldest first; whoever takes one out may use it.
        self._forwards: dict[Asked, None] = {}
        self._forwards_max = FORWARDS_MAX

    @property
    def counters(self) -> Counters:
        """The counters now; a moment's truth while threads are at work."""
        used = self._sent - self._unused - len(self._held)
        return Counters(self._answers, self._sent, self._sent_bytes, used)

    @property
    def held_bytes(self) -> int:
        """What is held, and what that costs, by estimate."""
        records = list(self._held.values())
        return sum(len(each[0][0]) + ENTRY_BYTES for each in records)

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
        held = self._held.pop(oid, None)
        if held is None:
            return None
        (data, tid, end), (as_of, until, history), batch = held
        cache = self._cache
        if history != cache.history:
            self._note_unused()
            return None
        cache.store(oid, tid, end, data, as_of, history)
        if batch is not None:
            batch.used += 1
        self._own.trail.latest = oid, data
        if tid < before <= (until if end is None else min(end, until)):
            return data, tid, end
        # It was not known then what that snapshot is. Perhaps the cache knows.
        kept = cache.load(oid, before)
        if kept is None:
            self._note_unused()
        return kept

    def _note_unused(self) -> None:
        with self._lock:
            self._unused += 1

    def _keep(
        self, answer: Any, walk: Walk, wish: Wish, needed: bytes | None = None
    ) -> Found | None:
        """Hold what was answered, but for what is ``needed``, which is returned."""
        history, as_of, revisions, linked = answer
        if not revisions:
            raise StorageError("the server answers for no object")
        # What the server knows and we do not may be lost, and nothing given up for it.
        known = min(as_of, self._cache.valid_through)
        common = _Answer(known, following(known), history)
        batch = walk.batch
        came = list(zip(wish.oids, revisions, strict=False))
        new: dict[bytes, _Held] = {
            oid: (revision, common, batch)
            for oid, revision in came
            if revision is not None
        }
        links = [(oid, revision) for oid, *revision in linked]
        for oid, revision in came[-1:] + links:
            if oid == walk.link and revision is not None:
                walk.enter(revision[0])
                # Of a walk through what buckets refer to, the buckets come much earlier
                # than they are used.
                new[oid] = revision, common, None if walk.steps else batch
        found = new.pop(needed or b"", None)
        batch.sent = sum(each[2] is batch for each in new.values())
        self._hold(new)
        if needed is None or found is None:
            return None
        data, tid, end = found[0]
        self._cache.store(needed, tid, end, data, as_of, history)
        return data, tid, end

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
        data_bytes = sum(len(each[0][0]) for each in new.values())
        held = self._held
        with self._lock:
            self._answers += 1
            self._sent += len(new)
            self._sent_bytes += data_bytes
            self._unused += len(new.keys() & held.keys())
            held.update(new)
            self._bytes += data_bytes + ENTRY_BYTES * len(new)
            if self._bytes > HELD_BYTES_MAX:
                self._make_room()

    def _make_room(self) -> None:
        """Under the lock: let go of the oldest, and of no more than is needed."""
        # Much has been used meanwhile.
        self._bytes = self.held_bytes
        for oid in list(self._held):
            if self._bytes <= HELD_BYTES_MAX:
                break
            dropped = self._held.pop(oid, None)
            if dropped is not None:
                self._unused += 1
                self._bytes -= len(dropped[0][0]) + ENTRY_BYTES


def reading_ahead(storage: "ClientStorage") -> ReadAhead:
    """That of ``storage``, which has a cache already."""
    return ReadAhead(storage.call, lambda: storage.current_session, storage.cache)
