"""The way to a server: addresses, the hello, refusals."""

import errno
import itertools
import os
import re
import socket
import ssl
import struct
import threading
from contextlib import closing
from typing import Any

import pytest
from ZODB.utils import p64

from zeolith.client import dial as dial_module
from zeolith.client import forks
from zeolith.client.dial import (
    RETRY_FIRST_S,
    RETRY_MAX_S,
    Reached,
    TurnedAway,
    Wish,
    delays,
    dial,
    dial_any,
    dial_channel,
    has_no_place,
    has_none_left,
    is_locked_out,
    is_refusal,
)
from zeolith.protocol.codec import encode
from zeolith.protocol.connection import SocketKind, State
from zeolith.protocol.credentials import Given
from zeolith.protocol.errors import HelloRefused, RemoteProtocolError, ZeolithError
from zeolith.protocol.limits import DEFAULT, Limits
from zeolith.protocol.login import NO_CREDENTIALS, LoginError, Password
from zeolith.protocol.messages import Goodbye, Heartbeat, Notice, Reply, Welcome
from zeolith.protocol.methods import HELLO, VERSION, check_fields
from zeolith.protocol.tls import ClientTls, HandshakeFailed

from ..support.certificates import Authority
from ..support.gates import Background
from ..support.identities import PASSWORD, access
from ..support.inprocess import serving
from ..support.script import (
    IMPATIENT,
    Act,
    Cut,
    Held,
    Raw,
    refused_address,
    scripted,
    tid,
    welcome,
)
from ..support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

WISH = Wish("main", False, None, None, None, None)


def reach(address: Any, limits: Limits = DEFAULT, wish: Wish = WISH) -> dict[str, Any]:
    """The fields of the welcome; the socket is closed again."""
    reached = dial(address, wish, limits)
    reached.socket.close()
    return reached.welcome


# The hello of a stream


def test_the_hello_says_what_the_client_wishes(server):
    wish = Wish("main", True, "web-1", b"d" * 16, 7, tid(5))
    reach(server.address, wish=wish)
    (hello,) = server.hellos
    check_fields("Hello", hello, HELLO)
    assert hello == {
        "version": VERSION,
        "capabilities": [],
        "kind": "stream",
        "storage": "main",
        "database_id": b"d" * 16,
        "epoch": 7,
        "position": tid(5),
        "read_only": True,
        "label": "web-1",
        "session": None,
        "login": None,
    }


def test_the_welcome_is_handed_on(server):
    server.hello = {"name": "Data.fs", "last_tid": tid(9)}
    with closing(dial(server.address, WISH, DEFAULT).socket):
        pass
    assert reach(server.address)["last_tid"] == tid(9)
    assert reach(server.address)["name"] == "Data.fs"


def test_a_stream_is_open_after_the_welcome(server):
    reached = dial(server.address, WISH, DEFAULT)
    with reached.socket:
        assert reached.address == server.address
        assert reached.connection.state is State.STREAM
        assert reached.early == []


def test_what_comes_right_behind_the_welcome_is_not_lost(server):
    """Both in one piece: the first changes are there before anybody listens."""
    change = [tid(1), tid(2), [p64(1)], None]
    notice = Notice("changes", [[change]])
    fields = welcome(session=bytes(16))
    server.hello = Raw(encode(Welcome(fields)) + encode(notice) + encode(Heartbeat()))
    reached = dial(server.address, WISH, DEFAULT)
    reached.socket.close()
    assert reached.early == [notice, Heartbeat()]


def test_a_welcome_may_come_in_pieces(server):
    message = encode(Welcome(welcome(session=bytes(16))))
    go_on = threading.Event()

    def first_half() -> Held:
        server.peers[-1].send(message[:20])
        return Held(go_on, Raw(message[20:]))

    server.hello = first_half
    dialling = Background(reach, server.address)
    wait_until(lambda: server.hellos, "the hello")
    go_on.set()
    assert dialling.result()["name"] == "scripted"


def test_a_unix_socket_is_an_address(tmp_path):
    with scripted(tmp_path / "socket") as server:
        reached = dial(server.address, WISH, DEFAULT)
        with reached.socket:
            assert reached.socket.family == socket.AF_UNIX


def test_a_unix_socket_stays_plain(tmp_path):
    tls = ClientTls(ssl.create_default_context())
    with scripted(tmp_path / "socket") as server:
        reached = dial(server.address, WISH, DEFAULT, tls)
        assert type(reached.socket) is socket.socket
        reached.socket.close()


def test_small_messages_are_not_held_back(server):
    reached = dial(server.address, WISH, DEFAULT)
    with reached.socket as sock:
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# A channel


