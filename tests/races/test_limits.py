"""Whoever reaches a limit is told which one and let go; the others notice nothing.

The offender is a socket from another address than the neighbour's (Linux has all of
127.0.0.0/8), who loads and commits before, meanwhile and afterwards.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transaction.interfaces import TransientError

from zeolith.client.dial import TurnedAway, Wish, dial, dial_channel
from zeolith.client.storage import ClientStorage
from zeolith.protocol.codec import encode
from zeolith.protocol.connection import HEARTBEAT, Connection, Role
from zeolith.protocol.errors import HelloRefused, LocalProtocolError, Overloaded
from zeolith.protocol.frames import frame
from zeolith.protocol.limits import DEFAULT
from zeolith.protocol.messages import Goodbye, Hello, Notice, Request
from zeolith.protocol.tls import TlsFiles, client_tls
from zeolith.server.peer import Peer
from zeolith.storage.filestore import FileStore

from ..support.certificates import Authority, context_of
from ..support.gates import Background
from ..support.inprocess import InProcessServer, client_of, serving
from ..support.memory import hello_fields
from ..support.records import begin, commit, oid_of, seen
from ..support.waiting import wait_until

LIMITS = replace(
    DEFAULT,
    connections_max=60,
    address_connections_max=20,
    unwelcomed_connections_max=10,
    hello_frame_bytes_max=8000,
    hello_bytes_max=8000,
    hello_timeout_s=1.0,
    requests_open_max=50,
    output_bytes_max=4 * 1024**2,
    session_channels_max=8,
    transaction_bytes_max=3 * 1024**2,
    staged_bytes_max=4 * 1024**2,
    transaction_blob_bytes_max=3 * 1024**2,
)
X = oid_of("x")
NEVER = b"\x7f" + b"\xff" * 7
WAIT_S = 30


@pytest.fixture
def server(tmp_path: Path) -> Iterator[InProcessServer]:
    path, blobs = str(tmp_path / "Data.fs"), str(tmp_path / "blobs")
    open_ = partial(FileStore, "1", path, blob_dir=blobs)
    with InProcessServer({"1": open_}, limits=LIMITS) as server:
        yield server


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[InProcessServer]:
    context = context_of(Authority(tmp_path).sign())
    path = tmp_path / "Encrypted.fs"
    with serving(path, limits=LIMITS, tls=context) as server:
        yield server


class Neighbour:
    """A client that is there all the time, and one that comes and goes."""

    def __init__(self, server: InProcessServer):
        self._server = server
        self._storage = ClientStorage(server.address, limits=LIMITS)
        session = self._storage.current_session
        assert session is not None
        self._token = session.welcome["session"]
        self._count = 0

    def works(self) -> None:
        """Commit, and load what was committed, with what it has and by new sockets."""
        self._count += 1
        data = b"%d" % self._count
        commit(self._storage, x=data)
        assert self._storage.is_connected()
        with client_of(self._server, limits=LIMITS) as other:
            assert seen(other, "x") == data

    def was_never_lost(self) -> bool:
        session = self._storage.current_session
        return session is not None and session.welcome["session"] == self._token

    def close(self) -> None:
        self._storage.close()


@pytest.fixture
def neighbour(server: InProcessServer) -> Iterator[Neighbour]:
    neighbour = Neighbour(server)
    neighbour.works()
    yield neighbour
    neighbour.works()
    assert neighbour.was_never_lost()
    neighbour.close()


class Offender:
    """A client without manners."""

    def __init__(self, server: InProcessServer, host: str = "127.0.0.2"):
        self.socket = socket.create_connection(
            server.address, WAIT_S, source_address=(host, 0)
        )
        self._connection = Connection(Role.CLIENT, 0.0)

    def hello(self, **fields: Any) -> None:
        """Be welcomed, as a channel without a session if nothing else is said."""
        fields = hello_fields(**{"kind": "channel", **fields})
        self.send(self._connection.hello(fields, 0.0))
        assert self._connection.receive_data(self.socket.recv(65536), 0.0)

    @property
    def goodbye(self) -> Goodbye | None:
        """What the server has said already when it hung up."""
        return self._connection.goodbye_rcvd

    def send(self, data: bytes) -> None:
        # It need not take all of it.
        with suppress(ConnectionError):
            self.socket.sendall(data)

    def last_words(self) -> Goodbye:
        """What the server said when it hung up, which it must have."""
        with suppress(ConnectionError):
            while data := self.socket.recv(65536):
                self._connection.receive_data(data, 0.0)
        assert self.goodbye is not None, "it was cut off without a word"
        return self.goodbye

    @property
    def is_there(self) -> bool:
        """Whether the server has not hung up, as far as is known."""
        self.socket.setblocking(False)
        try:
            return bool(self.socket.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        finally:
            self.socket.settimeout(WAIT_S)

    def close(self) -> None:
        self.socket.close()


@contextmanager
def offenders(
    server: InProcessServer, count: int, *hosts: str
) -> Iterator[list[Offender]]:
    """So many that are welcomed, from each of ``hosts`` in turn."""
    those: list[Offender] = []
    try:
        for n in range(count):
            those.append(Offender(server, hosts[n % len(hosts)]))
            those[-1].hello()
        yield those
    finally:
        for each in those:
            each.close()


@pytest.fixture
def offender(server: InProcessServer) -> Iterator[Offender]:
    offender = Offender(server)
    yield offender
    offender.close()


def session_of(server: InProcessServer, offender: Offender) -> bytes:
    """The token of a session that the offender begins."""
    offender.hello(kind="stream")
    return next(
        token
        for token, session in server.on_loop(
            lambda: dict(server.service.sessions)
        ).items()
        if session.stream.address.startswith("127.0.0.2")
    )


# Connections


def test_too_many_connections_of_one_address(server, neighbour, caplog):
    with offenders(server, LIMITS.address_connections_max, "127.0.0.2") as those:
        late = Offender(server)
        last_words = late.last_words()
        assert last_words.reason == "limit"
        assert "more than 20 connections from 127.0.0.2" in last_words.text
        assert "address_connections_max" in last_words.text
        assert "127.0.0.2:" in caplog.text
        assert last_words.text in caplog.text
        neighbour.works()
        assert all(each.is_there for each in those)
        late.close()


def test_too_many_connections_in_all(server, neighbour, caplog):
    hosts = [f"127.0.0.{n}" for n in range(2, 8)]
    # The neighbour needs some more now and then.
    with offenders(server, LIMITS.connections_max - 8, *hosts) as those:
        neighbour.works()
        late: list[Offender] = []
        while not late or late[-1].goodbye is None:
            assert len(late) < LIMITS.address_connections_max
            late.append(Offender(server, "127.0.0.9"))
            late[-1].hello()
        assert late[-1].last_words().reason == "limit"
        assert "more than 60 connections (connections_max)" in caplog.text
        for each in late:
            each.close()
        assert all(each.is_there for each in those)
        neighbour.works()


def test_thousands_that_say_a_byte_now_and_then(server, neighbour, caplog):
    """Slowloris: neither descriptors nor places are theirs."""
    silent: list[Offender] = []
    for n in range(300):
        silent.append(Offender(server, f"127.0.0.{n % 100 + 2}"))
        silent[-1].send(b"\0")
        if n % 60 == 59:
            neighbour.works()
    wait_until(
        lambda: server.on_loop(lambda: server.service.admission.unwelcomed) <= 10,
        "the oldest to be let go",
    )
    neighbour.works()
    told = silent[0].last_words()
    assert told.reason == "limit"
    assert "unwelcomed_connections_max" in told.text
    assert "unwelcomed_connections_max" in caplog.text
    # And the rest of them when their time is over.
    assert "hello_timeout_s" in silent[-1].last_words().text
    for each in silent:
        each.close()


# Before the welcome


def test_a_hello_byte_by_byte(server, neighbour, offender, caplog):
    hello = encode(Hello(hello_fields()))
    for byte in hello[:-1]:
        if not offender.is_there:
            break
        offender.send(bytes([byte]))
        neighbour.works()
    assert "no hello in time: 1 s (hello_timeout_s)" in offender.last_words().text
    assert "no hello in time" in caplog.text


BEFORE = {
    "many bytes": (frame(bytes(LIMITS.hello_bytes_max)), "hello_bytes_max"),
    "a huge frame": (b"\xff\xff\xff\xff", "frame_bytes_max"),
    "a frame that only the welcomed may send": (
        (LIMITS.hello_frame_bytes_max + 1).to_bytes(4, "big"),
        "frame_bytes_max",
    ),
    "arrays in arrays": (frame(b"\xdd\0\0\x10\0" * 1000), "max_array_len"),
    "arrays too deep": (frame(b"\x91" * 7000 + b"\xc0"), "not msgpack"),
    "a map that is not there": (frame(b"\xdf\xff\xff\xff\xff"), "not msgpack"),
    "bytes that are not there": (frame(b"\xc6\xff\xff\xff\xff"), "not msgpack"),
}


@pytest.mark.parametrize("offence", BEFORE)
def test_before_the_welcome(server, neighbour, offender, caplog, offence):
    data, limit = BEFORE[offence]
    offender.send(data)
    assert limit in offender.last_words().text
    assert "127.0.0.2:" in caplog.text
    assert limit in caplog.text
    neighbour.works()


# After it

AFTER = {
    "a huge frame": (b"\xff\xff\xff\xff", "frame_bytes_max"),
    "heartbeats and nothing else": (HEARTBEAT * 200_000, "heartbeats_max"),
    "an array of a million": (
        frame(b"\x94\x02\x01\xa4ping\xdd\0\x0f\x42\x40" + b"\xc0" * 1_000_000),
        "max_array_len",
    ),
    "arrays too deep": (frame(b"\x91" * 100_000 + b"\xc0"), "not msgpack"),
    "a number that is none": (frame(b"\x94\x02\xcf" + b"\xff" * 8), "not msgpack"),
}


@pytest.mark.parametrize("offence", AFTER)
def test_after_the_welcome(server, neighbour, offender, caplog, offence):
    data, limit = AFTER[offence]
    stream = Offender(server)
    offender.hello(session=session_of(server, stream))
    neighbour.works()
    offender.send(data)
    assert limit in offender.last_words().text
    assert "127.0.0.2:" in caplog.text
    assert limit in caplog.text
    stream.close()


def test_more_requests_than_it_waits_for(tmp_path, caplog):
    """What is answered at once is not open; these wait for a thread."""
    limits = replace(LIMITS, turn_s=60.0)
    with serving(tmp_path / "Data.fs", limits=limits) as server:
        neighbour = Neighbour(server)
        neighbour.works()
        stream, offender = Offender(server), Offender(server)
        offender.hello(session=session_of(server, stream))
        asking = [encode(Request(n, "get_tid", [X])) for n in range(1, 1000)]
        offender.send(b"".join(asking))
        assert "requests_open_max" in offender.last_words().text
        assert "requests_open_max" in caplog.text
        neighbour.works()
        assert neighbour.was_never_lost()
        for each in (stream, offender, neighbour):
            each.close()


def test_a_frame_that_never_ends(server, neighbour, offender, caplog):
    offender.hello()
    offender.send((1000).to_bytes(4, "big") + b"begun")

    def waiting() -> list[Peer]:
        return [
            peer
            for peer in server.service.peers
            if peer.address.startswith("127.0.0.2:") and peer.connection.is_inside_frame
        ]

    wait_until(lambda: server.on_loop(waiting), "half of the frame is there")
    (peer,) = server.on_loop(waiting)
    neighbour.works()
    # As if the clock had gone on.
    peer.connection.rcvd_at -= LIMITS.heartbeat_timeout_s
    assert "silent for 20 s" in offender.last_words().text
    assert "silent for 20 s" in caplog.text


def test_small_messages_without_end(server, neighbour, offender):
    """Nothing is wrong with any of them, and nobody is kept waiting by all."""
    stream = Offender(server)
    offender.hello(session=session_of(server, stream))
    small = encode(Notice("stage", [b"t" * 16, []])) * 10_000
    unsent = b""
    offender.socket.setblocking(False)
    for _ in range(5):
        with suppress(BlockingIOError):
            # A server that keeps up could be sent messages for ever.
            for _ in range(20):
                unsent = unsent or small
                unsent = unsent[offender.socket.send(unsent) :]
        neighbour.works()
    stream.close()


def test_answers_that_are_not_read(server, neighbour, offender, caplog):
    with client_of(server, limits=LIMITS) as writer:
        commit(writer, large=bytes(1_000_000))
    stream = Offender(server)
    offender.hello(session=session_of(server, stream))
    load = [encode(Request(n, "load", [oid_of("large"), NEVER])) for n in range(1, 50)]
    offender.send(b"".join(load))
    wait_until(lambda: "output_bytes_max" in caplog.text, "it is disconnected")
    assert "127.0.0.2:" in caplog.text
    neighbour.works()
    stream.close()


def test_too_many_channels_of_one_session(server, neighbour, caplog):
    with client_of(server, limits=LIMITS) as storage:
        session = storage.current_session
        assert session is not None
        token = session.welcome["session"]
        channels = [
            dial_channel(server.address, token, LIMITS)
            for _ in range(LIMITS.session_channels_max)
        ]
        with pytest.raises(HelloRefused, match="session_channels_max") as raised:
            dial_channel(server.address, token, LIMITS)
        assert raised.value.reason == "limit"
        assert "more than 8 channels (session_channels_max)" in caplog.text
        neighbour.works()
        assert all(channel.call("ping") is None for channel in channels)
        for channel in channels:
            channel.close()


def work_at_once(storage: ClientStorage, count: int) -> None:
    """In so many threads, each of which would like to have a channel for itself."""

    def work(number: int) -> bytes:
        for n in range(10):
            commit(storage, **{f"t{number}": b"%d" % n})
            storage.ping()
        return seen(storage, f"t{number}")

    working = [Background(work, number) for number in range(count)]
    assert [each.result() for each in working] == [b"9"] * count


def test_a_client_that_gets_no_more_channels_goes_on_with_those_it_has(
    server, neighbour, caplog
):
    with client_of(server, limits=LIMITS) as storage:
        session = storage.current_session
        commit(storage, y=b"cached")
        work_at_once(storage, 3 * LIMITS.session_channels_max)
        assert "lets this client have no more sockets" in caplog.text
        assert "more than 8 channels (session_channels_max)" in caplog.text
        assert storage.current_session is session
        neighbour.works()


@pytest.mark.parametrize("way", ["plain", "tls"])
def test_a_client_whose_machine_has_too_many_sockets_goes_on_with_those_it_has(
    server, tls_server, tmp_path, caplog, way
):
    wish = Wish("1", False, None, None, None, None)
    options: dict[str, Any] = {"limits": LIMITS}
    tls = None
    if way == "tls":
        server, options["tls_ca"] = tls_server, str(tmp_path / "ca.pem")
        tls = client_tls(files=TlsFiles(options["tls_ca"]))
    with client_of(server, **options) as storage, ExitStack() as others:
        storage.ping()
        session = storage.current_session

        def come() -> None:
            while True:
                others.enter_context(dial(server.address, wish, LIMITS, tls).socket)

        with pytest.raises(TurnedAway):
            come()
        work_at_once(storage, 5)
        assert "lets this client have no more sockets" in caplog.text
        assert storage.current_session is session


# Eight threads of a process that may open two more sockets than it has: a channel, and
# what a thread that comes later needs for a moment.
CROWDED = """
import os, resource, sys
from concurrent.futures import ThreadPoolExecutor
from zeolith.client import ClientStorage

