"""Losing the server, finding it again, and finding somebody else in its place."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from persistent.mapping import PersistentMapping
from transaction import TransactionManager
from ZODB.DB import DB

from zeolith.client.errors import ClientDisconnected
from zeolith.client.storage import ClientStorage
from zeolith.protocol.codec import encode
from zeolith.protocol.messages import Failure

from ..support.gates import Background
from ..support.inprocess import client_of, serving
from ..support.records import commit, oid_of, seen, vote
from ..support.serving import ServerProcess
from ..support.waiting import wait_until

X = oid_of("x")
# Long enough that a test which waits for it does not end in time.
LONG_S = 1000


# Live objects


@pytest.fixture
def cached(in_memory_and_on_disk: dict[str, Any]) -> dict[str, Any]:
    return in_memory_and_on_disk


class Population:
    """A ZODB connection with many objects in memory."""

    def __init__(self, storage: ClientStorage, size: int):
        self._manager = TransactionManager()
        self._db = DB(storage)
        self._connection = self._db.open(self._manager)
        self._manager.begin()
        root = self._connection.root()
        for n in range(size):
            root[n] = PersistentMapping({"n": 0})
        self._manager.commit()
        self.objects = [root[n] for n in range(size)]

    def begin(self) -> None:
        self._manager.begin()

    def ghosts(self) -> list[int]:
        """Which objects are not in memory any more."""
        return [n for n, each in enumerate(self.objects) if each._p_changed is None]

    def write(self, number: int, value: int) -> None:
        self._manager.begin()
        self.objects[number]["n"] = value
        self._manager.commit()

    def close(self) -> None:
        self._manager.abort()
        self._db.close()


@pytest.fixture
def population(reader: ClientStorage) -> Iterator[Population]:
    population = Population(reader, 50)
    yield population
    population.close()


def come_back(storage: ClientStorage, lose: Callable[[], object]) -> None:
    before = storage.current_session
    lose()
    wait_until(lambda: storage.current_session not in (None, before), "another session")


@pytest.mark.parametrize("how", ["connection", "server"])
def test_live_objects_survive_a_reconnection(server, reader, proxy, population, how):
    """Nothing has changed meanwhile, so nothing need be loaded again."""
    come_back(reader, proxy.cut if how == "connection" else server.restart)
    population.begin()
    assert not population.ghosts()
    loads = server.on_loop(lambda: server.served.counters.loads)
    assert [each["n"] for each in population.objects] == [0] * 50
    assert server.on_loop(lambda: server.served.counters.loads) == loads


def test_only_what_changed_is_loaded_again_after_a_reconnection(
    server, reader, proxy, population
):
    """The changes of the time in between are replayed exactly."""
    proxy.refuse()
    proxy.cut()
    wait_until(lambda: not reader.is_connected(), "the loss")
    with client_of(server) as storage:
        others = DB(storage)
        with others.transaction() as connection:
            for n in (3, 7):
                connection.root()[n]["n"] = 1
        others.close()
    proxy.restore()
    wait_until(reader.is_connected, "the return")
    population.begin()
    assert population.ghosts() == [3, 7]
    assert [each["n"] for each in population.objects[:8]] == [0, 0, 0, 1, 0, 0, 0, 1]


def test_what_is_cached_survives_a_reconnection(server, reader, proxy):
    commit(reader, x=b"data")
    assert seen(reader, "x") == b"data"
    come_back(reader, proxy.cut)
    loads = server.on_loop(lambda: server.served.counters.loads)
    assert seen(reader, "x") == b"data"
    assert server.on_loop(lambda: server.served.counters.loads) == loads


# Refusals and their reasons, at once


@contextmanager
def impostor(answer: bytes, *, speaks_first: bool) -> Iterator[tuple[str, int]]:
    """Somebody who is no zeolith server, on a port of its own."""
    listener = socket.create_server(("127.0.0.1", 0))
    visitors: list[socket.socket] = []

    def serve() -> None:
        with suppress(OSError):
            while True:
                visitor, _address = listener.accept()
                visitors.append(visitor)
                if not speaks_first:
                    visitor.recv(4096)
                visitor.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()
        for visitor in visitors:
            visitor.close()


IMPOSTORS = {
    "a ZEO server": (b"\0\0\0\2M5", True, "not msgpack"),
    "a ZEO server that pickles": (b"\0\0\0\2Z5", True, "not msgpack"),
    "a web server": (b"HTTP/1.1 400 Bad Request\r\n\r\n", False, "a frame of"),
    "a mail server": (b"220 mail.example.org ESMTP\r\n", True, "a frame of"),
    "a server of another version": (
        encode(Failure(0, "HelloRefused", {"reason": "version"}, "I speak version 9")),
        False,
        "I speak version 9",
    ),
}


@pytest.mark.parametrize("who", IMPOSTORS)
def test_somebody_who_speaks_another_language_is_found_out_at_once(who: str):
    """The cause is in the error; nobody waits for a time-out to be told."""
    answer, speaks_first, complaint = IMPOSTORS[who]
    with (
        impostor(answer, speaks_first=speaks_first) as address,
        pytest.raises(ClientDisconnected, match=complaint) as raised,
    ):
        ClientStorage(address, wait_timeout=LONG_S)
    assert f"127.0.0.1:{address[1]}" in str(raised.value)


def test_a_wrong_storage_name_is_told_at_once(server):
    with pytest.raises(ClientDisconnected, match=r"no storage 'mian' here, only '1'"):
        ClientStorage(server.address, storage="mian", wait_timeout=LONG_S)


def test_a_writer_at_a_read_only_server_is_told_at_once(tmp_path):
    path = tmp_path / "Data.fs"
    with (
        serving(path, is_read_only=True) as server,
        pytest.raises(ClientDisconnected, match="read-only here"),
    ):
        ClientStorage(server.address, wait_timeout=LONG_S)


def test_a_call_is_told_the_reason_too_when_nobody_waited_at_the_beginning(server):
    with client_of(server, storage="mian", wait=False, wait_timeout=LONG_S) as storage:
        assert "no storage 'mian'" in str(Background(storage.load, X).error())


def test_a_refusal_is_not_for_ever(server):
    """The operator adds the storage; the client need not be restarted."""
    with client_of(server, storage="main", wait=False) as storage:
        with pytest.raises(ClientDisconnected, match="no storage 'main'"):
            storage.load(X)
        server.on_loop(
            lambda: server.service.databases.update(main=server.service.databases["1"])
        )
        wait_until(storage.is_connected, "the connection")


def test_nobody_there_is_waited_for_and_then_told():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with pytest.raises(ClientDisconnected, match="Connection refused") as raised:
        ClientStorage(address, wait_timeout=0.1)
    assert f"127.0.0.1:{address[1]}: no connection within 0.1 s" in str(raised.value)


def test_the_last_reason_is_in_the_error_of_a_call(server):
    """The server went away in the middle of everything."""
    with client_of(server, wait_timeout=0.1) as storage:
        server.stop()
        with pytest.raises(ClientDisconnected, match=r"refused|closed|stopping"):
            storage.load(X)


# Names and addresses


@pytest.fixture
def no_reverse_names(monkeypatch) -> None:
    """A name server that does not answer would hold up whoever asks it."""

    def fail(*args: Any) -> None:
        raise AssertionError(f"asked for the name of {args}")

    for function in ("gethostbyaddr", "getfqdn", "getnameinfo", "gethostbyname"):
        monkeypatch.setattr(socket, function, fail)


@pytest.mark.usefixtures("no_reverse_names")
def test_nobody_asks_for_the_name_of_an_address(tmp_path):
    """Neither end, neither when it comes nor when it comes back."""
    with serving(tmp_path / "Data.fs") as server, client_of(server) as storage:
        commit(storage, x=b"data")
        come_back(storage, server.cut_off)
        commit(storage, x=b"more")
        assert storage.server_status()["connections"]
        assert storage.sortKey()
        assert storage.getName() == "127.0.0.1:{}".format(*server.address[1:])


def test_a_client_is_known_by_its_own_address(server, caplog):
    """Not by the one that it connected to, which is everybody's."""
    with caplog.at_level("INFO"), client_of(server, client_label="zope-3") as storage:
        session = storage.current_session
        assert session is not None
        host, port = session._stream.getsockname()
        own = f"{host}:{port}"
        (client,) = storage.server_status()["storages"]["1"]["clients"]
        assert client["address"] == own
        assert client["label"] == "zope-3"
        transaction = vote(storage, x=b"data")
        (told,) = storage.server_status()["storages"]["1"]["transactions"]
        assert told["client"] == f"{own} (zope-3)"
        storage.tpc_abort(transaction)
    assert f"{own} (zope-3) has come" in caplog.text


