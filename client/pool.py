"""The channels of a session: as many as there are threads that call at once.

Any thread takes a channel that nobody uses, or opens one, and gives it back. Whoever
gives back last is taken from first, so that what is not needed any more sinks to the
bottom, where the listener's beat finds it (``trim``).

A thread that finds ``channels_max`` channels in use for calls waits for its turn, first
come first served, until the session ends. What is *lent* for longer, to a transaction
from its vote to its finish or to a pack, does not count and does not wait: a commit may
wait at the server for another one, whose thread may have to load something first, and
must not keep the channel from it.

Where the server refuses one more for a limit of its own, or this process has no more
descriptors, everybody waits for what is given back, for ``channel_wait_s`` at most, as
those who have a channel may be the very ones who wait. From time to time one of them
tries again.

``idle`` and ``waiting`` are used without the lock, also by ``Session.call``: who gives
back appends to the one and then looks at the other, who waits does it the other way
round, so that one of them sees the other.
"""

import threading
import time
from collections import deque
from collections.abc import Callable

from zeolith.client.channel import Channel
from zeolith.client.errors import ChannelLost, ChannelRefused
from zeolith.protocol.limits import Limits


class _Turn:
    """A thread that waits."""

    def __init__(self) -> None:
        self.has_come = threading.Event()
        # None: it may open one, for which there is room, or it is the end.
        self.channel: Channel | None = None


