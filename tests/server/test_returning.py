"""Clients that come back: what they missed, and what they know that is still true."""

import asyncio
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from zeolith.protocol.limits import Limits
from zeolith.protocol.messages import Failure, Message, Notice, Welcome
from zeolith.storage.changes import Changes

from ..support.ids import number
from ..support.memory import UNHURRIED, MemoryClient, MemorySession, hello_fields
from ..support.model import ModelDatabase, ModelServer

OID = number(1)
# In so small pieces are changes told.
SMALL = replace(UNHURRIED, notice_oids_max=3, notice_changes_max=2)


class LongAgo(ModelServer):
    """A server whose log has ten changes, of which it remembers the last three."""

    def __init__(self, limits: Limits = UNHURRIED, remembered: int = 3) -> None:
        super().__init__(ModelDatabase(), limits)
        self.database.last_tid = number(10 - remembered)
        self.served.start_afresh(self.database.standing())
        self.served.changes = Changes(number(10 - remembered), changes_max=remembered)
        self.served.replays.start_afresh(self.served.changes)
        while self.database.last_tid < number(10):
            self.commit(OID, b"data")
        log = self.served.changes.since(number(10 - remembered)) or []
        older = [
            log[0]._replace(since=number(n - 1), tid=number(n))
            for n in range(1, 11 - remembered)
        ]
        self.database.log = [*older, *log]

    def commits(self, count: int = 1) -> None:
        for _ in range(count):
            self.commit(OID, b"data")
            self.database.log += (
                self.served.changes.since(self.database.log[-1].tid) or []
            )


class Returned:
    """A client that has said hello, from a position."""

    def __init__(self, server: LongAgo, position: int, **fields: Any):
        self.client = MemoryClient(server.service, server.limits)
        hello = hello_fields(position=number(position), **fields)
        now = asyncio.get_running_loop().time()
        self.client.send(self.client.connection.hello(hello, now))
        self.messages: list[Message] = []

    def come(self) -> list[Message]:
        self.messages += self.client.received()
        return self.messages

    @property
    def welcome(self) -> dict[str, Any]:
        welcome = self.come()[0]
        assert isinstance(welcome, Welcome), welcome
        return welcome.fields

    @property
    def told(self) -> list[int]:
        """The tids of all changes that it was told, in the order they came."""
        changes = [*(self.welcome["changes"] or [])]
        for message in self.messages[1:]:
            assert isinstance(message, Notice)
            changes += message.args[0]
        for before, after in pairwise(changes):
            assert before[1] == after[0], "a gap"
        return [int.from_bytes(each[1], "big") for each in changes]


@pytest.fixture
async def server() -> LongAgo:
    return LongAgo()


async def test_what_is_remembered_is_told_at_once(server):
    assert Returned(server, 7).told == [8, 9, 10]
    assert server.served.counters.replays == 0


async def test_what_is_older_is_read_before_the_welcome(server):
    returned = Returned(server, 2)
    assert returned.come() == []
    await server.workers.work()
    assert returned.told == list(range(3, 11))
    assert returned.welcome["last_tid"] == number(10)
    assert server.served.counters.replays == 1


async def test_others_are_welcome_while_the_log_is_read(server):
    waiting = Returned(server, 2)
    assert Returned(server, 9).told == [10]
    assert waiting.come() == []
    assert len(server.service.sessions) == 1


@pytest.mark.parametrize("before", [0, 1, 3, 4])
@pytest.mark.parametrize("after", [0, 1, 3, 4])
async def test_commits_at_every_step_are_told_once_and_in_order(server, before, after):
    """Between the hello and the reading, and between the welcome and its reader."""
    returned = Returned(server, 2)
    server.commits(before)
    await server.workers.work()
    server.commits(after)
    assert returned.told == list(range(3, 11 + before + after))
    assert returned.welcome["last_tid"] == number(10 + before)


