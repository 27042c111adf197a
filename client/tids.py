"""The little arithmetic with tids that a client needs. Pure functions.

A tid is 8 bytes, big-endian; greater means later.
"""

Z64 = b"\0" * 8
MAX_TID = b"\x7f" + b"\xff" * 7


def following(tid: bytes) -> bytes:
    """The smallest tid greater than ``tid``."""
    return (int.from_bytes(tid, "big") + 1).to_bytes(8, "big")


def preceding(tid: bytes) -> bytes:
    """The greatest tid smaller than ``tid``, which is not the first one."""
    return (int.from_bytes(tid, "big") - 1).to_bytes(8, "big")
