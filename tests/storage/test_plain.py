"""The columns of plain operations, against the operations themselves."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeolith.storage import plain
from zeolith.storage.plain import PLAIN_OPERATIONS_MIN, plain_operations
from zeolith.storage.tids import Z64

from ..support.ids import number
from .transactions import A, B, C, check, store, undo

OLD, NEW = number(1), number(2)

_oids = st.sampled_from([A, B, C])
_tids = st.sampled_from([Z64, OLD, NEW])
_operations = st.lists(
    st.builds(store, _oids, st.binary(), _tids) | st.builds(check, _oids, _tids),
    min_size=PLAIN_OPERATIONS_MIN,
)
# So that there are enough.
CHECKS = [check(C, OLD)] * PLAIN_OPERATIONS_MIN


def test_stores_and_checks_are_turned_over():
    columns = plain_operations(
        [store(B, b"b", NEW), check(A, OLD), store(A, b""), check(A, NEW)]
    )
    assert columns == ((B, A), (NEW, Z64), (b"b", b""), (A, A), (OLD, NEW))


def test_without_checks_nothing_is_checked():
    oids = tuple(map(number, range(PLAIN_OPERATIONS_MIN)))
    columns = plain_operations([store(oid, oid) for oid in oids])
    assert columns == (oids, (Z64,) * len(oids), oids, (), ())


@pytest.mark.parametrize(
    "operations",
    [
        [],
        CHECKS,
        [store(A, b"a"), *CHECKS[2:]],
        [store(A, b"a"), undo(OLD), *CHECKS],
        [store(A, b"a"), ["delete", B, OLD], *CHECKS],
        [store(A, b"a"), ["restore", B, OLD, b"b", None], *CHECKS],
        [store(A, b"a"), ["store_blob", B, OLD, b"b", 1], *CHECKS],
        [store(A, b"a"), store(A, b"b"), *CHECKS],
        (store(A, b"a"), *CHECKS),
    ],
)
def test_what_is_not_plain_is_left_to_the_general_way(operations):
    assert plain_operations(operations) is None


def test_more_than_a_thread_may_look_at_in_one_go_is_not_plain(monkeypatch):
    monkeypatch.setattr(plain, "PLAIN_OPERATIONS_MAX", len(CHECKS) + 1)
    assert plain_operations([store(A, b"a"), *CHECKS])
    assert plain_operations([store(A, b"a"), *CHECKS, check(C, OLD)]) is None


@given(_operations, st.dictionaries(_oids, _tids))
def test_it_is_current_if_every_operation_is(operations, tids):
    columns = plain_operations(operations)
    if columns is not None:
        assert columns.are_current(tids) == all(map(_is_current(tids), operations))


def _is_current(tids: dict[bytes, bytes]) -> Any:
    def is_current(operation: list[Any]) -> bool:
        name, oid, serial = operation[:3]
        if name == "check":
            return tids.get(oid) == serial
        return oid not in tids or tids[oid] == serial

    return is_current
