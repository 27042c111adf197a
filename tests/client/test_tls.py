"""Which arguments mean TLS, and which contradict each other."""

import logging
import ssl

import pytest

from zeolith.client.tls import TlsFiles, client_tls

from ..support.certificates import Authority


@pytest.fixture
def files(tmp_path) -> TlsFiles:
    return TlsFiles(Authority(tmp_path).ca)


def test_without_a_word_about_it_nothing_is_encrypted():
    assert client_tls() is None
    assert client_tls(wanted=False) is None


def test_each_word_about_it_is_enough(files):
    context = ssl.create_default_context()
    assert client_tls(wanted=True) is not None
    assert client_tls(files=files) is not None
    assert client_tls(server_name="db") is not None
    assert client_tls(verifies=False) is not None
    made = client_tls(context)
    assert made is not None
    assert made.context is context


def test_the_name_of_the_server_goes_with_a_context_of_the_programs():
    made = client_tls(ssl.create_default_context(), server_name="db")
    assert made is not None
    assert made.server_name == "db"


def test_what_contradicts_itself_is_refused(files):
    context = ssl.create_default_context()
    with pytest.raises(ValueError, match="tls is off, so tls_ca means nothing"):
        client_tls(wanted=False, files=files)
    with pytest.raises(ValueError, match="tls is off, so ssl means nothing"):
        client_tls(context, False)
    with pytest.raises(ValueError, match="tls is off, so tls_server_name"):
        client_tls(wanted=False, server_name="db")
    with pytest.raises(ValueError, match="with ssl, tls_ca is a matter of that"):
        client_tls(context, files=files)
    with pytest.raises(ValueError, match="with ssl, tls_verify"):
        client_tls(context, verifies=False)


def test_what_is_no_context_is_refused():
    with pytest.raises(TypeError, match=r"ssl is an ssl\.SSLContext, and not True"):
        client_tls(True)  # type: ignore[arg-type]


def test_to_verify_nothing_is_said_loudly(caplog):
    with caplog.at_level(logging.WARNING):
        client_tls(verifies=False)
    assert "can read and change everything" in caplog.text
