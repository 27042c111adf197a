"""Who else takes part in a transaction.

The vote of a transaction's only participant decides about all of it, so nobody has to
be waited for between vote and finish: the one-phase commit of distributed transactions
(X/Open, "The XA Specification", Protocol Optimisations). ``transaction`` does not tell
a participant whether there are others, and ZODB hands a storage no more than the
metadata; but most applications use the transaction of the thread, which can be looked
at. Called by the thread that commits, in its vote.
"""

from typing import Any

import transaction
from ZODB.Connection import Connection


def is_alone(storage: Any, metadata: Any) -> bool:
    """Whether in the transaction of ``metadata`` nobody but ``storage`` takes part.

    ``metadata`` is what a ZODB connection began it with. False if that is not known:
    for transactions of other managers than ``transaction.manager``, and where a wrapper
    of ``storage``, or a class of connections, votes or finishes itself.
    """
    # Not by ``transaction.get()``, which would begin one.
    manager = getattr(transaction.manager, "manager", None)
    current: Any = getattr(manager, "_txn", None)
    participants: list[Any] = getattr(current, "_resources", [])
    if len(participants) != 1:
        return False
    connection = participants[0]
    try:
        is_its_own = current.data(connection) is metadata
    except KeyError:
        # It is not this transaction that is being committed.
        return False
    kind = type(connection)
    if (
        not is_its_own
        or getattr(kind, "tpc_vote", None) is not Connection.tpc_vote
        or getattr(kind, "tpc_finish", None) is not Connection.tpc_finish
    ):
        return False
    outermost = connection.db().storage
    return bool(
        outermost.tpc_vote == storage.tpc_vote
        and outermost.tpc_finish == storage.tpc_finish
    )
