"""A Data.fs below wrappers: all that a FileStore is, with records that are converted.

Commits, undo and packing go through the wrappers; loads read the file as a FileStore
does and convert what they find. Identity, oids and tids are the FileStore's. See
``database`` for the threads.
"""

from collections.abc import Callable
from typing import Any

from zeolith.storage.adapted import AdaptedStorage
from zeolith.storage.database import (
    Batch,
    CurrentRecord,
    Revision,
    Transaction,
    Wish,
    WouldBlock,
)
from zeolith.storage.filestore import FileStore
from zeolith.storage.iteration import current_in_storage, iterate_storage
from zeolith.storage.locks import ALONE, Claim
from zeolith.storage.pack_progress import Packed, Packing
from zeolith.storage.wrapping import PLAIN, outside, wrappers

# More than this is not converted on the loop.
LOOP_BYTES_MAX = 16 * 1024


class NotAWrapper(Exception):
    """What was made of the file is a storage of another kind."""


class WrappedFileStore(FileStore):
    """The database in a Data.fs, as it is seen through wrappers."""

    def __init__(
        self, name: str, path: str, wrap: Callable[[Any], Any], **options: Any
    ):
        """``wrap`` makes the storage of the opened file; NotAWrapper if it is none."""
        self._wrap = wrap
        super().__init__(name, path, **options)
        form = self._file.outside = outside(self._storage)
        if form is not None and form is not PLAIN:
            self.form_inside = form.encode
        # What makes of a record in the file what clients know, if one can tell.
        self._reading = None if form is None else form.decode

    def _around(self, file: Any) -> Any:
        storage = self._wrap(file)
        stack = list(wrappers(storage))
        if not stack or stack[-1].base is not file:
            raise NotAWrapper
        return storage

    # loop

    def claim(self, transaction: Transaction) -> Claim:
        """See Database.claim.

        What is not in memory would have to be converted twice, and nobody promises
        that it comes to the same.
        """
        if self._reading is None:
            return ALONE
        is_in_memory = isinstance(transaction.operations, list)
        if self.form_inside is not None and not is_in_memory:
            return ALONE
        return super().claim(transaction)

    def load_nowait(self, oid: bytes, before: bytes) -> Revision | None:
        """See Database.load_nowait."""
        if self._reading is None:
            raise WouldBlock
        found = super().load_nowait(oid, before)
        if found is not None and len(found.data) > LOOP_BYTES_MAX:
            raise WouldBlock
        return self._converted(found)

    def near(self) -> None:
        """See Database.near: what clients know is not what is in the file."""

    # reader

    def load(self, oid: bytes, before: bytes) -> Revision | None:
        """See Database.load."""
        if self._reading is None:
            found = self._storage.loadBefore(oid, before)
            return None if found is None else Revision(*found)
        return self._converted(super().load(oid, before))

    def load_serial(self, oid: bytes, tid: bytes) -> bytes:
        """See Database.load_serial."""
        if self._reading is None:
            data: bytes = self._storage.loadSerial(oid, tid)
            return data
        return self._reading(super().load_serial(oid, tid))

    def transactions(self, wish: Wish, cursor: bytes | None) -> Batch:
        """See Database.transactions."""
        if self._reading is None:
            return iterate_storage(self._storage, wish, cursor)
        batch = super().transactions(wish, cursor)
        for piece in batch.pieces:
            piece.records[:] = [
                record._replace(data=record.data and self._reading(record.data))
                for record in piece.records
            ]
        return batch

    def current_records(
        self, first: bytes | None, before: bytes, bytes_max: int
    ) -> tuple[list[CurrentRecord], bytes | None]:
        """See Database.current_records."""
        if self._reading is None:
            return current_in_storage(self._storage, first, bytes_max)
        records, after = super().current_records(first, before, bytes_max)
        return [
            record._replace(data=self._reading(record.data)) for record in records
        ], after

    def pack(
        self, time_s: float, gc: bool | None = None, packing: Packing | None = None
    ) -> Packed:
        """See Database.pack; in this process.

        The packer would look for references in records that it cannot read, and take
        everything for garbage.
        """
        return AdaptedStorage.pack(self, time_s, gc, packing)

    def _converted(self, found: Revision | None) -> Revision | None:
        if found is None or self._reading is None:
            return found
        return found._replace(data=self._reading(found.data))
