"""How addresses are spelled."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeolith.protocol.addresses import format_address, parse_address

hosts = st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,20}[a-z0-9])?", fullmatch=True).filter(
    lambda host: not host.isdigit()
)
addresses = st.tuples(
    hosts | st.ip_addresses().map(str), st.integers(0, 65535)
) | st.text(st.characters(exclude_categories=["Cs"])).map(
    lambda name: f"/run/{name}.sock"
)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("localhost:8100", ("localhost", 8100)),
        ("db.example.org:80", ("db.example.org", 80)),
        ("10.0.0.1:0", ("10.0.0.1", 0)),
        ("8100", ("127.0.0.1", 8100)),
        (":8200", ("127.0.0.1", 8200)),
        ("db.example.org", ("db.example.org", 8100)),
        ("[::1]:8100", ("::1", 8100)),
        ("[fe80::1]:65535", ("fe80::1", 65535)),
        ("/run/zeolith.sock", "/run/zeolith.sock"),
        ("./zeolith.sock", "./zeolith.sock"),
        ("/run/with:8100", "/run/with:8100"),
        ("  localhost:8100\n", ("localhost", 8100)),
    ],
)
def test_what_an_address_may_look_like(text, address):
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "localhost:",
        "localhost:http",
        "localhost:-1",
        "localhost:65536",
        "65536",
        "::1",
        "fe80::1:8100",
        "[::1]",
        "localhost:²",
        "9" * 5000,
        "localhost:٣",
    ],
)
def test_a_mistake_gets_a_sentence_that_says_what_to_write(text):
    with pytest.raises(ValueError, match=r"write .*:port"):
        parse_address(text)


@given(addresses)
def test_every_address_can_be_written_down_and_read_again(address):
    assert parse_address(format_address(address)) == address
