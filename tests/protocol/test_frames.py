"""Where one message ends and the next begins."""

import tracemalloc
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeolith.protocol.errors import RemoteProtocolError
from zeolith.protocol.frames import PREFIX_BYTES, FrameReader, frame

from ..support.pair import cut
from .strategies import chunkings

BYTES_MAX = 1000

payloads = st.lists(st.binary(min_size=1, max_size=200), max_size=10)


class Fragments(list[bytes]):
    """The reader's list of fragments, which it clears whenever it has joined them."""

    joins = 0
    joined_bytes = 0

    def clear(self) -> None:
        self.joins += 1
        self.joined_bytes += sum(map(len, self))
        super().clear()


def read(reader: FrameReader, pieces: Any) -> list[bytes]:
    return [payload for piece in pieces for payload in reader.feed(piece)]


def kept_bytes(reader: FrameReader) -> int:
    return sum(map(len, reader._fragments))


def test_a_frame_is_its_length_in_four_bytes_and_its_payload():
    assert frame(b"payload") == b"\0\0\0\x07payload"


@given(payloads, chunkings)
def test_any_cut_of_the_stream_gives_the_same_frames(sent, sizes):
    stream = b"".join(map(frame, sent))
    reader = FrameReader(BYTES_MAX)
    assert read(reader, cut(stream, sizes)) == sent
    assert kept_bytes(reader) == 0


@given(payloads, chunkings, st.integers(0, 100))
def test_what_is_kept_is_what_came_of_the_unfinished_frame(sent, sizes, missing):
    stream = b"".join(map(frame, sent))
    stream = stream[: len(stream) - missing]
    reader = FrameReader(BYTES_MAX)
    received = read(reader, cut(stream, sizes))
    assert received == sent[: len(received)]
    assert kept_bytes(reader) == len(stream) - sum(
        PREFIX_BYTES + len(payload) for payload in received
    )


def test_the_largest_frame_is_read():
    payload = b"x" * BYTES_MAX
    assert FrameReader(BYTES_MAX).feed(frame(payload)) == [payload]


@pytest.mark.parametrize("length", [0, BYTES_MAX + 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("sizes", [(PREFIX_BYTES,), (1,), (1000,)])
def test_a_length_out_of_bounds_is_refused_before_anything_is_kept(length, sizes):
    reader = FrameReader(BYTES_MAX)
    prefix = length.to_bytes(PREFIX_BYTES, "big")
    with pytest.raises(RemoteProtocolError, match=f"a frame of {length} bytes"):
        read(reader, cut(prefix + b"x" * 500, sizes))
    assert kept_bytes(reader) == 0


def test_a_length_out_of_bounds_is_refused_behind_good_frames_too():
    reader = FrameReader(BYTES_MAX)
    with pytest.raises(RemoteProtocolError):
        reader.feed(frame(b"good") + bytes(PREFIX_BYTES))


def test_a_length_alone_allocates_nothing():
    reader = FrameReader(2**31)
    prefix = (2**31).to_bytes(PREFIX_BYTES, "big")
    tracemalloc.start()
    try:
        reader.feed(prefix)
        _now, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 64 * 1024


def test_the_limit_can_be_raised_between_frames():
    reader = FrameReader(10)
    assert reader.feed(frame(b"x" * 10)) == [b"x" * 10]
    reader.frame_bytes_max = 20
    assert reader.feed(frame(b"x" * 20)) == [b"x" * 20]


@pytest.mark.parametrize("piece_bytes", [1, 7, 4096])
def test_a_frame_is_copied_a_fixed_number_of_times_however_it_is_cut(piece_bytes):
    payload = bytes(100_000)
    reader = FrameReader(len(payload))
    fragments = reader._fragments = Fragments()
    assert read(reader, cut(frame(payload), (piece_bytes,))) == [payload]
    # Once when its length is known, once when it is whole.
    assert fragments.joins <= 2
    assert fragments.joined_bytes <= len(payload) + 2 * PREFIX_BYTES + piece_bytes


def test_many_frames_in_one_piece_are_cut_out_without_a_join():
    reader = FrameReader(BYTES_MAX)
    fragments = reader._fragments = Fragments()
    assert len(reader.feed(frame(b"x" * 100) * 1000)) == 1000
    assert fragments.joins == 0


def test_a_piece_is_kept_as_it_is_not_copied():
    reader = FrameReader(BYTES_MAX)
    piece = frame(b"x" * 500)[:400]
    reader.feed(piece)
    assert reader._fragments[0] is piece


def test_a_whole_frame_that_is_too_long_is_refused():
    reader = FrameReader(10)
    assert reader.feed(frame(bytes(10))) == [bytes(10)]
    with pytest.raises(RemoteProtocolError, match="11 bytes"):
        reader.feed(frame(bytes(11)))


@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=5), st.data())
def test_the_end_of_the_first_frame_is_known_as_soon_as_it_can_be(payloads, data):
    stream = b"".join(map(frame, payloads))
    ends = list(accumulate(len(frame(payload)) for payload in payloads))
    fed = data.draw(st.integers(0, len(stream) - 1))
    reader = FrameReader(1000)
    reader.feed(stream[:fed])
    end = fed + reader.frame_end(stream[fed:])
    begin = max((each for each in [0, *ends] if each <= fed), default=0)
    if fed == begin or fed >= begin + PREFIX_BYTES:
        assert end == next(each for each in ends if each > fed)
    else:
        assert end == begin + PREFIX_BYTES, "the length is not all there"


def test_less_than_a_length_does_not_tell_where_a_frame_ends():
    assert FrameReader(1000).frame_end(b"\0\0") == PREFIX_BYTES
