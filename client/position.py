"""The position of a storage in the list of changes, and the one applier.

Changes reach a client by several ways at once: over the stream, with the answer to a
finish, with the answer to a sync, with the welcome of a new session. All of them end
here, under one lock, and are applied in tid order without a gap:

1. The position moves over contiguous changes only; what comes too early waits.
2. It reaches T only after the cache and the registered database have been told T, or,
   for an own transaction, after its tpc_finish callback has returned. Readers of
   ``tid`` who take the lock never see it earlier. Several changes that are there at
   once are one step.
3. A change of an own transaction that a thread is finishing is left to that thread;
   the changes after it wait for it. If that thread loses its channel it gives the
   change up (``give_up``), and it is applied like anybody's. What is missing before a
   change may be in the answer that such a thread waits for, for the server does not
   tell on the stream what it has told there: only when no answer is awaited any more
   is it a gap.
4. Only the session that was adopted last may feed changes; what another one still
   delivers is dropped.
5. While it is not known what changed since the position (``await_verification``),
   changes wait, whatever they follow.

The lock is never held while somebody waits for the network: ``finished`` waits on the
condition, which lets go of it.
"""

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from operator import attrgetter
from typing import Any, Protocol

from ZODB.mvccadapter import MVCCAdapter

from zeolith.client.cache import Cache
from zeolith.client.changes import Change
from zeolith.client.tids import Z64

logger = logging.getLogger(__name__)

# A fork waits no longer than this for a change that is being applied.
FORK_WAIT_S = 5.0


class Source(Protocol):
    """A session that feeds changes."""

    def close(self, reason: str) -> None:
        """End the session without waiting; a new one will be opened."""


_tid_of = attrgetter("tid")


def _tid_of_cache(cache: Cache) -> bytes | None:
    return None if cache.valid_through == Z64 else cache.valid_through


