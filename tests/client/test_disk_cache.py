"""What a process does with the cache that it shares: right at every moment."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest
from ZODB.utils import p64

from zeolith.client import cache_file, cache_writer, disk_cache
from zeolith.client.cache_backlog import Batch
from zeolith.client.cache_file import CacheFile, State
from zeolith.client.cache_place import CachePlace
from zeolith.client.changes import Change
from zeolith.client.disk_cache import DiskCache
from zeolith.client.tids import MAX_TID, Z64, following

from ..support.changes import one_change
from ..support.waiting import wait_until

A, B, C = map(p64, (101, 102, 103))
T1, T2, T3, T4, T5, T6 = map(p64, range(1, 7))
SHOP, OTHER = b"s" * 16, b"o" * 16
MB = 1024**2

Open = Callable[..., DiskCache]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch) -> None:
    """Tests flush when they want to."""
    for wait in ("FLUSH_WAIT_S", "LATER_WAIT_S"):
        monkeypatch.setattr(cache_writer, wait, 1000)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Makes caches of the same directory, as processes do."""
    caches = []

    def open_one(ask: Any = None, database_id: bytes | None = SHOP) -> DiskCache:
        cache = DiskCache(CachePlace(tmp_path / "cache"), "1", 4 * MB, ask)
        if database_id is not None:
            cache.identify(database_id, 1)
        caches.append(cache)
        return cache

    yield open_one
    for cache in caches:
        cache.close()


def flush(cache: DiskCache) -> None:
    """What the writer thread does some time."""
    cache._writer.have_done(cache._flush_safely)


def started(opened: Open, tid: bytes = T1) -> DiskCache:
    cache = opened()
    cache.forget_all(tid)
    return cache


def read(
    cache: DiskCache, oid: bytes, before: bytes
) -> tuple[bytes, bytes | None] | None:
    found = cache.load(oid, before)
    return None if found is None else found[1:]


# One process


def test_what_is_stored_is_read_before_it_is_written_and_after(opened):
    cache = started(opened)
    cache.store(A, T1, None, b"data", T1)
    assert cache.load(A, T2) == (b"data", T1, None)
    flush(cache)
    assert not cache._backlog.pending
    assert cache.load(A, T2) == (b"data", T1, None)
    assert read(cache, A, T1) is None
    assert read(cache, A, T3) is None, "nobody knows about T2"
    assert (cache.hits, cache.misses) == (2, 2)


@pytest.mark.parametrize("flushes", range(8))
def test_a_change_ends_what_it_touches_written_or_not(opened, flushes):
    cache = started(opened)
    for oid in (A, B):
        cache.store(oid, T1, None, b"data", T1)
    if flushes & 1:
        flush(cache)
    cache.apply(one_change(T2, [A]))
    if flushes & 2:
        flush(cache)
    cache.apply(one_change(T3, [A]))
    if flushes & 4:
        flush(cache)
    assert read(cache, A, T2) == (T1, T2)
    assert read(cache, A, T3) is None
    assert read(cache, B, T4) == (T1, None)


@pytest.mark.parametrize("is_flushed", [False, True])
def test_an_answer_that_is_older_than_a_change_is_good_until_then(opened, is_flushed):
    cache = started(opened)
    cache.apply(one_change(T2, [A]))
    if is_flushed:
        flush(cache)
    cache.store(A, T1, None, b"data", T1)
    assert read(cache, A, T3) is None
    flush(cache)
    assert read(cache, A, T3) is None
    cache.store(B, T1, None, b"data", T1)
    flush(cache)
    assert read(cache, B, T3) == (T1, None)


def test_an_own_commit_is_there_at_once(opened):
    cache = started(opened)
    cache.store(A, T1, None, b"old", T1)
    cache.apply(one_change(T2, [A, B]))
    cache.store_committed(T2, {A: b"new", B: b"other"}, cache.history)
    for _ in range(2):
        assert cache.load(A, T3) == (b"new", T2, None)
        assert cache.load(B, T3) == (b"other", T2, None)
        assert cache.load(A, T2) in ((b"old", T1, T2), None)
        flush(cache)
    assert cache.load(A, T2) == (b"old", T1, T2)


def test_what_was_asked_before_everything_was_forgotten_is_not_kept(opened):
    cache = started(opened)
    history = cache.history
    cache.forget_all(T2)
    cache.store(A, T1, None, b"data", T2, history)
    cache.store_committed(T2, {B: b"data"}, history)
    assert read(cache, A, T3) is None
    assert read(cache, B, T3) is None


