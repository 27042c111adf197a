"""What nearly every transaction is made of, stores and checks, by columns.

To look at each of a thousand operations on its own takes longer than to read the tids
of their objects. ``plain_operations`` turns them over: all oids, all serials, all
records, so that one call of the interpreter looks at all of them. Only of transactions
that store each object once, and do nothing but store and check; for others the general
way is right, and fast enough. Pure; any thread.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

# Of fewer each is looked at sooner than all are turned over.
PLAIN_OPERATIONS_MIN = 4
# What is called for all of them lets no other thread run meanwhile: half a millisecond.
PLAIN_OPERATIONS_MAX = 5000

Column = tuple[bytes, ...]


class PlainOperations(NamedTuple):
    """The operations of a transaction; those of one kind are in their order."""

    # Of the stores; no oid is there twice.
    oids: Column
    serials: Column
    records: Column
    # Of the checks.
    checked_oids: Column
    checked_serials: Column

    def are_current(self, tids: dict[bytes, bytes]) -> bool:
        """Whether nothing was changed since; ``tids`` are those of what there is.

        What is not there cannot be checked, but stored.
        """
        is_stored = tuple(map(tids.get, self.oids, self.serials)) == self.serials
        return is_stored and (
            tuple(map(tids.get, self.checked_oids)) == self.checked_serials
        )


def plain_operations(operations: Collection[list[Any]]) -> PlainOperations | None:
    """``operations`` by columns; None if that is not possible, or of no use."""
    if type(operations) is not list:
        return None
    if not PLAIN_OPERATIONS_MIN <= len(operations) <= PLAIN_OPERATIONS_MAX:
        return None
    stores = [each for each in operations if each[0] == "store"]
    if not stores:
        return None
    checks = []
    if len(stores) < len(operations):
        checks = [each for each in operations if each[0] == "check"]
        if len(stores) + len(checks) < len(operations):
            return None
    _names, oids, serials, records = zip(*stores, strict=True)
    if len(set(oids)) < len(oids):
        return None
    checked = tuple(zip(*checks, strict=True)) or ((), (), ())
    return PlainOperations(oids, serials, records, checked[1], checked[2])