def test_a_label_is_optional_and_may_be_any_text(server):
    label = "z\N{LATIN SMALL LETTER O WITH DIAERESIS}pe \N{SNOWMAN} %s {}"
    with client_of(server, client_label=label) as storage:
        (client,) = storage.server_status()["storages"]["1"]["clients"]
        assert client["label"] == label


# Oids


def oids_given(storage: ClientStorage, count: int) -> list[bytes]:
    return [storage.new_oid() for _ in range(count)]


@pytest.mark.parametrize("end", ["terminate", "kill"])
def test_no_oid_is_given_out_twice_when_the_server_restarts(tmp_path, end: str):
    """Clients hold unused ones; the file knows only of those that were stored."""
    with ServerProcess(tmp_path) as server:
        early = ClientStorage(server.address)
        late = ClientStorage(server.address)
        given = oids_given(early, 3) + oids_given(late, 3)
        for _ in range(2):
            getattr(server, end)()
            server.start()
            for storage in (early, late):
                wait_until(storage.is_connected, "the return")
                given += oids_given(storage, 3)
        newcomer = ClientStorage(server.address)
        given += oids_given(newcomer, 300)
        for storage in (early, late, newcomer):
            storage.close()
    assert len(set(given)) == len(given)


def test_unused_oids_end_with_the_session_that_gave_them(server, reader, proxy):
    """Even if a server gave them out again, two clients would not both have them."""
    oids_given(reader, 1)
    come_back(reader, proxy.cut)
    issued: list[bytes] = []
    new_oids = server.database.new_oids

    def remember(count: int) -> list[bytes]:
        issued.extend(new_oids(count))
        return issued

    server.database.new_oids = remember
    assert reader.new_oid() in issued


