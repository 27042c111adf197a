"""What a storage tells of its changes, on the way to whoever serves it.

A storage that others write to as well (another server's, for one) tells the object
that was registered with it: ``invalidate(tid, oids)`` for each change, in tid order,
and ``invalidateCache()`` when there is no telling any more. A Feed is that object. It
is called from the storage's threads, under the storage's locks, so it only hands on:
to the listener once there is one, and until then to a list.

Own commits may be told here too (``own``), from within the callback of tpc_finish; then
one list has all changes in their order.
"""

import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

from ZODB.interfaces import IStorageWrapper
from ZODB.serialize import referencesf
from zope.interface import implementer


class Told(NamedTuple):
    """One change, as the storage told it."""

    tid: bytes
    oids: list[bytes]
    # The id that the client chose, if the change was made through us.
    transaction: bytes | None


# None: whatever is known of the storage is of no use any more.
Listener = Callable[[Told | None], None]


@implementer(IStorageWrapper)
class Feed:
    """The object that is registered with a storage."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._early: list[Told | None] = []
        self._listener: Listener | None = None

    def follow(self, listener: Listener) -> None:
        """Call ``listener`` for everything that was told and will be told, in order.

        From any thread; it must not wait.
        """
        with self._lock:
            early, self._early = self._early, []
            for told in early:
                listener(told)
            self._listener = listener

    def own(self, tid: bytes, oids: list[bytes], transaction: bytes) -> None:
        """We have made a change; called in its place among the others."""
        self._tell(Told(tid, oids, transaction))

    # What ZODB asks of whoever is registered (IStorageWrapper)

    def invalidate(
        self, transaction_id: bytes, oids: Iterable[bytes], version: str = ""
    ) -> None:
        """Somebody else has made a change."""
        self._tell(Told(transaction_id, list(oids), None))

    def invalidateCache(self) -> None:
        """Changes were missed."""
        self._tell(None)

    references = staticmethod(referencesf)

    def transform_record_data(self, data: bytes) -> bytes:
        """Records leave as they are."""
        return data

    untransform_record_data = transform_record_data

    def _tell(self, told: Told | None) -> None:
        with self._lock:
            if self._listener is None:
                self._early.append(told)
            else:
                self._listener(told)