def test_a_channel_joins_the_session_by_its_token(server):
    server.answers["ping"] = b"pong"
    channel = dial_channel(server.address, b"t" * 16, DEFAULT)
    assert channel.call("ping") == b"pong"
    channel.close()
    (hello,) = server.hellos
    check_fields("Hello", hello, HELLO)
    assert (hello["kind"], hello["session"]) == ("channel", b"t" * 16)
    assert hello["position"] is None


def test_a_channel_has_the_limit_of_silence_and_not_that_of_the_hello():
    limits = Limits(
        heartbeat_interval_s=0.05, heartbeat_timeout_s=60, hello_timeout_s=0.5
    )
    answer_late = threading.Event()
    with scripted(answers={"ping": Held(answer_late)}) as server:
        channel = dial_channel(server.address, bytes(16), limits)
        calling = Background(channel.call, "ping")
        for _ in range(7):
            assert not calling.returns_soon()
        answer_late.set()
        calling.result()
        channel.close()


# Refusals


@pytest.mark.parametrize("reason", HelloRefused.REFUSALS)
def test_a_refusal_says_why(server, reason):
    server.hello = HelloRefused(reason, "not today")
    with pytest.raises(HelloRefused, match="not today") as caught:
        reach(server.address)
    assert caught.value.reason == reason


def test_a_refused_channel_says_why(server):
    server.channel_hello = HelloRefused("session", "the session has ended")
    with pytest.raises(HelloRefused, match="the session has ended"):
        dial_channel(server.address, bytes(16), DEFAULT)


def test_a_server_of_another_version_is_refused_by_us_too(server):
    """It says so itself; what it says is enough to know."""
    server.hello = HelloRefused("version", "this server speaks version 2")
    with pytest.raises(HelloRefused, match="version 2"):
        reach(server.address)


@pytest.mark.parametrize(
    ("error", "is_final"),
    [
        (HelloRefused("storage", "there is no storage 'main'"), True),
        (HelloRefused("version", "too old"), True),
        (HelloRefused("read-only", "no writes here"), True),
        (HelloRefused("stopping", "the server is stopping"), False),
        (ConnectionRefusedError(), False),
        (TimeoutError(), False),
        (RemoteProtocolError("garbage"), True),
        (HandshakeFailed("not trusted"), True),
        (None, False),
    ],
)
def test_only_some_errors_are_there_for_good(error, is_final):
    assert is_refusal(error) is is_final


# No server, or a strange one


def test_nobody_listens():
    with pytest.raises(ConnectionRefusedError):
        reach(refused_address())


def test_no_socket_has_that_path(tmp_path):
    with pytest.raises(FileNotFoundError):
        reach(str(tmp_path / "socket"))


def test_a_path_that_is_too_long_is_an_error_of_the_system(tmp_path):
    with pytest.raises(OSError, match="too long"):
        reach(str(tmp_path / ("x" * 200)))


def test_a_server_that_says_nothing_is_given_up():
    with (
        scripted(hello=Act.FREEZE) as server,
        pytest.raises(TimeoutError, match=r"did not answer the hello within 0\.2 s"),
    ):
        reach(server.address, IMPATIENT)


def test_a_server_that_hangs_up_is_given_up(server):
    server.hello = Act.HANG_UP
    with pytest.raises(OSError, match=r"at the hello|reset"):
        reach(server.address)


def test_a_server_that_says_goodbye_may_be_tried_again(server):
    """It is at its end, or has too many clients."""
    server.hello = Raw(encode(Goodbye("stopping", "the server is stopping")))
    with pytest.raises(ConnectionResetError, match="the server is stopping"):
        reach(server.address)


def test_a_server_that_has_no_place_says_so(server):
    """It may have later, so it is no refusal."""
    text = "more than 2 connections (connections_max)"
    server.hello = Raw(encode(Goodbye("limit", text)))
    with pytest.raises(TurnedAway, match=re.escape(text)) as raised:
        reach(server.address)
    assert has_no_place(raised.value)
    assert not is_refusal(raised.value)
    assert has_no_place(HelloRefused("limit", "more than 8 channels"))
    for other in (HelloRefused("session", "it ended"), ConnectionResetError("reset")):
        assert not has_no_place(other)


