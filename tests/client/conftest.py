"""What tests of clients with sockets and threads have in common."""

import gc
import threading
from collections.abc import Iterator

import pytest

from ..support.script import ScriptedServer, scripted
from ..support.waiting import wait_until


def client_threads() -> set[threading.Thread]:
    return {each for each in threading.enumerate() if each.name.startswith("zeolith-")}


@pytest.fixture
def nothing_left_behind() -> Iterator[None]:
    """The threads of a client end with it, and no socket of it waits to be closed.

    An unclosed socket is a ResourceWarning when it is collected, and a warning is an
    error.
    """
    before = client_threads()
    yield
    wait_until(lambda: client_threads() <= before, "the end of the client's threads")
    gc.collect()


@pytest.fixture
def server(nothing_left_behind: None) -> Iterator[ScriptedServer]:
    """A scripted server."""
    with scripted() as server:
        yield server
