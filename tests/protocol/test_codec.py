"""A message as msgpack and back."""

import datetime
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeolith.protocol.codec import decode, encode
from zeolith.protocol.errors import RemoteProtocolError
from zeolith.protocol.frames import PREFIX_BYTES, FrameReader
from zeolith.protocol.limits import DEFAULT
from zeolith.protocol.messages import (
    KINDS,
    Failure,
    Goodbye,
    Heartbeat,
    Hello,
    Notice,
    Reply,
    Request,
    Welcome,
)

from ..support.pair import cut
from .strategies import chunkings, messages, plain

PLAIN = {type(None), bool, int, float, str, bytes, list, dict}
ONE_OF_EACH = [
    Hello({"version": 1}),
    Welcome({"version": 1}),
    Request(1, "load", [b"oid", b"tid"]),
    Reply(1, [b"data", None]),
    Failure(1, "POSKeyError", {"oid": b"oid"}, "0x01"),
    Notice("changes", [[]]),
    Heartbeat(),
    Goodbye("closing", "the client is closed"),
]
# A value of another class for each class that a field may have.
FOREIGN: dict[type, list[Any]] = {
    int: [True, 1.0, "1", b"1", None, []],
    str: [b"load", 1, None, ["load"]],
    list: [{}, "load", b"load", None, 1],
    dict: [[], "fields", None, 1],
}


def packed(*array: Any) -> bytes:
    data: bytes = msgpack.packb(list(array))
    return data


def classes_in(value: Any) -> set[type]:
    inner: list[Any] = []
    if isinstance(value, list | tuple):
        inner = list(value)
    elif isinstance(value, dict):
        inner = [*value, *value.values()]
    return {type(value)}.union(*map(classes_in, inner))


@given(messages)
def test_every_message_arrives_as_it_was(message):
    payload = encode(message)[PREFIX_BYTES:]
    received = decode(payload)
    assert received == message
    assert type(received) is type(message)


@given(st.lists(messages, max_size=5), chunkings)
def test_any_cut_of_the_stream_gives_the_same_messages(sent, sizes):
    stream = b"".join(map(encode, sent))
    reader = FrameReader(DEFAULT.frame_bytes_max)
    received = [
        decode(payload)
        for piece in cut(stream, sizes)
        for payload in reader.feed(piece)
    ]
    assert received == sent
    assert list(map(type, received)) == list(map(type, sent))


@given(st.binary(max_size=100) | plain.map(msgpack.packb))
def test_garbage_is_a_protocol_error_and_never_another_one(payload):
    try:
        message = decode(payload)
    except RemoteProtocolError:
        return
    assert type(message) in KINDS


@pytest.mark.parametrize("message", ONE_OF_EACH, ids=lambda each: type(each).__name__)
def test_the_first_element_is_the_code(message):
    array = msgpack.unpackb(encode(message)[PREFIX_BYTES:])
    assert array[0] == KINDS.index(type(message))
    assert array[1:] == list(message)


@pytest.mark.parametrize("message", ONE_OF_EACH, ids=lambda each: type(each).__name__)
def test_a_field_too_many_or_too_few_is_refused(message):
    code = KINDS.index(type(message))
    with pytest.raises(RemoteProtocolError, match="fields, not"):
        decode(packed(code, *message, None))
    if message:
        with pytest.raises(RemoteProtocolError, match="fields, not"):
            decode(packed(code, *message[:-1]))


@pytest.mark.parametrize("message", ONE_OF_EACH, ids=lambda each: type(each).__name__)
def test_a_field_of_another_class_is_refused(message):
    code = KINDS.index(type(message))
    for position, value in enumerate(message):
        if type(message) is Reply and position == 1:
            continue
        for foreign in FOREIGN[type(value)]:
            fields = [*message[:position], foreign, *message[position + 1 :]]
            with pytest.raises(RemoteProtocolError, match=type(message).__name__):
                decode(packed(code, *fields))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        packed(),
        packed(len(KINDS)),
        packed(-1),
        packed(True, {}),
        packed(6.0),
        packed("Heartbeat"),
        packed(None),
        packed([6]),
        msgpack.packb({}),
        msgpack.packb(6),
        msgpack.packb("x" * 1000),
        packed(6) + b"\0",
        packed(6)[:-1],
        b"\xc1",
    ],
)
def test_what_is_no_message_is_refused(payload):
    with pytest.raises(RemoteProtocolError):
        decode(payload)


