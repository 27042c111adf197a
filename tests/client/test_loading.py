"""Many objects are loaded by requests that do not wait for each other."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ZODB.POSException import StorageError

from zeolith.client.cache import MemoryCache
from zeolith.client.errors import ChannelLost, ClientDisconnected
from zeolith.client.loading import REQUEST_OIDS, REQUESTS_AHEAD, load_many
from zeolith.protocol.limits import DEFAULT, Limits

from ..support.ids import number

T1, T2 = number(1000), number(1001)


def found(oid: bytes) -> tuple[bytes, bytes, None]:
    return b"of " + oid, T1, None


class Server:
    """Answers for some objects at a time, and loses connections before answers."""

    def __init__(self, at_a_time: int = 10**6, breaks: Iterable[bool] = ()):
        self.at_a_time = at_a_time
        self.breaks = iter(breaks)
        # What is not there.
        self.missing: set[bytes] = set()
        self.asked: list[list[bytes]] = []
        self.conversations = 0
        self.open = 0
        # Called when a question is answered.
        self.meanwhile: Callable[[], object] = lambda: None

    def converse(self, step: Callable[[Any], None]) -> None:
        """As ClientStorage does it, which tries again as long as it may."""
        for _attempt in range(10):
            self.conversations += 1
            try:
                return step(self)
            except ChannelLost as error:
                lost = error
        raise ClientDisconnected("too often") from lost

    def call(self, method: str, *args: Any) -> Any:
        assert method == "load_many"
        oids, before = args
        assert before == T2
        self.asked.append(oids)
        if next(self.breaks, False):
            raise ChannelLost("cut")
        self.meanwhile()
        revisions = [None if oid in self.missing else list(found(oid)) for oid in oids]
        return T1, revisions[: self.at_a_time]

    def answers(
        self, method: str, calls: Iterable[Sequence[Any]], ahead: int
    ) -> Iterator[Any]:
        assert ahead == REQUESTS_AHEAD
        self.open += 1
        try:
            for args in calls:
                yield self.call(method, *args)
        finally:
            self.open -= 1


def cache() -> MemoryCache:
    cache = MemoryCache()
    cache.forget_all(T1)
    return cache


def loaded(
    server: Server,
    oids: Iterable[bytes],
    kept: MemoryCache | None = None,
    limits: Limits = DEFAULT,
) -> dict[bytes, Any]:
    came: dict[bytes, Any] = {}

    def take(oid: bytes, revision: Any) -> None:
        assert oid not in came, "it came twice"
        came[oid] = revision

    used = cache() if kept is None else kept
    load_many(server.converse, used, oids, T2, limits, take)
    assert server.open == 0
    return came


def test_few_objects_are_one_call():
    server = Server()
    oids = [number(n) for n in range(REQUEST_OIDS)]
    assert loaded(server, oids) == {oid: found(oid) for oid in oids}
    assert server.asked == [oids]


def test_nothing_asks_nobody():
    server = Server()
    assert loaded(server, []) == {}
    assert server.conversations == 0


def test_many_objects_are_asked_for_in_one_conversation():
    """And no request holds up the server for long."""
    server = Server()
    oids = [number(n) for n in range(10 * REQUEST_OIDS + 1)]
    assert loaded(server, [*oids, *oids]) == {oid: found(oid) for oid in oids}
    assert [len(asked) for asked in server.asked] == [*[REQUEST_OIDS] * 10, 1]
    assert server.conversations == 1


def test_a_limit_below_the_usual_size_is_kept():
    server = Server()
    loaded(server, map(number, range(10)), limits=Limits(load_many_max=4))
    assert [len(asked) for asked in server.asked] == [4, 4, 2]


def test_what_is_in_the_cache_is_not_asked_for():
    server, kept = Server(), cache()
    loaded(server, [number(1)], kept)
    assert list(loaded(server, [number(2), number(1)], kept)) == [number(1), number(2)]
    assert server.asked == [[number(1)], [number(2)]]


def test_what_is_not_there_is_left_out_and_not_asked_for_again():
    server = Server(at_a_time=2)
    server.missing = {number(1), number(3)}
    assert set(loaded(server, map(number, range(5)))) == {
        number(0),
        number(2),
        number(4),
    }
    assert [len(asked) for asked in server.asked] == [5, 3, 1]


@given(
    st.integers(0, 40),
    st.integers(1, 12),
    st.integers(1, 12),
    st.lists(st.booleans(), max_size=9),
)
def test_everything_comes_once_however_it_is_cut(count, size, at_a_time, breaks):
    server = Server(at_a_time, breaks)
    oids = [number(n) for n in range(count)]
    limits = Limits(load_many_max=size)
    assert loaded(server, oids, limits=limits) == {oid: found(oid) for oid in oids}


def test_every_answer_begins_the_waiting_anew():
    breaks = [False, *([True] * 9 + [False]) * 9]
    server = Server(at_a_time=1, breaks=breaks)
    assert len(loaded(server, map(number, range(10)))) == 10


def test_a_connection_that_is_lost_too_often_is_given_up():
    server = Server(breaks=[True] * 100)
    with pytest.raises(ClientDisconnected):
        loaded(server, [number(1)])


@pytest.mark.parametrize("count", [1, 2 * REQUEST_OIDS])
def test_a_server_that_answers_for_nothing_is_not_asked_for_ever(count):
    server = Server(at_a_time=0)
    with pytest.raises(StorageError, match="answers for none"):
        loaded(server, map(number, range(count)))
    assert server.open == 0


def test_what_was_asked_before_everything_was_forgotten_is_not_kept():
    """The answer may be of a history that was given up."""
    server, kept = Server(), cache()
    server.meanwhile = lambda: kept.forget_all(T1)
    assert len(loaded(server, [number(1)], kept)) == 1
    assert len(kept) == 0
    server.meanwhile = lambda: None
    loaded(server, [number(1)], kept)
    assert len(kept) == 1


def test_the_history_is_that_from_before_a_session_was_chosen():
    server, kept = Server(), cache()
    converse = server.converse

    def chosen_and_late(step: Callable[[Any], None]) -> None:
        kept.forget_all(T1)
        converse(step)

    server.converse = chosen_and_late  # type: ignore[method-assign]
    loaded(server, [number(1)], kept)
    assert len(kept) == 0