@pytest.mark.parametrize(
    ("credentials", "tls", "is_protected"),
    [
        (NO_CREDENTIALS, None, False),
        (NO_CREDENTIALS, ClientTls(ssl.create_default_context()), True),
        (Password("ann", Given(PASSWORD)), None, True),
    ],
)
def test_nobody_forks_while_openssl_is_at_work(
    monkeypatch, credentials, tls, is_protected
):
    """A child would wait for ever for a lock that a thread of its parent's holds."""
    under_way = []

    def introduce(*_args: Any) -> None:
        under_way.append(forks._handshakes._under_way)

    monkeypatch.setattr(dial_module, "_connect", lambda _address: None)
    monkeypatch.setattr(dial_module, "_introduce", introduce)
    dial(("127.0.0.1", 1), WISH._replace(credentials=credentials), DEFAULT, tls)
    assert under_way == [int(is_protected)]
    assert not forks._handshakes._under_way


@pytest.mark.parametrize(
    "number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM]
)
def test_sockets_that_are_not_to_be_had_here_are_no_refusal(number):
    error = OSError(number, os.strerror(number))
    assert has_none_left(error)
    assert not has_no_place(error)
    assert not is_refusal(error)
    for other in (ConnectionRefusedError(errno.ECONNREFUSED, "no"), TimeoutError("no")):
        assert not has_none_left(other)


@pytest.mark.parametrize("way", ["plain", "tls"])
def test_who_is_turned_away_before_he_said_anything_hears_it(
    way, tmp_path, monkeypatch
):
    tls = Authority(tmp_path).trusting() if way == "tls" else None
    connect = dial_module._connect

    def close_after_a_byte(accepted: socket.socket) -> None:
        assert accepted.recv(1)
        accepted.close()

    def connect_and_be_turned_away(address: Any) -> socket.socket:
        sock = connect(address)
        accepted, _address = listener.accept()
        # A reset, as for whoever sends to a socket that is closed.
        reset = struct.pack("ii", 1, 0)
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        if tls is None:
            accepted.sendall(encode(Goodbye("limit", "too many (connections_max)")))
            accepted.close()
        else:
            Background(close_after_a_byte, accepted)
        return sock

    monkeypatch.setattr(dial_module, "_connect", connect_and_be_turned_away)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(TurnedAway, match="connections_max" if tls is None else "TLS"),
    ):
        dial(listener.getsockname(), WISH, DEFAULT, tls)


def test_a_server_that_is_none_is_given_up(server):
    server.hello = Raw(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(RemoteProtocolError, match="a frame of 1213486160 bytes"):
        reach(server.address)


def test_a_server_that_answers_what_was_not_asked_is_given_up(server):
    server.hello = Raw(encode(Reply(1, None)))
    with pytest.raises(RemoteProtocolError, match="not expected"):
        reach(server.address)


def test_a_welcome_of_the_wrong_shape_is_given_up(server):
    server.hello = {"last_tid": 17}
    with pytest.raises(RemoteProtocolError, match="last_tid"):
        reach(server.address)


@pytest.mark.parametrize("size_bytes", [0, 1, 4, 5, 100])
def test_a_welcome_that_is_cut_off_is_given_up(server, size_bytes):
    server.hello = Cut(size_bytes)
    with pytest.raises(OSError, match=r"at the hello|reset"):
        reach(server.address)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="it needs /proc")
@pytest.mark.parametrize(
    "hello",
    [
        Act.FREEZE,
        Act.HANG_UP,
        Raw(b"garbage, and more of it"),
        HelloRefused("storage", "no"),
        {"last_tid": 17},
    ],
)
def test_a_dial_that_fails_leaves_no_socket_open(hello):
    with scripted(hello=hello) as server:
        before = open_files()
        with pytest.raises((OSError, ZeolithError)):
            reach(server.address, IMPATIENT)
        # The server's end is closed a moment later.
        wait_until(lambda: open_files() == before, "the end of both sockets")


def test_an_interrupted_dial_closes_its_socket(server, monkeypatch):
    """An unclosed socket would be an error, see nothing_left_behind."""

    def interrupt(*_args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dial_module, "_await_welcome", interrupt)
    with pytest.raises(KeyboardInterrupt):
        reach(server.address)


# Several addresses


def reach_any(addresses: list[Any], limits: Limits = DEFAULT) -> Reached:
    reached = dial_any(addresses, WISH, limits)
    reached.socket.close()
    return reached


def test_of_several_addresses_the_one_that_answers_is_taken(server):
    addresses = [refused_address(), server.address, refused_address()]
    assert reach_any(addresses).address == server.address


def test_a_server_that_refuses_does_not_keep_us_from_another(server):
    with scripted(hello=HelloRefused("storage", "no")) as other:
        assert reach_any([other.address, server.address]).address == server.address
        assert reach_any([server.address, other.address]).address == server.address


