"""Conflicts are resolved as ZODB resolves them, and nothing is imported for it."""

import copyreg
import gc
import os
import pickle
import struct
import sys
import tracemalloc
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import pytest
from BTrees import _FAMILIES
from BTrees.IOBTree import IOBTree
from BTrees.Length import Length
from BTrees.OOBTree import OOBTree, OOBucket
from hypothesis import given, settings
from hypothesis import strategies as st
from persistent.mapping import PersistentMapping
from ZODB._compat import PersistentPickler, PersistentUnpickler
from ZODB.broken import find_global
from ZODB.ConflictResolution import ConflictResolvingStorage
from ZODB.POSException import ConflictError
from ZODB.utils import get_pickle_metadata

from zeolith.storage import conflicts
from zeolith.storage.conflicts import (
    QUICK_BYTES_MAX,
    RECORD_BYTES_MAX,
    RESOLVABLE,
    Contradiction,
    Quickly,
    TakesLong,
    Unresolvable,
    resolve,
)
from zeolith.storage.wrapping import PLAIN, Form

OID, OTHER_OID = b"oid45678", b"oid45679"
OLD_TID, COMMITTED_TID = b"tid45671", b"tid45672"
LENGTH = b"\x80\x03cBTrees.Length\nLength\n."
# What a hostile pickle would have done.
executed: list[Any] = []


def explode(*args: Any) -> str:
    executed.append(args)
    return "exploded"


class Explosive:
    def __new__(cls, *args: Any) -> Any:
        executed.append(args)
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        executed.append(state)


class Custom:
    """A class of an application's, which can resolve conflicts itself."""

    def _p_resolveConflict(self, *_states: Any) -> Any:
        executed.append("resolved")
        return {}


class Reference:
    """Stands for a persistent object in a state."""

    def __init__(self, data: Any):
        self.data = data

    def __lt__(self, other: Any) -> bool:
        return repr(self.data) < repr(other.data)


def pickled(*values: Any) -> bytes:
    """The values as a record has them, `Reference`s as persistent references."""

    def persistent_id(value: Any) -> Any:
        return value.data if isinstance(value, Reference) else None

    file = BytesIO()
    pickler = PersistentPickler(persistent_id, file, 3)
    for value in values:
        pickler.dump(value)
    return file.getvalue()


def state_of(record: bytes) -> Any:
    """The state in a record, with every class in a reference as a pair of names."""

    def named(data: Any) -> Any:
        if isinstance(data, type):
            return (data.__module__, data.__name__)
        if isinstance(data, tuple | list):
            return type(data)(map(named, data))
        return data

    def load(data: Any) -> Any:
        return ("reference", named(data))

    unpickler = PersistentUnpickler(find_global, load, BytesIO(record))
    unpickler.load()
    return unpickler.load()


class ZodbResolves(ConflictResolvingStorage):
    """A storage that has nothing but the two older revisions."""

    def __init__(self, old: bytes, committed: bytes):
        self._records = {OLD_TID: old, COMMITTED_TID: committed}

    def loadSerial(self, _oid: bytes, tid: bytes) -> bytes:
        return self._records[tid]


def resolved_by_zodb(new: bytes, old: bytes, committed: bytes) -> bytes | None:
    storage = ZodbResolves(old, committed)
    # BTrees merges on with an exception pending when ZODB's references differ. One
    # that is pending when a garbage collection begins comes out of its callbacks.
    gc.disable()
    try:
        record: bytes = storage.tryToResolveConflict(OID, COMMITTED_TID, OLD_TID, new)
    except ConflictError:
        return None
    finally:
        gc.enable()
    return record


def resolved_here(new: bytes, old: bytes, committed: bytes) -> bytes | None:
    try:
        return resolve(new, old, committed)
    except Unresolvable:
        return None


# As ZODB does it

_LETTERS: dict[str, st.SearchStrategy[Any]] = {
    "I": st.integers(-(2**31), 2**31 - 1),
    "U": st.integers(0, 2**32 - 1),
    "L": st.integers(-(2**63), 2**63 - 1),
    "Q": st.integers(0, 2**64 - 1),
    "F": st.floats(-1000, 1000, width=16),
    "O": st.text(st.characters(codec="utf-8"), max_size=5),
}
_references = (
    st.sampled_from([OID, OTHER_OID])
    .flatmap(
        lambda oid: st.sampled_from(
            [
                oid,
                (oid, OOBTree),
                ["m", ("other", oid, IOBTree)],
                ["n", ("other", oid)],
            ]
        )
    )
    .map(Reference)
)
# The three kinds of edit that a transaction makes to a key.
_KEEP, _SET, _DELETE = "keep", "set", "delete"


