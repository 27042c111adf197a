"""One cache file: what is true of it between any two write transactions."""

import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest
from ZODB.utils import p64

from zeolith.client import cache_environment, cache_file
from zeolith.client.cache import REVISIONS_MAX
from zeolith.client.cache_backlog import Batch, Revision
from zeolith.client.cache_file import Behind, CacheFile, Crowded, Foreign, Mark, State
from zeolith.client.changes import Change
from zeolith.client.tids import MAX_TID, Z64

A, B, C = map(p64, (101, 102, 103))
T1, T2, T3, T4, T5, T6 = map(p64, range(1, 7))
MB = 1024**2


@pytest.fixture
def file(tmp_path: Path) -> Iterator[CacheFile]:
    file = CacheFile(tmp_path / "x.lmdb", 4 * MB)
    yield file
    file.close()


def change(tid: bytes, *oids: bytes, since: bytes | None = None) -> Change:
    return Change(
        since or p64(int.from_bytes(tid) - 1), tid, list(oids or (p64(999),)), None
    )


def opened(oid: bytes, tid: bytes, as_of: bytes, data: bytes = b"data") -> Revision:
    return Revision(oid, tid, None, data, as_of)


def extend(
    file: CacheFile,
    lineage: bytes,
    base: bytes,
    changes: tuple[Change, ...] = (),
    revisions: tuple[Revision, ...] = (),
    forgotten: tuple[bytes, ...] = (),
) -> State:
    batch = Batch(base, changes, revisions, dict.fromkeys(forgotten, 1))
    return file.extend(lineage, batch)[0]


def found(
    file: CacheFile, oid: bytes, before: bytes
) -> tuple[bytes, bytes | None] | None:
    """tid and end of what is there for ``before``."""
    _state, tid, end, data = file.find(oid, before)
    return (tid, end) if data else None


def test_nobody_else_may_read_it(file):
    for each in file.path.parent.iterdir():
        assert stat.S_IMODE(each.stat().st_mode) == 0o600


def test_at_first_it_stands_nowhere(file):
    assert file.state() is None
    assert found(file, A, MAX_TID) is None
    with pytest.raises(Foreign):
        extend(file, b"anything", Z64)


def test_what_is_kept_is_found_with_the_state_it_is_true_in(file):
    state = file.start(T1, None)
    revision = opened(A, T1, T1, b"the record")
    state = extend(file, state.lineage, T1, (), (revision,))
    assert file.find(A, T2) == (b"".join(state), T1, None, b"the record")
    assert found(file, A, T1) is None, "it had not begun"
    assert found(file, B, T2) is None


def test_a_change_ends_what_began_before_it_and_that_stays_readable(file):
    lineage = file.start(T1, None).lineage
    extend(file, lineage, T1, (), (opened(A, T1, T1), opened(B, T1, T1)))
    state = extend(file, lineage, T1, (change(T2, A), change(T3, B)))
    assert state.through == T3
    assert found(file, A, T2) == (T1, T2)
    assert found(file, A, T3) is None
    assert found(file, B, T3) == (T1, T3)
    state = extend(file, lineage, T3, (), (opened(A, T2, T3),))
    assert found(file, A, T4) == (T2, None)
    assert found(file, A, T2) == (T1, T2)


def test_applying_a_change_twice_is_harmless(file):
    lineage = file.start(T1, None).lineage
    changes = (change(T2, A), change(T3, B))
    extend(file, lineage, T1, changes, (opened(A, T2, T3), opened(B, T3, T3)))
    for base, again in ((T1, changes), (T2, changes[1:])):
        assert extend(file, lineage, base, again).through == T3
        assert found(file, A, T4) == (T2, None)
        assert found(file, B, T4) == (T3, None)


@pytest.mark.parametrize(("as_of", "is_kept"), [(T1, False), (T2, False), (T3, True)])
def test_an_answer_from_before_a_change_of_its_object_is_not_open(file, as_of, is_kept):
    lineage = file.start(T1, None).lineage
    extend(file, lineage, T1, (change(T2, B), change(T3, A), change(T4, B)))
    extend(file, lineage, T4, (), (opened(A, T1, as_of),))
    assert (found(file, A, T5) is not None) is is_kept
    extend(file, lineage, T4, (), (opened(C, T1, T1),))
    assert found(file, C, T5) == (T1, None), "nothing has changed it since"


