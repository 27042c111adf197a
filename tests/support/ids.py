"""Short spellings for oids, tids and transaction ids."""


def number(value: int) -> bytes:
    """An oid or a tid."""
    return value.to_bytes(8, "big")


def transaction_id(value: int) -> bytes:
    """An id as a client chooses it for a transaction."""
    return value.to_bytes(16, "big")
