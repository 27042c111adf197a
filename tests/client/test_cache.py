"""Revisions in memory: never a wrong answer, whatever comes in whatever order."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    precondition,
    rule,
)
from ZODB.utils import p64

from zeolith.client import cache as cache_module
from zeolith.client.cache import ENTRY_BYTES, REVISIONS_MAX, MemoryCache
from zeolith.client.changes import Change
from zeolith.client.tids import MAX_TID, Z64

from ..support.changes import one_change
from ..support.gates import Background

A, B, C = p64(1), p64(2), p64(3)
T1, T2, T3, T4, T5 = map(p64, range(1, 6))

Answer = tuple[bytes, bytes, bytes | None, bytes, bytes, int]


def cache_at(tid: bytes, **options: Any) -> MemoryCache:
    cache = MemoryCache(**options)
    cache.forget_all(tid)
    return cache


class Truth:
    """Every revision there ever was: what a server answers."""

    def __init__(self) -> None:
        self.last = 1
        # No tid up to this one is used again, whatever happens.
        self.floor = 1
        self.changes: list[tuple[int, list[int]]] = []

    def commit(self, gap: int, oids: list[int]) -> int:
        self.last = self.floor = self.floor + gap
        self.changes.append((self.last, oids))
        return self.last

    def restore(self, changes: int) -> None:
        """Nobody but the clients knows of more than the first ones."""
        del self.changes[changes:]
        self.last = self.changes[-1][0] if changes else 1

    def load(self, oid: int, before: int) -> tuple[bytes, bytes, bytes | None] | None:
        tids = [1, *(tid for tid, oids in self.changes if oid in oids)]
        earlier = [tid for tid in tids if tid < before]
        if not earlier:
            return None
        later = [tid for tid in tids if tid >= before]
        end = p64(later[0]) if later else None
        return b"%d at %d" % (oid, earlier[-1]), p64(earlier[-1]), end


OIDS = range(1, 4)
some_oid = st.sampled_from(OIDS)
some_oids = st.lists(some_oid, unique=True)


class CacheAgainstTruth(RuleBasedStateMachine):
    """Answers and changes arrive late; evictions and restarts come in between."""

    answers = Bundle("answers")

    def __init__(self) -> None:
        super().__init__()
        self.truth = Truth()
        # Room for a few revisions only: there must be evictions.
        self.cache = cache_at(p64(1), cache_bytes=6 * (ENTRY_BYTES + 10))
        # How many changes the cache was told.
        self.applied = 0
        # While it is verified: the change through which, and what is looked at.
        self.verifying: tuple[int, list[tuple[bytes, bytes]]] | None = None

    @rule(gap=st.integers(1, 3), oids=some_oids)
    def commit(self, gap: int, oids: list[int]) -> None:
        self.truth.commit(gap, oids)

    @precondition(lambda self: self.applied < len(self.truth.changes))
    @precondition(lambda self: self.verifying is None)
    @rule(count=st.integers(1, 4))
    def apply(self, count: int = 1) -> None:
        """The next changes, or as many of them as there are."""
        changes = [
            Change(Z64, p64(tid), [p64(oid) for oid in oids], None)
            for tid, oids in self.truth.changes[self.applied : self.applied + count]
        ]
        self.cache.apply(changes)
        self.applied += len(changes)

    @precondition(lambda self: self.verifying is None)
    @rule(target=answers, oid=some_oid, back=st.integers(-1, 8))
    def ask(self, oid: int, back: int) -> Any:
        before = self.truth.last + 1 - back
        found = self.truth.load(oid, before)
        if found is None:
            return multiple()
        data, tid, end = found
        return p64(oid), tid, end, data, p64(self.truth.last), self.cache.history

    @rule(answer=answers)
    def store(self, answer: Answer) -> None:
        self.cache.store(*answer)

    @precondition(lambda self: self.verifying is None)
    @rule(gap=st.integers(1, 3), oids=some_oids)
    def commit_of_our_own(self, gap: int, oids: list[int]) -> None:
        while self.applied < len(self.truth.changes):
            self.apply()
        tid = self.truth.commit(gap, oids)
        self.apply()
        for oid in oids:
            self.cache.store(
                p64(oid), p64(tid), None, b"%d at %d" % (oid, tid), p64(tid)
            )

    @rule(oid=some_oid)
    def forget(self, oid: int) -> None:
        self.cache.forget(p64(oid))

    @precondition(lambda self: self.verifying is None)
    @rule()
    def forget_all(self) -> None:
        self.applied = len(self.truth.changes)
        self.cache.forget_all(p64(self.truth.last))

    @precondition(lambda self: self.verifying is None)
    @rule()
    def begin_to_verify(self) -> None:
        """Nobody can say what has changed since the last change that was applied."""
        batches = self.cache.open_revisions()
        self.verifying = len(self.truth.changes), [each for b in batches for each in b]

    @precondition(lambda self: self.verifying is not None)
    @rule(is_lost=st.booleans())
    def verify(self, is_lost: bool) -> None:
        """The server says what is not current now; or is lost before."""
        assert self.verifying is not None
        applied, revisions = self.verifying
        self.verifying = None
        if is_lost:
            return
        stale = set()
        for oid, tid in revisions:
            current = self.truth.load(int.from_bytes(oid, "big"), self.truth.last + 1)
            assert current is not None
            if current[1] != tid:
                stale.add(oid)
        self.applied = applied
        self.cache.verified(p64(self._applied_tid()), stale)

    @precondition(lambda self: self.verifying is None)
    @rule(lost=st.integers(1, 5))
    def restore(self, lost: int) -> None:
        """The server is an older copy; the last tid in common is not the last one."""
        self.truth.restore(max(0, len(self.truth.changes) - lost))
        tids = [p64(1), *(p64(tid) for tid, _oids in self.truth.changes)]
        common = [tid for tid in self.cache.known_tids() if tid in tids]
        assert self.cache.known_tids() == sorted(self.cache.known_tids(), reverse=True)
        if common:
            self.cache.cut_back(common[0])
            self.applied = tids.index(common[0])
        else:
            self.forget_all()

    @rule(oid=some_oid)
    def read(self, oid: int) -> None:
        """Gives a second chance at eviction."""
        self.cache.load(p64(oid), p64(self.truth.last))

    @invariant()
    def every_answer_is_true_or_a_miss(self) -> None:
        for oid in OIDS:
            for before in range(self.truth.last + 4):
                answer = self.cache.load(p64(oid), p64(before))
                if answer is not None:
                    true = self.truth.load(oid, before)
                    assert true is not None
                    assert answer[:2] == true[:2]
                    assert answer[2] in (None, true[2])
                    assert before <= self.truth.last + 1
                    assert answer[2] or before <= self._applied_tid() + 1

    @invariant()
    def what_is_counted_is_there(self) -> None:
        entries = [e for each in self.cache._by_oid.values() for e in each]
        assert set(entries) == set(self.cache._entries)
        size = sum(len(entry.data) + ENTRY_BYTES for entry in entries)
        assert size == self.cache.used_bytes <= self.cache.cache_bytes
        assert all(self.cache._by_oid.values())

    def _applied_tid(self) -> int:
        return self.truth.changes[self.applied - 1][0] if self.applied else 1


class ForgetfulCacheAgainstTruth(CacheAgainstTruth):
    """The same, with a memory for changes and revisions that is always too short."""

    def __init__(self) -> None:
        super().__init__()
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(cache_module, "RECENT_OIDS_MAX", 2)
        self._patch.setattr(cache_module, "REVISIONS_MAX", 2)

    def teardown(self) -> None:
        self._patch.undo()


TestCacheAgainstTruth = CacheAgainstTruth.TestCase
TestCacheAgainstTruth.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None
)


TestForgetfulCacheAgainstTruth = ForgetfulCacheAgainstTruth.TestCase
TestForgetfulCacheAgainstTruth.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None
)


# When it is not known what has changed


def test_only_open_revisions_are_looked_at_and_in_batches(monkeypatch):
    monkeypatch.setattr(cache_module, "BATCH_MAX", 2)
    cache = cache_at(T1)
    for oid in (A, B, C):
        cache.store(oid, T1, None, b"data", T1)
    cache.store(p64(4), Z64, T1, b"ended", T1)
    assert list(cache.open_revisions()) == [[(A, T1), (B, T1)], [(C, T1)]]
    assert list(cache_at(T1).open_revisions()) == []


def test_what_was_asked_for_before_the_revisions_were_looked_at_is_not_kept():
    cache = cache_at(T1)
    history = cache.history
    batches = cache.open_revisions()
    cache.store(A, T1, None, b"late", T1, history)
    cache.store_committed(T2, {B: b"late"}, history)
    assert list(batches) == []
    assert len(cache) == 0


def test_what_is_current_is_good_through_the_verification_and_the_rest_is_gone():
    cache = cache_at(T2)
    cache.store(A, T1, None, b"a", T2)
    cache.store(B, T2, None, b"b", T2)
    cache.store(B, T1, T2, b"older b", T2)
    used = cache.used_bytes
    cache.verified(T4, {B, C})
    assert cache.valid_through == T4
    assert cache.load(A, T5) == (b"a", T1, None)
    assert cache.load(B, T5) is None
    assert cache.load(B, T2) == (b"older b", T1, T2)
    assert cache.used_bytes < used
    # Answers of before are judged by nothing that is known.
    cache.store(B, T2, None, b"b", T3)
    assert cache.load(B, T5) is None


def test_what_came_after_the_cut_is_gone_and_what_it_ended_too():
    cache = cache_at(T1)
    history = cache.history
    cache.store(A, T1, None, b"a", T1)
    cache.store(B, T1, None, b"b", T1)
    for tid in (T2, T3, T4):
        cache.apply(one_change(tid, [B] if tid == T4 else []))
    cache.store(B, T4, None, b"new b", T4)
    cache.store(C, Z64, T2, b"ended before", T4)
    cache.cut_back(T3)
    assert cache.valid_through == T3
    assert cache.history > history
    assert cache.load(A, T4) == (b"a", T1, None)
    assert cache.load(B, T4) is None
    assert cache.load(B, T5) is None
    assert cache.load(C, T2) == (b"ended before", Z64, T2)
    assert cache.known_tids() == [T3, T2, T1]


def test_several_changes_at_once_are_each_remembered():
    cache = cache_at(T1)
    for oid in (A, B, C):
        cache.store(oid, T1, None, b"first", T1)
    cache.apply(
        [
            Change(T1, T2, [A], None),
            Change(T2, T3, [B, A], None),
            Change(T3, T4, [], None),
        ]
    )
    assert cache.valid_through == T4
    assert cache.known_tids() == [T4, T3, T2, T1]
    assert cache.load(A, T3) is None
    assert cache.load(A, T2) == (b"first", T1, T2)
    assert cache.load(B, T3) == (b"first", T1, T3)
    assert cache.load(C, T5) == (b"first", T1, None)
    # True as of T2 and of T3: later changes, and these only, are known to touch them.
    cache.store(B, T2, None, b"late", T2)
    cache.store(A, T2, None, b"late", T2)
    cache.store(A, T3, None, b"current", T3)
    assert cache.load(B, T4) is None
    assert cache.load(A, T5) == (b"current", T3, None)


def test_tids_of_long_ago_are_remembered_sparsely():
    cache = cache_at(T1)
    for number in range(2, 2001):
        cache.apply(one_change(p64(number), []))
    tids = [int.from_bytes(tid, "big") for tid in cache.known_tids()]
    assert tids[:20] == list(range(2000, 1980, -1))
    assert tids[-1] == 1
    assert len(tids) <= 100
    assert len(cache._tids) <= 301
    cache.forget_all(T2)
    assert cache.known_tids() == [T2]


# What an entry is good for


def test_an_open_revision_is_good_up_to_the_last_applied_change():
    cache = cache_at(T3)
    cache.store(A, T1, None, b"data", T3)
    assert cache.load(A, T4) == (b"data", T1, None)
    assert cache.load(A, T5) is None
    assert cache.load(A, MAX_TID) is None
    cache.apply(one_change(T4, [B]))
    assert cache.load(A, T5) == (b"data", T1, None)


def test_a_change_closes_the_revision_before_it():
    cache = cache_at(T2)
    cache.store(A, T1, None, b"data", T2)
    cache.apply(one_change(T3, [A]))
    assert cache.load(A, T3) == (b"data", T1, T3)
    assert cache.load(A, T4) is None


def test_a_snapshot_before_the_first_revision_is_a_miss():
    cache = cache_at(T3)
    cache.store(A, T2, None, b"data", T3)
    assert cache.load(A, T2) is None
    assert cache.load(A, T1) is None


def test_several_revisions_answer_for_their_own_snapshots():
    cache = cache_at(T5)
    cache.store(A, T3, None, b"third", T5)
    cache.store(A, T1, T2, b"first", T5)
    assert cache.load(A, T2) == (b"first", T1, T2)
    assert cache.load(A, T3) is None
    assert cache.load(A, T4) == (b"third", T3, None)


def test_an_old_answer_is_kept_open_if_nothing_touched_the_object_since():
    cache = cache_at(T2)
    cache.apply(one_change(T3, [B]))
    cache.store(A, T1, None, b"data", T2)
    assert cache.load(A, T4) == (b"data", T1, None)


def test_an_old_answer_is_not_kept_if_the_object_changed_since():
    cache = cache_at(T2)
    cache.apply(one_change(T3, [A]))
    cache.store(A, T1, None, b"old", T2)
    assert cache.load(A, T4) is None
    assert len(cache) == 0


def test_an_answer_from_before_all_memory_is_not_kept():
    """Nobody knows what changed between it and the start afresh."""
    cache = cache_at(T1)
    cache.forget_all(T4)
    cache.store(A, T1, None, b"old", T3)
    assert cache.load(A, T5) is None


def test_a_lower_last_change_is_a_start_like_any_other():
    """The server was restored from a backup; its tids are smaller now."""
    cache = cache_at(T3)
    cache.apply(one_change(T5, [A]))
    cache.forget_all(T2)
    cache.apply(one_change(T3, [B]))
    cache.store(A, T1, None, b"data", T2)
    assert cache.load(A, T4) == (b"data", T1, None)


def test_an_answer_that_is_ahead_waits_for_the_changes_to_catch_up():
    cache = cache_at(T2)
    cache.store(A, T4, None, b"new", T4)
    assert cache.load(A, T3) is None
    assert cache.load(A, T5) is None
    cache.apply(one_change(T3, []))
    cache.apply(one_change(T4, [A]))
    assert cache.load(A, T5) == (b"new", T4, None)


def test_the_change_that_made_a_revision_does_not_close_it():
    """Its answer may come before the news of it."""
    cache = cache_at(T1)
    cache.store(A, T2, None, b"data", T2)
    cache.apply(one_change(T2, [A]))
    cache.apply(one_change(T3, [B]))
    assert cache.load(A, T4) == (b"data", T2, None)


def test_what_we_have_committed_is_there_at_once():
    cache = cache_at(T1)
    cache.store(A, T1, None, b"old", T1)
    cache.apply(one_change(T2, [A]))
    cache.store(A, T2, None, b"new", T2)
    assert cache.load(A, T2) == (b"old", T1, T2)
    assert cache.load(A, T3) == (b"new", T2, None)


def test_what_a_transaction_has_written_is_kept_together():
    cache = cache_at(T1)
    cache.store(A, T1, None, b"old", T1)
    cache.apply(one_change(T2, [A, B]))
    cache.store_committed(T2, {A: b"new", B: b"first"}, cache.history)
    assert cache.load(A, T2) == (b"old", T1, T2)
    assert cache.load(A, T3) == (b"new", T2, None)
    assert cache.load(B, T3) == (b"first", T2, None)
    # And a change closes it like anything else.
    cache.apply(one_change(T3, [A]))
    assert cache.load(A, T4) is None
    assert cache.load(B, T4) == (b"first", T2, None)


def test_what_others_have_changed_since_it_was_written_is_not_kept():
    cache = cache_at(T1)
    cache.apply(one_change(T2, [A, B]))
    cache.apply(one_change(T3, [A]))
    cache.store_committed(T2, {A: b"too late", B: b"mine"}, cache.history)
    assert cache.load(A, T4) is None
    assert cache.load(B, T4) == (b"mine", T2, None)


def test_what_was_written_to_a_history_that_was_given_up_is_not_kept():
    cache = cache_at(T3)
    history = cache.history
    cache.forget_all(T2)
    cache.store_committed(T3, {A: b"lost"}, history)
    cache.apply(one_change(T3, [B]))
    assert cache.load(A, T4) is None


def test_of_what_was_written_only_what_is_not_too_large_is_kept():
    cache = cache_at(T1, cache_bytes=10_000)
    cache.apply(one_change(T2, [A, B]))
    cache.store_committed(T2, {A: b"x" * 3000, B: b"x"}, cache.history)
    assert cache.load(A, T3) is None
    assert cache.load(B, T3) == (b"x", T2, None)
    many = {p64(number): b"x" for number in range(100)}
    cache.apply(one_change(T3, list(many)))
    cache.store_committed(T3, many, cache.history)
    assert cache.used_bytes <= 10_000


def test_an_object_that_is_twice_in_a_change_is_changed_once():
    cache = cache_at(T1)
    cache.store(A, T1, None, b"old", T1)
    cache.apply(one_change(T2, [A, A]))
    cache.store(A, T2, None, b"new", T2)
    assert cache.load(A, T3) == (b"new", T2, None)
    assert cache.load(A, T2) == (b"old", T1, T2)


def test_the_same_revision_is_kept_once():
    cache = cache_at(T1)
    for _ in range(3):
        cache.store(A, T1, None, b"data", T1)
    assert len(cache) == 1
    assert cache.used_bytes == len(b"data") + ENTRY_BYTES
    cache.forget(A)
    assert cache.used_bytes == 0


def test_a_closed_revision_stays_closed_when_an_open_one_comes_late():
    cache = cache_at(T1)
    cache.store(A, T1, None, b"data", T1)
    cache.apply(one_change(T2, [A]))
    cache.store(A, T1, None, b"data", T1)
    assert cache.load(A, T3) is None


def test_a_forgotten_object_is_a_miss_and_the_others_stay():
    cache = cache_at(T1)
    cache.store(A, T1, None, b"a", T1)
    cache.store(B, T1, None, b"b", T1)
    cache.forget(A)
    cache.forget(C)
    assert cache.load(A, T2) is None
    assert cache.load(B, T2) == (b"b", T1, None)


def test_hits_and_misses_are_counted():
    cache = cache_at(T1)
    cache.store(A, T1, None, b"a", T1)
    cache.load(A, T2)
    cache.load(A, T2)
    cache.load(B, T2)
    assert (cache.hits, cache.misses) == (2, 1)


def test_an_answer_from_a_history_that_was_given_up_is_not_kept():
    """The server was restored from a backup while an answer was on its way."""
    cache = cache_at(T3)
    late_answer = (A, T3, None, b"from the lost history", T3, cache.history)
    cache.forget_all(T2)
    cache.store(*late_answer)
    cache.apply(one_change(T4, [B]))
    assert cache.load(A, T5) is None


# Bounds


def test_it_is_bounded_in_bytes():
    size = 100 + ENTRY_BYTES
    cache = cache_at(T1, cache_bytes=10 * size)
    for number in range(100):
        cache.store(p64(number), T1, None, b"x" * 100, T1)
        assert cache.used_bytes <= cache.cache_bytes
    assert 0 < len(cache) <= 10
    assert cache.load(p64(99), T2) is not None


def test_what_was_read_outlives_what_was_not():
    size = 100 + ENTRY_BYTES
    cache = cache_at(T1, cache_bytes=10 * size)
    cache.store(A, T1, None, b"x" * 100, T1)
    for number in range(100, 200):
        cache.store(p64(number), T1, None, b"x" * 100, T1)
        assert cache.load(A, T2) is not None


def test_what_was_read_once_goes_in_the_end():
    size = 100 + ENTRY_BYTES
    cache = cache_at(T1, cache_bytes=10 * size)
    cache.store(A, T1, None, b"x" * 100, T1)
    cache.load(A, T2)
    for number in range(100, 200):
        cache.store(p64(number), T1, None, b"x" * 100, T1)
    assert cache.load(A, T2) is None


def test_an_object_that_changes_with_every_commit_does_not_fill_the_cache():
    cache = cache_at(T1)
    last = 10 * REVISIONS_MAX
    for number in range(2, last + 1):
        cache.apply(one_change(p64(number), [A]))
        cache.store(A, p64(number), None, b"data", p64(number))
    assert len(cache) == REVISIONS_MAX
    assert cache.used_bytes == REVISIONS_MAX * (4 + ENTRY_BYTES)
    assert cache.load(A, p64(last + 1)) == (b"data", p64(last), None)
    assert cache.load(A, T3) is None


def test_a_record_that_would_push_out_everything_is_not_kept():
    cache = cache_at(T1, cache_bytes=4000)
    cache.store(A, T1, None, b"x" * 1001, T1)
    assert len(cache) == 0
    cache.store(A, T1, None, b"x" * (1000 - ENTRY_BYTES), T1)
    assert len(cache) == 1


def test_a_cache_of_no_bytes_keeps_nothing():
    cache = cache_at(T1, cache_bytes=0)
    cache.store(A, T1, None, b"", T1)
    assert cache.load(A, T2) is None
    assert cache.used_bytes == 0


def test_the_memory_for_changes_is_bounded(monkeypatch):
    monkeypatch.setattr(cache_module, "RECENT_OIDS_MAX", 3)
    cache = cache_at(T1)
    cache.apply(one_change(T2, [A, B]))
    cache.apply(one_change(T3, [C, p64(4)]))
    assert len(cache._recent) <= 3
    cache.apply(one_change(T4, [p64(number) for number in range(10, 20)]))
    assert len(cache._recent) <= 3
    # What was forgotten is not guessed.
    cache.store(A, T1, None, b"old", T1)
    cache.store(p64(10), T1, None, b"old", T3)
    assert cache.load(A, T5) is None
    assert cache.load(p64(10), T5) is None


# Threads


class Switch:
    """Runs `other` in the middle of a function, before its `at`-th bytecode."""

    def __init__(self, code: Any, at: int, other: Callable[[], None]):
        self._code = code
        self._left = at
        self._other: Callable[[], None] | None = other

    def __call__(self, frame: Any, event: str, _argument: Any) -> Any:
        if frame.f_code is not self._code:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            if self._left == 0 and self._other is not None:
                other, self._other = self._other, None
                sys.settrace(None)
                other()
            self._left -= 1
        return self

    @property
    def has_happened(self) -> bool:
        return self._other is None


def warm_up() -> None:
    """Nothing, in which a switch may be made."""


def with_switch(switch: Switch, function: Callable[..., Any], *args: Any) -> Any:
    """What `function` returns when the switch is made in the middle of it."""
    tracer = sys.gettrace()
    # Python 3.12 tells of opcodes only from the call after the first one on.
    sys.settrace(Switch(warm_up.__code__, 0, warm_up))
    warm_up()
    sys.settrace(switch)
    try:
        return function(*args)
    finally:
        sys.settrace(tracer)


def change(cache: MemoryCache) -> None:
    cache.apply(one_change(T3, [A]))


def change_by_us(cache: MemoryCache) -> None:
    cache.apply(one_change(T3, [A]))
    cache.store(A, T3, None, b"new", T3)


def other_change_and_late_answer(cache: MemoryCache) -> None:
    cache.apply(one_change(T3, [A]))
    cache.store(A, T1, None, b"old", T2)


def change_after_eviction(cache: MemoryCache) -> None:
    cache.forget(A)
    cache.apply(one_change(T3, [A]))
    cache.store(A, T3, None, b"new", T3)


def start_afresh(cache: MemoryCache) -> None:
    cache.forget_all(T3)


WRITERS = [
    change,
    change_by_us,
    other_change_and_late_answer,
    change_after_eviction,
    start_afresh,
]
# A is changed at T3 while it is being loaded: what each snapshot holds.
TRUE_BEFORE = {T2: (b"old", T1), T3: (b"old", T1), T4: (b"new", T3)}
EVERY_BYTECODE = range(1000)


@pytest.mark.parametrize("meanwhile", WRITERS)
@pytest.mark.parametrize("before", TRUE_BEFORE, ids=["T2", "T3", "T4"])
def test_a_change_in_the_middle_of_a_load_makes_no_stale_answer(meanwhile, before):
    for at in EVERY_BYTECODE:
        cache = cache_at(T2)
        cache.store(A, T1, None, b"old", T2)
        switch = Switch(MemoryCache.load.__code__, at, partial(meanwhile, cache))
        answer = with_switch(switch, cache.load, A, before)
        assert answer is None or answer[:2] == TRUE_BEFORE[before], f"bytecode {at}"
        if not switch.has_happened:
            break
    assert at > 20, "there was no switch in the middle of the load"


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    "method", ["apply", "store", "forget", "forget_all", "_remove", "_remember"]
)
def test_a_load_in_the_middle_of_a_change_is_not_stale(writer, method):
    for at in EVERY_BYTECODE:
        cache = cache_at(T2)
        cache.store(A, T1, None, b"old", T2)

        def load(cache: MemoryCache = cache, at: int = at) -> None:
            for before, truth in TRUE_BEFORE.items():
                answer = cache.load(A, before)
                assert answer is None or answer[:2] == truth, f"bytecode {at}"

        switch = Switch(getattr(MemoryCache, method).__code__, at, load)
        with_switch(switch, writer, cache)
        if not switch.has_happened:
            break


def test_a_load_waits_for_no_lock():
    cache = cache_at(T1)
    cache.store(A, T1, None, b"data", T1)
    with cache._lock:
        loading = Background(cache.load, A, T2)
        assert loading.result() == (b"data", T1, None)


def test_a_forked_child_begins_with_an_empty_cache_and_a_free_lock():
    """The parent's thread that held the lock is not in the child."""
    cache = cache_at(T1)
    cache.store(A, T1, None, b"data", T1)
    cache._lock.acquire()
    cache.reset(T2)
    assert len(cache) == 0
    assert cache.load(A, T2) is None
    cache.store(A, T2, None, b"data", T2)
    assert cache.load(A, T3) == (b"data", T2, None)


