"""Fetching a blob from the server: several parts at a time on their way, in order.

``fetch`` is called by whichever thread needs the blob, and writes to a file that no
other thread knows. While one part is written the server reads the next ones, so neither
waits for the other; what is on its way is bounded. A conversation that breaks is taken
up where it was, for a revision of a blob never changes.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from typing import Any, BinaryIO, Protocol

from ZODB.POSException import StorageError

from zeolith.client.errors import ChannelLost
from zeolith.protocol.limits import Limits

# What is fetched at a time: it stays in the processor's cache from the socket to the
# file. More of them on their way bring no more.
PART_BYTES = 256 * 1024
PARTS_AHEAD = 4


class Conversation(Protocol):
    """A session with a server."""

    def call(self, method: str, *args: object) -> Any:
        """See ``Session.call``."""

    def answers(
        self, method: str, calls: Iterable[Sequence[object]], ahead: int
    ) -> Generator[Any, None, None]:
        """See ``Session.answers``."""


# Has a function speak with a server, again after a connection was lost; see
# ``ClientStorage.converse``.
Converse = Callable[[Callable[[Conversation], None]], None]


def fetch(
    converse: Converse, oid: bytes, tid: bytes, file: BinaryIO, limits: Limits
) -> None:
    """Write the blob that transaction ``tid`` gave to ``oid`` into ``file``.

    Raises POSKeyError, ClientDisconnected, OSError; StorageError if what comes does not
    belong together.
    """
    download = _Download(oid, tid, file, limits)
    while not download.is_whole:
        converse(download.go_on)


class _Download:
    """How far a blob has come."""

    def __init__(self, oid: bytes, tid: bytes, file: BinaryIO, limits: Limits):
        self._oid = oid
        self._tid = tid
        self._file = file
        self._part_bytes = min(PART_BYTES, limits.batch_bytes_max)
        self._have = 0
        # Unknown until the first part has come.
        self._size: int | None = None

    @property
    def is_whole(self) -> bool:
        return self._have == self._size

    def go_on(self, session: Conversation) -> None:
        """Fetch the rest; raises ChannelLost if nothing of it comes.

        If something does before the connection is lost, that is no failure: the next
        one is waited for as if it were the first.
        """
        had = self._have
        try:
            size = self._size
            if size is None:
                size = self._begin(*session.call("load_blob", *self._part_at(0)))
            rest = range(self._have, size, self._part_bytes)
            parts = session.answers("load_blob", map(self._part_at, rest), PARTS_AHEAD)
            # Not when an error is forgotten: the channel goes back at once.
            with closing(parts):
                for part in parts:
                    self._take(*part)
        except ChannelLost:
            if self._have == had:
                raise

    def _part_at(self, offset: int) -> tuple[object, ...]:
        return self._oid, self._tid, offset, self._part_bytes

    def _begin(self, size: int, data: bytes) -> int:
        if 0 < len(data) < size:
            # A server may give less at a time than it is asked for.
            self._part_bytes = min(self._part_bytes, len(data))
        self._size = size
        self._take(size, data)
        return size

    def _take(self, size: int, data: bytes) -> None:
        assert self._size is not None
        if size != self._size or len(data) != min(self._part_bytes, size - self._have):
            # A revision never changes: this is another server, with other data.
            raise StorageError(
                f"the blob of oid {self._oid.hex()} has changed meanwhile"
            )
        self._file.write(data)
        self._have += len(data)
