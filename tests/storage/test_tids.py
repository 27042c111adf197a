"""Transaction ids that only grow."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from persistent.TimeStamp import TimeStamp
from ZODB.utils import newTid

from zeolith.storage.tids import MAX_TID, Z64, advanced, following, next_tid, tid_at

# From 1970 to 2500: TimeStamp counts from 1900 and has room for much more.
moments = st.floats(0, 16_725_225_600)
tids = st.binary(min_size=8, max_size=8).filter(lambda tid: tid < MAX_TID)


@given(moments, moments)
def test_later_is_greater(one, other):
    earlier, later = sorted([one, other])
    assert tid_at(earlier) <= tid_at(later)
    assert len(tid_at(later)) == 8


@given(moments)
def test_a_tid_is_the_moment_as_zodb_spells_it(moment):
    tid = tid_at(moment)
    assert tid == TimeStamp(*time.gmtime(moment)[:5], moment % 60).raw()
    assert TimeStamp(tid).timeTime() == pytest.approx(moment, abs=1e-5)


def test_tids_of_now_fit_between_zodbs_own(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.25)
    assert tid_at(time.time()) == newTid(None)


@given(moments, tids)
def test_the_next_tid_is_greater_whatever_the_clock_says(moment, last):
    assert next_tid(moment, last) > last
    assert next_tid(moment, last) >= tid_at(moment)


@given(st.lists(moments, max_size=20))
def test_tids_grow_when_the_clock_jumps(clock):
    last = Z64
    for moment in clock:
        last, before = next_tid(moment, last), last
        assert last > before


@given(tids)
def test_nothing_is_between_a_tid_and_the_following(tid):
    distance = int.from_bytes(following(tid), "big") - int.from_bytes(tid, "big")
    assert distance == 1


@given(tids, st.integers(0, 2**24))
def test_advancing_is_following_many_times(tid, count):
    assert advanced(tid, 0) == tid
    assert advanced(tid, count + 1) == following(advanced(tid, count))


def test_carries_go_through_all_bytes():
    assert following(b"\0\0\0\0\xff\xff\xff\xff") == b"\0\0\0\x01\0\0\0\0"


def test_the_bounds_are_those_of_zodb():
    assert Z64 < tid_at(0) < tid_at(16_725_225_600) < MAX_TID
