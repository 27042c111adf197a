"""The sections <zeolith> and <upstream> of a ZODB configuration."""

import inspect
from xml.etree import ElementTree

import pytest
import ZConfig
from ZODB.config import databaseFromString, storageFromString
from ZODB.MappingStorage import MappingStorage

from zeolith.client import config
from zeolith.client.config import NOT_IN_CONFIG
from zeolith.client.storage import ClientStorage
from zeolith.protocol.durations import parse_seconds

from ..support.serving import ServerProcess

EVERY_KEY = """
server 127.0.0.1:8100
server [::1]:8200
server /run/zeolith.sock
storage main
name shop
wait off
wait-timeout 1.5
read-only on
read-only-fallback on
cache-size 5MB
cache-path cache
warm-up on
client web
var /var/cache
cache-trace cache.trace
client-label web-1
server-sync on
read-ahead off
blob-dir blobs
shared-blob-dir on
blob-cache-size 1GB
blob-cache-size-check 20
username ann
password secret
tls on
tls-ca ca.pem
tls-certificate web.crt
tls-key web.key
tls-key-password-file web.password
tls-server-name db
tls-verify off
password-file /run/secrets/password
token-file /run/secrets/token
"""
EVERY_ARGUMENT = {
    "addr": [("127.0.0.1", 8100), ("::1", 8200), "/run/zeolith.sock"],
    "storage": "main",
    "name": "shop",
    "wait": False,
    "wait_timeout": 1.5,
    "read_only": True,
    "read_only_fallback": True,
    "cache_size": 5 * 1024**2,
    "cache": "cache",
    "warm_up": True,
    "client": "web",
    "var": "/var/cache",
    "cache_trace": "cache.trace",
    "client_label": "web-1",
    "server_sync": True,
    "read_ahead": False,
    "blob_dir": "blobs",
    "shared_blob_dir": True,
    "blob_cache_size": 1024**3,
    "blob_cache_size_check": 20,
    "username": "ann",
    "password": "secret",
    "tls": True,
    "tls_ca": "ca.pem",
    "tls_certificate": "web.crt",
    "tls_key": "web.key",
    "tls_key_password_file": "web.password",
    "tls_server_name": "db",
    "tls_verify": False,
    "password_file": "/run/secrets/password",
    "token_file": "/run/secrets/token",
}


def constructor() -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(ClientStorage).parameters)


def section(keys: str) -> str:
    return f"%import zeolith.client\n<zeolith>\n{keys}\n</zeolith>\n"


@pytest.fixture
def opened(monkeypatch) -> list[dict[str, object]]:
    """The arguments of each ClientStorage that a test opens; none is a real one."""
    arguments: list[dict[str, object]] = []

    def stand_in(**options):
        arguments.append(options)
        return MappingStorage()

    monkeypatch.setattr(config, "ClientStorage", stand_in)
    return arguments


def test_every_key_becomes_its_argument(opened):
    storageFromString(section(EVERY_KEY))
    assert opened == [EVERY_ARGUMENT]


def test_an_upstream_is_the_same_by_another_name(opened):
    storageFromString(
        f"%import zeolith.client.upstream\n<upstream main>\n{EVERY_KEY}\n</upstream>"
    )
    assert opened == [EVERY_ARGUMENT]


def test_both_names_may_stand_in_one_file(opened):
    storageFromString(
        "%import zeolith.client\n%import zeolith.client.upstream\n"
        "<demostorage>\n<upstream base>\nserver 8100\n</upstream>\n"
        "<zeolith changes>\nserver 8200\n</zeolith>\n</demostorage>\n"
    ).close()
    assert [each["addr"] for each in opened] == [
        [("127.0.0.1", 8100)],
        [("127.0.0.1", 8200)],
    ]


def test_every_argument_has_a_key_or_a_reason_to_have_none():
    assert set(EVERY_ARGUMENT) | set(NOT_IN_CONFIG) == set(constructor())
    assert not set(EVERY_ARGUMENT) & set(NOT_IN_CONFIG)
    assert all(NOT_IN_CONFIG.values())


def test_what_is_not_written_is_as_the_constructor_has_it(opened):
    storageFromString(section("server 8100"))
    (arguments,) = opened
    assert arguments.pop("addr") == [("127.0.0.1", 8100)]
    assert "cache" not in arguments
    for name, value in arguments.items():
        assert value == constructor()[name].default, name


def test_every_key_has_a_description():
    assert config.__file__
    tree = ElementTree.parse(config.__file__.replace("config.py", "keys.xml"))
    (section_type,) = tree.iter("sectiontype")
    for key in [*section_type.iter("key"), *section_type.iter("multikey")]:
        description = key.find("description")
        assert description is not None, key.get("name")
        assert (description.text or "").strip()


def test_it_is_a_storage_of_a_database(opened):
    db = databaseFromString(
        "%import zeolith.client\n"
        "<zodb shop>\n<zeolith>\nserver 8100\n</zeolith>\n</zodb>\n"
    )
    assert db.database_name == "shop"
    db.close()


def test_it_stands_in_another_storage(opened):
    storage = storageFromString(
        "%import zeolith.client\n"
        "<demostorage>\n<zeolith changes>\nserver 8100\n</zeolith>\n</demostorage>\n"
    )
    assert len(opened) == 1
    storage.close()


@pytest.mark.parametrize(
    ("keys", "line", "complaint"),
    [
        ("server here:there", 3, "'there' is no port"),
        ("server 8100\nwait-timeout soon", 4, "'soon' is not a time to wait"),
        ("server 8100\ncache-size 20 apples", 4, "apples"),
        ("server 8100\nread-only perhaps", 4, "perhaps"),
        ("server 8100\nsever 8100", 4, "sever"),
        ("storage main", 4, "server"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_its_place(keys, line, complaint):
    with pytest.raises(ZConfig.ConfigurationError) as caught:
        storageFromString(section(keys))
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.lineno == line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30", 30),
        ("0", 0),
        ("0.5", 0.5),
        ("30s", 30),
        ("2m", 120),
        ("1.5h", 5400),
        ("1h 30m", 5400),
        ("1m 30", 90),
    ],
)
def test_a_time_is_seconds_or_has_a_unit(text, expected):
    assert parse_seconds(text) == expected


@pytest.mark.parametrize("text", ["", " ", "-1", "soon", "3 apples", "inf", "nan"])
def test_what_is_no_time_is_refused_by_its_text(text):
    with pytest.raises(ValueError, match=f"^{text!r} is not a time to wait"):
        parse_seconds(text)


def test_a_database_from_a_file_is_the_servers(tmp_path):
    with ServerProcess(tmp_path) as server:
        host, port = server.address
        storage = storageFromString(section(f"server {host}:{port}\nname shop"))
        try:
            assert isinstance(storage, ClientStorage)
            assert storage.is_connected()
            assert storage.getName().startswith("shop")
        finally:
            storage.close()


def test_a_user_without_a_password_is_said_when_it_is_asked_for(monkeypatch):
    monkeypatch.delenv("ZEOLITH_PASSWORD", raising=False)
    with pytest.raises(ValueError, match="there is no password for ann"):
        storageFromString(section("server 8100\nusername ann"))