def _keys(family: str) -> st.SearchStrategy[Any]:
    return st.binary(min_size=2, max_size=2) if family == "fs" else _LETTERS[family[0]]


def _values(family: str) -> st.SearchStrategy[Any]:
    if family == "fs":
        return st.binary(min_size=6, max_size=6)
    if family[1] == "O":
        return _LETTERS["O"] | _references
    return _LETTERS[family[1]]


def _changed(base: dict[Any, Any], edits: dict[Any, Any]) -> dict[Any, Any]:
    changed = dict(base)
    for key, (edit, value) in edits.items():
        if edit == _SET:
            changed[key] = value
        elif edit == _DELETE:
            changed.pop(key, None)
    return changed


@st.composite
def conflicting_records(draw: st.DrawFn) -> tuple[bytes, bytes, bytes]:
    """new, old, committed of one object of any BTrees class, in one bucket."""
    family = draw(st.sampled_from(_FAMILIES))
    suffix = draw(st.sampled_from(["BTree", "Bucket", "TreeSet", "Set"]))
    of_class = RESOLVABLE[f"BTrees.{family}BTree", f"{family}{suffix}"]
    keys, values = _keys(family), _values(family)
    base = draw(st.dictionaries(keys, values, max_size=6))
    some_keys = keys | st.sampled_from(sorted(base)) if base else keys
    edits = st.dictionaries(
        some_keys, st.tuples(st.sampled_from([_SET, _DELETE]), values), max_size=3
    )
    records = []
    for content in (_changed(base, draw(edits)), base, _changed(base, draw(edits))):
        thing: Any = of_class()
        thing.update(content if suffix in ("BTree", "Bucket") else list(content))
        records.append(pickled(of_class, thing.__getstate__()))
    return records[0], records[1], records[2]


@settings(max_examples=400)
@given(conflicting_records())
def test_btrees_merge_as_zodb_merges_them(records):
    expected, record = resolved_by_zodb(*records), resolved_here(*records)
    assert (record is None) == (expected is None)
    if record is not None and expected is not None:
        assert state_of(record) == state_of(expected)
        assert get_pickle_metadata(record) == get_pickle_metadata(expected)


@given(conflicting_records())
def test_what_is_merged_quickly_is_merged_as_it_would_be_slowly(records):
    try:
        quickly: bytes | None = Quickly()(PLAIN, *records)
    except Unresolvable:
        quickly = None
    except TakesLong:
        return
    assert quickly == resolved_here(*records)


@given(st.integers(), st.integers(), st.integers())
def test_lengths_add_up(old, committed, new):
    records = [pickled(Length, value) for value in (new, old, committed)]
    assert state_of(resolve(*records)) == new + committed - old
    expected = resolved_by_zodb(*records)
    assert expected is not None
    assert state_of(expected) == new + committed - old


def test_every_class_that_btrees_ships_is_resolvable():
    assert set(RESOLVABLE) == {("BTrees.Length", "Length")} | {
        (f"BTrees.{family}BTree", f"{family}{suffix}")
        for family in _FAMILIES
        for suffix in ("BTree", "Bucket", "TreeSet", "Set")
    }


def bucket(**items: Any) -> bytes:
    return pickled(OOBucket, OOBucket(items).__getstate__())


