"""How the C library keeps memory that the process has freed.

Called once, by the daemon at its start. Blobs and large batches pass through the server
in buffers of some hundred KB that live for a moment. With its defaults glibc gives such
memory back to the kernel as soon as it is free, and the next buffer is made of pages
that the kernel has to find and to clear: with that an upload takes half as much again
of the processor.
"""

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
# Free memory at the end of the heap that is kept: more than a peer's backlog takes.
KEPT_BYTES = 16 * 1024 * 1024
# What is larger is mapped for itself, and given back when it is freed.
MAPPED_BYTES = 1024 * 1024


def keep_freed_memory() -> bool:
    """Tell malloc to keep some; false where there is no such malloc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    told = (
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES),
        mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES),
    )
    return all(told)
