"""What changed long ago: read once for all, and joined with what is known now."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from zeolith.protocol.limits import DEFAULT
from zeolith.server import replays as replays_module
from zeolith.server.replays import Replays
from zeolith.storage.changes import Change, Changes

from ..support.ids import number
from ..support.model import HandWorkers, ModelDatabase, ModelServer

OID = number(1)


def change(tid: int) -> Change:
    return Change(number(tid - 1), number(tid), [OID], None)


class Server:
    """A log of ten changes, of which the last three are remembered."""

    def __init__(self, remembered: int = 3) -> None:
        self.database = ModelDatabase()
        self.database.log = [change(tid) for tid in range(1, 11)]
        self.workers = HandWorkers()
        self.changes = Changes(number(10 - remembered), changes_max=remembered)
        self.changes.extend(self.database.log[10 - remembered :])
        self.replays = Replays(self.database, self.workers, self.changes, 60)
        self.answered: list[Any] = []

    def commit(self) -> None:
        made = change(int.from_bytes(self.changes.last_tid, "big") + 1)
        self.database.log.append(made)
        self.changes.append(made)

    def ask(self, position: int) -> None:
        """Ask, and note what is known when the answer is there."""

        def then() -> None:
            changes = self.replays.since(number(position))
            self.answered.append((position, changes and tids(changes)))

        self.replays.ask(number(position), then)

    @property
    def readings(self) -> int:
        return self.database.steps.count("changes before")


def tids(changes: list[Change]) -> list[int]:
    return [int.from_bytes(change.tid, "big") for change in changes]


def all_from(position: int, last: int = 10) -> tuple[int, list[int]]:
    return position, list(range(position + 1, last + 1))


async def timers_that_are_due() -> None:
    for _ in range(2):
        await asyncio.sleep(0)


@pytest.fixture
async def server() -> Server:
    return Server()


async def test_what_is_remembered_is_told_without_reading(server):
    assert not server.replays.may_be_told(number(7))
    assert tids(server.replays.since(number(7)) or []) == [8, 9, 10]
    assert not server.readings


async def test_what_is_older_is_read(server):
    assert server.replays.since(number(3)) is None
    assert server.replays.may_be_told(number(3))
    server.ask(3)
    assert server.answered == []
    await server.workers.work()
    assert server.answered == [all_from(3)]


async def test_changes_have_no_gaps_where_log_and_memory_meet(server):
    server.ask(0)
    await server.workers.work()
    changes = server.replays.since(number(0))
    assert changes == server.database.log


@pytest.mark.parametrize("commits", [1, 2, 3])
async def test_what_is_committed_while_the_log_is_read_is_told(server, commits):
    """As much as is remembered: the list has moved on meanwhile."""
    server.ask(3)
    for _ in range(commits):
        server.commit()
    await server.workers.work()
    assert server.answered == [all_from(3, 10 + commits)]
    assert server.readings == 1


async def test_what_is_committed_later_is_told_as_well(server):
    server.ask(3)
    await server.workers.work()
    for last in range(11, 20):
        server.commit()
        assert tids(server.replays.since(number(4)) or []) == list(range(5, last + 1))
    assert server.readings == 1


async def test_more_than_is_remembered_makes_another_reading(server):
    server.ask(3)
    for _ in range(5):
        server.commit()
    await server.workers.work()
    assert server.answered == [all_from(3, 15)]
    assert server.readings == 2


async def test_a_log_that_grows_faster_than_it_is_read_is_given_up(server):
    server.ask(3)
    while not server.answered:
        for _ in range(5):
            server.commit()
        await server.workers.read_step()
    assert server.answered == [(3, None)]
    assert server.readings == replays_module.READINGS_MAX


async def test_many_who_come_together_share_a_reading(server):
    for _ in range(100):
        for position in (6, 2, 4):
            server.ask(position)
    await server.workers.work()
    # The first one was being read for when the others came.
    assert server.readings == 2
    assert sorted(server.answered)[0] == all_from(2)
    assert len(server.answered) == 300
    assert all(each == all_from(each[0]) for each in server.answered)


async def test_who_comes_while_the_log_is_read_shares_it_if_it_goes_so_far(server):
    server.ask(2)
    server.ask(5)
    await server.workers.work()
    assert server.answered == [all_from(2), all_from(5)]
    assert server.readings == 1


async def test_who_comes_later_needs_no_reading(server):
    server.ask(2)
    await server.workers.work()
    assert not server.replays.may_be_told(number(4))
    assert tids(server.replays.since(number(4)) or []) == list(range(5, 11))
    # It goes further back.
    assert server.replays.may_be_told(number(1))


async def test_a_position_that_never_was_is_unknown_and_not_read_again(server):
    server.database.log = [each for each in server.database.log if each.tid[-1] != 4]
    server.database.log[3] = server.database.log[3]._replace(since=number(3))
    server.ask(2)
    await server.workers.work()
    assert server.replays.since(number(4)) is None
    assert not server.replays.may_be_told(number(4))


async def test_what_cannot_be_told_is_not_read_for_again(server):
    """Behind a pack, or farther than the bound: whoever asks often reads nothing."""
    server.database.log_begins = number(5)
    server.ask(3)
    await server.workers.work()
    assert server.answered == [(3, None)]
    assert not server.replays.may_be_told(number(3))
    assert not server.replays.may_be_told(number(1))
    server.ask(5)
    await server.workers.work()
    assert server.answered[1:] == [all_from(5)]


async def test_nothing_is_read_that_is_ahead_or_switched_off(server):
    assert not server.replays.may_be_told(number(11))
    assert not server.replays.may_be_told(number(9))
    server.replays.bytes_max = 0
    assert not server.replays.may_be_told(number(3))


async def test_a_disk_that_fails_is_logged_and_everybody_answered(server, caplog):
    server.database.log_error = OSError(5, "the disk is broken")
    server.ask(3)
    server.ask(2)
    await server.workers.work()
    assert server.answered == [(3, None), (2, None)]
    assert "the disk is broken" in caplog.text


async def test_nobody_waits_for_ever_for_a_log_that_is_read_slowly(server, caplog):
    """Nor are those told twice who have given up; who comes later has it at once."""
    server.ask(4)
    server.replays.wait_s = 0
    for position in (3, 2):
        server.ask(position)
    await timers_that_are_due()
    assert server.answered == [(3, None), (2, None)]
    assert caplog.text.count("the log was not read within 0 s") == 1
    await server.workers.work()
    assert server.answered == [(3, None), (2, None), all_from(4)]
    assert tids(server.replays.since(number(4)) or []) == [5, 6, 7, 8, 9, 10]
    assert server.readings == 1


async def test_a_log_that_everybody_has_given_up_is_kept_for_the_next(server):
    server.replays.wait_s = 0
    server.ask(3)
    await timers_that_are_due()
    assert server.answered == [(3, None)]
    await server.workers.work()
    assert not server.replays.may_be_told(number(3))
    assert tids(server.replays.since(number(3)) or []) == list(range(4, 11))


async def test_what_was_read_is_not_kept_for_ever(server, monkeypatch):
    monkeypatch.setattr(replays_module, "KEEP_S", 0)
    server.ask(3)
    await server.workers.work()
    await timers_that_are_due()
    assert server.replays.since(number(3)) is None
    assert server.replays.may_be_told(number(3))


async def test_what_was_read_is_kept_from_the_last_reading_on(server):
    server.ask(3)
    await server.workers.work()
    first = server.replays._forgetting
    server.ask(2)
    await server.workers.work()
    assert first is not None
    assert first.cancelled()
    assert server.replays._forgetting is not None
    assert not server.replays._forgetting.cancelled()


async def test_when_all_starts_afresh_nobody_waits_and_nothing_old_is_told(server):
    server.ask(3)
    server.ask(4)
    # It may even stand where the other one stood.
    afresh = Changes(number(10))
    server.replays.start_afresh(afresh)
    assert server.answered == [(3, None), (4, None)]
    await server.workers.work()
    assert server.replays.since(number(3)) is None
    assert server.replays.since(number(10)) == []
    assert len(server.answered) == 2


async def test_a_reading_that_the_end_cancels_tells_nobody(server):
    server.ask(3)
    [(_step, reading)] = server.workers._reads
    reading.cancel()
    await asyncio.sleep(0)
    assert server.answered == []


async def test_who_is_told_may_ask_again(server):
    """As a hello does that is answered and comes back at once."""
    asked: list[int] = []

    def then() -> None:
        asked.append(1)
        if len(asked) < 3:
            server.replays.ask(number(1), then)

    server.replays.ask(number(3), then)
    await server.workers.work()
    assert len(asked) == 3


async def test_a_hello_is_answered_in_time_whatever_its_time():
    limits = replace(DEFAULT, hello_timeout_s=3.0)
    assert ModelServer(limits=limits).served.replays.wait_s == 1.5
