"""The little arithmetic with tids that a client needs. Pure functions.

A tid is 8 bytes, big-endian; greater means later.
"""

from bisect import bisect_left

Z64 = b"\0" * 8
MAX_TID = b"\x7f" + b"\xff" * 7


def following(tid: bytes) -> bytes:
    """The smallest tid greater than ``tid``."""
    return (int.from_bytes(tid, "big") + 1).to_bytes(8, "big")


def preceding(tid: bytes) -> bytes:
    """The greatest tid smaller than ``tid``, which is not the first one."""
    return (int.from_bytes(tid, "big") - 1).to_bytes(8, "big")


# Of the tids that were applied, the last ones are all remembered, those before them
# the more sparsely the longer ago they are.
_LAST = 20
SPARSE_MAX = 100


def sparse(tids: list[bytes]) -> list[bytes]:
    """Some of ``tids``, newest first: the last ones, and fewer of long ago.

    ``tids`` are in order, the oldest first. Enough to find one that a database has in
    common which was restored from a copy: if that is an hour old, the one found is not
    much older than an hour and a half.
    """
    kept = tids[: -_LAST - 1 : -1]
    older = [int.from_bytes(tid, "big") for tid in tids[:-_LAST]]
    if older:
        newest, last = (int.from_bytes(tid, "big") for tid in (kept[0], kept[-1]))
        while older:
            # The oldest one that is not much older, or the next one.
            oldest = last - (newest - last) // 2
            place = min(bisect_left(older, oldest), len(older) - 1)
            last = older[place]
            kept.append(last.to_bytes(8, "big"))
            del older[place:]
    return kept[:SPARSE_MAX]
