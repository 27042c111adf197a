"""Who the peers are: a session is one stream of changes and some channels.

Belongs to the loop. A session begins with the hello of its stream and ends with it;
channels join by the token that the stream's welcome gave. There is one way out,
``Session.end``, for every reason: it aborts, unfollows and hangs up, and may be called
again without harm.
"""

import secrets
from typing import TYPE_CHECKING, Any

from ZODB.POSException import StorageTransactionError

from zeolith.server.committer import Commit
from zeolith.server.served import Served
from zeolith.storage.database import Transaction

if TYPE_CHECKING:
    from zeolith.server.peer import Peer

TOKEN_BYTES = 16
# What an operation takes beside its data, about.
OPERATION_BYTES = 200


class Session:
    """A client's presence: its stream, its channels, its rights."""

    def __init__(
        self, served: Served, stream: "Peer", *, is_read_only: bool, label: str | None
    ):
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self.served = served
        self.stream = stream
        self.channels: set[Peer] = set()
        self.is_read_only = is_read_only
        self.label = label

    @property
    def name(self) -> str:
        """How people recognise the client: its real address and its own label."""
        address = self.stream.address
        return f"{address} ({self.label})" if self.label else address

    def end(self, reason: str) -> None:
        """Unfollow, abort and hang up."""
        self.served.unfollow(self.stream)
        for channel in tuple(self.channels):
            channel.hang_up(reason)
        self.stream.hang_up(reason)


class ChannelTransactions:
    """The transaction of one channel: what was staged for it, and its commit.

    A channel carries one transaction at a time, and a transaction never leaves its
    channel: another one cannot vote, finish or abort it.
    """

    def __init__(self, bytes_max: int):
        self._bytes_max = bytes_max
        self._staged: Transaction | None = None
        self._staged_bytes = 0
        self.commit: Commit | None = None

    def stage(self, transaction_id: bytes, operations: list[list[Any]]) -> None:
        """Keep operations for a vote to come; raises StorageTransactionError."""
        staged = self._staged
        if staged is None or staged.id != transaction_id:
            # A transaction that was given up before its vote leaves its stores.
            staged = self._staged = Transaction(transaction_id)
            self._staged_bytes = 0
        self._staged_bytes += OPERATION_BYTES * len(operations) + sum(
            # Where an operation has data, it is the fourth element.
            len(data)
            for operation in operations
            for data in operation[3:4]
            if data is not None
        )
        if self._staged_bytes > self._bytes_max:
            self._staged = None
            raise StorageTransactionError(
                f"the transaction has more than {self._bytes_max} bytes"
                " (transaction_bytes_max)"
            )
        staged.operations.extend(operations)

    def take(self, transaction_id: bytes) -> Transaction:
        """What was staged for ``transaction_id``, for its vote."""
        staged, self._staged = self._staged, None
        if staged is None or staged.id != transaction_id:
            return Transaction(transaction_id)
        return staged

    def commit_of(self, transaction_id: bytes) -> Commit:
        """The commit of ``transaction_id``; raises StorageTransactionError."""
        commit = self.commit
        if commit is None or commit.transaction.id != transaction_id:
            raise StorageTransactionError("no such transaction on this channel")
        return commit
