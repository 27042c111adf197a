"""Transaction ids that only grow, whatever the clock does.

A tid is 8 bytes, big-endian: minutes since 1900 in the first four, the fraction of a
minute in the last four (persistent.TimeStamp). Pure functions.
"""

import time

from persistent.TimeStamp import TimeStamp

Z64 = b"\0" * 8
MAX_TID = b"\x7f" + b"\xff" * 7


def tid_at(now_s: float) -> bytes:
    """The tid of the moment ``now_s`` (seconds since the epoch)."""
    return TimeStamp(*time.gmtime(now_s)[:5], now_s % 60).raw()


def next_tid(now_s: float, after: bytes) -> bytes:
    """The tid of ``now_s``, or the first one after ``after`` if that is later."""
    tid = tid_at(now_s)
    return tid if tid > after else following(after)


def following(tid: bytes) -> bytes:
    """The smallest tid greater than ``tid``."""
    return advanced(tid, 1)


def advanced(tid: bytes, count: int) -> bytes:
    """The ``count``-th tid after ``tid``."""
    return (int.from_bytes(tid, "big") + count).to_bytes(8, "big")
