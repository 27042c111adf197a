"""The one applier: every change once, in order, told before it is seen."""

import threading
from collections.abc import Callable, Iterable
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from ZODB.mvccadapter import MVCCAdapter
from ZODB.utils import p64

from zeolith.client.cache import MemoryCache
from zeolith.client.changes import Change
from zeolith.client.position import Position
from zeolith.client.tids import Z64

from ..support.gates import Background
from ..support.waiting import wait_until

A, B, C = p64(1), p64(2), p64(3)
T1, T2, T3, T4, T5, T6 = map(p64, range(1, 7))


class Told:
    """A database that writes down what it is told, and what it can see then."""

    def __init__(self, position: Position):
        self.position = position
        self.log: list[Any] = []
        self.error: Exception | None = None

    def invalidate(self, tid: bytes, oids: list[bytes]) -> None:
        self.log.append((tid, oids))
        self.see(tid)
        if self.error is not None:
            raise self.error

    # The name is ZODB's.
    def invalidateCache(self) -> None:
        self.log.append("everything")

    def see(self, tid: bytes) -> None:
        assert self.position.tid is not None
        assert self.position.tid < tid, "it was seen before it was told"
        assert self.position._cache.valid_through >= tid, "the cache was not told"

    def tids(self) -> list[bytes]:
        return [each[0] for each in self.log]


class Feed:
    """A session, as the position sees it."""

    def __init__(self) -> None:
        self.closed: list[str] = []

    def close(self, reason: str) -> None:
        self.closed.append(reason)


def at(tid: bytes) -> tuple[Position, Told, Feed]:
    """A position at `tid`, who listens to it, and the session that feeds it."""
    position = Position(MemoryCache())
    told = Told(position)
    feed = Feed()
    position.adopt(feed, tid, [])
    position.register(told)
    return position, told, feed


def change(
    since: bytes, tid: bytes, *oids: bytes, transaction: bytes | None = None
) -> Change:
    return Change(since, tid, list(oids), transaction)


def waits(position: Position, threads: int = 1) -> Callable[[], bool]:
    """Whether so many threads wait for the position to move."""
    return lambda: len(position._condition._waiters) == threads  # type: ignore[attr-defined]


# Changes over the stream


def test_a_change_of_another_history_ends_the_session():
    """The server was restored between its welcome and what we applied meanwhile."""
    position, told, feed = at(T3)
    position.receive(feed, [Change(T2, T4, [A], None)])
    assert "without our" in feed.closed[0]
    assert position.tid == T3
    assert not told.log


def test_a_fork_waits_until_a_change_was_told():
    """Or the child would inherit ZODB's locks from a thread that it has not got."""
    position, _told, feed = at(T1)
    is_told, may_go_on = threading.Event(), threading.Event()

    class Slow:
        def invalidate(self, _tid: bytes, _oids: list[bytes]) -> None:
            is_told.set()
            assert may_go_on.wait(30)

    def fork() -> None:
        position.hold()
        position.let_go()

    position.register(Slow())
    telling = Background(position.receive, feed, [Change(T1, T2, [A], None)])
    assert is_told.wait(30)
    forking = Background(fork)
    assert not forking.returns_soon()
    may_go_on.set()
    telling.result()
    forking.result()
    assert position.tid == T2


def test_changes_are_applied_in_the_order_of_their_tids():
    position, told, feed = at(T1)
    position.receive(feed, [change(T1, T2, A), change(T2, T3, B)])
    assert told.log == [(T2, [A]), (T3, [B])]
    assert position.tid == T3


def test_a_change_is_told_to_cache_and_database_before_it_is_seen():
    """Told.see asserts it at the moment of the telling."""
    position, told, feed = at(T1)
    position.receive(feed, [change(T1, T2, A)])
    assert told.log == [(T2, [A])]
    assert position.tid == position.tid_now == T2


def test_a_change_that_comes_twice_is_applied_once():
    position, told, feed = at(T1)
    position.receive(feed, [change(T1, T2, A)])
    position.receive(feed, [change(T1, T2, A), change(T2, T3, B)])
    position.receive(feed, [change(T2, T3, B), change(T2, T3, B)])
    assert told.log == [(T2, [A]), (T3, [B])]


def test_a_gap_ends_the_session():
    position, told, feed = at(T1)
    position.receive(feed, [change(T2, T3, A)])
    assert told.log == []
    assert position.tid == T1
    assert len(feed.closed) == 1
    assert T1.hex() in feed.closed[0]
    assert T2.hex() in feed.closed[0]


def test_a_gap_after_good_changes_keeps_the_good_ones():
    position, told, feed = at(T1)
    position.receive(feed, [change(T1, T2, A), change(T3, T4, B)])
    assert told.log == [(T2, [A])]
    assert position.tid == T2
    assert feed.closed


def test_after_a_gap_the_session_feeds_nothing_any_more():
    position, told, feed = at(T1)
    position.receive(feed, [change(T2, T3, A)])
    position.receive(feed, [change(T1, T2, A)])
    assert told.log == []
    assert len(feed.closed) == 1


def test_a_stranger_feeds_nothing():
    position, told, _feed = at(T1)
    position.receive(Feed(), [change(T1, T2, A)])
    assert told.log == []
    assert position.tid == T1


def test_a_session_that_was_replaced_feeds_nothing():
    position, told, old = at(T1)
    new = Feed()
    position.adopt(new, T1, [])
    position.receive(old, [change(T1, T2, A)])
    assert told.log == []
    position.receive(new, [change(T1, T2, A)])
    assert told.log == [(T2, [A])]


def test_a_session_that_was_left_feeds_nothing():
    position, told, feed = at(T1)
    position.leave(feed)
    position.receive(feed, [change(T1, T2, A)])
    assert told.log == []


def test_leaving_an_old_session_does_not_end_the_new_one():
    position, told, old = at(T1)
    new = Feed()
    position.adopt(new, T1, [])
    position.leave(old)
    position.receive(new, [change(T1, T2, A)])
    assert told.log == [(T2, [A])]


def test_without_a_database_the_cache_is_told():
    cache = MemoryCache()
    position = Position(cache)
    feed = Feed()
    position.adopt(feed, T1, [])
    cache.store(A, T1, None, b"data", T1)
    position.receive(feed, [change(T1, T2, A)])
    assert position.tid == T2
    assert cache.load(A, T3) is None


