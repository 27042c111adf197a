"""What a process knows and its cache file does not yet: it waits to be written.

The changes after ``base``, up to which the file is, and the revisions that were loaded
or committed. All of it is written together, and then taken out (``written``).

Readers look into ``changed`` and ``pending`` without a lock. Both are replaced when
something is taken out, never emptied: whoever took a dictionary before he looked into
the file misses nothing (see disk_cache). Everything else is under the cache's lock.
Pure: nothing here waits.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from zeolith.client.changes import Change

# More revisions are not kept: whoever writes them does not come to it.
BYTES_MAX = 16 * 1024**2
# What one costs beside its data, about.
REVISION_BYTES = 200


class Revision(NamedTuple):
    """What is to be kept; ``end`` is None if it was open as of ``as_of``."""

    oid: bytes
    tid: bytes
    end: bytes | None
    data: bytes
    as_of: bytes


class Batch(NamedTuple):
    """What is to be written: changes after ``base``, then the rest."""

    base: bytes
    changes: Sequence[Change]
    revisions: Sequence[Revision]
    forgotten: Mapping[bytes, int]


class Backlog:
    """What waits."""

    def __init__(
        self, base: bytes, changes: Sequence[Change] = (), trusted: bytes = b""
    ):
        self.base = base
        # Where the process stands: the tid of the last change.
        self.through = base
        # The file's state that was found to be of our history, as it is stored.
        self.trusted = trusted
        self.changes: list[Change] = []
        # oid -> the tids of its changes after base, in order.
        self.changed: dict[bytes, tuple[bytes, ...]] = {}
        # Of each object the latest revision; it may be read from here.
        self.pending: dict[bytes, Revision] = {}
        # Whether these are good the file must say.
        self._others: list[Revision] = []
        self._revision_bytes = 0
        # Of these nothing in the file may be used; how often each was forgotten.
        self.forgotten: dict[bytes, int] = {}
        for change in changes:
            self.add_change(change)

    @property
    def tids(self) -> list[bytes]:
        """Of all changes after base."""
        return [change.tid for change in self.changes]

    def add_change(self, change: Change) -> None:
        """``change`` is the next one."""
        changed = self.changed
        for oid in change.oids:
            changed[oid] = (*changed.get(oid, ()), change.tid)
        self.changes.append(change)
        if self.trusted[8:16] > self.through and change.tid != self.trusted[8:16]:
            # The file is ahead of us: is it still where we go?
            self.trusted = b""
        self.through = change.tid

    def add_revision(self, revision: Revision) -> None:
        """Have ``revision`` written, unless too much waits."""
        size = len(revision.data) + REVISION_BYTES
        if self._revision_bytes + size > BYTES_MAX:
            return
        self._revision_bytes += size
        known = self.pending.get(revision.oid)
        # Else it may have ended between its as_of and base, which is not known here.
        is_judged = revision.end is not None or revision.as_of >= self.base
        if is_judged and (known is None or known.tid < revision.tid):
            self.pending[revision.oid] = revision
            if known is not None:
                self._others.append(known)
        else:
            self._others.append(revision)

    def forget(self, oid: bytes) -> None:
        """Nothing that is known of ``oid`` may be used."""
        self.forgotten[oid] = self.forgotten.get(oid, 0) + 1
        self.pending.pop(oid, None)
        self._others = [each for each in self._others if each.oid != oid]

    def batch(self) -> Batch:
        """All there is to write now."""
        upto = self.changes[-1].tid if self.changes else self.base
        self.pending = {
            oid: self._judged(each, upto) for oid, each in self.pending.items()
        }
        self._others = [self._judged(each, upto) for each in self._others]
        # The file goes where we are known to go. What a server has told of later than
        # that waits: the file may come to go another way.
        revisions = [
            each
            for each in (*self._others, *self.pending.values())
            if each.as_of <= upto
        ]
        return Batch(self.base, tuple(self.changes), revisions, dict(self.forgotten))

    def drop_ahead(self) -> None:
        """Drop what is true as of a later tid than where the process stands."""
        through = self.through
        self.pending = {
            oid: each for oid, each in self.pending.items() if each.as_of <= through
        }
        self._others = [each for each in self._others if each.as_of <= through]
        self._measure()

    def drop_revisions(self) -> None:
        """They could not be written, and are not tried again."""
        self.pending = {}
        self._others = []
        self._revision_bytes = 0

    def written(self, batch: Batch) -> None:
        """``batch`` is in the file."""
        base = batch.changes[-1].tid if batch.changes else self.base
        done = {id(revision) for revision in batch.revisions}
        pending = {
            oid: self._judged(revision, base)
            for oid, revision in self.pending.items()
            if id(revision) not in done
        }
        rest = Backlog(base, self.changes[len(batch.changes) :])
        # First what depends on the changes, then these.
        self.pending = pending
        self._others = [each for each in self._others if id(each) not in done]
        self._measure()
        for oid, times in batch.forgotten.items():
            # Else it was forgotten again while it was written.
            if self.forgotten[oid] == times:
                del self.forgotten[oid]
        self.base, self.changes = base, rest.changes
        self.changed = rest.changed

    def _measure(self) -> None:
        self._revision_bytes = sum(
            len(each.data) + REVISION_BYTES
            for each in (*self.pending.values(), *self._others)
        )

    def _judged(self, revision: Revision, upto: bytes) -> Revision:
        """``revision``, by the changes after base and up to ``upto``.

        When they are taken out of memory, it must not depend on them any more.
        """
        if revision.end is not None or not self.base <= revision.as_of < upto:
            return revision
        end = first_after(self.changed.get(revision.oid, ()), revision.tid)
        if end is None or end > upto:
            return revision._replace(as_of=upto)
        return revision._replace(end=end)


def first_after(tids: Sequence[bytes], tid: bytes) -> bytes | None:
    """The first of ``tids``, which are in order, that is later than ``tid``."""
    for each in tids:
        if each > tid:
            return each
    return None
