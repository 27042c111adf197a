"""What is evicted from a cache file: first in, first out, with a second chance.

Whoever reads a revision marks its object in a small map of bytes that all processes
share (``UsedMarks``), which costs a store to memory: nothing is written to the cache
for a hit. Who makes room goes through the revisions in the order in which they came; an
open one whose mark is set loses the mark and goes to the end of the line. Two objects
may share a mark: then one of them stays a round longer than it deserves.
"""

import mmap
import os
from contextlib import suppress
from pathlib import Path

from ZODB.utils import u64

from zeolith.client.cache_place import FILE_MODE

# One for each of so many objects that lie side by side.
MARKS = 2**18
MASK = MARKS - 1


class UsedMarks:
    """Which objects were used lately, by any process; any thread.

    Whoever uses one sets the byte of ``marks`` at its number & MASK.
    """

    def __init__(self, path: Path):
        """Raises OSError."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        try:
            # Or to mark would be a signal that ends the process, on a full disk.
            _allocate(fd)
            self.marks = mmap.mmap(fd, MARKS)
        finally:
            os.close(fd)

    def take(self, oid: bytes) -> bool:
        """Whether ``oid`` was used since this was asked last."""
        place = u64(oid) & MASK
        was_used = bool(self.marks[place])
        self.marks[place] = 0
        return was_used


def _allocate(fd: int) -> None:
    with suppress(AttributeError):
        # Not everywhere is it there; where it is, it writes no zero over a mark.
        os.posix_fallocate(fd, 0, MARKS)
        return
    if os.fstat(fd).st_size < MARKS:
        os.pwrite(fd, bytes(MARKS), 0)
