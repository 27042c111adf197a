"""One server, several storages of every kind, each with its own options."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import transaction
from persistent.mapping import PersistentMapping
from zc.zlibstorage import ZlibStorage
from ZODB.FileStorage.FileStorage import FileStorageQuotaError
from ZODB.POSException import ConflictError, ReadOnlyError

from zeolith.client import DB
from zeolith.client.errors import ClientDisconnected
from zeolith.client.storage import ClientStorage

from ..support.banking import run_module
from ..support.gates import Background
from ..support.records import commit, seen
from ..support.serving import ServerProcess

SECTIONS = """\
%import zc.zlibstorage
%import zc.beforestorage

<filestorage main>
  path main.fs
</filestorage>
<filestorage log>
  path log.fs
  pack-gc false
  quota 20KB
</filestorage>
<filestorage archive>
  path archive.fs
  read-only true
</filestorage>
<zlibstorage small>
  <filestorage>
    path small.fs
  </filestorage>
</zlibstorage>
<serverzlibstorage smaller>
  <filestorage>
    path smaller.fs
  </filestorage>
</serverzlibstorage>
<mappingstorage scratch/>
<demostorage demo>
  <filestorage base>
    path archive.fs
    read-only true
  </filestorage>
  <filestorage changes>
    path demo.fs
  </filestorage>
</demostorage>
<before past>
  before 1990-01-01
  <filestorage>
    path archive.fs
    read-only true
  </filestorage>
</before>
"""
LARGE = b"x" * 10_000


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[ServerProcess]:
    folder: Path = tmp_path_factory.mktemp("several")
    making = run_module("bank", "make", str(folder / "archive.fs"), "10", "w")
    making.communicate()
    assert making.returncode == 0
    with ServerProcess(folder, storages=SECTIONS) as server:
        yield server
        server.terminate()
        assert "Traceback" not in server.stderr_text()


@pytest.fixture
def opened(server: ServerProcess) -> Iterator[Any]:
    with ExitStack() as stack:

        def open_storage(name: str, **options: Any) -> ClientStorage:
            storage = ClientStorage(server.address, storage=name, **options)
            stack.callback(storage.close)
            return storage

        yield open_storage


@pytest.fixture
def databases(server: ServerProcess) -> Iterator[Any]:
    """Makes multi-databases of `main` and `log`, each as a process of its own has."""
    with ExitStack() as stack:

        def open_databases() -> dict[str, Any]:
            together: dict[str, Any] = {}
            for name in ("main", "small"):
                db = DB(
                    server.address,
                    storage=name,
                    database_name=name,
                    databases=together,
                    server_sync=True,
                )
                stack.callback(db.close)
            return together

        yield open_databases


def test_each_storage_is_another_database(opened):
    names = ("main", "log", "small", "smaller", "scratch", "demo")
    assert len({opened(name).sortKey() for name in names}) == len(names)


@pytest.mark.parametrize("name", ["main", "log", "small", "scratch", "demo"])
def test_what_is_written_to_one_is_in_no_other(opened, name):
    commit(opened(name), x=name.encode())
    assert seen(opened(name), "x") == name.encode()


@pytest.mark.parametrize("name", ["archive", "past"])
def test_one_may_be_read_only(opened, name):
    with pytest.raises(ClientDisconnected, match="read-only"):
        opened(name)
    storage = opened(name, read_only=True)
    with pytest.raises(ReadOnlyError):
        commit(storage, x=b"1")
    commit(opened("main"), y=b"1")


def test_one_may_have_a_quota(opened):
    log, main = opened("log"), opened("main")
    for _ in range(3):
        commit(log, z=LARGE)
    with pytest.raises(FileStorageQuotaError):
        commit(log, z=LARGE)
    for _ in range(4):
        commit(main, z=LARGE)


def test_a_demostorage_has_its_base_and_its_changes(server, opened):
    db = DB(server.address, storage="demo")
    with db.transaction() as connection:
        root = connection.root()
        assert sum(root["accounts"].values()) > 0
        root["changed"] = 1
    db.close()
    archive = opened("archive", read_only=True)
    demo = opened("demo")
    assert archive.getTid(bytes(8)) < demo.getTid(bytes(8))


def test_the_past_is_empty(opened):
    assert opened("past", read_only=True).lastTransaction() < b"\x03" + bytes(7)


def test_compressed_records_are_small_in_the_file_and_at_the_client(server, opened):
    for name in ("small", "smaller"):
        storage = opened(name)
        wrapper = storage if name == "small" else ZlibStorage(storage)
        commit(wrapper, x=LARGE)
        assert seen(wrapper, "x") == LARGE
        assert (server.directory / f"{name}.fs").stat().st_size < len(LARGE)
    assert len(seen(opened("smaller"), "x")) < 100


# Multi-databases


def test_an_object_may_refer_to_one_in_another_storage(databases):
    here, there = databases(), databases()
    with here["main"].transaction() as connection:
        thing = PersistentMapping(n=1)
        connection.get_connection("small").root()["thing"] = thing
        connection.get_connection("small").add(thing)
        connection.root()["thing"] = thing
    with there["main"].transaction() as connection:
        thing = connection.root()["thing"]
        assert thing["n"] == 1
        assert thing._p_jar.db() is there["small"]
        thing["n"] = 2
    with here["small"].transaction() as connection:
        assert connection.root()["thing"]["n"] == 2


def roots(databases: dict[str, Any], manager: Any) -> list[Any]:
    main = databases["main"].open(manager)
    return [main.root(), main.get_connection("small").root()]


def test_if_the_second_one_fails_at_the_vote_nothing_is_in_the_first(databases):
    here, there = databases(), databases()
    manager = transaction.TransactionManager(explicit=True)
    # Whoever is last in the order votes last.
    second = max(("main", "small"), key=lambda name: here[name].storage.sortKey())
    first = {"main": "small", "small": "main"}[second]
    for each in ("main", "small"):
        with here[each].transaction() as connection:
            connection.root()["both"] = 0
    manager.begin()
    for root in roots(here, manager):
        root["both"] = 1
    with there[second].transaction() as connection:
        connection.root()["both"] = 2
    with pytest.raises(ConflictError):
        manager.commit()
    manager.abort()
    with there[first].transaction() as connection:
        assert connection.root()["both"] == 0
        # Nobody holds the first one's turn.
        connection.root()["both"] = 3
    for each in ("main", "small"):
        for connection in tuple(here[each].pool.all):
            if connection.opened:
                connection.close()


def test_transactions_over_both_do_not_wait_for_each_other_for_ever(databases):
    """Every process votes in the same order, in whatever order it has changed them."""

    def work(number: int) -> None:
        manager = transaction.TransactionManager(explicit=True)
        mine = databases()
        left = 10
        manager.begin()
        both = roots(mine, manager)
        manager.abort()
        while left:
            manager.begin()
            for root in both if number % 2 else reversed(both):
                root[f"worker {number}"] = left
            try:
                manager.commit()
            except ConflictError:
                manager.abort()
            else:
                left -= 1
        both[0]._p_jar.close()

    workers = [Background(work, number) for number in range(4)]
    for worker in workers:
        worker.result()
    with databases()["main"].transaction() as connection:
        main = dict(connection.root())
        small = dict(connection.get_connection("small").root())
    for number in range(4):
        assert main[f"worker {number}"] == small[f"worker {number}"] == 1
