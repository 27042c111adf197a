"""Who comes in as whom; what the welcome tells is in test_service."""

from zeolith.protocol.messages import Failure, Welcome
from zeolith.server.access import OPEN, Access, parse_grants

from ..support.memory import MemoryClient, MemorySession
from ..support.model import ModelServer


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
