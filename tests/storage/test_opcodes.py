import pickle
from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest
from BTrees.IOBTree import IOBTree
from BTrees.OOBTree import OOBTree
from hypothesis import given
from hypothesis import strategies as st
from ZODB._compat import PersistentPickler
from ZODB.DB import DB
from zodbpickle.fastpickle import Unpickler

from zeolith.storage import conflicts
from zeolith.storage.opcodes import NESTING_MAX, is_simple

from ..support.ids import number
from .transactions import length, record, references

META = pickle.dumps(("module", "Class"), 3)


def two(state: bytes) -> bytes:
    """A record whose state is this pickle."""
    return META + b"\x80\x03" + state + b"."


STATES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False),
        st.text(max_size=300),
        st.binary(max_size=300),
    ),
    lambda parts: st.one_of(
        st.lists(parts, max_size=8), st.lists(parts, max_size=8).map(tuple)
    ),
    max_leaves=40,
)


def bucket(keys: Any, of_class: Any) -> bytes:
    """The record of a BTree that is small enough to be one bucket."""
    return _record(keys, of_class, lambda tree: tree)


def first_bucket(keys: Any, of_class: Any) -> bytes:
    """The record of the first of several buckets, which refers to the next one."""
    return _record(keys, of_class, lambda tree: tree._firstbucket)


def _record(keys: Any, of_class: Any, part: Callable[[Any], Any]) -> bytes:
    db = DB(None)
    connection = db.open()
    tree = of_class(dict.fromkeys(keys, "value"))
    connection.root()["tree"] = tree
    connection.transaction_manager.commit()
    data: bytes = db.storage.load(part(tree)._p_oid)[0]
    db.close()
    return data


@pytest.mark.parametrize(
    "wanted",
    [
        length(5),
        bucket(range(20), IOBTree),
        bucket(range(200), IOBTree),
        first_bucket(range(200), IOBTree),
        first_bucket([f"key {n}" for n in range(200)], OOBTree),
        bucket([f"key {n}" for n in range(20)], OOBTree),
        references(number(1), number(2)),
        two(b"(K\x01M\x00\x01J\xff\xff\xff\xffG" + bytes(8) + b"\x88\x89Nt"),
    ],
)
def test_what_btrees_are_made_of_is_simple(wanted):
    assert is_simple(wanted)


@pytest.mark.parametrize(
    "state",
    [
        pytest.param(b"K\x01r\xff\xff\xff\xff", id="a large memo"),
        pytest.param(b"K\x01p1000000\n", id="a large memo in text"),
        pytest.param(b"Nq\x00)q\x01h\x01h\x01\x86", id="shared parts"),
        pytest.param(b"X\x01\x00\x00\x00aq\x01)q\x01h\x01", id="a place used twice"),
        pytest.param(b"K\x012", id="the same twice"),
        pytest.param(b"}K\x01K\x02s", id="a dictionary"),
        pytest.param(b"cbuiltins\nprint\n)R", id="a call"),
        pytest.param(b"cbuiltins\nprint\n)\x81", id="a new object"),
        pytest.param(b"(cbuiltins\nprint\no", id="an object"),
        pytest.param(b")}b", id="a state that is set"),
        pytest.param(b"I1\n", id="a number in text"),
        pytest.param(b"X\xff\xff\xff\xffa", id="text that is not there"),
        pytest.param(b"C\xffa", id="bytes that are not there"),
        pytest.param(b"X\x01\x00", id="a length that is not whole"),
        pytest.param(b"q", id="no place"),
        pytest.param(b"cno newline", id="a name without an end"),
        pytest.param(b"N.N", id="three pickles"),
        pytest.param(b"\x82\x01", id="an extension"),
    ],
)
def test_what_may_take_more_than_it_is_long_is_not_simple(state):
    assert not is_simple(two(state))


@pytest.mark.parametrize("wanted", [b"", META, META + META + b"N", META[:-1]])
def test_what_is_not_two_pickles_is_not_simple(wanted):
    assert not is_simple(wanted)


@given(state=STATES)
def test_what_is_simple_is_loaded_as_by_the_careful_one(state):
    data = record(("module", "Class"), state)
    if not is_simple(data):
        return
    unpickler = Unpickler(BytesIO(data), errors="bytes")
    careful = conflicts._StateUnpickler(data, lambda _reference: None)
    assert unpickler.load() == careful.load()
    assert unpickler.load() == careful.load() == state


@given(state=STATES, data=st.data())
def test_a_simple_record_takes_no_more_memory_than_its_length_says(state, data):
    """Whatever byte of it is changed."""
    made = bytearray(record(("module", "Class"), state))
    at = data.draw(st.integers(0, len(made) - 1))
    made[at] = data.draw(st.integers(0, 255))
    if not is_simple(bytes(made)):
        return
    unpickler = conflicts._SimpleUnpickler(bytes(made), lambda reference: reference)
    try:
        loaded = [unpickler.load(), unpickler.load()]
    except Exception:
        # What is simple need not be a pickle.
        return
    parts = 0
    stack: list[Any] = loaded
    while stack:
        parts += 1
        assert parts <= 2 * len(made), "parts are there more than once"
        thing = stack.pop()
        if isinstance(thing, list | tuple):
            stack += thing


@pytest.mark.parametrize("nesting", [b"\x85", b"t"])
def test_what_is_nested_deeply_is_not_simple(nesting):
    """The hash of a tuple of tuples takes the stack of the thread, and kills it."""
    marks = b"(" * NESTING_MAX if nesting == b"t" else b""
    assert is_simple(two(marks + b")" + nesting * (NESTING_MAX - 1)))
    assert not is_simple(two(b"(" + marks + b")" + nesting * NESTING_MAX))


@pytest.mark.parametrize("nesting", [b"NN\x860", b"NNN\x870", b"Na", b"(NNe"])
def test_everything_that_puts_something_into_something_counts(nesting):
    # The class is a tuple.
    assert is_simple(two(b"]" + nesting * (NESTING_MAX - 1)))
    assert not is_simple(two(b"]" + nesting * NESTING_MAX))


def test_lists_that_hold_each_other_are_no_cause_to_wait():
    file = BytesIO()
    pickler = PersistentPickler(lambda _thing: None, file, 3)
    state: list[Any] = []
    for _ in range(40):
        state = [state, state]
    pickler.dump(("module", "Class"))
    pickler.dump(state)
    assert not is_simple(file.getvalue())
