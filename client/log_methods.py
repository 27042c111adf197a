"""The methods of a ClientStorage that read and rewind the whole log.

ZODB's spelling only; what they do is in ``log``, ``iteration`` and ``copying``. Any
thread may call them.
"""

from abc import ABC, abstractmethod
from base64 import decodebytes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ZODB.POSException import ReadOnlyError, Unsupported

from zeolith.client import copying, iteration, log

if TYPE_CHECKING:
    from zeolith.client.commit import Commit


class LogMethods(ABC):
    """Undo, histories, iteration."""

    # A ClientStorage's own.
    _current_records: iteration.CurrentRecords

    @abstractmethod
    def call(self, method: str, *args: Any) -> Any:
        """A call that may be repeated."""

    @abstractmethod
    def isReadOnly(self) -> bool:
        """Whether writes are refused now."""

    @abstractmethod
    def supportsUndo(self) -> bool:
        """Whether the server's storage can undo."""

    @abstractmethod
    def _begun(self, transaction: Any) -> "Commit":
        """A transaction that has not voted."""

    def history(self, oid: bytes, size: int = 1) -> list[dict[str, Any]]:
        """The last ``size`` revisions, newest first."""
        return [
            {**log.describe(entry), "tid": entry[0]}
            for entry in self.call("history", oid, size)
        ]

    def iterator(
        self, start: bytes | None = None, stop: bytes | None = None
    ) -> iteration.Transactions:
        """The transactions from ``start`` to ``stop`` (tids, inclusive), oldest first.

        Those that are committed meanwhile may be among them, if ``stop`` does not
        exclude them.
        """
        return iteration.Transactions(self.call, start, stop)

    def record_iternext(
        self, next: bytes | None = None
    ) -> tuple[bytes, bytes, bytes, bytes | None]:
        """``(oid, tid, data, next)``, object after object; begin with None."""
        return self._current_records.next(next)

    def copyTransactionsFrom(self, other: Any, verbose: int = 0) -> None:
        """Commit the transactions of ``other`` here, with their ids and metadata."""
        with copying.transactions_of(other) as transactions:
            copying.copy_transactions(transactions, other, self)

    def undo(self, transaction_id: bytes, transaction: Any) -> None:
        """Undo a transaction, by its id in undoLog; the vote says what it touched."""
        if self.isReadOnly():
            raise ReadOnlyError("the storage is read-only")
        if not self.supportsUndo():
            raise Unsupported("the server's storage cannot undo")
        self._begun(transaction).stores.undo(decodebytes(transaction_id + b"\n"))

    def undoLog(
        self,
        first: int = 0,
        last: int = -20,
        filter: Callable[[dict[str, Any]], bool] | None = None,
    ) -> list[dict[str, Any]]:
        """Undoable transactions from ``first`` to ``last``, newest first.

        A negative ``last`` is a number of transactions. The filter runs here, so it
        may be anything.
        """
        return log.between(log.undoable(self.call), first, last, filter)

    def undoInfo(
        self,
        first: int = 0,
        last: int = -20,
        specification: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """undoLog of the transactions that have all of ``specification``."""
        wanted = log.having(specification) if specification else None
        return self.undoLog(first, last, wanted)
