"""Changes are asked for piece by piece, as long as they lead where they should."""

import pytest
from ZODB.utils import p64

from zeolith.client.changes import Change, UnknownWay, changes_between

T1, T2, T3, T4 = map(p64, range(1, 5))


def change(since: bytes, tid: bytes) -> Change:
    return Change(since, tid, [b"oid"], None)


ALL = [change(T1, T2), change(T2, T3), change(T3, T4)]


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_all_of_them_are_fetched_and_no_more(at_once):
    def ask(after: bytes) -> list[Change]:
        return [each for each in ALL if each.tid > after][:at_once]

    assert changes_between(ask, T1, T3) == ALL[:2]
    assert changes_between(ask, T3, T3) == []


@pytest.mark.parametrize(
    "found",
    [
        [],  # He stands before where we want to go,
        [change(T2, T4)],  # goes past it,
        [change(T1, T3)],  # or has never been where we are.
    ],
)
def test_who_goes_another_way_does_not_help(found):
    assert changes_between(lambda _after: found, T2, T3) is None


def test_what_nobody_knows_is_said():
    with pytest.raises(UnknownWay):
        changes_between(lambda _after: None, T1, T2)
    with pytest.raises(UnknownWay):
        changes_between(None, T1, T2)
