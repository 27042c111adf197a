"""Changes are asked for piece by piece, as long as they lead where they should."""

from typing import Any

import pytest
from ZODB.utils import p64

from zeolith.client.changes import Change, UnknownWay, changes_between, changes_of

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


def test_what_a_message_has_are_changes():
    rows: list[Any] = [
        [b"1" * 8, b"2" * 8, [b"3" * 8], None],
        [b"2" * 8, b"4" * 8, [], b"5" * 16],
    ]
    changes = changes_of(rows)
    assert changes == [Change(*row) for row in rows]
    assert [type(change) for change in changes] == [Change, Change]
    assert changes[1].transaction == b"5" * 16
    assert changes_of([]) == []


@pytest.mark.parametrize(
    "row", [[b"1" * 8, b"2" * 8, []], [b"", b"", [], None, 1], b"1"]
)
def test_what_is_none_is_told_before_it_is_used(row: Any):
    with pytest.raises(TypeError, match="4 fields"):
        changes_of([[b"1" * 8, b"2" * 8, [], None], row])
