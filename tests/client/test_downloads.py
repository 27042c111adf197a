"""A blob comes in parts, several of them on their way, and goes on where it broke."""

import errno
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ZODB.POSException import POSKeyError, StorageError

from zeolith.client.downloads import PARTS_AHEAD, fetch
from zeolith.client.errors import ChannelLost, ClientDisconnected
from zeolith.protocol.limits import Limits

from ..support.ids import number

A, B = number(1), number(2)
T1 = number(11)
SMALL = Limits(batch_bytes_max=10)


class Server:
    """A blob at a server, which loses the connection before some of its answers."""

    def __init__(self, data: bytes, part: int = 10, breaks: Iterable[bool] = ()):
        self.data = data
        self._part = part
        self._breaks = iter(breaks)
        self.asked: list[int] = []
        self.conversations = 0
        self.open = 0

    def converse(self, step: Callable[[Any], None]) -> None:
        """As ClientStorage does it, which tries again as long as it may."""
        for _attempt in range(10):
            self.conversations += 1
            try:
                return step(self)
            except ChannelLost as error:
                lost = error
        raise ClientDisconnected("too often") from lost

    def call(self, method: str, *args: Any) -> Any:
        assert method == "load_blob"
        oid, tid, offset, size = args
        if (oid, tid) != (A, T1):
            raise POSKeyError(oid)
        self.asked.append(offset)
        if next(self._breaks, False):
            raise ChannelLost("cut")
        return len(self.data), self.data[offset : offset + min(size, self._part)]

    def answers(
        self, method: str, calls: Iterable[Sequence[Any]], ahead: int
    ) -> Iterator[Any]:
        assert ahead == PARTS_AHEAD
        calls = iter(calls)
        self.open += 1
        try:
            while batch := list(islice(calls, ahead)):
                for args in batch:
                    yield self.call(method, *args)
        finally:
            self.open -= 1


def fetched(server: Server, oid: bytes = A) -> bytes:
    file = io.BytesIO()
    fetch(server.converse, oid, T1, file, SMALL)
    return file.getvalue()


@pytest.mark.parametrize(
    ("size", "offsets"), [(0, [0]), (5, [0]), (10, [0]), (25, [0, 10, 20])]
)
def test_a_blob_is_fetched_in_parts(size, offsets):
    server = Server(os.urandom(size))
    assert fetched(server) == server.data
    assert server.asked == offsets
    assert server.conversations == 1


def test_a_server_may_give_less_at_a_time():
    server = Server(os.urandom(25), part=7)
    assert fetched(server) == server.data
    assert server.asked == [0, 7, 14, 21]


@given(st.integers(0, 200), st.integers(1, 12), st.data())
def test_a_fetch_goes_on_where_the_connection_broke(size, part, data):
    breaks = data.draw(st.lists(st.booleans(), max_size=9))
    server = Server(bytes(n % 251 for n in range(size)), part, breaks)
    assert fetched(server) == server.data
    assert server.asked == sorted(server.asked)


def test_a_connection_that_is_lost_too_often_is_given_up():
    with pytest.raises(ClientDisconnected):
        fetched(Server(bytes(100), breaks=[True] * 100))


def test_every_part_that_comes_begins_the_waiting_anew():
    breaks = [False, *([True] * 9 + [False]) * 9]
    server = Server(os.urandom(100), breaks=breaks)
    assert fetched(server) == server.data


def test_a_blob_that_is_not_there_is_a_missing_key():
    with pytest.raises(POSKeyError):
        fetched(Server(b""), B)


@pytest.mark.parametrize("size", [24, 26, 0])
def test_a_blob_that_is_another_one_at_the_next_server_is_not_put_together(size):
    server = Server(bytes(25), breaks=[False, True])

    def converse(step: Callable[[Any], None]) -> None:
        server.converse(step)
        server.data = bytes(size)

    with pytest.raises(StorageError, match="has changed"):
        fetch(converse, A, T1, io.BytesIO(), SMALL)


def test_a_server_that_gives_no_more_is_not_asked_for_ever():
    server = Server(bytes(25), part=0)
    with pytest.raises(StorageError, match="has changed"):
        fetched(server)


def test_a_disk_that_is_full_ends_the_conversation_at_once():
    """Not when the error is forgotten, which may be kept: in a log, in a retry."""

    class Full(io.BytesIO):
        def write(self, data: Any, /) -> int:
            if self.tell() + len(data) > 20:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    server = Server(bytes(100))
    with pytest.raises(OSError, match="No space") as kept:
        fetch(server.converse, A, T1, Full(), SMALL)
    assert server.open == 0
    assert kept.value.__traceback__ is not None
