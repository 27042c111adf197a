"""What an application may have to catch when it uses a ClientStorage.

::

    ZODB.POSException.StorageError
      ClientDisconnected     no server; also a TransientError, so it may be tried again
      CommitOutcomeUnknown   nobody can say whether the transaction was committed

Everything else is ZODB's own: POSKeyError, ConflictError, ReadOnlyError and so on.
"""

from transaction.interfaces import TransientError
from ZODB.POSException import StorageError


class ClientDisconnected(StorageError, TransientError):
    """There is no server to ask; the text says what happened last.

    A transaction that ends with it was not committed.
    """


class CommitOutcomeUnknown(StorageError):
    """The server was lost while it was finishing the transaction.

    It is not transient: trying again might commit the same thing twice. The text says
    under which transaction id to look for it.
    """


class ChannelLost(Exception):
    """Internal: a socket broke in the middle of a call; what to do depends on it."""


class ChannelRefused(ChannelLost):
    """Internal: the session cannot have one more socket for now; it goes on."""
