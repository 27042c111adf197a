"""The loads of a crowd: many threads of one session that load at once ask together.

A few threads that load at the same moment have a channel each. When they are more, most
of their time goes into falling asleep and waking: each does so for its answer, and
again for the interpreter, which another one has meanwhile. In a crowd one thread
*leads*: it asks for what all the others want who have come since the last one led, in
one send, and wakes each of them with its answer. The server reads the requests at once,
and answers in one write. (Flat combining: Hendler et al., SPAA 2010.) Sixteen threads
load a fifth more that way, and the server takes half of its time for a load.

Any thread calls ``load``. The invariants:

1. Who waits is woken: with its answer; or because it leads now; or because it is to
   receive what is still to come, for whoever did so has its own answer and goes; or to
   ask alone. Who is interrupted, or finds the connection broken, wakes the others
   before it goes. Who is not asked for within PATIENCE_S asks alone.
2. Only the thread that receives gets the error of a broken connection. Those for whom
   it did ask again, alone, and find out for themselves.
3. The lock is held to look and to note, never across a wait.

A crowd disperses, for each to have a channel again, when there are only a few; when the
answers take long, because the server is far away or reads its disk: then its members
would wait for each other; and when the interpreter is dear because somebody computes:
then a round trip looks for its answer without letting go, and who waits here cannot.
"""

import threading
from collections import deque
from itertools import islice
from typing import Any, Protocol

from zeolith.client.channel import Channel, value_of
from zeolith.client.errors import ChannelLost
from zeolith.protocol.messages import Failure, Reply

# So many loads are under way on channels of their own before a crowd gathers. Eight
# threads are as fast either way, four are faster alone.
CROWD_MIN = 8
# On average, of which the last one counts for so much:
LAST_COUNTS = 0.1
# when fewer than this are asked for at once, it is no crowd any more;
TOGETHER_MIN = 2.0
# when they take longer than this for each of them, they are slow: so long takes a load
# if all load alone, for then they wait for a server far away at the same time;
SLOW_S = 0.00012
# when it takes longer than this to get the interpreter back, it is dear: whoever
# computes has it for 5 ms (``sys.getswitchinterval()``), and those who load for less.
DEAR_S = 0.002
# But so many times as long is as bad as it gets, for once is chance.
WORST_TIMES = 2
# One server's answer to so many takes less than a millisecond.
TOGETHER_MAX = 100
# Who has to wait for longer than this, until somebody asks for it, asks alone. Who has
# been asked for looks so often whether it has been forgotten, by a thread that was
# interrupted before waking it, and then asks alone, too.
PATIENCE_S = 0.02
PATIENCE_TIMES = 250
# When so many have done so in a row, nobody leads any more.
IMPATIENT_TIMES = 100
# A crowd did good if it asked so often. After one that did not there is none for so
# long, and after each further one in a row for twice as long, up to a limit.
GOOD_TIMES = 100
PAUSE_MIN_S, PAUSE_MAX_S = 0.05, 10.0


class Host(Protocol):
    """A session with a server."""

    def take(self) -> Channel:
        """A channel for one round trip; raises ChannelLost."""

    def give_back(self, channel: Channel) -> None:
        """See ``Session.give_back``."""

    def call(self, method: str, *args: Any) -> Any:
        """See ``Session.call``."""

    def lost(self, error: ChannelLost) -> ChannelLost:
        """See ``Session.lost``."""

    def disperse(self, crowd: "Crowd", did_good: bool) -> None:
        """Nobody joins ``crowd`` any more, nor soon another if this one did no good."""


class _Member:
    """A thread that loads; what it is to do is noted here before it is woken."""

    __slots__ = ("answer", "batch", "is_gone", "leads", "load", "turn")

    def __init__(self, oid: bytes, before: bytes):
        self.load = (oid, before)
        # Held until there is something to do.
        self.turn = threading.Lock()
        self.turn.acquire()
        self.answer: Reply | Failure | None = None
        self.leads = False
        # What it is to receive.
        self.batch: _Batch | None = None
        # It waits no more.
        self.is_gone = False

    def wake(self) -> None:
        """Let it go on; twice does no harm."""
        try:
            self.turn.release()
        except RuntimeError:
            # By somebody who was interrupted then, and it has not noticed yet.
            return

    @property
    def has_to_do(self) -> bool:
        """Whether it need not be woken to go on."""
        return self.leads or self.batch is not None or self.answer is not None


class _Batch:
    """What is asked for together; touched by the member that receives it."""

    __slots__ = ("channel", "members", "open", "receiver")

    def __init__(self, leader: _Member):
        self.receiver: _Member | None = leader
        self.members = [leader]
        self.channel: Channel | None = None
        # Those that have no answer yet, by the number of the request.
        self.open: dict[int, _Member] = {}


