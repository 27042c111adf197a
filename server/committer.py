r"""Transactions from vote to finish: side by side, and to the disk in groups.

The Committer belongs to the loop. It decides who may vote (storage.locks) and what the
writer thread does next; each step's end comes back to the loop as a callback.

::

    WAITING --its objects are free--> VOTING --voted--> VOTED --finish--> FINISHING
       |                               | \                |                   |
       |                               |  unresolved -> RESOLVING             | on disk
       |                               |                  | resolve: VOTING   v
       `-----------error---------------+--abandon--> ABORTING ------------> ENDED

A transaction that shares no object with another never waits for it between vote and
finish. Those that finish before the writer is free and awake are its next group. A
transaction that is *alone* (an undo, say; storage.preparing) begins when all before it
have ended, and those after it wait for its end.

Invariants:

1. Whatever ends a commit (finish, abort, an error, the channel's end, a timeout), it
   ends through ``_release``, which lets those go on who waited for its objects.
2. Nothing is announced before the writer thread said that it is on disk; and then, in
   one callback and in the order of tids, changes are appended, locks released and
   committers answered, so nobody can see a part of it. Everybody is told at once if
   the disk is idle then, else soon and of several together (served). Who is alone may
   have its answer before that (delivery): so whoever looks at what has come calls
   ``catch_up`` first, if there is anything ``on_disk``.
3. A commit whose channel is gone while a thread works for it is only marked
   (``is_abandoned``); the callback of that step aborts it. A commit that is being
   finished is never aborted.
4. A database that tells its own commits through ``follow`` (a relay's) has them
   appended and announced there (server.relay), before the finish is answered.
5. A transaction of which its client was told that it is not here does not vote when it
   comes at last: it may have been on its way, and a vote may be finished at once.
6. After a disaster in finish nothing is written any more: every vote gets the error.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

from ZODB.POSException import ConflictError, StorageSystemError, StorageTransactionError

from zeolith.protocol.errors import ShuttingDown, TransactionTimeout
from zeolith.server.delivery import Delivery
from zeolith.server.patience import Patience
from zeolith.storage.database import (
    BrokenDatabase,
    Finished,
    NotCommitted,
    OutcomeUnknown,
    Prepared,
    Transaction,
    Unresolved,
    Voted,
    WouldBlock,
)
from zeolith.storage.locks import ALONE, Claim, Locks

if TYPE_CHECKING:
    from zeolith.server.served import Served

logger = logging.getLogger(__name__)

# What more operations claim is found out in a thread: a tenth of a microsecond each.
CLAIMED_NOWAIT_MAX = 1000
# So many transactions are remembered that were given up before they had come.
GIVEN_UP_MAX = 10_000

_ENDED = StorageTransactionError("the transaction has ended")
_GIVEN_UP = StorageTransactionError("its client gave the transaction up")

# Called once with a value, or with an error.
Answer = Callable[[Any, BaseException | None], None]
# Makes an answer that another thread may send; None if the loop must.
Offer = Callable[[], Delivery | None]
_Outcomes = list[Finished | Exception]


class Phase(Enum):
    """Where a commit stands; see the drawing above."""

    WAITING = "waiting"
    VOTING = "voting"
    RESOLVING = "resolving"
    VOTED = "voted"
    FINISHING = "finishing"
    ABORTING = "aborting"
    ENDED = "ended"


class Commit:
    """One transaction of one channel."""

    def __init__(self, transaction: Transaction, label: str):
        self.transaction = transaction
        # Who it is, for status and log.
        self.label = label
        self.phase = Phase.WAITING
        self.claim: Claim = ALONE
        # Where it votes beside others.
        self.prepared: Prepared | None = None
        # For its client, between vote and finish.
        self.patience = Patience()
        self.is_abandoned = False
        # Why later requests for it fail; None while it lives.
        self.ended_by: Exception | None = None
        # Whoever waits for the step under way.
        self.answer: Answer | None = None
        # Lets another thread send the answer to finish.
        self.offer: Offer | None = None
        # Whoever wants to know when it has ended.
        self.when_ended: list[Callable[[], None]] = []


class Committer:
    """Takes the commits of one database through their phases."""

    def __init__(self, served: "Served"):
        self._served = served
        self._database = served.database
        self._workers = served.workers
        self._locks: Locks[Commit] = Locks()
        # All from vote to end, first come first.
        self._commits: dict[Commit, None] = {}
        # Those whose objects are free, and who have not begun to vote.
        self._ready: deque[Commit] = deque()
        self._is_starting = False
        # Those who wait for the disk: the loop appends, the writer takes them.
        self._finishing: deque[Commit] = deque()
        # From the call of the writer until all see what it has done.
        self._is_appending = False
        # The group that the writer has taken; and what became of it, from the writer.
        self._appending: list[Commit] = []
        self.on_disk: _Outcomes | None = None
        self._broken: BrokenDatabase | None = None
        # Their ids, the oldest first.
        self._given_up: dict[bytes, None] = {}
        self._is_stopping = False
        # Set when nobody is there any more; only who stops looks at it.
        self._is_idle = asyncio.Event()

    # What channels ask for

    def vote(self, commit: Commit, answer: Answer) -> None:
        """Claim what it needs, and vote; the answer is Voted or Unresolved."""
        commit.answer = answer
        if self._broken is not None:
            self.abandon(commit, StorageSystemError(_given_up(self._broken)), None)
            return
        if self._is_stopping:
            self.abandon(commit, ShuttingDown("the server is stopping"), None)
            return
        if commit.transaction.id in self._given_up:
            self.abandon(commit, _GIVEN_UP, None)
            return
        self._commits[commit] = None
        transaction = commit.transaction
        operations = transaction.operations
        if type(operations) is list and len(operations) <= CLAIMED_NOWAIT_MAX:
            self._request(commit, self._database.claim(transaction))
            return
        commit.phase = Phase.VOTING
        claiming = self._workers.vote(self._database.claim, transaction)
        claiming.add_done_callback(lambda done: self._claimed(commit, done))

    def resolve(
        self, commit: Commit, resolutions: dict[bytes, bytes], answer: Answer
    ) -> None:
        """Go on with the client's resolutions; the answer is as for vote."""
        if self._expect(commit, Phase.RESOLVING, answer):
            self._step(commit, Phase.VOTING, answer)
            if commit.prepared is None:
                voting = self._workers.write(self._database.resolve, resolutions)
            else:
                voting = self._workers.vote(commit.prepared.vote, resolutions)
            voting.add_done_callback(lambda done: self._voted(commit, done))

    def finish(
        self, commit: Commit, answer: Answer, offer: Offer | None = None
    ) -> None:
        """Commit for good; the answer is the Finished. ``offer``: see delivery."""
        if not self._expect(commit, Phase.VOTED, answer):
            return
        commit.offer = offer
        self._step(commit, Phase.FINISHING, answer)
        if commit.prepared is not None:
            self._finishing.append(commit)
            self._append_next()
            return
        finishing = self._workers.write(self._database.finish)
        finishing.add_done_callback(lambda done: self._finished(commit, done))

    def abandon(self, commit: Commit, reason: Exception, answer: Answer | None) -> None:
        """Abort ``commit`` in whatever phase it is; ``answer`` when it has ended."""
        commit.ended_by = commit.ended_by or reason
        if commit.phase is Phase.RESOLVING:
            # Its client could not do it either.
            self._served.counters.conflicts += 1
        if commit.phase is Phase.WAITING:
            self._answer(commit, None, reason)
            self._release(commit, reason)
            self._start_ready()
        elif commit.phase in (Phase.RESOLVING, Phase.VOTED):
            self._abort(commit, answer)
            return
        elif commit.phase in (Phase.VOTING, Phase.FINISHING):
            commit.is_abandoned = True
        if answer is not None:
            if commit.phase is Phase.ENDED:
                answer(None, None)
            else:
                commit.when_ended.append(partial(answer, None, None))

    def settle(self, transaction_id: bytes, settled: Callable[[], None]) -> None:
        """Call ``settled`` once ``transaction_id`` is neither here nor there.

        Its client has lost the channel: what is not being finished yet never will be,
        even if it is only on its way to us now.
        """
        for commit in self._commits:
            if commit.transaction.id == transaction_id:
                commit.when_ended.append(settled)
                self.abandon(commit, _GIVEN_UP, None)
                return
        self._given_up[transaction_id] = None
        if len(self._given_up) > GIVEN_UP_MAX:
            del self._given_up[next(iter(self._given_up))]
        settled()

    # What the clock asks for

    def tick(self, now: float, timeout_s: float) -> None:
        """Abort those for whom the server has waited too long."""
        for commit in tuple(self._commits):
            if not commit.patience.is_over(now, timeout_s):
                continue
            logger.warning(
                "the transaction of %s was aborted: voted, and not finished in %g s",
                commit.label,
                timeout_s,
            )
            self._served.counters.timeouts += 1
            reason = TransactionTimeout(
                f"the transaction was not finished within {timeout_s:g} s after its"
                " vote (transaction-timeout) and is aborted"
            )
            self.abandon(commit, reason, None)

    # What the daemon asks for

    async def drain(self, timeout_s: float) -> None:
        """Take no new votes, and wait for those under way, but not for ever."""
        self._is_stopping = True
        # The last first: or the end of one would let the next one vote.
        for commit in reversed(self._locks.waiting):
            self.abandon(commit, ShuttingDown("the server is stopping"), None)
        if not self._commits:
            self._is_idle.set()
        try:
            await asyncio.wait_for(self._is_idle.wait(), timeout_s)
        except TimeoutError:
            for commit in tuple(self._commits):
                logger.warning(
                    "the transaction of %s did not finish in %g s and is aborted",
                    commit.label,
                    timeout_s,
                )
                self.abandon(commit, ShuttingDown("the server is stopping"), None)
            # It may sit in a thread; then the thread is waited for later.
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_idle.wait(), timeout_s)

    # What status asks for

    @property
    def holders(self) -> tuple[Commit, ...]:
        """Those who hold objects, from vote to finish."""
        return self._locks.holders

    @property
    def waiting(self) -> tuple[Commit, ...]:
        """Those who wait for objects of others."""
        return self._locks.waiting

    @property
    def broken(self) -> BrokenDatabase | None:
        """The disaster after which nothing is written any more."""
        return self._broken

    # Votes

    def _claimed(self, commit: Commit, done: "asyncio.Future[Claim]") -> None:
        error = done.exception()
        if commit.is_abandoned:
            self._refuse(commit, commit.ended_by or _ENDED)
        elif error is not None:
            self._refuse(commit, error)
        else:
            self._request(commit, done.result())

    def _request(self, commit: Commit, claim: Claim) -> None:
        commit.phase = Phase.WAITING
        commit.claim = claim
        if self._locks.request(commit, claim):
            self._ready.append(commit)
            self._start_ready()

    def _start_ready(self) -> None:
        """Let those vote whose objects are free.

        One after the other: a vote that fails at once may set the next one free, and
        the line may be long.
        """
        if self._broken is not None:
            # They are about to hear of it.
            self._ready.clear()
        if self._is_starting:
            return
        self._is_starting = True
        try:
            while self._ready:
                commit = self._ready.popleft()
                if commit.phase is Phase.WAITING:
                    self._start(commit)
        finally:
            self._is_starting = False

    def _start(self, commit: Commit) -> None:
        commit.phase = Phase.VOTING
        if commit.claim.is_alone:
            voting = self._workers.write(self._database.vote, commit.transaction)
        else:
            try:
                prepared = self._database.prepare(commit.transaction)
                commit.prepared = prepared
                voted = prepared.vote_nowait()
            except WouldBlock:
                voting = self._workers.vote(prepared.vote, {})
            except Exception as error:  # noqa: BLE001 - every error is an answer
                self._refuse(commit, error)
                return
            else:
                self._has_voted(commit, voted)
                return
        voting.add_done_callback(lambda done: self._voted(commit, done))

    def _voted(
        self, commit: Commit, done: "asyncio.Future[Voted | Unresolved]"
    ) -> None:
        error = done.exception()
        if error is not None:
            self._refuse(commit, error)
        elif commit.is_abandoned:
            self._answer(commit, None, commit.ended_by)
            self._abort(commit, None)
        else:
            self._has_voted(commit, done.result())

    def _has_voted(self, commit: Commit, result: Voted | Unresolved) -> None:
        if isinstance(result, Voted):
            commit.phase = Phase.VOTED
            self._served.counters.conflicts_resolved += len(result.resolved)
        else:
            commit.phase = Phase.RESOLVING
        phase = commit.phase
        self._answer(commit, result, None)
        # Unless whoever was answered has gone on at once.
        if commit.phase is phase:
            commit.patience.begins(asyncio.get_running_loop().time())

    def _refuse(self, commit: Commit, error: BaseException) -> None:
        """The vote has failed, and left nothing behind."""
        counters = self._served.counters
        if isinstance(error, ConflictError):
            counters.conflicts += 1
        counters.aborts += 1
        # The locks first: nothing about the answer may hold the others up.
        self._release(commit, StorageTransactionError("the vote failed"))
        self._answer(commit, None, error)
        self._start_ready()

    # Finishing in groups

    def _append_next(self) -> None:
        """Call the writer to those who wait for the disk, when it is free."""
        if self._is_appending or not self._finishing:
            return
        self._is_appending = True
        # With several the loop is awake anyway, and each answer tells of the others.
        offer = self._finishing[0].offer if len(self._finishing) == 1 else None
        delivery = None if offer is None else offer()
        appending = self._workers.write(self._append, delivery)
        appending.add_done_callback(self._has_appended)

    def _append(self, delivery: Delivery | None) -> None:
        """In the writer thread: whoever has come until it is awake is in the group."""
        waiting = self._finishing
        group = self._appending = [waiting.popleft() for _ in range(len(waiting))]
        outcomes = self._database.append([c.prepared for c in group if c.prepared])
        self.on_disk = outcomes
        outcome = outcomes[0]
        if delivery is not None and len(group) == 1 and isinstance(outcome, Finished):
            delivery.send(outcome.tid)

    def _has_appended(self, done: "asyncio.Future[None]") -> None:
        error = done.exception()
        if error is None:
            # The next group may be there as well by now.
            self.catch_up()
        else:
            # It is never free again.
            self._break(error, self._appending)

    def catch_up(self) -> None:
        """Let everybody see what the writer has on the disk."""
        outcomes = self.on_disk
        if outcomes is None:
            return
        # The writer does not touch it before it has the next group.
        self.on_disk = None
        self._is_appending = False
        group, self._appending = self._appending, []
        self._appended(group, outcomes)

    def _appended(self, group: list[Commit], outcomes: _Outcomes) -> None:
        finished = [each for each in outcomes if isinstance(each, Finished)]
        error = self._disorder(finished)
        if error is not None:
            self._break(error, group)
            return
        served = self._served
        served.counters.commits += len(finished)
        changes = []
        for commit, outcome in zip(group, outcomes, strict=True):
            if isinstance(outcome, Finished):
                tid, oids = outcome
                served.counters.stores += len(oids)
                changes.append(served.append(tid, oids, commit.transaction.id))
        # The disk first: whoever waits for it need not wait for what follows.
        self._append_next()
        for commit in group:
            self._release(commit, _ENDED)
        self._start_ready()
        # Whoever waits for the server goes before whoever only listens.
        for commit, outcome in zip(group, outcomes, strict=True):
            if isinstance(outcome, Finished):
                self._answer(commit, outcome, None)
            else:
                self._fail(commit, outcome)
        if changes:
            served.announce(changes, more_soon=self._is_appending)

    def _fail(self, commit: Commit, error: Exception) -> None:
        """A finish of which nothing was committed."""
        logger.error("the transaction of %s was refused: %s", commit.label, error)
        self._served.counters.aborts += 1
        self._answer(commit, None, error)

    # Finishing alone

    def _finished(self, commit: Commit, done: "asyncio.Future[Finished]") -> None:
        error = done.exception()
        if error is None and not self._database.tells_own:
            error = self._disorder([done.result()])
        if error is None:
            tid, oids = done.result()
            self._served.counters.commits += 1
            self._served.counters.stores += len(oids)
            changes = []
            if not self._database.tells_own:
                changes.append(self._served.append(tid, oids, commit.transaction.id))
            self._release(commit, _ENDED)
            self._start_ready()
            self._answer(commit, done.result(), None)
            if changes:
                self._served.announce(changes)
        elif self._database.tells_own and not isinstance(error, BrokenDatabase):
            # The upstream's affair: it may go on at once, and so may we.
            self._served.counters.aborts += 1
            if isinstance(error, OutcomeUnknown):
                error = StorageSystemError(str(error))
            self._release(commit, _ENDED)
            self._answer(commit, None, error)
            self._start_ready()
        else:
            self._break(error, [commit])

    # Ends

    def _disorder(self, finished: list[Finished]) -> BrokenDatabase | None:
        """Why the database must not be written any more, if tids do not grow."""
        last_tid = self._served.changes.last_tid
        for each in finished:
            if each.tid <= last_tid:
                return BrokenDatabase(
                    f"the storage committed {each.tid.hex()} after {last_tid.hex()}:"
                    " transaction ids must grow"
                )
            last_tid = each.tid
        return None

    def _break(self, error: BaseException, group: list[Commit]) -> None:
        """A disaster, while ``group`` was finished: nothing is written any more."""
        logger.critical(
            "%s: nothing is written any more until a restart",
            self._served.name,
            exc_info=error,
        )
        self._broken = BrokenDatabase(str(error))
        for commit in group:
            self._release(commit, _ENDED)
            self._answer(commit, None, StorageSystemError(str(error)))
        # The disk has never heard of these.
        behind, self._finishing = self._finishing, deque()
        for commit in behind:
            self._release(commit, _ENDED)
            self._fail(commit, NotCommitted(_given_up(error)))
        for commit in tuple(self._commits):
            self.abandon(commit, StorageSystemError(_given_up(error)), None)

    def _abort(self, commit: Commit, answer: Answer | None) -> None:
        reason = StorageTransactionError("the transaction was aborted")
        if commit.prepared is not None:
            # Nothing of it is anywhere but here.
            self._served.counters.aborts += 1
            self._release(commit, reason)
            if answer is not None:
                answer(None, None)
            self._start_ready()
            return
        commit.phase = Phase.ABORTING
        commit.patience.ends()

        def aborted(done: "asyncio.Future[None]") -> None:
            error = done.exception()
            if error is not None:
                logger.error("aborting a transaction failed", exc_info=error)
            self._served.counters.aborts += 1
            self._release(commit, reason)
            if answer is not None:
                answer(None, error)
            self._start_ready()

        self._workers.write(self._database.abort).add_done_callback(aborted)

    def _release(self, commit: Commit, reason: Exception) -> None:
        """The end of a commit; ``_start_ready`` must follow."""
        commit.phase = Phase.ENDED
        commit.ended_by = commit.ended_by or reason
        commit.patience.ends()
        if commit.prepared is not None:
            commit.prepared.end()
        # The channel keeps the commit until its next one; not the records.
        commit.transaction.operations = []
        commit.prepared, commit.claim, commit.offer = None, ALONE, None
        self._commits.pop(commit, None)
        self._ready.extend(self._locks.leave(commit))
        if self._is_stopping and not self._commits:
            self._is_idle.set()
        for ended in commit.when_ended:
            ended()
        commit.when_ended.clear()

    def _expect(self, commit: Commit, phase: Phase, answer: Answer) -> bool:
        if commit.phase is phase:
            return True
        error = StorageTransactionError(f"the transaction is {commit.phase.value}")
        answer(None, commit.ended_by or error)
        return False

    def _step(self, commit: Commit, phase: Phase, answer: Answer) -> None:
        commit.phase = phase
        commit.answer = answer
        commit.patience.pauses(asyncio.get_running_loop().time())

    @staticmethod
    def _answer(commit: Commit, value: Any, error: BaseException | None) -> None:
        answer, commit.answer = commit.answer, None
        if answer is not None:
            answer(value, error)


def _given_up(error: BaseException) -> str:
    """What is told to those whom the disaster ``error`` of others has refused."""
    return (
        "nothing of this transaction was committed, and nothing is written any more"
        f" until a restart: {error}"
    )