def test_a_database_that_raises_leaves_the_position_where_it_is():
    position, told, feed = at(T1)
    told.error = RuntimeError("out of order")
    with pytest.raises(RuntimeError, match="out of order"):
        position.receive(feed, [change(T1, T2, A)])
    assert position.tid == T1
    told.error = None
    position.receive(feed, [change(T2, T3, B)])
    assert told.log == [(T2, [A]), (T2, [A]), (T3, [B])]


def test_the_adapter_of_zodb_hears_of_several_changes_at_once():
    position, _told, feed = at(T1)
    cache = position._cache
    adapter = MVCCAdapter(SimpleNamespace(lastTransaction=lambda: position.tid))
    instance = adapter.new_instance()
    calls: list[bytes] = []

    def invalidate(tid: bytes, oids: Iterable[bytes]) -> None:
        assert (position.tid, cache.valid_through) == (calls[-1] if calls else T1, tid)
        calls.append(tid)
        MVCCAdapter.invalidate(adapter, tid, oids)

    adapter.invalidate = invalidate
    position.register(adapter)
    cache.store(A, T1, None, b"a", T1)
    cache.store(B, T1, None, b"b", T1)
    position.receive(
        feed, [change(T1, T2, A), change(T2, T3), change(T3, T4, B, A), change(T4, T5)]
    )
    position.receive(feed, [change(T5, T6, C)])
    assert calls == [T5, T6]
    assert position.tid == T6
    assert sorted(instance.poll_invalidations()) == [A, B, C]
    assert instance._start == p64(7)
    assert cache.load(A, T6) is None
    assert cache.load(A, T2) == (b"a", T1, T2)
    assert cache.load(B, T4) == (b"b", T1, T4)


def test_the_adapter_hears_of_nothing_behind_what_an_own_thread_finishes():
    position, _told, feed = at(T1)
    adapter = MVCCAdapter(SimpleNamespace(lastTransaction=lambda: position.tid))
    instance = adapter.new_instance()
    position.register(adapter)
    position.begin_finish(b"own")
    position.receive(
        feed,
        [change(T1, T2, A), change(T2, T3, B), own(T3, T4), change(T4, T5, C)],
    )
    assert position.tid == T3
    assert sorted(instance.poll_invalidations()) == [A, B]
    position.finished(feed, own(T3, T4), [], lambda _tid: None)
    assert position.tid == T5
    assert instance.poll_invalidations() == [C]


def test_what_comes_before_a_gap_is_told():
    position, told, feed = at(T1)
    position.receive(feed, [change(T1, T2, A), change(T2, T3, B), change(T4, T5, C)])
    assert told.log == [(T2, [A]), (T3, [B])]
    assert position.tid == T3
    assert "are missing" in feed.closed[0]
    assert position._pending == []


# A session begins


def test_the_first_session_says_where_we_are():
    position = Position(MemoryCache())
    assert position.tid is None
    position.adopt(Feed(), T3, [])
    assert position.tid == T3


def test_the_first_session_empties_the_cache():
    cache = MemoryCache()
    cache.store(A, T1, None, b"data", T1)
    position = Position(cache)
    position.adopt(Feed(), T3, [])
    assert len(cache) == 0
    assert cache.valid_through == T3


def test_the_changes_that_were_missed_are_applied_exactly():
    position, told, feed = at(T1)
    cache = position._cache
    cache.store(A, T1, None, b"a", T1)
    cache.store(B, T1, None, b"b", T1)
    position.leave(feed)
    position.adopt(Feed(), T3, [change(T1, T2, A), change(T2, T3, C)])
    assert told.log == [(T2, [A]), (T3, [C])]
    assert position.tid == T3
    assert cache.load(A, p64(4)) is None
    assert cache.load(B, p64(4)) == (b"b", T1, None)


def test_changes_that_came_too_early_are_not_mixed_into_the_next_session():
    position, told, feed = at(T1)
    position.begin_finish(b"own")
    position.receive(feed, [change(T1, T2, A, transaction=b"own")])
    position.receive(feed, [change(T2, T3, B)])
    position.leave(feed)
    new = Feed()
    position.adopt(new, T1, [])
    position.give_up(b"own")
    assert told.log == []
    position.receive(new, [change(T1, T2, C)])
    assert told.log == [(T2, [C])]


def test_no_way_from_here_to_there_drops_everything():
    position, told, feed = at(T1)
    position._cache.store(A, T1, None, b"data", T1)
    position.leave(feed)
    position.adopt(Feed(), T5, None)
    assert told.log == ["everything"]
    assert position.tid == T5
    assert position._cache.valid_through == T5
    assert not position._cache._by_oid  # type: ignore[attr-defined]


def test_a_server_restored_from_a_backup_is_followed_loudly(caplog):
    position, told, feed = at(T5)
    position.leave(feed)
    new = Feed()
    position.adopt(new, T2, None)
    assert told.log == ["everything"]
    assert position.tid == T2
    assert position._cache.valid_through == T2
    assert [each.levelname for each in caplog.records] == ["CRITICAL"]
    assert T2.hex() in caplog.text
    assert T5.hex() in caplog.text
    position.receive(new, [change(T2, T6, A)])
    assert told.log[1:] == [(T6, [A])]


def test_missed_changes_with_a_gap_drop_everything():
    position, told, feed = at(T1)
    position.leave(feed)
    position.adopt(Feed(), T5, [change(T1, T2, A), change(T3, T5, B)])
    assert told.log == [(T2, [A]), "everything"]
    assert position.tid == T5
    assert not position._cache._by_oid  # type: ignore[attr-defined]


# Nobody can say what has changed


def verifying(at_tid: bytes = T1) -> tuple[Position, Told, Feed]:
    """A position whose new session cannot say what has changed since."""
    position, told, feed = at(at_tid)
    for oid in (A, B):
        position._cache.store(oid, T1, None, b"data", at_tid)
    position.leave(feed)
    new = Feed()
    position.await_verification(new)
    return position, told, new


