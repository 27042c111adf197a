"""What can be done to a process from outside; only Linux can do all of it."""

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def few_descriptors(pid: int, left: int) -> Iterator[int]:
    """A process that can open hardly anything more; how much it can have."""
    most = len(os.listdir(f"/proc/{pid}/fd")) + left
    with _limited(pid, resource.RLIMIT_NOFILE, most):
        yield most


@contextmanager
def little_memory(pid: int, left_bytes: int) -> Iterator[None]:
    """A process that gets hardly any more memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + left_bytes
    with _limited(pid, resource.RLIMIT_AS, most):
        yield


@contextmanager
def _limited(pid: int, which: int, most: int) -> Iterator[None]:
    before = resource.prlimit(pid, which)
    resource.prlimit(pid, which, (most, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, which, before)


@contextmanager
def standing_still(pid: int) -> Iterator[None]:
    """A process that is stopped meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
