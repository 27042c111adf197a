"""A process that forks, and its children."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.utils import p64

from zeolith.client import forks, position
from zeolith.client.storage import ClientStorage

from ..support.gates import Background
from ..support.script import ScriptedServer, tid
from ..support.serving import ServerProcess

A, T1 = p64(1), tid(1)


@pytest.fixture
def storage(server: ScriptedServer) -> Iterator[ClientStorage]:
    storage = ClientStorage(server.address)
    yield storage
    storage.close()


@pytest.fixture
def served(tmp_path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path) as server:
        yield server


FORK = """
import os, sys, transaction
from zeolith.client import DB

address, way, cache, children = sys.argv[1], sys.argv[2], sys.argv[3] or None, 3
db = DB(address, cache=cache)

def count(name):
    for _ in range(5):
        for attempt in transaction.manager.attempts(1000):
            with attempt:
                connection = db.open()
                root = connection.root()
                root[name] = root.get(name, 0) + 1
                root["all"] = root.get("all", 0) + 1
            connection.close()

def begin(number):
    if way == "fork":
        pid = os.fork()
        if pid:
            return lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        try:
            count(number)
            db.close()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    import multiprocessing
    process = multiprocessing.get_context("fork").Process(target=count, args=(number,))
    process.start()
    return lambda: process.join() or process.exitcode

count("parent")
waiting = [begin(number) for number in range(children)]
count("parent")
assert [wait() for wait in waiting] == [0] * children
count("parent")
connection = db.open()
root = connection.root()
print(root["all"], root["parent"], *(root[number] for number in range(children)))
connection.close()
db.close()
"""


@pytest.mark.parametrize("cache", ["", "cache"], ids=["memory", "disk"])
@pytest.mark.parametrize("way", ["fork", "multiprocessing"])
def test_parent_and_forked_children_go_on_working(served, tmp_path, way, cache):
    """Each has a session of its own, and none disturbs that of another."""
    script = tmp_path / "forking.py"
    script.write_text(FORK)
    host, port = served.address
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), f"{host}:{port}", way, cache],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["30", "15", "5", "5", "5"]
    assert not done.stderr


def test_a_forked_child_in_the_middle_of_a_transaction_has_none(server, storage):
    """The transaction is the parent's."""
    meta = TransactionMetaData()
    storage.tpc_begin(meta)
    storage.store(A, T1, b"data", "", meta)
    storage._connector.close()
    storage.forget_parent()
    assert storage.tpc_transaction() is None
    assert storage.current_session is None
    assert storage._oids == (None, [], 0)


def test_a_forked_child_holds_nothing_that_was_read_ahead(storage, monkeypatch):
    forgotten: list[str] = []
    monkeypatch.setattr(storage.read_ahead, "forget", lambda: forgotten.append("it"))
    storage.forget_parent()
    assert forgotten == ["it"]


def test_a_storage_is_watched_until_it_is_closed(server):
    storage = ClientStorage(server.address)
    assert storage in forks._storages
    storage.close()
    assert storage not in forks._storages


def is_free(storage: ClientStorage) -> bool:
    """Whether another thread can have the position's lock."""
    with ThreadPoolExecutor(1) as threads:
        if taken := threads.submit(storage.position.hold).result():
            threads.submit(storage.position.let_go).result()
    return taken


def test_a_storage_that_is_closed_during_a_fork_is_let_go(server, monkeypatch):
    monkeypatch.setattr(position, "FORK_WAIT_S", 0.01)
    storage = ClientStorage(server.address)
    forks._before_fork()
    assert not is_free(storage)
    forks.forget(storage)
    forks._after_fork_in_parent()
    assert is_free(storage)
    storage.close()


def test_a_fork_lets_go_of_what_it_holds_and_not_of_anothers(storage, monkeypatch):
    """Another one did not get hold of it in time."""
    monkeypatch.setattr(position, "FORK_WAIT_S", 0.01)
    forks._before_fork()
    with ThreadPoolExecutor(1) as another:
        another.submit(forks._before_fork).result()
        another.submit(forks._after_fork_in_parent).result()
    assert not is_free(storage)
    forks._after_fork_in_parent()
    assert is_free(storage)


# Handshakes


def fork(order: list[str]) -> None:
    """Everything but the fork."""
    forks._before_fork()
    order.append("fork")
    forks._after_fork_in_parent()


def test_a_fork_waits_for_the_end_of_a_handshake():
    order: list[str] = []
    with forks.shaking_hands():
        forking = Background(fork, order)
        assert not forking.returns_soon()
        order.append("handshake")
    forking.result()
    assert order == ["handshake", "fork"]


def test_nobody_else_waits_for_a_handshake_that_a_fork_waits_for(storage, monkeypatch):
    monkeypatch.setattr(position, "FORK_WAIT_S", 0.01)
    with forks.shaking_hands():
        forking = Background(fork, [])
        assert not forking.returns_soon()
        assert is_free(storage)
    forking.result()


def test_no_handshake_begins_during_a_fork():
    order: list[str] = []

    def shake_hands() -> None:
        with forks.shaking_hands():
            order.append("handshake")

    forks._before_fork()
    shaking = Background(shake_hands)
    assert not shaking.returns_soon()
    order.append("fork")
    forks._after_fork_in_parent()
    shaking.result()
    assert order == ["fork", "handshake"]


def test_a_fork_waits_not_for_ever_for_a_handshake(monkeypatch):
    monkeypatch.setattr(forks, "HANDSHAKES_WAIT_S", 0.01)
    order: list[str] = []
    with forks.shaking_hands():
        fork(order)
    assert order == ["fork"]
    # And nobody else has to wait for it.
    with forks.shaking_hands():
        assert forks._handshakes._under_way == 1


def test_a_child_shakes_hands_whatever_its_parents_threads_were_doing(monkeypatch):
    inherited = forks._handshakes
    monkeypatch.setattr(forks, "_handshakes", inherited)
    monkeypatch.setattr(forks, "_storages", set())
    forks._before_fork()
    with inherited._changed:
        forks._after_fork()
        with forks.shaking_hands():
            assert forks._handshakes is not inherited
    inherited.let_go()
