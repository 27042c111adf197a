"""What isolation promises, in plain Python: a list of commits and the rules for it.

A reference model for tests: it knows nothing of servers, files or threads. An object
is a *cell* (two changes of it conflict) or a *counter* (they add up); a value is
whatever the test takes out of a record.
"""

from collections.abc import Collection
from typing import Any, NamedTuple


class Committed(NamedTuple):
    """A transaction, and what it left of each object."""

    tid: bytes
    values: dict[bytes, Any]


class Revision(NamedTuple):
    """The value of an object, and the transaction that wrote it."""

    tid: bytes
    value: Any


class Refused(Exception):
    """What was asked for cannot be done; the text says why."""


class History:
    """All transactions in the order of their tids."""

    def __init__(self, commits: list[Committed], counters: Collection[bytes]):
        self.commits = commits
        self._counters = counters
        # Nothing up to here can be undone any more.
        self.packed_until = bytes(8)
        # What packs have taken away.
        self._packed: dict[bytes, dict[bytes, Any]] = {}

    @property
    def last_tid(self) -> bytes:
        return self.commits[-1].tid

    def append(self, tid: bytes, values: dict[bytes, Any]) -> None:
        assert tid > self.last_tid, "transaction ids must grow"
        self.commits.append(Committed(tid, values))

    def at(self, oid: bytes, snapshot: bytes | None = None) -> Revision:
        """The revision that whoever sees everything up to ``snapshot`` sees."""
        found = self.revisions(oid, snapshot)
        assert found, f"{oid.hex()} is not there yet"
        return found[-1]

    def revisions(self, oid: bytes, until: bytes | None = None) -> list[Revision]:
        """Oldest first."""
        return [
            Revision(each.tid, each.values[oid])
            for each in self.commits
            if oid in each.values and (until is None or each.tid <= until)
        ]

    def next_tid(self, oid: bytes, tid: bytes) -> bytes | None:
        """When the revision ``tid`` of an object was replaced."""
        later = (each.tid for each in self.commits if oid in each.values)
        return next((each for each in later if each > tid), None)

    def has_changed(self, oid: bytes, since: bytes) -> bool:
        return self.at(oid).tid != since

    def outcome(
        self, read: dict[bytes, Revision], written: dict[bytes, Any]
    ) -> dict[bytes, Any]:
        """What a transaction leaves if it is committed now; raises Refused.

        ``read``: the revisions of what it writes, as it has read them.
        """
        values = {}
        for oid, value in written.items():
            now = self.at(oid)
            if now.tid == read[oid].tid:
                values[oid] = value
            elif oid in self._counters:
                values[oid] = value + now.value - read[oid].value
            else:
                raise Refused(f"{oid.hex()} was changed by {now.tid.hex()}")
        return values

    def undone(self, tid: bytes) -> dict[bytes, Any]:
        """What an undo of ``tid`` leaves if it is committed now; raises Refused."""
        if tid <= self.packed_until:
            raise Refused(f"{tid.hex()} is packed")
        (undone,) = (each for each in self.commits if each.tid == tid)
        values = {}
        for oid, value in undone.values.items():
            before = [each for each in self.revisions(oid) if each.tid < tid][-1]
            now = self.at(oid)
            if now.value == value:
                values[oid] = before.value
            elif oid in self._counters:
                values[oid] = now.value + before.value - value
            else:
                raise Refused(f"{oid.hex()} was changed by {now.tid.hex()}")
        return values

    def pack(self, until: bytes) -> None:
        """Of everything up to ``until`` leave what was current then."""
        kept = []
        for each in self.commits:
            values = {
                oid: value
                for oid, value in each.values.items()
                if each.tid > until or self.at(oid, until).tid == each.tid
            }
            gone = {
                oid: value for oid, value in each.values.items() if oid not in values
            }
            self._packed.setdefault(each.tid, {}).update(gone)
            if values:
                kept.append(Committed(each.tid, values))
        self.commits = kept
        self.packed_until = max(self.packed_until, until)

    def without_what_a_pack_may_keep(self, found: list[Committed]) -> list[Committed]:
        """What is in a file, if it is more than must be there after a pack.

        A pack keeps data to which a later undo points, whether they were current or
        not.
        """
        current = {each.tid: each.values for each in self.commits}
        kept = []
        for tid, values in found:
            packed = self._packed.get(tid, {})
            needed = {
                oid: value
                for oid, value in values.items()
                if oid in current.get(tid, {}) or packed.get(oid) != value
            }
            if needed:
                kept.append(Committed(tid, needed))
        return kept
