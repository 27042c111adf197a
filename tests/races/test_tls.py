"""What sockets do in bad times, when they speak TLS; the others are in their files.

All of these tests were run over TLS, too. Here is what TLS might make different: its
own buffers, its own time-outs, sockets that one thread shuts while another one waits.
"""

import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from ZODB.POSException import POSKeyError

from zeolith.client.errors import ChannelLost
from zeolith.client.storage import ClientStorage
from zeolith.protocol.limits import Limits
from zeolith.protocol.tls import client_context
from zeolith.storage.filestore import FileStore

from ..support.certificates import HOST, Authority, End, context_of
from ..support.gates import Background
from ..support.inprocess import InProcessServer, client_of, serving
from ..support.proxy import Direction, Proxy, proxied
from ..support.records import commit, oid_of, seen, wait_for_position
from ..support.waiting import wait_until

X = oid_of("x")
MEBIBYTE = 1024 * 1024
IMPATIENT = Limits(heartbeat_interval_s=0.2, heartbeat_timeout_s=1.0)


@pytest.fixture
def tls(tmp_path) -> dict[str, Any]:
    """What a client is given."""
    authority = Authority(tmp_path)
    authority.sign()
    return {"tls_ca": authority.ca}


@pytest.fixture
def server(tmp_path, tls) -> Iterator[InProcessServer]:
    context = context_of(Authority.signed_in(tmp_path))
    with serving(tmp_path / "Data.fs", tls=context) as server:
        yield server


@pytest.fixture
def writer(server, tls) -> Iterator[ClientStorage]:
    with client_of(server, **tls) as storage:
        yield storage


@pytest.fixture
def reader(server, proxy: Proxy, tls) -> Iterator[ClientStorage]:
    with client_of(server, addr=proxy.address, **tls) as storage:
        yield storage


def test_changes_are_told_and_large_records_arrive_whole(writer, reader):
    for size in (1, 16 * 1024, 64 * 1024 + 1, 7 * MEBIBYTE):
        data = os.urandom(size)
        wait_for_position(reader, commit(writer, x=data))
        assert seen(reader, "x") == data


def test_a_connection_that_is_cut_is_replaced(writer, reader, proxy):
    wait_for_position(reader, commit(writer, x=b"before"))
    for number in range(3):
        proxy.cut()
        wait_for_position(reader, commit(writer, x=b"%d" % number))
        assert seen(reader, "x") == b"%d" % number
        commit(reader, y=b"%d" % number)


@pytest.mark.parametrize("size_bytes", [1, 5, 6, 100, 1000])
def test_a_connection_that_is_cut_in_a_record_is_replaced(
    writer, reader, proxy, size_bytes
):
    data = os.urandom(100_000)
    wait_for_position(reader, commit(writer, x=data))
    proxy.cut_after(size_bytes, Direction.TO_CLIENT)
    assert reader.call("load", X, b"\x7f" + b"\xff" * 7)[0] == data
    assert proxy.was_cut.is_set()


@pytest.mark.parametrize("way", Direction)
def test_a_silent_network_is_found_out(tmp_path, tls, way: Direction):
    """The kernel's time limit counts, though Python's TLS would go on waiting."""
    context = context_of(Authority.signed_in(tmp_path))
    with (
        serving(tmp_path / "Data.fs", tls=context, limits=IMPATIENT) as server,
        proxied(server.address) as proxy,
        client_of(server, addr=proxy.address, limits=IMPATIENT, **tls) as storage,
    ):
        session = storage.current_session
        assert session is not None
        session.call("ping")
        proxy.stall(way)
        with pytest.raises(ChannelLost):
            Background(session.call, "ping").result()
        wait_until(lambda: session.ended is not None, "the end of the session")


def test_closing_ends_a_call_that_is_under_way(server, tls, gate, monkeypatch):
    """Another thread shuts the socket on which one waits."""
    monkeypatch.setattr(FileStore, "load_serial", gate.before(FileStore.load_serial))
    with client_of(server, **tls) as storage:
        tid = commit(storage, x=b"x")
        gate.shut()
        calling = Background(storage.loadSerial, X, tid)
        gate.wait_until_reached()
        storage.close()
        with pytest.raises(Exception, match="closed"):
            calling.result()
        gate.open()


def test_many_threads_have_channels_of_their_own(server, writer, tls):
    names = [f"x{number}" for number in range(8)]
    commit(writer, **{name: name.encode() * 1000 for name in names})
    failures: list[BaseException] = []

    def load(storage: ClientStorage, name: str) -> None:
        try:
            for _ in range(50):
                data = storage.call("load", oid_of(name), b"\x7f" + b"\xff" * 7)[0]
                assert data == name.encode() * 1000
        except BaseException as error:
            failures.append(error)
            raise

    with client_of(server, **tls) as storage:
        threads = [
            threading.Thread(target=load, args=(storage, name)) for name in names
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_a_forked_child_leaves_its_parents_connection_alone(server, tls):
    """Two who go on with the same keys would be cut off by the server."""
    with client_of(server, **tls) as storage:
        commit(storage, x=b"x")
        session = storage.current_session
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                commit(storage, y=b"of the child")
                storage.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert storage.current_session is session
        assert storage.load(oid_of("y"))[0] == b"of the child"
        commit(storage, x=b"of the parent")
        assert storage.current_session is session


def test_a_client_that_does_not_read_is_given_up_and_nobody_else_waits(
    tmp_path, tls, caplog
):
    """What waits for it is bounded, also where it is encrypted."""
    limits = Limits(output_bytes_max=MEBIBYTE)
    context = context_of(Authority.signed_in(tmp_path))
    with (
        serving(tmp_path / "Data.fs", tls=context, limits=limits) as server,
        proxied(server.address) as proxy,
        client_of(server, **tls) as writer,
        client_of(server, addr=proxy.address, **tls) as reader,
    ):
        commit(writer, x=os.urandom(4 * MEBIBYTE))
        session = reader.current_session
        assert session is not None
        channel = session.borrow()
        proxy.stall(Direction.TO_CLIENT)
        for _ in range(30):
            channel.ask("load", X, b"\x7f" + b"\xff" * 7)
        wait_until(lambda: "it does not read" in caplog.text, "the end of its patience")
        assert len(writer.load(X)[0]) == 4 * MEBIBYTE
        proxy.restore()
        session.give_back(channel)


@pytest.mark.parametrize("size_bytes", [0, 1, 100])
def test_a_handshake_that_does_not_end_is_given_up(tmp_path, tls, size_bytes):
    """It counts as a client from the first moment on; nothing is said to it."""
    context = context_of(Authority.signed_in(tmp_path))
    limits = Limits(hello_timeout_s=0.1)
    client = End(client_context(tls["tls_ca"]), HOST)
    with (
        serving(tmp_path / "Data.fs", tls=context, limits=limits) as server,
        socket.create_connection(server.address) as sock,
    ):
        sock.sendall(client.step(b"")[:size_bytes])
        assert sock.recv(1) == b""
        wait_until(lambda: server.status()["peers"] == 0, "its end")


def test_an_error_is_an_error_and_not_the_end(writer):
    session = writer.current_session
    with pytest.raises(POSKeyError):
        writer.load(oid_of("nobody"))
    assert writer.current_session is session
