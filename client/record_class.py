"""The class of an object, read off its record; nothing is imported or unpickled.

A record is two pickles: the class, alone or with arguments for its ``__new__``, and the
state. Of the class there are six forms in ZODB's history (ZODB.serialize); all begin
with a global name or with two strings. Pure; any thread.
"""

import pickletools
import re
import zlib

UNKNOWN = "(not told)"
# No pickle begins so: what zc.zlibstorage makes of a record.
_DEFLATED = b".z"
# What ZODB writes of a blob, whatever its protocol, and what is of no account in it.
_BLOB = [("GLOBAL", "ZODB.blob Blob"), ("STOP", None)]
_REMEMBERING = ("PROTO", "PUT", "BINPUT", "LONG_BINPUT")
# What pickletools raises; a warning of an unknown escape, where warnings are errors.
_NO_PICKLE = (ValueError, DeprecationWarning, SyntaxWarning)
# As far as is looked for a name.
_HEAD_BYTES = 4096
# A protocol, a tuple's beginning, and the name; nearly always.
_global_name = re.compile(rb"(?:\x80.)?\(?c([^\n]+)\n([^\n]+)\n", re.DOTALL).match


def class_of(record: bytes) -> str:
    """``module.Class``, or ``UNKNOWN`` where it cannot be told."""
    head = record[:_HEAD_BYTES]
    if head.startswith(_DEFLATED):
        try:
            head = zlib.decompressobj().decompress(head[2:], _HEAD_BYTES)
        except zlib.error:
            return UNKNOWN
    found = _global_name(head)
    if found is None:
        return _printable(_slowly(head))
    return _printable(b".".join(found.groups()).decode(errors="replace"))


def is_blob_record(record: bytes | None) -> bool:
    """ZODB.blob.is_blob_record without an unpickler: the class is Blob, and alone."""
    # None in a copy of a transaction that was undone.
    if not record or b"ZODB.blob" not in record[:_HEAD_BYTES]:
        return False
    seen: list[tuple[str, object]] = []
    try:
        for opcode, argument, _position in pickletools.genops(record[:_HEAD_BYTES]):
            if opcode.name not in _REMEMBERING:
                seen.append((opcode.name, argument))
            if opcode.name == "STOP":
                break
    except _NO_PICKLE:
        return False
    return seen == _BLOB


def _slowly(head: bytes) -> str:
    strings: list[str] = []
    try:
        for opcode, argument, _position in pickletools.genops(head):
            if opcode.name == "GLOBAL":
                return str(argument).replace(" ", ".")
            if opcode.name == "STACK_GLOBAL":
                return ".".join(strings[-2:])
            if opcode.name in ("TUPLE", "TUPLE2") and len(strings) == 2:
                return ".".join(strings)
            if isinstance(argument, str):
                strings.append(argument)
    except _NO_PICKLE:
        # No pickle, or the end of what was looked at.
        pass
    return UNKNOWN


def _printable(name: str) -> str:
    """Somebody may have written it who means no good to a terminal."""
    return "".join(each if each.isprintable() else "?" for each in name)
