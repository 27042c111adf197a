import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from zeolith.protocol.codec import encode
from zeolith.protocol.messages import Goodbye
from zeolith.server.probe import NoAnswer, ask

from ..support.inprocess import serving

TIMEOUT_S = 20


@contextmanager
def listening(talk: Callable[[socket.socket], object]) -> Iterator[tuple[str, int]]:
    """Somebody who accepts one connection and talks."""

    def accept() -> None:
        connection, _address = listener.accept()
        with connection, suppress(OSError):
            talk(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept)
        thread.start()
        yield listener.getsockname()
        thread.join()


def test_a_server_that_is_well_answers(tmp_path):
    with serving(tmp_path / "Data.fs") as server:
        assert ask(server.address, "ping", TIMEOUT_S) is None
        status = ask(server.address, "status", TIMEOUT_S)
    assert list(status["storages"]) == ["1"]
    # The probe is no client of a storage.
    assert status["storages"]["1"]["clients"] == []


def test_a_probe_leaves_nothing_behind(tmp_path):
    with serving(tmp_path / "Data.fs") as server:
        ask(server.address, "ping", TIMEOUT_S)
        ask(server.address, "ping", TIMEOUT_S)
        assert server.status()["sessions"] == 0


def test_nobody_there_is_told():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with pytest.raises(NoAnswer, match=rf"127\.0\.0\.1:{address[1]}: .*refused"):
        ask(address, "ping", TIMEOUT_S)


def test_silence_is_told():
    # The kernel accepts; nobody reads.
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(NoAnswer, match=r"does not answer within 0\.05 s"),
    ):
        ask(listener.getsockname(), "ping", 0.05)


def test_a_server_that_trickles_does_not_hold_the_probe_for_ever():
    """Each byte comes in time; the answer does not."""
    enough = threading.Event()

    def trickle(connection: socket.socket) -> None:
        connection.sendall((1000).to_bytes(4, "big"))
        while not enough.wait(0.005):
            connection.sendall(b"x")

    with listening(trickle) as address:
        with pytest.raises(NoAnswer, match="does not answer within"):
            ask(address, "ping", 0.05)
        enough.set()


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        (b"", "the connection was closed"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "a frame of 1213486160 bytes"),
        (b"\0\0\0\2M5", "a frame is not msgpack"),
        (encode(Goodbye("full", "come back later")), "full: come back later"),
    ],
)
def test_somebody_else_who_answers_is_told(said, complaint):
    def talk(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(said)

    with listening(talk) as address, pytest.raises(NoAnswer) as raised:
        ask(address, "ping", TIMEOUT_S)
    assert complaint in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_unix_socket_can_be_asked(tmp_path: Path):
    path = str(tmp_path / "socket")
    with pytest.raises(NoAnswer, match="No such file"):
        ask(path, "ping", TIMEOUT_S)
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(path)
        listener.listen()
        with pytest.raises(NoAnswer, match="does not answer"):
            ask(path, "ping", 0.05)
