"""Random transactions of several clients, compared with a model of what is promised.

A run is decided by its seed, which is in the name of the test and in what it prints.
``ISOLATION_SEED=17 pytest tests/soak/test_isolation.py`` repeats the run of seed 17;
``ISOLATION_STEPS`` is how long it is. (How long a pack takes is not in the seed.)
"""

import os

import pytest

from ..support.history import Committed, History, Refused, Revision
from ..support.ids import number
from ..support.isolation import simulate

# Whether transactions that have nothing in common vote at the same time.
SIDE_BY_SIDE = True
SHORT_SEEDS = [int(seed) for seed in os.environ.get("ISOLATION_SEED", "1 2 3").split()]
SHORT_STEPS = int(os.environ.get("ISOLATION_STEPS", 2000))
LONG_SEEDS = range(100, 160)
LONG_STEPS = 5000
# What must have happened in a run of some length, or it would prove nothing.
MUST_HAPPEN = {
    "ClientDisconnected",
    "ConflictError",
    "ReadConflictError",
    "TransactionTimeout in finish",
    "committed",
    "committed at once",
    "cut when voting",
    "given up when voted",
    "merged",
    "undone",
    "votes that wait",
}


def run(tmp_path, monkeypatch, seed, steps):
    print(f"ISOLATION_SEED={seed} ISOLATION_STEPS={steps}")
    seen = simulate(
        tmp_path / "Data.fs", seed, steps, monkeypatch, votes_side_by_side=SIDE_BY_SIDE
    )
    print(dict(sorted(seen.items())))
    return seen


@pytest.mark.parametrize("seed", SHORT_SEEDS)
def test_a_short_random_run_finds_no_anomaly(tmp_path, monkeypatch, seed):
    run(tmp_path, monkeypatch, seed, SHORT_STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", LONG_SEEDS)
def test_a_long_random_run_finds_no_anomaly(tmp_path, monkeypatch, seed):
    seen = run(tmp_path, monkeypatch, seed, LONG_STEPS)
    assert seen.keys() >= MUST_HAPPEN


# The model itself

A, B = number(1), number(2)
T1, T2, T3, T4 = map(number, (1, 2, 3, 4))


@pytest.fixture
def history():
    """A is a cell, B a counter; each has two revisions."""
    history = History([Committed(T1, {A: 10, B: 10})], {B})
    history.append(T2, {A: 20, B: 15})
    return history


def test_the_model_sees_what_was_at_a_snapshot(history):
    assert history.at(A, T1) == Revision(T1, 10)
    assert history.at(A) == Revision(T2, 20)
    assert history.next_tid(A, T1) == T2
    assert history.next_tid(A, T2) is None


def test_the_model_takes_no_tid_that_does_not_grow(history):
    with pytest.raises(AssertionError, match="grow"):
        history.append(T2, {A: 30})


def test_the_model_merges_counters_and_refuses_cells(history):
    old = {A: Revision(T1, 10), B: Revision(T1, 10)}
    assert history.outcome(old, {B: 11}) == {B: 16}
    with pytest.raises(Refused):
        history.outcome(old, {A: 11})
    assert history.outcome({A: Revision(T2, 20)}, {A: 11}) == {A: 11}


def test_the_model_undoes_what_nobody_has_changed_since(history):
    assert history.undone(T2) == {A: 10, B: 10}
    history.append(T3, {B: 16})
    assert history.undone(T2) == {A: 10, B: 11}
    history.append(T4, {A: 30})
    with pytest.raises(Refused):
        history.undone(T2)


def test_the_model_undoes_nothing_that_is_packed(history):
    history.pack(T2)
    assert [each.tid for each in history.commits] == [T2]
    with pytest.raises(Refused, match="packed"):
        history.undone(T2)


def test_the_model_knows_what_a_pack_may_keep(history):
    before = list(history.commits)
    history.pack(T2)
    assert history.without_what_a_pack_may_keep(before) == history.commits
    strange = [Committed(T1, {A: 11}), *history.commits]
    assert history.without_what_a_pack_may_keep(strange) == strange
