"""Resolving write conflicts without importing anything a record names.

A record is two pickles, the class and the state. ZODB's own resolution imports the
class, and every class that the state mentions: with records that clients wrote, that
would run a client's choice of code in the server. Here

* the class must be on ``RESOLVABLE``: what ZODB's companions ship and whose
  ``_p_resolveConflict`` is known;
* while a state is loaded, every global is a ``ClassName``: inert, not callable. Opcodes
  that make or change an object are not known at all, so nothing but containers,
  numbers, text, bytes and references can come out of a pickle. A class in a persistent
  reference is all right, for it is written back as the name it was;
* record size is bounded, and so is what comparing two states can take: that is one
  call of C for the interpreter, in which no other thread of the server runs.

What cannot be resolved so is not lost: the client, which has the classes, gets the
three states, unless a class that both have says that there is no way. Called in threads
that may take their time, several at once; and, through ``Quickly``, by the loop, for
what is small and simple.
"""

from functools import partial
from io import BytesIO
from typing import Any, ClassVar, NamedTuple, cast

from BTrees import _FAMILIES
from BTrees.Length import Length
from ZODB._compat import PersistentPickler, Pickler, _protocol
from ZODB.ConflictResolution import PersistentReference
from ZODB.POSException import ConflictError
from zodbpickle.fastpickle import Unpickler as FastUnpickler
from zodbpickle.pickle_3 import DICT, SETITEM, SETITEMS
from zodbpickle.slowpickle import Unpickler

from zeolith.storage.opcodes import is_simple
from zeolith.storage.wrapping import PLAIN, Form

# A bucket of a BTree takes a few KiB. More would be a risk rather than a service: with
# keys that were made to collide, a dictionary takes quadratic time.
RECORD_BYTES_MAX = 128 * 1024
# Of a dictionary among the values; what a class keeps in its own state is a tuple.
DICTIONARY_KEYS_MAX = 1000
# Of a pickle that is a class and nothing else.
CLASS_BYTES_MAX = 4096
_PLAIN_KEYS = (str, bytes, int, float, bool, type(None))
# Of a loaded record, when shared parts are counted as often as they occur: to compare
# two takes some milliseconds.
PARTS_MAX = 200_000
# Bytes of a text, and bits of a number, that take as long to compare as a part does.
_TEXT_BYTES_A_PART = 64
_BITS_A_PART = 512


# All that is merged on the loop for one vote: three states of a bucket of numbers or of
# short texts. That takes 40 to 150 us, and what a client may make up of it 1 ms.
QUICK_BYTES_MAX = 4096


class Unresolvable(Exception):
    """This conflict cannot be resolved here; the client may still be able to."""


class Contradiction(Unresolvable):
    """The class itself says so: a client, which has the same one, would say it, too."""