def test_objects_of_two_clients_do_not_meet_after_a_restart(tmp_path):
    """Each makes objects before and after; all of them are there, and different."""
    path = tmp_path / "Data.fs"
    with serving(path) as server, client_of(server) as one, client_of(server) as two:
        dbs = [DB(one), DB(two)]
        for round_ in range(3):
            for n, db in enumerate(dbs):
                wait_until(db.storage.is_connected, "the return")
                db.storage._server_sync = True
                with db.transaction() as connection:
                    root = connection.root()
                    for m in range(5):
                        key = f"{round_}-{n}-{m}"
                        root[key] = PersistentMapping({"key": key})
            if round_ < 2:
                server.restart()
        with dbs[0].transaction() as connection:
            root = connection.root()
            assert len(root) == 30
            assert all(root[key]["key"] == key for key in root)
            assert len({root[key]._p_oid for key in root}) == 30
        for db in dbs:
            db.close()


# The server behind a wrong address


def test_a_client_can_be_sent_elsewhere(server, tmp_path):
    """The old address is dead, or was wrong from the beginning."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = nobody.getsockname()
    with client_of(server, addr=address, wait=False) as storage:
        assert not storage.is_connected()
        storage.new_addr(server.address)
        wait_until(storage.is_connected, "the connection")
        tid = commit(storage, x=b"data")
    assert server.on_loop(lambda: server.served.changes.last_tid) == tid
