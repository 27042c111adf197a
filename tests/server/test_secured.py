"""TLS between a transport and a protocol, in memory."""

import asyncio
import ssl
from pathlib import Path
from typing import Any

import pytest

from zeolith.protocol.connection import Connection, Role
from zeolith.protocol.errors import HelloRefused, error_of
from zeolith.protocol.messages import Failure
from zeolith.protocol.tls import HandshakeFailed, explained
from zeolith.server.secured import Protected, Secured
from zeolith.server.turns import Waiting

from ..support.certificates import HOST, Authority, End, context_of
from ..support.memory import MemoryTransport, hello_fields

ADDRESS = ("192.0.2.7", 4567)


class Inside(Protected):
    """What is protected: takes what comes, and answers when the test says so."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.came: list[bytes] = []
        self.paused = 0
        self.is_lost = False
        self.complaints: list[str] = []
        self.is_slow = False
        self.line: list[Waiting] = []
        self.taken_s = 0.0

    def puts_in_line(self, who: Waiting) -> bool:
        if self.is_slow:
            self.line.append(who)
        return self.is_slow

    def charge(self, took_s: float) -> None:
        self.taken_s += took_s

    def complain(self, text: str) -> None:
        self.complaints.append(text)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.came.append(data)

    def pause_writing(self) -> None:
        self.paused += 1

    def resume_writing(self) -> None:
        self.paused -= 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True


class Conversation:
    """A client in memory and what it talks to."""

    def __init__(self, authority: Authority, **server: Any):
        self.inside = Inside()
        context = context_of(authority.sign(), **server)
        self.secured = Secured(self.inside, context)
        self.transport = MemoryTransport(self.secured, ADDRESS)
        self.secured.connection_made(self.transport)
        self.client = End(authority.trusting().context, HOST)

    def shake_hands(self) -> None:
        said = self.client.step(b"")
        while said:
            self.secured.data_received(said)
            said = self.client.step(self.transport.take())
        assert self.client.is_ready

    def say(self, text: bytes) -> None:
        self.client.tls.write(text)
        self.secured.data_received(self.client.outgoing.read())

    def heard(self) -> bytes:
        """What the client has read until now."""
        self.client.incoming.write(self.transport.take())
        heard = b""
        try:
            while piece := self.client.tls.read(65536):
                heard += piece
        except ssl.SSLWantReadError:
            pass
        return heard


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
async def talk(authority: Authority) -> Conversation:
    talk = Conversation(authority)
    talk.shake_hands()
    return talk


async def test_both_understand_each_other(talk):
    talk.say(b"question")
    assert talk.inside.came == [b"question"]
    talk.inside.transport.write(b"answer")
    assert talk.heard() == b"answer"


async def test_nothing_that_is_said_can_be_read_on_the_way(talk):
    talk.client.tls.write(b"question" * 10)
    on_the_way = talk.client.outgoing.read()
    assert b"question" not in on_the_way
    talk.transport.take()
    talk.inside.transport.write(b"answer" * 10)
    assert b"answer" not in talk.transport.take()


async def test_what_comes_in_one_piece_is_handed_on_in_one_piece(talk):
    large = bytes(range(256)) * 1000
    talk.client.tls.write(b"first")
    talk.client.tls.write(large)
    talk.secured.data_received(talk.client.outgoing.read())
    assert talk.inside.came == [b"first" + large]


async def test_every_byte_may_come_alone(authority):
    talk = Conversation(authority)
    said = talk.client.step(b"")
    while said:
        for at in range(len(said)):
            talk.secured.data_received(said[at : at + 1])
        said = talk.client.step(talk.transport.take())
    talk.client.tls.write(b"question")
    said = talk.client.outgoing.read()
    for at in range(len(said)):
        talk.secured.data_received(said[at : at + 1])
    assert talk.inside.came == [b"question"]


async def test_a_large_answer_is_whole(talk):
    large = bytes(range(256)) * 20_000
    talk.inside.transport.write(large)
    assert talk.heard() == large


async def test_the_protected_one_hears_of_the_socket_before_the_handshake(authority):
    """Its time for the hello runs, and it is counted."""
    talk = Conversation(authority)
    assert talk.inside.transport is talk.secured
    assert talk.inside.transport.get_extra_info("peername") == ADDRESS


async def test_before_the_handshake_nothing_is_said(authority):
    talk = Conversation(authority)
    talk.inside.transport.write(b"too early")
    talk.inside.transport.close()
    assert talk.transport.take() == b""
    assert talk.transport.is_closing()


async def test_the_ends_of_tls_can_be_asked_for(talk):
    ours = talk.inside.transport.get_extra_info("ssl_object")
    assert ours.version() == "TLSv1.3"
    assert ours.get_channel_binding("tls-unique") is not None
    assert ours.getpeercert() is None


async def test_a_client_that_speaks_no_tls_is_told_so(authority):
    talk = Conversation(authority)
    plain = Connection(Role.CLIENT, 0)
    talk.secured.data_received(plain.hello(hello_fields(), 0))
    (answer,) = plain.receive_data(talk.transport.take(), 0)
    assert isinstance(answer, Failure)
    refusal = error_of(answer.name, answer.attributes, answer.text)
    assert isinstance(refusal, HelloRefused)
    assert refusal.reason == "tls"
    assert "speaks TLS" in str(refusal)
    assert talk.transport.is_closing()
    assert talk.inside.came == []
    assert talk.inside.complaints == ["is disconnected: it speaks no TLS"]


async def test_a_client_that_is_refused_gets_the_alert(authority):
    talk = Conversation(authority, wants=authority)
    talk.secured.data_received(talk.client.step(b""))
    talk.secured.data_received(talk.client.step(talk.transport.take()))
    assert talk.transport.is_closing()
    with pytest.raises(ssl.SSLError) as caught:
        talk.client.step(talk.transport.take())
    with pytest.raises(HandshakeFailed, match="wants a certificate of its clients"):
        raise explained(caught.value)
    (complaint,) = talk.inside.complaints
    assert complaint == "is disconnected: PEER_DID_NOT_RETURN_A_CERTIFICATE"


async def test_an_old_version_is_refused(authority):
    talk = Conversation(authority)
    old = authority.trusting().context
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("DEFAULT@SECLEVEL=0")
    talk.client = End(old, HOST)
    talk.secured.data_received(talk.client.step(b""))
    assert talk.transport.is_closing()
    with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        talk.client.step(talk.transport.take())


@pytest.mark.parametrize("at", [0, 1, 10, 20, -1])
async def test_whoever_changes_a_byte_on_the_way_is_noticed(talk, at):
    talk.client.tls.write(b"question")
    said = bytearray(talk.client.outgoing.read())
    said[at] ^= 0xFF
    talk.secured.data_received(bytes(said))
    assert talk.inside.came == []
    assert talk.transport.is_closing()


async def test_garbage_in_a_handshake_ends_it(authority):
    talk = Conversation(authority)
    talk.secured.data_received(b"\x16\x03\x01" + bytes(200))
    assert talk.transport.is_closing()


@pytest.mark.parametrize(
    ("record", "bytes_max"),
    [
        # A message of 16 MiB, and nothing at all, again and again.
        (b"\x16\x03\x01\x40\x00" + b"\x01\xff\xff\xff" + bytes(16380), 20_000),
        (b"\x16\x03\x01\x00\x00", 1000),
    ],
)
async def test_a_handshake_without_end_is_cut_off(authority, record, bytes_max):
    """OpenSSL counts."""
    talk = Conversation(authority)
    sent = 0
    while not talk.transport.is_closing():
        talk.secured.data_received(record)
        sent += len(record)
        assert sent < bytes_max


async def test_the_end_is_said(talk):
    talk.inside.transport.write(b"last words")
    talk.inside.transport.close()
    talk.inside.transport.close()
    assert talk.heard() == b"last words"
    assert talk.transport.is_closing()
    # That it was no accident; heard() ends with it.
    assert talk.client.tls.read(1) == b""
    talk.inside.transport.write(b"nobody")
    await asyncio.sleep(0)
    assert talk.inside.is_lost


async def test_the_clients_end_is_the_end(talk):
    with pytest.raises(ssl.SSLWantReadError):
        talk.client.tls.unwrap()
    talk.secured.data_received(talk.client.outgoing.read())
    assert talk.transport.is_closing()
    await asyncio.sleep(0)
    assert talk.inside.is_lost


async def test_an_abort_does_not_wait(talk):
    talk.transport.stop_reading()
    talk.inside.transport.write(b"x" * 100_000)
    talk.inside.transport.abort()
    await asyncio.sleep(0)
    assert talk.inside.is_lost
    assert talk.inside.transport.is_closing()


async def test_the_bounds_hold_for_what_really_waits(talk):
    talk.inside.transport.set_write_buffer_limits(high=10_000)
    talk.transport.stop_reading()
    talk.inside.transport.write(b"x" * 5000)
    assert talk.inside.paused == 0
    assert talk.inside.transport.get_write_buffer_size() > 5000
    talk.inside.transport.write(b"x" * 6000)
    assert talk.inside.paused == 1
    talk.transport.read_on()
    assert talk.inside.paused == 0
    assert talk.heard() == b"x" * 11_000


async def test_reading_is_held_where_the_bytes_come_from(talk):
    talk.inside.transport.pause_reading()
    assert talk.transport.is_paused
    talk.inside.transport.resume_reading()
    assert not talk.transport.is_paused


async def test_a_client_whose_certificate_was_revoked_is_refused_and_told(authority):
    revoked = authority.sign(file="revoked")
    talk = Conversation(authority, wants=authority, ca=authority.revoke(revoked))
    talk.client = End(authority.trusting(revoked.both).context, HOST)
    said = talk.client.step(b"")
    talk.secured.data_received(said)
    talk.secured.data_received(talk.client.step(talk.transport.take()))
    assert talk.inside.complaints == ["is disconnected: certificate revoked"]
    with pytest.raises(ssl.SSLError) as caught:
        talk.client.step(talk.transport.take())
    assert "does not accept this client's certificate" in str(explained(caught.value))


# Turns


async def test_a_handshake_is_charged_and_what_comes_behind_it_is_not(authority):
    talk = Conversation(authority)
    talk.shake_hands()
    taken_s = talk.inside.taken_s
    assert taken_s > 0
    talk.say(b"hello")
    assert talk.inside.came == [b"hello"]
    assert talk.inside.taken_s == taken_s


async def test_a_handshake_waits_for_its_turn_and_nothing_is_read_meanwhile(authority):
    talk = Conversation(authority)
    talk.inside.is_slow = True
    flight = talk.client.step(b"")
    talk.secured.data_received(flight[:10])
    assert talk.transport.is_paused
    # What the loop had read already.
    talk.secured.data_received(flight[10:])
    assert len(talk.inside.line) == 1
    assert not talk.transport.take()
    assert talk.inside.taken_s == 0
    talk.inside.is_slow = False
    talk.inside.line.pop().take_turn()
    assert not talk.transport.is_paused
    said = talk.client.step(talk.transport.take())
    talk.secured.data_received(said)
    talk.client.step(talk.transport.take())
    talk.say(b"hello")
    assert talk.inside.came == [b"hello"]


async def test_who_goes_away_before_his_turn_gets_none(authority):
    talk = Conversation(authority)
    talk.inside.is_slow = True
    talk.secured.data_received(talk.client.step(b""))
    talk.secured.abort()
    talk.inside.line.pop().take_turn()
    assert talk.inside.taken_s == 0
