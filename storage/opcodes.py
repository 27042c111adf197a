"""Whether a record is so simple that a fast unpickler may load it.

The unpickler that is written in C trusts a pickle with its memory: five bytes can make
its memo as large as they say. ``is_simple`` walks through the opcodes of a record, and
finds those that can do no more than the record is long: containers without keys,
numbers, text, bytes, names of classes, persistent references. What is remembered goes
to one of 256 places, and what is taken from there has no parts, so nothing with parts
is there twice; and nothing is nested so deeply that to hash it takes all of the stack.
Buckets of a BTree are like that. Pure; any thread.
"""

import re
from struct import Struct

_length = Struct("<I").unpack_from

# Opcode -> how many bytes follow it.
_FIXED = {
    ord("\x80"): 1,  # PROTO
    # MARK, NONE, the containers, POP, BINPERSID, STOP, NEWTRUE and NEWFALSE
    **dict.fromkeys(b"(N]t\x85\x86\x87ae0Q.)\x88\x89", 0),
    ord("K"): 1,  # BININT1
    ord("M"): 2,  # BININT2
    ord("J"): 4,  # BININT
    ord("G"): 8,  # BINFLOAT
}
# A bucket of numbers is a few of these: what is fixed, nests nothing and ends nothing.
_run_of_fixed = re.compile(
    rb"(?:[(N\])0Q\x88\x89]|K.|M..|J....|G.{8})+", re.DOTALL
).match
# Opcode -> how many bytes say how many follow.
_COUNTED_BY_ONE = frozenset(b"CU\x8a")
_COUNTED_BY_FOUR = frozenset(b"BTX")
_GLOBAL, _PUT, _GET, _STOP = b"cqh."
# What is remembered right behind one of these has no parts.
_WITHOUT_PARTS = _COUNTED_BY_ONE | _COUNTED_BY_FOUR | {_GLOBAL}
# Opcodes that put something into something else, and how many there may be. A node of a
# BTree has 500 references at most.
_NESTING = b"t\x85\x86\x87ae"
NESTING_MAX = 1000
# A record is two pickles.
_PICKLES = 2


def is_simple(record: bytes) -> bool:
    """Whether ``record``, two pickles, can be loaded with what it is long of memory."""
    position = 0
    stops = nestings = 0
    size = len(record)
    before = -1
    without_parts: set[int] = set()
    fixed = _FIXED
    while position < size:
        opcode = record[position]
        follow = fixed.get(opcode)
        if follow is not None:
            run = _run_of_fixed(record, position)
            position = run.end() if run else position + 1 + follow
            if opcode in _NESTING:
                nestings += 1
            elif opcode == _STOP:
                # What is remembered stays so: the state says "h\0" for its own class.
                stops += 1
        elif opcode == _PUT and position + 1 < size:
            place = record[position + 1]
            if before in _WITHOUT_PARTS:
                without_parts.add(place)
            else:
                without_parts.discard(place)
            position += 2
        elif opcode == _GET and position + 1 < size:
            if record[position + 1] not in without_parts:
                return False
            position += 2
        else:
            position = _end_of_counted(record, position, opcode)
            if not position:
                return False
        before = opcode
    is_whole = position == size and stops == _PICKLES and before == _STOP
    return is_whole and nestings <= NESTING_MAX


def _end_of_counted(record: bytes, position: int, opcode: int) -> int:
    """Where the opcode at ``position``, with what follows, ends; 0: not simple."""
    if opcode == _GLOBAL:
        module_end = record.find(b"\n", position)
        return 1 + record.find(b"\n", module_end + 1) if module_end > 0 else 0
    if opcode in _COUNTED_BY_ONE and position + 1 < len(record):
        end = position + 2 + record[position + 1]
    elif opcode in _COUNTED_BY_FOUR and position + 4 < len(record):
        end = position + 5 + _length(record, position + 1)[0]
    else:
        return 0
    return end if end <= len(record) else 0
