"""The file ``Data.fs.recent``: which tid the transactions of clients have become.

A client whose connection breaks while it commits asks what became of the transaction,
perhaps a server that was started since. The Data.fs does not know what clients call
their transactions, and its format has no place for that. So the last SLOTS of them are
in a ring beside it, each written before its transaction is::

    tid 8 | id 16      at 24 * slot; zeros where nothing was written yet

The file is not synced: it outlives the process, and after a power failure what is
missing in it is not known. An entry counts only together with the transaction in the
log, so whatever else is in the file does no harm. Called by the thread that opens, then
by the writer thread only.
"""

import logging
import os
from collections.abc import Sequence
from struct import Struct

logger = logging.getLogger(__name__)

# More than are read from the log at a start.
SLOTS = 4096
_ENTRY = Struct(">8s16s")


class RecentIds:
    """The ring of one Data.fs."""

    def __init__(self, data_path: str, *, is_read_only: bool = False):
        """Open or make the file beside ``data_path``; raises OSError."""
        self._path = f"{data_path}.recent"
        self._fd = -1
        self._slot = 0
        self._has_failed = False
        self._ids: dict[bytes, bytes] = {}
        if is_read_only and not os.path.exists(self._path):
            return
        flags = os.O_RDONLY if is_read_only else os.O_RDWR | os.O_CREAT
        self._fd = os.open(self._path, flags, 0o666)
        self._read()
        if is_read_only:
            self.close()

    def id_of(self, tid: bytes) -> bytes | None:
        """What its client called the transaction ``tid``, as of opening."""
        return self._ids.get(tid)

    def note(self, transactions: Sequence[tuple[bytes, bytes]]) -> None:
        """These (tid, id) are about to be committed, in this order.

        A disk that does not take them is no reason to refuse the transactions.
        """
        if self._fd < 0:
            return
        entries = b"".join(tid + id_ for tid, id_ in transactions[-SLOTS:])
        until_end = (SLOTS - self._slot) * _ENTRY.size
        try:
            os.pwrite(self._fd, entries[:until_end], self._slot * _ENTRY.size)
            if len(entries) > until_end:
                os.pwrite(self._fd, entries[until_end:], 0)
        except OSError as error:
            if not self._has_failed:
                logger.warning(
                    "%s: %s; who loses its connection while it commits may not be told"
                    " whether it did",
                    self._path,
                    error,
                )
            self._has_failed = True
        self._slot = (self._slot + len(entries) // _ENTRY.size) % SLOTS

    def close(self) -> None:
        """Close the file; may be called again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _read(self) -> None:
        data = os.pread(self._fd, SLOTS * _ENTRY.size, 0)
        whole = len(data) // _ENTRY.size * _ENTRY.size
        entries = list(_ENTRY.iter_unpack(data[:whole]))
        self._ids = dict(entries)
        if entries:
            tids = [tid for tid, _id in entries]
            self._slot = (tids.index(max(tids)) + 1) % SLOTS
