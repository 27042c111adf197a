"""The short way of a load on the loop: one compiled call between two system calls.

Nearly all that a server is asked for are current revisions that are in the page cache.
The general way of such a load, through some twenty functions in Python, takes half as
long as what the kernel does to receive the request and to send the answer. The compiled
``answer`` has all of it in one function, from the bytes of the request to those of the
answer; the compiled ``load`` is the part of it that many loads in one request need.

Neither refuses or raises anything: what they do not answer goes the general way, as
everything does where they were not built or are switched off, and where what clients
know is not what is in a file. The tests hold one way against the other.
"""

from typing import TYPE_CHECKING

from zeolith.protocol.compiled import compiled_module
from zeolith.protocol.connection import Answer
from zeolith.server.loading import FindsRevision, Found

if TYPE_CHECKING:
    from zeolith.server.served import Served

_compiled = compiled_module("zeolith.server._answering")


def answering(served: "Served") -> Answer | None:
    """The short way to what ``served`` serves; None if there is none."""
    if _compiled is None:
        return None
    answer = _compiled.answer

    def answer_load(data: bytes, last_request: int) -> tuple[int, bytes] | None:
        # A pack replaces it. As long as it is ours its file is open.
        near = served.database.near()
        if near is None:
            return None
        answered: tuple[int, bytes] | None = answer(
            data,
            last_request,
            near.fd,
            near.buckets,
            served.horizon,
            served.changes.last_tid,
        )
        if answered is not None:
            served.counters.loads += 1
        return answered

    return answer_load


def load_shortly(served: "Served") -> FindsRevision:
    """The database's ``load_nowait``, by the short way as far as that leads.

    To be used at once: a pack may replace the file.
    """
    database = served.database
    near = database.near()
    if _compiled is None or near is None:
        return database.load_nowait
    load, buckets = _compiled.load, near.buckets

    def load_near(oid: bytes, before: bytes) -> Found | None:
        found: Found | None = load(oid, before, near.fd, buckets)
        return found or database.load_nowait(oid, before)

    return load_near