def test_what_may_be_large_is_not_merged_quickly():
    def states(size: int) -> list[bytes]:
        value = "x" * size
        return [bucket(a=value, ours=1), bucket(a=value), bucket(a=value, theirs=1)]

    room = QUICK_BYTES_MAX - sum(map(len, states(300))) + 3 * 300
    fits, does_not = states(room // 3), states(room // 3 + 1)
    assert Quickly()(PLAIN, *fits) == resolve(*fits)
    with pytest.raises(TakesLong):
        Quickly()(PLAIN, *does_not)


def test_no_more_is_merged_quickly_than_fits_into_one_vote():
    quickly = Quickly()
    states = [pickled(Length, value) for value in (3, 1, 2)]
    fit = QUICK_BYTES_MAX // sum(map(len, states))
    for _ in range(fit):
        assert state_of(quickly(PLAIN, *states)) == 4
    with pytest.raises(TakesLong):
        quickly(PLAIN, *states)


@pytest.mark.parametrize("where", [0, 1, 2])
def test_only_what_is_simple_is_merged_quickly(where):
    states = [bucket(a=1, ours=2), bucket(a=1), bucket(a=1, theirs=2)]
    states[where] = bucket(a={"not": "simple"})
    with pytest.raises(TakesLong):
        Quickly()(PLAIN, *states)


def test_what_must_be_converted_is_not_merged_quickly():
    states = [bucket(a=1, ours=2), bucket(a=1), bucket(a=1, theirs=2)]
    with pytest.raises(TakesLong):
        Quickly()(Form(), *states)


def test_what_is_resolved_can_be_loaded_by_zodb_alone():
    record = resolve(bucket(a=1, new=3), bucket(a=1), bucket(a=1, committed=2))
    merged = OOBucket()
    merged.__setstate__(state_of(record))
    assert dict(merged) == {"a": 1, "committed": 2, "new": 3}
    assert get_pickle_metadata(record) == ("BTrees.OOBTree", "OOBucket")


@pytest.mark.parametrize(
    "meta",
    [
        OOBucket,
        (OOBucket, None),
        (OOBucket, ()),
        (("BTrees.OOBTree", "OOBucket"), None),
    ],
)
def test_a_class_is_known_however_the_record_spells_it(meta):
    state = OOBucket({"a": 1}).__getstate__()
    new = pickled(meta, OOBucket({"a": 1, "new": 2}).__getstate__())
    record = resolve(new, pickled(meta, state), pickled(meta, state))
    assert state_of(record) == OOBucket({"a": 1, "new": 2}).__getstate__()


@pytest.mark.parametrize(
    ("new", "committed"),
    [
        ({"a": 2}, {"a": 3}),
        ({}, {"a": 3}),
        ({"a": 1, "b": 1}, {"a": 1, "b": 2}),
        ({}, {"a": 1, "b": 2}),
    ],
)
def test_changes_that_contradict_each_other_are_so_for_whoever_merges_them(
    new, committed
):
    records = bucket(**new), bucket(a=1), bucket(**committed)
    with pytest.raises(Contradiction):
        resolve(*records)
    assert resolved_by_zodb(*records) is None


def test_what_is_only_in_doubt_is_no_contradiction():
    records = [bucket(a=Reference(oid)) for oid in (OID, OTHER_OID, b"oid4567a")]
    with pytest.raises(Unresolvable) as raised:
        resolve(*records)
    assert not isinstance(raised.value, Contradiction)


def test_values_that_only_the_application_can_make_are_left_to_it_silently(capsys):
    old, new, committed = (
        bucket(**{name: datetime(2026, 11, 21, tzinfo=UTC)}) for name in "abc"
    )
    with pytest.raises(Unresolvable, match="a call"):
        resolve(new, old, committed)
    assert capsys.readouterr() == ("", "")


# References


def test_references_that_differ_end_the_merge_without_an_exception_inside_btrees():
    # With one inside, the refusal would be BTrees' own, at whatever it came to next.
    with pytest.raises(Unresolvable, match="two references"):
        resolve(
            bucket(a=Reference(OID), b=Reference(OID)),
            bucket(a=Reference(OTHER_OID), b=Reference(OID)),
            bucket(a=Reference(OTHER_OID), b=Reference(OTHER_OID)),
        )


REFERENCES = [
    OID,
    (OID, OOBTree),
    (OID, ("no.such.module", "Class")),
    (OID, None),
    ["m", ("other database", OID, OOBTree)],
    ["m", ("other database", OID, ("no.such.module", "Class"))],
    ["n", ("other database", OID)],
    ["w", (OID,)],
    ["w", (OID, "other database")],
    [OID],
]


@pytest.mark.parametrize("data", REFERENCES, ids=repr)
def test_references_survive(data):
    reference = Reference(data)
    record = resolve(
        bucket(a=reference, new=Reference(data)),
        bucket(a=reference),
        bucket(a=reference, committed=2),
    )
    expected = bucket(a=reference, committed=2, new=reference)
    assert state_of(record) == state_of(expected)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        7,
        None,
        (),
        (OID,),
        (OID, OOBTree, None),
        (b"short", OOBTree),
        (OID, "text"),
        (OID, ("module",)),
        (OID, ("module", 7)),
        (OID, [OOBTree]),
        [],
        ["x", (OID,)],
        ["w", OID],
        ["w", ()],
        ["m", (OID, OOBTree)],
        ["n", (b"bytes", OID)],
        ["m", ("other", OID, OOBTree), 1],
        {"oid": OID},
    ],
    ids=repr,
)
def test_a_reference_of_another_form_is_unresolvable_or_what_zodb_makes_of_it(data):
    records = (bucket(a=Reference(data), new=1), bucket(), bucket(committed=1))
    record, expected = resolved_here(*records), resolved_by_zodb(*records)
    assert record is None or (expected and state_of(record) == state_of(expected))


