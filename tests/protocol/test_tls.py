"""Files that become a context, and errors that say what to do."""

import logging
import socket
import ssl
from pathlib import Path

import pytest

from zeolith.protocol.tls import (
    ClientTls,
    HandshakeFailed,
    TlsFiles,
    TlsMistake,
    client_context,
    client_tls,
    explained,
    first_line,
    load_chain,
    trust,
)

from ..support.certificates import Authority, encrypted, rejection


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def load(certificate: str, key: str | None = None, password: str | None = None) -> None:
    load_chain(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), certificate, key, password)


# The files of a certificate


def test_certificate_and_key_are_in_one_file_or_in_two(authority):
    signed = authority.sign()
    load(signed.both)
    load(signed.certificate, signed.key)


def test_a_file_that_cannot_be_read_is_named_with_the_reason(authority, tmp_path):
    signed = authority.sign()
    for certificate, key in ((str(tmp_path / "no"), None), (signed.both, "/no")):
        with pytest.raises(TlsMistake, match=r"/no: No such file or directory"):
            load(certificate, key)


def test_a_missing_key_is_a_mistake(authority):
    signed = authority.sign()
    with pytest.raises(TlsMistake, match=r"server\.crt: there is no private key in it"):
        load(signed.certificate)


def test_a_missing_certificate_is_a_mistake(authority):
    signed = authority.sign()
    with pytest.raises(TlsMistake, match=r"server\.key: there is no certificate in it"):
        load(signed.key)


def test_the_key_of_another_certificate_is_a_mistake(authority):
    signed, other = authority.sign(), authority.sign(file="other")
    with pytest.raises(TlsMistake, match=r"other\.key: .* does not belong to the cert"):
        load(signed.certificate, other.key)


def test_a_damaged_key_is_a_mistake(authority):
    signed = authority.sign()
    lines = Path(signed.key).read_text().splitlines()
    Path(signed.key).write_text("\n".join([lines[0], "garbage", lines[-1]]))
    with pytest.raises(TlsMistake, match="damaged"):
        load(signed.certificate, signed.key)


def test_the_password_of_a_key_is_asked_of_nobody(authority):
    signed = authority.sign()
    encrypted(signed.key, "secret")
    load(signed.certificate, signed.key, "secret")
    with pytest.raises(TlsMistake, match="the password does not open the private key"):
        load(signed.certificate, signed.key, "wrong")
    with pytest.raises(TlsMistake, match="the private key has a password"):
        load(signed.certificate, signed.key)


def test_a_password_is_the_first_line_of_its_file(tmp_path):
    path = tmp_path / "password"
    path.write_text("secret\nand a remark\n")
    assert first_line(str(path)) == "secret"
    for text in ("", "\nsecret"):
        path.write_text(text)
        with pytest.raises(TlsMistake, match="there is no password"):
            first_line(str(path))


def test_an_authority_is_a_file_or_a_directory(authority, tmp_path):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trust(context, authority.ca)
    assert context.cert_store_stats()["x509_ca"] == 1
    trust(context, str(tmp_path))
    empty = tmp_path / "empty"
    empty.write_text("")
    with pytest.raises(TlsMistake, match="empty: there is no certificate in it"):
        trust(context, str(empty))


def test_a_certificate_that_was_revoked_is_not_trusted(authority):
    other, revoked = authority.sign(file="other"), authority.sign()
    client = ClientTls(client_context(authority.revoke(other)))
    with pytest.raises(AssertionError, match="has not failed"):
        rejection(client, revoked)
    client = ClientTls(client_context(authority.revoke(revoked)))
    with pytest.raises(HandshakeFailed, match="certificate was revoked by"):
        raise explained(rejection(client, revoked))


def test_a_list_of_the_revoked_that_is_old_is_none(authority):
    server = authority.sign()
    client = ClientTls(client_context(authority.revoke(is_old=True)))
    with pytest.raises(HandshakeFailed, match=r"renew the list \(CRL\) in tls_ca"):
        raise explained(rejection(client, server))


def test_a_directory_with_lists_of_the_revoked_is_asked_for_one(authority, tmp_path):
    folder = tmp_path / "authorities"
    folder.mkdir()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trust(context, str(folder))
    assert not context.verify_flags & ssl.VERIFY_CRL_CHECK_LEAF
    (folder / "0a1b2c3d.r0").write_text("")
    trust(context, str(folder))
    assert context.verify_flags & ssl.VERIFY_CRL_CHECK_LEAF


# The context of a client


def test_a_client_verifies_by_default(authority):
    context = client_context()
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_an_authority_stands_in_the_place_of_the_systems(authority, monkeypatch):
    def load_default_certs(_context: ssl.SSLContext, *_args: object) -> None:
        pytest.fail("the system's authorities are trusted, too")

    monkeypatch.setattr(ssl.SSLContext, "load_default_certs", load_default_certs)
    assert client_context(authority.ca).cert_store_stats()["x509_ca"] == 1


def test_a_client_that_verifies_nothing_has_to_be_asked_for(authority):
    context = client_context(verifies=False)
    assert context.verify_mode == ssl.CERT_NONE
    assert not context.check_hostname


