"""Undo where somebody has changed the same object since: who merges, and with what.

A Data.fs asks for three states to be merged while it writes an undo. Classes that the
server knows are merged at once (``conflicts``); for any other the states go to the
client, which has the classes, and the vote is repeated with its answers: what an undo
writes depends on the undos before it in the same transaction, so there is nothing to
go on from in the middle. Called in the writer thread only.
"""

from collections.abc import Collection
from typing import NamedTuple

from ZODB.POSException import ConflictError, StorageTransactionError

from zeolith.storage import conflicts
from zeolith.storage.database import Conflict
from zeolith.storage.wrapping import PLAIN, Form

# Each round begins the vote anew, while nobody else can commit.
UNDO_ROUNDS_MAX = 100


class _States(NamedTuple):
    """What was to be merged: the same question has the same answer."""

    oid: bytes
    committed: bytes
    old: bytes
    new: bytes


class _Asked(NamedTuple):
    """A question to the client, and how its answer is kept."""

    states: _States
    shown: Conflict
    outside: Form


class UndoConflicts:
    """The conflicts of one transaction's undos."""

    def __init__(self) -> None:
        self._answers: dict[_States, bytes] = {}
        # What the client is asked for, by oid: one of each object at a time.
        self._asked: dict[bytes, _Asked] = {}

    @property
    def unresolved(self) -> list[Conflict]:
        """What the client is asked for, in the form in which it takes records."""
        return [asked.shown for asked in self._asked.values()]

    def merge(
        self, conflict: Conflict, plain: Form = PLAIN, outside: Form | None = PLAIN
    ) -> bytes:
        """The record that holds both changes; raises ConflictError if there is none.

        Then ``unresolved`` has the conflict, or an earlier one of the same object.
        The records are those of the file: ``plain`` makes pickles of them, ``outside``
        what clients know; None: no client can be asked.
        """
        states = _states(conflict)
        if states in self._answers:
            return self._answers[states]
        records = (conflict.new, conflict.old, conflict.committed)
        try:
            return conflicts.resolve_encoded(plain, *records)
        except conflicts.Unresolvable:
            if outside is not None and conflict.oid not in self._asked:
                new, old, committed = map(outside.decode, records)
                shown = conflict._replace(new=new, old=old, committed=committed)
                self._asked[conflict.oid] = _Asked(states, shown, outside)
            serials = (conflict.committed_tid, conflict.old_tid)
            raise ConflictError(oid=conflict.oid, serials=serials) from None

    def answer(self, resolutions: dict[bytes, bytes]) -> None:
        """What the client made of the ``unresolved``."""
        for oid, asked in self._asked.items():
            if oid in resolutions:
                if not resolutions[oid]:
                    # In a Data.fs an empty record says that the data are elsewhere.
                    raise StorageTransactionError(
                        f"the record of oid {oid.hex()} is empty"
                    )
                self._answers[asked.states] = asked.outside.encode(resolutions[oid])
        self.forget_unresolved()

    def forget_unresolved(self) -> None:
        """Nobody need be asked any more."""
        self._asked = {}

    def asked(self) -> Collection[bytes]:
        """The oids of the ``unresolved``."""
        return self._asked.keys()


def _states(conflict: Conflict) -> _States:
    return _States(conflict.oid, conflict.committed, conflict.old, conflict.new)
