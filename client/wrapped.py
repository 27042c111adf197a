"""A ClientStorage below wrappers, which change records on their way.

A wrapper registers itself with the storage when it is made, and is registered with by
the database, or the next wrapper, some time later. A change that comes in between would
fail in the wrapper: it has nobody to tell yet. Nobody above has seen anything either,
so there is nothing to be told. Called by the Position, under its lock.
"""

from typing import Any


class WrapperListener:
    """Tells a wrapper of changes once there is somebody above it."""

    def __init__(self, wrapper: Any):
        self._wrapper = wrapper

    def invalidate(self, tid: bytes, oids: list[bytes]) -> None:
        """See ZODB.interfaces.IStorageWrapper."""
        if _leads_somewhere(self._wrapper):
            self._wrapper.invalidate(tid, oids)

    def invalidateCache(self) -> None:
        """See ZODB.interfaces.IStorageWrapper."""
        if _leads_somewhere(self._wrapper):
            self._wrapper.invalidateCache()


def is_wrapper(listener: Any) -> bool:
    """Whether whoever registers stands between the storage and somebody else."""
    return getattr(listener, "base", None) is not None


def _leads_somewhere(wrapper: Any) -> bool:
    above = wrapper
    while is_wrapper(above):
        # Asked of the wrapper alone: it hands on to its base what it has not got.
        above = vars(above).get("db")
    return above is not None
