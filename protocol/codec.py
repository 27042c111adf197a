"""A message as msgpack and back, strictly.

A message is an array whose first element is the kind's code (``messages.KINDS``) and
whose others are the fields in their order. Text is msgpack str, everything else that
is bytes is bin; extension types are refused (msgpack's own, a timestamp, is a float),
so nothing that arrives can be more than None, bool, int, float, str, bytes, list and
dict. The arguments of methods are checked later, by ``methods``. Pure; any thread.
"""

from collections.abc import Callable
from typing import Any

import msgpack

from zeolith.protocol import messages
from zeolith.protocol.errors import RemoteProtocolError
from zeolith.protocol.frames import frame
from zeolith.protocol.messages import KINDS, Message

# The classes that each field of a kind may have.
_FIELDS: dict[type[Message], tuple[type, ...]] = {
    messages.Hello: (dict,),
    messages.Welcome: (dict,),
    messages.Request: (int, str, list),
    messages.Reply: (int, object),
    messages.Failure: (int, str, dict, str),
    messages.Notice: (str, list),
    messages.Heartbeat: (),
    messages.Goodbye: (str, str),
    messages.Challenge: (str,),
    messages.Response: (str,),
}
_CODES = {kind: code for code, kind in enumerate(KINDS)}
_DECODING = tuple((kind, _FIELDS[kind]) for kind in KINDS)
_unpack = msgpack.unpackb
_new: Callable[[type[Message], list[Any]], Message] = tuple.__new__
_Packer = msgpack.Packer
# The heads of arrays for which msgpack makes a list of thousands at once.
_ARRAY_16, _ARRAY_32 = b"\xdc", b"\xdd"
# As few elements take no memory worth speaking of, on all levels together; nor do as
# many as there are bytes in as small a payload.
_FEW_ITEMS = 64
_SMALL_BYTES = 1024
# How msgpack.Unpacker calls it; the other choices are objects of other classes.
_TIMESTAMP_AS_FLOAT = 1


def _refuse_extension(code: int, _data: bytes) -> Any:
    raise ValueError(f"extension type {code}")


def encode(message: Message) -> bytes:
    """``message`` as a frame.

    Raises TypeError or ValueError for a value that msgpack cannot express; that is a
    mistake of this end's, and nothing was sent.
    """
    # A packer of its own for each call: a shared one would have to be locked, and one
    # that failed keeps half a message.
    packer = _Packer(use_bin_type=True, buf_size=_SMALL_BYTES)
    return frame(packer.pack([_CODES[type(message)], *message]))


def decode(payload: bytes, items_max: int = -1) -> Message:
    """The message in one frame's payload; raises RemoteProtocolError.

    No array may have more than ``items_max`` elements, if that is said. msgpack makes
    a list for as many as an array's head promises, on each of 1024 levels; so before
    that it is seen to that all is there that is promised.
    """
    try:
        if items_max > _FEW_ITEMS:
            if len(payload) <= _SMALL_BYTES:
                items_max = min(items_max, len(payload))
            elif _ARRAY_32 in payload or _ARRAY_16 in payload:
                _check_is_whole(payload)
        array = _unpack(
            payload,
            raw=False,
            timestamp=_TIMESTAMP_AS_FLOAT,
            ext_hook=_refuse_extension,
            max_array_len=items_max,
        )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise RemoteProtocolError(f"a frame is not msgpack: {error}") from None
    if type(array) is not list or not array:
        raise RemoteProtocolError("a frame holds no message but other msgpack")
    code = array[0]
    if type(code) is not int or not 0 <= code < len(_DECODING):
        raise RemoteProtocolError(f"there is no message of kind {code!r:.40}")
    kind, classes = _DECODING[code]
    del array[0]
    # Compared at once; but what an answer brings may be of any class.
    if kind is messages.Reply:
        is_right = len(array) == 2 and type(array[0]) is int
    else:
        is_right = tuple(map(type, array)) == classes
    if not is_right:
        _check_fields(kind, classes, array)
    # As _make does it: how many there are was just seen.
    return _new(kind, array)


def _check_is_whole(payload: bytes) -> None:
    """Raise unless ``payload`` has all that it promises; nothing is made of it."""
    size = len(payload)
    unpacker = msgpack.Unpacker(read_size=size, max_buffer_size=size)
    unpacker.feed(payload)
    unpacker.skip()


def _check_fields(
    kind: type[Message], classes: tuple[type, ...], fields: list[Any]
) -> None:
    """Raise RemoteProtocolError unless ``fields`` are of ``classes``."""
    if len(fields) != len(classes):
        raise RemoteProtocolError(
            f"a {kind.__name__} has {len(classes)} fields, not {len(fields)}"
        )
    for value, wanted in zip(fields, classes, strict=True):
        if type(value) is not wanted and wanted is not object:
            raise RemoteProtocolError(
                f"a {kind.__name__} with {type(value).__name__} for {wanted.__name__}"
            )
