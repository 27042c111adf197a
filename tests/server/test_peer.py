import asyncio
import os
import socket
from dataclasses import replace

import pytest

from zeolith.protocol.codec import encode
from zeolith.protocol.connection import HEARTBEAT
from zeolith.protocol.frames import frame
from zeolith.protocol.messages import (
    Failure,
    Goodbye,
    Heartbeat,
    Hello,
    Notice,
    Reply,
    Request,
    Welcome,
)
from zeolith.server.listener import Listener
from zeolith.server.peer import Peer
from zeolith.server.turns import clock
from zeolith.storage.changes import Changes

from ..support.ids import number, transaction_id
from ..support.memory import UNHURRIED, MemoryClient, MemorySession, hello_fields
from ..support.model import ModelServer

OID = number(1)
LIMITS = replace(
    UNHURRIED,
    frame_bytes_max=64 * 1024,
    batch_bytes_max=32 * 1024,
    lag_bytes_max=8 * 1024,
    output_bytes_max=16 * 1024,
    requests_open_max=4,
)
HELLO = encode(Hello(hello_fields(kind="channel", storage=None)))


@pytest.fixture
async def server() -> ModelServer:
    server = ModelServer(limits=LIMITS)
    server.commit(OID, b"data")
    return server


@pytest.fixture
async def session(server: ModelServer) -> MemorySession:
    return MemorySession(server.service, LIMITS)


@pytest.fixture
async def channel(session: MemorySession) -> MemoryClient:
    return session.channel()


def now() -> float:
    return asyncio.get_running_loop().time()


# Bytes in, bytes out


async def test_a_request_is_answered(channel):
    request = channel.ask("load", OID, number(2))
    assert channel.value(request) == [b"data", number(1), None, number(1)]


async def test_messages_may_be_cut_anywhere(channel):
    data = channel.connection.request("ping", [], now())
    for byte in data:
        channel.send(bytes([byte]))
    assert channel.value(1) is None


async def test_the_answers_to_one_batch_leave_in_one_write(channel):
    requests = [channel.connection.request("ping", [], now()) for _ in range(4)]
    writes = channel.transport.writes
    channel.send(b"".join(requests))
    assert channel.transport.writes == writes + 1
    assert channel.received() == [Reply(n, None) for n in (1, 2, 3, 4)]


async def test_an_answer_that_comes_later_finds_its_request(server, channel):
    slow = channel.ask("get_tid", OID)
    fast = channel.ask("ping")
    assert channel.value(fast) is None
    assert channel.answer(slow) is None
    await server.workers.read_step()
    assert channel.value(slow) == number(1)


async def test_an_answer_for_a_socket_that_is_gone_goes_nowhere(server, channel):
    channel.ask("get_tid", OID)
    channel.ask("get_tid", number(9))
    await channel.lose()
    await server.workers.work()
    assert not channel.received()


async def test_an_answer_that_is_too_large_for_the_wire_is_a_failure(server, channel):
    server.commit(OID, bytes(LIMITS.frame_bytes_max))
    request = channel.ask("load", OID, number(9))
    assert "too large" in channel.failure(request).text
    assert channel.value(channel.ask("ping")) is None


# Offences: the reason is told, that one socket ends, and nobody else is disturbed


def store(size: int) -> list[object]:
    return ["store", OID, number(1), bytes(size)]


def request_of(method: str, *args: object, id_: int = 1) -> bytes:
    return encode(Request(id_, method, list(args)))


