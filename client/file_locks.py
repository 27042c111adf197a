"""Locks between the processes of a host, on files, that end with their process.

A lock belongs to a file that somebody opened, so two threads of one process that open
the same path exclude each other like two processes do. It is free again when its holder
lets go or dies, however it dies.

After ``fork`` the child has copies of its parent's open files, and a copy would keep a
lock of a parent that is dead. So every file that is opened here is known, and the child
closes its copies. Whoever lets go unlocks first: copies do not matter then.

All functions may be called by any thread.
"""

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator

PRIVATE = 0o600

_lock = threading.Lock()
_open_fds: set[int] = set()


def open_lockable(path: str, flags: int) -> int:
    """The descriptor of ``path``, for ``release``. Raises what os.open raises."""
    # A descriptor that exists and is not known yet must not meet a fork.
    with _lock:
        fd = os.open(path, flags | os.O_CLOEXEC, PRIVATE)
        _open_fds.add(fd)
    return fd


def release(fd: int) -> None:
    """Unlock and close what ``open_lockable`` gave."""
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
    with _lock:
        _open_fds.discard(fd)
        os.close(fd)


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Lock ``fd`` if nobody else has locked it; returns whether it is locked now."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_still_at(path: str, fd: int) -> bool:
    """Whether ``path`` is the file that was opened as ``fd``, and no other one.

    A lock on a file that was removed or renamed in the meantime excludes nobody.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(fd))


@contextlib.contextmanager
def locked(path: str) -> Iterator[int]:
    """Hold the lock on ``path``, which is made if need be; waits for its holder.

    For what takes a moment. Raises what os.open raises.
    """
    fd = open_lockable(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        release(fd)


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()
    for fd in _open_fds:
        os.close(fd)
    _open_fds.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _lock.acquire(),
        after_in_parent=lambda: _lock.release(),
        after_in_child=_after_fork_in_child,
    )
