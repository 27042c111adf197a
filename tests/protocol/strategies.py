"""Messages and arguments for hypothesis: of the right types, and of any."""

from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from zeolith.protocol.messages import (
    Challenge,
    Failure,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    Notice,
    Reply,
    Request,
    Response,
    Welcome,
)
from zeolith.protocol.methods import HELLO, METHODS, WELCOME, Kind, Method

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
integers = st.integers(-(2**63), 2**64 - 1)
# What msgpack can say, and so a peer.
plain = st.recursive(
    st.none()
    | st.booleans()
    | integers
    | st.floats(allow_nan=False)
    | texts
    | st.binary(max_size=40),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(texts | st.binary(max_size=8), inner, max_size=4)
    ),
    max_leaves=10,
)
fields = st.dictionaries(texts, plain, max_size=5)

_ids = st.binary(min_size=8, max_size=8)
_sixteen = st.binary(min_size=16, max_size=16)
_data = st.binary(max_size=40)
_metadata = st.tuples(_data, _data, _data, st.none() | _ids, texts).map(list)
_operations = (
    st.tuples(st.just("store"), _ids, _ids, _data)
    | st.tuples(st.just("check"), _ids, _ids)
    | st.tuples(st.just("undo"), _ids)
).map(list)
# By the name that a kind has in the specification.
_BY_NAME: dict[str, st.SearchStrategy[Any]] = {
    "oid": _ids,
    "tid": _ids,
    "bytes": _data,
    "text": texts,
    "count": st.integers(0, 2**64 - 1),
    "bool": st.booleans(),
    "time": st.floats(0, 3e9) | st.integers(0, 3_000_000_000),
    "transaction id": _sixteen,
    "token": _sixteen,
    "operation": _operations,
    "metadata": _metadata,
    "[oid, tid]": st.tuples(_ids, _ids).map(list),
    "[text, text]": st.tuples(texts, texts).map(list),
    "[oid, bytes]": st.tuples(_ids, _data).map(list),
    "change": st.tuples(
        _ids, _ids, st.lists(_ids, max_size=3), st.none() | _sixteen
    ).map(list),
}


def of_kind(kind: Kind) -> st.SearchStrategy[Any]:
    """Values that `kind` must accept."""
    return _named(kind.name)


def _named(name: str) -> st.SearchStrategy[Any]:
    if name.endswith(" or nil"):
        return st.none() | _named(name.removesuffix(" or nil"))
    if name.startswith("list of "):
        return st.lists(_named(name.removeprefix("list of ")), max_size=3)
    return _BY_NAME[name]


def arguments_of(method: Method) -> st.SearchStrategy[list[Any]]:
    """Arguments that `method` must accept."""
    return st.tuples(*(of_kind(kind) for _name, kind in method.arguments)).map(list)


def calls(sender: str, *, answers: bool) -> st.SearchStrategy[tuple[str, list[Any]]]:
    """A method that `sender` may call, and arguments for it."""
    methods = [
        method
        for method in METHODS.values()
        if method.sender == sender and method.answers is answers
    ]
    return st.sampled_from(methods).flatmap(
        lambda method: st.tuples(st.just(method.name), arguments_of(method))
    )


hellos = st.fixed_dictionaries(
    {
        **{name: of_kind(kind) for name, kind in HELLO.items()},
        "version": st.just(1),
        "kind": st.sampled_from(["stream", "channel"]),
    }
)
welcomes = st.fixed_dictionaries(
    {name: of_kind(kind) for name, kind in WELCOME.items()}
)
_numbers = st.integers(0, 20)
# Any message that the codec lets through, whatever the table says of it.
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(Hello, fields | hellos),
    st.builds(Welcome, fields | welcomes),
    st.builds(Request, integers | _numbers, texts, st.lists(plain, max_size=4)),
    st.builds(
        lambda number, call: Request(number, *call),
        _numbers,
        calls("client", answers=True),
    ),
    st.builds(Reply, integers | _numbers, plain),
    st.builds(Failure, integers | _numbers, texts, fields, texts),
    st.builds(Notice, texts, st.lists(plain, max_size=4)),
    (calls("client", answers=False) | calls("server", answers=False)).map(
        lambda call: Notice(*call)
    ),
    st.just(Heartbeat()),
    st.builds(Goodbye, texts, texts),
    st.builds(Challenge, texts),
    st.builds(Response, texts),
)
# Of requests, around those where msgpack takes another size.
EDGES = [1, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**64 - 1]
numbers = st.sampled_from(EDGES) | st.integers(1, 2**64 - 1) | st.integers(1, 400)


@st.composite
def damaged(draw: Any, frames: st.SearchStrategy[bytes]) -> bytes:
    """A frame with some bytes changed, cut off or added."""
    frame = bytearray(draw(frames))
    for _ in range(draw(st.integers(0, 3))):
        if frame:
            # The ends are what is looked at.
            at = draw(st.integers(0, 50) | st.integers(-50, -1)) % len(frame)
            frame[at] = draw(st.integers(0, 255) | st.sampled_from([0xC0, 0xC4, 0xCD]))
    cut = draw(st.integers(0, 20))
    frame = frame[: len(frame) - cut] if draw(st.booleans()) else frame
    frame += draw(st.binary(max_size=3))
    return bytes(frame)


# Around everything that a shape of msgpack begins with, or that is looked for.
_BYTES = [*range(12), 0x7E, 0x7F, 0x80, *range(0x90, 0x97), *range(0xA0, 0xA6)]
_BYTES += [*range(0xC0, 0xE1), 0xFE, 0xFF]


def changed(frame: bytes) -> Iterator[bytes]:
    """All frames that differ from ``frame`` in one byte."""
    for at, was in enumerate(frame):
        for byte in {*_BYTES, (was + 1) % 256, (was - 1) % 256}:
            yield frame[:at] + bytes([byte]) + frame[at + 1 :]


# Sizes of the pieces in which a stream of bytes arrives.
chunkings = st.lists(st.integers(1, 50), min_size=1, max_size=8)
