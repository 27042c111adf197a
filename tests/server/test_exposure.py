"""Which addresses a server without TLS and a login keeps away from."""

import socket

import pytest

from zeolith.protocol.addresses import Address
from zeolith.server.exposure import exposed, refusal, resolved

INSIDE = [
    "127.0.0.1",
    "127.1.2.3",
    "::1",
    "::ffff:127.0.0.1",
    "localhost",
    "LocalHost.",
]
OUTSIDE = [
    "0.0.0.0",
    "::",
    "",
    "192.0.2.7",
    "10.0.0.1",
    "2001:db8::7",
    "fe80::1%eth0",
    "::ffff:192.0.2.7",
    "db.example.org",
    "localhost.example.org",
    # As some resolvers write 127.0.0.1; the listener asks again of what it has bound.
    "127.1",
]


@pytest.mark.parametrize("host", INSIDE)
def test_loopback_is_not_exposed(host):
    assert exposed([(host, 8100)], False, False) == []


@pytest.mark.parametrize("host", OUTSIDE)
def test_everything_else_is(host):
    assert exposed([(host, 8100)], False, False) == [(host, 8100)]


def test_a_unix_socket_is_not():
    assert exposed(["/run/zeolith.sock"], False, False) == []


@pytest.mark.parametrize("has_tls", [False, True])
@pytest.mark.parametrize("has_login", [False, True])
def test_only_tls_and_a_login_together_protect(has_tls, has_login):
    """A password without TLS is read on its way; TLS without one lets everybody in."""
    found = exposed([("0.0.0.0", 1)], has_tls, has_login)
    assert (found == []) is (has_tls and has_login)


def test_only_those_are_named_that_are_exposed():
    addresses: list[Address] = [
        ("127.0.0.1", 1),
        ("0.0.0.0", 2),
        "/run/x",
        ("::", 3),
    ]
    found = exposed(addresses, False, False)
    assert found == [("0.0.0.0", 2), ("::", 3)]
    text = refusal(found)
    assert text.startswith("0.0.0.0:2, [::]:3: ")
    for way_out in ("TLS", "127.0.0.1", "Unix socket", "insecure true", "--insecure"):
        assert way_out in text
    assert "\n" not in text


def test_a_name_is_what_it_resolves_to(monkeypatch):
    hosts = {"inside.test": "127.0.0.1", "outside.test": "192.0.2.7"}

    def getaddrinfo(host, port, **_options):
        if host not in hosts:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (hosts[host], port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    addresses: list[Address] = [
        ("inside.test", 1),
        ("outside.test", 2),
        ("nowhere.test", 3),
        "/run/x",
    ]
    found = resolved(addresses)
    assert found == [("127.0.0.1", 1), ("192.0.2.7", 2), "/run/x"]
    assert exposed(found, False, False) == [("192.0.2.7", 2)]


def test_a_name_with_an_address_that_others_reach_is_exposed(monkeypatch):
    hosts = ["127.0.0.1", "192.0.2.7", "::1"]
    found = [(0, socket.SOCK_STREAM, 6, "", (host, 1)) for host in hosts]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: found)
    addresses = resolved([("db.test", 1)])
    assert addresses == [(host, 1) for host in hosts]
    assert exposed(addresses, False, False) == [("192.0.2.7", 1)]


def test_what_is_no_name_is_left_to_whoever_listens():
    assert resolved([("a" * 70 + ".test", 1)]) == []


def test_localhost_is_not_looked_up(monkeypatch):
    def getaddrinfo(*_args, **_options):
        raise AssertionError("it may take a while")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    addresses: list[Address] = [("localhost", 1), ("127.0.0.1", 2)]
    assert resolved(addresses) == addresses


def test_all_interfaces_stay_all_interfaces():
    assert exposed(resolved([("", 1)]), False, False)
    assert resolved([("0.0.0.0", 2)]) == [("0.0.0.0", 2)]
