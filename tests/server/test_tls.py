"""The server's certificate: read, checked, and read again."""

import logging
import ssl
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from zeolith.protocol.tls import TlsMistake
from zeolith.server.tls import (
    Certificate,
    TlsOptions,
    server_context,
    validity,
    warning,
)

from ..support.certificates import Authority, encrypted

DAY_S = 86400


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def test_a_certificate_is_all_that_is_needed(authority):
    context = server_context(TlsOptions(authority.sign().both))
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.verify_mode == ssl.CERT_NONE
    assert context.options & ssl.OP_NO_RENEGOTIATION


def test_the_oldest_version_can_be_raised(authority):
    options = TlsOptions(authority.sign().both, minimum_version=ssl.TLSVersion.TLSv1_3)
    assert server_context(options).minimum_version == ssl.TLSVersion.TLSv1_3


def test_clients_may_or_must_show_a_certificate(authority):
    both = authority.sign().both
    may = TlsOptions(both, client_ca=authority.ca)
    must = TlsOptions(both, client_ca=authority.ca, requires_client_certificate=True)
    assert server_context(may).verify_mode == ssl.CERT_OPTIONAL
    assert server_context(must).verify_mode == ssl.CERT_REQUIRED
    nobody = TlsOptions(both, requires_client_certificate=True)
    with pytest.raises(TlsMistake, match="needs client-ca"):
        server_context(nobody)


# The password of the key


def test_the_password_comes_from_a_file_or_from_a_command(authority, tmp_path):
    signed = authority.sign()
    encrypted(signed.key, "secret")
    path = tmp_path / "password"
    path.write_text("secret\n")
    server_context(
        TlsOptions(signed.certificate, signed.key, key_password_file=str(path))
    )
    server_context(
        TlsOptions(signed.certificate, signed.key, key_password_command=f"cat {path}")
    )


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("echo wrong", "the password does not open the private key"),
        ("exit 3", "key-password-command ended with status 3"),
        ("true", "key-password-command printed no password"),
    ],
)
def test_a_command_that_tells_no_password_is_a_mistake(authority, command, complaint):
    signed = authority.sign()
    encrypted(signed.key, "secret")
    options = TlsOptions(signed.certificate, signed.key, key_password_command=command)
    with pytest.raises(TlsMistake, match=complaint):
        server_context(options)


def test_a_command_that_hangs_is_a_mistake(authority, monkeypatch):
    monkeypatch.setattr("zeolith.server.tls.PASSWORD_COMMAND_TIMEOUT_S", 0.05)
    options = TlsOptions(authority.sign().both, key_password_command="exec sleep 60")
    with pytest.raises(TlsMistake, match=r"took more than 0\.05 s"):
        server_context(options)


def test_two_places_for_a_password_are_a_mistake(authority):
    options = TlsOptions(authority.sign().both, None, "file", "command")
    with pytest.raises(TlsMistake, match="give either"):
        server_context(options)


# How long it is valid


@pytest.mark.parametrize("year", [2030, 2049, 2050, 2100])
def test_the_validity_is_read_from_the_certificate(authority, year):
    """Until 2049 a year has two digits, from 2050 on four."""
    begin = datetime(2020, 2, 29, 12, 30, 15, tzinfo=UTC)
    end = datetime(year, 3, 1, tzinfo=UTC)
    signed = authority.sign(begin=begin, end=end)
    der = ssl.PEM_cert_to_DER_cert(Path(signed.certificate).read_text())
    assert validity(der) == (begin.timestamp(), end.timestamp())


def test_an_operator_is_warned_of_a_certificate_that_ends(authority):
    begin = datetime.now(UTC).replace(microsecond=0)
    end = begin + timedelta(days=90)
    options = TlsOptions(authority.sign(begin=begin, end=end).both)
    begin_s, end_s = begin.timestamp(), end.timestamp()
    assert warning(options, begin_s) is None
    assert warning(options, end_s - 15 * DAY_S) is None
    for now_s, text in (
        (begin_s - 1, "is not valid before"),
        (end_s - 13 * DAY_S, "expires on"),
        (end_s, f"has expired on {end:%Y-%m-%d}"),
    ):
        said = warning(options, now_s)
        assert said is not None
        assert text in said


# Another one


def test_new_clients_are_shown_the_new_one(authority):
    certificate = Certificate(TlsOptions(authority.sign().both))
    before = certificate.context
    renewed = Certificate(TlsOptions(authority.sign(file="new").both))
    certificate.replace_by(renewed)
    assert certificate.context is renewed.context is not before
    assert certificate.options == renewed.options


def test_a_certificate_that_has_expired_is_used_and_logged(authority, caplog):
    options = TlsOptions(authority.expired().both)
    with caplog.at_level(logging.WARNING):
        Certificate(options).warn()
    assert "the certificate has expired" in caplog.text
    assert warning(options, time.time()) in caplog.text
