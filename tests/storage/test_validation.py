"""Validating against a dictionary; on real storages it is in test_commit."""

from typing import Any

import pytest
from ZODB.POSException import (
    ConflictError,
    POSKeyError,
    ReadConflictError,
    StorageTransactionError,
)

from zeolith.storage.conflicts import TakesLong
from zeolith.storage.plain import PLAIN_OPERATIONS_MAX, PLAIN_OPERATIONS_MIN
from zeolith.storage.tids import Z64
from zeolith.storage.validation import (
    OID_MAX,
    Validation,
    refuse_empty,
)
from zeolith.storage.wrapping import PLAIN

from ..support.ids import number
from .transactions import (
    A,
    B,
    C,
    check,
    length,
    plain,
    state_of,
    store,
    transaction,
    undo,
)

FIRST, SECOND = number(1), number(2)


class Revisions:
    """oid -> tid -> record, oldest first."""

    def __init__(self, revisions: dict[bytes, dict[bytes, bytes]]):
        self._revisions = revisions
        self.loads = 0
        # For how many tids at once.
        self.asked: list[int] = []

    def current_tids(self, oids: list[bytes]) -> dict[bytes, bytes]:
        self.asked.append(len(oids))
        there = [oid for oid in oids if oid in self._revisions]
        return {oid: list(self._revisions[oid])[-1] for oid in there}

    def load_serial(self, oid: bytes, tid: bytes) -> bytes:
        self.loads += 1
        try:
            return self._revisions[oid][tid]
        except KeyError:
            raise POSKeyError(oid) from None


@pytest.fixture
def records() -> Revisions:
    return Revisions(
        {
            A: {FIRST: length(1), SECOND: length(2)},
            B: {FIRST: plain(1), SECOND: plain(2)},
        }
    )


def validation_of(*operations: list[Any], **others: Any) -> Validation:
    return Validation(transaction(*operations, **others), PLAIN)


def conflicts(validation: Validation, records: Revisions) -> Any:
    return validation.conflicts(validation.last_stores(), records)


def test_what_is_current_and_what_is_new_has_no_conflict(records):
    validation = validation_of(
        store(A, length(3), SECOND), store(C, plain(1)), check(B, SECOND), undo(FIRST)
    )
    assert not conflicts(validation, records)
    assert list(validation.written) == [A, C]
    assert not validation.resolutions


def test_a_known_class_is_resolved_here(records):
    validation = validation_of(store(A, length(5), FIRST))
    assert not conflicts(validation, records)
    assert state_of(validation.resolutions[A]) == 6


def test_whoever_asks_says_how_it_is_resolved(records):
    validation = validation_of(store(A, length(5), FIRST))

    def refuse(*_states: Any) -> bytes:
        raise TakesLong

    with pytest.raises(TakesLong):
        validation.conflicts(validation.last_stores(), records, refuse)
    assert not validation.resolutions
    resolved = validation.conflicts(
        validation.last_stores(), records, lambda _form, *states: b"|".join(states)
    )
    assert not resolved
    assert validation.resolutions == {A: b"|".join(map(length, (5, 1, 2)))}


def test_an_unknown_class_is_for_the_client_and_its_answer_is_taken(records):
    validation = validation_of(store(B, plain(3), FIRST), store(A, length(5), FIRST))
    (conflict,) = unresolved = conflicts(validation, records)
    assert conflict == (B, SECOND, FIRST, plain(2), plain(1), plain(3))
    validation.ask(unresolved)
    with pytest.raises(StorageTransactionError, match="not all"):
        validation.take({A: b"another"})
    validation.take({B: plain(23), C: b"of an undo"}, apart=[C])
    assert validation.resolutions.keys() == {A, B}
    assert not conflicts(validation, records)
    assert validation.resolutions[B] == plain(23)


def test_validating_again_resolves_nothing_twice(records):
    validation = validation_of(store(A, length(5), FIRST))
    conflicts(validation, records)
    loads = records.loads
    conflicts(validation, records)
    assert records.loads == loads
    assert state_of(validation.resolutions[A]) == 6


def test_two_new_objects_of_one_oid_are_the_same_or_a_conflict(records):
    validation = validation_of(store(A, length(2)))
    assert not conflicts(validation, records)
    assert validation.resolutions == {A: length(2)}
    with pytest.raises(ConflictError):
        conflicts(validation_of(store(A, length(3))), records)
    with pytest.raises(ConflictError):
        conflicts(validation_of(["store_blob", B, Z64, plain(2), 1]), records)


