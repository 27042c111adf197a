"""The spellings of an address in a client's arguments."""

import pytest

from zeolith.client.addressing import addresses_of


@pytest.mark.parametrize(
    ("addr", "addresses"),
    [
        (("db.example.org", 8100), [("db.example.org", 8100)]),
        (("", 8100), [("127.0.0.1", 8100)]),
        (("::1", 8100), [("::1", 8100)]),
        (8100, [("127.0.0.1", 8100)]),
        ("db.example.org:8200", [("db.example.org", 8200)]),
        ("[::1]:8200", [("::1", 8200)]),
        ("db.example.org", [("db.example.org", 8100)]),
        ("/run/zeolith.sock", ["/run/zeolith.sock"]),
        ("./socket", ["./socket"]),
    ],
)
def test_one_address_may_be_spelled_in_several_ways(addr, addresses):
    assert addresses_of(addr) == addresses


def test_a_list_keeps_its_order_and_mixes_spellings():
    assert addresses_of([("b", 2), 1, "a:3", "/socket"]) == [
        ("b", 2),
        ("127.0.0.1", 1),
        ("a", 3),
        "/socket",
    ]


def test_a_tuple_of_addresses_is_a_list():
    assert addresses_of((("a", 1), ("b", 2))) == [("a", 1), ("b", 2)]
    assert addresses_of(("a:1", "b:2")) == [("a", 1), ("b", 2)]


def test_a_list_in_a_list_is_read_in_place():
    assert addresses_of([1, [2, ("a", 3)]]) == [
        ("127.0.0.1", 1),
        ("127.0.0.1", 2),
        ("a", 3),
    ]


@pytest.mark.parametrize("addr", [[], (), [[]]])
def test_no_address_is_an_error(addr):
    with pytest.raises(ValueError, match="no address to connect to"):
        addresses_of(addr)


@pytest.mark.parametrize(
    "addr",
    [
        None,
        0,
        -1,
        65536,
        True,
        8100.0,
        b"/run/zeolith.sock",
        {"host": "a"},
        object(),
        [8100, None],
        ("a", 65536),
        ("a", -1),
        ("a", 0),
        ("a", True),
        ("a", 1.5),
    ],
)
def test_what_is_no_address_is_refused_before_anybody_dials(addr):
    with pytest.raises(ValueError, match="is not an address"):
        addresses_of(addr)


@pytest.mark.parametrize("addr", ["", "  ", "a:b", "::1", "a:70000"])
def test_text_that_is_no_address_is_refused(addr):
    with pytest.raises(ValueError, match="address"):
        addresses_of(addr)
