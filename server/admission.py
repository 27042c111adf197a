"""How many may be connected: in all, from one place, and before they said who they are.

Peers report here when they come, are welcomed, and go; belongs to the loop. Whoever is
one too many is told so and let go, and it is logged. Who was not welcomed yet counts
in a pool of its own, of which the one who has been there longest goes when it is full:
thousands that say nothing keep out nobody who says hello at once.
"""

import asyncio
from typing import TYPE_CHECKING, Protocol

from zeolith.protocol.errors import HelloRefused
from zeolith.protocol.limits import Limits
from zeolith.server.complaints import Complaints
from zeolith.server.origins import Origin

if TYPE_CHECKING:
    from zeolith.server.sessions import Session

REASON = "limit"


class Guest(Protocol):
    """Of a peer, what matters here."""

    origin: Origin

    def hang_up(self, reason: str, text: str = "") -> None:
        """Say why, and close."""


class Admission:
    """Who is there."""

    def __init__(self, limits: Limits):
        self._limits = limits
        # Fewer if there are not as many descriptors.
        self.connections_max = limits.connections_max
        self.complaints = Complaints()
        self._sources: dict[str, int] = {}
        self._count = 0
        # In the order in which they came.
        self._unwelcomed: dict[Guest, None] = {}

    @property
    def unwelcomed(self) -> int:
        """How many have not been welcomed yet."""
        return len(self._unwelcomed)

    def arrive(self, guest: Guest) -> None:
        """Count ``guest``; one too many is told to go, it or a silent one."""
        source = guest.origin.source
        self._count += 1
        count = self._sources[source] = self._sources.get(source, 0) + 1
        if count > self._limits.address_connections_max:
            self.turn_away(
                guest,
                f"more than {self._limits.address_connections_max} connections from"
                f" {source} (address_connections_max)",
            )
            return
        self._unwelcomed[guest] = None
        if self._count > self.connections_max:
            oldest = next(iter(self._unwelcomed))
            text = f"more than {self.connections_max} connections (connections_max)"
        elif len(self._unwelcomed) > self._limits.unwelcomed_connections_max:
            oldest = next(iter(self._unwelcomed))
            text = (
                f"more than {self._limits.unwelcomed_connections_max} connections that"
                " have not said hello, and this is the oldest of them"
                " (unwelcomed_connections_max)"
            )
        else:
            return
        self.turn_away(oldest, text)

    def welcome(self, guest: Guest) -> None:
        """It has said who it is."""
        self._unwelcomed.pop(guest, None)

    def admit_channel(self, guest: Guest, session: "Session") -> None:
        """Raise HelloRefused if ``session`` has as many channels as it may have."""
        channels_max = self._limits.session_channels_max
        if len(session.channels) >= channels_max:
            text = f"more than {channels_max} channels (session_channels_max)"
            self.complain(guest, f"is refused: {text}")
            raise HelloRefused(REASON, text)

    def leave(self, guest: Guest) -> None:
        """It is gone."""
        self._unwelcomed.pop(guest, None)
        source = guest.origin.source
        self._count -= 1
        self._sources[source] -= 1
        if not self._sources[source]:
            del self._sources[source]

    def turn_away(self, guest: Guest, text: str) -> None:
        """Tell ``guest`` which limit it has reached, and hang up."""
        self._unwelcomed.pop(guest, None)
        self.complain(guest, f"is disconnected: {text}")
        guest.hang_up(REASON, text)

    def complain(self, guest: Guest, text: str) -> None:
        """Log what is wrong with ``guest``, unless something was said just now."""
        now = asyncio.get_running_loop().time()
        address, source = guest.origin
        self.complaints.say(source, now, f"{address} {text}")
