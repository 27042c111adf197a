"""Changes that others make through the storage below become changes of ours.

A served storage may be a client of another server. Its changes, our own commits among
them, are told in one list, in tid order, from the storage's threads; here, on the loop,
they are appended and announced like any others. So what holds for the changes of a
file holds for these: nothing is visible before it is appended, and nobody who follows
misses one.

When the storage says that changes were missed, nothing that we or our clients know can
be trusted. Then every session is ended, no new one begins until the storage has said
where it stands, and clients come back with a position that we do not know, so they
start afresh too. What is told meanwhile waits.
"""

import asyncio
import logging
from typing import TYPE_CHECKING

from zeolith.server.served import Served
from zeolith.storage.database import Standing
from zeolith.storage.feed import Told

if TYPE_CHECKING:
    from zeolith.server.service import Service

logger = logging.getLogger(__name__)

# A storage that cannot say where it stands is asked again after this.
RETRY_S = 1.0


class Relay:
    """Brings the changes of one storage to its clients; belongs to the loop."""

    def __init__(self, service: "Service", served: Served):
        self._service = service
        self._served = served
        self._loop = asyncio.get_running_loop()
        # What was told since the storage said that changes were missed; None while
        # all is known.
        self._held: list[Told] | None = None
        # How often it said so: an answer to an earlier question is of no use.
        self._round = 0
        served.database.follow(self._listen)

    def _listen(self, told: Told | None) -> None:
        """Called from the storage's threads."""
        try:
            self._loop.call_soon_threadsafe(self._heed, told)
        except RuntimeError:
            # The loop was closed; the storage will be in a moment.
            logger.debug("a change came after the end")

    def _heed(self, told: Told | None) -> None:
        if told is None:
            self._start_afresh()
        elif self._held is not None:
            self._held.append(told)
        else:
            self._append(told)

    def _append(self, told: Told) -> None:
        # One that was told twice, or that the storage knew when it was opened.
        if told.tid > self._served.changes.last_tid:
            change = self._served.append(told.tid, told.oids, told.transaction)
            self._served.announce([change])

    def _start_afresh(self) -> None:
        logger.warning(
            "storage %s: changes were missed, everybody starts afresh",
            self._served.name,
        )
        self._held = []
        self._round += 1
        self._served.is_starting_afresh = True
        self._service.end_sessions(self._served, "the storage starts afresh")
        self._ask(self._round)

    def _ask(self, number: int) -> None:
        if number != self._round or self._service.is_stopping:
            return
        # Not one of the readers: they may all be waiting for the upstream.
        asking = self._loop.run_in_executor(None, self._served.database.standing)
        asking.add_done_callback(lambda done: self._answered(number, done))

    def _answered(self, number: int, done: "asyncio.Future[Standing]") -> None:
        if done.cancelled() or number != self._round:
            return
        error = done.exception()
        if error is not None:
            logger.warning("storage %s: %s", self._served.name, error)
            self._loop.call_later(RETRY_S, self._ask, number)
            return
        self._served.start_afresh(done.result())
        held, self._held = self._held, None
        for told in held or ():
            self._append(told)
