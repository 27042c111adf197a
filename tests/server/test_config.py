import logging
import re
import ssl
from pathlib import Path
from typing import Any

import pytest

from zeolith.protocol.addresses import DEFAULT_HOST, DEFAULT_PORT, Address
from zeolith.server.config import (
    ConfigError,
    Options,
    quick_options,
    read_file,
    refuse_exposed,
)
from zeolith.server.tls import Certificate, TlsOptions
from zeolith.storage.adapted import AdaptedStorage
from zeolith.storage.filestore import FileStore
from zeolith.storage.opening import OpeningError

from ..support.certificates import Authority, encrypted

FILESTORAGE = "<filestorage 1>\n  path {path}\n</filestorage>\n"


@pytest.fixture
def conf(tmp_path: Path) -> Any:
    path = tmp_path / "server.conf"

    def write(text: str) -> str:
        path.write_text(text.replace("{path}", str(tmp_path / "Data.fs")))
        return str(path)

    return write


def test_everything_may_be_said(conf):
    options = read_file(
        conf(
            """\
            <zeolith>
              address 127.0.0.1:8101
              address localhost:8102
              address /run/zeolith.sock
              insecure true
              socket-mode 0660
              read-only true
              transaction-timeout 2m
              shutdown-timeout 5s
              index-interval 1h
              replay-bytes 64MB
              log-level warning
            </zeolith>
            <filestorage main>
              path {path}
            </filestorage>
            <mappingstorage>
            </mappingstorage>
            """
        )
    )
    assert options.addresses == [
        ("127.0.0.1", 8101),
        ("localhost", 8102),
        "/run/zeolith.sock",
    ]
    assert options.is_insecure
    assert options.socket_mode == 0o660
    assert options.is_read_only
    assert options.transaction_timeout_s == 120
    assert options.shutdown_timeout_s == 5
    assert options.index_interval_s == 3600
    assert options.replay_bytes == 64 * 1024**2
    assert options.log_level == logging.WARNING
    assert list(options.storages) == ["main", "1"]


@pytest.mark.parametrize("section", ["", "<zeolith>\n</zeolith>\n"])
def test_what_is_not_said_has_a_default(conf, section):
    options = read_file(conf(section + FILESTORAGE))
    assert options.addresses == [(DEFAULT_HOST, DEFAULT_PORT)]
    assert not options.is_read_only
    assert not options.is_insecure
    assert options.socket_mode == Options([], {}).socket_mode == 0o600
    assert options.shutdown_timeout_s == 10
    assert options.index_interval_s == Options([], {}).index_interval_s == 600
    assert options.replay_bytes == Options([], {}).replay_bytes == 256 * 1024**2
    assert options.log_level == logging.INFO


@pytest.mark.parametrize("section", ["", "<zeolith>\n</zeolith>\n"])
def test_a_transaction_has_a_time_limit_unless_told_otherwise(conf, section):
    """A client that hangs between vote and finish would stop all the others."""
    options = read_file(conf(section + FILESTORAGE))
    assert options.transaction_timeout_s == 30
    assert Options([], {}).transaction_timeout_s == 30
    assert quick_options([], "Data.fs", None).transaction_timeout_s == 30


def test_reading_the_file_opens_nothing(conf, tmp_path):
    options = read_file(conf(FILESTORAGE))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["server.conf"]
    database = options.storages["1"]()
    assert isinstance(database, FileStore)
    assert database.name == "1"
    database.close()
    assert (tmp_path / "Data.fs").exists()


def test_other_storages_are_adapted(conf):
    options = read_file(conf("<mappingstorage>\n</mappingstorage>\n"))
    database = options.storages["1"]()
    assert type(database) is AdaptedStorage
    database.close()


