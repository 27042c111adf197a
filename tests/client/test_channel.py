"""One socket for calls: what can happen between a request and its answer."""

import socket
import time
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from ZODB.POSException import POSKeyError, ReadOnlyError
from ZODB.utils import p64

from zeolith.client.channel import Channel, limit_silence, shut_down, value_of
from zeolith.client.errors import ChannelLost, ClientDisconnected
from zeolith.protocol.codec import encode
from zeolith.protocol.connection import HEARTBEAT, Connection, Role
from zeolith.protocol.errors import LocalProtocolError
from zeolith.protocol.limits import DEFAULT, Limits
from zeolith.protocol.messages import Failure, Goodbye, Hello, Reply
from zeolith.protocol.methods import hello_fields

from ..support.certificates import Authority, encrypted_pair
from ..support.gates import Background
from ..support.script import IMPATIENT, welcome

OID, TID = p64(1), p64(2)


class Socket:
    """A socket that counts, and that receives at most so many bytes at once."""

    def __init__(self, sock: socket.socket):
        self.sock = sock
        self.sent = self.rcvd = 0
        self.rcvd_bytes_max = 2**20
        # Raised by the next receive or send.
        self.interruption: BaseException | None = None

    def sendall(self, data: bytes) -> None:
        self.sent += 1
        if self.interruption is not None:
            self.sock.sendall(data[: len(data) // 2])
            raise self.interruption
        self.sock.sendall(data)

    def recv(self, size: int) -> bytes:
        self.rcvd += 1
        if self.interruption is not None:
            raise self.interruption
        return self.sock.recv(min(size, self.rcvd_bytes_max))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)


class Ends:
    """A channel and, at the other end of a pair of sockets, the test.

    The numbers of requests are known, so the test sends the answer beforehand.
    """

    def __init__(self, limits: Limits = DEFAULT, authority: Authority | None = None):
        near, self.far = socket.socketpair()
        if authority is not None:
            near, self.far = encrypted_pair(near, self.far, authority)
        self.far.settimeout(30)
        connection = Connection(Role.CLIENT, time.monotonic(), limits)
        self.server = Connection(Role.SERVER, time.monotonic(), limits)
        fields = hello_fields(kind="channel", session=bytes(16))
        (hello,) = self.server.receive_data(connection.hello(fields, 0), 0)
        assert isinstance(hello, Hello)
        connection.receive_data(self.server.welcome(welcome(), 0), 0)
        limit_silence(near, limits.heartbeat_timeout_s)
        self.socket = Socket(near)
        self.connection = connection
        self.channel = Channel(self.socket, connection)  # type: ignore[arg-type]

    def answer(self, value: Any, number: int = 1) -> None:
        self.far.sendall(encode(Reply(number, value)))

    def requests(self) -> list[Any]:
        """What the channel has sent until now."""
        return self.server.receive_data(self.far.recv(2**20), time.monotonic())

    def close(self) -> None:
        self.channel.close()
        self.far.close()


@pytest.fixture(scope="module")
def certified(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certified"))


@pytest.fixture(params=["plain", "tls"])
def authority(request, certified) -> Authority | None:
    """None: the sockets are plain."""
    return certified if request.param == "tls" else None


@pytest.fixture
def ends(authority) -> Iterator[Ends]:
    ends = Ends(authority=authority)
    yield ends
    ends.close()


@pytest.fixture
def impatient(authority) -> Iterator[Ends]:
    """The ends of a channel that does not wait for long."""
    ends = Ends(IMPATIENT, authority)
    yield ends
    ends.close()


def test_a_call_returns_what_the_server_answers(ends):
    ends.answer([b"data", TID, None, TID])
    assert ends.channel.call("load", OID, TID) == [b"data", TID, None, TID]
    ((number, method, args),) = ends.requests()
    assert (number, method, args) == (1, "load", [OID, TID])


def test_a_call_is_one_send_and_one_receive(ends):
    for number in range(1, 11):
        ends.answer(None, number)
        ends.channel.call("ping")
        assert ends.socket.sent == ends.socket.rcvd == number


def test_an_answer_may_come_in_pieces(ends):
    ends.socket.rcvd_bytes_max = 1
    ends.answer(b"data")
    assert ends.channel.call("load_serial", OID, TID) == b"data"


def test_heartbeats_are_no_answers(ends):
    ends.far.sendall(HEARTBEAT + HEARTBEAT)
    ends.answer(b"data")
    assert ends.channel.call("load_serial", OID, TID) == b"data"


def test_an_answer_that_is_none_or_empty_is_an_answer(ends):
    ends.answer(None, 1)
    assert ends.channel.call("ping") is None
    ends.answer([], 2)
    assert ends.channel.call("load_many", [], TID) == []


def test_an_error_of_the_server_is_raised_and_the_channel_goes_on(ends):
    ends.far.sendall(encode(Failure(1, "POSKeyError", {"oid": OID}, "")))
    with pytest.raises(POSKeyError) as caught:
        ends.channel.call("load", OID, TID)
    assert caught.value.args == (OID,)
    ends.far.sendall(encode(Failure(2, "ReadOnlyError", {}, "not here")))
    with pytest.raises(ReadOnlyError, match="not here"):
        ends.channel.call("new_oids", 1)
    assert not ends.channel.is_lost
    assert not ends.channel.is_busy
    ends.answer(None, 3)
    ends.channel.call("ping")


def test_a_relay_without_its_server_is_no_better_than_no_server(ends):
    ends.far.sendall(encode(Failure(1, "Unavailable", {}, "it is away")))
    with pytest.raises(ClientDisconnected, match="it is away"):
        ends.channel.call("ping")
    assert not ends.channel.is_lost


def test_what_cannot_be_sent_is_a_mistake_and_the_channel_goes_on(ends):
    with pytest.raises(TypeError):
        ends.channel.call("load", object(), TID)
    with pytest.raises(OverflowError):
        ends.channel.call("history", OID, 2**64)
    assert ends.socket.sent == 0
    assert not ends.channel.is_busy
    ends.answer(None)
    ends.channel.call("ping")


def test_what_is_too_large_for_the_wire_is_not_sent():
    ends = Ends(Limits(frame_bytes_max=2**20, batch_bytes_max=2**20))
    with pytest.raises(LocalProtocolError, match="too large"):
        ends.channel.call("stage", bytes(16), [["store", OID, TID, bytes(2**20)]])
    assert ends.socket.sent == 0
    assert not ends.channel.is_busy
    ends.answer(None)
    ends.channel.call("ping")
    ends.close()


# The channel is lost


def lost(ends: Ends, match: str) -> None:
    with pytest.raises(ChannelLost, match=match):
        ends.channel.call("ping")
    assert ends.channel.is_lost
    assert ends.socket.sock.fileno() == -1, "the socket is still open"


def test_a_server_that_says_nothing_is_not_waited_for(impatient):
    lost(impatient, r"silent for 0\.2 s")


def test_a_server_that_only_beats_is_waited_for():
    """A call takes as long as it takes; the heartbeats say that somebody is there."""
    ends = Ends(Limits(heartbeat_interval_s=0.3, heartbeat_timeout_s=1))
    calling = Background(ends.channel.call, "ping")
    # Together they last for longer than the silence that is allowed.
    for _ in range(15):
        assert not calling.returns_soon()
        ends.far.sendall(HEARTBEAT)
    ends.answer(b"late")
    assert calling.result() == b"late"
    ends.close()


def test_a_server_that_reads_nothing_is_not_waited_for(impatient):
    with pytest.raises(ChannelLost, match="silent"):
        impatient.channel.send(bytes(2**24))
    assert impatient.channel.is_lost


def test_the_end_of_the_connection_is_noticed(ends):
    ends.far.shutdown(socket.SHUT_WR)
    lost(ends, "closed the connection")


@pytest.mark.parametrize("size_bytes", range(1, 13))
def test_an_answer_that_is_cut_off_is_none(ends, size_bytes):
    answer = encode(Reply(1, b"data"))
    assert len(answer) == 13
    ends.far.sendall(answer[:size_bytes])
    ends.far.shutdown(socket.SHUT_WR)
    lost(ends, "closed the connection")


def test_a_broken_connection_is_noticed(ends):
    ends.far.close()
    lost(ends, "Broken pipe|reset|server closed the connection")


def test_garbage_ends_the_channel(ends):
    ends.far.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    lost(ends, "a frame of 1213486160 bytes")


def test_an_answer_to_another_question_ends_the_channel(ends):
    ends.answer(b"data", 2)
    lost(ends, "an answer to request 2, never asked")


def test_a_goodbye_says_why(ends):
    ends.far.sendall(encode(Goodbye("stopping", "the server is stopping")))
    lost(ends, "the server is stopping")


def test_a_goodbye_behind_an_answer_is_heard_by_the_next_call(ends):
    goodbye = encode(Goodbye("stopping", "the server is stopping"))
    ends.far.sendall(encode(Reply(1, b"data")) + goodbye)
    assert ends.channel.call("load_serial", OID, TID) == b"data"
    lost(ends, "the server is stopping")
    assert ends.socket.sent == 1


def test_a_server_that_could_not_understand_us_is_not_asked_again(ends):
    """It is no lost connection: to say the same once more would not help."""
    ends.far.sendall(encode(Goodbye("protocol", "load: oid must be oid, not bytes")))
    with pytest.raises(LocalProtocolError, match="oid must be oid"):
        ends.channel.call("load", OID, TID)
    assert ends.channel.is_lost


@pytest.mark.parametrize("send", ["send", "send_patiently", "call"])
def test_a_server_that_has_enough_is_understood_while_it_is_sent_to(ends, send):
    """What it said lies in our buffers when it reads no more."""
    text = "the blobs of the transaction have more than 1 byte"
    ends.far.sendall(HEARTBEAT + encode(Goodbye("protocol", text)))
    data = bytes(2**24)
    arguments = ("stage", bytes(16), [data]) if send == "call" else (data,)
    sending = Background(getattr(ends.channel, send), *arguments)
    # It has begun.
    assert ends.far.recv(1)
    ends.far.close()
    error = sending.error()
    assert isinstance(error, LocalProtocolError)
    assert str(error) == text
    assert ends.channel.is_lost


def test_a_message_without_an_answer_is_only_sent(ends):
    ends.channel.send(encode(Goodbye("", "")))
    assert (ends.socket.sent, ends.socket.rcvd) == (1, 0)


def test_a_message_without_an_answer_may_find_the_channel_lost(ends):
    ends.far.close()
    with pytest.raises(ChannelLost):
        ends.channel.send(bytes(100))
    assert ends.channel.is_lost


# Other threads, and signals


def test_another_thread_can_wake_the_one_that_waits(ends):
    calling = Background(ends.channel.call, "ping")
    assert not calling.returns_soon()
    ends.channel.shut()
    assert ends.channel.is_lost
    error = calling.error()
    assert isinstance(error, ChannelLost)
    assert "silent" not in str(error), "it was not woken"


def test_an_interrupted_call_leaves_the_channel_busy(ends):
    """The answer is still to come; nobody may take it for the answer to his call."""
    ends.answer(b"to the interrupted call", 1)
    ends.answer(b"to the next call", 2)
    ends.socket.interruption = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        ends.channel.call("load_serial", OID, TID)
    assert ends.channel.is_busy


def test_a_message_that_was_sent_by_half_ends_the_channel(ends):
    """The server waits for the other half, and would take anything for it."""
    ends.socket.interruption = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        ends.channel.send(bytes(100))
    assert ends.channel.is_lost


def test_closing_and_shutting_twice_does_no_harm(ends):
    ends.channel.shut()
    ends.channel.shut()
    ends.channel.close()
    ends.channel.shut()
    ends.channel.close()
    assert ends.channel.is_lost


# Sockets


@pytest.mark.parametrize("timeout_s", [0.05, 0.999999, 1, 2.5, 20])
def test_the_kernel_counts_the_silence(timeout_s):
    near, far = socket.socketpair()
    with near, far:
        near.settimeout(5)
        limit_silence(near, timeout_s)
        assert near.gettimeout() is None, "Python polls before every receive"
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            raw = near.getsockopt(socket.SOL_SOCKET, option, 16)
            seconds, microseconds = (
                int.from_bytes(raw[:8], "little"),
                int.from_bytes(raw[8:], "little"),
            )
            counted_s = seconds + microseconds / 1_000_000
            # The kernel counts in ticks.
            assert timeout_s - 0.001 <= counted_s <= timeout_s + 0.02


def test_silence_ends_a_receive():
    near, far = socket.socketpair()
    with near, far:
        limit_silence(near, 0.05)
        with pytest.raises(BlockingIOError):
            near.recv(1)


def test_a_socket_that_is_not_connected_or_closed_can_be_shut_down():
    sock = socket.socket()
    shut_down(sock)
    sock.close()
    shut_down(sock)


def test_a_question_and_its_answer_may_lie_apart(ends):
    ends.channel.ask("ping")
    (request,) = ends.requests()
    assert request.method == "ping"
    assert ends.channel.is_busy
    ends.answer("later")
    assert ends.channel.answer() == "later"
    assert not ends.channel.is_busy


# Several questions at a time


def serials(ends: Ends, count: int, ahead: int) -> Generator[Any, None, None]:
    calls = ((p64(n), TID) for n in range(count))
    yield from ends.channel.answers("load_serial", calls, ahead)


def test_answers_come_in_the_order_of_the_questions(ends):
    answers = serials(ends, 5, 3)
    for number in (2, 3, 1):
        ends.answer(number, number)
    assert [next(answers) for _ in range(3)] == [1, 2, 3]
    for number in (5, 4):
        ends.answer(number, number)
    assert list(answers) == [4, 5]
    asked = ends.requests()
    while len(asked) < 5:
        asked += ends.requests()
    assert [request.args for request in asked] == [[p64(n), TID] for n in range(5)]
    assert not ends.channel.is_busy


def test_no_more_than_so_many_questions_are_on_their_way(ends):
    answers = serials(ends, 5, 2)
    ends.answer(1, 1)
    assert next(answers) == 1
    assert len(ends.requests()) == 2
    ends.answer(2, 2)
    assert next(answers) == 2
    assert len(ends.requests()) == 1


def test_questions_that_need_not_wait_leave_together(ends):
    """Nothing was answered yet when the last of them is on its way."""
    calling = Background(list, serials(ends, 5, 5))
    asked = ends.requests()
    assert [request.args[0] for request in asked] == [p64(n) for n in range(5)]
    assert ends.socket.sent == 1
    for number in range(1, 6):
        ends.answer(number, number)
    assert calling.result() == [1, 2, 3, 4, 5]


def test_no_question_has_no_answer(ends):
    assert list(serials(ends, 0, 3)) == []
    assert not ends.channel.is_busy


def test_an_error_ends_the_answers_and_leaves_the_channel_busy(ends):
    ends.answer(1, 1)
    ends.far.sendall(encode(Failure(2, "POSKeyError", {"oid": OID}, "")))
    answers = serials(ends, 3, 3)
    with pytest.raises(POSKeyError):
        list(answers)
    assert ends.channel.is_busy


def test_answers_that_nobody_takes_leave_the_channel_busy(ends):
    ends.answer(1, 1)
    answers = serials(ends, 3, 3)
    assert next(answers) == 1
    answers.close()
    assert ends.channel.is_busy


@pytest.mark.parametrize("before", [0, 1, 2])
def test_answers_end_with_the_connection(ends, before):
    for number in range(1, before + 1):
        ends.answer(number, number)
    ends.far.shutdown(socket.SHUT_WR)
    came: list[int] = []
    with pytest.raises(ChannelLost):
        came.extend(serials(ends, 5, 3))
    assert ends.channel.is_lost


def test_a_goodbye_among_the_answers_is_the_reason(ends):
    ends.answer(1, 1)
    ends.far.sendall(ends.server.goodbye("stopping", "the server is stopping", 0))
    answers = serials(ends, 3, 2)
    assert next(answers) == 1
    with pytest.raises(ChannelLost, match="stopping"):
        next(answers)


# Calls that are asked for together


def failing(number: int) -> bytes:
    return encode(Failure(number, "POSKeyError", {"oid": OID}, ""))


def test_several_calls_are_one_send_and_one_receive(ends):
    requests, numbers = ends.channel.requests("load", [(OID, TID), (TID, TID)])
    assert numbers == [1, 2]
    ends.far.sendall(
        b"".join(encode(Reply(number, [b"data", TID, None, TID])) for number in (2, 1))
    )
    sent, rcvd = ends.socket.sent, ends.socket.rcvd
    answers, took_s, regained_s = ends.channel.exchange(requests)
    assert [answer.id for answer in answers] == [2, 1]
    assert [value_of(answer)[0] for answer in answers] == [b"data"] * 2
    assert took_s >= 0
    assert regained_s == 0, "it is not known"
    assert (ends.socket.sent, ends.socket.rcvd) == (sent + 1, rcvd + 1)
    assert not ends.channel.is_busy
    assert [request[1:] for request in ends.requests()] == [
        ("load", [OID, TID]),
        ("load", [TID, TID]),
    ]


def test_answers_that_come_in_pieces_are_put_together(ends):
    answer = [b"data", TID, None, TID]
    cut = bytes_of_all = 0
    while cut <= bytes_of_all:
        cut += 1
        requests, numbers = ends.channel.requests("load", [(OID, TID)] * 3)
        whole = b"".join(encode(Reply(number, answer)) for number in numbers)
        bytes_of_all = len(whole)
        ends.far.sendall(whole[:cut])
        answers = ends.channel.exchange(requests)[0]
        ends.far.sendall(whole[cut:])
        while len(answers) < 3:
            answers += ends.channel.more_answers()
        assert [value_of(each) for each in answers] == [answer] * 3
        assert not ends.channel.is_busy
        assert len(ends.requests()) == 3


def test_a_failure_is_one_of_the_answers(ends):
    requests, _numbers = ends.channel.requests("load", [(OID, TID)] * 2)
    ends.far.sendall(failing(1) + encode(Reply(2, [b"data", TID, None, TID])))
    failed, answered = ends.channel.exchange(requests)[0]
    with pytest.raises(POSKeyError):
        value_of(failed)
    assert value_of(answered)[0] == b"data"


def test_answers_before_the_end_count(ends):
    requests, _numbers = ends.channel.requests("load", [(OID, TID)] * 2)
    goodbye = encode(Goodbye("stopping", "the server stops"))
    ends.far.sendall(encode(Reply(1, [b"data", TID, None, TID])) + goodbye)
    (answer,) = ends.channel.exchange(requests)[0]
    assert value_of(answer)[0] == b"data"
    with pytest.raises(ChannelLost, match="the server stops"):
        ends.channel.more_answers()


def test_an_end_without_an_answer_is_an_error(ends):
    requests, _numbers = ends.channel.requests("load", [(OID, TID)])
    shut_down(ends.far)
    with pytest.raises(ChannelLost):
        ends.channel.exchange(requests)
    assert ends.channel.is_lost


def test_a_silent_server_is_lost_in_the_middle_of_the_answers(impatient):
    requests, _numbers = impatient.channel.requests("load", [(OID, TID)] * 2)
    impatient.answer([b"data", TID, None, TID])
    impatient.channel.exchange(requests)
    with pytest.raises(ChannelLost, match="silent"):
        impatient.channel.more_answers()


def test_a_heartbeat_is_no_answer(ends):
    requests, _numbers = ends.channel.requests("load", [(OID, TID)])
    ends.far.sendall(HEARTBEAT)
    assert ends.channel.exchange(requests)[0] == []
    ends.answer([b"data", TID, None, TID])
    assert len(ends.channel.more_answers()) == 1
