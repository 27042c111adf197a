"""Somebody who keeps to no rule: tries everything, as nobody and as one who may read.

An attacker speaks the protocol by hand. Whatever he sends, he gets nothing that his
identity has not, the database stays what it was, and somebody else who is there at the
same time hears nothing of him.
"""

import asyncio
from typing import Any

import pytest

from zeolith.protocol.codec import decode, encode
from zeolith.protocol.frames import FrameReader
from zeolith.protocol.login import Login
from zeolith.protocol.messages import (
    Challenge,
    Failure,
    Goodbye,
    Hello,
    Message,
    Notice,
    Reply,
    Request,
    Response,
    Welcome,
)
from zeolith.protocol.methods import METHODS
from zeolith.protocol.roles import AccessRole
from zeolith.server.workers import READERS

from ..server.test_service import ARGUMENTS, CALLABLE
from ..support.identities import TOKEN, access, password_login, token_login
from ..support.ids import number
from ..support.memory import MemoryClient, hello_fields
from ..support.model import ModelServer
from ..support.waiting import wait_on_loop

OID = number(1)
READING = {name for name in CALLABLE if METHODS[name].role in (None, AccessRole.READ)}


@pytest.fixture
async def server() -> ModelServer:
    """It knows who may read (the token), write (ann) and nothing (anonymous)."""
    server = ModelServer(access=access(ann="admin", token="read"))
    server.commit(OID, b"data")
    server.service.greeting.failed_login_delay_s = 0.01
    return server


def call(name: str) -> Message:
    """What a client would send for that method."""
    args = ARGUMENTS[name]
    if METHODS[name].answers:
        return Request(1, name, args)
    return Notice(name, args)


class Attacker:
    """A socket on which anything may be said, whatever the state."""

    def __init__(self, server: ModelServer):
        self._server = server
        self._client = MemoryClient(server.service)
        self._frames = FrameReader(2**31)
        self.peer = self._client.peer
        self.said = b""

    def say(self, *messages: Message) -> list[Message]:
        """Send these in one piece; what comes at once."""
        self.said += b"".join(map(encode, messages))
        return self.send(b"".join(map(encode, messages)))

    def send(self, data: bytes) -> list[Message]:
        """Send bytes; what comes at once."""
        self._client.send(data)
        return self.heard()

    def heard(self) -> list[Message]:
        """What has come since the last time."""
        return list(map(decode, self._frames.feed(self._client.transport.take())))

    async def say_and_wait(self, *messages: Message) -> list[Message]:
        """Send these; what comes when all work is done."""
        heard = self.say(*messages)
        for _ in range(3):
            await self._server.workers.work()
            await asyncio.sleep(0)
        return heard + self.heard()

    def log_in(self, login: Login, **fields: Any) -> Message | None:
        """Log in as the specification has it; the answer, if it has come."""
        heard = self.say(Hello(hello_fields(login=login.hello_login(), **fields)))
        if heard and isinstance(heard[0], Challenge):
            heard = self.say(Response(login.respond(heard[0].text)))
        return heard[0] if heard else None

    def join(self, welcome: Message | None) -> list[Message]:
        """Join the session of that welcome."""
        assert isinstance(welcome, Welcome), welcome
        session = welcome.fields["session"]
        return self.say(Hello(hello_fields(kind="channel", session=session)))

    async def wait_for_the_end(self) -> None:
        """Return when the server has refused it."""
        await wait_on_loop(lambda: self.is_out, "the refusal")

    @property
    def is_out(self) -> bool:
        """Whether the server has nothing more to do with it."""
        return self._client.transport.is_closing() or self.peer.connection.is_closed


def is_unchanged(server: ModelServer) -> bool:
    return server.served.changes.last_tid == number(1) and not server.database.steps


# As nobody


