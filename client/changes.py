"""What a client hears of: which objects a transaction has changed."""

from typing import NamedTuple


class Change(NamedTuple):
    """One committed transaction: its predecessor, its tid, what it changed."""

    since: bytes
    tid: bytes
    oids: list[bytes]
    # The id its client chose; None where the server does not know it any more.
    transaction: bytes | None