# Hostile records

MODULE = __name__


def name(text: str) -> bytes:
    return f"c{MODULE}\n{text}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


HOSTILE_STATES = {
    "reduce": name("explode") + text("x") + b"\x85R.",
    "reduce os.system": b"cos\nsystem\n" + text("exit 1") + b"\x85R.",
    "reduce eval": b"cbuiltins\neval\n" + text("1") + b"\x85R.",
    "reduce a global of a global": b"cbuiltins\ngetattr\n"
    + name("Explosive")
    + text("__new__")
    + b"\x86R.",
    "newobj": name("Explosive") + b")\x81.",
    "newobj with arguments": name("Explosive") + text("x") + b"\x85\x81.",
    "build": name("Explosive") + b")\x81}b.",
    "build a class": name("Explosive") + b"}" + text("attribute") + b"K\x01sb.",
    "build with slots": name("Explosive") + b"}}" + text("a") + b"K\x01s\x86b.",
    "obj": b"(" + name("explode") + text("x") + b"o.",
    "obj without arguments": b"(" + name("Explosive") + b"o.",
    "inst": b"(" + text("x") + f"i{MODULE}\nexplode\n".encode() + b".",
    "inst without arguments": f"(i{MODULE}\nExplosive\n.".encode(),
    "append to a global": name("executed") + b"K\x01a.",
    "extend a global": name("executed") + b"(K\x01K\x02e.",
    "set items of a global": name("executed") + b"K\x00K\x01s.",
    "a global": name("Explosive") + b".",
    "a global in a tuple": b"(" + name("Explosive") + b"t.",
    "a module that is imported": b"cthis\ns\n.",
    "a reference that is built upon": b"C\x08"
    + OID
    + b"Q}"
    + text("data")
    + name("Explosive")
    + b"sb.",
    "extension code 1": b"\x82\xf0)R.",
    "extension code 2": b"\x83\xf0\x00)R.",
    "extension code 4": b"\x84\xf0\x00\x00\x00)R.",
    "protocol 4 global": text("os") + text("system") + b"\x93.",
    "endless frame": b"\x95" + b"\xff" * 8 + b".",
    "endless text": b"X\xff\xff\xff\xff.",
    "endless bytes": b"B\xff\xff\xff\x7f.",
    "endless number": b"\x8b\xff\xff\xff\x7f.",
    "stack underflow": b"R.",
    "unknown opcode": b"\xff.",
    "no end": b"K\x01",
    "nothing": b"",
    "deep nesting": b"(" * 50_000 + b"t" * 50_000 + b".",
    "deep nesting of lists": b"]" * 50_000 + b"a" * 49_999 + b".",
    "deep reference": b"(" * 50_000 + b"t" * 50_000 + b"Q.",
}


@pytest.fixture(autouse=True)
def nothing_is_executed() -> Any:
    executed.clear()
    yield
    assert not executed


@pytest.fixture
def extension_codes() -> Any:
    """A registered extension is a way to a class without its name in the pickle."""
    copyreg.add_extension(MODULE, "Explosive", 0xF0)
    yield
    copyreg.remove_extension(MODULE, "Explosive", 0xF0)


