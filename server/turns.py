"""Whose turn it is on the loop, when somebody wants more of it than a moment.

Belongs to the loop. Who has sent many messages at once has a *turn*: they are looked at
for ``turn_s``. What is left waits in line, and in each step of the loop one of those
who wait has a turn; so it does not matter to the others how many there are who send
without end.

A *guest* is somebody who cannot write, or was not welcomed yet. What guests take is
charged to an account: one for all sockets of a session, or of a source before it. Who
has taken much of late waits in line whatever he sends. And while others are at work,
guests rest when one of them has had a turn, or a thread has computed for one: they have
a seventh of the time between them, and who comes meanwhile mostly has not to wait.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

# How much of the time a guest may take always without waiting in line.
SHARE = 0.1
# How long guests rest, for each second that they have taken.
RESTING = 6
# Others are at work if something was done for them in this time.
OTHERS_S = 0.05
# The loop's clock knows no shorter rests; they are taken together.
REST_MIN_S = 0.001
# What a socket takes that comes and goes, most of it in the loop's own code, where
# nobody measures it.
SOCKET_S = 0.0001

clock = time.perf_counter
# What is charged: to be kept from computing is nobody's fault.
computed = time.thread_time


class Account:
    """What a guest has taken of late."""

    __slots__ = ("_at_s", "_burst_s", "_taken_s")

    def __init__(self, burst_s: float):
        """``burst_s``: what he may take at once, ``Limits.guest_burst_s``."""
        self._burst_s = burst_s
        self._taken_s = 0.0
        self._at_s = 0.0

    def charge(self, took_s: float, now_s: float) -> None:
        """He has taken so much more."""
        self._taken_s = self._left_s(now_s) + took_s
        self._at_s = now_s

    def is_over(self, now_s: float) -> bool:
        """Whether that is more than he may take at once."""
        return self._left_s(now_s) > self._burst_s

    def is_empty(self, now_s: float) -> bool:
        """Whether there is nothing on it."""
        return self._left_s(now_s) == 0.0

    def _left_s(self, now_s: float) -> float:
        return max(0.0, self._taken_s - (now_s - self._at_s) * SHARE)


class Rest:
    """When guests may go on."""

    def __init__(self, done: Callable[[], int]):
        """``done`` counts what was done for anybody."""
        self._done = done
        self._seen = 0
        self._others_at_s = 0.0
        self._are_others_busy = False
        self._until_s = 0.0

    def look(self) -> None:
        """Before something is done for guests: whether others were at work."""
        now_s = clock()
        if self._done() != self._seen:
            self._others_at_s = now_s
        self._are_others_busy = now_s - self._others_at_s < OTHERS_S

    def take(self, took_s: float) -> None:
        """After that; it has taken so long."""
        self._seen = self._done()
        if self._are_others_busy:
            self._until_s = max(self._until_s, clock()) + RESTING * took_s

    @property
    def left_s(self) -> float:
        """How long it lasts; 0.0 if it is not worth while."""
        left_s = self._until_s - clock()
        return left_s if left_s >= REST_MIN_S else 0.0


class Waiting(Protocol):
    """Of a peer, or of what acts for it, what matters here."""

    def take_turn(self) -> None:
        """Do some of what there is to do, and wait again for the rest."""


class Line:
    """Those who wait for a turn, first come first served."""

    def __init__(self, rest: Rest | None = None):
        """With ``rest`` it is a line of guests."""
        self._loop = asyncio.get_running_loop()
        self._rest = rest
        self._waiting: deque[Waiting] = deque()
        self._is_moving = False

    def wait(self, who: Waiting) -> None:
        """Give ``who`` a turn in a later step of the loop."""
        self._waiting.append(who)
        if not self._is_moving:
            self._is_moving = True
            self._loop.call_soon(self._move)

    def _move(self) -> None:
        rest = self._rest
        if rest is None:
            self._waiting.popleft().take_turn()
        elif not rest.left_s:
            rest.look()
            began_s = computed()
            self._waiting.popleft().take_turn()
            rest.take(computed() - began_s)
        self._is_moving = bool(self._waiting)
        if not self._waiting:
            return
        if rest is not None and (left_s := rest.left_s):
            self._loop.call_later(left_s, self._move)
        else:
            self._loop.call_soon(self._move)


class Turns:
    """The lines of a server, and the accounts of those who were not welcomed yet."""

    def __init__(self, done: Callable[[], int], burst_s: float):
        self.rest = Rest(done)
        self._burst_s = burst_s
        self._members: Line | None = None
        self._guests: Line | None = None
        self._accounts: dict[str, Account] = {}

    def wait(self, who: Waiting, *, is_guest: bool) -> None:
        """Give ``who`` a turn in a later step of the loop."""
        if self._members is None or self._guests is None:
            # Not before the loop runs.
            self._members, self._guests = Line(), Line(self.rest)
        (self._guests if is_guest else self._members).wait(who)

    def account_of(self, source: str) -> Account:
        """That of all from ``source`` who were not welcomed yet."""
        return self._accounts.setdefault(source, Account(self._burst_s))

    def arrive(self, source: str) -> Account:
        """A socket from ``source`` was accepted: the account of its kind."""
        account = self.account_of(source)
        now_s = clock()
        if account.is_over(now_s):
            self.rest.take(SOCKET_S)
        account.charge(SOCKET_S, now_s)
        return account

    def tick(self) -> None:
        """Forget those who take nothing any more."""
        now_s = clock()
        self._accounts = {
            source: account
            for source, account in self._accounts.items()
            if not account.is_empty(now_s)
        }
