"""Blobs on their way out and in, with a channel that is a list."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ZODB.POSException import Unsupported
from ZODB.utils import p64

from zeolith.client.blobs import BlobCache, SharedBlobs
from zeolith.client.channel import Channel as Channel_
from zeolith.client.channel import limit_silence
from zeolith.client.errors import ChannelLost
from zeolith.client.uploads import SENT_BYTES, Uploads, open_blobs
from zeolith.protocol.codec import decode
from zeolith.protocol.connection import Connection, Role
from zeolith.protocol.frames import PREFIX_BYTES
from zeolith.protocol.limits import DEFAULT, Limits

from ..support.gates import Background
from ..support.waiting import wait_until

A, B, T1 = p64(1), p64(2), p64(10)
X = b"transaction-0001"
SMALL = Limits(batch_bytes_max=10)


class Channel:
    """Remembers what was sent; is lost after so many messages."""

    def __init__(self, lost_after: int | None = None):
        self.sent: list[list[Any]] = []
        self._lost_after = lost_after

    def send_patiently(self, data: bytes) -> None:
        if len(self.sent) == self._lost_after:
            raise ChannelLost("cut")
        notice: Any = decode(data[PREFIX_BYTES:])
        assert notice.method == "blob_chunk"
        self.sent.append(notice.args)


@pytest.fixture
def cache(tmp_path: Path) -> Any:
    cache = BlobCache(tmp_path / "cache")
    yield cache
    cache.close()


@pytest.fixture
def uploads(cache: BlobCache) -> Uploads:
    return Uploads(cache, X)


def file(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "uncommitted"
    path.write_bytes(data)
    return str(path)


def not_fetched(*_args: Any) -> None:
    raise AssertionError("fetched though it is here")


# Out


@pytest.mark.parametrize(
    ("size", "chunks"), [(0, [0]), (1, [1]), (10, [10]), (25, [10, 10, 5])]
)
def test_a_blob_is_sent_in_chunks(uploads, tmp_path, size, chunks):
    data = os.urandom(size)
    number = uploads.take(A, file(tmp_path, data))
    channel: Any = Channel()
    uploads.send(number, channel, SMALL)
    assert [len(each[2]) for each in channel.sent] == chunks
    assert b"".join(each[2] for each in channel.sent) == data
    assert {(each[0], each[1]) for each in channel.sent} == {(X, 0)}


def test_a_chunk_is_not_larger_than_what_others_can_wait_for(uploads, tmp_path):
    number = uploads.take(A, file(tmp_path, bytes(SENT_BYTES + 1)))
    channel: Any = Channel()
    uploads.send(number, channel, DEFAULT)
    assert [len(each[2]) for each in channel.sent] == [SENT_BYTES, 1]


def test_the_file_is_taken_at_once_and_each_has_a_number(uploads, tmp_path):
    path = file(tmp_path, b"one")
    assert uploads.take(A, path) == 0
    assert not os.path.exists(path)
    assert uploads.take(B, file(tmp_path, b"two")) == 1


def test_a_committed_blob_is_in_the_cache(uploads, cache, tmp_path):
    uploads.take(A, file(tmp_path, b"data"))
    uploads.adopt(T1)
    uploads.close()
    assert Path(cache.path_of(A, T1, not_fetched)).read_bytes() == b"data"


def test_of_two_files_of_an_object_the_last_one_is_kept(uploads, cache, tmp_path):
    uploads.take(A, file(tmp_path, b"one"))
    uploads.take(A, file(tmp_path, b"two"))
    uploads.adopt(T1)
    assert Path(cache.path_of(A, T1, not_fetched)).read_bytes() == b"two"
    assert not os.listdir(cache.temporary_directory())


def test_what_is_not_committed_is_removed(uploads, cache, tmp_path):
    uploads.take(A, file(tmp_path, b"one"))
    uploads.take(B, file(tmp_path, b"two"))
    uploads.close()
    uploads.close()
    assert not os.listdir(cache.temporary_directory())


def test_a_lost_channel_is_told(uploads, tmp_path):
    number = uploads.take(A, file(tmp_path, bytes(100)))
    channel: Any = Channel(lost_after=3)
    with pytest.raises(ChannelLost):
        uploads.send(number, channel, SMALL)
    assert len(channel.sent) == 3


def test_a_storage_without_a_directory_takes_nothing(tmp_path):
    path = file(tmp_path, b"data")
    uploads = Uploads(None, X)
    assert not uploads.is_shared
    with pytest.raises(Unsupported, match="need a blob_dir"):
        uploads.take(A, path)
    uploads.close()


class Socket:
    """A socket that counts how often nothing was taken for its time limit."""

    def __init__(self, sock: socket.socket):
        self._socket = sock
        self.stalls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def send(self, data: Any) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            self.stalls += 1
            raise


@pytest.fixture
def slow() -> Iterator[tuple[Any, Background, socket.socket]]:
    """A channel, what sends over it for longer than its time limit, the far end."""
    near, far = socket.socketpair()
    with far:
        limit_silence(near, 0.01)
        counting: Any = Socket(near)
        channel = Channel_(counting, Connection(Role.CLIENT, 0.0))
        sending = Background(channel.send_patiently, bytes(10 * 2**20))
        wait_until(lambda: counting.stalls > 3, "some time limits to pass")
        yield channel, sending, far
        channel.close()


def test_a_slow_server_is_waited_for_while_its_session_lives(slow):
    """The socket's own time limit passes again and again."""
    _channel, sending, far = slow
    received = 0
    while received < 10 * 2**20:
        received += len(far.recv(2**20))
    sending.result()


def test_the_end_of_the_session_ends_the_wait(slow):
    channel, sending, _far = slow
    channel.shut()
    with pytest.raises(ChannelLost):
        sending.result()


# Where


def test_where_blobs_are_is_chosen_by_the_arguments(tmp_path):
    assert open_blobs(None, False, None, 10) is None
    cache = open_blobs(str(tmp_path / "cache"), False, 10**6, 20)
    assert isinstance(cache, BlobCache)
    cache.close()
    (tmp_path / "shared").mkdir()
    shared = open_blobs(str(tmp_path / "shared"), True, None, 10)
    assert isinstance(shared, SharedBlobs)
    assert Uploads(shared, X).is_shared
