"""Marks of what was used: shared, and taken away by whoever makes room."""

import stat

from ZODB.utils import p64, u64

from zeolith.client.cache_eviction import MARKS, MASK, UsedMarks


def mark(marks: UsedMarks, oid: bytes) -> None:
    marks.marks[u64(oid) & MASK] = 1


def test_a_mark_is_seen_by_others_and_taken_once(tmp_path):
    ours, theirs = UsedMarks(tmp_path / "used"), UsedMarks(tmp_path / "used")
    mark(ours, p64(7))
    assert not theirs.take(p64(8))
    assert theirs.take(p64(7))
    assert not ours.take(p64(7))


def test_objects_side_by_side_share_no_mark(tmp_path):
    marks = UsedMarks(tmp_path / "used")
    mark(marks, p64(5))
    assert not any(marks.take(p64(number)) for number in range(6, MARKS))
    assert marks.take(p64(5 + MARKS)), "far away they do"


def test_marks_outlive_whoever_made_them(tmp_path):
    mark(UsedMarks(tmp_path / "used"), p64(1))
    again = UsedMarks(tmp_path / "used")
    assert again.take(p64(1))


def test_nobody_else_may_read_them(tmp_path):
    UsedMarks(tmp_path / "used")
    assert stat.S_IMODE((tmp_path / "used").stat().st_mode) == 0o600
    assert (tmp_path / "used").stat().st_size == MARKS
