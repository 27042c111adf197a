"""Extensions of transactions: what is plain is read, and nothing else is made."""

import copyreg
import datetime
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ZODB import _compat

from zeolith.client.extensions import _NAMES, load_extension

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.datetimes()
    | st.datetimes(timezones=st.just(datetime.UTC))
    | st.dates()
    | st.timedeltas()
    | st.decimals(allow_nan=False),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner)
    ),
    max_leaves=10,
)


def test_only_these_names_mean_anything():
    """Whoever adds one must know that to call it, with anything, is harmless."""
    plain = ["dict", "list", "tuple", "set", "frozenset", "bool", "int", "float"]
    plain += ["complex", "bytes"]
    moments = ["date", "datetime", "time", "timedelta", "timezone"]
    assert set(_NAMES) == {
        *((module, name) for module in ("builtins", "__builtin__") for name in plain),
        *(("datetime", name) for name in moments),
        ("_codecs", "encode"),
        ("decimal", "Decimal"),
    }


@given(st.dictionaries(st.text(), plain), st.integers(0, 3))
def test_what_programs_note_is_read(noted, protocol):
    assert load_extension(pickle.dumps(noted, protocol)) == noted


@given(st.dictionaries(st.text(), plain))
def test_what_zodb_writes_is_read_as_zodb_reads_it(noted):
    written = _compat.dumps(noted, 3)
    assert load_extension(written) == _compat.loads(written)


def test_without_one_there_is_nothing():
    assert load_extension(b"") == {}


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    return tmp_path / "was run"


class Hostile:
    def __init__(self, call: Any, *args: Any):
        self._reduced = call, args

    def __reduce__(self) -> Any:
        return self._reduced


@pytest.mark.parametrize("protocol", range(4))
def test_nothing_is_called_that_it_names(proof, protocol):
    for call, args in [
        (eval, (f"open({str(proof)!r}, 'w')",)),
        (open, (str(proof), "w")),
        (Path.touch, (proof,)),
        (getattr, (datetime.datetime, "now")),
    ]:
        noted = {"colour": "red", "value": Hostile(call, *args)}
        with pytest.raises(ValueError, match="it names"):
            load_extension(pickle.dumps(noted, protocol))
    assert not proof.exists()


def test_nothing_is_imported_that_it_names():
    with pytest.raises(ValueError, match=r"it names this\.s"):
        load_extension(b"}(U\x01acthis\ns\nu.")


@pytest.mark.parametrize(
    "name", ["datetime\ndatetime.now", "builtins\neval", "decimal\nos"]
)
def test_a_name_is_plain_as_a_whole_or_not_at_all(name):
    with pytest.raises(ValueError, match="it names"):
        load_extension(f"c{name}\n.".encode())


def test_no_class_is_found_by_a_code(monkeypatch):
    monkeypatch.setitem(vars(copyreg)["_extension_cache"], 240, Path)
    with pytest.raises(ValueError, match="code 240"):
        load_extension(b"\x82\xf0)R.")


def test_no_other_codec_is_looked_for():
    with pytest.raises(ValueError, match="bytes in"):
        load_extension(b"}(U\x01ac_codecs\nencode\n(U\x01aU\x03hextRu.")


def test_what_is_no_dictionary_is_refused():
    with pytest.raises(ValueError, match="no dictionary"):
        load_extension(pickle.dumps([("colour", "red")], 3))


def test_a_few_bytes_do_not_take_much_memory():
    tracemalloc.start()
    try:
        load_extension(b"}r\x00\x2d\x31\x01.")
        _now, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 10_000_000


def test_bytes_of_a_number_are_not_made():
    with pytest.raises(ValueError, match="bytes of what"):
        load_extension(b"cbuiltins\nbytes\nJ\xff\xff\xff\x7f\x85R.")
