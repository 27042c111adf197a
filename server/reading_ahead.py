"""Answers to a client that reads ahead: what it needs, what it will, what comes then.

The client says what it guesses; the server adds what the client cannot know yet, the
objects that the last one is linked with, as the buckets of a BTree are, one after the
other. Links are found in records without unpickling them.

Called on the loop by the service, with messages that protocol.methods has checked. The
work is bounded by ``load_ahead_max`` and by bytes, and nobody waits for what is only a
guess: a record that is not in memory ends the answer. Only if the first one is not, all
that was named is read in a reader thread, which then may wait.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from zeolith.protocol.limits import Limits
from zeolith.protocol.references import link_of
from zeolith.server.answering import load_shortly
from zeolith.server.loading import FindsRevision, Found, load_several_slowly
from zeolith.storage.database import WouldBlock

if TYPE_CHECKING:
    from zeolith.server.peer import Peer

# The service's: answers a request with what a step gives in a reader thread.
Read = Callable[..., object]
# An oid and its revision.
Linked = tuple[bytes, bytes, bytes, bytes | None]


class ReadingAhead:
    """Answers to ``load_ahead``."""

    def __init__(self, read: Read, limits: Limits):
        self._read = read
        self._limits = limits
        self.handlers: dict[str, Callable[..., Any]] = {"load_ahead": self._load_ahead}

    def _load_ahead(
        self,
        peer: "Peer",
        number: int,
        oids: list[bytes],
        before: bytes,
        links: int,
        bytes_max: int,
    ) -> object:
        assert peer.session is not None
        served, limits = peer.session.served, self._limits
        oids = oids[: limits.load_ahead_max]
        links = min(links, limits.load_ahead_max)
        bytes_max = min(bytes_max, limits.batch_bytes_max)
        before = min(before, served.horizon)
        as_of = served.changes.last_tid
        served.counters.loads += len(oids)
        try:
            load = load_shortly(served)
            loaded, linked = load_ahead(load, oids, before, links, bytes_max)
        except WouldBlock:
            read = partial(load_several_slowly, served.database, oids, before)
            return self._read(
                peer, number, read, bytes_max, then=lambda found: (as_of, found, [])
            )
        served.counters.loads += len(linked)
        return as_of, loaded, linked


def load_ahead(
    load: FindsRevision, oids: list[bytes], before: bytes, links: int, bytes_max: int
) -> tuple[list[Found | None], list[Linked]]:
    """The revisions of the first ``oids``, and of up to ``links`` behind the last one.

    What is not in memory, or would make it more than ``bytes_max``, ends the answer;
    but the first object is in it, or WouldBlock is raised.
    """
    loaded: list[Found | None] = []
    size = 0
    for oid in oids:
        try:
            found = load(oid, before)
        except KeyError:
            found = None
        except WouldBlock:
            if loaded:
                return loaded, []
            raise
        size += len(found[0]) if found else 0
        if loaded and size > bytes_max:
            return loaded, []
        loaded.append(found)
    last = loaded[-1] if loaded else None
    return loaded, _linked(load, last, before, links, bytes_max - size)


def _linked(
    load: FindsRevision, found: Found | None, before: bytes, links: int, bytes_max: int
) -> list[Linked]:
    linked: list[Linked] = []
    while found is not None and len(linked) < links:
        oid = link_of(found[0])
        if oid is None:
            break
        try:
            found = load(oid, before)
        except (KeyError, WouldBlock):
            break
        if found is None or len(found[0]) > bytes_max:
            break
        bytes_max -= len(found[0])
        linked.append((oid, *found))
    return linked
