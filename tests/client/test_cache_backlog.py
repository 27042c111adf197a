"""What waits to be written: read meanwhile, judged by what comes meanwhile."""

from ZODB.utils import p64

from zeolith.client.cache_backlog import BYTES_MAX, Backlog, Revision, first_after
from zeolith.client.changes import Change
from zeolith.client.tids import Z64

A, B = p64(1), p64(2)
T1, T2, T3, T4, T5 = map(p64, range(1, 6))


def change(tid: bytes, *oids: bytes) -> Change:
    return Change(p64(int.from_bytes(tid) - 1), tid, list(oids), None)


def opened(oid: bytes, tid: bytes, as_of: bytes) -> Revision:
    return Revision(oid, tid, None, b"%s at %s" % (oid, tid), as_of)


def test_changes_wait_in_order_and_are_known_by_object():
    backlog = Backlog(T1, [change(T2, A)])
    backlog.add_change(change(T3, A, B))
    assert backlog.tids == [T2, T3]
    assert backlog.changed == {A: (T2, T3), B: (T3,)}
    assert first_after(backlog.changed[A], T1) == T2
    assert first_after(backlog.changed[A], T2) == T3
    assert first_after(backlog.changed[A], T3) is None


def test_the_latest_revision_of_an_object_can_be_read_and_all_are_written():
    backlog = Backlog(T1)
    old, new = opened(A, T1, T1), opened(A, T2, T2)
    for first, second in ((old, new), (new, old)):
        backlog = Backlog(T1)
        backlog.add_revision(first)
        backlog.add_revision(second)
        assert backlog.pending == {A: new}
        assert backlog.batch().revisions == [old], "the other one is ahead of us"
        backlog.add_change(change(T2, A))
        written = backlog.batch().revisions
        assert {(each.tid, each.end) for each in written} == {(T1, T2), (T2, None)}


def test_what_may_have_ended_before_base_cannot_be_read():
    backlog = Backlog(T3)
    doubtful = opened(A, T1, T2)
    backlog.add_revision(doubtful)
    assert backlog.pending == {}
    assert backlog.batch().revisions == [doubtful]
    ended = Revision(B, T1, T2, b"data", T2)
    backlog.add_revision(ended)
    assert backlog.pending == {B: ended}


def test_what_is_written_is_taken_out_and_the_rest_stays():
    backlog = Backlog(T1, [change(T2, A)])
    backlog.add_revision(opened(A, T2, T2))
    backlog.forget(p64(9))
    batch = backlog.batch()
    backlog.add_change(change(T3, A, B))
    later = opened(B, T3, T3)
    backlog.add_revision(later)
    backlog.forget(p64(8))
    before = backlog.changed, backlog.pending
    backlog.written(batch)
    assert (backlog.base, backlog.tids) == (T2, [T3])
    assert backlog.changed == {A: (T3,), B: (T3,)}
    assert backlog.pending == {B: later}
    assert list(backlog.forgotten) == [p64(8)]
    assert before[0][A] == (T2, T3), "who reads has the dictionaries of before"
    assert set(before[1]) == {A, B}


def test_what_came_while_it_was_written_is_judged_by_what_is_taken_out():
    """Nobody could tell any more, later, that it had ended."""
    backlog = Backlog(T1, [change(T2, A), change(T3, B)])
    batch = backlog.batch()
    backlog.add_revision(opened(A, T1, T1))
    backlog.add_revision(opened(B, T1, T2))
    backlog.add_revision(opened(p64(3), T1, T1))
    backlog.written(batch)
    assert backlog.pending[A].end == T2
    assert backlog.pending[B].end == T3
    untouched = backlog.pending[p64(3)]
    assert (untouched.end, untouched.as_of) == (None, T3)


def test_a_revision_newer_than_what_was_written_is_not_judged_by_it():
    backlog = Backlog(T1, [change(T2, A)])
    batch = backlog.batch()
    backlog.add_change(change(T3, A))
    backlog.add_change(change(T4, A))
    current = opened(A, T4, T4)
    between = opened(B, T1, T5)
    backlog.add_revision(current)
    backlog.add_revision(between)
    backlog.written(batch)
    assert backlog.pending == {A: current, B: between}


def test_nothing_of_what_is_forgotten_is_read_or_written():
    backlog = Backlog(T1)
    for revision in (opened(A, T1, T1), opened(A, T2, T2), opened(B, T1, T1)):
        backlog.add_revision(revision)
    backlog.forget(A)
    assert set(backlog.pending) == {B}
    assert [each.oid for each in backlog.batch().revisions] == [B]
    assert list(backlog.batch().forgotten) == [A]


def test_what_is_known_of_an_object_after_it_was_forgotten_is_kept():
    backlog = Backlog(T1)
    backlog.forget(A)
    backlog.add_revision(opened(A, T1, T1))
    assert [each.oid for each in backlog.batch().revisions] == [A]


def test_no_more_waits_than_is_allowed_and_it_is_counted_right():
    backlog = Backlog(T1)
    large = b"x" * (BYTES_MAX // 4)
    for number in range(10):
        backlog.add_revision(Revision(p64(number), T1, None, large, T1))
    assert len(backlog.pending) == 3
    batch = backlog.batch()
    backlog.written(batch)
    for number in range(10):
        backlog.add_revision(Revision(p64(number), T1, None, large, T1))
    assert len(backlog.pending) == 3
    backlog.drop_revisions()
    assert backlog.batch().revisions == []
    backlog.add_revision(Revision(A, T1, None, large, T1))
    assert backlog.pending


def test_what_is_true_as_of_later_than_where_we_stand_can_be_dropped():
    backlog = Backlog(T1, [change(T2, A)])
    backlog.add_revision(opened(A, T2, T2))
    backlog.add_revision(opened(B, T1, T3))
    backlog.add_revision(Revision(B, Z64, T1, b"data", T3))
    backlog.drop_ahead()
    assert list(backlog.pending) == [A]
    assert [each.oid for each in backlog.batch().revisions] == [A]


def test_a_file_that_was_found_to_be_ahead_of_us_is_looked_at_again_as_we_go_on():
    """It may be on another way than the one that we take now."""
    ahead = b"lineage." + T3 + T1
    for tid, is_trusted in ((T2, False), (T3, True), (T4, False)):
        backlog = Backlog(T1, trusted=ahead)
        backlog.add_change(change(tid))
        assert bool(backlog.trusted) == is_trusted
        backlog.trusted = b"lineage." + backlog.through + T1
        backlog.add_change(change(T5))
        assert backlog.trusted


def test_what_ends_after_what_is_written_is_written_as_open_until_then():
    backlog = Backlog(T1, [change(T2, B)])
    batch = backlog.batch()
    backlog.add_revision(opened(A, T1, T1))
    backlog.add_change(change(T3, A))
    backlog.written(batch)
    assert backlog.batch().revisions == [Revision(A, T1, T3, b"%s at %s" % (A, T1), T2)]


def test_what_is_forgotten_again_while_it_is_written_is_still_forgotten():
    backlog = Backlog(T1)
    backlog.forget(A)
    batch = backlog.batch()
    backlog.forget(A)
    backlog.written(batch)
    assert list(backlog.forgotten) == [A]
    backlog.written(backlog.batch())
    assert not backlog.forgotten
