"""The rows: what stands in the table, and that each of them measures something."""

from dataclasses import fields
from pathlib import Path

import pytest

from . import crews, dataset, servers, workloads
from .rows import (
    FULL,
    PROCESSES_COMMITTING,
    PROCESSES_COMMITTING_MANY,
    PROCESSES_IN_ONE_TREE,
    QUICK,
    Scale,
    Trial,
    trials,
    until_all_heard_s,
)

SMALLEST = Scale(
    rounds=1,
    loads=20,
    loads_each=5,
    loads_beside=5,
    walked=1000,
    lookups=40,
    commits=3,
    commits_each=3,
    commits_each_of_many=2,
    commits_of_100=1,
    commits_of_1000=1,
    commits_heard=2,
    cached=300,
    missed=5,
    working_set=50,
    inserted=1000,
    idle=10,
)


def test_a_row_has_a_key_and_a_title_of_its_own():
    rows = [row for trial in trials(FULL) for row in trial.rows]

    assert len({row.key for row in rows}) == len(rows)
    assert len({row.title for row in rows}) == len(rows)


def test_less_of_everything_is_not_more_of_anything():
    for each in fields(Scale):
        assert getattr(QUICK, each.name) <= getattr(FULL, each.name), each.name


def test_committing_processes_have_a_shelf_each():
    """Else they would conflict, now and then."""
    crews_of = PROCESSES_COMMITTING, PROCESSES_COMMITTING_MANY

    assert max(crews_of) <= dataset.SHELVES


def test_a_commit_is_heard_when_the_last_has_heard_it():
    began = [(b"1", 10.0), (b"2", 20.0)]
    quick = [(b"1", 10.1), (b"2", 20.1)]
    slow = [(b"1", 10.5), (b"2", 20.25)]

    assert list(until_all_heard_s(began, [quick, slow])) == [0.5, 0.25]


def test_who_hears_of_a_later_commit_knows_the_earlier_one():
    began = [(b"1", 10.0), (b"2", 10.5)]
    merged = [(b"2", 11.0)]

    assert list(until_all_heard_s(began, [merged])) == [1.0, 0.5]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("bench") / "made.fs"
    dataset.make(made)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("trial", trials(SMALLEST), ids=lambda trial: trial.rows[0].key)
def test_every_row_measures_zeolith(tmp_path, data, trial: Trial):
    """Each with a server of its own: what one leaves behind helps no other."""
    assert "zeolith" in trial.peers

    with servers.running(
        "zeolith", tmp_path / "zeolith", data, is_encrypted=trial.is_encrypted
    ) as running:
        figures = trial.run(running, SMALLEST)

    assert len(figures) == len(trial.rows)
    for row, figure in zip(trial.rows, figures, strict=True):
        # Ten clients may find place in memory that was free already.
        assert figure > 0 or row.key == "idle", row.key


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["zeolith", "zeo"])
def test_what_counts_as_a_commit_in_the_hot_tree_is_in_it(tmp_path, data, peer):
    """However often each was tried."""
    commits_each = 10
    with servers.running(peer, tmp_path / peer, data) as running:
        found = crews.measure(
            running,
            workloads.commit_to_hot_tree,
            members=PROCESSES_IN_ONE_TREE,
            commits=commits_each,
        )
        db = workloads.open_db(running.endpoint)
        keys = len(db.open().root()["hot"])
        db.close()

    assert found.work.operations == PROCESSES_IN_ONE_TREE * commits_each
    assert keys == workloads.HOT_KEYS + found.work.operations
