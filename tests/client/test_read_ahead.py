"""What came ahead of time is used like the answer to a load that took as long."""

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ZODB.POSException import StorageError

from zeolith.client import read_ahead
from zeolith.client.cache import MemoryCache
from zeolith.client.errors import ChannelLost, ClientDisconnected
from zeolith.client.read_ahead import AHEAD_BYTES, ReadAhead
from zeolith.client.tids import MAX_TID, following
from zeolith.client.trails import WINDOW_MIN

from ..support.changes import one_change
from ..support.ids import number
from .test_trails import bucket

T1, T2, T3 = number(10_001), number(10_002), number(10_003)
LIST = number(1)
OIDS = [number(n) for n in range(10, 40)]


class Server:
    """A list of objects whose records were written by T1, and change when told to."""

    def __init__(self) -> None:
        self.last_tid = T1
        self.revisions: dict[bytes, list[tuple[bytes, bytes]]] = {
            oid: [(T1, b"old " + oid)] for oid in OIDS
        }
        self.revisions[LIST] = [(T1, bucket(OIDS))]
        self.asked: list[tuple[str, Any]] = []
        # Called when an answer is made, and has not arrived.
        self.meanwhile: Callable[[], object] = lambda: None
        self.session: Session | None = None

    def call(self, method: str, *args: Any) -> Any:
        self.asked.append((method, args[0]))
        as_of, result = self.last_tid, getattr(self, method)(*args)
        self.meanwhile()
        return (*result, as_of) if method == "load" else (as_of, *result)

    def load(self, oid: bytes, before: bytes) -> Any:
        end = None
        for tid, data in reversed(self.revisions.get(oid, [])):
            if tid < before:
                return data, tid, end
            end = tid
        return None, None, None

    def load_ahead(
        self, oids: list[bytes], before: bytes, links: int, size: int
    ) -> Any:
        assert size == AHEAD_BYTES
        found = [self.load(oid, before) for oid in oids]
        return [each if each[0] is not None else None for each in found], []

    def change(self, oid: bytes, tid: bytes) -> None:
        self.last_tid = tid
        self.revisions[oid].append((tid, tid + b" of " + oid))

    def go_back(self) -> None:
        """It is restored to its beginning."""
        self.last_tid = T1
        for revisions in self.revisions.values():
            del revisions[1:]


class Session:
    """Lends channels, each of which is one question and its answer."""

    def __init__(self, server: Server):
        self.server = server
        self.lent: list[Any] = []
        self.is_lost = False

    def borrow(self) -> Any:
        if self.is_lost:
            raise ChannelLost("cut")
        self.lent.append(_Channel(self))
        return self.lent[-1]

    def give_back(self, channel: Any) -> None:
        self.lent.remove(channel)

    def lost(self, error: ChannelLost) -> ChannelLost:
        return error


class _Channel:
    def __init__(self, session: Session):
        self._session = session

    def ask(self, *call: Any) -> None:
        self._answer = self._session.server.call(*call)

    def answer(self) -> Any:
        if self._session.is_lost:
            raise ChannelLost("cut")
        return self._answer


class Client:
    """What a storage does with its cache and with what it reads ahead."""

    def __init__(self, server: Server):
        self.server = server
        self.cache = MemoryCache()
        self.cache.forget_all(T1)
        self.ahead = ReadAhead(server.call, lambda: server.session, self.cache)

    def load(self, oid: bytes, before: bytes) -> Any:
        found = self.cache.load(oid, before) or self.ahead.load(oid, before)
        if found is not None:
            return found
        history = self.cache.history
        data, tid, end, as_of = self.server.call("load", oid, before)
        if data is None:
            return None
        self.cache.store(oid, tid, end, data, as_of, history)
        self.ahead.loaded(oid, data)
        return data, tid, end

    def begin_walk(self, before: bytes = T2) -> None:
        """Up to the object with which others came."""
        for oid in (LIST, *OIDS[:2]):
            self.load(oid, before)
        assert [method for method, _ in self.server.asked][-1] == "load_ahead"
        del self.server.asked[:]

    def learn(self, oid: bytes, tid: bytes) -> None:
        """A change is announced."""
        self.server.change(oid, tid)
        self.cache.apply(one_change(tid, [oid]))


@pytest.fixture
def client() -> Client:
    return Client(Server())


# The first one that is only held after ``begin_walk``, and the last one.
HELD, LAST_HELD = OIDS[2], OIDS[WINDOW_MIN]