async def test_a_commit_just_before_the_answer_is_not_lost(server):
    """The reading is done; the loop does something else before it hears of it."""
    returned = Returned(server, 2)
    step, reading = server.workers._reads.popleft()
    reading.set_result(step())
    server.commits(1)
    await asyncio.sleep(0)
    server.commits(1)
    assert returned.told == list(range(3, 13))


async def test_a_position_that_never_was_is_unknown(server):
    server.database.log_begins = number(5)
    returned = Returned(server, 3)
    await server.workers.work()
    assert returned.welcome["changes"] is None
    assert returned.welcome["last_tid"] == number(10)
    server.commits(1)
    assert returned.told == [11]
    assert server.served.counters.replays == 0


@pytest.mark.parametrize(
    "fields", [{"database_id": b"another-database"}, {"database_id": None, "epoch": 2}]
)
async def test_the_log_is_not_read_for_a_client_of_another_history(server, fields):
    assert Returned(server, 2, **fields).welcome["changes"] is None
    assert not server.database.steps


async def test_who_has_gone_meanwhile_is_not_welcomed(server):
    returned = Returned(server, 2)
    await returned.client.lose()
    await server.workers.work()
    assert not server.service.sessions
    assert not server.served.followers


async def test_a_server_that_stops_meanwhile_refuses(server):
    returned = Returned(server, 2)
    server.service.is_stopping = True
    await server.workers.work()
    [refusal] = returned.come()
    assert isinstance(refusal, Failure)
    assert refusal.attributes == {"reason": "stopping"}


async def test_a_storage_that_starts_afresh_meanwhile_is_another_one(server):
    returned = Returned(server, 2)
    standing = server.database.standing()._replace(database_id=b"model-database-2")
    server.served.start_afresh(standing)
    assert returned.welcome["changes"] is None
    await server.workers.work()
    assert len(returned.come()) == 1


async def test_hundreds_that_come_together_cost_two_readings(server):
    all_ = [Returned(server, n % 7) for n in range(300)]
    await server.workers.work()
    for n, returned in enumerate(all_):
        assert returned.told == list(range(n % 7 + 1, 11))
    assert server.database.steps.count("changes before") <= 2


# What is too much for a welcome


async def test_the_rest_comes_right_behind_the_welcome():
    server = LongAgo(SMALL)
    returned = Returned(server, 1)
    await server.workers.work()
    assert len(returned.welcome["changes"]) == 2
    notices = [each for each in returned.messages if isinstance(each, Notice)]
    assert [len(each.args[0]) for each in notices] == [2, 2, 2, 1]
    assert returned.told == list(range(2, 11))
    assert returned.welcome["last_tid"] == number(10)
    server.commits(2)
    assert returned.told == list(range(2, 13))


async def test_what_is_remembered_comes_in_pieces_too():
    server = LongAgo(SMALL)
    returned = Returned(server, 7)
    assert len(returned.welcome["changes"]) == 2
    assert returned.told == [8, 9, 10]


async def test_who_does_not_read_is_sent_the_rest_when_it_does():
    """As much as waits for a laggard, and no more."""
    server = LongAgo(replace(SMALL, lag_bytes_max=100))
    returned = Returned(server, 1)
    returned.client.transport.stop_reading()
    await server.workers.work()
    # The welcome and what fits.
    assert returned.client.transport.get_write_buffer_size() < 1500
    server.commits(2)
    for _ in range(20):
        returned.client.transport.read_once()
    assert returned.told == list(range(2, 13))
    assert not server.served._behind
    assert not server.served._long_ago


async def test_who_reads_too_slowly_has_to_come_again():
    """What it lacks is long ago, and what came after that is forgotten."""
    server = LongAgo(replace(SMALL, lag_bytes_max=100))
    returned = Returned(server, 1)
    returned.client.transport.stop_reading()
    await server.workers.work()
    server.commits(10)
    returned.client.transport.read_on()
    await asyncio.sleep(0)
    assert returned.client.goodbye().reason == "behind"
    assert not server.served.followers
    assert not server.served._long_ago


