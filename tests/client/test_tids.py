"""The arithmetic of tids."""

from hypothesis import given
from hypothesis import strategies as st
from ZODB.utils import maxtid, p64, z64

from zeolith.client.tids import MAX_TID, SPARSE_MAX, Z64, following, sparse


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


# What is remembered of those that were applied


def tids_at(*numbers: int) -> list[bytes]:
    return [p64(number) for number in numbers]


def test_the_last_tids_are_all_remembered():
    assert sparse([]) == []
    assert sparse(tids_at(7)) == tids_at(7)
    last = tids_at(*range(1, 21))
    assert sparse(last) == last[::-1]


@given(st.lists(st.integers(0, 2**62), unique=True, max_size=400).map(sorted))
def test_of_older_ones_there_is_always_one_that_is_not_much_older(numbers):
    kept = [int.from_bytes(tid, "big") for tid in sparse(tids_at(*numbers))]
    assert kept == sorted(set(kept), reverse=True)
    assert len(kept) <= SPARSE_MAX
    assert set(kept) <= set(numbers)
    assert kept[:20] == numbers[: -20 - 1 : -1]
    if len(kept) < SPARSE_MAX:
        assert kept[-1:] == numbers[:1]
        for number in numbers:
            before = next(each for each in kept if each <= number)
            # As long ago as it is, and half as long again.
            age = numbers[-1] - number
            assert before == number or numbers[-1] - before <= 1.5 * age


def test_a_year_of_commits_fits():
    """One each second, told one by one; what was remembered is made sparse again."""
    second = 2**32 // 60
    kept: list[bytes] = []
    for number in range(0, 365 * 86400, 600):
        kept.append(p64(number * second))
        if len(kept) > 3 * SPARSE_MAX:
            kept = sparse(kept)[::-1]
    ages = [
        (int.from_bytes(kept[-1], "big") - int.from_bytes(tid, "big")) / second
        for tid in sparse(kept)
    ]
    assert len(ages) < SPARSE_MAX
    assert ages[-1] > 364 * 86400
    for older, newer in zip(ages[25:], ages[24:], strict=False):
        assert older <= 2 * newer
