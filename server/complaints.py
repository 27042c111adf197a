"""Who may be complained about in the log now: each source of trouble once a second.

Whoever breaks the rules on purpose does it thousands of times a second, from as many
sockets; the log must not be what fills the disk. Belongs to the loop; pure otherwise.
"""

import logging

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0
# Beyond so many sources in an interval nobody new is named.
SOURCES_MAX = 100


class Complaints:
    """When each source was complained about last."""

    def __init__(self) -> None:
        self._said_at: dict[str, float] = {}
        # How often that was not said, since it was said last.
        self._unsaid: dict[str, int] = {}

    def say(self, source: str, now: float, text: str) -> None:
        """Log ``text`` as a warning, unless one about ``source`` was logged just now.

        The next one that is logged says how many were not.
        """
        if not self._may_say(source, now):
            if source in self._said_at:
                self._unsaid[source] = self._unsaid.get(source, 0) + 1
            return
        unsaid = self._unsaid.pop(source, 0)
        logger.warning("%s%s", text, f" ({unsaid} more like it)" if unsaid else "")

    def _may_say(self, source: str, now: float) -> bool:
        said_at = self._said_at.get(source)
        if said_at is not None and now - said_at < INTERVAL_S:
            return False
        if said_at is None and len(self._said_at) >= SOURCES_MAX:
            self._forget(now)
            if len(self._said_at) >= SOURCES_MAX:
                return False
        self._said_at[source] = now
        return True

    def _forget(self, now: float) -> None:
        """Drop those who were not heard of for an interval."""
        self._said_at = {
            source: said_at
            for source, said_at in self._said_at.items()
            if now - said_at < INTERVAL_S
        }
        self._unsaid = {
            source: count
            for source, count in self._unsaid.items()
            if source in self._said_at
        }
