"""Saving the indexes of databases now and then, so that a crash costs no long start.

Belongs to the loop, whose clock ticks it; the saving is done in a reader thread of
each database, and says itself whether it is worth it (``Database.save_index``).
"""

import asyncio
import logging
import math
from collections.abc import Iterable
from functools import partial

from zeolith.server.served import Served

logger = logging.getLogger(__name__)


class IndexSaver:
    """Has every index saved at the start, and then once in ``interval_s``.

    At the start because a crash may be followed by another, and because opening leaves
    that to us: nobody waits for it here.
    """

    def __init__(self, databases: Iterable[Served], interval_s: float):
        # May be changed at any time.
        self.interval_s = interval_s
        self._databases = tuple(databases)
        # When each was begun last.
        self._begun_at = -math.inf
        self._saving: set[str] = set()

    def tick(self, now: float) -> None:
        """Begin what is due at ``now``; called about once a second."""
        if now - self._begun_at < self.interval_s:
            return
        self._begun_at = now
        for served in self._databases:
            # The one before may take longer than the interval.
            if served.name not in self._saving:
                self._saving.add(served.name)
                saving = served.workers.read(served.database.save_index)
                saving.add_done_callback(partial(self._ended, served.name))

    def _ended(self, name: str, saving: "asyncio.Future[bool]") -> None:
        self._saving.discard(name)
        if saving.cancelled():
            return
        error = saving.exception()
        if isinstance(error, OSError):
            logger.warning("storage %s: the index is not saved: %s", name, error)
        elif error is not None:
            logger.error("storage %s: saving the index failed", name, exc_info=error)
        elif saving.result():
            logger.debug("storage %s: the index is saved", name)
