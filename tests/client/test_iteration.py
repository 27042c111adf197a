"""From batches to ZODB's iterators."""

import pickle
from typing import Any

import pytest
from ZODB.interfaces import IStorageTransactionInformation

from zeolith.client.iteration import CurrentRecords, Transactions

from ..support.ids import number


def piece(tid: int, *oids: int, **others: Any) -> list[Any]:
    return [
        number(tid),
        others.get("status", " "),
        b"user",
        b"description",
        others.get("extension", b""),
        [[number(oid), number(tid), b"data of %d" % oid, None] for oid in oids],
    ]


class Log:
    """Answers requests from a script; whatever is asked twice is answered twice."""

    def __init__(self, answers: dict[Any, Any]):
        self._answers = answers
        self.asked: list[Any] = []

    def __call__(self, *request: Any) -> Any:
        self.asked.append(request)
        return self._answers[request[-1]]


TWO_BATCHES = {
    None: [[piece(1, 10, 11), piece(2, 20)], b"rest of 2", b"from 3"],
    b"rest of 2": [[piece(2, 21)], b"more of 2", None],
    b"more of 2": [[piece(2, 22)], None, None],
    b"from 3": [[piece(3, 30)], None, None],
}


def oids(transaction: Any) -> list[int]:
    return [int.from_bytes(record.oid, "big") for record in transaction]


def test_transactions_and_their_records_are_those_of_all_batches():
    log = Log(TWO_BATCHES)
    found = [(each.tid, oids(each)) for each in Transactions(log, number(1), number(9))]
    assert found == [
        (number(1), [10, 11]),
        (number(2), [20, 21, 22]),
        (number(3), [30]),
    ]
    assert log.asked == [
        ("transactions", number(1), number(9), None),
        ("transactions", number(2), number(2), b"rest of 2"),
        ("transactions", number(2), number(2), b"more of 2"),
        ("transactions", number(1), number(9), b"from 3"),
    ]


def test_what_is_not_looked_at_is_not_asked_for():
    log = Log(TWO_BATCHES)
    assert len(list(Transactions(log, None, None))) == 3
    assert [request[-1] for request in log.asked] == [None, b"from 3"]


def test_records_may_be_iterated_later_and_again():
    transactions = list(Transactions(Log(TWO_BATCHES), None, None))
    for _time in range(2):
        assert oids(transactions[1]) == [20, 21, 22]


def test_a_transaction_says_what_was_said_of_it():
    extension = pickle.dumps({"key": "value"}, 3)
    log = Log({None: [[piece(1, status="p", extension=extension)], None, None]})
    (transaction,) = Transactions(log, None, None)
    assert IStorageTransactionInformation.providedBy(transaction)
    assert (transaction.user, transaction.description) == (b"user", b"description")
    assert (transaction.status, transaction.extension_bytes) == ("p", extension)
    assert transaction.extension == {"key": "value"}


def test_an_extension_that_nobody_can_read_is_passed_on():
    log = Log({None: [[piece(1, extension=b"no pickle")], None, None]})
    (transaction,) = Transactions(log, None, None)
    assert transaction.extension_bytes == b"no pickle"


def test_a_closed_iterator_gives_nothing():
    transactions = Transactions(Log(TWO_BATCHES), None, None)
    next(transactions)
    transactions.close()
    assert list(transactions) == []


# Current records

RECORDS = {
    None: [
        number(9),
        [[number(1), number(5), b"1"], [number(2), number(6), b"2"]],
        number(3),
    ],
    number(3): [number(9), [], number(4)],
    number(4): [number(9), [[number(4), number(7), b"4"]], None],
    number(2): [number(9), [[number(2), number(8), b"2 now"]], None],
    number(5): [number(9), [], None],
}


def test_current_records_come_one_after_the_other():
    log = Log(RECORDS)
    records = CurrentRecords(log)
    found = []
    following = None
    while True:
        oid, tid, data, following = records.next(following)
        found.append((oid, tid, data))
        if following is None:
            break
    assert found == [
        (number(1), number(5), b"1"),
        (number(2), number(6), b"2"),
        (number(4), number(7), b"4"),
    ]
    assert [request[-1] for request in log.asked] == [None, number(3), number(4)]


def test_what_was_given_once_is_asked_for_anew():
    records = CurrentRecords(Log(RECORDS))
    records.next(None)
    assert records.next(number(2))[2] == b"2"
    assert records.next(number(2))[2] == b"2 now"


def test_where_no_object_is_left_there_is_a_value_error():
    with pytest.raises(ValueError, match="no object"):
        CurrentRecords(Log(RECORDS)).next(number(5))
