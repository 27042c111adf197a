"""Answers to commits that the writer thread sends itself."""

import asyncio
import gc
import os
import socket
import weakref
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from zeolith.protocol.codec import encode
from zeolith.protocol.messages import Heartbeat, Message, Reply, Welcome
from zeolith.server import delivery as delivery_module
from zeolith.server import peer as peer_module
from zeolith.server import service as service_module
from zeolith.server.delivery import BYTES_MAX, CHANGES_MAX, Delivery
from zeolith.storage.database import NotCommitted

from ..support.certificates import Authority, context_of
from ..support.gates import Background
from ..support.ids import number, transaction_id
from ..support.inprocess import client_of, serving
from ..support.memory import MemoryClient, MemorySession
from ..support.model import ModelServer
from ..support.records import commit, seen

METADATA: list[Any] = [b"user", b"description", b"", None, " "]
LATEST = b"\x7f" + b"\xff" * 7
OID = number(100)


class Socket:
    """What the writer thread writes to, and what has come out at the other end."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        for end in (self.ours, self.theirs):
            end.setblocking(False)

    def fill(self) -> None:
        """Until no byte more goes into it."""
        for size in (4096, 1):
            with suppress(BlockingIOError):
                while self.ours.send(bytes(size)):
                    continue

    def take(self) -> bytes:
        try:
            return self.theirs.recv(BYTES_MAX)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def sock() -> Iterator[Socket]:
    made = Socket()
    yield made
    made.close()


# What is sent, and by whom


def answer(tid: bytes) -> bytes:
    return b"committed " + tid


def offered(sock: Socket, bytes_max: int = BYTES_MAX) -> Delivery:
    return Delivery(7, sock.ours.fileno(), number(1), answer, bytes_max)


def half(fd: int, data: bytes) -> int:
    return os.write(fd, data[: len(data) // 2])


def test_the_writer_sends_it_once(sock):
    delivery = offered(sock)
    delivery.send(number(2))
    delivery.send(number(2))
    assert sock.take() == answer(number(2))
    assert not delivery.take_back()
    assert delivery.was_sent


def test_what_was_taken_back_is_not_sent(sock):
    delivery = offered(sock)
    assert not delivery.take_back()
    delivery.send(number(2))
    assert not sock.take()
    assert not delivery.was_sent


def test_who_takes_it_back_waits_for_the_end_of_the_send(sock, monkeypatch):
    delivery = offered(sock)
    taking: list[Background] = []

    def write(fd: int, data: bytes) -> int:
        taking.append(Background(delivery.take_back))
        assert not taking[0].returns_soon()
        return half(fd, data)

    monkeypatch.setattr(delivery_module, "os", SimpleNamespace(write=write))
    delivery.send(number(2))
    assert sock.take() + taking[0].result() == answer(number(2))
    assert delivery.was_sent


def test_only_a_tid_after_the_last_one_is_told(sock):
    delivery = offered(sock)
    delivery.send(number(1))
    assert not sock.take()
    assert not delivery.was_sent


def test_what_is_too_long_is_the_loops(sock):
    delivery = offered(sock, len(answer(number(2))) - 1)
    delivery.send(number(2))
    assert not sock.take()
    assert not delivery.was_sent


def test_what_the_buffers_do_not_take_is_the_loops(sock):
    sock.fill()
    delivery = offered(sock)
    delivery.send(number(2))
    assert not delivery.was_sent
    assert not delivery.take_back()


def test_a_client_that_is_gone_is_the_loops_affair(sock):
    sock.theirs.close()
    delivery = offered(sock)
    delivery.send(number(2))
    assert not delivery.was_sent
    assert not delivery.take_back()


def test_the_rest_of_what_was_begun_is_the_loops(sock, monkeypatch):
    monkeypatch.setattr(delivery_module, "os", SimpleNamespace(write=half))
    delivery = offered(sock)
    delivery.send(number(2))
    assert delivery.was_sent
    assert sock.take() + delivery.take_back() == answer(number(2))
    assert not delivery.take_back()


def test_an_answer_that_cannot_be_made_is_the_loops(sock):
    def fail(_tid: bytes) -> bytes:
        raise MemoryError

    delivery = Delivery(7, sock.ours.fileno(), number(1), fail)
    delivery.send(number(2))
    assert not delivery.was_sent


# A server whose loop has not heard of the disk yet


@pytest.fixture
async def server() -> ModelServer:
    server = ModelServer()
    server.database.side_by_side = True
    server.commit(OID, b"old")
    return server


@pytest.fixture
async def session(server: ModelServer) -> MemorySession:
    return MemorySession(server.service)


@pytest.fixture
async def channel(session: MemorySession, sock: Socket) -> MemoryClient:
    return session.channel(sock.ours)


def ask(channel: MemoryClient, id_: int = 1, position: bytes = number(1)) -> int:
    """Commit a change of the object; the number of the request."""
    store = ["store", number(100 + id_), number(0), b"new"]
    return channel.ask("commit", transaction_id(id_), METADATA, [store], position)


def delivered(channel: MemoryClient, sock: Socket) -> list[Message]:
    return list(channel.connection.receive_data(sock.take(), 0))


async def test_a_commit_is_answered_before_the_loop_has_heard(
    server, session, channel, sock
):
    request = ask(channel)
    server.workers.write_unheard()
    (told,) = delivered(channel, sock)
    assert told == Reply(request, ["committed", number(2), [], []])
    assert server.served.changes.last_tid == number(1)
    await asyncio.sleep(0)
    assert server.served.changes.last_tid == number(2)
    assert server.served.counters.commits == 1
    assert not server.committer.holders
    assert not channel.peer.connection.open_requests
    # Nothing is told twice, and the stream need not tell what the answer has told.
    assert not channel.received()
    assert not sock.take()
    assert not session.stream.received()


async def test_what_it_is_seen_by_is_there_before_the_answer(
    server, channel, monkeypatch
):
    def write(_fd: int, data: bytes) -> int:
        assert server.committer.on_disk is not None
        return len(data)

    monkeypatch.setattr(delivery_module, "os", SimpleNamespace(write=write))
    ask(channel)
    await server.workers.work()
    assert not server.committer.broken
    assert not channel.received()


async def test_so_is_the_finish_of_two_steps(server, channel, sock):
    vote = channel.ask("vote", transaction_id(1), METADATA, [])
    assert channel.value(vote) == ["voted", None, []]
    finish = channel.ask("finish", transaction_id(1), number(1))
    server.workers.write_unheard()
    assert delivered(channel, sock) == [Reply(finish, [number(2), []])]


async def test_the_next_one_of_the_same_channel_is_answered_as_well(
    server, channel, sock
):
    for id_ in (1, 2, 3):
        request = ask(channel, id_, number(id_))
        server.workers.write_unheard()
        value = ["committed", number(id_ + 1), [], []]
        assert delivered(channel, sock) == [Reply(request, value)]


async def test_the_answer_tells_what_others_have_changed(server, channel, sock):
    server.commit(number(5), b"others")
    request = ask(channel)
    server.workers.write_unheard()
    (told,) = delivered(channel, sock)
    change = [number(1), number(2), [number(5)], None]
    assert told == Reply(request, ["committed", number(3), [], [change]])


def load(server: ModelServer, session: MemorySession) -> None:
    other = session.channel()
    request = other.ask("load", number(101), LATEST)
    assert other.value(request) == [b"new", number(2), None, number(2)]


def outcome(server: ModelServer, session: MemorySession) -> None:
    other = session.channel()
    request = other.ask("outcome", transaction_id(1), None, number(1))
    assert other.value(request) == ["committed", number(2)]


def changes_since(server: ModelServer, session: MemorySession) -> None:
    other = session.channel()
    request = other.ask("changes_since", number(1))
    change = [number(1), number(2), [number(101)], transaction_id(1)]
    assert other.value(request) == [number(2), [change]]


def hello(server: ModelServer, session: MemorySession) -> None:
    welcome = MemoryClient(server.service).hello()
    assert isinstance(welcome, Welcome)
    assert welcome.fields["last_tid"] == number(2)


def vote(server: ModelServer, session: MemorySession) -> None:
    other = session.channel()
    store = ["store", number(101), number(2), b"newer"]
    request = other.ask("vote", transaction_id(2), METADATA, [store])
    assert other.value(request) == ["voted", None, []]


@pytest.mark.parametrize("look", [load, outcome, changes_since, hello, vote])
async def test_whatever_comes_after_the_answer_finds_it_committed(
    server, session, channel, sock, look
):
    """Whoever was told may have told others, who ask on sockets of their own."""
    ask(channel)
    server.workers.write_unheard()
    assert delivered(channel, sock)
    look(server, session)


async def test_a_socket_that_was_there_before_finds_it_committed(
    server, session, channel, sock
):
    other = session.channel()
    ask(channel)
    server.workers.write_unheard()
    request = other.ask("load", number(101), LATEST)
    assert other.value(request)[0] == b"new"


async def test_the_next_group_may_be_on_the_disk_before_the_loop_hears_of_the_first(
    server, session, channel, sock
):
    first = ask(channel)
    server.workers.write_unheard()
    # It lets the loop catch up before it looks at the second one.
    other = session.channel()
    second = ask(other, 2)
    server.workers.write_unheard()
    await asyncio.sleep(0)
    assert delivered(channel, sock) == [Reply(first, ["committed", number(2), [], []])]
    change = [number(1), number(2), [number(101)], transaction_id(1)]
    assert other.value(second) == ["committed", number(3), [], [change]]
    assert server.served.changes.last_tid == number(3)


# Where the loop answers


async def answered(server: ModelServer, channel: MemoryClient, number_: int) -> Any:
    """The one answer, from the loop."""
    await server.workers.work()
    return channel.value(number_)


async def test_several_are_answered_by_the_loop(server, session, channel, sock):
    """Each of them is told of the others, and the loop is awake anyway."""
    requests = [ask(channel)]
    others = session.channel(sock.ours)
    requests.append(ask(others, 2))
    value = await answered(server, channel, requests[0])
    assert value[:2] == ["committed", number(2)]
    assert others.value(requests[1])[:2] == ["committed", number(3)]
    assert not sock.take()


async def test_what_is_too_long_ago_is_not_told_by_anybody(server, channel, sock):
    request = ask(channel, position=number(77))
    value = await answered(server, channel, request)
    assert value[:2] == ["committed", number(2)]
    assert not sock.take()


async def test_nothing_overtakes_what_waits_for_the_client(server, channel, sock):
    channel.transport.stop_reading()
    ping = channel.ask("ping")
    request = ask(channel)
    await server.workers.work()
    assert not sock.take()
    channel.transport.read_on()
    assert channel.value(ping) is None
    assert channel.value(request)[:2] == ["committed", number(2)]


async def test_a_heartbeat_goes_first_and_leaves_the_answer_to_the_loop(
    server, channel, sock
):
    """The disk is slow, and the client wants to know that the server is there."""
    request = ask(channel)
    now = asyncio.get_running_loop().time()
    writes = channel.transport.writes
    channel.peer.tick(now + server.limits.heartbeat_interval_s)
    assert channel.transport.writes == writes + 1
    server.workers.write_unheard()
    assert not sock.take()
    await asyncio.sleep(0)
    assert channel.value(request)[0] == "committed"


async def test_after_the_last_words_nothing_is_sent(server, session, channel, sock):
    ask(channel)
    channel.peer.hang_up("shutdown", "the server stops")
    server.workers.write_unheard()
    assert not sock.take()
    await server.workers.work()
    assert channel.goodbye().reason == "shutdown"


async def test_nothing_is_written_to_a_descriptor_that_may_be_anothers(
    server, session, channel, sock
):
    ask(channel)
    await channel.lose()
    server.workers.write_unheard()
    assert not sock.take()
    await asyncio.sleep(0)
    assert server.served.changes.last_tid == number(2)


@pytest.mark.parametrize("is_first", [False, True], ids=["answer", "heartbeat"])
async def test_the_rest_of_an_answer_comes_before_anything_else(
    server, channel, sock, monkeypatch, is_first
):
    monkeypatch.setattr(delivery_module, "os", SimpleNamespace(write=half))
    request = ask(channel)
    server.workers.write_unheard()
    if is_first:
        now = asyncio.get_running_loop().time()
        channel.peer.tick(now + server.limits.heartbeat_interval_s)
    await asyncio.sleep(0)
    came = sock.take() + channel.transport.take()
    told = Reply(request, ["committed", number(2), [], []])
    assert (
        channel.connection.receive_data(came, 0) == [told, Heartbeat()][: 1 + is_first]
    )


async def test_who_hung_up_is_not_sent_the_rest(server, channel, sock, monkeypatch):
    monkeypatch.setattr(delivery_module, "os", SimpleNamespace(write=half))
    ask(channel)
    server.workers.write_unheard()
    channel.peer.cut_off()
    await asyncio.sleep(0)
    assert not channel.transport.take()
    assert server.served.changes.last_tid == number(2)
    assert not channel.peer.connection.open_requests


async def test_an_answer_that_the_writer_cannot_make_is_no_disaster(
    server, session, channel, sock, monkeypatch
):
    failing = [True]

    def fail_once(message: Message) -> bytes:
        if failing.pop():
            raise MemoryError
        return encode(message)

    monkeypatch.setattr(service_module, "encode", fail_once)
    request = ask(channel)
    assert (await answered(server, channel, request))[0] == "committed"
    assert not sock.take()
    assert not server.committer.broken


@pytest.mark.parametrize("first", ["finish", "commit"])
async def test_an_answer_is_that_to_the_request_that_committed(
    server, session, channel, sock, first, monkeypatch
):
    """Whoever asks twice is told that the second time was wrong."""
    store = ["store", number(101), number(0), b"new"]
    other = session.channel()
    ask(other, 2)
    if first == "finish":
        vote = channel.ask("vote", transaction_id(1), METADATA, [store])
        assert channel.value(vote) == ["voted", None, []]
        asked = channel.ask("finish", transaction_id(1), number(1))
    else:
        asked = ask(channel)
    again = channel.ask("finish", transaction_id(1), number(1))
    assert channel.failure(again).name == "StorageTransactionError"
    # The other one is on the disk.
    await server.workers.write_step()
    # While the server looks at the next one, it is sent.
    was_delivered = channel.peer.was_delivered

    def too_late(number_: int) -> bool:
        if server.workers.writes_waiting:
            server.workers.write_unheard()
        return was_delivered(number_)

    monkeypatch.setattr(channel.peer, "was_delivered", too_late)
    last = channel.ask("finish", transaction_id(1), number(1))
    assert channel.failure(last).name == "StorageTransactionError"
    await server.workers.work()
    await asyncio.sleep(0)
    came = [*delivered(channel, sock), *channel.received()]
    assert [type(each) for each in came] == [Reply]
    assert came[0].id == asked
    assert channel.connection.is_open


async def test_a_status_says_what_was_answered_before(server, session, channel, sock):
    other = MemoryClient(server.service)
    other.hello(kind="channel", storage=None)
    ask(channel)
    server.workers.write_unheard()
    request = other.ask("status")
    await asyncio.sleep(0)
    await server.workers.read_step()
    status = other.value(request)
    assert status["storages"]["1"]["last_tid"] == number(2).hex()


async def test_who_is_far_behind_is_told_by_the_loop(server, channel, sock):
    for n in range(CHANGES_MAX + 1):
        server.commit(number(1000 + n), b"others")
    request = ask(channel)
    value = await answered(server, channel, request)
    assert len(value[3]) == CHANGES_MAX + 1
    assert not sock.take()


async def test_nothing_is_kept_of_a_channel_that_has_committed(
    server, session, channel, sock
):
    ask(channel)
    await server.workers.work()
    peer = weakref.ref(channel.peer)
    gc.collect()
    gc.disable()
    try:
        await channel.lose()
        channel.transport = None
        del channel.peer
        assert peer() is None
    finally:
        gc.enable()


async def test_a_commit_that_fails_is_told_by_the_loop(server, channel, sock):
    server.database.append_errors[0] = NotCommitted("the disk is full")
    request = ask(channel)
    await server.workers.work()
    assert channel.failure(request).name == "StorageError"
    assert not sock.take()
    server.database.append_errors.clear()
    request = ask(channel, 2)
    server.workers.write_unheard()
    assert len(delivered(channel, sock)) == 1


async def test_a_disaster_is_told_by_the_loop(server, channel, sock):
    request = ask(channel)
    # A clock that was set back, say.
    server.database.last_tid = number(0)
    await server.workers.work()
    assert channel.failure(request).name == "StorageSystemError"
    assert not sock.take()
    assert server.committer.broken


# A real one


@pytest.mark.parametrize("is_secured", [False, True])
def test_a_server_does_so_unless_it_encrypts(tmp_path, monkeypatch, is_secured):
    made = []

    class Watched(Delivery):
        def __init__(self, *args: Any):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(peer_module, "Delivery", Watched)
    of_server, of_client = {}, {}
    if is_secured:
        authority = Authority(tmp_path)
        of_server["tls"] = context_of(authority.sign())
        of_client["tls_ca"] = authority.ca
    with (
        serving(tmp_path / "Data.fs", **of_server) as server,
        client_of(server, **of_client) as storage,
    ):
        for n in range(3):
            commit(storage, x=b"%d" % n)
            assert seen(storage, "x") == b"%d" % n
    assert [each.was_sent for each in made] == ([] if is_secured else [True] * 3)
