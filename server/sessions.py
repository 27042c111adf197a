"""Who the peers are: a session is one stream of changes and some channels.

Belongs to the loop. A session begins with the hello of its stream and ends with it;
channels join by the token that the stream's welcome gave. There is one way out,
``Session.end``, for every reason: it aborts, unfollows and hangs up, and may be called
again without harm.
"""

import secrets
from typing import TYPE_CHECKING, Any

from ZODB.POSException import StorageTransactionError

from zeolith.protocol.limits import Limits
from zeolith.protocol.roles import AccessRole, Roles
from zeolith.server.access import Identity
from zeolith.server.committer import Commit
from zeolith.server.served import Served
from zeolith.server.staging import Reading, Staged, Stock
from zeolith.server.turns import Account
from zeolith.server.workers import Workers

if TYPE_CHECKING:
    from zeolith.server.peer import Peer

TOKEN_BYTES = 16


class Session:
    """A client's presence: its stream, its channels, its rights."""

    def __init__(
        self,
        served: Served,
        stream: "Peer",
        *,
        identity: Identity,
        roles: Roles,
        is_read_only: bool,
        label: str | None,
        limits: Limits,
    ):
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self.served = served
        self.stream = stream
        self.channels: set[Peer] = set()
        self.identity = identity
        # On the storage, whether it is used to write or not.
        self.roles = roles
        self.is_read_only = is_read_only or AccessRole.WRITE not in roles
        self.label = label
        # Of all its sockets.
        self.account = Account(limits.guest_burst_s)

    @property
    def name(self) -> str:
        """How people recognise the client: its real address and its own label."""
        address = self.stream.address
        return f"{address} ({self.label})" if self.label else address

    def end(self, reason: str, text: str = "") -> None:
        """Unfollow, abort and hang up."""
        self.served.unfollow(self.stream)
        for channel in tuple(self.channels):
            channel.hang_up(reason, text)
        self.stream.hang_up(reason, text)


class ChannelTransactions:
    """The transaction of one channel: what was staged for it, and its commit.

    A channel carries one transaction at a time, and a transaction never leaves its
    channel: another one cannot vote, finish or abort it.
    """

    def __init__(self, limits: Limits, stock: Stock):
        self._limits = limits
        self._stock = stock
        self._staged: Staged | None = None
        self.commit: Commit | None = None

    def stage(
        self,
        transaction_id: bytes,
        operations: list[list[Any]],
        reading: Reading,
        workers: Workers,
    ) -> None:
        """Keep operations for a vote to come; raises StorageTransactionError."""
        staged = self._staged
        if staged is None or staged.transaction_id != transaction_id:
            # A transaction that was given up before its vote leaves its stores.
            self.drop()
            staged = Staged(transaction_id, reading, workers, self._limits, self._stock)
            self._staged = staged
        try:
            staged.add(operations)
        except StorageTransactionError:
            self.drop()
            raise

    def take(self, transaction_id: bytes) -> Staged | None:
        """What was staged for ``transaction_id``, for its vote; the caller's now."""
        staged = self._staged
        if staged is None:
            return None
        if staged.transaction_id != transaction_id:
            self.drop()
            return None
        self._staged = None
        return staged

    def drop(self) -> None:
        """Forget what is staged; harmless if nothing is."""
        staged, self._staged = self._staged, None
        if staged is not None:
            staged.discard()

    @property
    def staged(self) -> Staged | None:
        """What is staged for the vote to come."""
        return self._staged

    def commit_of(self, transaction_id: bytes) -> Commit:
        """The commit of ``transaction_id``; raises StorageTransactionError."""
        commit = self.commit
        if commit is None or commit.transaction.id != transaction_id:
            raise StorageTransactionError("no such transaction on this channel")
        return commit
