"""Clients that race freely, and are judged afterwards by what the file says.

What test_isolation decides step by step is left to chance here: threads that vote,
finish and abort at the same moment. Such a run does not repeat; but every transaction
leaves a tale of what it saw and what it was told, and with the whole history at hand
each tale is either right or not.
"""

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from BTrees.Length import Length
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.POSException import ConflictError, ReadConflictError

from ..storage.transactions import record
from ..support.hands import Cell, RawHand, TellingStorage
from ..support.history import History, Refused, Revision
from ..support.ids import number
from ..support.inprocess import serving
from ..support.isolation import committed_by

CELLS = [number(n) for n in range(1, 5)]
COUNTERS = [number(n) for n in range(11, 15)]
THREADS = 6
STORAGES = 3


class Tale:
    """A transaction as its client has seen it."""

    def __init__(self, snapshot: bytes):
        self.snapshot = snapshot
        self.read: dict[bytes, Revision] = {}
        self.written: dict[bytes, Any] = {}
        self.depends_on: dict[bytes, Revision] = {}
        self.tid: bytes | None = None
        self.error: ConflictError | None = None

    def judge(self, history: History) -> None:
        """Raise AssertionError if that was not right."""
        for oid, found in self.read.items():
            expected = history.at(oid, self.snapshot)
            assert found == expected, f"saw {found}, not {expected}"
        if self.tid is not None:
            self._judge_commit(history, self.tid)
        elif self.error is not None:
            oid = self.error.oid
            is_read = type(self.error) is ReadConflictError
            found = (self.depends_on if is_read else self.read)[oid]
            assert history.next_tid(oid, found.tid), f"{self.error!r} without a cause"
            assert is_read or oid in CELLS, "a counter was not merged"

    def _judge_commit(self, history: History, tid: bytes) -> None:
        before = History([each for each in history.commits if each.tid < tid], COUNTERS)
        for oid, found in self.depends_on.items():
            assert before.at(oid) == found, "what it depends on had changed"
        try:
            expected = before.outcome(self.read, self.written)
        except Refused as refused:
            raise AssertionError(f"it should have been refused: {refused}") from None
        for oid, value in expected.items():
            assert history.at(oid, tid) == Revision(tid, value), "an update is lost"


def make_objects(storage: TellingStorage) -> None:
    metadata = TransactionMetaData()
    storage.tpc_begin(metadata)
    for oid in CELLS:
        storage.store(oid, None, record(Cell, {"value": 0}), "", metadata)
    for oid in COUNTERS:
        storage.store(oid, None, record(Length, 0), "", metadata)
    storage.tpc_vote(metadata)
    storage.tpc_finish(metadata)


def race(hand: RawHand, seed: int, count: int) -> list[Tale]:
    """The tales of that many transactions, one after the other."""
    randomly = random.Random(seed)
    tales = []
    for turn in range(count):
        tale = Tale(hand.begin())
        tales.append(tale)
        for oid in randomly.sample([*CELLS, *COUNTERS], randomly.randint(1, 3)):
            tale.read[oid], _end = hand.read(oid)
            if randomly.random() < 0.2:
                hand.depend(oid, tale.read[oid])
                tale.depends_on[oid] = tale.read[oid]
            elif randomly.random() < 0.8:
                value = seed * 1_000_000 + turn
                if oid in COUNTERS:
                    value = tale.read[oid].value + randomly.choice([1, 10, 1000])
                hand.write(oid, tale.read[oid], value)
                tale.written[oid] = value
        finish(hand, tale, is_given_up=randomly.random() < 0.1)
    return tales


def finish(hand: RawHand, tale: Tale, *, is_given_up: bool) -> None:
    storage, metadata = hand.storage, hand._metadata
    try:
        storage.tpc_vote(metadata)
        if not is_given_up and tale.written:
            tale.tid = storage.tpc_finish(metadata)
    except ConflictError as error:
        tale.error = error
    storage.tpc_abort(metadata)


def run(tmp_path: Any, count: int) -> None:
    path = tmp_path / "Data.fs"
    with serving(path) as server:
        storages = [TellingStorage(server.address) for _ in range(STORAGES)]
        make_objects(storages[0])
        for storage in storages:
            storage.catch_up()
        hands = [RawHand(str(n), storages[n % STORAGES]) for n in range(THREADS)]
        with ThreadPoolExecutor(THREADS) as pool:
            racing = [
                pool.submit(race, hand, seed, count) for seed, hand in enumerate(hands)
            ]
            tales = [tale for each in racing for tale in each.result()]
        for hand in hands:
            hand.close()
        for storage in storages:
            storage.close()
    file = FileStorage(str(path), read_only=True)
    history = History(committed_by(file.iterator()), COUNTERS)
    file.close()
    for tale in tales:
        tale.judge(history)
    told = {tale.tid for tale in tales if tale.tid is not None}
    assert told == {each.tid for each in history.commits[1:]}, "not what was told"
    assert any(tale.error for tale in tales), "nobody was in the way of anybody"
    print(f"{len(told)} of {len(tales)} committed")


def test_clients_that_race_lose_and_mix_nothing(tmp_path):
    run(tmp_path, count=40)


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(5))
def test_clients_that_race_for_long_lose_and_mix_nothing(tmp_path, attempt):
    run(tmp_path, count=500)