@pytest.mark.parametrize("protocol", [b"", b"\x80\x02", b"\x80\x03", b"\x80\x05"])
@pytest.mark.parametrize("where", ["new", "old", "committed"])
@pytest.mark.parametrize("hostile", HOSTILE_STATES)
@pytest.mark.parametrize("of_class", [Length, OOBucket], ids=["Length", "OOBucket"])
@pytest.mark.usefixtures("extension_codes")
def test_a_hostile_state_does_nothing_at_all(
    hostile, where, protocol, of_class, monkeypatch
):
    monkeypatch.setattr(os, "system", explode)
    good = pickled(Length, 1) if of_class is Length else bucket(a=1)
    meta = pickled(of_class)
    records = {"new": good, "old": good, "committed": good}
    records[where] = meta + protocol + HOSTILE_STATES[hostile]
    with pytest.raises(Unresolvable):
        resolve(**records)
    assert "this" not in sys.modules


@pytest.mark.parametrize("hostile", HOSTILE_STATES)
@pytest.mark.usefixtures("extension_codes")
def test_a_hostile_class_does_nothing_at_all(hostile, monkeypatch):
    monkeypatch.setattr(os, "system", explode)
    record = b"\x80\x03" + HOSTILE_STATES[hostile] + pickle.dumps(1, 3)
    good = pickled(Length, 1)
    with pytest.raises(Unresolvable):
        resolve(record, good, good)


@pytest.mark.parametrize(
    "meta",
    [
        Custom,
        (Custom, None),
        (MODULE, "Custom"),
        PersistentMapping,
        ("os", "system"),
        ("BTrees.OOBTree", "OOBucket"),
        (OOBucket, ("an argument",)),
        (("BTrees.OOBTree", "OOBucket"), {"an": "argument"}),
        ("BTrees.OOBTree", "OOTreeIterator"),
        ("BTrees.OOBTree", "OOBTree", "and more"),
        "BTrees.OOBTree.OOBTree",
        None,
        7,
        (),
        [],
        {},
        (["BTrees.OOBTree", "OOBucket"], None),
        ((["a list"], "OOBucket"), None),
    ],
    ids=repr,
)
def test_a_class_that_is_not_on_the_list_is_left_to_the_client(meta):
    state = OOBucket({"a": 1}).__getstate__()
    record = pickled(meta, state)
    with pytest.raises(Unresolvable):
        resolve(record, record, record)


@pytest.mark.parametrize("value", [explode, Explosive, [Explosive], {"a": Explosive}])
def test_a_class_among_the_values_is_left_to_the_client(value):
    """It would have to be imported to be written again."""
    with pytest.raises(Unresolvable):
        resolve(bucket(a=value, new=1), bucket(a=value), bucket(a=value, committed=1))


def test_an_object_among_the_values_is_left_to_the_client():
    value = Path("a value of a class")
    with pytest.raises(Unresolvable):
        resolve(bucket(a=value, new=1), bucket(a=value), bucket(a=value, committed=1))


def test_a_large_record_is_left_to_the_client():
    large = pickled(Length, 1).ljust(RECORD_BYTES_MAX + 1, b".")
    good = pickled(Length, 1)
    for records in ((large, good, good), (good, large, good), (good, good, large)):
        with pytest.raises(Unresolvable, match="too large"):
            resolve(*records)
    assert resolve(large[:RECORD_BYTES_MAX], good, good)


@settings(max_examples=200)
@given(st.binary(max_size=60), st.sampled_from(["new", "old", "committed"]))
def test_garbage_is_unresolvable_and_nothing_else(garbage, where):
    good = pickled(Length, 1)
    records = {"new": good, "old": good, "committed": good}
    for damaged in (LENGTH + b"\x80\x03" + garbage, garbage):
        resolved = resolved_here(**{**records, where: damaged})
        assert resolved is None or isinstance(state_of(resolved), int | float)


@settings(max_examples=100)
@given(conflicting_records(), st.data())
def test_a_damaged_record_is_unresolvable_or_resolved_to_something_plain(records, data):
    damaged = bytearray(records[0])
    position = data.draw(st.integers(0, len(damaged) - 1))
    damaged[position] ^= data.draw(st.integers(1, 255))
    resolved_here(bytes(damaged), records[1], records[2])


@pytest.mark.parametrize(
    "put", [b"r\0\x2d\x31\x01", b"p20000000\n", b"p2_0_0_0_0_0_0_0\n", b"p+20000000\n"]
)
def test_a_few_bytes_do_not_take_much_memory(put):
    """The memo of an unpickler that is an array would be made as long as they say."""
    record = LENGTH + b"\x80\x03K\x01" + put + b"."
    good = pickled(Length, 1)
    tracemalloc.start()
    try:
        resolved_here(record, good, good)
        _now, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 10_000_000


