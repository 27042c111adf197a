"""Who comes in as whom; what the welcome tells is in test_service."""

import logging
import time
from dataclasses import replace

import pytest

from zeolith.protocol.login import Login
from zeolith.protocol.messages import Challenge, Failure, Welcome
from zeolith.server import complaints
from zeolith.server.access import OPEN, Access, Identity, parse_grants

from ..support.identities import (
    PASSWORD,
    TOKEN,
    password_login,
    token_login,
)
from ..support.identities import access as access_of
from ..support.memory import MemoryClient, MemorySession, hello_fields
from ..support.model import ModelServer
from ..support.waiting import wait_on_loop


def access(anonymous: str) -> Access:
    return Access(anonymous=parse_grants(anonymous))


async def test_who_has_no_role_does_not_learn_which_storages_there_are():
    server = ModelServer(access=access("read@other"))
    refusals = [
        MemoryClient(server.service).hello(storage=name) for name in ("1", "none", None)
    ]
    for refusal in refusals:
        assert isinstance(refusal, Failure)
        assert refusal.attributes == {"reason": "access"}
        assert "'other'" not in refusal.text
    texts = {refusal.text.rpartition(" ")[0] for refusal in refusals}  # type: ignore[union-attr]
    assert texts == {"anonymous has no role on storage"}


async def test_sessions_end_when_their_roles_are_others():
    server = ModelServer(access=access("write"))
    session = MemorySession(server.service)
    channel = session.channel()
    server.service.greeting.renew(access("read"))
    for client in (session.stream, channel):
        assert client.goodbye().reason == "access"
    assert not server.service.sessions
    refusal = MemoryClient(server.service).hello(
        kind="channel", session=session.welcome["session"]
    )
    assert isinstance(refusal, Failure)
    assert MemorySession(server.service).welcome["roles"] == ["read"]


async def test_sessions_whose_roles_are_the_same_go_on():
    server = ModelServer(access=access("read write@1"))
    session = MemorySession(server.service)
    server.service.greeting.renew(access("write@1 pack@2"))
    assert not session.stream.transport.is_closing()
    assert len(server.service.sessions) == 1


async def test_without_a_role_one_may_ask_whether_a_server_is_there():
    server = ModelServer(access=access("none"))
    client = MemoryClient(server.service)
    assert isinstance(client.hello(kind="channel", storage=None), Welcome)
    ping = client.ask("ping")
    assert client.value(ping) is None


async def test_an_open_server_can_be_closed_and_opened():
    server = ModelServer()
    server.service.greeting.renew(access("none"))
    assert isinstance(MemoryClient(server.service).hello(), Failure)
    server.service.greeting.renew(OPEN)
    assert isinstance(MemoryClient(server.service).hello(), Welcome)


# Login


def logged_in(server: ModelServer, login: Login) -> MemoryClient:
    client = MemoryClient(server.service)
    assert isinstance(client.log_in(login), Welcome)
    return client


def identity_of(client: MemoryClient) -> Identity:
    assert client.peer.session is not None
    return client.peer.session.identity


@pytest.fixture
async def guarded() -> ModelServer:
    """A server that knows two users and a token."""
    server = ModelServer(access=access_of(ann="write", bob="none"))
    server.service.greeting.failed_login_delay_s = 0.01
    return server


async def test_who_logs_in_has_his_roles(guarded):
    client = logged_in(guarded, password_login("ann"))
    assert str(identity_of(client)) == "user ann"
    assert identity_of(client).roles_on("1") == {"read", "write"}
    client = logged_in(guarded, token_login())
    assert str(identity_of(client)) == "token 0a1b2c3d"
    assert client.peer.session is not None
    assert client.peer.session.is_read_only


async def test_a_channel_is_who_its_stream_is(guarded):
    client = MemoryClient(guarded.service)
    welcome = client.log_in(password_login("ann"))
    assert isinstance(welcome, Welcome)
    channel = MemoryClient(guarded.service)
    channel.hello(kind="channel", session=welcome.fields["session"])
    assert channel.peer.identity == identity_of(client)
    oids = channel.ask("new_oids", 1)
    await guarded.workers.work()
    assert len(channel.value(oids)) == 1


async def test_a_channel_without_a_session_may_log_in(guarded):
    guarded.service.greeting.renew(access_of(ann="admin"))
    client = MemoryClient(guarded.service)
    answer = client.log_in(password_login("ann"), kind="channel", storage=None)
    assert isinstance(answer, Welcome)
    assert str(client.peer.identity) == "user ann"


async def test_who_logs_in_and_has_no_role_stays_outside(guarded):
    client = MemoryClient(guarded.service)
    refusal = client.log_in(password_login("bob"))
    assert isinstance(refusal, Failure)
    assert refusal.attributes == {"reason": "access"}
    assert "user bob has no role" in refusal.text


FAILING = {
    "wrong password": lambda: password_login("ann", "guessed"),
    "unknown user": lambda: password_login("carl"),
    "unknown token": lambda: token_login("00000000.x"),
    "wrong token": lambda: token_login("0a1b2c3d.x"),
}