def test_what_is_older_than_all_that_is_remembered_is_not_kept(file, monkeypatch):
    monkeypatch.setattr(cache_file, "RECENT_OIDS_MAX", 1)
    lineage = file.start(T1, None).lineage
    state = extend(file, lineage, T1, (change(T2, A), change(T3, B)))
    assert state.since == T3
    extend(file, lineage, T3, (), (opened(C, T1, T2), opened(A, T2, T3)))
    assert found(file, C, T4) is None
    assert found(file, A, T4) == (T2, None)


def test_what_began_or_ended_ahead_of_the_file_is_not_kept(file):
    lineage = file.start(T1, None).lineage
    ahead = opened(A, T3, T4), Revision(B, T1, T3, b"data", T4)
    extend(file, lineage, T1, (), ahead)
    assert len(file) == 0
    extend(file, lineage, T1, (change(T2, A), change(T3, A, B)), ahead)
    assert found(file, A, T4) == (T3, None)
    assert found(file, B, T3) == (T1, T3)


def test_of_an_object_that_changes_always_only_some_revisions_are_kept(file):
    lineage = file.start(T1, None).lineage
    for number in range(1, 30):
        tid, following = p64(number), p64(number + 1)
        extend(file, lineage, tid, (), (opened(A, tid, tid),))
        extend(file, lineage, tid, (change(following, A),))
    ends = [found(file, A, p64(number)) for number in range(1, 31)]
    assert len(file) == REVISIONS_MAX
    assert ends[-1] == (p64(29), p64(30))


def test_what_is_forgotten_is_gone_and_what_comes_with_it_is_kept(file):
    lineage = file.start(T1, None).lineage
    extend(file, lineage, T1, (), (opened(A, T1, T1), opened(B, T1, T1)))
    extend(file, lineage, T1, (change(T2, A),), (opened(A, T2, T2),))
    extend(file, lineage, T2, (), (opened(A, T2, T2, b"new"),), (A,))
    assert found(file, A, T2) is None
    assert file.find(A, T3)[3] == b"new"
    assert found(file, B, T3) == (T1, None)


def test_a_revision_that_is_damaged_is_an_error(file):
    lineage = file.start(T1, None).lineage
    extend(file, lineage, T1, (), (opened(A, T1, T1),))
    with file._write() as txn:
        value = bytearray(txn.get(A, db=file._current))
        value[-1] ^= 1
        txn.put(A, bytes(value), db=file._current)
        txn.put(B, txn.get(A, db=file._current), db=file._current)
    for oid in (A, B):
        with pytest.raises(lmdb.CorruptedError, match=oid.hex()):
            file.find(oid, T2)


# Whose history it is


def test_whoever_lacks_what_the_file_lacks_must_fetch_it_first(file):
    lineage = file.start(T1, None).lineage
    with pytest.raises(Behind):
        extend(file, lineage, T3, (change(T4, A),))
    assert file.state().through == T1


@pytest.mark.parametrize(
    ("base", "tids", "agrees"),
    [
        (T1, [T2, T3, T4], True),  # It stands where we are.
        (T4, [], True),
        (T3, [T4], True),
        (T1, [T2, T3], True),  # It is ahead of us, on the way.
        (T1, [T2, T3, T4, T5], True),
        (T4, [T5], True),
        (T1, [T2, T5], False),  # We were never where it is.
        (T1, [T5], False),
        (T5, [], False),  # Behind us: nothing is known.
        (T5, [T6], False),
        (T1, [p64(2) + b""], True),
    ],
)
def test_it_counts_only_for_who_goes_through_where_it_stands(file, base, tids, agrees):
    lineage = file.start(T1, None).lineage
    state = extend(file, lineage, T1, (change(T2), change(T3), change(T4)))
    assert file.agrees(state, base, tids) is agrees


def test_who_is_where_it_never_was_may_not_write(file):
    lineage = file.start(T1, None).lineage
    state = extend(file, lineage, T1, (change(T3, since=T1), change(T5, since=T3)))
    for base, tids in ((T1, [T2]), (T1, [T4]), (T1, [T2, T4, T6])):
        changes = tuple(change(tid, A) for tid in tids)
        with pytest.raises(Foreign):
            extend(file, lineage, base, changes)
        assert not file.agrees(state, base, tids)
    assert file.state() == state