class TakesLong(Exception):
    """Nothing for the loop, which has others to look after."""


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

    Raises Unresolvable if the class is not known, or a state is not plain, and
    Contradiction if the class itself finds that the changes contradict each other.
    """
    return _resolve(new, old, committed, only_simple=False)


def _resolve(new: bytes, old: bytes, committed: bytes, only_simple: bool) -> bytes:
    if max(len(new), len(old), len(committed)) > RECORD_BYTES_MAX:
        raise Unresolvable("too large")
    references = _References()
    load = partial(_load, references=references, only_simple=only_simple)
    try:
        meta, new_state = load(new)
        resolvable = _class_of(meta)
        resolved = resolvable()._p_resolveConflict(
            load(old)[1], load(committed)[1], new_state
        )
        references.check()
        return _dump(resolvable, resolved, references)
    except (Unresolvable, TakesLong):
        raise
    except ConflictError as error:
        references.check()
        raise Contradiction(str(error)) from None
    except Exception as error:
        raise Unresolvable(f"{type(error).__name__}: {error}") from error


def class_alone(record: bytes) -> ClassName | None:
    """The class of a record, if its first pickle is that and nothing else.

    The record may be of any size; no more than the beginning of it is looked at.
    """
    try:
        beginning = record[:CLASS_BYTES_MAX]
        meta = _StateUnpickler(beginning, lambda _reference: None).load()
    except Exception:  # noqa: BLE001 - whatever a pickle may be made to raise
        return None
    return meta if isinstance(meta, ClassName) else None


def resolve_encoded(form: Form, new: bytes, old: bytes, committed: bytes) -> bytes:
    """``resolve`` for records in the form in which a storage takes them.

    Raises Unresolvable, for records that are not of that form, too.
    """
    if form is PLAIN:
        return resolve(new, old, committed)
    if max(len(new), len(old), len(committed)) > RECORD_BYTES_MAX:
        raise Unresolvable("too large")
    try:
        plain = [_bounded(form.decode(record)) for record in (new, old, committed)]
    except Unresolvable:
        raise
    except Exception as error:
        # Whatever a wrapper may raise for what a client made up.
        raise Unresolvable(f"{type(error).__name__}: {error}") from error
    return form.encode(resolve(*plain))


def _bounded(record: bytes) -> bytes:
    # One at a time: of what is compressed, each may be a thousand times as large.
    if len(record) > RECORD_BYTES_MAX:
        raise Unresolvable("too large")
    return record


class Quickly:
    """``resolve_encoded`` for the loop, of one vote; raises TakesLong, too."""

    def __init__(self) -> None:
        self._bytes_left = QUICK_BYTES_MAX

    def __call__(self, form: Form, new: bytes, old: bytes, committed: bytes) -> bytes:
        self._bytes_left -= len(new) + len(old) + len(committed)
        if self._bytes_left < 0 or form is not PLAIN:
            raise TakesLong
        return _resolve(new, old, committed, only_simple=True)


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
    said = f"{name.module}.{name.name}"[:200] if type(name) is ClassName else "a class"
    raise Unresolvable(f"{said} is not resolved by the server")


class _References:
    """The references of three states; the same one is the same object in all."""

    def __init__(self) -> None:
        self.were_in_doubt = False
        self._known: dict[Any, _Reference] = {}

    def check(self) -> None:
        """Raise Unresolvable if the merge was not sure of one."""
        if self.were_in_doubt:
            raise Unresolvable("two references may mean equal objects or not")

    @property
    def are_any(self) -> bool:
        """Whether there was a reference in any state."""
        return bool(self._known)

    def load(self, data: Any) -> "_Reference":
        data = _checked_reference(data)
        # Lists are not hashable; the forms are different enough without them.
        key = tuple(data) if type(data) is list else data
        if key not in self._known:
            self._known[key] = _Reference(data, self)
        return self._known[key]


class _Reference(PersistentReference):
    """A reference that says afterwards what ZODB's says with a ValueError.

    BTrees goes on merging, and calls back into Python, while that error is pending:
    it then comes out wherever the interpreter next looks, which may be a callback of
    the garbage collector.
    """

    def __init__(self, data: Any, references: _References):
        super().__init__(data)
        self._references = references

    def __cmp__(self, other: Any) -> int:
        try:
            return cast(int, super().__cmp__(other))
        except ValueError:
            self._references.were_in_doubt = True
            return 1


def _load(record: bytes, references: _References, only_simple: bool) -> tuple[Any, Any]:
    if is_simple(record):
        fast = _SimpleUnpickler(record, references.load)
        return fast.load(), fast.load()
    if only_simple:
        raise TakesLong
    unpickler = _StateUnpickler(record, references.load)
    loaded = unpickler.load(), unpickler.load()
    _bound_expansion(loaded)
    return loaded


def _bound_expansion(loaded: Any) -> None:
    """Refuse a state that is small only because its parts are shared, or is not plain.

    Merging compares keys of three states, which share nothing with each other: forty
    tuples, each holding the next one twice, would take half a day.
    """
    sizes: dict[int, float] = {}

    def size_of(thing: Any) -> float:
        if not isinstance(thing, tuple | list | dict):
            return _size_alone(thing)
        if id(thing) not in sizes:
            # What contains itself has no end.
            sizes[id(thing)] = float("inf")
            parts = thing if type(thing) is not dict else (*thing, *thing.values())
            sizes[id(thing)] = _size_alone(thing) + sum(map(size_of, parts))
        return sizes[id(thing)]

    if size_of(loaded) > PARTS_MAX:
        raise Unresolvable("a state that shares its parts too often")


def _size_alone(thing: Any) -> float:
    """How many parts ``thing`` counts for, without what it contains."""
    kind = type(thing)
    if kind is str or kind is bytes:
        return 1 + len(thing) // _TEXT_BYTES_A_PART
    if kind is int:
        return 1 + thing.bit_length() // _BITS_A_PART
    if kind is dict:
        # Numbers can be made to have the same hash: each key is compared with all.
        return 1 + float(sum(type(key) not in (str, bytes) for key in thing) ** 2)
    if kind in _PLAIN_KINDS:
        return 1
    # The mark that an unpickler keeps on its stack is an object, too.
    raise Unresolvable(f"a {kind.__name__} in a state")


class _SimpleUnpickler(FastUnpickler):
    """Loads a simple record (see opcodes); every global in it is only a name."""

    def __init__(self, record: bytes, persistent_load: Any):
        super().__init__(BytesIO(record), errors="bytes")
        self.persistent_load = persistent_load

    def find_class(self, module: str, name: str) -> Any:
        return ClassName(module, name)


_PLAIN_KINDS = frozenset((float, bool, type(None), tuple, list, ClassName, _Reference))
# Numbers, text, bytes, names, references, containers, and what a stack needs. Not
# REDUCE, NEWOBJ, OBJ, INST and EXT, which make an object, nor BUILD, which gives a
# reference attributes of any kind: these would fail, too, or be found out, but late.
_OPCODES = (
    b"\x80.(012",
    b"N\x88\x89IJKML\x8a\x8bFG",
    b"STUBCVX",
    b"t)\x85\x86\x87]lea}dsu",
    b"cPQ",
    b"ghjpqr",
)


class _StateUnpickler(Unpickler):
    """Loads a record; every global in it is only a name.

    The one that is written in Python: the memo of the C unpickler is an array as long
    as a pickle says, and five bytes are enough to say 64 GB.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        opcode: Unpickler.dispatch[opcode] for opcode in b"".join(_OPCODES)
    }

    def __init__(self, record: bytes, persistent_load: Any):
        super().__init__(BytesIO(record), errors="bytes")
        self.persistent_load = persistent_load

    def find_class(self, module: str, name: str) -> Any:
        return ClassName(module, name)

    def load_setitem(self) -> None:
        _check_dictionary(self.stack[-3], self.stack[-2:])
        super().load_setitem()

    def load_setitems(self) -> None:
        mark = self.marker()
        _check_dictionary(self.stack[mark - 1], self.stack[mark + 1 :])
        super().load_setitems()

    def load_dict(self) -> None:
        _check_dictionary({}, self.stack[self.marker() + 1 :])
        super().load_dict()

    def load_forbidden(self) -> None:
        raise Unresolvable("a call in a state")

    dispatch.update(
        dict.fromkeys(set(Unpickler.dispatch) - set(dispatch), load_forbidden)
    )
    dispatch[SETITEM[0]] = load_setitem
    dispatch[SETITEMS[0]] = load_setitems
    dispatch[DICT[0]] = load_dict


def _check_dictionary(into: Any, keys_and_values: list[Any]) -> None:
    """Refuse keys that take long to hash, and many that may have the same hash."""
    keys = keys_and_values[::2]
    if type(into) is not dict or len(into) + len(keys) > DICTIONARY_KEYS_MAX:
        raise Unresolvable("a large dictionary in a state")
    if not all(type(key) in _PLAIN_KEYS for key in keys):
        raise Unresolvable("a dictionary with keys that are not plain")


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


def _dump(resolvable: type, state: Any, references: _References) -> bytes:
    file = BytesIO()
    if references.are_any:
        pickler = PersistentPickler(_persistent_id, file, _protocol)
    else:
        # A bucket of numbers: it would be asked for each of them.
        pickler = Pickler(file, _protocol)
    pickler.dump(resolvable)
    pickler.dump(state)
    return file.getvalue()