@pytest.mark.parametrize("method", CALLABLE)
@pytest.mark.parametrize("before", ["hello", "challenge", "refusal"])
async def test_nothing_is_called_before_one_is_let_in(server, method, before):
    attacker = Attacker(server)
    if before != "hello":
        login = password_login("ann" if before == "challenge" else "nobody")
        (challenge,) = attacker.say(Hello(hello_fields(login=login.hello_login())))
        assert isinstance(challenge, Challenge)
    if before == "refusal":
        attacker.say(Response("c=biws,r=x,p=AAAA"))
    heard = await attacker.say_and_wait(call(method))
    assert [type(each) for each in heard] in ([], [Goodbye])
    assert attacker.is_out
    assert is_unchanged(server)
    assert not server.service.sessions


@pytest.mark.parametrize("method", CALLABLE)
async def test_a_call_right_behind_the_hello_is_not_heard(server, method):
    """Whether it waits for the welcome or not, it would be a stranger's."""
    for hello in (hello_fields(), hello_fields(login=["token", TOKEN])):
        attacker = Attacker(server)
        heard = await attacker.say_and_wait(Hello(hello), call(method))
        assert not any(isinstance(each, Reply) for each in heard)
        assert attacker.is_out
    assert is_unchanged(server)


@pytest.mark.parametrize("method", CALLABLE)
async def test_anonymous_gets_an_answer_to_a_ping_and_to_nothing_else(server, method):
    attacker = Attacker(server)
    (refusal,) = attacker.say(Hello(hello_fields()))
    assert isinstance(refusal, Failure)
    assert refusal.attributes == {"reason": "access"}
    assert await attacker.say_and_wait(call(method)) == []
    assert attacker.is_out
    attacker = Attacker(server)
    (welcome,) = attacker.say(Hello(hello_fields(kind="channel", storage=None)))
    assert isinstance(welcome, Welcome)
    assert welcome.fields["session"] is None
    (answer,) = await attacker.say_and_wait(call(method))
    assert isinstance(answer, Reply) is (method == "ping")
    assert is_unchanged(server)
    assert not server.service.sessions


@pytest.mark.parametrize("token", [bytes(16), b"\xff" * 16, b"s" * 16])
async def test_a_guessed_session_is_none(server, token):
    Attacker(server).log_in(password_login("ann"))
    assert len(server.service.sessions) == 1
    attacker = Attacker(server)
    (refusal,) = attacker.say(Hello(hello_fields(kind="channel", session=token)))
    assert isinstance(refusal, Failure)
    assert refusal.attributes == {"reason": "session"}
    assert attacker.peer.session is None
    assert attacker.peer.answer is None


async def test_a_recorded_login_opens_nothing(server):
    """Every byte that ann has sent, again."""
    ann = Attacker(server)
    assert isinstance(ann.log_in(password_login("ann")), Welcome)
    for size in (len(ann.said), 1, 100):
        attacker = Attacker(server)
        heard = [
            message
            for at in range(0, len(ann.said), size)
            for message in attacker.send(ann.said[at : at + size])
        ]
        await attacker.wait_for_the_end()
        heard += attacker.heard()
        assert not any(isinstance(each, Welcome) for each in heard)
        assert attacker.peer.session is None
    assert len(server.service.sessions) == 1


async def test_a_response_to_somebody_elses_challenge_is_none(server):
    login = password_login("ann")
    hello = Hello(hello_fields(login=login.hello_login()))
    one, other = Attacker(server), Attacker(server)
    (challenge,) = one.say(hello)
    assert isinstance(challenge, Challenge)
    other.say(hello)
    assert other.say(Response(login.respond(challenge.text))) == []
    await other.wait_for_the_end()
    assert not server.service.sessions


@pytest.mark.parametrize("text", ["", "c=biws", "x" * 1024, "\0", "c=biws,r=x,p=AAAA"])
async def test_garbage_for_a_response_is_refused_late(server, text):
    attacker = Attacker(server)
    login = password_login("ann")
    attacker.say(Hello(hello_fields(login=login.hello_login())))
    assert attacker.say(Response(text)) == []
    await attacker.wait_for_the_end()
    (refusal,) = attacker.heard()
    assert isinstance(refusal, Failure)
    assert refusal.attributes == {"reason": "login"}