OFFENCES = {
    "an unknown method": (request_of("explode"), "there is no method 'explode'"),
    "a method of the server's": (
        encode(Notice("changes", [[]])),
        "changes is not sent by the server",
    ),
    "a request that is a notice": (
        request_of("stage", transaction_id(1), []),
        "there is no method 'stage'",
    ),
    "a notice that is a request": (
        encode(Notice("load", [OID, OID])),
        "there is no method 'load'",
    ),
    "too few arguments": (request_of("load", OID), "load takes 2 arguments, not 1"),
    "an argument of a wrong type": (
        request_of("load", "oid", OID),
        "load: oid must be oid, not str",
    ),
    "an oid of seven bytes": (request_of("get_tid", b"1234567"), "must be oid"),
    "an operation that is none": (
        encode(Notice("stage", [transaction_id(1), [["drop", OID]]])),
        "operations must be list of operation",
    ),
    "a number used twice": (
        request_of("get_tid", OID, id_=1) + request_of("ping", id_=1),
        "request 1 after request 1",
    ),
    "an answer": (encode(Reply(1, None)), "a Reply is not expected"),
    "a second hello": (encode(Hello(hello_fields())), "a Hello is not expected"),
    "an oversized frame": (
        (LIMITS.frame_bytes_max + 1).to_bytes(4, "big"),
        "a frame of 65537 bytes",
    ),
    "an empty frame": (bytes(4), "a frame of 0 bytes"),
    "garbage": (frame(b"\xc1garbage"), "a frame is not msgpack"),
    "msgpack that is no message": (frame(b"\x01"), "a frame holds no message"),
    "an extension type": (frame(b"\x92\x02\xd4\x05\x00"), "a frame is not msgpack"),
    "a message of no kind": (frame(b"\x91\x63"), "there is no message of kind 99"),
}


@pytest.mark.parametrize("offence", OFFENCES)
async def test_an_offence_is_named_and_ends_that_one_socket(server, offence):
    data, reason = OFFENCES[offence]
    others = MemorySession(server.service, LIMITS)
    session = MemorySession(server.service, LIMITS)
    offender, neighbour, other = session.channel(), session.channel(), others.channel()
    offender.send(data)
    last_words = offender.goodbye()
    assert last_words.reason == "protocol"
    assert reason in last_words.text
    await asyncio.sleep(0)
    assert offender.transport.is_lost
    assert offender.peer not in server.service.peers
    for each in (neighbour, other):
        assert each.value(each.ask("load", OID, number(2)))[0] == b"data"
        assert not each.received()
    server.commit(OID, b"more")
    for stream in (session.stream, others.stream):
        (notice,) = stream.received()
        assert isinstance(notice, Notice)


async def test_what_comes_after_an_offence_is_not_looked_at(server, channel):
    store = ["store", number(5), number(0), b"data"]
    vote = request_of(
        "vote", transaction_id(1), [b"", b"", b"", None, " "], [store], id_=2
    )
    channel.send(frame(b"\xc1") + vote)
    channel.send(vote)
    await asyncio.sleep(0)
    assert not server.committer.holders
    assert not server.workers.writes_waiting


async def test_an_offence_is_logged_with_the_address_of_the_offender(
    server, channel, caplog
):
    channel.send(frame(b"\xc1"))
    assert "192.0.2.7:4567 is disconnected: a frame is not msgpack" in caplog.text


async def test_more_open_requests_than_allowed_are_an_offence(channel):
    for _ in range(LIMITS.requests_open_max):
        channel.ask("get_tid", OID)
    channel.ask("get_tid", OID)
    assert "more than 4 open requests" in channel.goodbye().text


async def test_a_notice_that_cannot_be_heeded_ends_the_socket_with_the_reason(server):
    session = MemorySession(server.service, LIMITS, read_only=True)
    channel = session.channel()
    ping = channel.connection.request("ping", [], now())
    stage = channel.connection.notice("stage", [transaction_id(1), []], now())
    channel.send(ping + stage)
    assert channel.received() == [
        Reply(1, None),
        Goodbye("protocol", "stage: this connection is read-only"),
    ]
    await asyncio.sleep(0)
    assert channel.transport.is_lost
    assert not session.stream.transport.is_closing()


# Turns: whoever sends much does not keep the others waiting

# As if a turn were over when one message has been looked at.
HURRIED = replace(LIMITS, turn_s=0.0)
BEAT = encode(Notice("stage", [transaction_id(1), []]))
MANY = 20


@pytest.fixture
async def hurried() -> MemorySession:
    """A session with a server whose turns are short."""
    server = ModelServer(limits=HURRIED)
    server.commit(OID, b"data")
    return MemorySession(server.service, HURRIED)


