"""The system calls that bring transactions to a disk; tests put another in its place.

Positions and sizes in bytes, descriptors as the kernel's numbers. Everything waits for
the disk, raises OSError, and may be called by any thread.
"""

import ctypes
import errno
import os
from collections.abc import Sequence

# Linux: take blocks beyond the end of a file, and leave its size as it is.
_KEEP_SIZE = 1
# What a kernel or a file system says that cannot do it.
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Disk:
    """What is done to a Data.fs."""

    def __init__(self) -> None:
        self._fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)

    def write(
        self, fd: int, buffers: Sequence[bytes | memoryview], position: int
    ) -> int:
        """Write at ``position``; how many bytes were taken, which may be fewer."""
        return os.pwritev(fd, buffers, position)

    def sync(self, fd: int) -> None:
        """Have all that was written, and the size of the file, on the disk."""
        os.fdatasync(fd)

    def truncate(self, fd: int, size: int) -> None:
        """Cut the file, and give back what was reserved behind its end."""
        os.ftruncate(fd, size)

    def reserve(self, fd: int, position: int, size: int) -> bool:
        """Have room for ``size`` bytes from ``position`` on, beyond the file's end.

        False where the file system cannot promise that.
        """
        if self._fallocate is None:
            return False
        called = self._fallocate(
            fd, _KEEP_SIZE, ctypes.c_int64(position), ctypes.c_int64(size)
        )
        if called == 0:
            return True
        number = ctypes.get_errno()
        if number in _UNSUPPORTED:
            return False
        raise OSError(number, os.strerror(number))
