"""What changed long ago, for clients that come back: read from the log, once for all.

Belongs to the loop. What ``Changes`` does not remember, a thread of its own reads from
the log (``Database.changes_before``), back to the oldest position that anybody waits
for; whoever asks meanwhile waits for the same reading or the next one. What was read is
kept for a while, for after a restart of the server its clients come together. Nobody
waits longer for it than a hello may take: on a disk that is so slow it is faster to ask
which records are still right.

Nothing read is told by itself: ``since`` joins it with what ``Changes`` knows at that
moment, in one step of the loop, so no change can fall between them.
"""

import asyncio
import logging
from bisect import bisect_left
from collections.abc import Callable
from operator import attrgetter

from zeolith.server.workers import Workers
from zeolith.storage.changes import Change, Changes, Past
from zeolith.storage.database import Database

logger = logging.getLogger(__name__)

# Of the log, for one question.
REPLAY_BYTES = 256 * 1024 * 1024
# How long what was read is kept: it may take 100 MB and more.
KEEP_S = 60.0
# A reading is in vain if more is committed meanwhile than is remembered.
READINGS_MAX = 3

_since = attrgetter("since")


class _Waiter:
    def __init__(self, position: bytes, then: Callable[[], object]):
        self.position = position
        self.readings = 0
        self._then = then
        self.timer: asyncio.TimerHandle | None = None

    def go_on(self) -> None:
        assert self.timer is not None
        self.timer.cancel()
        self._then()


class Replays:
    """The changes of one database, further back than ``changes`` goes."""

    def __init__(
        self, database: Database, workers: Workers, changes: Changes, wait_s: float
    ):
        """Who has waited for ``wait_s`` is told what is known by then."""
        self._database = database
        self._workers = workers
        self._changes = changes
        self.wait_s = wait_s
        # Of the log; nothing is read if it is zero. May be set at any time.
        self.bytes_max = REPLAY_BYTES
        # What was read, and what was remembered then: up to a change that followed it.
        self._past: Past | None = None
        self._forgetting: asyncio.TimerHandle | None = None
        self._waiting: list[_Waiter] = []
        self._is_reading = False
        # Whether somebody has given up this reading.
        self._is_late = False
        # Which list of changes all this belongs to.
        self._round = 0

    def start_afresh(self, changes: Changes) -> None:
        """The database stands somewhere else now; nobody waits any more."""
        self._round += 1
        self._changes = changes
        self._past = None
        self._is_reading = False
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            waiter.go_on()

    def since(self, position: bytes) -> list[Change] | None:
        """All changes after ``position``; None if that is not known now."""
        recent = self._changes.since(position)
        if recent is not None:
            return recent
        past = self._joined()
        start = bisect_left(past, position, key=_since)
        if start == len(past) or past[start].since != position:
            return None
        return past[start:]

    def may_be_told(self, position: bytes) -> bool:
        """Whether ``since(position)`` may be known after ``ask``."""
        changes = self._changes
        if not self.bytes_max or position >= changes.begins:
            return False
        joined, past = self._joined(), self._past
        if past is None:
            return True
        return not past.is_all and (not joined or position < joined[0].since)

    def ask(self, position: bytes, then: Callable[[], object]) -> None:
        """Call ``then()`` when all is known of ``position`` that can be.

        Or when that takes too long: then it may be known later.
        """
        waiter = _Waiter(position, then)
        self._waiting.append(waiter)
        loop = asyncio.get_running_loop()
        waiter.timer = loop.call_later(self.wait_s, self._give_up, waiter)
        if not self._is_reading:
            self._read()

    def _give_up(self, waiter: _Waiter) -> None:
        if not self._is_late:
            self._is_late = True
            logger.warning(
                "the log was not read within %g s; clients that were away long have to"
                " ask which of their records are still right",
                self.wait_s,
            )
        self._waiting.remove(waiter)
        waiter.go_on()

    def _read(self) -> None:
        self._is_reading, self._is_late = True, False
        changes = self._changes
        recent = changes.since(changes.begins) or []
        reading = self._workers.look_back(
            self._database.changes_before,
            changes.begins,
            min(waiter.position for waiter in self._waiting),
            self.bytes_max,
        )
        # Those who come later may want more.
        for waiter in self._waiting:
            waiter.readings += 1
        round_ = self._round

        def done(reading: "asyncio.Future[Past]") -> None:
            if not reading.cancelled() and round_ == self._round:
                self._have_read(reading, recent)

        reading.add_done_callback(done)

    def _have_read(self, reading: "asyncio.Future[Past]", recent: list[Change]) -> None:
        self._is_reading = False
        error = reading.exception()
        if error is None:
            past = reading.result()
            self._past = Past([*past.changes, *recent], past.is_all)
        else:
            logger.error("the log could not be read: %s", error)
            self._past = Past([], True)
        self._keep()
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            is_hopeless = error is not None or waiter.readings >= READINGS_MAX
            if is_hopeless or not self.may_be_told(waiter.position):
                waiter.go_on()
            else:
                self._waiting.append(waiter)
        if self._waiting and not self._is_reading:
            self._read()

    def _joined(self) -> list[Change]:
        """What was read and all that came after it, or nothing."""
        past = self._past
        if past is None or not past.changes:
            return []
        changes = past.changes
        later = self._changes.since(changes[-1].tid)
        if later is None:
            # More was committed since than is remembered.
            self._past = None
            return []
        changes += later
        return changes

    def _keep(self) -> None:
        """Others will come for what was read, but not for ever."""
        if self._forgetting is not None:
            self._forgetting.cancel()
        loop = asyncio.get_running_loop()
        self._forgetting = loop.call_later(KEEP_S, self._forget)

    def _forget(self) -> None:
        self._forgetting = None
        self._past = None
