"""Which form records have, above and below wrappers."""

import pytest
from ZODB.MappingStorage import MappingStorage
from ZODB.tests.hexstorage import HexStorage, ServerHexStorage

from zeolith.storage.wrapping import PLAIN, bottom, form_of, outside, passes, wrappers

HEX = b".h" + b"record".hex().encode()


def test_a_stack_is_taken_apart_from_the_outside():
    base = MappingStorage()
    inner = HexStorage(base)
    outer = HexStorage(inner)
    assert list(wrappers(outer)) == [outer, inner]
    assert not list(wrappers(base))


def test_who_passes_records_is_told_from_who_converts_them():
    assert passes(ServerHexStorage(MappingStorage()))
    assert not passes(HexStorage(MappingStorage()))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda base: base,
        HexStorage,
        lambda base: HexStorage(HexStorage(base)),
        lambda base: HexStorage(ServerHexStorage(base)),
    ],
    ids=["none", "converting", "twice", "converting above passing"],
)
def test_above_a_converting_wrapper_records_are_plain(wrap):
    assert form_of(wrap(MappingStorage())) is PLAIN


@pytest.mark.parametrize(
    "wrap",
    [ServerHexStorage, lambda base: ServerHexStorage(HexStorage(base))],
    ids=["passing", "passing above converting"],
)
def test_above_a_passing_wrapper_records_are_as_the_clients_have_them(wrap):
    form = form_of(wrap(MappingStorage()))
    assert form.decode(HEX) == b"record"
    assert form.encode(b"record") == HEX


def test_two_passing_wrappers_know_what_each_other_knows():
    form = form_of(ServerHexStorage(ServerHexStorage(MappingStorage())))
    twice = b".h" + HEX.hex().encode()
    assert form.decode(twice) == b"record"
    assert form.encode(b"record") == twice


def test_what_is_at_the_bottom_and_what_comes_out_at_the_top():
    base = MappingStorage()
    passing, converting = ServerHexStorage(base), HexStorage(MappingStorage())
    assert outside(base) is outside(passing) is PLAIN
    form = outside(converting)
    assert form is not None
    assert form.decode(HEX) == b"record"
    assert form.encode(b"record") == HEX
    assert outside(HexStorage(passing)) is None


def test_the_bottom_is_below_all_wrappers():
    base = MappingStorage()
    assert bottom(base) is base
    assert bottom(HexStorage(ServerHexStorage(base))) is base
