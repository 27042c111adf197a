"""The cache files that this process has open: each once, whoever uses it.

LMDB's locks belong to a process and a file, so a process must not open a file twice;
and what a parent has open a forked child must not have, so files are closed for the
moment of a fork, and the child opens them anew. Called by any thread, with the lock of
the place held for ``acquire``.
"""

import logging
import os
import threading
from pathlib import Path

import lmdb

from zeolith.client.cache_file import CacheFile

logger = logging.getLogger(__name__)


class _Open:
    """Of one process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        # File and the number of those who use it.
        self.files: dict[Path, tuple[CacheFile, int]] = {}


_open = _Open()


def acquire(path: Path, cache_bytes: int) -> CacheFile:
    """The file ``path``, for ``release``; raises OSError and lmdb.Error."""
    path = path.resolve()
    ours = _open
    with ours.lock:
        file, users = ours.files.get(path, (None, 0))
        if file is None:
            file = CacheFile(path, cache_bytes)
        elif file.cache_bytes < cache_bytes:
            file.cache_bytes = cache_bytes
        ours.files[path] = file, users + 1
        return file


def release(file: CacheFile) -> None:
    """One who acquired ``file`` needs it no more."""
    ours = _open
    with ours.lock:
        found, users = ours.files.get(file.path, (None, 0))
        if found is not file:
            # It was the parent's.
            return
        if users > 1:
            ours.files[file.path] = file, users - 1
        else:
            del ours.files[file.path]
            file.close()


def _before_fork() -> None:
    _open.lock.acquire()
    for file, _users in _open.files.values():
        file.pause()


def _after_fork_in_parent() -> None:
    for file, _users in _open.files.values():
        try:
            file.resume()
        except (lmdb.Error, OSError) as error:
            logger.warning("%s is not used any more: %s", file.path, error)
    _open.lock.release()


def _after_fork_in_child() -> None:
    global _open
    _open = _Open()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
