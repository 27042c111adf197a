"""What a transaction wants to write, on its way to the vote.

Nothing is sent before the vote. Operations gather in memory; every
``batch_bytes_max`` they are packed into a message and appended to a spill, which is
memory first and then an unnamed temporary file, so a transaction may be larger than
memory. Belongs to the thread that commits.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

from ZODB.POSException import StorageError

from zeolith.protocol.codec import encode
from zeolith.protocol.limits import Limits
from zeolith.protocol.messages import Notice

TRANSACTION_ID_BYTES = 16
SPILL_MEMORY_BYTES = 16 * 1024 * 1024
# Records kept for the cache, so that an object just committed need not be loaded.
KEPT_BYTES_MAX = 4 * 1024 * 1024
_SEND_BYTES = 256 * 1024
# What an operation takes on the wire beside its data.
_OPERATION_BYTES = 64


class Stores:
    """The operations of one transaction, and the id that the client chose for it."""

    def __init__(self, limits: Limits):
        self.id = os.urandom(TRANSACTION_ID_BYTES)
        # What is not spilled yet.
        self.operations: list[list[Any]] = []
        self.oids: set[bytes] = set()
        # oid -> the record last stored, for the cache; empty if there are too many.
        self.kept: dict[bytes, bytes] = {}
        self._data_bytes_max = limits.transaction_bytes_max
        self._batch_bytes_max = limits.batch_bytes_max
        # Kept, for it is worked out each time.
        self._record_bytes_max = limits.record_bytes_max
        self._data_bytes = 0
        self._gathered_bytes = 0
        self._kept_bytes = 0
        self._spill: IO[bytes] | None = None

    def store(
        self,
        oid: bytes,
        serial: bytes,
        data: bytes,
        operation: str = "store",
        rest: Sequence[Any] = (),
    ) -> None:
        """Add a record; raises StorageError if it is too large for the wire.

        ``operation`` and the ``rest`` of what it takes: of one with a blob.
        """
        data = self._measured(data)
        size = len(data)
        self._add([operation, oid, serial, data, *rest], size)
        self.oids.add(oid)
        self._kept_bytes += size
        if self._kept_bytes <= KEPT_BYTES_MAX:
            self.kept[oid] = data
        else:
            self.kept.clear()

    def restore(
        self, oid: bytes, tid: bytes, data: bytes | None, data_tid: bytes | None
    ) -> None:
        """Add a record as it was; raises StorageError as ``store`` does."""
        if data is not None:
            data = self._measured(data)
        self._add(["restore", oid, tid, data, data_tid], len(data or b""))
        self._gone(oid)

    def delete(self, oid: bytes, serial: bytes) -> None:
        """Remove an object that was read as of ``serial``."""
        self._add(["delete", oid, serial], 0)
        self._gone(oid)

    def store_blob(
        self, oid: bytes, serial: bytes, data: bytes, name: int | str
    ) -> None:
        """Add a blob: its record, and the number that its upload has, or its file."""
        shared = isinstance(name, str)
        operation = "store_shared_blob" if shared else "store_blob"
        self.store(oid, serial, data, operation, (name,))

    def restore_blob(
        self, oid: bytes, tid: bytes, data: bytes, previous: bytes | None, number: int
    ) -> None:
        """Add a blob of a transaction that is copied."""
        self.store(oid, tid, data, "restore_blob", (previous, number))

    def _gone(self, oid: bytes) -> None:
        """What the server will have of ``oid`` is not what was stored before."""
        self.oids.add(oid)
        self.kept.pop(oid, None)

    def _measured(self, data: bytes) -> bytes:
        """``data`` as bytes, counted; raises StorageError if it is too much."""
        if type(data) is not bytes:
            # A buffer may change before it is sent, or while it is in the cache.
            data = bytes(memoryview(data))
        if len(data) > self._record_bytes_max:
            raise StorageError(
                f"a record of {len(data)} bytes is too large to be sent"
                f" (record_bytes_max is {self._record_bytes_max});"
                " keep large data in a blob"
            )
        self._data_bytes += len(data)
        if self._data_bytes > self._data_bytes_max:
            raise StorageError(
                "the transaction has more data than a server takes at once"
                f" (transaction_bytes_max is {self._data_bytes_max});"
                " divide it into several"
            )
        return data

    def check(self, oid: bytes, serial: bytes) -> None:
        """The transaction depends on ``oid`` being as of ``serial``."""
        self._add(["check", oid, serial], 0)

    def undo(self, tid: bytes) -> None:
        """Undo what transaction ``tid`` did."""
        self._add(["undo", tid], 0)

    def spilled(self) -> Iterator[bytes]:
        """The spilled messages, as bytes to be sent in this order."""
        if self._spill is not None:
            self._spill.seek(0)
            while chunk := self._spill.read(_SEND_BYTES):
                yield chunk

    def close(self) -> None:
        """Let go of the spill."""
        if self._spill is not None:
            self._spill.close()

    def _add(self, operation: list[Any], data_bytes: int) -> None:
        if (
            self._gathered_bytes + data_bytes > self._batch_bytes_max
            and self.operations
        ):
            self._spill_gathered()
        self.operations.append(operation)
        self._gathered_bytes += data_bytes + _OPERATION_BYTES

    def _spill_gathered(self) -> None:
        if self._spill is None:
            self._spill = tempfile.SpooledTemporaryFile(  # noqa: SIM115 - see close
                SPILL_MEMORY_BYTES, prefix="zeolith-"
            )
        self._spill.write(encode(Notice("stage", [self.id, self.operations])))
        self.operations = []
        self._gathered_bytes = 0
