"""What a database is, beside its data: the file ``Data.fs.zeolith``.

A Data.fs has no name of its own, so it cannot be told from another one, nor from an
older copy of itself; and it remembers only oids that were stored, so a restarted
server would give the others out again. Both are kept here, as JSON::

    {"database_id": "<32 hex digits>", "epoch": 1, "oids_reserved": "<16 hex digits>"}

The file is replaced atomically and synced before anything relies on it. Losing it
costs a new database id: clients drop what they have cached. Called from worker
threads only; the owner serialises the calls.
"""

import json
import os
import uuid
from pathlib import Path

from zeolith.storage.syncing import sync_path

# What reading the file may raise: nested or large beyond reason counts too.
_NOT_WHAT_WE_WROTE = (KeyError, OverflowError, RecursionError, TypeError, ValueError)


class IdentityError(Exception):
    """The file is there but cannot be used; the text says why and what to do."""


class Identity:
    """The identity of the database whose data are in ``data_path``."""

    def __init__(self, data_path: str, *, is_read_only: bool = False):
        self._path = Path(f"{data_path}.zeolith")
        self._is_read_only = is_read_only
        self.database_id = uuid.uuid4().bytes
        self.epoch = 1
        # No oid beyond this one was ever given out.
        self.oids_reserved = 0
        if self._path.exists():
            self._load()
        elif not is_read_only:
            self._save()

    def reserve_oids(self, upto: int) -> None:
        """Remember that oids up to ``upto`` may be in use; raises OSError."""
        if upto > self.oids_reserved:
            before, self.oids_reserved = self.oids_reserved, upto
            try:
                self._save()
            except OSError:
                self.oids_reserved = before
                raise

    def return_oids(self, unused_from: int) -> None:
        """At a clean end: oids from ``unused_from`` on were not given out."""
        if unused_from - 1 < self.oids_reserved and not self._is_read_only:
            self.oids_reserved = unused_from - 1
            self._save()

    def _load(self) -> None:
        try:
            fields = json.loads(self._path.read_text())
            self.database_id = bytes.fromhex(fields["database_id"])
            self.epoch = int(fields["epoch"])
            self.oids_reserved = int(fields["oids_reserved"], 16)
            if len(self.database_id) != 16 or self.epoch < 1 or self.oids_reserved < 0:
                raise ValueError("a value out of range")
        except _NOT_WHAT_WE_WROTE as error:
            raise IdentityError(
                f"{self._path} is damaged ({error}). Restore it from a backup, or"
                " remove it: clients will then drop their caches once"
            ) from error

    def _save(self) -> None:
        fields = {
            "database_id": self.database_id.hex(),
            "epoch": self.epoch,
            "oids_reserved": f"{self.oids_reserved:016x}",
        }
        replacement = self._path.with_name(self._path.name + ".new")
        with replacement.open("w") as file:
            json.dump(fields, file)
            file.flush()
            os.fsync(file.fileno())
        replacement.replace(self._path)
        sync_path(self._path.parent)
