"""The methods that read a whole database: its transactions, its current records.

Called on the loop by the service, with messages that protocol.methods has checked.
What is read is read in a reader thread, a batch a request; between two requests the
server keeps nothing of an iteration, so nothing is left when a client vanishes.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from zeolith.protocol.limits import Limits
from zeolith.storage.database import Wish
from zeolith.storage.tids import Z64

if TYPE_CHECKING:
    from zeolith.server.peer import Peer
    from zeolith.server.served import Served

# The service's: answers a request with what a step gives in a reader thread.
Read = Callable[..., object]


class Iteration:
    """Answers to ``transactions`` and ``records``."""

    def __init__(self, read: Read, limits: Limits):
        self._read = read
        self._limits = limits
        self.handlers: dict[str, Callable[..., Any]] = {
            "transactions": self._transactions,
            "records": self._records,
        }

    def _transactions(
        self,
        peer: "Peer",
        number: int,
        start: bytes | None,
        stop: bytes | None,
        cursor: bytes | None,
    ) -> object:
        served = _served(peer)
        last_tid = served.changes.last_tid
        # What has been committed but not announced does not exist yet.
        stop = last_tid if stop is None else min(stop, last_tid)
        wish = Wish(start or Z64, stop, self._limits.batch_bytes_max)
        return self._read(peer, number, served.database.transactions, wish, cursor)

    def _records(self, peer: "Peer", number: int, first: bytes | None) -> object:
        served = _served(peer)
        as_of = served.changes.last_tid
        return self._read(
            peer,
            number,
            served.database.current_records,
            first,
            served.horizon,
            self._limits.batch_bytes_max,
            then=partial(_with_as_of, as_of),
        )


def _with_as_of(as_of: bytes, found: tuple[Any, Any]) -> tuple[Any, ...]:
    return (as_of, *found)


def _served(peer: "Peer") -> "Served":
    assert peer.session is not None
    return peer.session.served