async def steps(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_it_is_the_others_turn_after_some_of_many_messages(hurried):
    busy, other = hurried.channel(), hurried.channel()
    last = busy.connection.request("ping", [], now())
    busy.send(BEAT * MANY + last)
    assert busy.transport.is_paused, "what has come is enough for now"
    assert not busy.received()
    assert other.value(other.ask("ping")) is None
    await steps(MANY - 2)
    assert not busy.received()
    await steps(5)
    assert busy.received() == [Reply(1, None)]
    assert not busy.transport.is_paused
    assert busy.value(busy.ask("ping")) is None


async def test_a_hundred_who_send_much_have_one_turn_between_them(hurried):
    """Or the others would wait for a hundred turns."""
    crowd = [hurried.channel() for _ in range(100)]
    for each in crowd:
        pings = [each.connection.request("ping", [], now()) for _ in range(3)]
        each.send(b"".join(pings))
    assert all(each.received() == [Reply(1, None)] for each in crowd)
    for done in range(20):
        await steps(1)
        answered = sum(len(each.received()) for each in crowd)
        assert answered == 1 or done == 0
    await steps(200)
    assert sum(len(each.received()) for each in crowd) == 200 - 20


async def test_many_loads_in_one_piece_are_answered_in_turns_too(hurried):
    busy = hurried.channel()
    loads = [busy.connection.request("load", [OID, number(2)], now()) for _ in range(4)]
    busy.send(b"".join(loads))
    assert len(busy.received()) == 1
    await steps(5)
    assert [each.id for each in busy.received()] == [2, 3, 4]


@pytest.mark.parametrize("cut", range(1, 40, 3))
async def test_messages_that_take_turns_are_all_there_in_their_order(hurried, cut):
    busy = hurried.channel()
    requests = [busy.connection.request("ping", [], now()) for _ in range(4)]
    large = encode(Notice("stage", [transaction_id(1), [store(9000)]]))
    data = BEAT * MANY + requests[0] + large + requests[1] + BEAT * MANY + requests[2]
    busy.send(data[:cut])
    busy.send(data[cut:])
    await steps(3 * MANY)
    busy.send(requests[3])
    assert busy.received() == [Reply(n, None) for n in (1, 2, 3, 4)]


async def test_one_large_message_takes_no_turns(hurried):
    channel = hurried.channel()
    staging = encode(Notice("stage", [transaction_id(1), [store(60_000)]]))
    channel.send(staging)
    assert not channel.transport.is_paused
    channel.send(staging[:10])
    channel.send(staging[10:])
    assert not channel.transport.is_paused


@pytest.mark.parametrize("is_told", [True, False])
async def test_nobody_waits_for_his_turn_who_is_gone(hurried, is_told):
    busy = hurried.channel()
    vote = request_of("vote", transaction_id(1), [b"", b"", b"", None, " "], [])
    busy.send(BEAT * MANY + (frame(b"\xc1") if is_told else b"") + vote)
    if not is_told:
        await busy.lose()
    await steps(2 * MANY)
    assert busy.transport.is_lost
    service = busy.peer._service
    assert busy.peer not in service.peers
    assert not service.databases["1"].committer.holders


# Guests: who cannot write, or is not welcomed


def takes_much(client: MemoryClient) -> None:
    """As if the server had done much for it."""
    account = client.peer.account
    assert account is not None, "it is no guest"
    account.charge(10 * LIMITS.guest_burst_s, clock())


async def test_a_guest_who_has_taken_much_waits_in_line(server, session, channel):
    guest = MemorySession(server.service, LIMITS, read_only=True).channel()
    first = guest.ask("ping")
    takes_much(guest)
    assert guest.value(first) is None
    second = guest.ask("ping")
    assert guest.answer(second) is None
    assert guest.transport.is_paused
    assert channel.value(channel.ask("ping")) is None
    await steps(2)
    assert guest.value(second) is None
    assert not guest.transport.is_paused


async def test_what_a_guest_has_taken_counts_on_all_sockets_of_his_session(server):
    session = MemorySession(server.service, LIMITS, read_only=True)
    one, other = session.channel(), session.channel()
    takes_much(one)
    request = other.ask("ping")
    assert other.answer(request) is None
    another = MemorySession(server.service, LIMITS, read_only=True).channel()
    assert another.value(another.ask("ping")) is None
    await steps(2)
    assert other.value(request) is None


async def test_what_a_stranger_has_taken_counts_on_all_sockets_of_his_host(server):
    takes_much(MemoryClient(server.service, LIMITS))
    other = MemoryClient(server.service, LIMITS)
    other.send(HELLO)
    elsewhere = MemoryClient(server.service, LIMITS, address=("192.0.2.8", 1))
    elsewhere.send(HELLO)
    assert not other.transport.take()
    assert elsewhere.transport.take()
    await steps(2)
    assert other.transport.take()


async def test_a_guest_may_send_small_frames_only(server):
    limits = replace(LIMITS, reader_frame_bytes_max=1000)
    guest = MemorySession(server.service, limits, read_only=True).channel()
    probe = MemoryClient(server.service, limits)
    probe.hello(kind="channel", storage=None)
    for each in (guest, probe):
        each.send(frame(bytes(1001)))
        assert "reader_frame_bytes_max" in each.goodbye().text
    member = MemorySession(server.service, limits).channel()
    member.send(encode(Notice("stage", [transaction_id(1), [store(2000)]])))
    assert member.value(member.ask("ping")) is None


# Before the hello


async def test_a_large_frame_is_refused_before_the_hello(server):
    client = MemoryClient(server.service, LIMITS)
    client.send((LIMITS.hello_frame_bytes_max + 1).to_bytes(4, "big"))
    assert "a frame of 16385 bytes" in client.goodbye().text
    await asyncio.sleep(0)
    assert client.transport.is_lost


async def test_an_http_request_is_refused_in_its_first_bytes(server):
    client = MemoryClient(server.service, LIMITS)
    client.send(b"GET / HTTP/1.1\r\n\r\n")
    assert "a frame of" in client.goodbye().text


async def test_a_request_before_the_hello_is_an_offence(server):
    client = MemoryClient(server.service, LIMITS)
    client.send(request_of("ping"))
    assert "a Request is not expected in state opening" in client.goodbye().text


async def test_a_request_that_does_not_wait_for_the_welcome_is_an_offence(server):
    client = MemoryClient(server.service, LIMITS)
    hello = client.connection.hello(hello_fields(), now())
    client.send(hello + request_of("ping"))
    assert isinstance(client.received()[-1], Goodbye)
    await asyncio.sleep(0)
    assert client.transport.is_lost
    assert not server.service.sessions


@pytest.mark.parametrize("sent", [b"", b"\x00"])
async def test_who_does_not_say_hello_in_time_is_disconnected(server, sent):
    client = MemoryClient(server.service, LIMITS)
    start = now()
    server.service.tick(start + LIMITS.hello_timeout_s - 1)
    if sent:
        client.send(sent)
    assert not client.transport.is_closing()
    server.service.tick(start + LIMITS.hello_timeout_s + 1)
    assert "no hello in time: 10 s" in client.goodbye().text
    await asyncio.sleep(0)
    assert not server.service.peers


async def test_a_probe_that_connects_and_leaves_is_no_event(server, caplog):
    client = MemoryClient(server.service, LIMITS)
    await client.lose()
    assert not server.service.peers
    assert not [r for r in caplog.records if r.levelname != "DEBUG"]


async def test_a_refused_hello_is_answered_and_the_socket_closed(server):
    client = MemoryClient(server.service, LIMITS)
    refusal = client.hello(storage="elsewhere")
    assert isinstance(refusal, Failure)
    await asyncio.sleep(0)
    assert client.transport.is_lost


# Heartbeats


async def test_a_stream_gets_heartbeats_when_there_is_nothing_else(server, session):
    start = now()
    server.service.tick(start + LIMITS.heartbeat_interval_s)
    assert session.stream.received() == [Heartbeat()]
    server.commit(OID, b"more")
    session.stream.received()
    server.service.tick(now() + 1)
    assert not session.stream.received()


async def test_a_channel_gets_heartbeats_only_while_somebody_waits(server, channel):
    start = now()
    server.service.tick(start + LIMITS.heartbeat_interval_s)
    assert not channel.received()
    channel.ask("get_tid", OID)
    server.service.tick(start + 2 * LIMITS.heartbeat_interval_s)
    assert channel.received() == [Heartbeat()]


async def test_a_socket_is_read_again_when_nobody_holds_it(channel):
    peer, transport = channel.peer, channel.transport
    peer.hold_reading()
    peer.hold_reading()
    assert transport.is_paused
    peer.let_read()
    assert transport.is_paused
    peer.let_read()
    assert not transport.is_paused


async def test_a_client_that_is_not_read_is_not_silent(server, channel):
    channel.send(encode(Request(1, "ping", []))[:3])
    start = now()
    channel.peer.hold_reading()
    server.service.tick(start + 1000)
    channel.peer.let_read()
    # The clock of this test runs ahead of the loop's.
    channel.peer.connection.rcvd_at = start + 1000
    server.service.tick(start + 1000 + LIMITS.heartbeat_timeout_s)
    assert channel.peer.connection.is_open
    server.service.tick(start + 1001 + LIMITS.heartbeat_timeout_s)
    assert "silent for 20 s" in channel.goodbye().text


async def test_to_hold_what_is_gone_is_harmless(channel):
    channel.peer.hold_reading()
    await channel.lose()
    channel.peer.let_read()
    channel.peer.hold_reading()
    assert channel.transport.is_paused, "it was when it was lost"


async def test_a_silent_stream_ends_the_session(server, session, channel):
    start = now()
    server.service.tick(start + LIMITS.heartbeat_timeout_s - 1)
    assert server.service.sessions
    server.service.tick(start + LIMITS.heartbeat_timeout_s + 1)
    assert "silent for 20 s" in session.stream.goodbye().text
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not server.service.sessions
    assert not server.service.peers
    assert channel.transport.is_lost


async def test_a_stream_that_beats_is_not_silent(server, session):
    start = now()
    session.stream.peer.connection.rcvd_at = start - LIMITS.heartbeat_timeout_s - 1
    session.stream.send(HEARTBEAT)
    server.service.tick(now())
    assert server.service.sessions


async def test_an_idle_channel_may_be_silent_for_days(server, session, channel):
    start = now()
    session.stream.peer.connection.rcvd_at = start + 86400
    server.service.tick(start + 86400)
    assert channel.value(channel.ask("ping")) is None


async def test_a_silent_peer_that_does_not_read_is_let_go_of_too(server, session):
    """Its last words stay in the buffer for ever; the session must not."""
    session.stream.transport.stop_reading()
    server.commit(OID, b"more")
    late = now() + LIMITS.heartbeat_timeout_s + 1
    for second in range(3):
        assert session.stream.transport.get_write_buffer_size()
        server.service.tick(late + second)
    await asyncio.sleep(0)
    assert session.stream.transport.is_lost
    assert not server.service.sessions
    assert not server.served.followers


async def test_last_words_are_not_cut_off_before_they_can_be_read(server, session):
    session.stream.transport.stop_reading()
    session.stream.peer.hang_up("stopping", "the server is stopping")
    server.service.tick(now())
    session.stream.transport.read_on()
    assert session.stream.goodbye().reason == "stopping"


# Output


async def test_changes_for_a_slow_reader_are_gathered_not_heaped_up(server, session):
    other = MemorySession(server.service, LIMITS)
    transport = session.stream.transport
    transport.stop_reading()
    tids = []
    while not session.stream.peer.is_lagging:
        tids.append(server.commit(OID, b"more"))
    size, writes = transport.get_write_buffer_size(), transport.writes
    assert LIMITS.lag_bytes_max < size < LIMITS.lag_bytes_max + 1024
    tids += [server.commit(OID, b"more") for _ in range(300)]
    assert transport.get_write_buffer_size() == size
    transport.read_on()
    assert transport.writes == writes + 1
    tids.append(server.commit(OID, b"more"))
    assert transport.writes == writes + 2
    for each in (session, other):
        changes = each.stream.changes()
        assert [change[1] for change in changes] == tids
        assert [change[0] for change in changes[1:]] == tids[:-1]


async def test_a_slow_reader_that_stops_again_is_told_the_rest_in_the_end(server):
    session = MemorySession(server.service, LIMITS)
    transport = session.stream.transport
    transport.stop_reading()
    tids = []
    for _ in range(5):
        tids += [server.commit(OID, b"more") for _ in range(200)]
        assert session.stream.peer.is_lagging
        transport.read_once()
    transport.read_on()
    assert not session.stream.peer.is_lagging
    assert [change[1] for change in session.stream.changes()] == tids


async def test_a_reader_that_is_too_slow_is_disconnected_with_a_reason(
    server, session, caplog
):
    server.served.changes = Changes(server.served.changes.last_tid, changes_max=100)
    other = MemorySession(server.service, LIMITS)
    channel = session.channel()
    session.stream.transport.stop_reading()
    tids = []
    while server.served.followers == {session.stream.peer, other.stream.peer}:
        tids.append(server.commit(OID, b"more"))
        assert len(tids) < 1000
    assert "it reads too slowly" in caplog.text
    session.stream.transport.read_on()
    last_words = session.stream.goodbye()
    assert last_words.reason == "behind"
    assert "too slowly" in last_words.text
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert session.stream.peer not in server.service.peers
    assert channel.transport.is_lost
    assert len(server.service.sessions) == 1
    # Nobody else has missed anything.
    assert [change[1] for change in other.stream.changes()] == tids


async def test_a_reader_that_never_reads_is_cut_off(server, session):
    server.served.changes = Changes(server.served.changes.last_tid, changes_max=10)
    session.stream.transport.stop_reading()
    while server.served.followers:
        server.commit(OID, b"more")
    server.service.tick(now())
    server.service.tick(now())
    await asyncio.sleep(0)
    assert session.stream.transport.is_lost
    assert not server.service.sessions


async def test_an_answer_on_a_channel_that_lags_is_not_a_change(server, session):
    server.commit(OID, bytes(12 * 1024))
    channel = session.channel()
    channel.transport.stop_reading()
    first = channel.ask("load", OID, number(9))
    assert channel.peer.is_lagging
    tid = server.commit(OID, b"more")
    channel.transport.read_on()
    assert len(channel.value(first)[0]) == 12 * 1024
    assert not channel.received()
    assert [change[1] for change in session.stream.changes()] == [number(2), tid]


async def test_a_slow_reader_may_catch_up(server, session):
    session.stream.transport.stop_reading()
    tids = [server.commit(OID, b"more") for _ in range(10)]
    session.stream.transport.read_on()
    assert [change[1] for change in session.stream.changes()] == tids


async def test_answers_count_as_output(server, session):
    server.commit(OID, bytes(4096))
    channel = session.channel()
    channel.transport.stop_reading()
    for _ in range(8):
        if not channel.transport.is_closing():
            channel.ask("load", OID, number(9))
    await asyncio.sleep(0)
    assert channel.transport.is_lost
    # The session goes on.
    other = session.channel()
    assert other.value(other.ask("ping")) is None


# The end


async def test_hanging_up_tells_why(session):
    session.stream.peer.hang_up("stopping", "the server is stopping")
    assert session.stream.received() == [Goodbye("stopping", "the server is stopping")]
    session.stream.peer.hang_up("stopping", "again")
    await asyncio.sleep(0)
    session.stream.peer.hang_up("stopping", "and again")
    assert session.stream.transport.is_lost


async def test_a_client_that_says_goodbye_is_let_go_without_a_warning(
    server, session, caplog
):
    stream = session.stream
    stream.send(stream.connection.goodbye("bye", "", now()))
    await asyncio.sleep(0)
    assert stream.transport.is_lost
    assert not server.service.sessions
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    assert not stream.received()


async def test_cutting_off_does_not_wait_for_a_reader(server, session):
    session.stream.transport.stop_reading()
    server.commit(OID, b"more")
    session.stream.peer.cut_off()
    await asyncio.sleep(0)
    assert session.stream.transport.is_lost
    session.stream.peer.cut_off()


# Addresses


@pytest.mark.parametrize(
    ("peername", "address"),
    [
        (("192.0.2.7", 4567), "192.0.2.7:4567"),
        (("2001:db8::7", 4567, 0, 0), "[2001:db8::7]:4567"),
        ("", "unix"),
    ],
)
async def test_an_address_is_the_clients_own(server, peername, address):
    client = MemoryClient(server.service, LIMITS, address=peername)
    assert client.peer.address == address


async def test_a_unix_client_is_known_by_its_process(server, tmp_path):
    path = str(tmp_path / "socket")
    arrived = asyncio.Queue[Peer]()

    class Arriving(Peer):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            arrived.put_nowait(self)

    listener = Listener(lambda: Arriving(server.service, LIMITS))
    await listener.listen(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        peer = await arrived.get()
        who = f"pid={os.getpid()},uid={os.getuid()},gid={os.getgid()}"
        assert peer.address == f"unix:{who}"
        peer.cut_off()
        await server.service.wait_until_empty(60)
    await listener.close()


async def test_a_welcome_answers_an_accepted_hello(server):
    client = MemoryClient(server.service, LIMITS)
    assert isinstance(client.hello(), Welcome)
    assert client.peer.session is not None


# What is held for a vote that does not come

TRANSACTION = transaction_id(9)
METADATA = [b"", b"", b"", None, " "]
TIMEOUT_S = 30.0
STAGE = Notice("stage", [TRANSACTION, [["store", OID, number(1), b"new"]]])
CHUNK = Notice("blob_chunk", [TRANSACTION, 0, b"part"])


async def expire_after(server: ModelServer, channel: MemoryClient, s: float) -> bool:
    expired = channel.peer.expire(now() + s, TIMEOUT_S)
    await server.workers.work()
    return expired


@pytest.mark.parametrize("notices", [[STAGE], [CHUNK], [STAGE, CHUNK]])
async def test_what_waits_for_its_client_too_long_is_not_kept(server, channel, notices):
    assert not await expire_after(server, channel, 2 * TIMEOUT_S)
    for notice in notices:
        channel.send(encode(notice))
    assert not await expire_after(server, channel, TIMEOUT_S - 1)
    assert await expire_after(server, channel, TIMEOUT_S + 1)
    assert all(upload.is_discarded for upload in server.database.uploads.begun)
    assert not await expire_after(server, channel, TIMEOUT_S + 1)
    for notice in notices:
        # What comes after all is dropped, or half of it would be voted on.
        channel.send(encode(notice))
    voting = channel.ask("vote", TRANSACTION, METADATA, [])
    await server.workers.work()
    assert channel.failure(voting).name == "TransactionTimeout"
    assert not server.database.steps


@pytest.mark.parametrize("notice", [STAGE, CHUNK])
async def test_other_signs_of_life_keep_nothing(server, channel, notice):
    channel.send(encode(notice))
    channel.peer.connection.rcvd_at = now() + TIMEOUT_S
    channel.send(HEARTBEAT)
    assert await expire_after(server, channel, TIMEOUT_S + 1)


async def test_a_part_on_a_slow_line_keeps_the_others(server, channel):
    channel.send(encode(STAGE))
    channel.send(encode(CHUNK)[:-1])
    channel.peer.connection.rcvd_at = now() + TIMEOUT_S
    assert not await expire_after(server, channel, TIMEOUT_S + 1)


async def test_records_are_kept_while_their_blobs_come(server, channel):
    channel.send(encode(STAGE))
    channel.send(encode(CHUNK))
    channel.peer.upload.touched_at = now() + TIMEOUT_S
    assert not await expire_after(server, channel, TIMEOUT_S + 1)


async def test_who_waits_for_the_disk_is_not_late(server, channel):
    channel.send(encode(STAGE))
    channel.send(encode(Notice("blob_chunk", [TRANSACTION, 0, bytes(32 * 1024)])))
    channel.peer.upload._batch_bytes = 1
    channel.send(encode(CHUNK))
    assert channel.peer.upload.is_writing
    assert not channel.peer.expire(now() + 2 * TIMEOUT_S, TIMEOUT_S)