def test_changes_wait_until_the_cache_is_verified():
    position, told, feed = verifying()
    position.receive(feed, [change(T5, T6, A)])
    assert position.tid == T1
    assert told.log == []
    position.verified(feed, T5, [B])
    assert told.log == ["everything", (T6, [A])]
    assert position.tid == T6
    assert position._cache.valid_through == T6
    assert position._cache._by_oid[A][0].end is not None  # type: ignore[attr-defined]
    assert B not in position._cache._by_oid  # type: ignore[attr-defined]
    position.receive(feed, [change(T6, p64(7), B)])
    assert position.tid == p64(7)


def test_what_is_cached_is_good_after_the_verification():
    position, _told, feed = verifying()
    assert position._cache.load(A, T5) is None
    position.verified(feed, T5, [])
    assert position._cache.load(A, T6) == (b"data", T1, None)


def test_a_session_that_is_lost_while_it_verifies_leaves_all_as_it_was():
    position, told, feed = verifying()
    position.receive(feed, [change(T5, T6, A)])
    position.leave(feed)
    position.verified(feed, T5, [])
    assert told.log == []
    assert position.tid == position._cache.valid_through == T1
    new = Feed()
    position.adopt(new, T2, [change(T1, T2, B)])
    assert told.log == [(T2, [B])]
    assert not new.closed


def test_who_finishes_does_not_wait_for_a_verification_that_is_lost():
    """It would wait for the next server."""
    position, _told, feed = verifying()
    position._finishing.add(b"own")
    position.receive(feed, [change(T5, T6, A, transaction=b"own")])
    called: list[bytes] = []
    finishing = Background(
        position.finished, Feed(), own(T1, T6, A), None, called.append
    )
    wait_until(waits(position), "the thread waits for its turn")
    position.leave(feed)
    finishing.result()
    assert called == [T6]


def test_who_finishes_while_the_cache_is_verified_goes_on_in_its_place():
    position, told, feed = verifying()
    position._finishing.add(b"own")
    position.receive(feed, [change(T4, T5, B), own(T5, T6, A)])
    called: list[bytes] = []
    finishing = Background(
        position.finished, Feed(), own(T1, T6, A), None, called.append
    )
    wait_until(waits(position), "the thread waits for its turn")
    position.verified(feed, T4, [])
    finishing.result()
    assert called == [T6]
    assert told.log == ["everything", (T5, [B])]
    assert position.tid == T6


def test_a_verification_that_came_to_nothing_drops_everything():
    position, told, feed = verifying()
    position.receive(feed, [change(T5, T6, A)])
    position.verified(feed, T5, None)
    assert told.log == ["everything", (T6, [A])]
    assert position.tid == T6
    assert not position._cache._by_oid  # type: ignore[attr-defined]


def test_a_restored_server_is_gone_back_to_loudly(caplog):
    position, told, feed = verifying(T5)
    position._cache.store(C, T4, None, b"lost", T5)
    position.cut_back(feed, T3)
    assert position.tid == position._cache.valid_through == T3
    assert told.log == ["everything"]
    assert position._cache.load(A, T4) == (b"data", T1, None)
    assert position._cache.load(C, T6) is None
    assert [each.levelname for each in caplog.records] == ["CRITICAL"]
    assert position._source is None, "nobody may wait for it"
    position.receive(feed, [change(T3, T6, A)])
    assert position.tid == T3
    assert position._pending == []


def test_what_another_process_did_to_the_cache_is_followed():
    position, told, feed = verifying()
    position._cache.verified(T4, [A])
    position.stand_at_cache(feed)
    assert position.tid == T4
    assert position._source is None
    assert told.log == ["everything"]
    new = Feed()
    position.adopt(new, T5, [change(T4, T5, B)])
    assert told.log == ["everything", (T5, [B])]


@pytest.mark.parametrize("step", ["verified", "cut_back", "stand_at_cache"])
def test_a_session_that_was_replaced_has_nothing_to_say(step):
    position, told, feed = verifying()
    position.adopt(Feed(), T1, [])
    arguments = {"verified": (T5, []), "cut_back": (T1,), "stand_at_cache": ()}
    getattr(position, step)(feed, *arguments[step])
    assert position.tid == T1
    assert told.log == []


def test_a_forked_child_verifies_nothing():
    position, _told, _feed = verifying()
    position.forget()
    new = Feed()
    position.adopt(new, T1, [])
    position.receive(new, [change(T1, T2, A)])
    assert position.tid == T2


def test_a_forked_child_keeps_only_the_position():
    position, _told, feed = at(T1)
    position._cache.store(A, T1, None, b"data", T1)
    position.begin_finish(b"own")
    position.receive(feed, [change(T1, T2, A, transaction=b"own")])
    position.forget()
    assert position.tid == T1
    assert position._pending == []
    assert position._finishing == set()
    assert not position._cache._by_oid  # type: ignore[attr-defined]
    assert position._cache.valid_through == T1
    position.receive(feed, [change(T1, T2, A)])
    assert position.tid == T1, "the parent's session feeds the child"


def test_a_forked_child_does_not_wait_for_a_thread_of_its_parent():
    position, _told, _feed = at(T1)
    has_lock, may_end = threading.Event(), threading.Event()

    def hold() -> None:
        with position._condition:
            has_lock.set()
            may_end.wait()

    holder = Background(hold)
    has_lock.wait()
    try:
        position.forget()
        assert position.tid == T1
    finally:
        may_end.set()
        holder.result()


def test_a_child_forked_before_the_first_session_is_nowhere():
    position = Position(MemoryCache())
    position.forget()
    assert position.tid is None
    assert position._cache.valid_through == Z64


# Own transactions


def own(since: bytes, tid: bytes, *oids: bytes) -> Change:
    return change(since, tid, *oids, transaction=b"own")


def test_an_own_transaction_is_told_by_its_callback_alone():
    position, told, feed = at(T1)
    assert position.begin_finish(b"own") == T1
    called: list[bytes] = []

    def callback(tid: bytes) -> None:
        told.see(tid)
        called.append(tid)

    position.finished(feed, own(T1, T2, A), [], callback)
    assert called == [T2]
    assert told.log == []
    assert position.tid == T2
    assert position._cache.valid_through == T2


def test_the_stream_leaves_an_own_change_to_the_thread_that_finishes_it():
    position, told, feed = at(T1)
    position.begin_finish(b"own")
    position.receive(feed, [own(T1, T2, A), change(T2, T3, B)])
    assert told.log == []
    assert position.tid == T1
    position.finished(feed, own(T1, T2, A), [], told.see)
    assert told.log == [(T3, [B])]
    assert position.tid == T3