def test_a_new_lineage_is_everybodys(file):
    first = file.start(T3, None)
    extend(file, first.lineage, T3, (), (opened(A, T1, T3),))
    second = file.start(T5, first.lineage)
    assert (second.through, len(file)) == (T5, 0)
    with pytest.raises(Foreign):
        extend(file, first.lineage, T3)
    assert file.start(T5, first.lineage) == second, "somebody has done it already"
    assert file.start(T6, first.lineage) == second, "and will bring it there"
    assert file.start(T4, first.lineage) != second, "it never was there"


def test_the_tids_that_are_known_are_many_lately_and_few_long_ago(file, monkeypatch):
    monkeypatch.setattr(cache_file, "CHANGES_MAX", 400)
    lineage = file.start(p64(1), None).lineage
    for start in range(1, 2001, 100):
        numbers = range(start + 1, start + 101)
        extend(file, lineage, p64(start), tuple(change(p64(each)) for each in numbers))
    known = [int.from_bytes(each) for each in file.known_tids()]
    assert known == sorted(known, reverse=True)
    assert known[:20] == list(range(2001, 1981, -1))
    assert len(known) <= 100
    assert known[-1] < 300
    with file._env.begin() as txn:
        assert txn.stat(file._changes)["entries"] <= 400


# Verified, and cut back


def test_what_was_verified_is_open_and_the_rest_is_not(file):
    lineage = file.start(T1, None).lineage
    revisions = tuple(opened(oid, T1, T1) for oid in (A, B))
    extend(file, lineage, T1, (), revisions)
    mark = file.mark()
    listed = [pair for batch in file.open_revisions() for pair in batch]
    assert listed == [(A, T1), (B, T1)]
    extend(file, lineage, T1, (), (opened(C, T1, T1),))
    state = file.verified(mark, T5, [B], [T1])
    assert (state.through, state.since) == (T5, T5)
    assert state.lineage != lineage
    assert found(file, A, T6) == (T1, None)
    assert found(file, B, T6) is None
    assert found(file, C, T6) is None, "it came too late to be asked for"
    extend(file, state.lineage, T5, (), (opened(B, T1, T4),))
    assert found(file, B, T6) is None, "what changed before is not known"


def test_who_verified_later_than_somebody_else_takes_nothing_back(file):
    lineage = file.start(T1, None).lineage
    extend(file, lineage, T1, (change(T2), change(T3)), (opened(A, T1, T3),))
    state = file.verified(file.mark(), T2, [], [T1])
    assert state.through == T3
    assert found(file, A, T4) == (T1, None)
    with pytest.raises(Foreign):
        file.verified(Mark(b"another.", 0), T4, [], [T3])


def test_what_was_verified_ends_what_others_did_where_the_server_has_never_been(file):
    """Two servers with copies of one database: nobody knows which way the file went."""
    lineage = file.start(T1, None).lineage
    extend(file, lineage, T1, (), (opened(A, T1, T1), opened(B, T1, T1)))
    mark = file.mark()
    extend(file, lineage, T1, (change(T2, A), change(T3, B)))
    state = file.verified(mark, T5, [], [T1])
    assert found(file, A, T2) is None, "when it ended is not known"
    assert not file.agrees(state, T3, []), "it has not been there"
    assert file.agrees(state, T1, [])
    extend(file, state.lineage, T5, (change(T6, A),))
    with pytest.raises(Foreign):
        file.verified(file.mark(), p64(9), [], [T1, T4, p64(7)])


def test_what_is_kept_last_keeps_its_number(file):
    """Else what comes later may seem to have been there when all was listed."""
    lineage = file.start(T1, None).lineage
    extend(file, lineage, T1, (), (opened(A, T1, T1), opened(B, T1, T1)))
    mark = file.mark()
    file.cache_bytes = 0
    extend(file, lineage, T1)
    extend(file, lineage, T1, (), (opened(C, T1, T1),))
    assert file.mark().number > mark.number


def test_a_state_that_is_no_more_is_agreed_to_by_nobody(file):
    lineage = file.start(T1, None).lineage
    extend(file, lineage, T1, (change(T2, A), change(T4, A)))
    gone = file.state()
    file.cut_back(T1, {T2})
    extend(file, file.state().lineage, T1, (change(T3, A), change(T5, A)))
    assert not file.agrees(gone, T3, [])
    assert file.agrees(file.state(), T3, [])