def laughing(levels: int) -> bytes:
    """A pickle of a few bytes a level that doubles with every level."""
    return b"K\x01" + b"2\x86" * levels


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "state",
    [
        laughing(64) + b".",
        laughing(64) + b"Q.",
        b"C\x08" + OID + laughing(64) + b"\x86Q.",
        laughing(64) + b"N\x86\x85.",
        text("key") + laughing(64) + b"\x86\x85.",
        b"}" + laughing(64) + b"Ns.",
    ],
    ids=["alone", "reference", "class", "key", "value", "key of a dictionary"],
)
def test_a_few_bytes_do_not_take_much_time(state):
    """Comparing, hashing or printing what they mean would take longer than the test."""
    record = pickled(OOBucket) + b"\x80\x03" + state
    with pytest.raises(Unresolvable):
        resolve(record, record, record)


@pytest.mark.timeout(60)
def test_a_class_of_a_few_bytes_does_not_take_much_time():
    record = b"\x80\x03" + laughing(64) + b"N\x86." + pickle.dumps(1, 3)
    with pytest.raises(Unresolvable):
        resolve(record, record, record)


@pytest.mark.parametrize(
    "dictionary",
    [
        b"(" + text("a") + b"K\x01d",
        b"}" + text("a") + b"K\x01s",
        b"}(" + text("a") + b"K\x01" + text("b") + b"K\x02u",
        b"}",
    ],
    ids=["dict", "setitem", "setitems", "empty"],
)
def test_a_dictionary_among_the_values_is_kept_however_it_is_written(dictionary):
    state = b"\x80\x03" + text("key") + dictionary + b"\x86\x85."
    new = pickled(OOBucket) + state
    record = resolve(new, bucket(), bucket(committed=1))
    key_and_value = state_of(new)[0]
    assert state_of(record) == (("committed", 1, *key_and_value),)


@pytest.mark.parametrize(
    "dictionary",
    [
        b"(K\x01K\x02\x86K\x01d",
        b"}K\x01K\x02\x86K\x01s",
        b"}(K\x01K\x02\x86K\x01u",
        b"]K\x01K\x01s",
        b"}("
        + b"".join(b"M" + struct.pack("<H", n) + b"N" for n in range(9000))
        + b"u",
    ],
    ids=["dict", "setitem", "setitems", "no dictionary", "large"],
)
def test_a_dictionary_that_may_take_long_is_left_to_the_client(dictionary):
    state = b"\x80\x03" + text("key") + dictionary + b"\x86\x85."
    record = pickled(OOBucket) + state
    with pytest.raises(Unresolvable, match="dictionary"):
        resolve(record, record, record)


def hostile(value: bytes, key: bytes = text("key")) -> bytes:
    """A bucket with one item, both as they are pickled."""
    return pickled(OOBucket) + b"\x80\x03(" + key + value + b"t\x85."


def built_upon(oid: bytes) -> bytes:
    """A reference whose oid is, afterwards, what takes for ever to compare."""
    attributes = b"}" + text("oid") + laughing(64) + b"s"
    return b"C\x08" + oid + b"Q" + attributes + b"b"


@pytest.mark.timeout(60)
def test_a_reference_is_given_no_attributes():
    """Comparing these two would keep the interpreter, and the server, for ever."""
    records = [hostile(built_upon(oid)) for oid in (OID, OTHER_OID, b"oid4567a")]
    with pytest.raises(Unresolvable, match="a call"):
        resolve(*records)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("where", ["key", "value"])
def test_a_long_text_that_is_shared_counts_with_its_length(where):
    """To compare 26 GB of text takes seconds, in which no other thread runs."""
    # Not too many parts, if they were short.
    shared = text("x" * 100_000) + b"2\x86" * 9
    record = hostile(**{where: shared, "value" if where == "key" else "key": b"K\x01"})
    with pytest.raises(Unresolvable, match="shares"):
        resolve(record, record, record)


def test_a_long_number_that_is_shared_counts_with_its_length():
    shared = b"\x8b" + struct.pack("<i", 100_000) + b"\x7f" * 100_000
    record = hostile(shared + b"2\x86" * 9)
    with pytest.raises(Unresolvable, match="shares"):
        resolve(record, record, record)