host, port = sys.argv[1:]
storage = ClientStorage((host, int(port)))
storage.ping()
session = storage.current_session
_soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
highest = max(map(int, os.listdir("/proc/self/fd")))
resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, hard))

def work(_number):
    for _ in range(50):
        storage.ping()

with ThreadPoolExecutor(8) as threads:
    list(threads.map(work, range(8)))
assert storage.current_session is session
storage.close()
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="there is no /proc")
def test_a_process_without_descriptors_goes_on_with_the_sockets_it_has(server):
    host, port = server.address
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CROWDED, host, str(port)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "there are no more sockets here for a channel to" in done.stderr


# What transactions send


def stage(offender: Offender, transaction: bytes, megabytes: int) -> None:
    operation = ["store", X, bytes(8), bytes(1024**2)]
    for _ in range(megabytes):
        offender.send(encode(Notice("stage", [transaction, [operation]])))


def test_a_transaction_that_is_too_large(server, neighbour, offender, caplog):
    stream = Offender(server)
    offender.hello(session=session_of(server, stream))
    stage(offender, b"t" * 16, 2)
    neighbour.works()
    stage(offender, b"t" * 16, 2)
    assert "transaction_bytes_max" in offender.last_words().text
    assert "127.0.0.2:" in caplog.text
    assert "transaction_bytes_max" in caplog.text
    wait_until(
        lambda: server.on_loop(lambda: server.service.stock.bytes) == 0,
        "what was staged is let go of",
    )
    stream.close()


