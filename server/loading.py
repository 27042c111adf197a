"""What a load is answered, for one object and for many.

Called on the loop with a ``load`` that does not wait, in a reader thread with one that
may. A record of a transaction that is on disk and not announced yet is in the storage
already, and not there for clients: they must not even learn that it will be.
"""

from collections.abc import Callable
from typing import Any

from ZODB.POSException import POSKeyError

from zeolith.storage.database import Database, Revision

# What a database is told to bring near at a time.
PREFETCHED = 100

Load = Callable[[bytes, bytes], Revision | None]
# What a Revision is, by whatever makes it.
Found = tuple[bytes, bytes, bytes | None]
FindsRevision = Callable[[bytes, bytes], Found | None]


def load_announced(
    load: Load, oid: bytes, before: bytes, horizon: bytes
) -> Revision | None:
    """The revision for ``before``; None if the object is younger, and announced.

    Else POSKeyError, as for an object that does not exist. ``before`` is not beyond
    ``horizon``, before which everything is announced.
    """
    found = load(oid, before)
    if found is None:
        refuse_unannounced(load, oid, horizon)
    return found


def refuse_unannounced(load: Load, oid: bytes, horizon: bytes) -> None:
    """Raise POSKeyError if all revisions of ``oid`` are beyond ``horizon``.

    To an object of which it is told that it is younger than its snapshot, ZODB answers
    with a conflict, which is tried again in vain as long as the snapshot is the same.
    """
    try:
        known = load(oid, horizon)
    except POSKeyError:
        # It was deleted.
        return
    if known is None:
        raise POSKeyError(oid)


def answer_of(as_of: bytes, found: Revision | None) -> tuple[Any, ...]:
    """What ``load`` answers; it is true as of the tid ``as_of``."""
    return (None, None, None, as_of) if found is None else (*found, as_of)


def load_several(
    load: FindsRevision, oids: list[bytes], before: bytes, bytes_max: int
) -> list[Found | None]:
    """The revisions of the first ``oids``, up to about ``bytes_max`` of data.

    An object that is not there is None, for the others are still wanted; the caller
    asks again for what is beyond the end of the list.
    """
    loaded: list[Found | None] = []
    size = 0
    for oid in oids:
        try:
            found = load(oid, before)
        except KeyError:
            found = None
        loaded.append(found)
        size += len(found[0]) if found else 0
        if size > bytes_max:
            break
    return loaded


def load_several_slowly(
    database: Database, oids: list[bytes], before: bytes, bytes_max: int
) -> list[Found | None]:
    """The same in a reader thread: ``database`` is told what will be wanted."""
    loaded: list[Found | None] = []
    size = 0
    # Not all at once: most of it may be beyond the end of the answer.
    for start in range(0, len(oids), PREFETCHED):
        part = oids[start : start + PREFETCHED]
        database.prefetch(part, before)
        found = load_several(database.load, part, before, bytes_max - size)
        loaded += found
        size += sum(len(each[0]) for each in found if each)
        if size > bytes_max:
            break
    return loaded