def test_what_came_ahead_of_time_is_not_asked_for_again(client):
    client.begin_walk()
    for oid in OIDS[2 : 1 + WINDOW_MIN]:
        assert client.load(oid, T2) == (b"old " + oid, T1, None)
    assert client.server.asked == []
    counters = client.ahead.counters
    assert (counters.answers, counters.sent) == (1, WINDOW_MIN - 1)
    assert counters.used == WINDOW_MIN - 1
    assert counters.sent_bytes == 12 * (WINDOW_MIN - 1)
    assert client.ahead.held_bytes == 0


def test_it_enters_the_cache_when_it_is_used(client):
    client.begin_walk()
    kept = len(client.cache)
    assert client.cache.load(HELD, T2) is None
    client.load(HELD, T2)
    assert len(client.cache) == kept + 1
    assert client.cache.load(HELD, T2) == (b"old " + HELD, T1, None)
    assert client.ahead.counters.used == 1


def test_a_later_snapshot_does_not_get_what_has_changed(client):
    client.begin_walk()
    client.learn(HELD, T2)
    assert client.load(HELD, T3)[0] == T2 + b" of " + HELD


def test_an_earlier_snapshot_still_gets_it(client):
    client.begin_walk()
    client.learn(HELD, T2)
    assert client.load(HELD, T2)[:2] == (b"old " + HELD, T1)
    assert client.server.asked == []
    # And the cache knows better than to take it for current.
    assert client.load(HELD, T3)[0] == T2 + b" of " + HELD


def test_a_later_snapshot_gets_what_has_not_changed(client):
    """As one does that walks through a tree and commits now and then."""
    client.begin_walk()
    client.learn(OIDS[-1], T2)
    assert client.load(HELD, T3) == (b"old " + HELD, T1, None)
    assert client.server.asked == []


def test_what_a_server_that_is_ahead_said_is_no_snapshot_of_later(client):
    """It may be lost, and come back as the client knows it."""
    client.server.change(OIDS[-1], T3)
    client.begin_walk()
    client.server.go_back()
    client.learn(HELD, T2)
    assert client.load(HELD, T3)[0] == T2 + b" of " + HELD
    assert client.load(HELD, T2)[:2] == (b"old " + HELD, T1)


def test_a_snapshot_before_an_object_does_not_get_it(client):
    client.begin_walk()
    assert client.load(HELD, T1) is None


def test_what_is_current_whenever_is_not_taken_from_it(client):
    client.begin_walk()
    client.load(HELD, MAX_TID)
    assert client.server.asked == [("load", HELD)]


def test_what_was_superseded_when_it_came_is_used_for_its_snapshot(client):
    client.learn(HELD, T2)
    client.begin_walk(before=T2)
    assert client.load(HELD, T2) == (b"old " + HELD, T1, T2)
    assert client.server.asked == []
    assert client.load(HELD, T3)[0] == T2 + b" of " + HELD


def test_an_answer_on_its_way_while_a_change_is_announced(client):
    """The stream is quick, the answer slow: it is not taken for current (R2)."""

    def learn() -> None:
        client.server.meanwhile = lambda: None
        for tid, oid in ((T2, OIDS[1]), (T3, HELD)):
            client.learn(oid, tid)

    for oid in (LIST, OIDS[0]):
        client.load(oid, T2)
    client.server.meanwhile = learn
    assert client.load(OIDS[1], T2)[:2] == (b"old " + OIDS[1], T1)
    assert client.load(HELD, T2)[:2] == (b"old " + HELD, T1)
    for oid, tid in ((OIDS[1], T2), (HELD, T3)):
        assert client.load(oid, following(T3))[:2] == (tid + b" of " + oid, tid)


@pytest.mark.parametrize("when", ["on its way", "held"])
def test_what_belongs_to_a_history_that_was_given_up_is_not_used(client, when):
    """The server was restored from an older copy, and goes on in another way."""

    def restore() -> None:
        client.server.meanwhile = lambda: None
        client.cache.forget_all(T1)
        client.server.revisions[HELD] = [(T1, b"another")]

    if when == "on its way":
        for oid in (LIST, OIDS[0]):
            client.load(oid, T2)
        client.server.meanwhile = restore
        client.load(OIDS[1], T2)
        assert client.cache.load(OIDS[1], T2) is None
    else:
        client.begin_walk()
        restore()
    assert client.load(HELD, T2)[0] == b"another"


