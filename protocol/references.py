"""What a record refers to, found without unpickling anything.

Both ends look ahead with it: the client at what it has loaded, the server at what it
is about to send. ``references`` and ``link_of`` look for the shape in which ZODB
writes a reference, ``C 08 oid, class, TUPLE2, BINPERSID``, with a regular expression.
That is a guess: text that happens to look like a reference is taken for one, and what
another pickler has written may not be recognised. So it may only be used where a wrong
guess costs something and breaks nothing. References into other databases and weak ones
have another shape and are not found, which is right: they are not followed.

Pure; any thread.
"""

import re

_MEMO = rb"(?:q.|r.{4})?"
_CLASS = rb"(?:h.|j.{4}|c[^\n]{1,200}\n[^\n]{1,200}\n" + _MEMO + rb")"
_REFERENCE = rb"C\x08(.{8})" + _MEMO + rb"(?:" + _CLASS + rb"\x86" + _MEMO + rb")?Q"
_find_references = re.compile(_REFERENCE, re.DOTALL).findall
# The state is a pair, and its second part an object of the record's own class, which
# is what the pickler remembers at place 0.
_find_link = re.compile(
    rb"C\x08(.{8})" + _MEMO + rb"h\x00\x86" + _MEMO + rb"Q\x86" + _MEMO + rb"\.\Z",
    re.DOTALL,
).search
# The longest end of a record that is a link, and how much of it is behind the
# reference.
LINK_BYTES_MAX = 2 + 8 + 5 + 2 + 1 + 5 + 1 + 1 + 5 + 1
_LINK_TAIL_BYTES = 1 + 1 + 5 + 1


def references(record: bytes) -> list[bytes]:
    """The oids that ``record`` seems to refer to, in its order, each at least once."""
    found: list[bytes] = _find_references(record)
    return found


def link_of(record: bytes) -> bytes | None:
    """The oid of the object of the same class that comes after this one, if any.

    Buckets of BTrees and sets are linked like that: their state is a pair of what they
    hold and the next bucket.
    """
    # Most records have none, and are quickly told from others.
    if b"Q\x86" not in record[-_LINK_TAIL_BYTES:]:
        return None
    found = _find_link(record, max(0, len(record) - LINK_BYTES_MAX))
    return found[1] if found else None