class Position:
    """Where a storage stands, and how it moves."""

    def __init__(self, cache: Cache):
        self._cache = cache
        # The lock is taken as it is: a condition's own ways to it are in Python.
        self._lock = threading.RLock()
        self._condition = threading.Condition(self._lock)
        # How many threads wait on it.
        self._waiting = 0
        # None until the first session is adopted, unless there is something cached.
        self._tid = _tid_of_cache(cache)
        # The ZODB database that wants to hear of changes.
        self._listener: Any = None
        # The session that feeds us, and the one that did last: it may be lost, but what
        # it has answered is true.
        self._source: Source | None = None
        self._last_source: Source | None = None
        # What came and cannot be applied yet, in tid order.
        self._pending: list[Change] = []
        # Whether all of it waits until what is cached was verified.
        self._is_verifying = False
        # The own transaction whose callback runs now, if in its place.
        self.in_place: bytes | None = None
        # The own transactions that a thread is finishing now, and those of them whose
        # answer has not come.
        self._finishing: set[bytes] = set()
        self._unanswered: set[bytes] = set()

    @property
    def tid(self) -> bytes | None:
        """The last change applied. Waits for one that is being applied."""
        with self._lock:
            return self._tid

    @property
    def tid_now(self) -> bytes | None:
        """The last change applied, without waiting: may be one behind."""
        return self._tid

    def take_up_cache(self) -> None:
        """The cache is of another database now, or has come to know of its own.

        There is no session; what is in memory is of no use.
        """
        with self._lock:
            self._pending.clear()
            had_one = self._tid is not None
            self._tid = _tid_of_cache(self._cache)
            if had_one and self._listener is not None:
                self._listener.invalidateCache()
            self._wake()

    def register(self, listener: Any) -> None:
        """Tell ``listener`` (a ZODB database) of changes from now on."""
        with self._lock:
            self._listener = listener

    def adopt(
        self, source: Source, last_tid: bytes, changes: Iterable[Change] | None
    ) -> None:
        """Follow ``source`` from now on.

        ``changes`` are those since the position that the source was told in its
        hello; None means that there is no way from there to ``last_tid``.
        """
        with self._lock:
            self._begin_with(source)
            if self._tid is None:
                self._tid = last_tid
                self._cache.forget_all(last_tid)
            elif changes is None:
                self._start_afresh(last_tid)
            else:
                self._merge(changes)
                self._advance()
                if self._source is None:
                    self._source = self._last_source = source
                    self._start_afresh(last_tid)
            self._wake()

    def await_verification(self, source: Source) -> None:
        """Follow ``source``, but apply nothing: it cannot say what has changed."""
        with self._lock:
            self._begin_with(source)
            self._is_verifying = True
            self._wake()

    def verified(
        self, source: Source, through: bytes, stale: Collection[bytes] | None
    ) -> None:
        """What is cached is right as of ``through``, but for the oids ``stale``.

        None: nothing is. Then goes on with what ``source`` has brought since.
        """
        with self._lock:
            if source is self._source:
                self._is_verifying = False
                if stale is None:
                    self._start_afresh(through)
                else:
                    self._cache.verified(through, stale)
                    self._stand_at(through)
                self._advance()
                self._wake()

    def cut_back(self, source: Source, tid: bytes) -> None:
        """``source`` was restored and has nothing of what came after ``tid``.

        It feeds us no more: the next session begins at ``tid``.
        """
        with self._lock:
            if source is self._source:
                logger.critical(
                    "the server's database has nothing after %s of what we have seen,"
                    " up to %s: it was restored from an older copy. What is cached of"
                    " that is dropped",
                    tid.hex(),
                    self._at().hex(),
                )
                self._cache.cut_back(tid)
                self._stand_at(tid)
                self.leave(source)

    def stand_at_cache(self, source: Source) -> None:
        """The cache stands elsewhere: another process has verified it, or cut it back.

        ``source`` feeds us no more: the next session begins there.
        """
        with self._lock:
            if source is self._source:
                self._stand_at(self._cache.valid_through)
                self.leave(source)

    def leave(self, source: Source) -> None:
        """``source`` is lost; nobody need wait for what it would have brought."""
        with self._lock:
            if self._source is source:
                self._source = None
                if self._is_verifying:
                    # Nothing of it will ever be applied.
                    self._pending.clear()
                    self._is_verifying = False
                self._wake()

    def receive(self, source: Source, changes: Iterable[Change]) -> None:
        """Changes have come over a stream."""
        with self._lock:
            if source is self._source:
                self._merge(changes)
                self._advance()
                self._wake()

    def catch_up(
        self, source: Source, last_tid: bytes, changes: Iterable[Change] | None
    ) -> None:
        """The answer to a sync; returns when ``last_tid`` is applied."""
        with self._lock:
            if source is self._source and changes is not None:
                self._merge(changes)
                self._advance()
                self._wake()
            while source is self._source and self._at() < last_tid:
                self._wait()

    def hold(self) -> bool:
        """Before a fork: nobody may be telling ZODB of a change and hold its locks.

        Whether it is so; then ``let_go`` must follow, by the same thread.
        """
        return self._lock.acquire(timeout=FORK_WAIT_S)

    def let_go(self) -> None:
        """After a fork, in the parent."""
        self._lock.release()

    def forget(self) -> None:
        """In a forked child: the locks may be held by threads that are not here."""
        self._lock = threading.RLock()
        self._condition = threading.Condition(self._lock)
        self._waiting = 0
        self._source = self._last_source = None
        self._pending = []
        self._is_verifying = False
        self._finishing = set()
        self._unanswered = set()
        self._cache.reset(self._tid or Z64)

    # Own transactions

    def begin_finish(self, transaction: bytes) -> bytes:
        """A thread is about to finish ``transaction``; returns the position to send."""
        with self._lock:
            self._finishing.add(transaction)
            self._unanswered.add(transaction)
            return self._at()

    def give_up(self, transaction: bytes) -> None:
        """The thread that was finishing ``transaction`` has lost its channel."""
        with self._lock:
            self._finishing.discard(transaction)
            self._unanswered.discard(transaction)
            self._advance()
            self._wake()

    def finished(
        self,
        source: Source,
        change: Change,
        others: Sequence[Change] | None,
        apply: Callable[[bytes], None],
    ) -> None:
        """An own transaction is committed: call ``apply(tid)`` in its place.

        ``others`` are the other changes since the position sent, before this one and
        perhaps after it; None if the server has forgotten some, then they come over the
        stream. ``apply`` is called exactly once, under the lock, when everything before
        the change was applied; or, when the session is lost before that has come, at
        once, but after the database was told to trust nothing that it has in memory.
        The next session then brings the change like anybody's.
        """
        with self._lock:
            is_in_place = self._is_next(source, change, others) or self._wait_for_turn(
                source, change, others
            )
            if is_in_place:
                self._cache.apply((change,))
            elif self._at() < change.tid and self._listener is not None:
                self._listener.invalidateCache()
            self.in_place = change.tid if is_in_place else None
            try:
                apply(change.tid)
            finally:
                self.in_place = None
                if is_in_place:
                    self._tid = change.tid
                self._finishing.discard(change.transaction or b"")
                if self._pending:
                    self._advance()
                self._wake()

    def _is_next(
        self, source: Source, change: Change, others: Sequence[Change] | None
    ) -> bool:
        """Whether ``change`` has nothing before it, and nobody waits: most often."""
        if (
            others == []
            and not self._pending
            and source is self._last_source
            and change.since == self._tid
            and not self._is_verifying
        ):
            self._unanswered.discard(change.transaction or b"")
            return True
        return False

    def _wait_for_turn(
        self, source: Source, change: Change, others: Sequence[Change] | None
    ) -> bool:
        """Wait until ``change`` is the next one; false if it will not be, here."""
        self._unanswered.discard(change.transaction or b"")
        if others is not None and source is self._last_source:
            self._merge([*others, change])
        self._advance()
        self._wake()
        while self._at() < change.tid:
            pending = self._pending
            if (
                pending
                and pending[0].transaction == change.transaction
                # Or something is missing that another answer will bring.
                and pending[0].since == self._at()
            ):
                del pending[0]
                return True
            # What is pending waits for nothing but threads that finish.
            is_pending = any(each.tid == change.tid for each in pending)
            if source is not self._source and not is_pending:
                return False
            self._wait()
        return False

    # Under the lock

    def _wait(self) -> None:
        self._waiting += 1
        try:
            self._condition.wait()
        finally:
            self._waiting -= 1

    def _wake(self) -> None:
        # Nearly always there is nobody, and to tell them takes a condition a while.
        if self._waiting:
            self._condition.notify_all()

    def _begin_with(self, source: Source) -> None:
        self._source = self._last_source = source
        self._pending.clear()
        self._is_verifying = False

    def _at(self) -> bytes:
        assert self._tid is not None, "no session was ever adopted"
        return self._tid

    def _merge(self, changes: Iterable[Change]) -> None:
        pending = self._pending
        # What is cached may turn out to be good only up to before the position.
        at = Z64 if self._is_verifying else self._at()
        known = {change.tid for change in pending} if pending else ()
        pending += [
            change for change in changes if change.tid > at and change.tid not in known
        ]
        # Nearly always they are in order already.
        pending.sort(key=_tid_of)

    def _advance(self) -> None:
        """Apply what can be applied; a gap ends the session that left it."""
        if self._is_verifying:
            return
        pending = self._pending
        if not pending:
            return
        ready: list[Change] = []
        done = 0
        gap: Change | None = None
        at = self._at()
        for change in pending:
            since, tid, _oids, transaction = change
            if tid > at:
                if since != at:
                    if not self._unanswered or since < at:
                        # Something is missing; or what we have applied is not in the
                        # history of this server, which then was restored.
                        gap = change
                    break
                if transaction in self._finishing:
                    break
                ready.append(change)
                at = tid
            done += 1
        if ready:
            self._apply(ready)
        if gap is not None:
            self._leave_gap(gap)
            return
        del pending[:done]

    def _apply(self, changes: list[Change]) -> None:
        """Tell the cache and the database of the next ``changes``, and go there.

        To hear of many takes each connection of ZODB's adapter no longer than to hear
        of one, and nobody sees what is between them. Any other listener may count on a
        call for each transaction.
        """
        listener = self._listener
        is_adapter = type(listener) is MVCCAdapter
        for piece in [changes] if is_adapter else [[each] for each in changes]:
            self._cache.apply(piece)
            tid = piece[-1].tid
            if listener is not None:
                oids = piece[0].oids
                if len(piece) > 1:
                    oids = [oid for each in piece for oid in each.oids]
                listener.invalidate(tid, oids)
            self._tid = tid

    def _leave_gap(self, change: Change) -> None:
        source, self._source = self._source, None
        self._last_source = None
        self._pending.clear()
        if source is None:
            # The next session brings what is missing.
            return
        at, since = self._at().hex(), change.since.hex()
        reason = f"changes between {at} and {since} are missing"
        if change.since < self._at():
            reason = f"the server's history goes on from {since}, without our {at}"
        logger.error("%s; the session is opened anew", reason)
        source.close(reason)

    def _start_afresh(self, last_tid: bytes) -> None:
        before = self._at()
        if last_tid < before:
            logger.critical(
                "the server's database ends at %s, before %s that we have seen: it"
                " was restored from an older copy. Everything cached is dropped",
                last_tid.hex(),
                before.hex(),
            )
        else:
            logger.warning(
                "the server does not know what changed since %s: everything cached is"
                " dropped",
                before.hex(),
            )
        self._cache.forget_all(last_tid)
        self._stand_at(last_tid)

    def _stand_at(self, tid: bytes) -> None:
        """Go to ``tid`` otherwise than over changes: what ZODB has may be wrong."""
        if self._listener is not None:
            self._listener.invalidateCache()
        self._tid = tid