@pytest.mark.parametrize("case", FAILING)
async def test_a_login_that_fails_is_told_late_and_says_nothing(guarded, case, caplog):
    guarded.service.greeting.failed_login_delay_s = 3600
    client = MemoryClient(guarded.service)
    assert client.log_in(FAILING[case]()) is None
    assert "192.0.2.7:4567 is not let in: " in caplog.text
    assert "guessed" not in caplog.text
    guarded.service.greeting.failed_login_delay_s = 0.01
    client = MemoryClient(guarded.service)
    assert client.log_in(FAILING[case]()) is None
    await wait_on_loop(lambda: client.peer.connection.is_closed, "the refusal")
    (refusal,) = client.received()
    assert isinstance(refusal, Failure)
    assert refusal[1:] == ("HelloRefused", {"reason": "login"}, "the login failed")
    assert not guarded.service.sessions


async def test_whoever_guesses_does_not_fill_the_log(guarded, caplog, monkeypatch):
    monkeypatch.setattr(complaints, "INTERVAL_S", 1000)
    for _ in range(20):
        client = MemoryClient(guarded.service)
        assert client.log_in(next(iter(FAILING.values()))()) is None
    assert caplog.text.count("is not let in") == 1


async def test_a_peer_that_is_gone_is_not_told(guarded):
    client = MemoryClient(guarded.service)
    assert client.log_in(password_login("carl")) is None
    await client.lose()
    challenged = MemoryClient(guarded.service)
    hello = challenged.connection.hello
    login = password_login("ann").hello_login()
    challenged.send(hello(hello_fields(login=login), 0.0))
    await challenged.lose()
    assert not guarded.service.greeting._challenged
    await wait_on_loop(lambda: not guarded.service.peers, "the end")


@pytest.mark.parametrize("login", [["scram", "n,,n=ann,r=x"], ["token", TOKEN]])
async def test_a_server_that_knows_nobody_lets_nobody_log_in(login):
    server = ModelServer()
    server.service.greeting.failed_login_delay_s = 0.0
    client = MemoryClient(server.service)
    client.send(client.connection.hello(hello_fields(login=login), 0.0))
    await wait_on_loop(lambda: client.peer.connection.is_closed, "the refusal")
    (refusal,) = client.received()
    assert isinstance(refusal, Failure)
    assert refusal.attributes == {"reason": "login"}


@pytest.mark.parametrize("login", [["basic", "x"], ["", ""], ["scram", ""]])
async def test_another_way_to_log_in_is_refused(guarded, login):
    client = MemoryClient(guarded.service)
    client.send(client.connection.hello(hello_fields(login=login), 0.0))
    await wait_on_loop(lambda: client.peer.connection.is_closed, "the refusal")
    assert isinstance(client.received()[0], Failure)


# The end of an identity


async def test_a_user_that_is_removed_is_let_go(guarded, caplog):
    ann, token = (
        logged_in(guarded, password_login("ann")),
        logged_in(guarded, token_login()),
    )
    guarded.service.greeting.renew(access_of(bob="write"))
    goodbye = ann.goodbye()
    assert goodbye.reason == "access"
    assert goodbye.text == "user ann may not come in any more"
    assert "user ann may not come in any more" in caplog.text
    assert not token.transport.is_closing()


async def test_another_password_ends_what_the_old_one_began(guarded):
    ann = logged_in(guarded, password_login("ann"))
    renewed = access_of(ann="write")
    changed = Identity("user", "ann", renewed.users["ann"].identity.grants, b"other")
    users = {"ann": replace(renewed.users["ann"], identity=changed)}
    guarded.service.greeting.renew(replace(renewed, users=users))
    assert ann.goodbye().reason == "access"


async def test_a_token_ends_while_it_is_used(guarded, caplog):
    over_s = time.time() + 3600
    guarded.service.greeting.renew(access_of(token="read", expires_s=over_s))
    client = logged_in(guarded, token_login())
    guarded.service.tick(0.0)
    assert not client.transport.is_closing()
    guarded.service.greeting.renew(access_of(token="read", expires_s=1.0))
    guarded.service.tick(0.0)
    assert client.goodbye().text == "token 0a1b2c3d has expired"


async def test_who_is_removed_between_challenge_and_response_stays_outside(guarded):
    client = MemoryClient(guarded.service)
    login = password_login("ann")
    hello = hello_fields(login=login.hello_login())
    client.send(client.connection.hello(hello, 0.0))
    (challenge,) = client.received()
    assert isinstance(challenge, Challenge)
    guarded.service.greeting.renew(access_of(bob="write"))
    client.send(client.connection.respond(login.respond(challenge.text), 0.0))
    (refusal,) = client.received()
    assert isinstance(refusal, Failure)
    assert refusal.attributes == {"reason": "login"}


async def test_nothing_secret_is_in_the_log(guarded, caplog):
    with caplog.at_level(logging.DEBUG):
        logged_in(guarded, password_login("ann"))
        logged_in(guarded, token_login())
        MemoryClient(guarded.service).log_in(password_login("ann", "guessed"))
    for secret in (PASSWORD, TOKEN, "guessed"):
        assert secret not in caplog.text
    assert "as user ann" in caplog.text