def test_text_that_is_not_utf_8_is_refused():
    with pytest.raises(RemoteProtocolError):
        decode(packed(7, "", "x").replace(b"\xa1x", b"\xa1\xff"))


def test_a_key_that_cannot_be_one_is_refused():
    with pytest.raises(RemoteProtocolError):
        decode(b"\x92\x00\x81\x90\x00")


def test_nesting_without_end_is_refused():
    with pytest.raises(RemoteProtocolError):
        decode(b"\x91" * 100_000)


@pytest.mark.parametrize("count", [1000, 200])
@pytest.mark.parametrize("head", [b"\xdd\0\x01\x86\xa0", b"\xdc\xff\xff"])
def test_arrays_that_promise_more_than_there_is_take_no_memory(head, count):
    """A thousand of them, one in the other: 5 KB that would become hundreds of MB."""
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError, match="not msgpack"):
            decode(head * count, 100_000)
        _now, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1_000_000


def test_a_long_array_that_is_whole_is_decoded_as_without_a_bound():
    value = [3, 1, [[number, b"data"] for number in range(70_000)]]
    payload = packed(*value)
    assert decode(payload, 100_000) == decode(payload) == Reply(1, value[2])


def test_a_long_wrong_code_does_not_make_a_long_error():
    with pytest.raises(RemoteProtocolError) as raised:
        decode(packed("x" * 10_000))
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("code", [0, 1, 42, 127])
def test_extension_types_are_refused(code):
    with pytest.raises(RemoteProtocolError, match="extension type"):
        decode(packed(3, 1, msgpack.ExtType(code, b"data")))


@pytest.mark.parametrize(
    "timestamp",
    [
        msgpack.Timestamp(5),
        msgpack.Timestamp(2**33, 1),
        msgpack.Timestamp(-5),
        msgpack.Timestamp(2**62, 999_999_999),
    ],
)
def test_a_timestamp_is_a_number_and_nothing_else(timestamp):
    reply = decode(packed(3, 1, timestamp))
    assert isinstance(reply, Reply)
    assert reply.value == pytest.approx(timestamp.to_unix())


@given(st.integers(-128, 127), st.binary(max_size=20))
def test_nothing_but_plain_values_comes_out_of_an_extension(code, data):
    extension = b"\xc7" + bytes([len(data), code % 256]) + data
    try:
        message = decode(b"\x93\x03\x01" + extension)
    except RemoteProtocolError:
        return
    assert classes_in(list(message)) <= PLAIN


@given(messages)
def test_nothing_but_plain_values_arrives(message):
    received = decode(encode(message)[PREFIX_BYTES:])
    assert classes_in(list(received)) <= PLAIN


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, datetime.date(2000, 1, 1), 2**64, -(2**63) - 1, "\udcff", str],
)
def test_what_cannot_be_said_is_a_mistake_of_ones_own(value):
    with pytest.raises((TypeError, ValueError, OverflowError)):
        encode(Reply(1, value))


def test_a_mistake_leaves_nothing_behind_for_the_next_message():
    for number in range(3):
        with pytest.raises(TypeError):
            encode(Reply(number, [b"x" * 100, object()]))
        assert decode(encode(Reply(number, None))[PREFIX_BYTES:]) == Reply(number, None)


def test_tuples_are_sent_as_lists():
    assert decode(encode(Reply(1, (1, (2,))))[PREFIX_BYTES:]) == Reply(1, [1, [2]])


def test_bytearrays_are_sent_as_bytes():
    reply = decode(encode(Reply(1, bytearray(b"data")))[PREFIX_BYTES:])
    assert isinstance(reply, Reply)
    assert type(reply.value) is bytes
