"""Which oids the recent transactions changed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeolith.storage.changes import Change, Changes

from ..support.ids import number, transaction_id


def change(since: int, tid: int, *oids: int, transaction: int | None = None) -> Change:
    return Change(
        number(since),
        number(tid),
        [number(oid) for oid in oids],
        None if transaction is None else transaction_id(transaction),
    )


# Transactions that follow each other: steps in time, and how many oids each has.
histories = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), max_size=30)


def follow(history: list[tuple[int, int]]) -> list[Change]:
    changes = []
    last = 10
    for step, count in history:
        changes.append(change(last, last + step, *range(count), transaction=last))
        last += step
    return changes


def test_nothing_happened_since_the_last_one():
    changes = Changes(number(10))
    assert changes.since(number(10)) == []
    assert changes.last_tid == number(10)


def test_what_is_appended_is_what_happened():
    changes = Changes(number(10))
    changes.extend([change(10, 12, 1), change(12, 15, 2, 3)])
    assert changes.last_tid == number(15)
    assert changes.since(number(10)) == [change(10, 12, 1), change(12, 15, 2, 3)]
    assert changes.since(number(12)) == [change(12, 15, 2, 3)]
    assert changes.since(number(15)) == []


@pytest.mark.parametrize("position", [0, 9, 11, 13, 16, 100])
def test_nothing_can_be_said_of_a_position_that_is_not_in_the_list(position):
    changes = Changes(number(10))
    changes.extend([change(10, 12, 1), change(12, 15, 2)])
    assert changes.since(number(position)) is None


@given(histories, st.integers(0, 200))
def test_what_happened_since_is_all_of_it_or_nobody_knows(history, position):
    appended = follow(history)
    changes = Changes(number(10))
    changes.extend(appended)
    since = changes.since(number(position))
    known = {number(10), *(each.tid for each in appended)}
    if number(position) in known:
        assert since == [each for each in appended if each.since >= number(position)]
    else:
        assert since is None


@given(histories, st.integers(0, 200), st.integers(0, 200))
def test_the_others_are_all_but_one_that_is_there(history, position, tid):
    changes = Changes(number(10))
    changes.extend(follow(history))
    since = changes.since(number(position))
    others = changes.others_since(number(position), number(tid))
    if since is None or number(tid) not in {each.tid for each in since}:
        assert others is None
    else:
        assert others == [each for each in since if each.tid != number(tid)]


@given(histories, st.integers(0, 8), st.integers(0, 20))
def test_only_so_much_is_remembered_and_that_without_gaps(
    history, changes_max, oids_max
):
    appended = follow(history)
    changes = Changes(number(10), oids_max, changes_max)
    for each in appended:
        changes.append(each)
        assert changes.last_tid == each.tid
        assert changes.since(each.tid) == []
    remembered = list(changes._changes)
    assert remembered == appended[len(appended) - len(remembered) :]
    assert len(remembered) <= changes_max
    assert sum(len(each.oids) for each in remembered) <= oids_max
    for was_last in (number(10), *(each.tid for each in appended)):
        known = changes.since(was_last) is not None
        assert changes.remembers(was_last) is known
    assert changes.since(changes.begins) == remembered
    # The oldest goes, and only when there is no room for it.
    forgotten = appended[: len(appended) - len(remembered)]
    if forgotten:
        with_one_more = [forgotten[-1], *remembered]
        oids = sum(len(each.oids) for each in with_one_more)
        assert len(with_one_more) > changes_max or oids > oids_max
        assert changes.since(forgotten[0].since) is None


@pytest.mark.parametrize(
    "gap", [change(11, 12), change(9, 12), change(10, 10), change(10, 9)]
)
def test_a_gap_or_a_step_back_is_refused(gap):
    changes = Changes(number(10))
    with pytest.raises(AssertionError, match="a gap"):
        changes.append(gap)
    assert changes.last_tid == number(10)
    assert changes.since(number(10)) == []


def test_a_transaction_is_found_by_the_id_that_its_client_chose():
    changes = Changes(number(10), changes_max=2)
    changes.extend(
        [
            change(10, 11, 1, transaction=1),
            change(11, 12, 1),
            change(12, 13, 1, transaction=3),
        ]
    )
    assert changes.tid_of(transaction_id(3)) == number(13)
    assert changes.tid_of(transaction_id(1)) is None
    assert changes.tid_of(transaction_id(2)) is None