def test_who_is_far_behind_is_not_taken_for_foreign(file, monkeypatch):
    """Of changes long ago only some are known: he may have been stopped for long."""
    monkeypatch.setattr(cache_file, "CHANGES_MAX", 8)
    lineage = file.start(T1, None).lineage
    extend(file, lineage, T1, tuple(change(p64(number)) for number in range(2, 40)))
    unknown = [
        p64(n) for n in range(2, 40) if not file.agrees(file.state(), p64(n), [])
    ]
    assert unknown
    for tid in unknown:
        with pytest.raises(Behind):
            extend(file, lineage, tid)
    # Of those not so long ago all are known.
    extend(file, lineage, p64(39), (change(p64(60), since=p64(39)),))
    with pytest.raises(Foreign):
        extend(file, lineage, p64(39), (change(p64(50), since=p64(39)),))


def test_what_has_never_been_where_it_is_cut_back_to_is_dropped(file):
    lineage = file.start(T1, None).lineage
    extend(file, lineage, T1, (change(T2, A), change(T4, A)), (opened(A, T1, T1),))
    extend(file, lineage, T4, (change(T5, B),))
    state = file.cut_back(T3, {T5})
    assert state.through == T3
    assert found(file, A, T2) is None
    assert not file.agrees(state, T2, [])


def test_many_open_revisions_are_listed_in_batches(file, monkeypatch):
    monkeypatch.setattr(cache_file, "BATCH_MAX", 7)
    lineage = file.start(T1, None).lineage
    oids = [p64(number) for number in range(30)]
    extend(file, lineage, T1, (), tuple(opened(oid, T1, T1) for oid in oids))
    batches = list(file.open_revisions())
    assert [pair for batch in batches for pair in batch] == [(oid, T1) for oid in oids]
    assert max(map(len, batches)) == 7


def test_what_came_after_the_cut_is_gone(file):
    lineage = file.start(T1, None).lineage
    extend(file, lineage, T1, (), tuple(opened(oid, T1, T1) for oid in (A, B, C)))
    extend(file, lineage, T1, (change(T2, A),), (opened(A, T2, T2),))
    extend(file, lineage, T2, (change(T3, A), change(T4, B)))
    extend(file, lineage, T4, (), (opened(A, T3, T4), opened(B, T4, T4)))
    state = file.cut_back(T2, {T4})
    assert (state.through, state.lineage != lineage) == (T2, True)
    assert found(file, A, T2) == (T1, T2)
    assert found(file, A, MAX_TID) is None, "if it ended at T3 is not known any more"
    assert found(file, B, MAX_TID) is None
    assert found(file, C, T3) == (T1, None)
    assert file.known_tids() == [T2, T1]
    other_way = change(T5, C, since=T2)
    assert extend(file, state.lineage, T2, (other_way,)).through == T5
    assert found(file, C, T5) == (T1, T5)


def test_what_somebody_else_has_cut_back_is_not_cut_again(file):
    lineage = file.start(T1, None).lineage
    extend(file, lineage, T1, (change(T2), change(T3)))
    cut = file.cut_back(T2, {T3})
    state = extend(file, cut.lineage, T2, (change(T5, A, since=T2),))
    assert file.cut_back(T2, {T3}) == state
    assert file.cut_back(T2, {T3, T5}) != state, "unless it has gone our way"


def test_a_file_that_has_gone_past_another_way_is_not_verified(file):
    """What ended on that way has not ended on ours."""
    lineage = file.start(T1, None).lineage
    extend(file, lineage, T1, (), (opened(A, T1, T1),))
    mark = file.mark()
    extend(file, lineage, T1, (change(T2, A), change(T4, B, since=T2)))
    with pytest.raises(Foreign):
        file.verified(mark, T6, [A], [T3])
    assert file.verified(mark, T6, [A], [T1, T2]).through == T6
    assert found(file, A, T2) == (T1, T2)


# Room


def filled(file: CacheFile, numbers: range, size: int = 1000) -> None:
    state = file.state() or file.start(T1, None)
    for start in range(numbers.start, numbers.stop, 200):
        revisions = tuple(
            opened(p64(number), T1, T1, os.urandom(size))
            for number in range(start, min(start + 200, numbers.stop))
        )
        extend(file, state.lineage, T1, (), revisions)