@pytest.mark.parametrize("is_flushed", [False, True])
def test_what_is_forgotten_is_not_read_again_until_it_is_stored_again(
    opened, is_flushed
):
    cache = started(opened)
    for oid in (A, B):
        cache.store(oid, T1, None, b"wrong", T1)
    if is_flushed:
        flush(cache)
    cache.forget(A)
    assert cache.load(A, T2) is None
    cache.store(A, T1, None, b"right", T1)
    assert cache.load(A, T2) == (b"right", T1, None)
    flush(cache)
    assert cache.load(A, T2) == (b"right", T1, None)
    assert cache.load(B, T2) == (b"wrong", T1, None)


def test_what_is_forgotten_stays_so_wherever_we_go(opened):
    cache = started(opened)
    for oid in (A, B):
        cache.store(oid, T1, None, b"wrong", T1)
    flush(cache)
    cache.forget(A)
    cache.cut_back(T1)
    assert cache.load(A, T2) is None
    cache._go_aside("for a test")
    cache.forget(B)
    assert not cache.identify(SHOP, 1)
    assert cache.load(B, T2) is None


def test_what_is_too_large_to_be_worth_it_is_not_kept(opened):
    cache = started(opened)
    cache.store(A, T1, None, bytes(4 * MB // 64 + 1), T1)
    cache.store(B, T1, None, bytes(4 * MB // 64), T1)
    assert read(cache, A, T2) is None
    assert read(cache, B, T2) == (T1, None)


# The next process


def test_what_was_written_is_there_for_the_next_process(opened):
    cache = started(opened)
    cache.store(A, T1, None, b"data", T1)
    cache.apply(one_change(T2, [B]))
    cache.close()
    assert cache.load(A, T2) is None, "it is closed"
    again = opened(database_id=None)
    assert again.identity == (SHOP, 1)
    assert again.valid_through == T2
    assert again.load(A, T3) == (b"data", T1, None)
    assert not again.identify(SHOP, 1)


def test_changes_that_others_have_written_are_not_written_again(opened, monkeypatch):
    first, second = started(opened), opened(database_id=None)
    for cache in (first, second):
        cache.apply(one_change(T2, [A]))
    writes: list[bytes] = []
    extend = CacheFile.extend

    def counted(file: CacheFile, lineage: bytes, batch: Batch, *loads: Any) -> Any:
        writes.append(batch.base)
        return extend(file, lineage, batch, *loads)

    monkeypatch.setattr(CacheFile, "extend", counted)
    for cache in (first, second, first, second):
        flush(cache)
    assert writes == [T1]
    assert not second._backlog.changes, "they are in the file"
    second.store(B, T1, None, b"data", T2)
    for cache in (second, first):
        flush(cache)
    assert writes == [T1, T2]
    assert read(first, B, T3) == (T1, None)


def test_who_goes_another_way_is_told_although_he_writes_nothing(opened):
    first, second = started(opened), opened(database_id=None)
    first.apply(one_change(T3, [A]))
    second.apply(one_change(T2, [A]))
    for cache in (first, second):
        flush(cache)
    assert second.is_aside
    assert not first.is_aside


def test_it_asks_for_the_changes_since_the_file_and_applies_them(opened):
    cache = started(opened)
    for oid in (A, B):
        cache.store(oid, T1, None, b"data", T1)
    cache.close()
    again = opened(database_id=None)
    again.apply(one_change(T2, [A]))
    again.apply(one_change(T3, [C]))
    assert read(again, A, T4) is None
    assert read(again, B, T4) == (T1, None)


def test_another_database_has_a_file_of_its_own(opened, caplog):
    first = started(opened)
    first.store(A, T1, None, b"of the shop", T1)
    first.close()
    second = opened(database_id=None)
    assert second.identify(OTHER, 1), "what it stands at is not what it stood at"
    assert second.valid_through == Z64
    assert "another database" in caplog.text
    second.forget_all(T1)
    assert second.load(A, T2) is None
    second.store(A, T1, None, b"of another", T1)
    second.close()
    third = opened(database_id=None)
    assert third.identity == (OTHER, 1)
    assert third.identify(SHOP, 1)
    assert (third.valid_through, third.load(A, T2)) == (T1, (b"of the shop", T1, None))


def test_a_file_that_is_known_only_now_is_used(opened, tmp_path):
    cache = started(opened)
    cache.store(A, T1, None, b"data", T1)
    cache.close()
    (tmp_path / "cache" / "1.last").unlink()
    again = opened(database_id=None)
    assert (again.identity, again.valid_through) == (None, Z64)
    assert again.identify(SHOP, 1), "whoever asked for changes must ask again"
    assert again.valid_through == T1


# Several at once


def test_processes_share_what_one_of_them_has_loaded(opened):
    one, two = started(opened), opened()
    assert two.valid_through == T1
    one.store(A, T1, None, b"data", T1)
    flush(one)
    assert two.load(A, T2) == (b"data", T1, None)


@pytest.mark.parametrize("first", [0, 1])
def test_who_is_behind_and_who_is_ahead_read_what_is_right_for_them(opened, first):
    one, two = started(opened), opened()
    for oid in (A, B):
        one.store(oid, T1, None, b"old", T1)
    flush(one)
    one.apply(one_change(T2, [A]))
    one.apply(one_change(T3, [B]))
    two.apply(one_change(T2, [A]))
    if first:
        one.store_committed(T3, {B: b"new"}, one.history)
    flush(one)
    assert read(two, A, T3) is None
    assert read(two, A, T2) == (T1, T2)
    assert read(two, B, T3) in ((T1, None), (T1, T3))
    assert read(one, B, T3) == (T1, T3)
    flush(two)
    two.apply(one_change(T3, [B]))
    assert read(two, B, T4) == ((T3, None) if first else None)
    assert read(two, B, T3) == (T1, T3)


def test_what_one_has_not_applied_yet_is_not_open_for_the_other(opened):
    """R1 with two processes: the answer of one, the change of the other."""
    one, two = started(opened), opened()
    one.apply(one_change(T2, [A]))
    flush(one)
    two.store(A, T1, None, b"old", T1)
    flush(two)
    assert read(one, A, T3) is None
    two.apply(one_change(T2, [A]))
    assert read(two, A, T3) is None


def test_an_answer_that_is_ahead_of_who_asked_is_written_when_he_comes_there(opened):
    """The way from here to there is not known yet, and the file may go another one."""
    one, two = started(opened), opened()
    two.store(A, T3, None, b"new", T3)
    flush(two)
    one.apply(one_change(T2, [A]))
    one.apply(one_change(T3, [A]))
    flush(one)
    assert one.load(A, T4) is None
    assert two.load(A, T2) is None
    two.apply(one_change(T2, [A]))
    two.apply(one_change(T3, [A]))
    assert two.load(A, T4) == (b"new", T3, None)
    flush(two)
    assert one.load(A, T4) == (b"new", T3, None)


def test_what_one_session_told_ahead_of_its_changes_ends_with_it(opened):
    """The next server may be restored from a copy that has only what we know of."""
    cache = started(opened)
    history = cache.history
    cache.store(A, T3, None, b"lost", T3, history)
    cache.store(B, T1, T3, b"is open here", T3, history)
    cache.store(C, T1, None, b"data", T1, history)
    assert not cache.identify(SHOP, 1)
    cache.store(A, T3, None, b"lost, and late", T3, history)
    cache.apply(one_change(T2, []))
    cache.apply(one_change(T4, []))
    assert read(cache, A, T5) is None
    assert read(cache, B, T2) is None
    assert read(cache, C, T5) == (T1, None)


def standing_at(cache: DiskCache, tid: bytes) -> DiskCache:
    """``cache``, of a process that began at ``tid``, whatever there was in the file."""
    cache._stand_at(None, tid)
    cache.valid_through = tid
    return cache


def test_who_comes_to_a_file_that_is_behind_fetches_what_it_lacks(opened):
    asked = []

    def ask(position: bytes) -> list[Change]:
        asked.append(position)
        return [Change(T1, T2, [A], None), Change(T2, T3, [B], None)]

    one = started(opened)
    for oid in (A, B, C):
        one.store(oid, T1, None, b"data", T1)
    flush(one)
    two = standing_at(opened(ask), T3)
    two.apply(one_change(T4, [B]))
    assert two.load(C, T4) is None, "the file is behind it"
    flush(two)
    assert asked == [T1]
    assert read(two, C, T5) == (T1, None)
    assert read(two, A, T3) is None
    assert read(two, A, T2) == (T1, T2)
    assert read(two, B, T3) == (T1, T3)


def test_if_nobody_knows_what_it_lacks_it_is_begun_anew(opened):
    one = started(opened)
    one.store(A, T1, None, b"data", T1)
    flush(one)
    two = standing_at(opened(lambda position: None), T5)
    flush(two)
    assert not two.is_aside
    two.store(B, T5, None, b"data", T5)
    flush(two)
    assert two.load(B, T6) == (b"data", T5, None)
    assert two.load(A, T6) is None
    flush(one)
    assert one.load(A, T2) is None


@pytest.mark.parametrize("has_loaded", [False, True])
def test_a_file_that_is_begun_anew_while_it_is_written_to_is_looked_at_again(
    opened, monkeypatch, has_loaded
):
    """Two processes come to an empty database at once: each begins its cache."""
    one = started(opened, Z64)
    one.apply(one_change(T1, [A]))
    if has_loaded:
        one.store(B, T1, None, b"data", T1)
    two = opened(lambda _position: [Change(Z64, T1, [A], None)])
    looked = CacheFile.state

    def look(file: CacheFile) -> State | None:
        state = looked(file)
        monkeypatch.setattr(CacheFile, "state", looked)
        two.forget_all(Z64)
        assert looked(file) != state, "somebody has begun it anew"
        return state

    monkeypatch.setattr(CacheFile, "state", look)
    flush(one)
    assert not one.is_aside
    two.apply(one_change(T1, [A]))
    flush(two)
    assert not two.is_aside
    assert (read(two, B, following(T1)) is not None) == has_loaded


def test_a_server_that_is_away_is_asked_again(opened):
    answers: list[Any] = [ConnectionError("away")]

    def ask(_position: bytes) -> list[Change]:
        answer = answers.pop()
        if isinstance(answer, Exception):
            raise answer
        return answer

    one = started(opened)
    one.store(A, T1, None, b"data", T1)
    flush(one)
    two = standing_at(opened(ask), T2)
    flush(two)
    assert read(two, A, T3) is None
    answers.append([Change(T1, T2, [B], None)])
    flush(two)
    assert read(two, A, T3) == (T1, None)


def test_what_is_told_in_pieces_is_asked_for_until_it_is_all(opened):
    changes = {T1: Change(T1, T2, [A], None), T2: Change(T2, T4, [B], None)}
    one = started(opened)
    for oid in (A, B, C):
        one.store(oid, T1, None, b"data", T1)
    flush(one)
    two = standing_at(opened(lambda position: [changes[position]]), T4)
    flush(two)
    assert read(two, A, T2) == (T1, T2)
    assert read(two, B, T5) is None
    assert read(two, C, T5) == (T1, None)


def test_a_server_that_tells_something_else_is_not_believed(opened):
    one = started(opened)
    one.store(A, T1, None, b"data", T1)
    flush(one)
    two = standing_at(opened(lambda position: [Change(T1, T3, [B], None)]), T2)
    flush(two)
    assert two.is_aside


def test_who_goes_another_way_than_the_file_does_without_it(opened, caplog):
    one, two = started(opened), opened()
    one.store(A, T1, None, b"data", T1)
    one.apply(one_change(T3, [B]))
    flush(one)
    two.apply(one_change(T2, [A]))
    assert two.load(A, T3) is None
    two.apply(one_change(T4, [C]))
    assert two.load(A, T3) is None, "the file has been where it never was"
    flush(two)
    assert two.is_aside
    assert "another" in caplog.text
    two.store(A, T2, None, b"mine", T4)
    assert two.load(A, T5) == (b"mine", T2, None)
    assert one.load(A, T4) == (b"data", T1, None)


def test_who_went_aside_tries_again_with_the_next_session(opened):
    one, two = started(opened), opened()
    two._go_aside("for a test")
    one.store(A, T1, None, b"data", T1)
    one.apply(one_change(T2, [B]))
    flush(one)
    two.apply(one_change(T2, [B]))
    assert two.load(A, T3) is None
    assert not two.identify(SHOP, 1)
    assert not two.is_aside
    assert two.load(A, T3) == (b"data", T1, None)


# A history that was given up


def test_what_was_cut_back_is_gone_for_everybody(opened):
    one, two = started(opened), opened()
    for cache in (one, two):
        cache.apply(one_change(T2, [A]))
        cache.apply(one_change(T3, [A]))
    one.store(A, T3, None, b"lost", T3)
    one.store(B, T1, None, b"data", T3)
    flush(one)
    assert two.load(A, T4) == (b"lost", T3, None)
    one.cut_back(T2)
    assert (one.valid_through, one.load(A, T3)) == (T2, None)
    assert one.load(B, T3) == (b"data", T1, None)
    assert two.load(A, T4) is None, "the file is another one now"
    one.apply(one_change(T5, [B]))
    flush(one)
    two.cut_back(T2)
    assert not two.is_aside
    two.apply(one_change(T5, [B]))
    assert two.load(B, T5) == (b"data", T1, T5)
    assert two.load(A, T6) is None


def test_everything_is_forgotten_once_not_by_everybody(opened):
    one, two = started(opened), opened()
    one.store(A, T1, None, b"data", T1)
    flush(one)
    one.forget_all(T5)
    one.store(B, T5, None, b"new", T5)
    flush(one)
    assert two.load(A, T2) is None
    two.forget_all(T5)
    assert two.load(B, T6) == (b"new", T5, None)
    assert one.load(B, T6) == (b"new", T5, None)


def test_what_was_verified_is_current_and_the_rest_is_gone(opened):
    one = started(opened)
    for oid in (A, B):
        one.store(oid, T1, None, b"data", T1)
    flush(one)
    listed = [pair for batch in one.open_revisions() for pair in batch]
    assert listed == [(A, T1), (B, T1)]
    one.verified(T5, {B})
    assert one.valid_through == T5
    assert one.load(A, T6) == (b"data", T1, None)
    assert one.load(B, T6) is None
    assert one.known_tids()[0] == T5


def test_what_was_listed_in_part_is_not_verified(opened, monkeypatch):
    monkeypatch.setattr(cache_file, "BATCH_MAX", 1)
    one = started(opened)
    for oid in (A, B):
        one.store(oid, T1, None, b"data", T1)
    flush(one)
    assert list(one.open_revisions())
    assert next(one.open_revisions()) == [(A, T1)]
    one.verified(T5, {A})
    assert one.valid_through == T5
    assert one.load(B, T6) is None


# What goes wrong


def test_who_cannot_read_what_was_applied_knows_where_it_stands(opened, monkeypatch):
    cache = started(opened)

    def fail() -> Any:
        raise lmdb.CorruptedError("damaged")

    monkeypatch.setattr(cache._file, "known_tids", fail)
    assert cache.known_tids() == [T1]
    assert cache.errors == 1


def test_an_error_is_a_miss_and_is_counted(opened, monkeypatch, caplog):
    cache = started(opened)
    cache.store(A, T1, None, b"data", T1)
    flush(cache)

    def fail(*_args: Any) -> Any:
        raise lmdb.CorruptedError("damaged")

    with monkeypatch.context() as failing:
        failing.setattr(cache._file, "find", fail)
        assert cache.load(A, T2) is None
        assert cache.load(A, T2) is None
    assert cache.errors == 2
    assert caplog.text.count("damaged") == 1
    assert cache.load(A, T2) == (b"data", T1, None)


@pytest.mark.parametrize("error", [lmdb.DiskError("no space"), OSError(28, "no space")])
def test_what_cannot_be_written_is_no_ones_harm(opened, monkeypatch, error):
    cache, other = started(opened), opened()
    cache.store(A, T1, None, b"data", T1)
    flush(cache)

    def fail(*_args: Any) -> Any:
        raise error

    with monkeypatch.context() as failing:
        failing.setattr(cache._file, "extend", fail)
        cache.store(B, T1, None, b"data", T1)
        cache.apply(one_change(T2, [A]))
        flush(cache)
        assert read(cache, A, T3) is None
        assert read(cache, A, T2) == (T1, T2)
    assert cache.errors == 1
    assert not cache.is_aside
    flush(cache)
    other.apply(one_change(T2, [A]))
    assert read(other, A, T3) is None


def test_who_cannot_write_for_long_does_without_the_file(opened, monkeypatch):
    monkeypatch.setattr(disk_cache, "CHANGED_OIDS_MAX", 3)
    cache = started(opened)
    cache.store(A, T1, None, b"data", T1)
    cache.apply(one_change(T2, [B]))
    cache.apply(one_change(T3, [p64(1), p64(2), p64(3)]))
    assert cache.is_aside
    assert cache.valid_through == T3
    assert cache.load(A, T4) is None
    cache.store(A, T1, None, b"data", T3)
    assert cache.load(A, T4) == (b"data", T1, None)


def test_a_mistake_of_ours_ends_the_use_of_the_file_only(opened, monkeypatch, caplog):
    cache = started(opened)

    def fail(*_args: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(cache._file, "extend", fail)
    cache.apply(one_change(T2, [A]))
    flush(cache)
    assert cache.is_aside
    assert "ZeroDivisionError" in caplog.text


def test_nobody_waits_for_a_process_that_keeps_the_file_locked(opened, monkeypatch):
    monkeypatch.setattr(cache_writer, "WAIT_S", 0.05)
    cache = started(opened)
    cache.store(A, T1, None, b"data", T1)
    flush(cache)
    file: Any = cache._file
    locked, may_end = threading.Event(), threading.Event()

    def hold() -> None:
        with file._env.begin(write=True):
            locked.set()
            may_end.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    assert locked.wait(30)
    cache.apply(one_change(T2, [A]))
    assert read(cache, A, T2) == (T1, T2)
    cache.forget_all(T3)
    assert cache.is_aside
    assert cache.valid_through == T3
    may_end.set()
    holder.join()
    wait_until(lambda: cache._writer.close(), "the writer thread")


def test_a_file_that_cannot_be_opened_is_done_without(tmp_path, opened, caplog):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{SHOP.hex()}-1.lmdb").mkdir()
    cache = opened()
    assert cache.is_aside
    cache.forget_all(T1)
    cache.store(A, T1, None, b"data", T1)
    assert cache.load(A, T2) == (b"data", T1, None)
    assert "is not used" in caplog.text


# Forks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("is_flushed", [False, True])
def test_a_forked_child_has_the_file_and_all_changes(opened, is_flushed):
    cache = started(opened)
    for oid in (A, B):
        cache.store(oid, T1, None, b"data", T1)
    flush(cache)
    cache.apply(one_change(T2, [A]))
    if is_flushed:
        flush(cache)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            cache.reset(T2)
            seen = [read(cache, A, T3), read(cache, B, T3), read(cache, A, T2)]
            cache.apply(one_change(T3, [B]))
            cache.close()
            code = 0 if seen == [None, (T1, None), (T1, T2)] else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert read(cache, B, T3) in ((T1, None), (T1, T3))
    assert read(cache, A, T3) is None
    cache.apply(one_change(T3, [B]))
    assert read(cache, B, T4) is None


def test_who_reads_or_writes_while_another_thread_forks_has_no_error(
    opened, monkeypatch, caplog
):
    cache = started(opened)
    cache.store(A, T1, None, b"data", T1)
    flush(cache)
    file: Any = cache._file
    find = file.find

    def find_amid_a_fork(*args: Any) -> Any:
        file.pause()
        try:
            return find(*args)
        finally:
            file.resume()

    with monkeypatch.context() as forking:
        forking.setattr(file, "find", find_amid_a_fork)
        assert cache.load(A, T2) is None
    cache.store(B, T1, None, b"data", T1)
    file.pause()
    flush(cache)
    file.resume()
    assert cache.load(B, T2) == (b"data", T1, None)
    flush(cache)
    assert not cache._backlog.pending
    for oid in (A, B):
        assert cache.load(oid, T2) == (b"data", T1, None)
    assert cache.errors == 0
    assert not caplog.text


def test_another_error_behind_a_fork_is_counted(opened, monkeypatch):
    cache = started(opened)
    file = cache._file
    assert file is not None
    file.pause()
    file.resume()

    def fail(*_args: Any) -> Any:
        raise lmdb.CorruptedError("a revision is damaged")

    monkeypatch.setattr(file, "find", fail)
    assert cache.load(A, T2) is None
    assert cache.errors == 1


def test_what_is_forgotten_goes_from_the_file_although_nothing_else_waits(opened):
    cache = started(opened)
    cache.store(A, T1, None, b"data", T1)
    flush(cache)
    assert read(opened(), A, T2) == (T1, None)
    cache.forget(A)
    flush(cache)
    assert read(opened(), A, T2) is None


def test_a_cache_without_a_session_yet_is_in_memory(opened):
    cache = opened(database_id=None)
    assert cache.identity is None
    assert cache.load(A, MAX_TID) is None
    assert (len(cache), cache.used_bytes, cache.known_tids()) == (0, 0, [Z64])
    assert list(cache.open_revisions()) == []
    cache.reset(Z64)
    assert cache.is_aside