def colliding(count: int) -> bytes:
    """A dictionary whose keys have all the same hash."""
    hashed_as_0 = sys.hash_info.modulus
    keys = (
        b"\x8a\x0a" + (number * hashed_as_0).to_bytes(10, "little") + b"N"
        for number in range(1, 1 + count)
    )
    return b"}(" + b"".join(keys) + b"u"


def test_a_dictionary_of_keys_with_one_hash_is_not_compared_often():
    """A thousand keys take a million steps, each time that it is compared."""
    for value in (colliding(1000), colliding(100) + b"2\x86" * 7):
        record = hostile(value)
        with pytest.raises(Unresolvable, match="shares"):
            resolve(record, record, record)
    small = hostile(colliding(20))
    with pytest.raises(Contradiction):
        resolve(small, small, small)


@pytest.mark.parametrize("pair", [b"N\x86", b"\x85"], ids=["class", "no class"])
def test_a_class_is_not_printed_when_it_is_refused(pair):
    """Its name, of 60 KB, would be there a quarter of a million times."""
    meta = b"\x80\x03" + text("x" * 60_000) + b"2\x86" * 18 + pair + b"."
    record = meta + pickle.dumps(1, 3)
    tracemalloc.start()
    try:
        with pytest.raises(Unresolvable):
            resolve(record, record, record)
        _now, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 10_000_000


def test_the_mark_of_the_unpickler_does_not_come_out():
    """It is an object, and would be written as one."""
    record = hostile(b"(q\x000h\x00\x85")
    with pytest.raises(Unresolvable, match="object"):
        resolve(record, bucket(), bucket(other=1))


def test_a_class_that_was_loaded_by_its_code_once_is_not_taken_from_there(
    extension_codes, monkeypatch
):
    """An unpickler finds it without asking which classes there are."""
    monkeypatch.setitem(vars(copyreg)["_extension_cache"], 0xF0, Explosive)
    for made in (b"\x82\xf0)\x81", b"\x82\xf0", b"(\x82\xf0o"):
        record = hostile(made)
        with pytest.raises(Unresolvable, match="a call"):
            resolve(record, record, record)


def test_no_opcode_is_known_that_makes_or_changes_an_object():
    careful = conflicts._StateUnpickler(b"", lambda _reference: None)
    making = b"Rb\x81oi\x82\x83\x84"
    for opcode in making:
        with pytest.raises(Unresolvable, match="a call"):
            careful.dispatch[opcode](careful)


def test_what_is_compressed_is_bounded_when_it_is_not_any_more():
    decoded = []

    def decode(record: bytes) -> bytes:
        decoded.append(record)
        return record * 100_000

    form = Form(decode, bytes)
    with pytest.raises(Unresolvable, match="too large"):
        conflicts.resolve_encoded(form, *[pickled(Length, 1)] * 3)
    assert len(decoded) == 1, "the others take memory, too"


def test_what_is_large_is_not_decoded():
    def decode(_record: bytes) -> bytes:
        raise AssertionError("it takes time and memory")

    good, large = b"x", bytes(RECORD_BYTES_MAX + 1)
    for records in ((large, good, good), (good, large, good), (good, good, large)):
        with pytest.raises(Unresolvable, match="too large"):
            conflicts.resolve_encoded(Form(decode, bytes), *records)


def test_the_class_of_a_large_record_is_not_looked_for_further_than_it_may_be():
    read = []

    def recorded(self: Any) -> None:
        read.append(self)

    class Counted(conflicts._StateUnpickler):
        dispatch: ClassVar = {**conflicts._StateUnpickler.dispatch, 78: recorded}

    large = b"\x80\x03" + b"N" * 1_000_000 + pickled(Length)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(conflicts, "_StateUnpickler", Counted)
        assert conflicts.class_alone(large) is None
    assert 0 < len(read) <= conflicts.CLASS_BYTES_MAX


def test_what_is_shared_a_little_is_resolved():
    shared = tuple(range(10))
    values = {f"key {number}": (shared, shared) for number in range(30)}
    record = resolve(bucket(**values, new=1), bucket(**values), bucket(**values, b=1))
    assert state_of(record) == state_of(bucket(**values, b=1, new=1))


def test_an_unresolvable_conflict_says_why():
    record = pickled(Custom, {})
    with pytest.raises(Unresolvable, match="Custom"):
        resolve(record, record, record)
    assert conflicts.RECORD_BYTES_MAX == RECORD_BYTES_MAX
