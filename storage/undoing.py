"""Undo where somebody has changed the same object since: who merges, and with what.

A Data.fs asks for three states to be merged while it writes an undo. Classes that the
server knows are merged at once (``conflicts``); for any other the states go to the
client, which has the classes, and the vote is repeated with its answers: what an undo
writes depends on the undos before it in the same transaction, so there is nothing to
go on from in the middle. Called in the writer thread only.
"""

from typing import NamedTuple

from ZODB.POSException import ConflictError, StorageTransactionError

from zeolith.storage import conflicts
from zeolith.storage.database import Conflict


class _States(NamedTuple):
    """What was to be merged: the same question has the same answer."""

    oid: bytes
    committed: bytes
    old: bytes
    new: bytes


class UndoConflicts:
    """The conflicts of one transaction's undos."""

    def __init__(self) -> None:
        self._answers: dict[_States, bytes] = {}
        # Those that the client is asked for, by oid: one of each object at a time.
        self.unresolved: dict[bytes, Conflict] = {}

    def merge(self, conflict: Conflict) -> bytes:
        """The record that holds both changes; raises ConflictError if there is none.

        Then ``unresolved`` has the conflict, or an earlier one of the same object.
        """
        states = _states(conflict)
        if states in self._answers:
            return self._answers[states]
        try:
            return conflicts.resolve(conflict.new, conflict.old, conflict.committed)
        except conflicts.Unresolvable:
            self.unresolved.setdefault(conflict.oid, conflict)
            serials = (conflict.committed_tid, conflict.old_tid)
            raise ConflictError(oid=conflict.oid, serials=serials) from None

    def answer(self, resolutions: dict[bytes, bytes]) -> None:
        """What the client made of the ``unresolved``."""
        for oid, conflict in self.unresolved.items():
            if oid in resolutions:
                if not resolutions[oid]:
                    # In a Data.fs an empty record says that the data are elsewhere.
                    raise StorageTransactionError(
                        f"the record of oid {oid.hex()} is empty"
                    )
                self._answers[_states(conflict)] = resolutions[oid]
        self.unresolved = {}


def _states(conflict: Conflict) -> _States:
    return _States(conflict.oid, conflict.committed, conflict.old, conflict.new)
