from typing import Any

import pytest

from zeolith.protocol.codec import decode
from zeolith.protocol.frames import FrameReader
from zeolith.protocol.messages import Notice
from zeolith.server.served import Served
from zeolith.storage.changes import Changes

from ..support.ids import number, transaction_id
from ..support.model import HandWorkers, ModelDatabase, publish


class Listener:
    """A follower that keeps what it is sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send_shared(self, data: bytes) -> None:
        self.sent.append(data)

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