def test_of_several_that_accept_one_is_taken_and_the_others_are_left(server):
    with scripted() as other:
        reached = dial_any([server.address, other.address], WISH, DEFAULT)
        with reached.socket:
            wait_until(
                lambda: len(server.streams() + other.streams()) == 1,
                "the end of the stream that was not taken",
            )
            (stream,) = server.streams() + other.streams()
            assert stream.server.address == reached.address


def test_no_server_at_any_address():
    with pytest.raises(ConnectionRefusedError):
        reach_any([refused_address(), refused_address()])


def test_a_refusal_tells_more_than_an_absence(server):
    server.hello = HelloRefused("storage", "there is no storage 'main' here")
    away = refused_address()
    for addresses in ([server.address, away], [away, server.address]):
        with pytest.raises(HelloRefused, match="no storage 'main'"):
            reach_any(addresses)


def test_a_refusal_is_not_forgotten_for_an_absence_that_comes_later(server):
    server.hello = HelloRefused("storage", "there is no storage 'main' here")
    hang_up = threading.Event()
    with scripted(hello=Held(hang_up, Act.HANG_UP)) as late:
        dialling = Background(reach_any, [server.address, late.address])
        wait_until(lambda: server.hellos and not server.peers, "the refusal")
        hang_up.set()
        assert isinstance(dialling.error(), HelloRefused)


@pytest.mark.parametrize("order", [1, -1])
def test_a_server_that_says_nothing_holds_up_nobody(server, order):
    """The other one has answered; nothing is gained by waiting for this one."""
    with scripted(hello=Act.FREEZE) as silent:
        dialling = Background(reach_any, [silent.address, server.address][::order])
        wait_until(lambda: silent.hellos and server.hellos, "both hellos")
        assert dialling.result().address == server.address
        # Or the other one was waited for until its time was up.
        assert silent.peers, "the silent server was waited for"


def test_one_that_accepts_too_late_is_left():
    """Its socket is closed by the thread that dialled it."""
    accept = threading.Event()
    with scripted() as server, scripted(hello=Held(accept)) as late:
        dialling = Background(reach_any, [late.address, server.address])
        assert dialling.result().address == server.address
        accept.set()
        wait_until(lambda: not late.peers, "the end of the late stream")


# How often


def test_waits_grow_and_are_bounded_and_never_in_step():
    waits = list(itertools.islice(delays(), 100))
    assert RETRY_FIRST_S / 2 <= waits[0] <= RETRY_FIRST_S
    assert all(0 < wait <= RETRY_MAX_S for wait in waits)
    assert all(wait >= RETRY_MAX_S / 2 for wait in waits[10:])
    assert len(set(waits)) == 100
    for wait, two_later in zip(waits, waits[2:6], strict=False):
        assert two_later > wait


def test_every_storage_has_waits_of_its_own():
    assert list(itertools.islice(delays(), 5)) != list(itertools.islice(delays(), 5))


def test_the_scripted_server_says_what_a_server_says(server):
    """Or these tests would test nothing."""
    reach(server.address)
    assert SocketKind(server.hellos[0]["kind"]) is SocketKind.STREAM


# Login


def test_a_password_is_proved_on_the_way_to_the_welcome(tmp_path):
    with serving(tmp_path / "Data.fs", access=access(ann="write")) as server:
        secret = Password("ann", Given(PASSWORD))
        welcome = reach(
            server.address, wish=Wish("1", False, None, None, None, None, secret)
        )
        assert welcome["roles"] == ["read", "write"]
        assert welcome["proof"].startswith("v=")
        wrong = Password("ann", Given("guessed"))
        with pytest.raises(HelloRefused, match="the login failed") as raised:
            reach(server.address, wish=Wish("1", False, None, None, None, None, wrong))
        assert is_refusal(raised.value)
        assert is_locked_out(raised.value)


def test_a_server_that_welcomes_without_asking_is_not_believed(server):
    """It may be somebody in between, who wants to be given data."""
    wish = WISH._replace(credentials=Password("ann", Given(PASSWORD)))
    with pytest.raises(LoginError, match="it is not the server"):
        reach(server.address, wish=wish)


@pytest.mark.parametrize(
    ("error", "locked_out"),
    [
        (HelloRefused("login", "no"), True),
        (HelloRefused("access", "no"), True),
        (HelloRefused("stopping", "later"), False),
        (LoginError("no file"), True),
        (ConnectionRefusedError(), False),
    ],
)
def test_who_is_not_known_does_not_hurry(error, locked_out):
    assert is_locked_out(error) is locked_out