def test_the_stream_brings_an_own_change_after_its_thread():
    position, told, feed = at(T1)
    position.begin_finish(b"own")
    position.finished(feed, own(T1, T2, A), [], told.see)
    position.receive(feed, [own(T1, T2, A), change(T2, T3, B)])
    assert told.log == [(T3, [B])]


def test_the_changes_that_came_with_the_answer_are_applied_before_it():
    position, told, feed = at(T1)
    position.begin_finish(b"own")
    seen: list[list[bytes]] = []
    position.finished(
        feed,
        own(T3, T4, A),
        [change(T1, T2, B), change(T2, T3, C)],
        lambda tid: seen.append(told.tids()),
    )
    assert seen == [[T2, T3]]
    assert position.tid == T4


def test_a_callback_can_tell_whether_it_is_in_its_place():
    position, _told, feed = at(T1)
    places: list[bytes | None] = []

    def look(_tid: bytes) -> None:
        places.append(position.in_place)

    position.begin_finish(b"own")
    position.finished(feed, own(T1, T2, A), [], look)
    assert position.in_place is None
    # Applied already, like anybody's.
    position.finished(feed, own(T1, T2, A), None, look)
    # Something before it is missing, and nobody will bring it.
    position.leave(feed)
    position.finished(feed, own(T3, T4, A), None, look)
    assert places == [T2, None, None]


def test_a_callback_that_raises_does_not_hold_up_the_position():
    """The transaction is committed; only the application is in trouble."""
    position, told, feed = at(T1)
    position.begin_finish(b"own")
    position.receive(feed, [own(T1, T2, A), change(T2, T3, B)])

    def callback(tid: bytes) -> None:
        raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        position.finished(feed, own(T1, T2, A), [], callback)
    assert told.log == [(T3, [B])]
    assert position.tid == T3


def test_the_callback_sees_its_own_revisions_in_the_cache():
    position, _told, feed = at(T1)
    cache = position._cache
    cache.store(A, T1, None, b"old", T1)
    position.begin_finish(b"own")
    position.finished(
        feed, own(T1, T2, A), [], lambda tid: cache.store(A, tid, None, b"new", tid)
    )
    assert cache.load(A, T2) == (b"old", T1, T2)
    assert cache.load(A, T3) == (b"new", T2, None)


def test_a_reader_waits_for_a_callback_that_is_under_way():
    position, _told, feed = at(T1)
    position.begin_finish(b"own")
    is_in, may_end = threading.Event(), threading.Event()

    def callback(tid: bytes) -> None:
        is_in.set()
        may_end.wait()

    finishing = Background(position.finished, feed, own(T1, T2, A), [], callback)
    is_in.wait()
    reading = Background(lambda: position.tid)
    assert position.tid_now == T1
    assert not reading.returns_soon()
    may_end.set()
    assert reading.result() == T2
    finishing.result()


def test_two_answers_that_come_in_the_other_order_are_applied_in_tid_order():
    position, told, feed = at(T1)
    position.begin_finish(b"one")
    position.begin_finish(b"two")
    one = change(T1, T2, A, transaction=b"one")
    two = change(T2, T3, B, transaction=b"two")
    order: list[bytes] = []
    later = Background(position.finished, feed, two, [one], order.append)
    wait_until(waits(position), "the thread of the later transaction waits")
    assert order == []
    position.finished(feed, one, [], order.append)
    later.result()
    assert order == [T2, T3]
    assert told.log == []
    assert position.tid == T3


def test_a_transaction_that_is_given_up_is_applied_like_anybodys():
    position, told, feed = at(T1)
    position.begin_finish(b"own")
    position.receive(feed, [own(T1, T2, A), change(T2, T3, B)])
    position.give_up(b"own")
    assert told.log == [(T2, [A]), (T3, [B])]
    assert position.tid == T3


def test_giving_up_wakes_the_transaction_behind():
    position, told, feed = at(T1)
    position.begin_finish(b"one")
    position.begin_finish(b"two")
    one = change(T1, T2, A, transaction=b"one")
    two = change(T2, T3, B, transaction=b"two")
    seen: list[list[bytes]] = []
    later = Background(
        position.finished, feed, two, [one], lambda tid: seen.append(told.tids())
    )
    wait_until(waits(position), "the thread of the later transaction waits")
    position.give_up(b"one")
    later.result()
    assert seen == [[T2]]
    assert position.tid == T3


def test_an_answer_without_changes_waits_for_the_stream_to_bring_them():
    """The server has forgotten what came between; the stream has not."""
    position, told, feed = at(T1)
    position.begin_finish(b"own")
    seen: list[list[bytes]] = []
    finishing = Background(
        position.finished,
        feed,
        own(T1, T3, A),
        None,
        lambda tid: seen.append(told.tids()),
    )
    wait_until(waits(position), "the finishing thread waits")
    position.receive(feed, [change(T1, T2, B)])
    assert seen == []
    position.receive(feed, [own(T2, T3, A)])
    finishing.result()
    assert seen == [[T2]]
    assert told.log == [(T2, [B])]
    assert position.tid == T3


def test_a_thread_does_not_wait_for_what_a_lost_session_would_have_brought():
    """What lies before its transaction is not known: nothing in memory is trusted."""
    position, told, feed = at(T1)
    position.begin_finish(b"own")
    seen: list[Any] = []
    finishing = Background(
        position.finished,
        feed,
        own(T1, T3, A),
        None,
        lambda tid: seen.extend(told.log),
    )
    wait_until(waits(position), "the finishing thread waits")
    position.leave(feed)
    finishing.result()
    assert seen == ["everything"]
    assert position.tid == T1
    position.adopt(Feed(), T3, [change(T1, T2, B), own(T2, T3, A)])
    assert told.log == ["everything", (T2, [B]), (T3, [A])]
    assert position.tid == T3


