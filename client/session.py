"""One presence at one server: a stream that brings changes, and a pool of channels.

A session begins when a stream is welcomed and ends with it, for good: what was begun
in it never continues in another. The connector's thread reads the stream (``listen``);
any thread borrows a channel. ``close`` may be called by anybody, at any time, and
wakes everybody who waits on one of the sockets.
"""

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

from zeolith.client.changes import changes_of
from zeolith.client.channel import Channel, is_silence, limit_silence, shut_down
from zeolith.client.crowd import CROWD_MIN, PAUSE_MAX_S, PAUSE_MIN_S, Crowd
from zeolith.client.dial import Reached, dial_channel, has_no_place, has_none_left
from zeolith.client.errors import ChannelLost, ChannelRefused
from zeolith.client.pool import Pool
from zeolith.client.position import Position
from zeolith.client.round_trip import RECEIVE_BYTES
from zeolith.protocol.addresses import format_address
from zeolith.protocol.connection import Connection
from zeolith.protocol.errors import ZeolithError
from zeolith.protocol.limits import Limits
from zeolith.protocol.messages import Message, Notice
from zeolith.protocol.roles import AccessRole

logger = logging.getLogger(__name__)


class Session:
    """A stream and the channels that belong to it."""

    def __init__(self, reached: Reached, limits: Limits, began_at: float | None = None):
        self.address = reached.address
        self.welcome = reached.welcome
        # Why it ended; None while it lives.
        self.ended: str | None = None
        # Whether a call was ever answered, so that the next session may hurry.
        self.has_answered = False
        self._was_refused = False
        # When somebody began to dial for it.
        self.began_at = time.monotonic() if began_at is None else began_at
        # The changes that its welcome brought; None: it cannot say which were missed.
        # Until they are adopted, for they may be many.
        changes = reached.welcome.pop("changes")
        self.missed = None if changes is None else changes_of(changes)
        # Whether the rest of them is still to come, on the stream.
        self.is_incomplete = bool(changes) and (
            changes[-1][1] < reached.welcome["last_tid"]
        )
        # How many have come.
        self.replayed = len(changes or ())
        self._limits = limits
        self._resumption = reached.resumption
        self._token: bytes = reached.welcome["session"]
        self._stream = reached.socket
        self._connection: Connection = reached.connection
        self._early = reached.early
        self._on_complete: Callable[[], object] = lambda: None
        # For the stream, and the end.
        self._lock = threading.Lock()
        self._pool = Pool(self._dial_channel, limits)
        # For the hot path.
        self._idle, self._waiting = self._pool.idle, self._pool.waiting
        self._channels = self._pool.channels
        # Those who load together now; any thread, and the last one to change it wins.
        self._crowd: Crowd | None = None
        self._no_crowd_before = self._crowd_pause_s = 0.0
        limit_silence(self._stream, limits.heartbeat_interval_s / 2)

    @property
    def is_read_only(self) -> bool:
        """Whether the server takes no writes from this session."""
        return bool(self.welcome["read_only"])

    @property
    def may_write(self) -> bool:
        """Whether this client may write, wherever something can be written."""
        return AccessRole.WRITE in self.welcome["roles"]

    @property
    def may_undo(self) -> bool:
        """Whether the server lets this client undo."""
        return AccessRole.UNDO in self.welcome["roles"]

    # Channels, for any thread

    def borrow(self) -> Channel:
        """A channel for the calling thread alone, for longer than a call.

        Raises ChannelLost.
        """
        return self._pool.lend()

    def give_back(self, channel: Channel) -> None:
        """The calling thread needs ``channel`` no more."""
        if self._pool.give_back(channel):
            self.has_answered = True

    def load(self, oid: bytes, before: bytes) -> Any:
        """A load, together with those of other threads if there are many."""
        crowd = self._crowd
        if crowd is None:
            if len(self._channels) - len(self._idle) < CROWD_MIN:
                return self.call("load", oid, before)
            crowd = self._gather()
            if crowd is None:
                return self.call("load", oid, before)
        return crowd.load(oid, before)

    def take(self) -> Channel:
        """A channel for one round trip; raises ChannelLost."""
        try:
            return self._idle.pop()
        except IndexError:
            return self._pool.take()

    def disperse(self, crowd: Crowd, did_good: bool) -> None:
        """Nobody joins ``crowd`` any more, nor soon another if this one did no good."""
        if self._crowd is crowd:
            pause_s = self._crowd_pause_s
            self._crowd_pause_s = (
                0 if did_good else min(max(2 * pause_s, PAUSE_MIN_S), PAUSE_MAX_S)
            )
            self._no_crowd_before = time.monotonic() + self._crowd_pause_s
            self._crowd = None

    def _gather(self) -> Crowd | None:
        if time.monotonic() < self._no_crowd_before:
            return None
        self._crowd = crowd = Crowd(self)
        return crowd

    def call(self, method: str, *args: Any) -> Any:
        """One call on any channel; see Channel.call."""
        # Spelled out, for this is the hot path.
        try:
            channel = self._idle.pop()
        except IndexError:
            channel = self._pool.take()
        try:
            value = channel.call(method, *args)
        except ChannelLost as error:
            self.give_back(channel)
            raise self.lost(error) from error
        except BaseException:
            self.give_back(channel)
            raise
        self.has_answered = True
        self._idle.append(channel)
        if self._waiting:
            self._pool.serve()
        if self.ended is not None:
            self._pool.drop_idle()
        return value

    def answers(
        self, method: str, calls: Iterable[Sequence[Any]], ahead: int
    ) -> Generator[Any, None, None]:
        """Several calls on one channel, until it is closed; see Channel.answers."""
        channel = self._pool.take()
        try:
            yield from channel.answers(method, calls, ahead)
        except ChannelLost as error:
            raise self.lost(error) from error
        finally:
            self.give_back(channel)

    def lost(self, error: ChannelLost) -> ChannelLost:
        """``error``, or why the session ended if that is the reason for it."""
        return error if self.ended is None else ChannelLost(self.ended)

    def _dial_channel(self) -> Channel:
        try:
            return dial_channel(
                self.address, self._token, self._limits, self._resumption
            )
        except (OSError, ZeolithError) as error:
            if has_no_place(error) or has_none_left(error):
                self._note_refusal(error)
                raise ChannelRefused(str(error)) from error
            self.close(str(error))
            raise ChannelLost(str(error)) from error

    def _note_refusal(self, error: Exception) -> None:
        if not self._was_refused:
            self._was_refused = True
            server = format_address(self.address)
            logger.warning(
                "%s, and threads have to wait for each other: %s",
                f"there are no more sockets here for a channel to {server}"
                if has_none_left(error)
                else f"{server} lets this client have no more sockets",
                error,
            )

    # The stream, for the connector's thread

    def listen(
        self, position: Position, on_complete: Callable[[], object] = lambda: None
    ) -> str:
        """Apply changes until the session ends; returns why it did.

        Answers heartbeats, and ends the session when the server falls silent. Calls
        ``on_complete`` when all has come that belongs to an incomplete welcome.
        """
        self._on_complete = on_complete
        for message in self._early:
            self._heed(message, position)
        self._beat()
        while self.ended is None:
            try:
                data = self._stream.recv(RECEIVE_BYTES)
            except OSError as error:
                if not is_silence(error):
                    self.close(str(error))
                    break
            else:
                if not data:
                    self.close("the server closed the connection")
                    break
                for message in self._connection.receive_data(data, time.monotonic()):
                    self._heed(message, position)
            self._beat()
        with self._lock:
            self._stream.close()
        assert self.ended is not None
        return self.ended

    def _heed(self, message: Message, position: Position) -> None:
        if isinstance(message, Notice):
            changes = changes_of(message.args[0])
            position.receive(self, changes)
            if self.is_incomplete:
                self.replayed += len(changes)
                self.is_incomplete = changes[-1].tid < self.welcome["last_tid"]
                if not self.is_incomplete and self.ended is None:
                    self._on_complete()

    def _beat(self) -> None:
        now = time.monotonic()
        self._pool.trim(now)
        due = self._connection.tick(now)
        if self._connection.is_closed:
            self.close(str(self._connection.error))
        elif due:
            try:
                self._stream.sendall(due)
            except OSError as error:
                self.close(str(error))

    # The end, for any thread

    def close(self, reason: str) -> None:
        """End the session without waiting; only the first reason counts."""
        with self._lock:
            if self.ended is not None:
                return
            self.ended = reason
            shut_down(self._stream)
        for channel in self._pool.end(reason):
            channel.shut()
        self._pool.drop_idle()

    def discard(self, reason: str) -> None:
        """End a session that nobody listens to; ``listen`` would close its stream."""
        self.close(reason)
        self._stream.close()

    def forget(self) -> None:
        """In a forked child: close our copies of the sockets, and nothing else."""
        self.ended = "the process was forked"
        self._lock = threading.Lock()
        self._stream.close()
        self._pool.forget(self.ended)