def test_a_revision_that_is_packed_away_cannot_be_merged_with(records):
    with pytest.raises(ConflictError):
        conflicts(validation_of(store(A, length(3), number(99))), records)


@pytest.mark.parametrize(
    ("operation", "error"),
    [
        (check(A, FIRST), ReadConflictError),
        (check(C, FIRST), POSKeyError),
        (["delete", A, FIRST], ConflictError),
        (["delete", C, FIRST], POSKeyError),
        (["restore", A, FIRST, b"data", None], StorageTransactionError),
    ],
)
def test_what_nobody_can_resolve_is_refused(records, operation, error):
    with pytest.raises(error):
        conflicts(validation_of(operation), records)


def test_a_restore_is_not_compared_with_what_is_there(records):
    validation = validation_of(
        ["restore", A, number(9), b"data", None], ["delete", B, SECOND], tid=number(9)
    )
    assert not conflicts(validation, records)
    assert list(validation.written) == [A, B]


@pytest.mark.parametrize(
    "operation", [["store", b"data"], ["delete"], ["restore", b"data", None]]
)
def test_the_last_oids_are_refused(operation):
    name, *data = operation

    def refuse(oid: bytes) -> None:
        validation_of(store(A, b"data"), [name, oid, Z64, *data]).refuse_extremes()

    refuse(OID_MAX)
    with pytest.raises(StorageTransactionError, match="beyond all"):
        refuse(b"\xff" * 8)
    validation_of(check(b"\xff" * 8, Z64), store(A, b"data")).refuse_extremes()


def test_the_last_oids_are_refused_among_many():
    many = [store(number(n), b"data") for n in range(PLAIN_OPERATIONS_MIN)]
    validation_of(*many, store(OID_MAX, b"data")).refuse_extremes()
    with pytest.raises(StorageTransactionError, match="beyond all"):
        validation_of(*many, store(b"\xff" * 8, b"data")).refuse_extremes()


def test_an_empty_record_is_refused():
    refuse_empty(A, b"x")
    with pytest.raises(StorageTransactionError, match="is empty"):
        refuse_empty(A, b"")


# By columns, or one after the other


@pytest.mark.parametrize(
    "operations",
    [
        [store(A, length(3), SECOND), store(C, plain(1)), check(B, SECOND)],
        [store(A, length(3), FIRST), check(B, SECOND)],
        [store(B, plain(3), FIRST), store(A, length(3), SECOND)],
        [store(A, length(3), SECOND), check(B, FIRST)],
        [store(A, length(3), SECOND), check(C, SECOND)],
        [store(A, length(2)), check(B, SECOND)],
    ],
)
def test_what_is_found_does_not_depend_on_how_it_is_looked_at(records, operations):
    def found(*looked_at: list[Any], plainly: bool) -> Any:
        validation = validation_of(*looked_at)
        validation.refuse_extremes()
        assert (validation.plain is not None) == plainly
        try:
            return conflicts(validation, records), validation.resolutions
        except (ConflictError, POSKeyError) as error:
            return type(error), str(error)

    more = [check(B, SECOND)] * PLAIN_OPERATIONS_MIN
    # Any undo is left to the general way, and an undo is not validated.
    by_one = found(*operations, *more, undo(FIRST), plainly=False)
    assert found(*operations, *more, plainly=True) == by_one


def test_all_tids_are_asked_for_at_once(records):
    more = [check(B, SECOND)] * PLAIN_OPERATIONS_MIN
    for operations in ([store(A, length(3), FIRST), *more], more[1:], more[:1]):
        validation = validation_of(*operations)
        validation.refuse_extremes()
        conflicts(validation, records)
        assert records.asked.pop() == len(operations)
        assert not records.asked


def test_the_tids_of_a_large_transaction_are_asked_for_a_part_at_a_time(records):
    count = 2 * PLAIN_OPERATIONS_MAX + 1
    validation = validation_of(*(store(number(n), b"1") for n in range(9, 9 + count)))
    validation.refuse_extremes()
    assert not conflicts(validation, records)
    assert records.asked == [PLAIN_OPERATIONS_MAX, PLAIN_OPERATIONS_MAX, 1]
