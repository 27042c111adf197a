"""Resolving write conflicts without importing anything a record names.

A record is two pickles, the class and the state. ZODB's own resolution imports the
class, and every class that the state mentions: with records that clients wrote, that
would run a client's choice of code in the server. Here

* the class must be on ``RESOLVABLE``: what ZODB's companions ship and whose
  ``_p_resolveConflict`` is known;
* while a state is loaded, every global is a ``ClassName``: inert, not callable, so
  nothing but containers, numbers, text and bytes can come out of a pickle. A class in
  a persistent reference is all right, for it is written back as the name it was;
* record size is bounded.

What cannot be resolved so is not lost: the client, which has the classes, gets the
three states. Called in the writer thread only.
"""

import re
from io import BytesIO
from typing import Any, NamedTuple, cast

from BTrees import _FAMILIES
from BTrees.Length import Length
from ZODB._compat import PersistentPickler, PersistentUnpickler, _protocol
from ZODB.ConflictResolution import PersistentReference
from ZODB.POSException import ConflictError
from zodbpickle.slowpickle import Unpickler as _Unpickler

# A bucket of a BTree takes a few KiB. More would be a risk rather than a service: with
# keys that were made to collide, a dictionary takes quadratic time.
RECORD_BYTES_MAX = 128 * 1024

# The opcodes LONG_BINPUT and PUT, with an index of more than five digits.
_LONG_PUT = re.compile(rb"(?=r(....))", re.DOTALL)
_TEXT_PUT = re.compile(rb"p[0-9]{6,}\n")


class Unresolvable(Exception):
    """This conflict cannot be resolved here; the client may still be able to."""


class ClassName(NamedTuple):
    """Stands for a global that a pickle names; nothing can be made of it."""

    module: str
    name: str

    def __reduce__(self) -> Any:
        raise Unresolvable(f"{self.module}.{self.name} in a state")


def _resolvable() -> dict[tuple[str, str], type]:
    classes: dict[tuple[str, str], type] = {("BTrees.Length", "Length"): Length}
    for family in _FAMILIES:
        module_name = f"BTrees.{family}BTree"
        module = __import__(module_name, fromlist=["BTree"])
        for suffix in ("BTree", "Bucket", "TreeSet", "Set"):
            name = f"{family}{suffix}"
            classes[module_name, name] = getattr(module, name)
    return classes


RESOLVABLE = _resolvable()


def resolve(new: bytes, old: bytes, committed: bytes) -> bytes:
    """The record that holds both the change old -> committed and old -> new.

    Raises Unresolvable if the class is not known, a state is not plain, or the class
    itself finds the changes to contradict each other (a ConflictError).
    """
    if max(len(new), len(old), len(committed)) > RECORD_BYTES_MAX:
        raise Unresolvable("too large")
    references: dict[Any, PersistentReference] = {}
    try:
        meta, new_state = _load(new, references)
        resolvable = _class_of(meta)
        resolved = resolvable()._p_resolveConflict(
            _load(old, references)[1], _load(committed, references)[1], new_state
        )
        return _dump(resolvable, resolved)
    except Unresolvable:
        raise
    except ConflictError as error:
        raise Unresolvable(str(error)) from None
    except Exception as error:
        raise Unresolvable(f"{type(error).__name__}: {error}") from error


def _class_of(meta: Any) -> Any:
    # serialize.py writes the class, or (class, arguments of __new__); very old
    # records have (module, name) for the class.
    name, args = meta, None
    if type(meta) is tuple and len(meta) == 2:
        name, args = meta
    if type(name) is tuple or isinstance(name, ClassName):
        found = RESOLVABLE.get(tuple(name))
        if found is not None and not args:
            return found
    raise Unresolvable(f"{name} is not resolved by the server")


def _load(record: bytes, references: dict[Any, PersistentReference]) -> tuple[Any, Any]:
    def persistent_load(data: Any) -> PersistentReference:
        data = _checked_reference(data)
        # Lists are not hashable; the forms are different enough without them.
        key = tuple(data) if type(data) is list else data
        if key not in references:
            references[key] = PersistentReference(data)
        return references[key]

    if _reaches_far(record):
        unpickler: Any = _PatientUnpickler(record, persistent_load)
    else:
        unpickler = PersistentUnpickler(ClassName, persistent_load, BytesIO(record))
    return unpickler.load(), unpickler.load()


def _reaches_far(record: bytes) -> bool:
    """Whether the record may put something into the memo far beyond its own size.

    The C unpickler's memo is an array, which it makes as long as a pickle says: five
    bytes are enough for 64 GB. Text may look like it; that only costs time.
    """
    return any(
        int.from_bytes(found[1], "little") > len(record)
        for found in _LONG_PUT.finditer(record)
    ) or bool(_TEXT_PUT.search(record))


class _PatientUnpickler(_Unpickler):
    """Slower, written in Python: its memo is a dictionary."""

    def __init__(self, record: bytes, persistent_load: Any):
        super().__init__(BytesIO(record), errors="bytes")
        self.persistent_load = persistent_load

    def find_class(self, module: str, name: str) -> Any:
        return ClassName(module, name)


def _checked_reference(data: Any) -> Any:
    """A persistent reference in one of serialize.py's forms, classes as names.

    Anything else is refused before it is looked at more closely: comparing or hashing
    a small pickle of tuples that share tuples can take hours.
    """
    if type(data) in (bytes, str):
        return data
    if type(data) is tuple and len(data) == 2:
        return _checked_oid(data[0]), _checked_class(data[1])
    if type(data) is list and len(data) == 1:
        return [_checked_oid(data[0])]
    if type(data) is list and len(data) == 2 and type(data[1]) is tuple:
        form, parts = data
        if form == "m" and len(parts) == 3:
            database, oid, of_class = parts
            return [
                form,
                (_checked_text(database), _checked_oid(oid), _checked_class(of_class)),
            ]
        if form == "n" and len(parts) == 2:
            return [form, (_checked_text(parts[0]), _checked_oid(parts[1]))]
        if form == "w" and len(parts) in (1, 2):
            return [form, (_checked_oid(parts[0]), *map(_checked_text, parts[1:]))]
    raise Unresolvable("a persistent reference of an unknown form")


def _checked_oid(oid: Any) -> bytes | str:
    if type(oid) not in (bytes, str) or len(oid) != 8:
        raise Unresolvable("a persistent reference without an oid")
    return cast(bytes, oid)


def _checked_text(text: Any) -> str:
    if type(text) is not str:
        raise Unresolvable("a persistent reference to a database without a name")
    return text


def _checked_class(name: Any) -> tuple[str, str] | None:
    # A class may be written as a tuple (module, name), and is from here on.
    if name is None:
        return None
    if isinstance(name, ClassName) or (type(name) is tuple and len(name) == 2):
        module, qualified = name
        return _checked_text(module), _checked_text(qualified)
    raise Unresolvable("a persistent reference to something that is no class")


def _persistent_id(thing: Any) -> Any:
    return thing.data if isinstance(thing, PersistentReference) else None


def _dump(resolvable: type, state: Any) -> bytes:
    file = BytesIO()
    pickler = PersistentPickler(_persistent_id, file, _protocol)
    pickler.dump(resolvable)
    pickler.dump(state)
    return file.getvalue()
