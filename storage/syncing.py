"""Bringing to the disk what was written, and the names it has. Waits for the disk."""

import os


def sync_path(path: str | os.PathLike[str]) -> None:
    """Have a file, or the names in a directory, on the disk; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
