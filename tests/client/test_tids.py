"""The arithmetic of tids."""

from hypothesis import given
from hypothesis import strategies as st
from ZODB.utils import maxtid, p64, z64

from zeolith.client.tids import MAX_TID, Z64, following


def test_the_bounds_are_those_of_zodb():
    assert z64 == Z64
    assert maxtid == MAX_TID


@given(st.integers(0, 2**64 - 2))
def test_the_following_tid_is_greater_by_one(number):
    assert following(p64(number)) == p64(number + 1)


@given(st.binary(min_size=8, max_size=8), st.integers(0, 2**63))
def test_nothing_lies_between_a_tid_and_the_following_one(tid, number):
    if tid == b"\xff" * 8:
        return
    other = p64(number)
    assert tid < following(tid)
    assert not tid < other < following(tid)


def test_a_carry_reaches_the_first_byte():
    assert following(b"\0" + b"\xff" * 7) == b"\1" + b"\0" * 7
