"""How a revision is stored in a cache file: a checksum, its tid, its data.

The checksum is the XXH3 of both, of 64 bits; the oid is its seed, so that nothing is
taken for what is known of another object. Pure.
"""

from struct import Struct

from xxhash import xxh3_64_digest

CHECKSUM, TID, DATA = slice(0, 8), slice(8, 16), slice(16, None)
CHECKED = slice(8, None)
number_of = Struct(">Q").unpack


def encode(oid: bytes, tid: bytes, data: bytes) -> bytes:
    """The stored value of a revision."""
    checked = tid + data
    return xxh3_64_digest(checked, *number_of(oid)) + checked


def is_whole(oid: bytes, value: bytes) -> bool:
    """Whether ``value`` is what ``encode`` has made for ``oid``."""
    return xxh3_64_digest(value[CHECKED], *number_of(oid)) == value[CHECKSUM]
