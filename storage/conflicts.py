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

from io import BytesIO
from typing import Any, NamedTuple

from BTrees import _FAMILIES
from BTrees.Length import Length
from ZODB._compat import PersistentPickler, PersistentUnpickler, _protocol
from ZODB.ConflictResolution import PersistentReference
from ZODB.POSException import ConflictError

RECORD_BYTES_MAX = 1024 * 1024


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
    references: dict[str, PersistentReference] = {}
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


def _load(record: bytes, references: dict[str, PersistentReference]) -> tuple[Any, Any]:
    def persistent_load(reference: Any) -> PersistentReference:
        key = repr(reference)
        if key not in references:
            references[key] = _Reference(reference)
        return references[key]

    unpickler = PersistentUnpickler(ClassName, persistent_load, BytesIO(record))
    return unpickler.load(), unpickler.load()


class _Reference(PersistentReference):
    """A persistent reference whose classes are names."""

    def __init__(self, data: Any):
        super().__init__(_with_plain_names(data))


def _with_plain_names(data: Any) -> Any:
    # A class in a reference may be written as a tuple (module, name); see
    # ZODB.ConflictResolution.PersistentReference.
    if isinstance(data, ClassName):
        return tuple(data)
    if type(data) in (tuple, list):
        return type(data)(_with_plain_names(each) for each in data)
    return data


def _persistent_id(thing: Any) -> Any:
    return thing.data if isinstance(thing, PersistentReference) else None


def _dump(resolvable: type, state: Any) -> bytes:
    file = BytesIO()
    pickler = PersistentPickler(_persistent_id, file, _protocol)
    pickler.dump(resolvable)
    pickler.dump(state)
    return file.getvalue()