def test_a_key_without_its_certificate_is_a_mistake(authority):
    with pytest.raises(TlsMistake, match="of no use without its certificate"):
        client_context(key=authority.sign().key)


def test_the_password_of_a_clients_key_comes_from_a_file(authority, tmp_path):
    signed = authority.sign()
    encrypted(signed.key, "secret")
    path = tmp_path / "password"
    path.write_text("secret")
    client_context(authority.ca, signed.certificate, signed.key, str(path))


# What is about TLS


def test_without_a_word_about_it_nothing_is_encrypted():
    assert client_tls() is None
    assert client_tls(wanted=False) is None


def test_each_word_about_it_is_enough(authority):
    context = ssl.create_default_context()
    assert client_tls(wanted=True) is not None
    assert client_tls(files=TlsFiles(authority.ca)) is not None
    assert client_tls(server_name="db") is not None
    assert client_tls(verifies=False) is not None
    made = client_tls(context)
    assert made is not None
    assert made.context is context


def test_the_name_of_the_server_goes_with_a_context_of_the_programs():
    made = client_tls(ssl.create_default_context(), server_name="db")
    assert made is not None
    assert made.server_name == "db"
    with socket.socket() as sock, made.wrap(sock, "127.0.0.1") as wrapped:
        assert wrapped.server_hostname == "db"


def test_the_host_of_the_address_is_the_name_of_the_server_if_nothing_else_is_said():
    made = client_tls(ssl.create_default_context())
    assert made is not None
    with socket.socket() as sock, made.wrap(sock, "db.test") as wrapped:
        assert wrapped.server_hostname == "db.test"


def test_what_contradicts_itself_is_refused(authority):
    context = ssl.create_default_context()
    with pytest.raises(ValueError, match="tls is off, so tls_ca means nothing"):
        client_tls(wanted=False, files=TlsFiles(authority.ca))
    with pytest.raises(ValueError, match="tls is off, so ssl means nothing"):
        client_tls(context, False)
    with pytest.raises(ValueError, match="tls is off, so tls_server_name"):
        client_tls(wanted=False, server_name="db")
    with pytest.raises(ValueError, match="with ssl, tls_ca is a matter of that"):
        client_tls(context, files=TlsFiles(authority.ca))
    with pytest.raises(ValueError, match="with ssl, tls_verify"):
        client_tls(context, verifies=False)


@pytest.mark.parametrize("name", ["", ".example.org", "x" * 64])
def test_what_is_no_name_of_a_server_is_refused(name):
    with pytest.raises(TlsMistake, match="is no name of a server"):
        client_tls(wanted=True, server_name=name)


def test_what_is_no_context_is_refused():
    with pytest.raises(TypeError, match=r"ssl is an ssl\.SSLContext, and not True"):
        client_tls(True)  # type: ignore[arg-type]


def test_to_verify_nothing_is_said_loudly(caplog):
    with caplog.at_level(logging.WARNING):
        client_tls(verifies=False)
    assert "can read and change everything" in caplog.text


# What an error of a handshake means


def test_each_way_to_fail_says_what_to_do(authority, tmp_path):
    """The errors are OpenSSL's, of handshakes that fail in memory."""
    server = authority.sign()
    cases = {
        "name the authority that signed it with tls_ca": {
            "client": Authority(tmp_path, "other").trusting()
        },
        "the right server, say the name in the certificate": {
            "client": authority.trusting(),
            "name": "db.example.org",
        },
        "the server's certificate has expired": {
            "client": authority.trusting(),
            "server": authority.expired(),
        },
        "is not valid yet": {
            "client": authority.trusting(),
            "server": authority.not_yet_valid(),
        },
        "wants a certificate of its clients: give tls_certificate": {
            "client": authority.trusting(),
            "wants": authority,
        },
        "does not accept this client's certificate": {
            "client": authority.trusting(server.both),
            "wants": Authority(tmp_path, "another"),
        },
        "no version of TLS in common": {
            "client": authority.trusting(),
            "version": ssl.TLSVersion.TLSv1_3,
        },
        "speaks no TLS: connect without": {
            "client": authority.trusting(),
            "answer": b"HTTP/1.1 400 Bad Request\r\n\r\n",
        },
    }
    for text, case in cases.items():
        error = rejection(**{"server": server, **case})
        with pytest.raises(HandshakeFailed, match=text) as caught:
            raise explained(error) from error
        assert "\n" not in str(caught.value)
        assert caught.value.__cause__ is error


def test_a_connection_that_ends_may_be_tried_again():
    for error in (ssl.SSLEOFError(8, "EOF"), ssl.SSLZeroReturnError(6, "closed")):
        with pytest.raises(ConnectionResetError, match="in the TLS handshake"):
            raise explained(error) from error


def test_an_error_that_nobody_knows_keeps_its_name():
    with pytest.raises(HandshakeFailed, match=r"the TLS handshake failed: .*odd"):
        raise explained(ssl.SSLError(1, "odd"))