async def test_what_is_forgotten_before_it_is_announced_ends_the_session():
    server = LongAgo(replace(SMALL, lag_bytes_max=100))
    returned = Returned(server, 1)
    returned.client.transport.stop_reading()
    await server.workers.work()
    for tid in range(11, 20):
        server.served.append(number(tid), [OID], None)
    returned.client.transport.read_on()
    assert returned.client.goodbye().reason == "behind"


async def test_nothing_is_left_of_who_leaves_in_the_middle():
    server = LongAgo(replace(SMALL, lag_bytes_max=100))
    returned = Returned(server, 1)
    returned.client.transport.stop_reading()
    await server.workers.work()
    assert server.served._long_ago
    await returned.client.lose()
    assert not server.served._long_ago
    assert not server.served._behind


# changes_since


async def test_changes_since_long_ago_are_read(server):
    channel = MemorySession(server.service).channel()
    request = channel.ask("changes_since", number(2))
    assert channel.answer(request) is None
    server.commits(1)
    await server.workers.work()
    last_tid, changes = channel.value(request)
    assert last_tid == number(11)
    assert [each[1] for each in changes] == list(map(number, range(3, 12)))


async def test_changes_since_a_strange_position_are_unknown(server):
    server.database.log_begins = number(5)
    channel = MemorySession(server.service).channel()
    request = channel.ask("changes_since", number(2))
    await server.workers.work()
    assert channel.value(request) == [number(10), None]


async def test_of_very_many_changes_the_first_are_answered():
    """The others come on the stream."""
    server = LongAgo(SMALL)
    channel = MemorySession(server.service).channel()
    last_tid, changes = channel.value(channel.ask("changes_since", number(7)))
    assert last_tid == number(10)
    assert [each[1] for each in changes] == [number(8), number(9)]


# last_known and verify


async def test_the_last_tid_in_common_is_found(server):
    channel = MemorySession(server.service).channel()
    request = channel.ask("last_known", [number(20), number(6), number(3)])
    await server.workers.work()
    assert channel.value(request) == [number(6), number(0)]
    request = channel.ask("last_known", [number(20)])
    await server.workers.work()
    assert channel.value(request) == [None, number(0)]


async def test_a_tid_that_was_not_announced_is_not_in_common(server):
    server.database.log.append(server.database.log[-1]._replace(tid=number(11)))
    channel = MemorySession(server.service).channel()
    request = channel.ask("last_known", [number(11), number(3)])
    await server.workers.work()
    assert channel.value(request) == [number(3), number(0)]


async def test_revisions_are_verified_in_a_thread(server):
    channel = MemorySession(server.service).channel()
    revisions = [[OID, number(10)], [number(2), number(3)]]
    request = channel.ask("verify", revisions)
    assert channel.answer(request) is None
    server.commits(1)
    await server.workers.work()
    # As of the question; that OID has changed since may be told, too.
    assert channel.value(request) == [number(10), [OID, number(2)]]
    assert server.served.counters.verified == 2


@pytest.mark.parametrize(
    ("method", "argument"), [("last_known", OID), ("verify", [OID, OID])]
)
async def test_no_more_than_allowed_is_asked_at_once(server, method, argument):
    limits = replace(UNHURRIED, verify_max=3, last_known_max=3)
    server = LongAgo(limits)
    channel = MemorySession(server.service).channel()
    request = channel.ask(method, [argument] * 3)
    await server.workers.work()
    channel.value(request)
    failure = channel.failure(channel.ask(method, [argument] * 4))
    assert failure.name == "ValueError"
    assert "more than 3" in failure.text


async def test_a_log_that_cannot_be_read_is_an_error(server, monkeypatch):
    def fail(*_args: object) -> None:
        raise OSError(5, "the disk is broken")

    monkeypatch.setattr(server.database, "last_known", fail)
    channel = MemorySession(server.service).channel()
    request = channel.ask("last_known", [OID])
    await server.workers.work()
    assert "the disk is broken" in channel.failure(request).text