class Pool:
    """Channels made by ``dial``, which raises ChannelLost, ChannelRefused."""

    def __init__(self, dial: Callable[[], Channel], limits: Limits):
        self._dial = dial
        self._limits = limits
        self._lock = threading.Lock()
        self._ended: str | None = None
        # Those that nobody uses now.
        self.idle: list[Channel] = []
        self.channels: set[Channel] = set()
        self._lent: set[Channel] = set()
        # How many are being opened for calls.
        self._opening = 0
        self.waiting: deque[_Turn] = deque()
        # Why the server let us have no more, when, and how many it may let us have.
        self._refusal: ChannelRefused | None = None
        self._refused_at = 0.0
        self._allowed = 0

    def take(self) -> Channel:
        """A channel for one call, or a few; raises ChannelLost."""
        try:
            return self.idle.pop()
        except IndexError:
            pass
        with self._lock:
            self._refuse_after_the_end()
            refusal = self._refusal
            has_room = self._has_room()
            if has_room:
                self._opening += 1
        try:
            if has_room:
                return self._open()
            if refusal is None:
                return self._wait() or self._open()
        except ChannelRefused as error:
            refusal = error
        return self._wait_for_others(refusal)

    def lend(self) -> Channel:
        """A channel for longer; raises ChannelLost."""
        try:
            channel = self.idle.pop()
        except IndexError:
            self._refuse_after_the_end()
            try:
                return self._open_to_lend()
            except ChannelRefused as refusal:
                channel = self._wait_for_others(refusal)
        self._lent.add(channel)
        if self.waiting:
            self.serve()
        return channel

    def give_back(self, channel: Channel) -> bool:
        """The calling thread needs ``channel`` no more; whether it is of use."""
        if channel.is_lost or channel.is_busy:
            # An interrupted call left an answer behind, which the next one would get.
            self._drop(channel)
            return False
        self._lent.discard(channel)
        self.idle.append(channel)
        if self.waiting:
            self.serve()
        if self._ended is not None:
            self.drop_idle()
        return True

    def serve(self) -> None:
        """Let those go on for whom there is a channel, or room for one."""
        with self._lock:
            self._serve()

    def trim(self, now: float) -> None:
        """Close what nobody has used for ``channel_idle_s``; one is kept.

        And see to it that a server that has refused a channel is asked again.
        """
        if self._refusal is not None:
            self._ask_again(now)
        since = now - self._limits.channel_idle_s
        while len(self.idle) > 1 and self.idle[0].used_at < since:
            try:
                channel = self.idle.pop(0)
            except IndexError:
                return
            if channel.used_at < since:
                self._drop(channel)
            else:
                self.give_back(channel)

    def end(self, reason: str) -> tuple[Channel, ...]:
        """Nobody gets a channel any more; returns all there are."""
        with self._lock:
            self._ended = reason
            while self.waiting:
                self.waiting.popleft().has_come.set()
            return tuple(self.channels)

    def drop_idle(self) -> None:
        """After the end: close what nobody uses."""
        while True:
            try:
                channel = self.idle.pop()
            except IndexError:
                return
            self._drop(channel)

    def forget(self, reason: str) -> None:
        """In a forked child: close our copies of the sockets, and nothing else."""
        self._lock = threading.Lock()
        self._ended = reason
        self.waiting.clear()
        for channel in self.channels:
            channel.close()

    def _wait_for_others(self, refusal: ChannelRefused) -> Channel:
        """What somebody gives back, if the server gives us no more for ``refusal``."""
        deadline = time.monotonic() + self._limits.channel_wait_s
        while True:
            if not self.channels:
                raise refusal
            left_s = deadline - time.monotonic()
            try:
                return self._wait(max(left_s, 0)) or self._open()
            except TimeoutError:
                raise refusal from None
            except ChannelRefused as error:
                refusal = error

    def _wait(self, timeout_s: float | None = None) -> Channel | None:
        turn = _Turn()
        with self._lock:
            self._refuse_after_the_end()
            self.waiting.append(turn)
            # What was given back since we looked.
            self._serve()
        try:
            if not turn.has_come.wait(timeout_s):
                raise TimeoutError
        except BaseException:
            self._leave(turn)
            raise
        if turn.channel is None:
            self._refuse_after_the_end()
        return turn.channel

    def _leave(self, turn: _Turn) -> None:
        """A waiting thread goes away, perhaps when its turn had come."""
        with self._lock:
            if turn in self.waiting:
                self.waiting.remove(turn)
                return
            if turn.channel is None and self._ended is None:
                self._opening -= 1
                self._serve()
        if turn.channel is not None:
            self.give_back(turn.channel)

    def _open(self) -> Channel:
        try:
            channel = self._dial()
        except BaseException as error:
            with self._lock:
                self._opening -= 1
                self._heed(error)
                self._serve()
            raise
        return self._added(channel, opened=1)

    def _open_to_lend(self) -> Channel:
        refusal = self._refusal
        if refusal is not None and len(self.channels) >= self._allowed:
            raise refusal
        try:
            channel = self._dial()
        except ChannelRefused as error:
            with self._lock:
                self._heed(error)
            raise
        self._lent.add(channel)
        return self._added(channel)

    def _ask_again(self, now: float) -> None:
        with self._lock:
            if not self.waiting:
                self._refusal = None
            elif now - self._refused_at >= self._limits.heartbeat_interval_s:
                self._refused_at = now
                self._allow_one_more()

    def _added(self, channel: Channel, opened: int = 0) -> Channel:
        with self._lock:
            self._opening -= opened
            self.channels.add(channel)
            if self._refusal is not None:
                self._allow_one_more()
            is_late = self._ended is not None
        if is_late:
            self._drop(channel)
            self._refuse_after_the_end()
        return channel

    def _drop(self, channel: Channel) -> None:
        with self._lock:
            self.channels.discard(channel)
            self._lent.discard(channel)
            self._serve()
        channel.close()

    def _refuse_after_the_end(self) -> None:
        if self._ended is not None:
            raise ChannelLost(self._ended)

    # Under the lock

    def _has_room(self) -> bool:
        in_calls = len(self.channels) - len(self._lent) + self._opening
        if in_calls >= self._limits.channels_max:
            return False
        return self._refusal is None or (
            len(self.channels) + self._opening < self._allowed
        )

    def _allow_one_more(self) -> None:
        # One asks for all.
        self._allowed = len(self.channels) + self._opening + 1
        self._serve()

    def _heed(self, error: BaseException) -> None:
        if isinstance(error, ChannelRefused):
            self._refusal = error
            self._refused_at = time.monotonic()
            # The first one is worth asking for each time.
            self._allowed = max(len(self.channels), 1)

    def _serve(self) -> None:
        while self.waiting:
            channel = None
            try:
                channel = self.idle.pop()
            except IndexError:
                if not self._has_room():
                    return
                self._opening += 1
            turn = self.waiting.popleft()
            turn.channel = channel
            turn.has_come.set()