def test_transactions_that_are_too_large_together(server, neighbour, offender, caplog):
    stream = Offender(server)
    token = session_of(server, stream)
    offender.hello(session=token)
    stage(offender, b"t" * 16, 2)

    def stocked() -> int:
        return int(server.on_loop(lambda: server.service.stock.bytes))

    wait_until(lambda: stocked() > 2 * 1024**2, "two MB are staged")
    with client_of(server, limits=LIMITS) as storage:
        # A small one goes through, a large one does not.
        neighbour.works()
        with pytest.raises(Overloaded, match="staged_bytes_max") as raised:
            commit(storage, y=bytes(1024**2), z=bytes(1024**2), w=bytes(10))
        assert isinstance(raised.value, TransientError)
        assert "staged_bytes_max" in caplog.text
        neighbour.works()
        offender.close()
        wait_until(lambda: stocked() == 0, "what was staged is let go of")
        commit(storage, y=bytes(1024**2), z=bytes(1024**2), w=bytes(10))
    stream.close()


def uploaded(server: InProcessServer) -> int:
    """The bytes of blobs that are not committed."""
    folder = Path(server.database.uploads.shared).parent
    files = folder.glob(".zeolith-uploads-*/*.upload")
    return sum(path.stat().st_size for path in files)


def test_a_transaction_whose_blobs_are_too_large(server, neighbour, offender, caplog):
    stream = Offender(server)
    offender.hello(session=session_of(server, stream))
    chunks = [
        encode(Notice("blob_chunk", [b"t" * 16, n, bytes(1024**2)])) for n in range(4)
    ]
    for chunk in chunks[:3]:
        offender.send(chunk)
    wait_until(lambda: uploaded(server) == 3 * 1024**2, "they are there")
    neighbour.works()
    offender.send(chunks[3])
    assert "transaction_blob_bytes_max" in offender.last_words().text
    assert "127.0.0.2:" in caplog.text
    assert "transaction_blob_bytes_max" in caplog.text
    wait_until(lambda: not uploaded(server), "what was sent is removed")
    stream.close()


