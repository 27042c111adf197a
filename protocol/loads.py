"""The bytes of a load and of its answer, without the general codec.

Nearly everything that is sent is a load or what answers it, and both have few shapes.
What is made here is to the byte what ``codec.encode`` makes, and what is recognised
here ``codec.decode`` and the table of methods accept, with the same result (tests hold
one against the other). For everything else the answer is None, and the general codec
has the word: nothing is refused here.

::

    request   length | 94 02 id a4 "load" 92 | c4 8 oid | c4 8 before
    answer    length | 93 03 id 94 | data | c4 8 tid | c0, or c4 8 end | c4 8 as_of

msgpack has a shape for each size of the id, and of the length of the data. Pure; any
thread. Called by ``connection`` only.
"""

from collections.abc import Iterator
from struct import Struct
from typing import Any

from zeolith.protocol.messages import Reply, Request

_LOAD = b"\xa4load\x92\xc4\x08"
_EIGHT = b"\xc4\x08"
_NO_END = b"\xc0\xc4\x08"
# What msgpack puts before an id, and how struct writes the id, by its size.
_IDS = ((b"", "B"), (b"\xcc", "B"), (b"\xcd", "H"), (b"\xce", "I"), (b"\xcf", "Q"))
# An id below has no mark, and is one for those who read.
_MARK_MIN = 0x80
# Of longer data the copying costs more than the packing.
DATA_BYTES_MAX = 0xFFFF


def _request_layouts() -> list[tuple[Struct, bytes]]:
    layouts = []
    for mark, code in _IDS:
        form = Struct(f">{6 + len(mark)}s{code}8s8s2s8s")
        head = (form.size - 4).to_bytes(4, "big") + b"\x94\x02" + mark
        layouts.append((form, head))
    return layouts


_REQUESTS = _request_layouts()
_PACK_REQUEST = [(form.pack, head) for form, head in _REQUESTS]
_REQUEST_OF_SIZE = {form.size: (form.unpack, head) for form, head in _REQUESTS}
REQUEST_BYTES_MAX = max(_REQUEST_OF_SIZE)


def _answer_heads(mark: bytes, code: str) -> Iterator[tuple[Any, int, bytes, bytes]]:
    """How an id's heads are packed, their bytes in the payload, and their constants.

    The first is for data whose length takes a byte, the second for longer data.
    """
    for size, kind in (("B", b"\x94\xc4"), ("H", b"\x94\xc5")):
        form = Struct(f">I{2 + len(mark)}s{code}2s{size}")
        yield form.pack, form.size - 4, b"\x93\x03" + mark, kind


_PACK_HEAD = [tuple(_answer_heads(mark, code)) for mark, code in _IDS]
# The same for reading, up to the first byte of the length, by the byte of the mark.
_READ_HEAD = {
    mark[0]: (form.unpack_from, form.size)
    for mark, code in _IDS[1:]
    for form in [Struct(f">I2sx{code}2sB")]
}
_SMALL_HEAD = Struct(">I2sB2sB")
_OPEN_TAIL = Struct(">2s8s3s8s")
_CLOSED_TAIL = Struct(">2s8s2s8s2s8s")
_OPEN_BYTES, _CLOSED_BYTES = _OPEN_TAIL.size, _CLOSED_TAIL.size
_read_open, _read_closed = _OPEN_TAIL.unpack_from, _CLOSED_TAIL.unpack_from
# Nothing shorter is one, and the longest head fits into it.
_ANSWER_BYTES_MIN = _SMALL_HEAD.size + _OPEN_BYTES

# Without the call of Python that a named tuple's own constructor is.
_new: Any = tuple.__new__


def _class_of(number: int) -> int:
    """Which of _IDS ``number`` takes."""
    if number < _MARK_MIN:
        return 0
    if number < 0x1_0000:
        return 1 if number < 0x100 else 2
    return 3 if number < 0x1_0000_0000 else 4


def encode_load(number: int, args: list[Any]) -> bytes | None:
    """The frame of request ``number`` for a load, which counts from 1."""
    if len(args) != 2:
        return None
    oid, before = args
    if type(oid) is bytes is type(before) and len(oid) == 8 == len(before):
        pack, head = _PACK_REQUEST[_class_of(number)]
        return pack(head, number, _LOAD, oid, _EIGHT, before)
    return None


def decode_load(data: bytes) -> Request | None:
    """The request, if ``data`` is the frame of a load, whole and nothing more."""
    known = _REQUEST_OF_SIZE.get(len(data))
    if known is None:
        return None
    unpack, wanted = known
    head, number, load, oid, eight, before = unpack(data)
    if head != wanted or load != _LOAD or eight != _EIGHT:
        return None
    if number >= _MARK_MIN and len(head) == 6:
        # A mark, and of another length.
        return None
    request: Request = _new(Request, (number, "load", [oid, before]))
    return request


def encode_loaded(number: int, value: Any) -> bytes | None:
    """The frame of the answer, if ``value`` is (data, tid, end or None, as_of)."""
    if type(value) is not tuple or len(value) != 4:
        return None
    data, tid, end, as_of = value
    if not (type(data) is bytes is type(tid) is type(as_of)):
        return None
    size = len(data)
    if size > DATA_BYTES_MAX or not len(tid) == 8 == len(as_of):
        return None
    pack, head_bytes, head, kind = _PACK_HEAD[_class_of(number)][size > 0xFF]
    if end is None:
        head = pack(head_bytes + size + _OPEN_BYTES, head, number, kind, size)
        return b"".join((head, data, _EIGHT, tid, _NO_END, as_of))
    if type(end) is bytes and len(end) == 8:
        head = pack(head_bytes + size + _CLOSED_BYTES, head, number, kind, size)
        return b"".join((head, data, _EIGHT, tid, _EIGHT, end, _EIGHT, as_of))
    return None


def decode_loaded(data: bytes) -> Reply | None:
    """The answer, if ``data`` is one frame and looks like that of a load."""
    have = len(data)
    if have < _ANSWER_BYTES_MIN:
        return None
    mark = data[6]
    if mark < _MARK_MIN:
        length, head, number, kind, size = _SMALL_HEAD.unpack_from(data)
        start = _SMALL_HEAD.size
    elif mark in _READ_HEAD:
        unpack_from, start = _READ_HEAD[mark]
        length, head, number, kind, size = unpack_from(data)
    else:
        return None
    if length + 4 != have or head != b"\x93\x03":
        return None
    if kind == b"\x94\xc5":
        size = size << 8 | data[start]
        start += 1
    elif kind != b"\x94\xc4":
        return None
    stop = start + size
    value = _tail(data, stop, have - stop)
    if value is None:
        return None
    value[0] = data[start:stop]
    reply: Reply = _new(Reply, (number, value))
    return reply


def _tail(data: bytes, start: int, size: int) -> list[Any] | None:
    """What follows the data of an answer, behind a place for these."""
    if size == _OPEN_BYTES:
        eight, tid, no_end, as_of = _read_open(data, start)
        if eight == _EIGHT and no_end == _NO_END:
            return [None, tid, None, as_of]
    elif size == _CLOSED_BYTES:
        first, tid, second, end, third, as_of = _read_closed(data, start)
        if first == second == third == _EIGHT:
            return [None, tid, end, as_of]
    return None
