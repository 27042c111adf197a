"""Indexes are saved in time, one at a time, and whatever comes of it."""

import asyncio
import logging

import pytest

from zeolith.server.indexing import IndexSaver
from zeolith.server.served import Served
from zeolith.storage.changes import Changes

from ..support.ids import number
from ..support.model import HandWorkers, ModelDatabase

INTERVAL_S = 10


def served(name: str) -> tuple[ModelDatabase, HandWorkers, Served]:
    database, workers = ModelDatabase(name), HandWorkers()
    return (
        database,
        workers,
        Served(database, workers, Changes(number(5)), info=(7, 3), is_read_only=False),
    )


@pytest.fixture
def clock_s() -> float:
    """Some time on the clock of the loop, which began before the server did."""
    return 1234.0


async def test_every_database_has_its_turn_once_in_an_interval(clock_s):
    one, one_workers, one_served = served("one")
    two, two_workers, two_served = served("two")
    saver = IndexSaver([one_served, two_served], INTERVAL_S)
    for second in range(35):
        saver.tick(clock_s + second)
        await one_workers.work()
        await two_workers.work()
    assert one.steps == two.steps == ["save_index"] * 4


async def test_what_was_read_at_the_start_is_saved_after_it(clock_s):
    database, workers, one = served("one")
    saver = IndexSaver([one], INTERVAL_S)
    saver.tick(clock_s)
    await workers.work()
    saver.tick(clock_s + INTERVAL_S - 1)
    await workers.work()
    assert database.steps == ["save_index"]


async def test_the_next_waits_for_the_one_before(clock_s):
    database, workers, one = served("one")
    saver = IndexSaver([one], INTERVAL_S)
    for turn in range(4):
        saver.tick(clock_s + turn * INTERVAL_S)
    await workers.work()
    assert database.steps == ["save_index"]
    saver.tick(clock_s + 4 * INTERVAL_S)
    await workers.work()
    assert database.steps == ["save_index"] * 2


async def test_the_interval_may_change_at_any_time(clock_s):
    database, workers, one = served("one")
    saver = IndexSaver([one], INTERVAL_S)
    saver.tick(clock_s)
    await workers.work()
    saver.interval_s = 2
    saver.tick(clock_s + 2)
    await workers.work()
    assert database.steps == ["save_index"] * 2


@pytest.mark.parametrize(
    ("error", "level"), [(OSError("no space"), "WARNING"), (TypeError(), "ERROR")]
)
async def test_what_goes_wrong_is_told_and_tried_again(clock_s, caplog, error, level):
    database, workers, one = served("one")
    database.save_error = error
    saver = IndexSaver([one], INTERVAL_S)
    for turn in range(3):
        saver.tick(clock_s + turn * INTERVAL_S)
        await workers.work()
        # The callback of the future.
        await asyncio.sleep(0)
    assert database.steps == ["save_index"] * 3
    assert [each.levelname for each in caplog.records] == [level] * 3
    assert "storage one" in caplog.text
    assert (level == "ERROR") == (
        "Traceback" in caplog.text or "TypeError" in caplog.text
    )


async def test_a_server_that_ends_meanwhile_is_no_failure(clock_s, caplog, monkeypatch):
    _database, workers, one = served("one")
    asked: list[asyncio.Future[bool]] = []

    def never(*_args: object) -> "asyncio.Future[bool]":
        asked.append(asyncio.get_running_loop().create_future())
        return asked[-1]

    monkeypatch.setattr(workers, "read", never)
    caplog.set_level(logging.DEBUG)
    saver = IndexSaver([one], INTERVAL_S)
    saver.tick(clock_s)
    asked[0].cancel()
    await asyncio.sleep(0)
    assert not [each for each in caplog.records if each.name.startswith("zeolith")]