def test_an_object_that_is_gone_is_asked_for_as_ever(client):
    del client.server.revisions[OIDS[1]]
    for oid in (LIST, *OIDS[:2]):
        found = client.load(oid, T2)
    assert found is None
    assert client.server.asked[-1] == ("load", OIDS[1])
    assert client.load(HELD, T2) is not None
    assert client.server.asked[-1] == ("load", OIDS[1])


def test_a_server_that_answers_for_nothing_is_an_error(client):
    for oid in (LIST, OIDS[0]):
        client.load(oid, T2)
    client.server.load_ahead = lambda *_args: ([], [])
    with pytest.raises(StorageError, match="for no object"):
        client.load(OIDS[1], T2)


def test_without_a_server_what_is_held_is_used_and_nothing_else(client):
    client.begin_walk()

    def away(*_args: Any) -> Any:
        raise ClientDisconnected("away")

    client.ahead._call = client.server.call = away
    for oid in OIDS[2 : 1 + WINDOW_MIN]:
        assert client.load(oid, T2) is not None
    with pytest.raises(ClientDisconnected):
        client.load(OIDS[1 + WINDOW_MIN], T2)


def test_what_is_held_is_bounded_and_the_oldest_goes_first(client, monkeypatch):
    client.begin_walk()
    one = client.ahead.held_bytes // (WINDOW_MIN - 1)
    client.ahead.forget()
    assert client.ahead.held_bytes == 0
    monkeypatch.setattr(read_ahead, "HELD_BYTES_MAX", 3 * one)
    client.cache.forget_all(T1)
    client.begin_walk()
    assert client.ahead.held_bytes == 3 * one
    client.load(LAST_HELD, T2)
    assert not client.server.asked
    client.load(HELD, T2)
    assert client.server.asked


def test_another_thread_does_not_disturb_a_walk(client):
    """What one thread misses is nothing to the other; what is held is there for all."""

    def elsewhere(step: Callable[[], object]) -> None:
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()

    client.load(LIST, T2)
    client.load(OIDS[0], T2)
    elsewhere(lambda: client.load(OIDS[20], T2))
    client.load(OIDS[1], T2)
    assert client.server.asked[-1][0] == "load_ahead"
    del client.server.asked[:]
    elsewhere(lambda: client.load(HELD, T2))
    assert client.server.asked == []


