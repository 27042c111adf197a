"""References are found as ZODB finds them, and nothing in a record can hurt."""

import pickle
from typing import Any

import pytest
from BTrees.IIBTree import IISet
from BTrees.IOBTree import IOBucket
from BTrees.OOBTree import OOBTree, OOBucket, OOTreeSet
from hypothesis import given
from hypothesis import strategies as st
from persistent import Persistent
from persistent.list import PersistentList
from persistent.mapping import PersistentMapping
from persistent.wref import WeakRef
from ZODB.DB import DB
from ZODB.serialize import referencesf

from zeolith.protocol.references import link_of, references


class Plain(Persistent):
    """Refers to what it is given."""

    def __init__(self, **attributes: Any):
        self.__dict__.update(attributes)


class WithArguments(Persistent):
    """References to its instances are bare oids."""

    def __getnewargs__(self) -> tuple[()]:
        return ()


def items(count: int) -> list[Any]:
    return [PersistentMapping(number=n) for n in range(count)]


def bucket(count: int, following: Any = None) -> Any:
    made = OOBucket()
    state = tuple(
        part for n, item in enumerate(items(count)) for part in (f"k{n}", item)
    )
    made.__setstate__((state,) if following is None else (state, following))
    return made


@pytest.fixture
def record_of():
    """Stores an object and gives its record."""
    db = DB(None)
    connection = db.open()

    def stored(made: Any) -> bytes:
        connection.root()["made"] = made
        connection.transaction_manager.commit()
        record: bytes = db.storage.load(made._p_oid)[0]
        return record

    yield stored
    connection.close()
    db.close()


MADE = {
    "a list": lambda: PersistentList(items(5)),
    # What is remembered has long places then.
    "a long list": lambda: PersistentList(items(1000)),
    "a mapping": lambda: PersistentMapping({f"k{n}": n for n in items(3)}),
    "several classes": lambda: Plain(a=Plain(), b=WithArguments(), c=Plain(), d=1),
    "bare oids": lambda: PersistentList([WithArguments() for _ in range(4)]),
    "a tree": lambda: OOBTree({f"k{n}": Plain() for n in range(200)}),
    "a bucket": lambda: bucket(9),
    "a bucket before another": lambda: bucket(9, bucket(3)),
    "bytes of eight": lambda: Plain(data=b"12345678", other=[b"C\x08"] * 3),
    "nothing": lambda: Plain(),
}


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_references_are_those_that_zodb_finds(record_of, made):
    """But for those that are there already."""
    record = record_of(made())
    found = references(record)
    assert set(found) == set(referencesf(record))
    assert len(found) == len(set(found))


def test_references_are_in_the_order_of_the_record(record_of):
    made = items(300)
    assert references(record_of(PersistentList(made))) == [item._p_oid for item in made]


def test_weak_references_are_not_followed(record_of):
    target = Plain()
    strong = Plain(target=target)
    record_of(strong)
    assert references(record_of(Plain(weak=WeakRef(target)))) == []


def test_a_bucket_is_linked_with_the_next_one(record_of):
    last = bucket(3)
    first = bucket(40, last)
    assert link_of(record_of(first)) == last._p_oid
    assert link_of(record_of(last)) is None


def test_every_bucket_of_a_tree_but_the_last_has_a_link(record_of):
    tree = OOTreeSet(f"k{n:03}" for n in range(200))
    record_of(tree)
    each = tree._firstbucket
    while each is not None:
        record = tree._p_jar.db().storage.load(each._p_oid)[0]
        each = each._next
        assert link_of(record) == (None if each is None else each._p_oid)


WITHOUT_LINK = {
    "a list": lambda: PersistentList(items(5)),
    "a tree": lambda: OOBTree({f"k{n}": n for n in range(200)}),
    "a set of numbers": lambda: IISet([1, 2, 3]),
    "a bucket with a reference": lambda: IOBucket({1: Plain()}),
    "an object with another of its class": lambda: Plain(last=Plain()),
    "the last bucket": lambda: bucket(3),
}


@pytest.mark.parametrize("made", WITHOUT_LINK.values(), ids=WITHOUT_LINK)
def test_nothing_else_has_a_link(record_of, made):
    assert link_of(record_of(made())) is None


def test_a_pair_whose_second_part_is_of_another_class_has_no_link(record_of):
    record = record_of(bucket(3, bucket(1)))
    own_class = b"h\x00\x86"
    assert record.count(own_class) == 1
    assert link_of(record) is not None
    assert link_of(record.replace(own_class, b"h\x01\x86")) is None


MARKS = [b"C\x08", b"12345678", b"q\x01", b"r\x01\0\0\0", b"h\x00", b"j\0\0\0\0"]
PIECES = st.sampled_from([*MARKS, b"\x86", b"Q", b".", b"cm\nn\n", b"c", b"\n"])


@given(st.binary(max_size=400) | st.lists(PIECES).map(b"".join))
def test_whatever_is_in_a_record_nothing_is_raised(record):
    found = references(record)
    assert all(len(oid) == 8 and oid in record for oid in found)
    link = link_of(record)
    assert link is None or link in record


def test_nothing_is_unpickled(monkeypatch):
    class Trap:
        def __reduce__(self) -> Any:
            return pytest.fail, ("it was unpickled",)

    record = pickle.dumps(Trap(), 3) + pickle.dumps({"a": 1}, 3)
    assert references(record) == []
    assert link_of(record) is None
