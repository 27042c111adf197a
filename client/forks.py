"""Storages and ``fork``: a child must not use what its parent goes on using.

A fork waits until no change is being told anywhere, for the child would inherit locks
that a thread holds which it has not got. Nor may a thread be in the middle of a TLS
handshake or a login: OpenSSL has locks, too, some of them for the whole process, and a
child that inherits one held waits for ever at its own handshake. Then the child lets go
of its parent's sockets and connects anew when it is asked for something. For
pre-forking servers; called by whoever makes, closes, dials or forks.
"""

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

# Imported first for its own hooks: a child must be able to open files when it comes to
# what is below.
from zeolith.client import cache_files as cache_files

if TYPE_CHECKING:
    from zeolith.client.position import Position
    from zeolith.client.storage import ClientStorage

# A fork waits no longer for handshakes: one may hang at a server that does not answer.
HANDSHAKES_WAIT_S = 2.0

_storages: "weakref.WeakSet[ClientStorage]" = weakref.WeakSet()


class _Fork(threading.local):
    """A fork of this thread's; another thread may be in the middle of another one."""

    def __init__(self) -> None:
        # Who was held, to be let go whatever has become of the storages meanwhile.
        self.held: list[Position] = []


_fork = _Fork()


class _Handshakes:
    """Those under way, in any thread, and the forks for which they make way."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._under_way = self._forks = 0

    def begin(self) -> None:
        """Wait until nobody forks."""
        with self._changed:
            self._changed.wait_for(lambda: not self._forks)
            self._under_way += 1

    def end(self) -> None:
        with self._changed:
            self._under_way -= 1
            self._changed.notify_all()

    def hold(self) -> None:
        """Let none begin, and wait until there is none."""
        with self._changed:
            self._forks += 1
            self._changed.wait_for(lambda: not self._under_way, HANDSHAKES_WAIT_S)

    def let_go(self) -> None:
        with self._changed:
            self._forks -= 1
            self._changed.notify_all()


_handshakes = _Handshakes()


@contextmanager
def shaking_hands() -> Iterator[None]:
    """A handshake or a login is under way: no fork meanwhile."""
    handshakes = _handshakes
    handshakes.begin()
    try:
        yield
    finally:
        handshakes.end()


def watch(storage: "ClientStorage") -> None:
    """From now on, and as long as somebody has it."""
    _storages.add(storage)


def forget(storage: "ClientStorage") -> None:
    """It is closed."""
    _storages.discard(storage)


def _before_fork() -> None:
    # First: nobody is to wait for a position while this waits for a network.
    _handshakes.hold()
    # Two threads that fork at once must not hold what the other one waits for.
    positions = sorted((storage.position for storage in _storages.copy()), key=id)
    _fork.held = [position for position in positions if position.hold()]


def _after_fork_in_parent() -> None:
    held, _fork.held = _fork.held, []
    for position in held:
        position.let_go()
    _handshakes.let_go()


def _after_fork() -> None:
    # Its lock may be held, by a thread of the parent's.
    global _handshakes
    _handshakes = _Handshakes()
    _fork.held = []
    for storage in tuple(_storages):
        storage.forget_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork,
    )
