"""What the log says of long ago: exactly what was committed, or nothing."""

import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zeolith.storage import replay
from zeolith.storage.changes import Change, Known, Past
from zeolith.storage.filestore import FileStore
from zeolith.storage.log import LogReader
from zeolith.storage.replay import changes_before, last_known
from zeolith.storage.tids import MAX_TID, Z64, following

from ..support.ids import number
from .histories import histories, opened, write
from .transactions import (
    ROOT,
    A,
    B,
    C,
    plain,
    references,
    store,
    transaction,
    undo,
)

ENOUGH = 2**40


def commit(database: FileStore, *operations: Any, **others: Any) -> bytes:
    database.vote(transaction(*operations, **others))
    return database.finish().tid


def commits(database: FileStore, count: int, data: bytes = b"") -> list[bytes]:
    """So many transactions, each of which stores one new object."""
    first = len(database._file)
    return [
        commit(database, store(number(n), data or plain(n)))
        for n in range(first, first + count)
    ]


def told(past: Past) -> list[tuple[bytes, bytes, list[bytes]]]:
    return [(each.since, each.tid, each.oids) for each in past.changes]


def log_of(storage: Any) -> LogReader:
    return LogReader(os.open(storage._file_name, os.O_RDONLY), storage.getSize())


@settings(max_examples=100)
@given(history=histories, data=st.data(), piece_bytes=st.sampled_from([64, 700, 2**20]))
def test_any_history_is_told_as_zodb_iterates_it(
    tmp_path_factory, history, data, piece_bytes
):
    """From any position that it had, up to any later one, by pieces of any size."""
    storage = opened(tmp_path_factory.mktemp("replay") / "Data.fs")
    sizes = replay.PIECE_BYTES, replay.AHEAD_BYTES
    replay.PIECE_BYTES, replay.AHEAD_BYTES = piece_bytes, max(64, piece_bytes // 2)
    try:
        write(storage, history)
        everything = [
            (each.tid, list(dict.fromkeys(record.oid for record in each)))
            for each in storage.iterator()
        ]
        tids = [Z64, *(tid for tid, _oids in everything)]
        expected = [
            Change(since, tid, oids, None)
            for since, (tid, oids) in zip(tids, everything, strict=False)
        ]
        end = data.draw(st.integers(0, len(expected)))
        start = data.draw(st.integers(0, end))
        with log_of(storage) as log:
            past = changes_before(log, tids[end], tids[start], ENOUGH)
        assert past.changes == expected[start:end]
    finally:
        replay.PIECE_BYTES, replay.AHEAD_BYTES = sizes
        storage.close()


def test_all_of_the_log_is_told_to_who_knows_nothing(database):
    first, second = commits(database, 2)
    past = database.changes_before(second, Z64, ENOUGH)
    assert told(past) == [(Z64, first, [ROOT]), (first, second, [A])]
    assert past.is_all


def test_what_came_after_the_last_one_is_not_told(database):
    """It is on the disk, and not announced."""
    first, second, third, _fourth = commits(database, 4)
    past = database.changes_before(third, first, ENOUGH)
    assert [each.tid for each in past.changes] == [second, third]


def test_a_position_that_never_was_ends_the_reading(database):
    """What is after it is told, to those who know where that begins."""
    first, second, third = commits(database, 3)
    past = database.changes_before(third, following(first), ENOUGH)
    assert told(past) == [(first, second, [A]), (second, third, [B])]
    assert not past.is_all


def test_a_last_one_that_is_not_in_the_log_has_nothing_before_it(database):
    _first, second, _third = commits(database, 3)
    assert database.changes_before(following(second), Z64, ENOUGH) == Past([], True)
    assert database.changes_before(MAX_TID, Z64, ENOUGH) == Past([], True)


def test_only_so_much_is_read(database, monkeypatch):
    monkeypatch.setattr(replay, "PIECE_BYTES", 2000)
    tids = commits(database, 20, b"x" * 1000)
    past = database.changes_before(tids[-1], tids[0], 7000)
    assert past.is_all
    assert 3 <= len(past.changes) <= 8
    assert [(each.since, each.tid) for each in past.changes] == list(
        pairwise(tids[-len(past.changes) - 1 :])
    )


def test_what_is_not_announced_counts_among_what_is_read(database, monkeypatch):
    monkeypatch.setattr(replay, "PIECE_BYTES", 2000)
    tids = commits(database, 20, b"x" * 1000)
    assert database.changes_before(tids[1], tids[0], 7000) == Past([], True)


def test_only_so_many_oids_are_told(database, monkeypatch):
    monkeypatch.setattr(replay, "OIDS_MAX", 5)
    tids = commits(database, 20)
    past = database.changes_before(tids[-1], tids[0], ENOUGH)
    assert past.is_all
    assert [each.tid for each in past.changes] == tids[-5:]


def test_records_that_are_large_are_not_read(database):
    """What counts is what is read, not how long the log is."""
    tids = commits(database, 5, b"x" * 5_000_000)
    past = database.changes_before(tids[-1], tids[0], 15_000_000)
    assert [each.tid for each in past.changes] == tids[1:]


def test_a_pack_takes_the_history_away(database):
    """The second transaction has changed ROOT and does not say so any more."""
    first = commit(database, store(ROOT, plain(1)), store(A, plain(1)))
    second = commit(database, store(ROOT, plain(2), first), store(B, plain(1)))
    third = commit(database, store(ROOT, references(A, B), second))
    database.pack(time.time() + 1)
    fourth = commit(database, store(A, plain(2), first))
    for position in (Z64, first, second):
        past = database.changes_before(fourth, position, ENOUGH)
        assert past.is_all
        assert told(past) == [(third, fourth, [A])]
    assert told(database.changes_before(fourth, third, ENOUGH)) == [
        (third, fourth, [A])
    ]


def test_nothing_is_told_of_what_led_to_a_packed_transaction(database):
    first = commit(database, store(ROOT, plain(1)))
    second = commit(database, store(ROOT, plain(2), first))
    database.pack(time.time() + 1)
    third = commit(database, store(ROOT, plain(3), second))
    assert database.changes_before(second, Z64, ENOUGH) == Past([], True)
    assert told(database.changes_before(third, Z64, ENOUGH)) == [
        (second, third, [ROOT])
    ]


def test_a_pack_behind_the_last_one_takes_everything_away(database):
    """A copied transaction may be marked; what is before it is not known."""
    first, second = commits(database, 2)
    commit(database, store(C, plain(1)), tid=following(second), status="p")
    assert database.changes_before(second, first, ENOUGH) == Past([], True)


def test_whatever_writes_is_a_change(database):
    first = commit(database, store(ROOT, references(A)), store(A, plain(1)))
    second = commit(database, store(A, plain(2), first))
    undone = commit(database, undo(second))
    copied = following(undone)
    commit(database, ["restore", B, copied, plain(1), None], tid=copied)
    deleted = commit(database, ["delete", A, undone])
    past = database.changes_before(deleted, first, ENOUGH)
    assert [(each.tid, each.oids) for each in past.changes] == [
        (second, [A]),
        (undone, [A]),
        (copied, [B]),
        (deleted, [A]),
    ]


def test_what_clients_called_transactions_is_told(open_store):
    database = open_store()
    mine = transaction(store(ROOT, plain(1)))
    database.vote(mine)
    tid = database.finish().tid
    database.close()
    database = open_store()
    [change] = database.changes_before(tid, Z64, ENOUGH).changes
    assert change.transaction == mine.id


def test_one_oid_is_kept_for_all_its_changes(database):
    tid = Z64
    for n in range(3):
        tid = commit(database, store(ROOT, plain(n), tid))
    changes = database.changes_before(tid, Z64, ENOUGH).changes
    assert len({id(each.oids[0]) for each in changes}) == 1


def broken(database: FileStore, position: int, data: bytes) -> LogReader:
    """The log of a copy of the file in which something else is at ``position``."""
    path = Path(database._path)
    damaged = path.with_name("damaged.fs")
    content = bytearray(path.read_bytes())
    content[position : position + len(data)] = data
    damaged.write_bytes(content)
    return LogReader(os.open(damaged, os.O_RDONLY), len(content))


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        # Of the second of three transactions: its tid, the length before and behind,
        # the length of a text, of a record.
        (0, MAX_TID),
        (8, number(5)),
        (-8, number(2**40)),
        (-8, number(3)),
        (17, b"\xff\xff"),
        (23 + 34, number(2**40)),
        (23 + 34, number(7)),
    ],
)
def test_before_a_damage_nothing_is_told(database, offset, data, caplog):
    tids = commits(database, 3)
    with database._log() as log:
        _third, entry, _first = log.backwards()
    start = entry.position if offset >= 0 else entry.end + 8
    with broken(database, start + offset, data) as log:
        past = changes_before(log, tids[-1], Z64, ENOUGH)
    assert past.is_all
    assert [each.tid for each in past.changes] in ([], tids[2:])
    assert "the log is damaged" in caplog.text
    caplog.clear()
    with broken(database, start + offset, data) as log:
        known = last_known(log, [tids[0]], tids[-1], ENOUGH)
    if known.tid is None:
        assert known.complete_from > tids[0]


