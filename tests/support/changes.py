"""Changes for whoever applies them."""

from zeolith.client.changes import Change
from zeolith.client.tids import Z64


def one_change(tid: bytes, oids: list[bytes]) -> list[Change]:
    """The change ``(tid, oids)``, alone, of somebody else's transaction.

    What came before it is not told: a cache relies on being given what comes next.
    """
    return [Change(Z64, tid, oids, None)]