def test_no_more_pages_are_used_than_is_allowed(file):
    filled(file, range(20_000))
    assert 0.8 * 4 * MB < file.used_bytes <= 4 * MB
    assert file.path.stat().st_size < 6 * MB
    assert found(file, p64(19_999), T2)
    assert not found(file, p64(0), T2)


def test_large_records_count_with_all_of_their_pages(file):
    filled(file, range(2000), size=5000)
    assert 0.8 * 4 * MB < file.used_bytes <= 4 * MB
    assert len(file) * 5000 < 4 * MB


def test_what_was_used_stays_for_another_round(file):
    filled(file, range(1000))
    assert found(file, p64(0), T2), "which is a use"
    rounds = {0: 1000, 1: 1000}
    for start in range(1000, 20_000, 200):
        filled(file, range(start, start + 200))
        there = {oid for batch in file.open_revisions() for oid, _tid in batch}
        for number in rounds:
            if p64(number) in there:
                rounds[number] = start
    assert rounds[0] > 1.5 * rounds[1]
    assert rounds[0] < 15_000, "not for ever"


def test_who_allows_less_later_gets_less(tmp_path):
    file = CacheFile(tmp_path / "x.lmdb", 4 * MB)
    filled(file, range(5000))
    file.close()
    file = CacheFile(tmp_path / "x.lmdb", 1 * MB)
    for number in range(10_000, 10_010):
        filled(file, range(number, number + 1))
    assert file.used_bytes <= 1 * MB
    file.close()


def test_a_file_whose_free_pages_cannot_be_had_does_not_grow(file, monkeypatch):
    monkeypatch.setattr(cache_file, "SLACK_BYTES", 0)
    filled(file, range(3000))
    # Somebody reads, and does not end.
    with file._env.begin(), pytest.raises(Crowded):
        filled(file, range(3000, 50_000))
    size = file.path.stat().st_size
    assert size < 16 * MB
    filled(file, range(50_000, 51_000))
    assert found(file, p64(50_999), T2)


# What may lie there


def kept(path: Path) -> bool:
    """Whether a file that is opened at ``path`` still has what was kept."""
    file = CacheFile(path, 4 * MB)
    try:
        return file.state() is not None and found(file, A, T2) is not None
    finally:
        file.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a file that was closed."""
    path = tmp_path / "x.lmdb"
    file = CacheFile(path, 4 * MB)
    lineage = file.start(T1, None).lineage
    extend(file, lineage, T1, (), (opened(A, T1, T1),))
    filled(file, range(300))
    file.close()
    return path


def test_what_was_closed_is_there_again(path):
    assert kept(path)


@pytest.mark.parametrize("size", [0, 1, 100, 4096, 8191, 8192, 20_000, 100_000])
def test_a_file_that_was_cut_off_is_dropped_and_begun_anew(path, size):
    with path.open("r+b") as raw:
        raw.truncate(size)
    assert not kept(path)
    assert not kept(path)


@pytest.mark.parametrize("seed", range(5))
def test_garbage_is_dropped_and_begun_anew(path, seed):
    path.write_bytes(random.Random(seed).randbytes(200_000))
    assert not kept(path)


def test_another_format_is_dropped(path, monkeypatch):
    monkeypatch.setattr(cache_environment, "FORMAT", b"of tomorrow")
    assert not kept(path)


def test_after_a_stop_of_the_machine_it_is_dropped(path, monkeypatch, caplog):
    file = CacheFile(path, 4 * MB)
    # The process is killed.
    file._env.close()
    file._presence.abandon()
    assert kept(path)
    file = CacheFile(path, 4 * MB)
    file._env.close()
    file._presence.abandon()
    monkeypatch.setattr("zeolith.client.cache_place.boot_id", lambda: b"another")
    assert not kept(path)
    assert "dropped" in caplog.text


def test_a_revision_is_evicted_though_another_one_ends_where_it_begins(file):
    lineage = file.start(T5, None).lineage
    later, earlier = (
        Revision(A, tid, end, b"data", T5) for tid, end in ((T2, T3), (T1, T2))
    )
    extend(file, lineage, T5, (), (later, earlier))
    file.cache_bytes = 0
    extend(file, lineage, T5)
    assert len(file) == 1, "the last one stays, for its number"
