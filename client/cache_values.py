"""How a revision is stored in a cache file: its tid, its data, and a checksum.

The checksum is a CRC-32 of the oid and of both, at the end and least byte first, so
that a reader checks all of it with one call. Pure.
"""

from zlib import crc32

TID, DATA = slice(0, 8), slice(8, -4)
# What the CRC-32 of anything and its own CRC-32, least byte first, comes to.
RESIDUE = 0x2144DF1C


def encode(oid: bytes, tid: bytes, data: bytes) -> bytes:
    """The stored value of a revision."""
    value = tid + data
    return value + crc32(value, crc32(oid)).to_bytes(4, "little")


def is_whole(oid: bytes, value: bytes) -> bool:
    """Whether ``value`` is what ``encode`` has made for ``oid``."""
    return crc32(value, crc32(oid)) == RESIDUE
