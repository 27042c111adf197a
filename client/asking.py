"""A call whose answer is waited for later, or never.

``ask`` sends a request on a channel of its own and returns at once. Later somebody, and
only once, either waits for the answer or drops it; the channel goes back to the session
then. A channel with an answer that nobody took is of no more use and is closed.

Any thread; the one that asked need not be the one that takes. What is asked and not
taken is bounded by the caller.
"""

from typing import Any, Protocol

from zeolith.client.channel import Channel
from zeolith.client.errors import ChannelLost


class Lender(Protocol):
    """A session with a server."""

    def borrow(self) -> Channel:
        """See ``Session.borrow``."""

    def give_back(self, channel: Channel) -> None:
        """See ``Session.give_back``."""

    def lost(self, error: ChannelLost) -> ChannelLost:
        """See ``Session.lost``."""


class Asked:
    """What was asked on ``channel``."""

    __slots__ = ("_channel", "_session")

    def __init__(self, session: Lender, channel: Channel):
        self._session = session
        self._channel = channel

    def answer(self) -> Any:
        """Wait for the answer; raises as ``Session.call`` does."""
        try:
            return self._channel.answer()
        except ChannelLost as error:
            raise self._session.lost(error) from error
        finally:
            self._session.give_back(self._channel)

    def drop(self) -> None:
        """Nobody needs the answer."""
        self._session.give_back(self._channel)


def ask(session: Lender, method: str, *args: Any) -> Asked:
    """Send a request; raises ChannelLost."""
    channel = session.borrow()
    try:
        channel.ask(method, *args)
    except BaseException:
        session.give_back(channel)
        raise
    return Asked(session, channel)