def test_an_answer_is_true_although_its_session_was_lost_meanwhile():
    """Other connections must not see the transaction without those before it."""
    position, told, feed = at(T1)
    position.begin_finish(b"own")
    position.leave(feed)
    seen: list[Any] = []
    position.finished(
        feed, own(T2, T3, A), [change(T1, T2, B)], lambda tid: seen.extend(told.log)
    )
    assert seen == told.log == [(T2, [B])]
    assert position.tid == T3
    position.adopt(Feed(), T3, [change(T1, T2, B), own(T2, T3, A)])
    assert told.log == [(T2, [B])]


def test_an_answer_of_a_session_that_was_replaced_brings_nothing():
    """The next server may know another history."""
    position, told, feed = at(T1)
    position.begin_finish(b"own")
    position.adopt(Feed(), T2, None)
    called: list[bytes] = []
    position.finished(feed, own(T2, T3, A), [change(T1, T2, B)], called.append)
    assert called == [T3]
    assert told.log == ["everything", "everything"]
    assert position.tid == T2


def test_the_next_session_may_bring_what_a_thread_is_finishing():
    position, told, feed = at(T1)
    position.begin_finish(b"own")
    position.adopt(Feed(), T3, [change(T1, T2, B), own(T2, T3, A)])
    assert position.tid == T2
    seen: list[Any] = []
    position.finished(feed, own(T1, T3, A), None, lambda tid: seen.extend(told.log))
    assert seen == told.log == [(T2, [B])]
    assert position.tid == T3


def test_a_lost_session_does_not_let_a_later_transaction_pass_an_earlier_one():
    position, told, feed = at(T1)
    position.begin_finish(b"one")
    position.begin_finish(b"two")
    one = change(T1, T2, A, transaction=b"one")
    two = change(T2, T3, B, transaction=b"two")
    seen: list[Any] = []
    later = Background(
        position.finished, feed, two, [one], lambda tid: seen.extend(told.log)
    )
    wait_until(waits(position), "the thread of the later transaction waits")
    position.leave(feed)
    wait_until(waits(position), "it goes on waiting")
    position.give_up(b"one")
    later.result()
    assert seen == [(T2, [A])]
    assert position.tid == T3


def test_an_own_change_that_was_applied_already_is_not_applied_again():
    """The answer was lost, the stream brought it, and then the server was asked."""
    position, told, feed = at(T1)
    position.begin_finish(b"own")
    position.give_up(b"own")
    position.receive(feed, [own(T1, T2, A), change(T2, T3, B)])
    called: list[bytes] = []
    position.finished(feed, own(T1, T2, A), None, called.append)
    assert called == [T2]
    assert told.log == [(T2, [A]), (T3, [B])]
    assert position.tid == T3


def test_an_answer_with_a_gap_ends_the_session_and_still_calls_back():
    position, told, feed = at(T1)
    position.begin_finish(b"own")
    called: list[bytes] = []
    position.finished(feed, own(T3, T4, A), [change(T2, T3, B)], called.append)
    assert called == [T4]
    assert told.log == ["everything"]
    assert feed.closed
    assert position.tid == T1


def test_what_an_awaited_answer_may_bring_is_no_gap():
    """The server does not tell on the stream what it has told with the answer."""
    position, told, feed = at(T1)
    position.begin_finish(b"own")
    position.receive(feed, [change(T4, T5, C)])
    assert position.tid == T1
    assert not feed.closed
    others = [change(T1, T2, B), change(T3, T4, B)]
    position.finished(feed, own(T2, T3, A), others, told.see)
    assert told.log == [(T2, [B]), (T4, [B]), (T5, [C])]
    assert position.tid == T5
    assert not feed.closed


def test_an_own_change_waits_for_what_another_answer_brings_before_it():
    """Its own answer could not say what came before, and the stream was spared it."""
    position, told, feed = at(T1)
    position.begin_finish(b"first")
    position.begin_finish(b"own")
    first = change(T2, T3, B, transaction=b"first")
    position.receive(feed, [own(T3, T4, A)])
    finishing = Background(
        position.finished, feed, own(T1, T4, A), None, lambda tid: told.log.append(tid)
    )
    wait_until(waits(position), "its thread waits")
    assert position.tid == T1
    position.finished(feed, first, [change(T1, T2, C)], lambda _tid: None)
    finishing.result()
    assert told.log == [(T2, [C]), T4]
    assert position.tid == T4


def test_a_gap_is_seen_when_the_last_answer_came_without_what_is_missing():
    position, told, feed = at(T1)
    position.begin_finish(b"own")
    position.receive(feed, [own(T3, T4, A)])
    called: list[bytes] = []
    position.finished(feed, own(T1, T4, A), None, called.append)
    assert called == [T4]
    assert told.log == ["everything"]
    assert feed.closed


def test_what_a_lost_answer_would_have_brought_is_a_gap():
    position, _told, feed = at(T1)
    position.begin_finish(b"own")
    position.begin_finish(b"another")
    position.receive(feed, [change(T2, T3, A)])
    position.give_up(b"another")
    assert not feed.closed
    position.give_up(b"own")
    assert feed.closed


def test_what_a_lost_session_would_have_brought_is_left_to_the_next_one(caplog):
    position, told, feed = at(T1)
    position.begin_finish(b"own")
    position.receive(feed, [change(T2, T3, A)])
    position.leave(feed)
    position.give_up(b"own")
    assert not feed.closed
    assert not caplog.records
    position.adopt(Feed(), T3, [own(T1, T2, B), change(T2, T3, A)])
    assert told.tids() == [T2, T3]


def test_another_history_is_not_waited_for():
    """What came is not after the position: no answer leads there."""
    position, _told, feed = at(T3)
    position.begin_finish(b"own")
    position.receive(feed, [change(T2, T4, A)])
    assert "without our" in feed.closed[0]


# Sync


def test_a_sync_applies_what_it_brings():
    position, told, feed = at(T1)
    position.catch_up(feed, T3, [change(T1, T2, A), change(T2, T3, B)])
    assert told.log == [(T2, [A]), (T3, [B])]
    assert position.tid == T3


def test_a_sync_that_brings_what_is_known_changes_nothing():
    position, told, feed = at(T1)
    position.receive(feed, [change(T1, T2, A)])
    position.catch_up(feed, T2, [change(T1, T2, A)])
    assert told.log == [(T2, [A])]