def test_a_thread_takes_what_another_one_needs_at_the_same_time(client):
    """Nobody gets less than he asked for, and the count is right."""
    client.begin_walk()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        loaded: list[list[Any]] = []
        threads = [
            threading.Thread(
                target=lambda: loaded.append([client.load(oid, T2) for oid in OIDS])
            )
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert loaded == [[(b"old " + oid, T1, None) for oid in OIDS]] * 4
    held = client.ahead._held.values()
    assert client.ahead.held_bytes == sum(len(e[0][0]) + 400 for e in held)


MANY = [number(n) for n in range(1000, 2500)]
# What is not asked for before it is needed, of these.
AT_FIRST = 400


class Far(Client):
    """Walks through many objects, and is sent some before it needs them."""

    def __init__(self) -> None:
        server = Server()
        server.revisions[LIST] = [(T1, bucket(MANY))]
        server.revisions.update({oid: [(T1, b"old " + oid)] for oid in MANY})
        super().__init__(server)
        self.session = server.session = Session(server)
        self.load(LIST, T2)
        self.walk(0, AT_FIRST)
        assert len(self.session.lent) == 1
        self.waited: list[Any] = []
        call = server.call

        def waited_for(method: str, *args: Any) -> Any:
            self.waited.append(method)
            return call(method, *args)

        self.ahead._call = waited_for

    def walk(self, start: int, stop: int, before: bytes = T2) -> None:
        for oid in MANY[start:stop]:
            data, tid, _end = self.load(oid, before)
            assert (data, tid) == self.server.load(oid, before)[:2]


@pytest.fixture
def far() -> Far:
    return Far()


def test_a_long_walk_waits_for_no_answer(far):
    far.walk(AT_FIRST, len(MANY))
    assert far.waited == []
    # At the end there is nothing to ask for.
    assert far.session.lent == []
    assert far.ahead.counters.used == far.ahead.counters.sent


def test_an_answer_that_nobody_waited_for_is_judged_by_its_age(far):
    """It is true as of when it was made; the changes came while it was there."""
    tid = 20_000
    for oid in MANY[AT_FIRST::7]:
        tid += 1
        far.learn(oid, number(tid))
    far.walk(AT_FIRST, 800)
    far.walk(800, len(MANY), before=number(tid + 1))
    far.walk(AT_FIRST, len(MANY), before=number(tid + 1))


def test_an_answer_of_a_history_that_was_given_up_is_not_used(far):
    far.cache.forget_all(T1)
    for oid in MANY:
        far.server.revisions[oid] = [(T1, b"another " + oid)]
    far.walk(AT_FIRST, len(MANY))


def test_an_answer_that_was_lost_is_asked_for_again(far):
    far.session.is_lost = True
    far.server.session = None
    far.walk(AT_FIRST, len(MANY))
    assert far.waited
    assert set(far.waited) == {"load_ahead"}
    assert far.session.lent == []


def test_where_nothing_can_be_sent_the_walk_goes_on_as_ever(far):
    far.walk(AT_FIRST, 600)
    far.server.session = Session(far.server)
    far.server.session.is_lost = True
    far.walk(600, len(MANY))
    assert set(far.waited) == {"load_ahead"}


def test_at_the_end_nobody_waits_for_anything(far):
    far.ahead.close()
    assert far.session.lent == []
    far.walk(AT_FIRST, 1200)
    assert far.session.lent == []
    assert far.waited


def test_what_has_been_used_needs_no_room(far, monkeypatch):
    monkeypatch.setattr(read_ahead, "HELD_BYTES_MAX", far.ahead.held_bytes * 4)
    far.walk(AT_FIRST, len(MANY))
    assert far.waited == []


def test_what_came_twice_is_not_counted_as_used(client):
    client.begin_walk()
    client.ahead._hold(dict(client.ahead._held))
    assert client.ahead.counters.used == 0
    assert client.ahead.counters.sent == 2 * (WINDOW_MIN - 1)


def test_each_thread_waits_for_one_answer_and_all_for_a_few(far, monkeypatch):
    monkeypatch.setattr(far.ahead, "_forwards_max", 3)

    def walk() -> None:
        far.cache.forget_all(T1)
        far.load(LIST, T2)
        far.walk(0, AT_FIRST)

    for _ in range(5):
        thread = threading.Thread(target=walk)
        thread.start()
        thread.join()
    assert len(far.session.lent) == 3
    # Ours was dropped; we ask again.
    far.cache.forget_all(T1)
    far.walk(AT_FIRST, len(MANY))
    assert len(far.session.lent) <= 3


def test_a_new_walk_drops_what_an_old_one_asked_for(far):
    for _ in range(3):
        far.cache.forget_all(T1)
        far.load(LIST, T2)
        far.walk(0, AT_FIRST)
        assert len(far.session.lent) == 1


@given(
    st.lists(
        st.tuples(st.just("load"), st.integers(0, 29), st.integers(0, 3))
        | st.tuples(st.just("walk"), st.integers(0, 29), st.integers(0, 3))
        | st.tuples(st.just("change"), st.integers(0, 29), st.booleans())
        | st.tuples(st.just("hear"), st.just(0), st.just(0)),
        max_size=60,
    )
)
def test_whatever_happens_every_snapshot_is_what_the_server_has(steps):
    """Changes are heard of late; a snapshot is one that was heard of, or older."""
    server = Server()
    client = Client(server)
    unheard: list[tuple[bytes, bytes]] = []
    tid = heard = 10_001
    for name, place, how in steps:
        if name == "change":
            tid += 1
            server.change(OIDS[place], number(tid))
            unheard.append((number(tid), OIDS[place]))
            if how:
                name = "hear"
        if name == "hear":
            for change, oid in unheard:
                client.cache.apply(one_change(change, [oid]))
            del unheard[:]
            heard = tid
        if name in ("load", "walk"):
            before = number(max(10_002, heard + 1 - how))
            stop = place + 1 if name == "load" else min(place + 6, len(OIDS))
            client.load(LIST, before)
            for oid in OIDS[place:stop]:
                data, start, _end = client.load(oid, before)
                assert (data, start) == server.load(oid, before)[:2]


def test_in_a_forked_child_nothing_is_held(client):
    client.begin_walk()
    with client.ahead._lock:
        client.ahead.forget()
    assert client.ahead.held_bytes == 0
    client.load(HELD, T2)
    assert client.server.asked