class Crowd:
    """The threads that load through ``host``, from its gathering till it disperses."""

    def __init__(self, host: Host):
        self._host = host
        # A signal's handler may load where its thread has the lock.
        self._lock = threading.RLock()
        self._is_led = False
        # First come, first served.
        self._waiting: deque[_Member] = deque()
        # What was asked for together, on average, and how often; how long it took, and
        # how long to get the interpreter back, as a part of what is too long.
        self._together = float(CROWD_MIN)
        self._slow = self._dear = 0.0
        self._times = 0
        self._impatient = 0

    def load(self, oid: bytes, before: bytes) -> Any:
        """The value of the load; raises what ``Session.call`` raises."""
        if not (type(oid) is bytes is type(before) and len(oid) == 8 == len(before)):
            # What cannot be sent is nobody else's error.
            return self._host.call("load", oid, before)
        member = _Member(oid, before)
        try:
            self._join(member)
            if member.leads:
                self._lead(member)
            elif member.batch is not None:
                self._receive(member, member.batch)
        except ChannelLost as error:
            self._leave(member)
            raise self._host.lost(error) from error
        except BaseException:
            self._leave(member)
            raise
        if member.answer is None:
            return self._host.call("load", oid, before)
        return value_of(member.answer)

    def _join(self, member: _Member) -> None:
        """Wait until there is an answer or something to do, or to ask alone."""
        with self._lock:
            if not self._is_led:
                self._is_led = member.leads = True
                return
            self._waiting.append(member)
        for times_left in reversed(range(PATIENCE_TIMES)):
            if member.turn.acquire(True, PATIENCE_S):
                return
            with self._lock:
                if member in self._waiting:
                    self._waiting.remove(member)
                    self._impatient += 1
                    break
                if member.has_to_do:
                    break
                member.is_gone = not times_left
        if self._impatient >= IMPATIENT_TIMES:
            self._host.disperse(self, False)

    def _lead(self, member: _Member) -> None:
        batch = member.batch = _Batch(member)
        channel = batch.channel = self._host.take()
        with self._lock:
            batch.members += islice(self._waiting, TOGETHER_MAX - 1)
            for _ in batch.members[1:]:
                self._waiting.popleft()
        loads = [each.load for each in batch.members]
        requests, numbers = channel.requests("load", loads)
        batch.open = dict(zip(numbers, batch.members, strict=True))
        answers, took_s, regained_s = channel.exchange(requests)
        self._tell(answers, batch, member)
        self._look_back(len(loads), took_s, regained_s)
        self._appoint(member)
        self._receive(member, batch)

    def _receive(self, member: _Member, batch: _Batch) -> None:
        """Tell what comes until the own answer has come; the rest is for an heir."""
        channel = batch.channel
        assert channel is not None
        while member.answer is None:
            self._tell(channel.more_answers(), batch, member)
        with self._lock:
            heir = next(
                (each for each in batch.open.values() if not each.is_gone), None
            )
            # From here on the channel is the heir's, or nobody's.
            batch.receiver = heir
            self._wake_receiver(batch)
            member.batch = None
        if heir is None:
            # It is closed if there is an answer to come for which nobody waits.
            self._host.give_back(channel)

    @staticmethod
    def _wake_receiver(batch: _Batch) -> None:
        receiver = batch.receiver
        if receiver is not None:
            receiver.batch = batch
            receiver.wake()

    def _tell(
        self, answers: list[Reply | Failure], batch: _Batch, receiver: _Member
    ) -> None:
        for answer in answers:
            member = batch.open.pop(answer.id)
            member.answer = answer
            if member is not receiver:
                member.wake()

    def _appoint(self, leader: _Member) -> None:
        """Let somebody else lead, or the next who comes."""
        with self._lock:
            self._is_led = bool(self._waiting)
            if self._is_led:
                heir = self._waiting.popleft()
                heir.leads = True
                heir.wake()
            leader.leads = False

    def _look_back(self, together: int, took_s: float, regained_s: float) -> None:
        """Whether it does good to ask together."""
        # A few are asked for when the others are about to come.
        slow_s = max(together, self._together) * SLOW_S
        slow = min(took_s / slow_s, WORST_TIMES)
        dear = min(regained_s / DEAR_S, WORST_TIMES)
        self._together += (together - self._together) * LAST_COUNTS
        self._slow += (slow - self._slow) * LAST_COUNTS
        self._dear += (dear - self._dear) * LAST_COUNTS
        self._times += 1
        self._impatient = 0
        if self._together < TOGETHER_MIN or self._slow > 1 or self._dear > 1:
            did_good = self._times >= GOOD_TIMES and self._slow <= 1
            self._host.disperse(self, did_good)

    def _leave(self, member: _Member) -> None:
        """Let nobody wait for ``member``, which was interrupted or lost its channel."""
        with self._lock:
            member.is_gone = True
            if member in self._waiting:
                self._waiting.remove(member)
            batch, member.batch = member.batch, None
            if batch is not None and batch.receiver is not member:
                # It was interrupted when it had left the rest to another.
                self._wake_receiver(batch)
                batch = None
        if batch is not None:
            for each in batch.members:
                if each is not member:
                    each.wake()
            if batch.channel is not None:
                self._host.give_back(batch.channel)
        if member.leads:
            self._appoint(member)