def test_a_sync_waits_for_the_own_transaction_that_is_being_finished():
    position, told, feed = at(T1)
    position.begin_finish(b"own")
    syncing = Background(
        position.catch_up, feed, T3, [own(T1, T2, A), change(T2, T3, B)]
    )
    wait_until(waits(position), "the syncing thread waits")
    assert position.tid == T1
    position.finished(feed, own(T1, T2, A), [], told.see)
    syncing.result()
    assert position.tid == T3


def test_a_sync_waits_for_no_session_that_is_lost():
    position, _told, feed = at(T1)
    position.begin_finish(b"own")
    syncing = Background(position.catch_up, feed, T2, [own(T1, T2, A)])
    wait_until(waits(position), "the syncing thread waits")
    position.leave(feed)
    syncing.result()
    assert position.tid == T1


def test_a_sync_of_a_session_that_was_replaced_brings_nothing():
    position, told, old = at(T1)
    position.adopt(Feed(), T1, [])
    position.catch_up(old, T2, [change(T1, T2, A)])
    assert told.log == []


def test_a_verification_that_ends_before_the_position_goes_on_from_there():
    """An answer of the session before moved it while the welcome was on its way."""
    position, told, feed = at(T1)
    position.begin_finish(b"own")
    position.leave(feed)
    # The welcome of the next one stands at T2.
    changes = [change(T1, T2, A), change(T2, T3, B)]
    position.finished(feed, own(T3, T4, C), changes, lambda _tid: None)
    assert position.tid == T4
    verified = Feed()
    position.await_verification(verified)
    position.receive(verified, [change(T2, T3, B)])
    position.verified(verified, T2, [])
    position.receive(verified, [own(T3, T4, C), change(T4, T5, A)])
    assert not verified.closed
    assert told.tids()[-3:] == [T3, T4, T5]
    assert position.tid == T5


# All of it at once


class Waits(Exception):
    """The thread would wait here."""


