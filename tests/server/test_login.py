"""The server's side of a login: who is believed, and what the others learn."""

import hashlib
import ssl
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scramp import ScramClient

from zeolith.server.access import Access, Identity, parse_grants
from zeolith.server.login import Exchange, LoginFailed, by_token, subject_of

from ..support.identities import PASSWORD, user

GRANTS = parse_grants("write@main")
# Of some server, signed by itself.
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBiTCCAS+gAwIBAgIUUX5XgpHX/KkBo4eE3Y8vWVSq6+4wCgYIKoZIzj0EAwIw
GTEXMBUGA1UEAwwOZGIuZXhhbXBsZS5vcmcwIBcNMjYxMTIyMDEwNDEyWhgPMjEy
NjEwMjkwMTA0MTJaMBkxFzAVBgNVBAMMDmRiLmV4YW1wbGUub3JnMFkwEwYHKoZI
zj0CAQYIKoZIzj0DAQcDQgAEtlhWaoPo7taB8M8AEhHhHRYrwp4U40LtzMteY1Y8
fRD3VnjAKGS7mu2cUxIE476+lSqgc+6/jzsMCHkYwXtpRqNTMFEwHQYDVR0OBBYE
FNvbRrsMAqlOW/kMt8CYW/ICOCykMB8GA1UdIwQYMBaAFNvbRrsMAqlOW/kMt8CY
W/ICOCykMA8GA1UdEwEB/wQFMAMBAf8wCgYIKoZIzj0EAwIDSAAwRQIhAMj2npJg
KlRNJSbJbZb38vjd5cmKRPwBvpokBg7reN3wAiAKfm/ik8hgAvt1E/B5cxbziMpI
AiyJAkkZBlo/dGlqLQ==
-----END CERTIFICATE-----
"""


ANN = user("ann", "write@main")
ACCESS = Access(users={"ann": ANN}, secret=b"s" * 32)


def client(name: str = "ann", password: str = PASSWORD) -> Any:
    return ScramClient(["SCRAM-SHA-256"], name, password)


def logged_in(access: Access, scram: Any) -> Any:
    exchange = Exchange(access, scram.get_client_first(), None)
    scram.set_server_first(exchange.challenge)
    identity, proof = exchange.finish(scram.get_client_final())
    scram.set_server_final(proof)
    return identity


def test_who_knows_the_password_is_that_user():
    assert logged_in(ACCESS, client()) == ANN.identity


def test_who_does_not_know_it_is_nobody():
    with pytest.raises(LoginFailed, match=r"user 'ann': .*keys don't match"):
        logged_in(ACCESS, client(password="guessed"))


def test_an_unknown_user_fails_where_a_wrong_password_does():
    scram = client("bob")
    exchange = Exchange(ACCESS, scram.get_client_first(), None)
    scram.set_server_first(exchange.challenge)
    with pytest.raises(LoginFailed, match="user 'bob': no user of ours"):
        exchange.finish(scram.get_client_final())


def test_a_user_who_is_removed_in_the_middle_is_not_let_in():
    users, scram = {"ann": ANN}, client()
    exchange = Exchange(replace(ACCESS, users=users), scram.get_client_first(), None)
    scram.set_server_first(exchange.challenge)
    del users["ann"]
    with pytest.raises(LoginFailed, match="user 'ann': no user of ours"):
        exchange.finish(scram.get_client_final())


def challenge_of(access: Access, name: str) -> list[str]:
    """Salt and iterations; the nonce is another each time."""
    _nonce, *others = Exchange(
        access, client(name).get_client_first(), None
    ).challenge.split(",")
    return others


def test_the_challenge_to_an_unknown_user_looks_like_any_other():
    known, unknown = challenge_of(ACCESS, "ann"), challenge_of(ACCESS, "bob")
    assert known != unknown
    assert list(map(len, known)) == list(map(len, unknown))
    assert known[1] == unknown[1]
    assert challenge_of(ACCESS, "bob") == unknown
    assert challenge_of(ACCESS, "carl") != unknown
    # Nor does it tell who else there is, or was.
    assert challenge_of(replace(ACCESS, users={}), "bob") == unknown
    assert challenge_of(replace(ACCESS, secret=b"t" * 32), "bob") != unknown


def test_every_login_has_a_nonce_of_its_own():
    first = client().get_client_first()
    challenges = {Exchange(ACCESS, first, None).challenge for _ in range(10)}
    assert len(challenges) == 10


def test_a_login_that_was_recorded_opens_nothing():
    scram = client()
    first = scram.get_client_first()
    exchange = Exchange(ACCESS, first, None)
    scram.set_server_first(exchange.challenge)
    final = scram.get_client_final()
    exchange.finish(final)
    with pytest.raises(LoginFailed):
        exchange.finish(final)
    with pytest.raises(LoginFailed, match="nonce doesn't match"):
        Exchange(ACCESS, first, None).finish(final)


@given(st.text(max_size=80) | st.text("n,=rpc1Aa/+y", max_size=60))
def test_no_first_message_does_harm(first):
    try:
        Exchange(ACCESS, first, None)
    except LoginFailed:
        return
    assert first.startswith(("n,,n=", "y,,n="))


@given(st.text(max_size=80) | st.text("n,=rpc1Aa/+y", max_size=60))
def test_no_response_does_harm(response):
    exchange = Exchange(ACCESS, client().get_client_first(), None)
    with pytest.raises(LoginFailed):
        exchange.finish(response)


def test_no_name_gets_far_into_the_log():
    first = f"n,,n={'x' * 900},r=abc"
    with pytest.raises(LoginFailed) as raised:
        Exchange(ACCESS, first, None).finish("")
    assert len(str(raised.value)) < 200
    with pytest.raises(LoginFailed) as raised:
        by_token(ACCESS, "x\nERROR the disk is full" * 100, 0.0)
    assert len(str(raised.value)) < 200
    assert "\n" not in str(raised.value)


@pytest.fixture
def certificate() -> tuple[str, bytes]:
    """One, and its hash, as a client sees it."""
    der = ssl.PEM_cert_to_DER_cert(CERTIFICATE)
    return CERTIFICATE, hashlib.sha256(der).digest()


def test_over_tls_a_login_is_bound_to_it(certificate):
    pem, der_digest = certificate
    with pytest.raises(LoginFailed):
        Exchange(ACCESS, client().get_client_first(), pem)
    bound = ScramClient(
        ["SCRAM-SHA-256", "SCRAM-SHA-256-PLUS"],
        "ann",
        PASSWORD,
        channel_binding=("tls-server-end-point", der_digest),
    )
    exchange = Exchange(ACCESS, bound.get_client_first(), pem)
    bound.set_server_first(exchange.challenge)
    identity, _proof = exchange.finish(bound.get_client_final())
    assert identity == ANN.identity


def test_a_login_that_is_bound_to_another_certificate_fails(certificate):
    pem, _digest = certificate
    bound = ScramClient(
        ["SCRAM-SHA-256-PLUS"],
        "ann",
        PASSWORD,
        channel_binding=("tls-server-end-point", b"of somebody in between"),
    )
    exchange = Exchange(ACCESS, bound.get_client_first(), pem)
    bound.set_server_first(exchange.challenge)
    with pytest.raises(LoginFailed, match="channel bindings don't match"):
        exchange.finish(bound.get_client_final())


# Tokens


def access_with(token: str, expires_s: float | None = None) -> Access:
    name = token.partition(".")[0]
    key = hashlib.sha256(token.encode()).digest()
    identity = Identity("token", name, GRANTS, key, expires_s)
    return Access(tokens={name: identity})


def test_who_has_a_token_is_let_in():
    access = access_with("0a1b2c3d.secret")
    assert by_token(access, "0a1b2c3d.secret", 0.0).roles_on("main") == {
        "read",
        "write",
    }


@pytest.mark.parametrize(
    "token",
    ["", ".", "0a1b2c3d", "0a1b2c3d.", "0a1b2c3d.secret2", "other.secret", "\ud800.x"],
)
def test_another_token_is_none(token):
    with pytest.raises(LoginFailed, match="no token of ours"):
        by_token(access_with("0a1b2c3d.secret"), token, 0.0)


def test_the_log_has_no_more_of_a_token_than_its_name():
    for token in ("0a1b2c3d.swordfish", "other.swordfish"):
        with pytest.raises(LoginFailed) as raised:
            by_token(access_with("0a1b2c3d.secret"), token, 0.0)
        assert "swordfish" not in str(raised.value)


def test_a_token_ends():
    access = access_with("0a1b2c3d.secret", expires_s=100.0)
    assert by_token(access, "0a1b2c3d.secret", 99.0).kind == "token"
    with pytest.raises(LoginFailed, match="token 0a1b2c3d: it has expired"):
        by_token(access, "0a1b2c3d.secret", 100.0)


# Certificates


def tls(*subject: tuple[tuple[str, str], ...]) -> Any:
    return SimpleNamespace(getpeercert=lambda: {"subject": subject} if subject else {})


def test_the_subject_of_a_certificate_is_written_with_short_names():
    shown = tls(
        (("countryName", "DE"),),
        (("organizationName", "Example"), ("organizationalUnitName", "Web")),
        (("commonName", "app"),),
        (("title", "x"),),
    )
    assert subject_of(shown) == "C=DE,O=Example,OU=Web,CN=app,title=x"


def test_a_name_with_a_comma_in_it_is_not_that_of_somebody_else():
    one = tls((("commonName", "app,O=Example"),))
    other = tls((("commonName", "app"),), (("organizationName", "Example"),))
    assert subject_of(one) == r"CN=app\,O\=Example"
    assert subject_of(other) == "CN=app,O=Example"


def test_without_a_verified_certificate_there_is_no_subject():
    assert subject_of(None) is None
    assert subject_of(tls()) is None
    assert subject_of(SimpleNamespace(getpeercert=lambda: None)) is None  # type: ignore[arg-type]
