import asyncio
from dataclasses import replace
from typing import Any

import pytest

from zeolith.protocol.codec import decode
from zeolith.protocol.frames import FrameReader
from zeolith.protocol.limits import DEFAULT
from zeolith.protocol.messages import Notice
from zeolith.server import served as served_module
from zeolith.server.served import Served
from zeolith.storage.changes import Changes
from zeolith.storage.database import Standing

from ..support.ids import number, transaction_id
from ..support.model import HandWorkers, ModelDatabase, publish


class Listener:
    """A follower that keeps what it is sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.is_lagging = False
        self.told_tid = number(0)
        self.has_fallen_behind = False

    def send_shared(self, data: bytes) -> None:
        self.sent.append(data)

    def fall_behind(self) -> None:
        self.has_fallen_behind = True

    def tids(self) -> list[Any]:
        return [tid for data in self.sent for _since, tid, *_ in changes_in(data)]


class Leaver(Listener):
    """A follower whose end comes while it is sent something."""

    def __init__(self, served: Served, *others: Listener):
        super().__init__()
        self._served = served
        self._leaving = (self, *others)

    def send_shared(self, data: bytes) -> None:
        for each in self._leaving:
            self._served.unfollow(each)


def changes_in(data: bytes) -> list[list[Any]]:
    (payload,) = FrameReader(2**20).feed(data)
    notice = decode(payload)
    assert isinstance(notice, Notice)
    assert notice.method == "changes"
    changes: list[list[Any]] = notice.args[0]
    return changes


@pytest.fixture
async def served() -> Served:
    database = ModelDatabase()
    return Served(
        database, HandWorkers(), Changes(number(5)), info=(7, 3), is_read_only=False
    )


async def test_a_follower_is_told_the_last_tid_and_everything_after_it(served):
    early, late = Listener(), Listener()
    assert served.follow(early) == number(5)
    publish(served, number(6), [number(1)])
    assert served.follow(late) == number(6)
    publish(served, number(8), [number(1), number(2)], transaction_id(1))
    assert early.tids() == [number(6), number(8)]
    assert changes_in(late.sent[0]) == [
        [number(6), number(8), [number(1), number(2)], transaction_id(1)]
    ]


async def test_all_followers_are_sent_the_same_bytes(served):
    followers = [Listener() for _ in range(3)]
    for each in followers:
        served.follow(each)
    publish(served, number(6), [number(1)])
    first, *others = [each.sent[0] for each in followers]
    assert all(sent is first for sent in others)


async def test_who_has_left_is_sent_no_more(served):
    follower = Listener()
    served.follow(follower)
    served.unfollow(follower)
    served.unfollow(follower)
    publish(served, number(6), [])
    assert not follower.sent


@pytest.mark.parametrize("leavers", [1, 5])
async def test_a_follower_that_leaves_in_the_middle_hides_nothing_from_others(
    served, leavers
):
    followers = [Listener() for _ in range(20)]
    for n, follower in enumerate(followers):
        served.follow(follower)
        if n < leavers:
            served.follow(Leaver(served))
    publish(served, number(6), [number(1)])
    assert all(follower.tids() == [number(6)] for follower in followers)
    assert len(served.followers) == len(followers)


async def test_a_follower_may_take_others_along(served):
    others = [Listener() for _ in range(5)]
    served.follow(Leaver(served, *others[1:]))
    for each in others:
        served.follow(each)
    publish(served, number(6), [number(1)])
    assert served.followers == {others[0]}
    assert others[0].tids() == [number(6)]


# Those who do not keep up


def contiguous(listener: Listener, after: bytes) -> None:
    """Each change that was sent names the one before it."""
    for data in listener.sent:
        for since, tid, *_ in changes_in(data):
            assert since == after
            after = tid


async def test_who_lags_is_sent_what_it_missed_together(served):
    slow, quick = Listener(), Listener()
    for each in (slow, quick):
        served.follow(each)
    publish(served, number(6), [number(1)])
    slow.is_lagging = True
    for tid in (7, 8, 9):
        publish(served, number(tid), [number(tid)], transaction_id(tid))
    assert slow.tids() == [number(6)]
    slow.is_lagging = False
    served.catch_up(slow)
    publish(served, number(10), [])
    assert slow.tids() == quick.tids() == [number(tid) for tid in range(6, 11)]
    assert [len(changes_in(data)) for data in slow.sent] == [1, 3, 1]
    assert changes_in(slow.sent[1])[2] == [
        number(8),
        number(9),
        [number(9)],
        transaction_id(9),
    ]
    contiguous(slow, number(5))


async def test_who_lags_from_its_first_moment_misses_nothing(served):
    slow = Listener()
    slow.is_lagging = True
    assert served.follow(slow) == number(5)
    publish(served, number(6), [])
    publish(served, number(7), [])
    slow.is_lagging = False
    served.catch_up(slow)
    assert slow.tids() == [number(6), number(7)]
    contiguous(slow, number(5))


async def test_who_has_missed_nothing_is_sent_nothing(served):
    follower = Listener()
    served.follow(follower)
    publish(served, number(6), [])
    follower.is_lagging = True
    follower.is_lagging = False
    served.catch_up(follower)
    served.catch_up(Listener())
    assert follower.tids() == [number(6)]


async def test_those_who_lag_alike_are_sent_the_same_bytes(served):
    early, late, other = followers = [Listener() for _ in range(3)]
    for each in (early, late):
        served.follow(each)
        each.is_lagging = True
    publish(served, number(6), [number(1)])
    publish(served, number(7), [number(2)])
    served.follow(other)
    other.is_lagging = True
    publish(served, number(8), [number(3)])
    for each in followers:
        each.is_lagging = False
        served.catch_up(each)
    assert early.sent[0] is late.sent[0]
    assert early.tids() == late.tids() == [number(6), number(7), number(8)]
    assert other.tids() == [number(8)]
    # Nothing is kept for nobody.
    assert served._gathered is None


async def test_what_comes_between_two_who_lag_alike_is_not_lost(served):
    early, late = followers = Listener(), Listener()
    for each in followers:
        served.follow(each)
        each.is_lagging = True
    publish(served, number(6), [])
    early.is_lagging = False
    served.catch_up(early)
    publish(served, number(7), [])
    late.is_lagging = False
    served.catch_up(late)
    for each in followers:
        assert each.tids() == [number(6), number(7)]
        contiguous(each, number(5))


async def test_who_takes_only_a_part_is_sent_the_rest_later():
    class Sipping(Listener):
        def send_shared(self, data: bytes) -> None:
            super().send_shared(data)
            self.is_lagging = True

    served = Served(
        ModelDatabase(),
        HandWorkers(),
        Changes(number(5)),
        info=(7, 3),
        is_read_only=False,
        limits=replace(DEFAULT, notice_oids_max=4),
    )
    follower = Sipping()
    served.follow(follower)
    oids = [[number(n) for n in range(size)] for size in (1, 2, 2, 9, 1, 1)]
    for tid, changed in enumerate(oids, 6):
        publish(served, number(tid), changed)
    assert follower.tids() == [number(6)]
    sizes = []
    for _ in range(5):
        follower.is_lagging = False
        served.catch_up(follower)
        sizes.append([len(change[2]) for change in changes_in(follower.sent[-1])])
    # Four oids each, but a change is never divided; and nothing twice.
    assert sizes == [[2, 2], [9], [1, 1], [1, 1], [1, 1]]
    assert len(follower.sent) == 4
    contiguous(follower, number(5))


async def test_many_changes_that_come_together_are_announced_together(served):
    follower = Listener()
    served.follow(follower)
    changes = [served.append(number(tid), [number(1)], None) for tid in (6, 7, 8)]
    served.announce(changes)
    served.announce([])
    assert [len(changes_in(data)) for data in follower.sent] == [3]
    contiguous(follower, number(5))


async def test_who_is_too_far_behind_must_go(served):
    served.changes = Changes(number(5), changes_max=3)
    slow, quick = Listener(), Listener()
    for each in (slow, quick):
        served.follow(each)
    slow.is_lagging = True
    for tid in (6, 7, 8):
        publish(served, number(tid), [])
        assert not slow.has_fallen_behind
    publish(served, number(9), [])
    assert slow.has_fallen_behind
    assert served.followers == {quick}
    # It reads after all, or its end comes: neither brings it back.
    slow.is_lagging = False
    served.catch_up(slow)
    served.unfollow(slow)
    assert not slow.sent
    assert len(quick.tids()) == 4


async def test_who_leaves_while_it_lags_is_forgotten(served):
    slow = Listener()
    served.follow(slow)
    slow.is_lagging = True
    publish(served, number(6), [])
    served.unfollow(slow)
    assert not served._behind
    slow.is_lagging = False
    served.catch_up(slow)
    publish(served, number(7), [])
    assert not slow.sent


async def test_who_is_taken_along_while_it_lags_is_forgotten(served):
    # Nobody knows whose turn comes first.
    for tid in range(6, 26):
        others = [Listener() for _ in range(20)]
        served.follow(Leaver(served, *others))
        for each in others:
            served.follow(each)
            each.is_lagging = True
        publish(served, number(tid), [])
        assert not served.followers
        assert not served._behind


async def test_the_horizon_is_just_after_the_last_tid(served):
    assert served.horizon == number(6)
    publish(served, number(9), [])
    assert served.horizon == number(10)


async def test_what_is_published_can_be_asked_for_afterwards(served):
    publish(served, number(6), [number(1)])
    (change,) = served.changes.since(number(5))
    assert change == (number(5), number(6), [number(1)], None)


async def test_the_last_tid_is_the_new_one_when_followers_hear_of_it(served):
    class Reader(Listener):
        def send_shared(self, data: bytes) -> None:
            seen.append((served.changes.last_tid, served.horizon))

    seen: list[tuple[bytes, bytes]] = []
    served.follow(Reader())
    publish(served, number(6), [])
    assert seen == [(number(6), number(7))]


async def test_a_database_that_is_read_only_is_served_so():
    database = ModelDatabase(is_read_only=True)
    served = Served(
        database, HandWorkers(), Changes(number(0)), info=(0, 0), is_read_only=False
    )
    assert served.is_read_only


# Several together


def tids_of(listener: Listener) -> list[list[bytes]]:
    return [[tid for _since, tid, *_ in changes_in(data)] for data in listener.sent]


async def test_changes_wait_for_those_that_come_soon_and_not_for_long(
    served, monkeypatch
):
    monkeypatch.setattr(served_module, "ANNOUNCE_WAIT_S", 0)
    listener = Listener()
    served.follow(listener)
    served.announce([served.append(number(6), [], None)], more_soon=True)
    served.announce([served.append(number(7), [], None)], more_soon=True)
    assert not listener.sent
    await asyncio.sleep(0.001)
    assert tids_of(listener) == [[number(6), number(7)]]


async def test_who_was_told_with_an_answer_is_not_told_again(served):
    committer, listener = Listener(), Listener()
    served.follow(committer)
    served.follow(listener)
    changes = [served.append(number(6), [], None), served.append(number(7), [], None)]
    committer.told_tid = number(7)
    served.announce(changes)
    assert not committer.sent
    assert tids_of(listener) == [[number(6), number(7)]]
    served.announce([served.append(number(8), [], None)])
    assert tids_of(committer) == [[number(8)]]


async def test_who_was_told_a_moment_ago_waits_for_the_next_time(served):
    """Each call is what the clock does next."""
    committer, listener = Listener(), Listener()
    served.follow(committer)
    served.follow(listener)
    served.announce([served.append(number(6), [], None)], more_soon=True)
    served._announce_overdue()
    assert not listener.sent
    served.announce([served.append(number(7), [], None)], more_soon=True)
    committer.told_tid = number(7)
    served._announce_overdue()
    assert tids_of(listener) == [[number(6), number(7)]]
    assert not committer.sent
    served.announce([served.append(number(8), [], None)], more_soon=True)
    served._announce_overdue()
    assert len(listener.sent) == 1
    assert not committer.sent
    # Nothing came, and what is there has waited once.
    served._announce_overdue()
    assert tids_of(listener)[1:] == [[number(8)]]
    assert tids_of(committer) == [[number(8)]]
    assert served._announcing is None


async def test_who_lags_among_several_notices_is_sent_the_rest_later(served):
    served._limits = replace(DEFAULT, notice_oids_max=1)

    class Full(Listener):
        def send_shared(self, data: bytes) -> None:
            super().send_shared(data)
            self.is_lagging = True

    full = Full()
    served.follow(full)
    changes = [served.append(number(n), [number(n)], None) for n in (6, 7, 8)]
    served.announce(changes)
    assert tids_of(full) == [[number(6)]]
    full.is_lagging = False
    served.catch_up(full)
    full.is_lagging = False
    served.catch_up(full)
    assert full.tids() == [number(6), number(7), number(8)]
    assert full.told_tid == number(8)


async def test_changes_are_told_with_those_after_which_none_come_soon(served):
    listener = Listener()
    served.follow(listener)
    served.announce([served.append(number(6), [], None)], more_soon=True)
    served.announce([served.append(number(7), [], None)])
    assert tids_of(listener) == [[number(6), number(7)]]
    # And the clock has nothing to tell any more.
    assert served._announcing is None


async def test_many_are_told_when_the_committer_has_had_its_answer(served, monkeypatch):
    monkeypatch.setattr(served_module, "MANY_WAIT_S", 0)
    many = [Listener() for _ in range(served_module.FEW_MAX + 1)]
    for each in many[1:]:
        served.follow(each)
    served.announce([served.append(number(6), [], None)])
    assert tids_of(many[1]) == [[number(6)]]
    served.follow(many[0])
    served.announce([served.append(number(7), [], None)], more_soon=True)
    waiting = served._announcing
    served.announce([served.append(number(8), [], None)])
    assert len(many[1].sent) == 1
    # Sooner than five milliseconds; and what comes then does not put it off.
    assert served._announcing is not waiting
    waiting = served._announcing
    served.announce([served.append(number(9), [], None)], more_soon=True)
    assert served._announcing is waiting
    await asyncio.sleep(0.001)
    told = [number(7), number(8), number(9)]
    assert all(tids_of(each)[-1] == told for each in many)
    await asyncio.sleep(served_module.ANNOUNCE_WAIT_S)
    assert len(many[1].sent) == 2


async def test_who_comes_while_changes_wait_misses_none(served):
    served.announce([served.append(number(6), [], None)], more_soon=True)
    listener = Listener()
    assert served.follow(listener) == number(6)
    served.announce([served.append(number(7), [], None)])
    assert tids_of(listener)[-1][-1] == number(7)


async def test_what_waits_is_not_told_when_all_starts_afresh(served):
    listener = Listener()
    served.follow(listener)
    served.announce([served.append(number(6), [], None)], more_soon=True)
    served.start_afresh(Standing(number(1), b"another-database", 1))
    served.announce([served.append(number(9), [], None)])
    assert tids_of(listener) == [[number(9)]]