class Steps(threading.Condition):
    """A condition that does not wait but raises: who waits is called again later.

    What `finished` and `catch_up` do before they wait may be done twice without harm,
    so to call them again is what waking them would be.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[dict[str, Any]] = []

    def wait(self, timeout: float | None = None) -> bool:
        raise Waits

    def notify_all(self) -> None:
        for waiter in self.waiting:
            waiter["is_notified"] = True


class Clients(RuleBasedStateMachine):
    """A server with its log, one storage, and everything that may come between.

    Rules are the steps of the server, of the connector, and of threads that finish
    or sync; hypothesis chooses their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cache = MemoryCache()
        self.position = Position(self.cache)
        self.steps = Steps()
        self.position._condition = self.steps
        # Those of the steps are not counted; somebody may always be there.
        self.position._waiting = 1
        self.register()
        # The server: its log, and what it still knows of it.
        self.log: list[Change] = [change(Z64, T1)]
        # Whatever was committed, and may be lost.
        self.made: dict[bytes, Change] = {}
        self.number = 0
        # What the database behind the storage was told: tid -> by whom.
        self.told: dict[bytes, list[str]] = {}
        self.everything_told_at = T1
        self.is_told_everything = False
        # Own transactions: asked to finish, then answered.
        self.asked: list[tuple[Feed, bytes, bytes]] = []
        self.answers: list[dict[str, Any]] = []
        self.syncs: list[dict[str, Any]] = []
        self.numbers = count(1)
        # Streams that are joined: what is on its way, in order.
        self.feed: Feed | None = None
        self.old_feeds: list[tuple[Feed, list[Change]]] = []
        self.on_its_way: list[Change] = []
        self.hello: tuple[Feed, bytes, list[Change] | None] | None = None
        self.after_hello: list[Change] = []
        # While what is cached is verified: through which tid, and which revisions.
        self.verifying: tuple[bytes, list[tuple[bytes, bytes]]] | None = None
        # The last tid that was ever given out.
        self.top = 1
        # Answers to loads that are on their way.
        self.loads: list[tuple[Any, ...]] = []
        self.begin_session()
        self.adopt()

    # What the position tells

    def register(self) -> None:
        self.position.register(self)

    def invalidate(self, tid: bytes, oids: list[bytes]) -> None:
        self.hear(tid, "stream")
        assert oids == self.change_at(tid).oids

    # The name is ZODB's.
    def invalidateCache(self) -> None:
        self.is_told_everything = True

    def hear(self, tid: bytes, way: str) -> None:
        at = self.position._tid
        assert at is not None
        if self.is_told_everything:
            if way == "stream":
                self.go_back(at)
            else:
                self.told_everything(tid)
        self.told.setdefault(tid, []).append(way)
        if way == "stream":
            assert at < tid
        untold = [
            each.tid
            for each in self.log
            if self.everything_told_at < each.tid < tid and each.tid not in self.told
        ]
        assert not untold, f"{way} tells of {tid.hex()} before {untold[0].hex()}"

    def told_everything(self, tid: bytes) -> None:
        """What is loaded from now on is loaded as of ``tid`` or later."""
        self.is_told_everything = False
        self.everything_told_at = max(self.everything_told_at, tid)

    def change_at(self, tid: bytes) -> Change:
        return self.made[tid]

    def since(self, tid: bytes) -> list[Change]:
        return [each for each in self.log if each.tid > tid]

    # The server

    @rule(oids=st.lists(st.sampled_from([A, B, C]), unique=True))
    def somebody_commits(self, oids: list[bytes]) -> None:
        self.commit(oids, None)

    def commit(self, oids: list[bytes], transaction: bytes | None) -> Change:
        self.top += 1
        made = Change(self.log[-1].tid, p64(self.top), oids, transaction)
        self.log.append(made)
        self.made[made.tid] = made
        if self.feed is not None:
            self.on_its_way.append(made)
        if self.hello is not None:
            self.after_hello.append(made)
        return made

    @precondition(lambda self: self.on_its_way)
    @rule(count=st.integers(1, 3))
    def stream_delivers(self, count: int) -> None:
        assert self.feed is not None
        come, self.on_its_way = self.on_its_way[:count], self.on_its_way[count:]
        self.position.receive(self.feed, come)

    @precondition(lambda self: any(late for _feed, late in self.old_feeds))
    @rule()
    def old_stream_delivers(self) -> None:
        for feed, late in self.old_feeds:
            self.position.receive(feed, [late.pop(0)] if late else [])

    # Loads

    def current(self, oid: bytes, through: bytes) -> bytes:
        """The tid of the revision that is current as of ``through``."""
        changed = [each.tid for each in self.log if oid in each.oids]
        return max([T1, *(tid for tid in changed if tid <= through)])

    @precondition(lambda self: self.feed is not None and self.verifying is None)
    @rule(oid=st.sampled_from([A, B, C]))
    def load_is_sent(self, oid: bytes) -> None:
        """For the snapshot that ends at the position, as ZODB does."""
        at = self.position.tid
        assert at is not None
        later = [each.tid for each in self.since(at) if oid in each.oids]
        end = later[0] if later else None
        as_of = self.log[-1].tid
        history = self.cache.history
        self.loads.append((oid, self.current(oid, at), end, b"data", as_of, history))

    @precondition(lambda self: self.loads)
    @rule(which=st.integers(0, 5))
    def load_is_answered(self, which: int) -> None:
        self.cache.store(*self.loads.pop(which % len(self.loads)))

    # Own transactions

    @precondition(lambda self: self.feed is not None and self.verifying is None)
    @rule()
    def finish_is_sent(self) -> None:
        assert self.feed is not None
        self.number += 1
        transaction = b"own %d" % self.number
        sent_at = self.position.begin_finish(transaction)
        self.asked.append((self.feed, transaction, sent_at))

    @precondition(lambda self: self.asked)
    @rule(
        which=st.integers(0, 5),
        is_known=st.booleans(),
        oid=st.sampled_from([A, B]),
        behind=st.integers(0, 2),
        on_its_way=st.integers(0, 3) | st.none(),
    )
    def server_finishes(
        self,
        which: int,
        is_known: bool,
        oid: bytes,
        behind: int,
        on_its_way: int | None,
    ) -> None:
        """With so many behind it in its group.

        Of what the answer tells only the first few are on the stream's way already,
        and the rest is not sent; or all is sent.
        """
        feed, transaction, sent_at = self.asked.pop(which % len(self.asked))
        made = self.commit([oid], transaction)
        for _ in range(behind):
            self.commit([C], None)
        others = [each for each in self.since(sent_at) if each is not made]
        before = [each for each in others if each.tid < made.tid]
        since = before[-1].tid if before and is_known else sent_at
        if is_known and on_its_way is not None and feed is self.feed:
            del self.on_its_way[on_its_way:]
        self.answers.append(
            {
                "feed": feed,
                "change": made._replace(since=since),
                "others": others if is_known else None,
                "is_notified": True,
            }
        )

    @precondition(lambda self: self.asked)
    @rule(which=st.integers(0, 5))
    def finish_is_lost_and_was_not_done(self, which: int) -> None:
        _feed, transaction, _sent_at = self.asked.pop(which % len(self.asked))
        self.position.give_up(transaction)

    @precondition(lambda self: self.answers)
    @rule(which=st.integers(0, 5))
    def answer_is_lost(self, which: int) -> None:
        """The thread asks the server what became of it, and hears: committed."""
        answer = self.answers[which % len(self.answers)]
        if answer not in self.steps.waiting:
            # The stream may have been spared what it told: the session ends.
            if answer["feed"] is self.feed:
                self.session_is_lost()
            self.position.give_up(answer["change"].transaction)
            answer["others"] = None

    @precondition(lambda self: self.answers)
    @rule(which=st.integers(0, 5))
    def answer_comes(self, which: int) -> None:
        answer = self.answers[which % len(self.answers)]
        if answer["is_notified"]:
            self.finish(answer)

    def finish(self, answer: dict[str, Any]) -> None:
        answer["is_notified"] = False

        def callback(tid: bytes) -> None:
            self.hear(tid, "callback")

        try:
            self.position.finished(
                answer["feed"], answer["change"], answer["others"], callback
            )
        except Waits:
            if answer not in self.steps.waiting:
                self.steps.waiting.append(answer)
        else:
            self.done(answer, self.answers)

    def done(self, waiter: dict[str, Any], among: list[dict[str, Any]]) -> None:
        among.remove(waiter)
        if waiter in self.steps.waiting:
            self.steps.waiting.remove(waiter)

    # Sync

    @precondition(lambda self: self.feed is not None and self.verifying is None)
    @rule()
    def sync_is_sent(self) -> None:
        at = self.position.tid
        assert at is not None
        self.syncs.append(
            {
                # Two that ask for the same are two.
                "number": next(self.numbers),
                "feed": self.feed,
                "last_tid": self.log[-1].tid,
                "changes": self.since(at),
                "is_notified": True,
            }
        )

    @precondition(lambda self: self.syncs)
    @rule(which=st.integers(0, 5))
    def sync_is_answered(self, which: int) -> None:
        sync = self.syncs[which % len(self.syncs)]
        if sync["is_notified"]:
            self.catch_up(sync)

    def catch_up(self, sync: dict[str, Any]) -> None:
        sync["is_notified"] = False
        try:
            self.position.catch_up(sync["feed"], sync["last_tid"], sync["changes"])
        except Waits:
            if sync not in self.steps.waiting:
                self.steps.waiting.append(sync)
        else:
            if sync["feed"] is self.feed:
                assert self.position.tid is not None
                assert self.position.tid >= sync["last_tid"]
            self.done(sync, self.syncs)

    # Sessions

    @precondition(lambda self: self.feed is not None)
    @rule()
    def session_is_lost(self) -> None:
        assert self.feed is not None
        self.position.leave(self.feed)
        self.old_feeds.append((self.feed, self.on_its_way))
        self.feed, self.on_its_way, self.verifying = None, [], None

    @precondition(
        lambda self: (
            self.feed is None
            and self.hello is None
            and not (self.asked or self.answers or self.syncs)
        )
    )
    @rule(lost=st.integers(1, 4))
    def server_is_restored(self, lost: int) -> None:
        """It gives no tid out again that a client may have seen."""
        del self.log[max(1, len(self.log) - lost) :]

    def is_in_history(self, tid: bytes | None) -> bool:
        return tid is None or tid in [each.tid for each in self.log]

    @precondition(lambda self: self.feed is None and self.hello is None)
    @rule(is_known=st.booleans())
    def begin_session(self, is_known: bool = True) -> None:
        at = self.position.tid
        is_known = is_known and self.is_in_history(at)
        changes = self.since(at or Z64) if is_known else None
        self.hello = Feed(), self.log[-1].tid, changes
        self.after_hello = []

    @precondition(lambda self: self.feed is None and self.hello is not None)
    @rule(verifies=st.booleans(), in_welcome=st.integers(0, 3))
    def adopt(self, verifies: bool = False, in_welcome: int = 3) -> None:
        """The welcome has the first changes, or all; or the cache is verified."""
        assert self.hello is not None
        feed, last_tid, changes = self.hello
        self.feed, self.on_its_way = feed, self.after_hello
        self.hello, self.after_hello = None, []
        if changes is None and verifies:
            self.position.await_verification(feed)
            batches = self.cache.open_revisions()
            self.verifying = last_tid, [each for batch in batches for each in batch]
            return
        if changes is not None and len(changes) > in_welcome > 0:
            self.on_its_way = changes[in_welcome:] + self.on_its_way
            changes = changes[:in_welcome]
        self.position.adopt(feed, last_tid, changes)
        self.go_on_from(last_tid)

    def go_on_from(self, tid: bytes) -> None:
        if self.is_told_everything:
            self.told_everything(tid)
            if self.position.tid == tid:
                self.go_back(tid)

    def go_back(self, tid: bytes) -> None:
        """The position may have been further; what lies after it is told again."""
        self.is_told_everything = False
        for each in [each for each in self.told if each > tid]:
            del self.told[each]
        self.everything_told_at = tid

    @precondition(lambda self: self.verifying is not None)
    @rule()
    def verification_ends(self) -> None:
        assert self.feed is not None
        assert self.verifying is not None
        (last_tid, revisions), self.verifying = self.verifying, None
        if self.is_in_history(self.position.tid):
            now = self.log[-1].tid
            stale = {oid for oid, tid in revisions if self.current(oid, now) != tid}
            self.position.verified(self.feed, last_tid, stale)
            self.go_on_from(last_tid)
            return
        known = [tid for tid in self.cache.known_tids() if self.is_in_history(tid)]
        if known:
            self.position.cut_back(self.feed, known[0])
            self.go_on_from(known[0])
            self.session_is_lost()
        else:
            before = self.position.tid
            self.position.verified(self.feed, last_tid, None)
            self.go_on_from(last_tid)
            assert before is not None
            if self.feed.closed:
                # What came before the position, from its other future, was dropped.
                assert before > last_tid
                self.session_is_lost()

    # What must hold

    @invariant()
    def what_is_cached_is_true(self) -> None:
        """As of the position, where the server's history has that."""
        at = self.position._tid
        assert at is not None
        if self.is_in_history(at):
            for oid in (A, B, C):
                found = self.cache.load(oid, p64(int.from_bytes(at, "big") + 1))
                assert found is None or found[1] == self.current(oid, at)

    @precondition(lambda self: self.feed is not None and self.verifying is None)
    @invariant()
    def the_position_is_one_of_the_servers(self) -> None:
        assert self.position._tid in [each.tid for each in self.log]

    @invariant()
    def what_is_seen_was_told(self) -> None:
        at = self.position.tid
        assert at is not None
        for each in self.log:
            if self.everything_told_at < each.tid <= at:
                assert each.tid in self.told

    @invariant()
    def everything_is_told_once(self) -> None:
        for tid, ways in self.told.items():
            assert ways.count("callback") <= 1, tid.hex()
            assert ways.count("stream") <= 1, tid.hex()
            if "stream" in ways and "callback" in ways:
                # Harmless, but only after a loss.
                assert self.change_at(tid).transaction is not None

    @invariant()
    def no_gap_is_seen_where_there_is_none(self) -> None:
        assert self.feed is None or not self.feed.closed

    @invariant()
    def who_could_go_on_was_woken(self) -> None:
        position = self.position
        assert position._tid is not None
        for waiter in self.steps.waiting:
            if waiter["is_notified"]:
                continue
            if "last_tid" in waiter:
                assert waiter["feed"] is position._source
                assert position._tid < waiter["last_tid"]
                continue
            tid = waiter["change"].tid
            pending = [each.tid for each in position._pending]
            assert position._tid < tid
            if position._is_verifying:
                # It is woken when that is over.
                assert tid in pending
                continue
            # What is missing there another answer may bring, or its thread gives it up.
            is_after_gap = pending and position._pending[0].since != position._tid
            if is_after_gap and position._unanswered:
                continue
            assert tid in pending[1:] or (
                waiter["feed"] is position._source and tid not in pending
            )

    def teardown(self) -> None:
        """In the end everybody goes on, and everything was told."""
        self.asked.clear()
        for answer in tuple(self.answers):
            if answer not in self.steps.waiting:
                self.finish(answer)
        while self.feed is None or self.verifying is not None:
            if self.verifying is not None:
                self.verification_ends()
            else:
                if self.hello is None:
                    self.begin_session()
                self.adopt()
        while self.on_its_way:
            self.stream_delivers(3)
        while notified := [each for each in self.steps.waiting if each["is_notified"]]:
            for waiter in notified:
                self.finish(waiter) if "change" in waiter else self.catch_up(waiter)
        self.what_is_seen_was_told()
        if not self.position._finishing:
            assert not self.steps.waiting
            assert self.position.tid == self.log[-1].tid


class ClientsOfZodb(Clients):
    """The same behind ZODB's own adapter, which is told of several changes at once."""

    def register(self) -> None:
        adapter = MVCCAdapter(SimpleNamespace())
        adapter.invalidate = self.invalidate_all
        adapter.invalidateCache = self.invalidateCache
        self.position.register(adapter)

    def invalidate_all(self, tid: bytes, oids: Iterable[bytes]) -> None:
        at = self.position._tid
        changes = [self.change_at(tid)]
        while changes[0].since != at:
            changes.insert(0, self.change_at(changes[0].since))
        assert list(oids) == [oid for each in changes for oid in each.oids]
        for each in changes:
            self.hear(each.tid, "stream")


TestClients = Clients.TestCase
TestClientsOfZodb = ClientsOfZodb.TestCase
TestClients.settings = TestClientsOfZodb.settings = settings(
    max_examples=200, stateful_step_count=50, deadline=None
)
