"""The client's side of a login; that of the server is in tests/server/test_login."""

import socket
from types import SimpleNamespace
from typing import Any, cast

import pytest
from scramp import ScramMechanism

from zeolith.protocol import login as login_module
from zeolith.protocol.credentials import Given
from zeolith.protocol.errors import HelloRefused, RemoteProtocolError
from zeolith.protocol.login import (
    NO_CREDENTIALS,
    Login,
    LoginError,
    Password,
    Token,
    is_private,
)

from ..support.certificates import Authority, encrypted_pair

SECRET = "correct horse battery"


class Far:
    """A socket that is connected to somewhere."""

    family = socket.AF_INET

    def __init__(self, host: str = "192.0.2.7"):
        self._host = host

    def getpeername(self) -> Any:
        return self._host, 8100


def far(host: str = "192.0.2.7") -> socket.socket:
    return cast(socket.socket, Far(host))


def server_of(password: str) -> Any:
    """SCRAM as RFC 5802 has it, for one user."""
    mechanism = ScramMechanism("SCRAM-SHA-256")
    keys = mechanism.make_auth_info(password, iteration_count=4096)
    return mechanism.make_server(lambda _name: keys)


def password_login(password: str = SECRET) -> Login:
    return Password("ann", Given(password)).login(far())


def begun(server: Any, login: Login) -> str:
    """The challenge to ``login``."""
    hello = login.hello_login()
    assert hello is not None
    way, first = hello
    assert way == "scram"
    server.set_client_first(first)
    challenge: str = server.get_server_first()
    return challenge


def test_who_has_no_credentials_says_nothing():
    login = NO_CREDENTIALS.login(far())
    assert login.hello_login() is None
    login.check_welcome({"proof": None})
    with pytest.raises(RemoteProtocolError, match="nothing to prove"):
        login.respond("who?")


def test_a_password_is_proved_and_never_said():
    server, login = server_of(SECRET), password_login()
    challenge = begun(server, login)
    response = login.respond(challenge)
    server.set_client_final(response)
    login.check_welcome({"proof": server.get_server_final()})
    assert SECRET not in f"{challenge}{response}"


@pytest.mark.parametrize("proof", [None, "", "v=AAAA", "garbage", "e=other-error"])
def test_a_server_that_does_not_know_the_password_is_none(proof):
    login = password_login()
    login.respond(begun(server_of(SECRET), login))
    with pytest.raises(LoginError, match="it is not the server"):
        login.check_welcome({"proof": proof})


def test_a_welcome_without_a_challenge_is_not_believed():
    login = password_login()
    login.hello_login()
    with pytest.raises(HelloRefused, match="it is not the server"):
        login.check_welcome({"proof": None})


@pytest.mark.parametrize(
    "challenge", ["", "r=x,s=AAAA,i=1", "r=,s=,i=", "e=unknown-user", "\ud800"]
)
def test_a_challenge_that_is_none_is_the_servers_offence(challenge):
    login = password_login()
    login.hello_login()
    with pytest.raises(RemoteProtocolError, match="the server's challenge"):
        login.respond(challenge)


def test_a_challenge_of_few_or_very_many_iterations_is_refused():
    for count in (1, 10**9):
        server, login = server_of(SECRET), password_login()
        parts = begun(server, login).rpartition("i=")
        with pytest.raises(RemoteProtocolError, match="challenge"):
            login.respond(f"{parts[0]}i={count}")


def test_a_password_that_cannot_be_used_is_not_shown():
    with pytest.raises(LoginError, match="cannot be used") as raised:
        password_login("horse\x07battery")
    assert "horse" not in str(raised.value)


def test_a_token_is_sent_only_where_nobody_can_listen():
    token = Token(Given(SECRET))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert token.login(ours).hello_login() == ["token", SECRET]
    assert token.login(far("127.0.0.1")).hello_login() == ["token", SECRET]
    with pytest.raises(LoginError, match="not sent unencrypted") as raised:
        token.login(far())
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    ("host", "private"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("::ffff:127.0.0.1", False),
        ("fe80::1%eth0", False),
        ("10.0.0.1", False),
        ("192.0.2.7", False),
    ],
)
def test_a_loopback_is_private_and_a_network_is_not(host, private):
    assert is_private(far(host)) is private


def test_what_is_encrypted_is_private_wherever_it_goes(tmp_path, monkeypatch):
    """By TCP, for a Unix socket is private anyway."""
    everything_is_far = SimpleNamespace(is_loopback=False)
    monkeypatch.setattr(login_module, "ip_address", lambda _: everything_is_far)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _address = listener.accept()
    assert not is_private(near)
    near, far = encrypted_pair(near, far, Authority(tmp_path))
    with near, far:
        assert is_private(near)


def test_no_login_shows_its_secret():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for login in (password_login(), Token(Given(SECRET)).login(ours)):
            assert SECRET not in repr(login)
