"""What clients have asked reader threads for, and whose turn it is there.

Belongs to the loop; one for each database. A session has some of the threads at once,
not all of them; what else it has asked for waits in a queue of its own, and sessions
take turns. So nobody waits behind a thousand requests of somebody else, and what a
socket has asked for is dropped when it is gone. A guest (see ``turns``) who has taken
much of late has one thread, which rests as guests do on the loop: while a thread
computes, the loop waits for the interpreter now and then.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from zeolith.server.turns import Rest, clock, computed
from zeolith.server.workers import READERS, Workers

if TYPE_CHECKING:
    from zeolith.server.peer import Peer

# The threads that one session has at once.
SESSION_READERS = READERS - 1


# What is called on the loop when a reading is over, or was given up.
Answer = Callable[["asyncio.Future[Any]"], None]


class _Wanted(NamedTuple):
    peer: "Peer"
    answer: Answer
    step: Callable[..., Any]
    args: tuple[Any, ...]


class _Timed:
    """A step that knows how long it has computed; waiting for a disk is not that."""

    def __init__(self, step: Callable[..., Any]):
        self._step = step
        self.took_s = 0.0

    def __call__(self, *args: Any) -> Any:
        began_s = computed()
        try:
            return self._step(*args)
        finally:
            self.took_s = computed() - began_s


class Readings:
    """The queues of one database's sessions."""

    def __init__(self, workers: Workers, rest: Rest):
        self._workers = workers
        self._rest = rest
        # By session, the next one first; nobody is in it who wants nothing.
        self._queues: dict[object, deque[_Wanted]] = {}
        # How many threads each has; nobody is in it who has none.
        self._at_work: dict[object, int] = {}
        self._resting: asyncio.TimerHandle | None = None

    def read(
        self, peer: "Peer", answer: Answer, step: Callable[..., Any], *args: Any
    ) -> None:
        """Run ``step`` in a reader thread when it is the turn of ``peer``."""
        queue = self._queues.setdefault(peer.session, deque())
        queue.append(_Wanted(peer, answer, step, args))
        self._begin()

    def forget(self, peer: "Peer") -> None:
        """The peer is gone: nobody waits for what it has asked for."""
        queue = self._queues.pop(peer.session, ())
        left = deque(wanted for wanted in queue if wanted.peer is not peer)
        if left:
            self._queues[peer.session] = left

    @property
    def waiting(self) -> int:
        """How much no thread has been given yet."""
        return sum(map(len, self._queues.values()))

    def _begin(self) -> None:
        """Let threads begin with as much as they may."""
        while sum(self._at_work.values()) < READERS:
            session = next(filter(self._may_begin, self._queues), None)
            if session is None:
                return
            queue = self._queues.pop(session)
            wanted = queue.popleft()
            if queue:
                # Behind the others.
                self._queues[session] = queue
            self._hand_over(session, wanted)

    def _may_begin(self, session: object) -> bool:
        account = self._queues[session][0].peer.account
        threads = SESSION_READERS
        if account is not None and account.is_over(clock()):
            left_s = self._rest.left_s
            if left_s:
                self._begin_in(left_s)
                return False
            threads = 1
        return self._at_work.get(session, 0) < threads

    def _begin_in(self, wait_s: float) -> None:
        if self._resting is None:
            loop = asyncio.get_running_loop()
            self._resting = loop.call_later(wait_s, self._rested)

    def _rested(self) -> None:
        self._resting = None
        self._begin()

    def _hand_over(self, session: object, wanted: _Wanted) -> None:
        account = wanted.peer.account
        timed = _Timed(wanted.step)
        reading = self._workers.read(timed, *wanted.args)
        self._at_work[session] = self._at_work.get(session, 0) + 1

        def done(reading: "asyncio.Future[Any]") -> None:
            self._at_work[session] -= 1
            if not self._at_work[session]:
                del self._at_work[session]
            if reading.cancelled():
                # The server has stopped, and everybody was told so.
                self._queues.clear()
                return
            self._rest.look()
            began_s = computed()
            try:
                wanted.answer(reading)
            finally:
                if account is not None:
                    took_s = timed.took_s + computed() - began_s
                    account.charge(took_s, clock())
                    self._rest.take(took_s)
                self._begin()

        reading.add_done_callback(done)