def test_a_client_is_told_that_its_blobs_are_too_large(server, neighbour, tmp_path):
    """While it sends them, by an error that is not worth another try."""
    blob = tmp_path / "large"
    with client_of(server, blob_dir=str(tmp_path / "cache")) as storage:
        session = storage.current_session
        transaction = begin(storage)
        with blob.open("wb") as file:
            file.truncate(100 * 1024**2)
        with pytest.raises(LocalProtocolError, match="transaction_blob_bytes") as error:
            storage.storeBlob(
                oid_of("blob"), bytes(8), b"r", str(blob), "", transaction
            )
        assert not isinstance(error.value, TransientError)
        storage.tpc_abort(transaction)
        wait_until(lambda: not uploaded(server), "what was sent is removed")
        assert storage.current_session is session
        blob.write_bytes(b"small")
        transaction = begin(storage)
        storage.storeBlob(oid_of("blob"), bytes(8), b"r", str(blob), "", transaction)
        storage.tpc_vote(transaction)
        storage.tpc_finish(transaction)


# With TLS


HANDSHAKE = b"\x16\x03\x01"


def test_handshakes_that_never_end_keep_out_nobody(tls_server, tmp_path, caplog):
    options = {"tls_ca": str(tmp_path / "ca.pem")}
    with client_of(tls_server, limits=LIMITS, **options) as storage:
        commit(storage, x=b"before")
        silent: list[Offender] = []
        for n in range(100):
            silent.append(Offender(tls_server, f"127.0.0.{n + 2}"))
            silent[-1].send(HANDSHAKE)
        with client_of(tls_server, limits=LIMITS, **options) as other:
            assert seen(other, "x") == b"before"
        wait_until(lambda: not silent[0].is_there, "the oldest to be let go")
        assert "unwelcomed_connections_max" in caplog.text
        wait_until(lambda: not silent[-1].is_there, "the others, in time")
        assert "hello_timeout_s" in caplog.text
        commit(storage, x=b"after")
        for each in silent:
            each.close()


def test_handshakes_that_fail_do_not_fill_the_log(tls_server, caplog):
    for n in range(50):
        offender = Offender(tls_server)
        offender.send(HANDSHAKE + bytes(100) if n % 2 else b"GET / HTTP/1.1\r\n\r\n")
        with suppress(ConnectionError):
            while offender.socket.recv(1000):
                pass
        offender.close()
    complaints = [each for each in caplog.messages if "is disconnected" in each]
    assert 1 <= len(complaints) < 10
