"""The URI zeolith://, by itself and through zodburi."""

import inspect

import pytest
import zodburi
from ZODB.DB import DB

from zeolith.client import uri
from zeolith.client.storage import ClientStorage
from zeolith.client.uri import NOT_IN_URI, PARAMETERS, resolver

from ..support.serving import ServerProcess

EVERY_PARAMETER = {
    "storage=main": "main",
    "cache=%2Fvar%2Fcache%2Fshop": "/var/cache/shop",
    "cache_size=100MB": 100 * 1024**2,
    "warm_up=on": True,
    "client=web": "web",
    "var=%2Fvar%2Fcache": "/var/cache",
    "cache_trace=%2Ftmp%2Fshop.trace": "/tmp/shop.trace",
    "name=shop": "shop",
    "wait=off": False,
    "wait_timeout=1.5": 1.5,
    "read_only=true": True,
    "read_only_fallback=1": True,
    "blob_dir=blobs": "blobs",
    "shared_blob_dir=yes": True,
    "blob_cache_size=1gb": 1024**3,
    "blob_cache_size_check=20": 20,
    "client_label=web+1": "web 1",
    "server_sync=on": True,
    "read_ahead=off": False,
    "username=ann": "ann",
    "tls=on": True,
    "tls_ca=%2Fetc%2Fca.pem": "/etc/ca.pem",
    "tls_certificate=web.crt": "web.crt",
    "tls_key=web.key": "web.key",
    "tls_key_password_file=web.password": "web.password",
    "tls_server_name=db": "db",
    "tls_verify=off": False,
    "password_file=/run/secrets/password": "/run/secrets/password",
    "token_file=/run/secrets/token": "/run/secrets/token",
}


@pytest.fixture(autouse=True)
def _stand_in(request, monkeypatch):
    """ClientStorage(...) gives back its arguments, but where a server is served."""
    if "served" not in request.fixturenames:
        monkeypatch.setattr(
            uri, "ClientStorage", lambda addr, **rest: {"addr": addr, **rest}
        )


@pytest.fixture
def served(tmp_path):
    with ServerProcess(tmp_path) as server:
        yield "{}:{}".format(*server.address)


def arguments_of(text: str) -> dict[str, object]:
    factory, database_keywords = resolver(text)
    assert database_keywords == {}
    return factory()


@pytest.mark.parametrize(
    ("text", "addr"),
    [
        ("zeolith://db.example.org:8200", ("db.example.org", 8200)),
        ("zeolith://db.example.org:8200/", ("db.example.org", 8200)),
        ("zeolith://db.example.org", ("db.example.org", 8100)),
        ("zeolith://:8200", ("127.0.0.1", 8200)),
        ("zeolith://[::1]:8200", ("::1", 8200)),
        ("zeolith://a:1,b:2", [("a", 1), ("b", 2)]),
        ("zeolith://a,[::1]:2,c:3/", [("a", 8100), ("::1", 2), ("c", 3)]),
        ("zeolith:///run/zeolith.sock", "/run/zeolith.sock"),
        ("zeolith:///run/what%3F/a%23b%20c.sock", "/run/what?/a#b c.sock"),
    ],
)
def test_what_stands_before_the_question_mark_is_the_address(text, addr):
    assert arguments_of(text) == {"addr": addr}
    assert arguments_of(f"{text}?storage=main") == {"addr": addr, "storage": "main"}


@pytest.mark.parametrize("parameter", EVERY_PARAMETER)
def test_a_parameter_becomes_an_argument_of_its_type(parameter):
    name = parameter.partition("=")[0]
    arguments = arguments_of(f"zeolith://db?{parameter}")
    assert arguments[name] == EVERY_PARAMETER[parameter]
    assert type(arguments[name]) is type(EVERY_PARAMETER[parameter])


def test_every_argument_has_a_parameter_or_a_reason_to_have_none():
    arguments = set(inspect.signature(ClientStorage).parameters)
    assert set(PARAMETERS) | set(NOT_IN_URI) == arguments
    assert not set(PARAMETERS) & set(NOT_IN_URI)
    assert all(NOT_IN_URI.values())
    assert {each.partition("=")[0] for each in EVERY_PARAMETER} == set(PARAMETERS)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("zeolith://", "without a server"),
        ("zeolith:///", "without a server"),
        ("zeolith://?storage=main", "without a server"),
        ("zeolith://db:port", "'port' is no port"),
        ("zeolith://a,,b", "an address is missing"),
        ("zeolith://db/main", "no path after the servers, as in '/main'"),
        ("zeolith:///run/sock#main", "no fragment"),
        ("zeolith://db?wait=perhaps", "wait is wrong: 'perhaps' is neither on nor"),
        ("zeolith://db?wait_timeout=soon", "wait_timeout is wrong: 'soon' is not a"),
        ("zeolith://db?cache_size=20apples", "cache_size is wrong: '20apples' is no"),
        ("zeolith://db?blob_cache_size_check=x", "'x' is not a whole number"),
        ("zeolith://db?storage=", "an empty storage"),
        ("zeolith://db?storage=1&storage=2", "two values for storage"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_sentence(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        resolver(text)


@pytest.mark.parametrize(
    "text",
    [
        "zeolith://db?username=ann&password=swordfish",
        "zeolith://ann:swordfish@db",
        "zeolith://db?wait=perhaps&password=swordfish",
        "zeolith://db?token=swordfish",
    ],
)
def test_a_password_is_refused_and_not_repeated(text):
    with pytest.raises(ValueError, match=r"password|token") as caught:
        resolver(text)
    assert "swordfish" not in str(caught.value)


def test_zodburi_finds_it_and_keeps_what_is_the_databases():
    factory, keywords = zodburi.resolve_uri(
        "zeolith://db:8200?storage=1&wait_timeout=5&cache_size=100MB"
        "&database_name=main&connection_pool_size=9"
    )
    assert factory() == {
        "addr": ("db", 8200),
        "storage": "1",
        "wait_timeout": 5.0,
        "cache_size": 100 * 1024**2,
    }
    assert keywords["database_name"] == "main"
    assert keywords["pool_size"] == 9


@pytest.mark.parametrize("typo", ["wait_timout", "ssl", "addr", "cache-size"])
def test_zodburi_names_a_parameter_that_nobody_knows(typo):
    with pytest.raises(zodburi.UnknownDatabaseKeywords, match=typo):
        zodburi.resolve_uri(f"zeolith://db?{typo}=5")


def test_a_database_from_a_uri_is_the_servers(served):
    factory, keywords = zodburi.resolve_uri(
        f"zeolith://{served}?client_label=tests&database_name=shop"
    )
    db = DB(factory(), **keywords)
    try:
        assert isinstance(db.storage, ClientStorage)
        assert db.storage.is_connected()
        assert db.database_name == "shop"
    finally:
        db.close()
