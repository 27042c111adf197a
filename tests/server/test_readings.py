"""Reader threads and whose turn it is there, with threads that work when told."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from zeolith.server.readings import SESSION_READERS, Readings
from zeolith.server.turns import Account, Rest, clock
from zeolith.server.workers import READERS

from ..support.model import HandWorkers


class Session:
    """Nothing is known of it but which one it is."""


class Peer:
    """Of a peer, what matters here."""

    def __init__(self, session: Session, account: Account | None = None):
        self.session = session
        self.account = account


class Library:
    """Readings of a test, and in which order they ended."""

    def __init__(self) -> None:
        self.workers = HandWorkers()
        self.readings = Readings(self.workers, Rest(lambda: 0))
        self.read: list[str] = []

    def ask(self, peer: Peer, *names: str, step: Callable[[], Any] = int) -> None:
        for name in names:
            answer = partial(self._answer, name)
            self.readings.read(peer, answer, step)  # type: ignore[arg-type]

    def _answer(self, name: str, reading: "asyncio.Future[Any]") -> None:
        if not reading.exception():
            reading.result()
        self.read.append(name)

    @property
    def at_work(self) -> int:
        """How many steps threads have been given."""
        return len(self.workers._reads)


@pytest.fixture
async def library() -> Library:
    return Library()


async def test_one_session_has_not_all_threads(library):
    library.ask(Peer(Session()), *"abcdefgh")
    assert library.at_work == SESSION_READERS < READERS
    library.ask(Peer(Session()), "x")
    assert library.at_work == READERS
    await library.workers.work()
    assert sorted(library.read) == list("abcdefghx")
    assert library.readings.waiting == 0


async def test_nobody_waits_behind_a_thousand_of_somebody_else(library):
    """Also if these are of many sockets, or all threads are taken."""
    greedy, another = Session(), Session()
    for n in range(1000):
        library.ask(Peer(greedy), f"greedy {n}")
        library.ask(Peer(another), f"another {n}")
    assert library.at_work == READERS
    library.ask(Peer(Session()), "late")
    await library.workers.work()
    assert library.read.index("late") <= READERS + 2
    assert len(library.read) == 2001


async def test_what_a_session_asks_for_is_read_in_its_order(library):
    library.ask(Peer(Session()), *"abcdefgh")
    await library.workers.work()
    assert library.read == list("abcdefgh")


async def test_what_a_socket_has_asked_for_is_not_read_when_it_is_gone(library):
    session = Session()
    gone, other = Peer(session), Peer(session)
    library.ask(gone, *"abcdef")
    library.ask(other, "x")
    library.readings.forget(gone)
    library.readings.forget(gone)
    assert library.readings.waiting == 1
    await library.workers.work()
    assert library.read == [*"abcdef"[:SESSION_READERS], "x"]


async def test_a_step_that_fails_gives_its_place_to_the_next(library):
    library.ask(Peer(Session()), *"abcdefgh", step=lambda: int("none"))
    await library.workers.work()
    assert library.read == list("abcdefgh")


async def test_a_guest_who_has_taken_much_has_one_thread(library):
    account = Account(1.0)
    guest = Peer(Session(), account)
    library.ask(guest, "a", "b")
    assert library.at_work == 2
    account.charge(1000.0, clock())
    library.ask(guest, "c")
    assert library.at_work == 2
    library.ask(Peer(Session()), "x")
    assert library.at_work == 3
    await library.workers.work()
    assert sorted(library.read) == ["a", "b", "c", "x"]


async def test_what_a_thread_computes_for_a_guest_is_charged_to_him(library):
    account = Account(0.0)
    library.ask(Peer(Session(), account), "a", step=lambda: sum(range(10_000)))
    await library.workers.work()
    assert account.is_over(clock())


async def test_nothing_is_read_any_more_when_the_server_has_stopped(library):
    library.ask(Peer(Session()), *"abcdefgh")
    for _step, future in library.workers._reads:
        future.cancel()
    library.workers._reads.clear()
    await asyncio.sleep(0)
    assert library.at_work == 0
    assert library.readings.waiting == 0
    assert library.read == []