def test_a_new_cache_knows_nothing():
    cache = MemoryCache()
    assert cache.valid_through == Z64
    assert cache.load(A, T1) is None
    assert len(cache) == 0


def test_what_one_session_told_ahead_of_its_changes_ends_with_it():
    """The next server may be restored from a copy that has only what we know of."""
    cache = cache_at(T1)
    history = cache.history
    cache.store(A, T3, None, b"lost", T3, history)
    cache.store(B, T1, T3, b"is open here", T3, history)
    cache.store(C, T1, None, b"data", T1, history)
    assert not cache.identify(b"database", 1)
    cache.store(A, T3, None, b"lost, and late", T3, history)
    cache.store_committed(T3, {A: b"lost, too"}, history)
    cache.apply(one_change(T2, []))
    cache.apply(one_change(T4, []))
    assert cache.load(A, T5) is None
    assert cache.load(B, T2) is None
    assert cache.load(C, T5) == (b"data", T1, None)
    assert len(cache) == 1


def test_what_was_ahead_and_is_not_any_more_outlives_its_session():
    cache = cache_at(T1)
    cache.store(A, T2, None, b"data", T2)
    cache.apply(one_change(T2, [A]))
    cache.identify(b"database", 1)
    assert cache.load(A, T3) == (b"data", T2, None)
