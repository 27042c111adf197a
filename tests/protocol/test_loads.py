"""The short way of a load against the general codec: to the byte, and to the state."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeolith.protocol.codec import decode, encode
from zeolith.protocol.connection import Connection, Role, State
from zeolith.protocol.errors import LocalProtocolError
from zeolith.protocol.frames import FrameReader
from zeolith.protocol.limits import DEFAULT
from zeolith.protocol.loads import (
    DATA_BYTES_MAX,
    REQUEST_BYTES_MAX,
    decode_load,
    decode_loaded,
    encode_load,
    encode_loaded,
)
from zeolith.protocol.messages import Message, Reply, Request
from zeolith.protocol.methods import METHODS

from ..support.pair import Pair
from .strategies import EDGES, calls, changed, damaged, messages, numbers, plain

ids = st.binary(min_size=8, max_size=8)
loads = st.tuples(ids, ids).map(list)
sizes = st.sampled_from([0, 1, 255, 256, 600, DATA_BYTES_MAX, DATA_BYTES_MAX + 1])
data = st.binary(max_size=300) | sizes.map(bytes)
answers = st.tuples(data, ids, st.none() | ids, ids)
# What may stand where an id is expected.
nearly = ids | st.none() | st.binary(max_size=9) | st.integers(0, 300)


def generally(frame: bytes) -> Message:
    """What the general codec reads; it must be one whole message."""
    (payload,) = FrameReader(2**30).feed(frame)
    return decode(payload)


# The codec


@given(numbers, loads | st.lists(nearly, max_size=3))
def test_a_load_is_encoded_as_any_request(number, args):
    sent = encode_load(number, args)
    wanted = len(args) == 2 and all(
        type(each) is bytes and len(each) == 8 for each in args
    )
    assert (sent is not None) is wanted
    assert sent in (None, encode(Request(number, "load", args)))


@given(numbers, loads)
def test_every_load_is_recognised(number, args):
    request = Request(number, "load", args)
    frame = encode(request)
    assert len(frame) <= REQUEST_BYTES_MAX
    assert decode_load(frame) == request
    assert type(decode_load(frame)) is Request


@given(
    damaged(st.builds(Request, numbers, st.just("load"), loads).map(encode))
    | messages.map(encode)
    | calls("client", answers=True).map(lambda call: encode(Request(1, *call)))
    | st.binary(max_size=45)
)
def test_what_is_recognised_as_a_load_is_one(frame):
    request = decode_load(frame)
    if request is not None:
        assert generally(frame) == request
        METHODS[request.method].check(request.args)


@given(numbers, answers | st.tuples(data, nearly, nearly, nearly) | plain)
def test_an_answer_is_encoded_as_any_reply(number, value):
    sent = encode_loaded(number, value)
    if sent is not None:
        assert sent == encode(Reply(number, value))


@given(numbers, answers)
def test_every_answer_of_a_usual_size_is_known(number, value):
    frame = encode(Reply(number, value))
    if len(value[0]) > DATA_BYTES_MAX:
        assert encode_loaded(number, value) is None
        assert decode_loaded(frame) is None
    else:
        assert encode_loaded(number, value) == frame
        assert decode_loaded(frame) == Reply(number, list(value))
        assert type(decode_loaded(frame)) is Reply


@given(
    damaged(st.builds(Reply, numbers, answers).map(encode))
    | damaged(
        st.builds(Reply, numbers, st.tuples(data, nearly, nearly, nearly) | plain).map(
            encode
        )
    )
    | messages.map(encode)
    | st.binary(max_size=60)
)
def test_what_is_recognised_as_an_answer_is_one(frame):
    reply = decode_loaded(frame)
    if reply is not None:
        assert generally(frame) == reply


@pytest.mark.parametrize("number", EDGES)
def test_a_load_of_which_one_byte_is_another(number):
    known = 0
    for frame in changed(encode(Request(number, "load", [b"\xc4" * 8, b"\x08" * 8]))):
        request = decode_load(frame)
        if request is not None:
            known += 1
            assert generally(frame) == request
            METHODS[request.method].check(request.args)
    # Another oid is as good.
    assert known


@pytest.mark.parametrize("number", EDGES)
@pytest.mark.parametrize("size", [0, 3, 256])
@pytest.mark.parametrize("end", [None, b"\xc4\x08end456"])
def test_an_answer_of_which_one_byte_is_another(number, size, end):
    value = (b"\xc4" * size, b"\xc0" * 8, end, b"\x08" * 8)
    frame = encode(Reply(number, value))
    known = 0
    # Most of the data are of no interest.
    middle = frame[20:-36]
    for ends in changed(frame[:20] + frame[20 + len(middle) :]):
        another = ends[:20] + middle + ends[20:]
        reply = decode_loaded(another)
        if reply is not None:
            known += 1
            assert generally(another) == reply
    assert known


def test_an_answer_that_is_no_tuple_of_bytes_goes_the_general_way():
    tid = bytes(8)
    for value in (
        [b"data", tid, None, tid],
        (bytearray(b"data"), tid, None, tid),
        (None, None, None, tid),
        (b"data", tid[:7], None, tid),
        (b"data", tid, tid[:7], tid),
        (b"data", tid, None, tid + b"1"),
        (b"data", tid, None),
    ):
        assert encode_loaded(1, value) is None


# The conversation: with and without the short way it is the same

LIMITS = replace(
    DEFAULT,
    hello_frame_bytes_max=1000,
    frame_bytes_max=1000,
    batch_bytes_max=1000,
    requests_open_max=3,
)


def both_ways(role: Role) -> tuple[Connection, Connection]:
    """Two ends of channels; the second knows nothing of loads."""
    ends = []
    for _ in range(2):
        pair = Pair(LIMITS)
        pair.greet("channel")
        ends.append(pair.client if role is Role.CLIENT else pair.server)
    short, general = ends
    assert short._recognise is not None
    general._recognise = None
    general._asks_loads = general._answers_loads = False
    return short, general


def told(end: Connection) -> tuple[Any, ...]:
    """All that a connection knows."""
    return (
        end.state,
        str(end.error),
        end.open_requests,
        end.last_request,
        end.sent_at,
        end.rcvd_at,
        end.is_inside_frame,
    )


def test_more_open_loads_than_allowed_are_an_offence_either_way():
    for end in both_ways(Role.SERVER):
        for number in range(1, LIMITS.requests_open_max + 1):
            load = Request(number, "load", [bytes(8), bytes(8)])
            assert end.receive_data(encode(load), 1.0) == [load]
        assert not end.receive_data(encode(load._replace(id=number + 1)), 1.0)
        assert "more than 3 open requests" in str(end.error)


@pytest.mark.parametrize("beyond", [-4, -3, 0, 1])
def test_an_answer_beyond_the_limit_is_an_offence_either_way(beyond):
    # 31 bytes of the payload are not data.
    reply = Reply(1, [bytes(LIMITS.frame_bytes_max - 28 + beyond), *[bytes(8)] * 3])
    reply.value[2] = None
    frame = encode(reply)
    assert len(frame) == LIMITS.frame_bytes_max + 4 + beyond
    for end in both_ways(Role.CLIENT):
        end.request("load", [bytes(8), bytes(8)], 0.0)
        assert end.receive_data(frame, 1.0) == ([] if beyond > 0 else [reply])
        assert end.is_closed is (beyond > 0)


few = st.integers(1, 6)
requests = (
    st.builds(Request, few, st.just("load"), loads).map(encode)
    | st.builds(Request, few, st.just("load"), st.lists(nearly, max_size=3)).map(encode)
    | st.builds(
        lambda n, call: Request(n, *call), few, calls("client", answers=True)
    ).map(encode)
)
replies = st.builds(Reply, few, answers | plain).map(encode)
pieces = st.binary(max_size=5)


@given(st.lists(st.one_of(requests, few, damaged(requests), pieces), max_size=10))
def test_a_server_is_in_the_same_state_either_way(steps):
    short, general = both_ways(Role.SERVER)
    heard: list[Any]
    for now, step in enumerate(steps, 1):
        if type(step) is bytes:
            heard = [end.receive_data(step, float(now)) for end in (short, general)]
            assert heard[0] == heard[1]
        else:
            heard = [said(end, "reply", step, None, now) for end in (short, general)]
            assert heard[0] == heard[1]
        assert told(short) == told(general)


@given(
    st.lists(
        st.one_of(
            loads, st.lists(nearly, max_size=3), replies, damaged(replies), pieces
        ),
        max_size=10,
    )
)
def test_a_client_is_in_the_same_state_either_way(steps):
    short, general = both_ways(Role.CLIENT)
    heard: list[Any]
    for now, step in enumerate(steps, 1):
        if type(step) is bytes:
            heard = [end.receive_data(step, float(now)) for end in (short, general)]
        else:
            heard = [
                said(end, "request", "load", step, now) for end in (short, general)
            ]
        assert heard[0] == heard[1]
        assert told(short) == told(general)


@given(numbers, answers)
def test_a_server_sends_the_same_either_way(number, value):
    short, general = both_ways(Role.SERVER)
    sent = [said(end, "reply", number, value, 7) for end in (short, general)]
    assert sent[0] == sent[1]
    assert told(short) == told(general)


def said(end: Connection, how: str, what: Any, value: Any, now: int) -> bytes | str:
    """What ``end`` sends, or why it sends nothing."""
    try:
        sent: bytes = getattr(end, how)(what, value, float(now))
    except LocalProtocolError as error:
        return str(error)
    return sent


@pytest.mark.parametrize("role", Role)
def test_the_short_way_is_open_on_a_channel_only(role):
    pair = Pair(LIMITS)
    end = pair.client if role is Role.CLIENT else pair.server
    assert end._recognise is None
    pair.greet("stream")
    assert end._recognise is None
    pair = Pair(LIMITS)
    end = pair.client if role is Role.CLIENT else pair.server
    pair.greet("channel")
    assert end._recognise is not None
    end.goodbye("closing", "the test wants it", 0.0)
    assert end.state is State.CLOSED
    assert end._recognise is None
    assert not end._asks_loads
    assert not end._answers_loads


@pytest.mark.parametrize("role", Role)
def test_nobody_takes_the_part_of_the_other(role):
    pair = Pair(LIMITS)
    pair.greet("channel")
    if role is Role.CLIENT:
        with pytest.raises(LocalProtocolError):
            pair.client.reply(1, (b"data", bytes(8), None, bytes(8)), 1.0)
    else:
        with pytest.raises(LocalProtocolError):
            pair.server.request("load", [bytes(8), bytes(8)], 1.0)
