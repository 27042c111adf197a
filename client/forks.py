"""Storages and ``fork``: a child must not use what its parent goes on using.

A fork waits until no change is being told anywhere, for the child would inherit locks
that a thread holds which it has not got. Then the child lets go of its parent's sockets
and connects anew when it is asked for something. For pre-forking servers; called by
whoever makes, closes or forks.
"""

import os
import threading
import weakref
from typing import TYPE_CHECKING

# Imported first for its own hooks: a child must be able to open files when it comes to
# what is below.
from zeolith.client import cache_files as cache_files

if TYPE_CHECKING:
    from zeolith.client.position import Position
    from zeolith.client.storage import ClientStorage

_storages: "weakref.WeakSet[ClientStorage]" = weakref.WeakSet()


class _Fork(threading.local):
    """A fork of this thread's; another thread may be in the middle of another one."""

    def __init__(self) -> None:
        # Who was held, to be let go whatever has become of the storages meanwhile.
        self.held: list[Position] = []


_fork = _Fork()


def watch(storage: "ClientStorage") -> None:
    """From now on, and as long as somebody has it."""
    _storages.add(storage)


def forget(storage: "ClientStorage") -> None:
    """It is closed."""
    _storages.discard(storage)


def _before_fork() -> None:
    # Two threads that fork at once must not hold what the other one waits for.
    positions = sorted((storage.position for storage in _storages.copy()), key=id)
    _fork.held = [position for position in positions if position.hold()]


def _after_fork_in_parent() -> None:
    held, _fork.held = _fork.held, []
    for position in held:
        position.let_go()


def _after_fork() -> None:
    _fork.held = []
    for storage in tuple(_storages):
        storage.forget_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork,
    )
