"""A cache on disk as people use it: warm after a restart, there without a server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transaction
import zodburi
from persistent.mapping import PersistentMapping
from ZODB.config import databaseFromString
from ZODB.DB import DB

from zeolith.client import ClientStorage
from zeolith.client.errors import ClientDisconnected

from ..support.serving import ServerProcess
from ..support.waiting import wait_until

NAMES = [f"object-{number}" for number in range(50)]


def opened(server: ServerProcess, **options: Any) -> Any:
    cache = str(server.directory / "cache")
    return DB(ClientStorage(server.address, cache=cache, **options))


def filled(server: ServerProcess) -> None:
    db = opened(server)
    with db.transaction() as connection:
        for name in NAMES:
            connection.root()[name] = PersistentMapping(text=name)
    with db.transaction() as connection:
        seen(connection)
    db.close()


def seen(connection: Any) -> list[str]:
    root = connection.root()
    return [root[name]["text"] for name in NAMES]


def loads(server: ServerProcess) -> int:
    with_own_cache = ClientStorage(server.address)
    status = with_own_cache.server_status()["storages"]["1"]
    count: int = status["counters"]["loads"]
    with_own_cache.close()
    return count


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path) as server:
        filled(server)
        yield server


def test_a_process_that_comes_back_asks_for_nothing_that_has_not_changed(server):
    before = loads(server)
    db = opened(server)
    with db.transaction() as connection:
        assert seen(connection) == NAMES
    assert loads(server) == before
    db.close()


def test_what_changed_meanwhile_is_seen_and_only_that_is_loaded(server):
    with DB(ClientStorage(server.address)).transaction() as connection:
        connection.root()[NAMES[7]]["text"] = "changed"
    before = loads(server)
    db = opened(server, read_ahead=False)
    with db.transaction() as connection:
        assert [name for name in NAMES if name not in seen(connection)] == [NAMES[7]]
        assert connection.root()[NAMES[7]]["text"] == "changed"
    assert loads(server) - before <= 2
    db.close()


def test_without_a_server_a_new_process_reads_what_is_cached(server):
    server.terminate()
    db = opened(server, wait=False, wait_timeout=0.1)
    with db.transaction() as connection:
        assert seen(connection) == NAMES
    connection = db.open()
    connection.root()["new"] = 1
    with pytest.raises(ClientDisconnected, match="Connection refused"):
        transaction.commit()
    transaction.abort()
    server.start()
    wait_until(db.storage.is_connected, "the server")
    connection.root()["new"] = 2
    transaction.commit()
    connection.close()
    db.close()


def test_a_configuration_and_a_uri_name_the_same_cache(server):
    host, port = server.address
    cache = server.directory / "cache"
    section = f"<zeolith>\nserver {host}:{port}\ncache-path {cache}\n</zeolith>"
    text = f"%import zeolith.client\n<zodb>\n{section}\n</zodb>"
    factory, _keywords = zodburi.resolve_uri(f"zeolith://{host}:{port}?cache={cache}")
    before = loads(server)
    for db in (databaseFromString(text), DB(factory())):
        with db.transaction() as connection:
            assert seen(connection) == NAMES
        db.close()
    assert loads(server) == before