def test_a_file_that_was_cut_short_is_damaged(database, caplog):
    first, second = commits(database, 2)
    with broken(database, 0, b"") as log:
        log.end += 1000
        assert changes_before(log, second, first, ENOUGH) == Past([], True)
    assert "the log is damaged" in caplog.text


# Which tids it has


def test_the_last_one_that_the_log_has_is_known(database):
    tids = commits(database, 5)
    strange = [following(tid) for tid in tids]
    assert database.last_known([*strange, *tids[:3]], tids[-1], ENOUGH) == Known(
        tids[2], tids[2]
    )


def test_of_what_the_log_never_had_it_is_certain(database):
    tids = commits(database, 3)
    known = database.last_known([following(tids[1])], tids[-1], ENOUGH)
    assert known == Known(None, tids[1])
    known = database.last_known([following(Z64)], tids[-1], ENOUGH)
    assert known == Known(None, Z64)


def test_what_is_not_announced_is_not_known(database):
    first, second, third = commits(database, 3)
    known = database.last_known([third, first], second, ENOUGH)
    assert known == Known(first, first)


def test_where_a_pack_has_been_nothing_is_certain_but_what_is_there(database):
    first = commit(database, store(ROOT, plain(1)))
    second = commit(database, store(ROOT, plain(2), first))
    database.pack(time.time() + 1)
    third = commit(database, store(ROOT, plain(3), second))
    # The first is not in the log any more.
    assert database.last_known([first], third, ENOUGH) == Known(None, second)
    assert database.last_known([second, first], third, ENOUGH) == Known(second, second)
    assert database.last_known([following(second)], third, ENOUGH) == Known(
        None, second
    )


def test_a_tid_is_found_behind_a_packed_transaction(database):
    first = commit(database, store(ROOT, references(A)), store(A, plain(1)))
    second = commit(database, store(A, plain(2), first))
    database.pack(time.time() + 1)
    assert database.last_known([first], second, ENOUGH) == Known(first, second)


def test_a_tid_is_not_looked_for_for_ever(database, monkeypatch):
    monkeypatch.setattr(replay, "PIECE_BYTES", 2000)
    tids = commits(database, 20, b"x" * 1000)
    known = database.last_known([tids[0]], tids[-1], 7000)
    assert known.tid is None
    assert tids[10] <= known.complete_from <= tids[17]


def test_of_no_tids_none_is_known(database):
    (tid,) = commits(database, 1)
    assert database.last_known([], tid, ENOUGH).tid is None


# Which revisions are current


def test_revisions_that_are_not_current_are_told(database):
    first = commit(database, store(ROOT, plain(1)), store(A, plain(1)))
    second = commit(database, store(A, plain(2), first), store(B, plain(1)))
    commit(database, ["delete", B, second])
    revisions = [(ROOT, first), (A, first), (A, second), (B, second), (C, first)]
    assert database.outdated(revisions) == [A, B, C]
    assert database.outdated([]) == []