def test_a_read_only_server_opens_files_read_only(conf, tmp_path):
    section = "<zeolith>\nread-only true\n</zeolith>\n"
    options = read_file(conf(section + FILESTORAGE))
    with pytest.raises(OpeningError, match="is not there to read"):
        options.storages["1"]()
    read_file(conf(FILESTORAGE)).storages["1"]().close()
    database = options.storages["1"]()
    assert database.is_read_only
    database.close()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "server.conf: there is no storage to serve"),
        ("<zeolith>\n</zeolith>\n", "there is no storage to serve"),
        (FILESTORAGE * 2, "server.conf:6: section names must not be re-used"),
        (
            FILESTORAGE + "<mappingstorage>\n</mappingstorage>\n",
            "server.conf: there are two storages with the name '1'",
        ),
        ("<zeolith>\naddress 127.0.0.1:x\n</zeolith>\n", "server.conf:2: "),
        ("<zeolith>\n\ntransaction-timeout -1\n</zeolith>\n", "server.conf:3: "),
        ("<zeolith>\ntransaction-timeout 0\n</zeolith>\n", "no time to wait"),
        ("<zeolith>\nlog-level loud\n</zeolith>\n", "none of debug, info"),
        ("<zeolith>\nsocket-mode rw\n</zeolith>\n", "no mode of a file"),
        ("<zeolith>\nsocket-mode 10000\n</zeolith>\n", "no mode of a file"),
        ("<zeolith>\nread-only perhaps\n</zeolith>\n", "server.conf:2: "),
        ("<zeolith>\nport 8100\n</zeolith>\n", "'port'"),
        ("<zeolith>\n", "server.conf:"),
        ("<filestorage>\n</filestorage>\n", "server.conf:2: "),
        ("<nosuchstorage>\n</nosuchstorage>\n", "nosuchstorage"),
        ("<zeolith>\n</zeolith>\n" * 2 + FILESTORAGE, "server.conf:"),
        ("%import zeolith.nowhere\n", "nowhere"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_and_where(conf, text, complaint):
    with pytest.raises(ConfigError) as raised:
        read_file(conf(text))
    said = str(raised.value)
    assert complaint in said
    assert "server.conf" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("is_insecure", "has_tls", "has_login", "is_refused"),
    [
        (False, False, False, True),
        (False, True, False, True),
        (False, True, True, False),
        (True, False, False, False),
    ],
)
def test_strangers_are_kept_away_unless_something_protects(
    tmp_path, is_insecure, has_tls, has_login, is_refused
):
    authority = Authority(tmp_path)
    files = TlsOptions(
        authority.sign().both,
        client_ca=authority.ca,
        requires_client_certificate=has_login,
    )
    addresses: list[Address] = [("127.0.0.1", 1), ("0.0.0.0", 2)]
    tls = Certificate(files) if has_tls else None
    options = Options(addresses, {}, is_insecure=is_insecure, tls=tls)
    assert options.may_be_exposed is not is_refused
    if is_refused:
        with pytest.raises(ConfigError, match=r"^0\.0\.0\.0:2: "):
            refuse_exposed(options)
    else:
        refuse_exposed(options)


def test_a_file_that_is_not_there_is_a_mistake_too(tmp_path):
    with pytest.raises(ConfigError) as raised:
        read_file(str(tmp_path / "absent.conf"))
    assert "absent.conf" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(ConfigError):
        read_file(str(tmp_path))


def test_the_quick_form_serves_one_file(tmp_path):
    options = quick_options([], str(tmp_path / "Data.fs"), None)
    assert options.addresses == [(DEFAULT_HOST, DEFAULT_PORT)]
    assert list(options.storages) == ["1"]
    database = options.storages["1"]()
    assert isinstance(database, FileStore)
    database.close()
    assert quick_options(["/run/x"], "Data.fs", None).addresses == ["/run/x"]


# TLS


def test_without_a_certificate_tcp_is_plain(conf):
    assert read_file(conf(f"<zeolith>\n</zeolith>\n{FILESTORAGE}")).tls is None


def test_everything_may_be_said_of_a_certificate(conf, tmp_path):
    authority = Authority(tmp_path)
    signed = authority.sign()
    tls = f"""\
    certificate {signed.certificate}
    key {signed.key}
    key-password-command echo secret
    client-ca {authority.ca}
    require-client-certificate on
    minimum-version 1.3
    """
    encrypted(signed.key, "secret")
    options = read_file(conf(_with_tls(tls)))
    assert options.tls is not None
    assert options.tls.options == TlsOptions(
        signed.certificate,
        signed.key,
        key_password_command="echo secret",
        client_ca=authority.ca,
        requires_client_certificate=True,
        minimum_version=ssl.TLSVersion.TLSv1_3,
    )


@pytest.mark.parametrize(
    ("tls", "words"),
    [
        ("certificate {server.crt}", "there is no private key in it"),
        ("certificate {no.crt}", "No such file"),
        ("certificate {}", "Is a directory"),
        ("certificate {server.crt}\nkey {other.key}", "does not belong"),
        ("certificate {server.crt}\nkey {locked.key}", "has a password; say where"),
        ("certificate {server.pem}\nclient-ca {server.key}", "no certificate in it"),
        ("certificate {server.pem}\nrequire-client-certificate on", "needs client-ca"),
        ("certificate {server.pem}\nminimum-version 1.1", "'1.1' is none of 1.2, 1.3"),
        ("certificate {server.pem}\npassword secret", "password"),
        ("", "certificate"),
    ],
)
def test_a_mistake_in_a_certificate_is_one_of_the_configuration(
    conf, tmp_path, tls, words
):
    authority = Authority(tmp_path)
    for name in ("server", "other", "locked"):
        authority.sign(file=name)
    encrypted(str(tmp_path / "locked.key"), "secret")
    path = conf(_with_tls(re.sub(r"{(.*)}", rf"{tmp_path}/\1", tls)))
    with pytest.raises(ConfigError) as caught:
        read_file(path)
    said = str(caught.value)
    assert said.startswith(f"{path}:")
    assert words in said
    assert "\n" not in said


def _with_tls(lines: str) -> str:
    return f"<zeolith>\n<tls>\n{lines}\n</tls>\n</zeolith>\n{FILESTORAGE}"