async def test_who_is_refused_may_not_ask_once_more(server):
    """Not on the same socket: that one is counted, and over."""
    attacker = Attacker(server)
    assert attacker.log_in(password_login("ann", "guessed")) is None
    login = password_login("ann")
    heard = attacker.say(Hello(hello_fields(login=login.hello_login())))
    assert isinstance(heard[-1], Goodbye)
    assert attacker.is_out
    await asyncio.sleep(0)
    assert not server.service.sessions


async def test_who_is_in_cannot_log_in_again_as_somebody_else(server):
    attacker = Attacker(server)
    assert isinstance(attacker.log_in(token_login()), Welcome)
    heard = attacker.say(Hello(hello_fields(login=["scram", "n,,n=ann,r=x"])))
    assert isinstance(heard[-1], Goodbye)
    assert attacker.is_out


async def test_a_login_of_more_than_its_bound_is_not_looked_at(server):
    attacker = Attacker(server)
    (goodbye,) = attacker.say(Hello(hello_fields(login=["token", "x" * 1025])))
    assert isinstance(goodbye, Goodbye)
    assert "more than 1024" in goodbye.text


# As one who may read


def reader(server: ModelServer) -> Attacker:
    """A channel of a session that may read, and would like to write."""
    welcome = Attacker(server).log_in(token_login(), read_only=False)
    channel = Attacker(server)
    channel.join(welcome)
    return channel


@pytest.mark.parametrize("method", CALLABLE)
async def test_who_may_read_gets_nothing_else(server, method):
    attacker = reader(server)
    heard = await attacker.say_and_wait(call(method))
    if method not in READING:
        (answer,) = heard
        assert isinstance(answer, Failure | Goodbye)
        assert "needs the role" in answer.text
        assert is_unchanged(server)
    assert server.served.changes.last_tid == number(1)
    assert not server.served.committer.holders


@pytest.mark.parametrize("method", CALLABLE)
async def test_nobody_calls_a_method_on_a_stream(server, method):
    attacker = Attacker(server)
    assert isinstance(attacker.log_in(password_login("ann")), Welcome)
    (goodbye,) = await attacker.say_and_wait(call(method))
    assert isinstance(goodbye, Goodbye)
    assert attacker.is_out
    assert is_unchanged(server)


async def test_nobody_waits_behind_a_thousand_requests_of_a_reader(server):
    """Which wait for a thread each."""
    ann, channel = Attacker(server), Attacker(server)
    channel.join(ann.log_in(password_login("ann")))
    attackers = [reader(server) for _ in range(3)]
    for attacker in attackers:
        attacker.say(*(Request(n, "get_tid", [OID]) for n in range(1, 1000)))
    channel.say(Request(1, "get_tid", [OID]))
    answered = 0
    while not (answer := channel.heard()):
        await server.workers.read_step()
        answered += 1
    assert isinstance(answer[0], Reply)
    assert answered <= READERS + len(attackers) + 1
    await server.workers.work()
    assert sum(len(each.heard()) for each in attackers) == 3 * 999


async def test_what_a_reader_has_asked_for_is_not_read_when_he_is_gone(server):
    attacker = reader(server)
    attacker.say(*(Request(n, "get_tid", [OID]) for n in range(1, 1000)))
    attacker.peer.cut_off()
    await asyncio.sleep(0)
    assert server.served.readings.waiting == 0


async def test_the_others_hear_nothing_of_it(server):
    ann, channel = Attacker(server), Attacker(server)
    channel.join(ann.log_in(password_login("ann")))
    for method in CALLABLE:
        await reader(server).say_and_wait(call(method))
        await Attacker(server).say_and_wait(call(method))
    latest = b"\x7f" + b"\xff" * 7
    (answer,) = channel.say(Request(1, "load", [OID, latest]))
    assert isinstance(answer, Reply)
    assert answer.value[0] == b"data"
    assert ann.heard() == []
    assert not ann.is_out
