r"""One transaction at a time, from vote to finish, without the loop ever waiting.

The Committer belongs to the loop. It decides whose turn it is (storage.turn) and hands
the steps to the writer thread; each step's end comes back to the loop as a callback.

::

    WAITING --turn--> VOTING --voted--> VOTED --finish--> FINISHING --on disk--> ENDED
                        | \                |                                       ^
                        |  unresolved ->RESOLVING --resolve--> VOTING              |
                        |                  |                                       |
                        `--error-----------+--abandon--> ABORTING -----------------'

Invariants:

1. Whatever ends a commit (finish, abort, an error, the channel's end, a timeout), it
   ends through ``_end``, and ``_end`` gives the turn to the next in line.
2. Nothing is announced before the writer thread said that it is on disk; and then
   the change is appended, the turn given on, the committer answered and everybody
   told in one callback, so nobody can see a part of it.
3. A commit whose channel is gone while the writer works for it is only marked
   (``is_abandoned``); the callback of that step aborts it. A commit that is being
   finished is never aborted.
4. A database that tells its own commits through ``follow`` (a relay's) has them
   appended and announced there (server.relay), before the finish is answered.
5. After a disaster in finish nothing is written any more: every vote gets the error.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

from ZODB.POSException import ConflictError, StorageSystemError, StorageTransactionError

from zeolith.protocol.errors import ShuttingDown, TransactionTimeout
from zeolith.storage.database import (
    BrokenDatabase,
    Finished,
    OutcomeUnknown,
    Transaction,
    Unresolved,
    Voted,
)
from zeolith.storage.turn import Turn

if TYPE_CHECKING:
    from zeolith.server.served import Served

logger = logging.getLogger(__name__)

_ENDED = StorageTransactionError("the transaction has ended")

# Called once with a value, or with an error.
Answer = Callable[[Any, BaseException | None], None]


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
        self.is_abandoned = False
        # Why later requests for it fail; None while it lives.
        self.ended_by: Exception | None = None
        # Whoever waits for the step under way.
        self.answer: Answer | None = None
        # Whoever wants to know when it has ended.
        self.when_ended: list[Callable[[], None]] = []


class Committer:
    """Takes the commits of one database through their phases."""

    def __init__(self, served: "Served"):
        self._served = served
        self._database = served.database
        self._workers = served.workers
        self._turn: Turn[Commit] = Turn()
        self._broken: BrokenDatabase | None = None
        self._is_stopping = False
        self._idle: asyncio.Event = asyncio.Event()
        self._idle.set()

    # What channels ask for

    def vote(self, commit: Commit, answer: Answer) -> None:
        """Get in line; the answer is Voted or Unresolved."""
        commit.answer = answer
        if self._broken is not None:
            broken = f"nothing is written any more until a restart: {self._broken}"
            self.abandon(commit, StorageSystemError(broken), None)
        elif self._is_stopping:
            self.abandon(commit, ShuttingDown("the server is stopping"), None)
        else:
            self._idle.clear()
            if self._turn.request(commit):
                self._start(commit)

    def resolve(
        self, commit: Commit, resolutions: dict[bytes, bytes], answer: Answer
    ) -> None:
        """Go on with the client's resolutions; the answer is as for vote."""
        if self._expect(commit, Phase.RESOLVING, answer):
            self._step(commit, Phase.VOTING, answer)
            voting = self._workers.write(self._database.resolve, resolutions)
            voting.add_done_callback(lambda done: self._voted(commit, done))

    def finish(self, commit: Commit, answer: Answer) -> None:
        """Commit for good; the answer is the Finished."""
        if self._expect(commit, Phase.VOTED, answer):
            self._step(commit, Phase.FINISHING, answer)
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
            self._end(commit, reason)
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

        Its client has lost the channel: what is not being finished yet never will be.
        """
        for commit in (self._turn.holder, *self._turn.waiting):
            if commit is not None and commit.transaction.id == transaction_id:
                commit.when_ended.append(settled)
                reason = StorageTransactionError("its client gave the transaction up")
                self.abandon(commit, reason, None)
                return
        settled()

    # What the clock asks for

    def tick(self, now: float, timeout_s: float) -> None:
        """Abort a holder for whom the others have waited too long."""
        expired = self._turn.expired(now, timeout_s)
        if expired is not None:
            logger.warning(
                "the transaction of %s was aborted: voted, and not finished in %g s",
                expired.label,
                timeout_s,
            )
            self._served.counters.timeouts += 1
            reason = TransactionTimeout(
                f"the transaction was not finished within {timeout_s:g} s after its"
                " vote (transaction-timeout) and is aborted"
            )
            self.abandon(expired, reason, None)

    # What the daemon asks for

    async def drain(self, timeout_s: float) -> None:
        """Take no new votes, and wait for those under way, but not for ever."""
        self._is_stopping = True
        for commit in self._turn.waiting:
            self.abandon(commit, ShuttingDown("the server is stopping"), None)
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            holder = self._turn.holder
            if holder is not None:
                logger.warning(
                    "the transaction of %s did not finish in %g s and is aborted",
                    holder.label,
                    timeout_s,
                )
                self.abandon(holder, ShuttingDown("the server is stopping"), None)
                # It may sit in the writer thread; then the thread is waited for later.
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._idle.wait(), timeout_s)

    # What status asks for

    @property
    def holder(self) -> Commit | None:
        """Whose turn it is."""
        return self._turn.holder

    @property
    def waiting(self) -> tuple[Commit, ...]:
        """Who stands in line."""
        return self._turn.waiting

    @property
    def broken(self) -> BrokenDatabase | None:
        """The disaster after which nothing is written any more."""
        return self._broken

    # Steps and their ends

    def _start(self, commit: Commit) -> None:
        commit.phase = Phase.VOTING
        voting = self._workers.write(self._database.vote, commit.transaction)
        voting.add_done_callback(lambda done: self._voted(commit, done))

    def _voted(
        self, commit: Commit, done: "asyncio.Future[Voted | Unresolved]"
    ) -> None:
        counters = self._served.counters
        error = done.exception()
        if error is not None:
            if isinstance(error, ConflictError):
                counters.conflicts += 1
            counters.aborts += 1
            # The turn first: nothing about the answer may hold the others up.
            self._end(commit, StorageTransactionError("the vote failed"))
            self._answer(commit, None, error)
        elif commit.is_abandoned:
            self._answer(commit, None, commit.ended_by)
            self._abort(commit, None)
        else:
            result = done.result()
            if isinstance(result, Voted):
                commit.phase = Phase.VOTED
                counters.conflicts_resolved += len(result.resolved)
            else:
                commit.phase = Phase.RESOLVING
            self._turn.started_at = asyncio.get_running_loop().time()
            self._answer(commit, result, None)

    def _finished(self, commit: Commit, done: "asyncio.Future[Finished]") -> None:
        error = self._disaster(done)
        if error is None:
            tid, oids = done.result()
            self._served.counters.commits += 1
            self._served.counters.stores += len(oids)
            change = None
            if not self._database.tells_own:
                change = self._served.append(tid, oids, commit.transaction.id)
            # Whoever waits for the server goes before whoever only listens.
            self._end(commit, _ENDED)
            self._answer(commit, done.result(), None)
            if change is not None:
                self._served.announce([change])
        elif self._database.tells_own and not isinstance(error, BrokenDatabase):
            # The upstream's affair: it may go on at once, and so may we.
            self._served.counters.aborts += 1
            if isinstance(error, OutcomeUnknown):
                error = StorageSystemError(str(error))
            self._end(commit, _ENDED)
            self._answer(commit, None, error)
        else:
            logger.critical(
                "%s: nothing is written any more until a restart",
                self._served.name,
                exc_info=error,
            )
            self._broken = BrokenDatabase(str(error))
            self._answer(commit, None, StorageSystemError(str(error)))
            for waiting in self._turn.waiting:
                self.abandon(waiting, StorageSystemError(str(error)), None)
            self._end(commit, _ENDED)

    def _disaster(self, finishing: "asyncio.Future[Finished]") -> BaseException | None:
        """Why the database must not be written any more, if that is so."""
        error = finishing.exception()
        last_tid = self._served.changes.last_tid
        if self._database.tells_own:
            return error
        if error is None and finishing.result().tid <= last_tid:
            return BrokenDatabase(
                f"the storage committed {finishing.result().tid.hex()} after"
                f" {last_tid.hex()}: transaction ids must grow"
            )
        return error

    def _abort(self, commit: Commit, answer: Answer | None) -> None:
        commit.phase = Phase.ABORTING
        self._turn.started_at = None

        def aborted(done: "asyncio.Future[None]") -> None:
            error = done.exception()
            if error is not None:
                logger.error("aborting a transaction failed", exc_info=error)
            self._served.counters.aborts += 1
            self._end(commit, StorageTransactionError("the transaction was aborted"))
            if answer is not None:
                answer(None, error)

        self._workers.write(self._database.abort).add_done_callback(aborted)

    def _end(self, commit: Commit, reason: Exception) -> None:
        commit.phase = Phase.ENDED
        commit.ended_by = commit.ended_by or reason
        # The channel keeps the commit until its next one; not the records.
        commit.transaction.operations = []
        succeeding = self._turn.leave(commit)
        if succeeding is not None:
            self._start(succeeding)
        elif self._turn.holder is None:
            self._idle.set()
        for ended in commit.when_ended:
            ended()
        commit.when_ended.clear()

    def _expect(self, commit: Commit, phase: Phase, answer: Answer) -> bool:
        if commit.phase is phase:
            return True
        answer(
            None,
            commit.ended_by
            or StorageTransactionError(f"the transaction is {commit.phase.value}"),
        )
        return False

    def _step(self, commit: Commit, phase: Phase, answer: Answer) -> None:
        commit.phase = phase
        commit.answer = answer
        self._turn.stop_clock(asyncio.get_running_loop().time())

    @staticmethod
    def _answer(commit: Commit, value: Any, error: BaseException | None) -> None:
        answer, commit.answer = commit.answer, None
        if answer is not None:
            answer(value, error)
