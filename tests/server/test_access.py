import asyncio
from itertools import combinations
from typing import Any

import pytest
from ZODB.POSException import ReadOnlyError, StorageError

from zeolith.protocol.errors import Forbidden, LocalProtocolError, WriteForbidden
from zeolith.protocol.messages import Failure, Goodbye, Reply
from zeolith.protocol.methods import METHODS, OPERATION_ROLES
from zeolith.protocol.roles import EVERY_ROLE, AccessRole, Roles, with_included
from zeolith.server.access import (
    EVERYTHING,
    OPEN,
    Access,
    Grant,
    Identity,
    parse_grants,
    permit,
)

from ..support.ids import number, transaction_id
from ..support.memory import MemoryClient, MemorySession
from ..support.model import ModelServer
from .test_service import ARGUMENTS, CALLABLE, METADATA

READ, WRITE, UNDO, PACK, ADMIN = AccessRole
OID = number(1)
TRANSACTION = transaction_id(1)
# Every set of roles that somebody can have been given.
ROLE_SETS = sorted(
    {
        with_included(roles)
        for size in range(len(AccessRole) + 1)
        for roles in combinations(AccessRole, size)
    },
    key=sorted,
)
OPERATIONS: dict[str, list[Any]] = {
    "undo": ["undo", number(1)],
    "delete": ["delete", OID, number(1)],
    "restore": ["restore", OID, number(9), b"data", None],
    "restore_blob": ["restore_blob", OID, number(9), b"data", None, 0],
}


def name_of(roles: Roles) -> str:
    return "+".join(sorted(roles)) or "none"


every_role_set = pytest.mark.parametrize("roles", ROLE_SETS, ids=name_of)


def grants_of(roles: Roles) -> tuple[Grant, ...]:
    return tuple(Grant(role, "1") for role in sorted(roles))


def server_for(roles: Roles) -> ModelServer:
    """A server where everybody has ``roles``."""
    server = ModelServer(access=Access(anonymous=grants_of(roles)))
    server.commit(OID, b"data")
    return server


async def called(
    server: ModelServer, client: MemoryClient, name: str, *args: Any
) -> Any:
    """The answer to a call, or what ended the socket."""
    if METHODS[name].answers:
        request = client.ask(name, *args)
        for _ in range(3):
            await server.workers.work()
            await asyncio.sleep(0)
        return client.answer(request)
    client.tell(name, *args)
    return client.received()[-1] if client.transport.is_closing() else None


def is_forbidden(answer: Any) -> bool:
    if isinstance(answer, Goodbye):
        return answer.reason == "forbidden"
    return isinstance(answer, Failure) and answer.name in (
        "Forbidden",
        "WriteForbidden",
    )


# Grants


@pytest.mark.parametrize(
    ("text", "grants"),
    [
        ("none", ()),
        ("read", (Grant(READ),)),
        ("write@main", (Grant(WRITE, "main"),)),
        ("read, undo@a pack@b", (Grant(READ), Grant(UNDO, "a"), Grant(PACK, "b"))),
    ],
)
def test_grants_are_written_between_spaces_or_commas(text, grants):
    assert parse_grants(text) == grants
    if grants:
        assert parse_grants(" ".join(map(str, grants))) == grants


@pytest.mark.parametrize("text", ["", "root", "read@", "none read", "@main", "READ"])
def test_what_is_no_grant_is_refused(text):
    with pytest.raises(ValueError, match=r"role|names no storage"):
        parse_grants(text)


def test_a_grant_is_for_one_storage_or_for_all():
    identity = Identity("user", "ann", parse_grants("read write@main pack@log"))
    assert identity.roles_on("main") == {READ, WRITE}
    assert identity.roles_on("log") == {READ, PACK}
    assert identity.roles_on("other") == {READ}
    assert identity.roles_anywhere(["main", "other"]) == {READ, WRITE}
    assert identity.roles_anywhere([]) == set()
    assert str(identity) == "user ann"


def test_without_a_configuration_everybody_may_do_everything():
    assert OPEN.anonymous == EVERYTHING
    assert Identity("anonymous", "", EVERYTHING).roles_on("any") == EVERY_ROLE


# The one place


def test_what_is_missing_is_named():
    with pytest.raises(Forbidden, match="status needs the role admin") as raised:
        permit("status", [], frozenset({READ}), in_session=True, is_read_only=False)
    assert not isinstance(raised.value, ReadOnlyError)
    assert isinstance(raised.value, StorageError)


def test_to_one_who_only_reads_the_database_is_read_only():
    for name in ("vote", "pack", "new_oids"):
        with pytest.raises(WriteForbidden, match="may only read") as raised:
            permit(name, [], frozenset({READ}), in_session=True, is_read_only=True)
        assert isinstance(raised.value, ReadOnlyError)


def test_a_session_that_only_reads_does_so_whatever_its_roles():
    with pytest.raises(ReadOnlyError, match="this connection is read-only"):
        permit("pack", [0.0, None], EVERY_ROLE, in_session=True, is_read_only=True)


def test_without_a_session_little_can_be_asked():
    with pytest.raises(LocalProtocolError, match="needs a session"):
        permit("load", [], EVERY_ROLE, in_session=False, is_read_only=False)
    permit("ping", [], frozenset(), in_session=False, is_read_only=False)


# Cell by cell


@every_role_set
@pytest.mark.parametrize("method", CALLABLE)
async def test_a_method_is_for_those_who_have_its_role(method, roles):
    server = server_for(roles)
    if READ not in roles:
        client = MemoryClient(server.service)
        refusal = client.hello()
        assert isinstance(refusal, Failure)
        assert refusal.attributes == {"reason": "access"}
        assert client.transport.is_closing() or not client.peer.connection.is_open
        return
    session = MemorySession(server.service)
    answer = await called(server, session.channel(), method, *ARGUMENTS[method])
    may = METHODS[method].role is None or METHODS[method].role in roles
    assert is_forbidden(answer) is not may
    if not may:
        assert not server.database.steps


@every_role_set
@pytest.mark.parametrize("method", ["vote", "commit", "stage"])
@pytest.mark.parametrize("operation", OPERATIONS)
async def test_an_operation_is_for_those_who_have_its_role(roles, method, operation):
    if WRITE not in roles:
        return
    server = server_for(roles)
    operations = [["store", OID, number(1), b"data"], OPERATIONS[operation]]
    arguments: dict[str, list[Any]] = {
        "vote": [METADATA, operations],
        "commit": [METADATA, operations, number(1)],
        "stage": [operations],
    }
    channel = MemorySession(server.service).channel()
    answer = await called(server, channel, method, TRANSACTION, *arguments[method])
    may = OPERATION_ROLES[operation] in roles
    assert is_forbidden(answer) is not may
    if not may:
        assert not server.database.steps


@every_role_set
async def test_a_tid_is_kept_for_those_who_administer(roles):
    if WRITE not in roles:
        return
    server = server_for(roles)
    channel = MemorySession(server.service).channel()
    metadata = [b"", b"", b"", number(9), " "]
    arguments = [TRANSACTION, metadata, []]
    for method, more in (("vote", []), ("commit", [number(1)])):
        answer = await called(server, channel, method, *arguments, *more)
        assert is_forbidden(answer) is (ADMIN not in roles)


@every_role_set
@pytest.mark.parametrize("method", CALLABLE)
async def test_a_channel_without_a_session_has_what_it_may_anywhere(method, roles):
    server = server_for(roles)
    client = MemoryClient(server.service)
    client.hello(kind="channel", storage=None)
    answer = await called(server, client, method, *ARGUMENTS[method])
    is_free = method == "ping" or (method == "status" and ADMIN in roles)
    if method == "status" and ADMIN not in roles:
        assert is_forbidden(answer)
    else:
        assert (answer is not None and isinstance(answer, Reply)) is is_free


async def test_the_status_tells_of_what_one_administers():
    server = ModelServer(access=Access(anonymous=parse_grants("admin@2 read")))
    server.service.databases["2"] = server.served
    client = MemoryClient(server.service)
    client.hello(kind="channel", storage=None)
    answer = await called(server, client, "status")
    assert isinstance(answer, Reply)
    assert list(answer.value["storages"]) == ["2"]


async def test_a_session_that_may_not_write_is_told_that_it_is_read_only():
    session = MemorySession(server_for(frozenset({READ})).service)
    assert session.welcome["read_only"] is True
    assert session.welcome["roles"] == ["read"]
    packer = MemorySession(server_for(with_included([PACK])).service)
    assert packer.welcome["read_only"] is True
    writer = MemorySession(server_for(with_included([WRITE])).service)
    assert writer.welcome["read_only"] is False


async def test_a_writer_may_ask_for_a_session_that_only_reads():
    server = server_for(with_included([WRITE]))
    session = MemorySession(server.service, read_only=True)
    assert session.welcome["read_only"] is True
    assert session.welcome["roles"] == ["read", "write"]
    answer = await called(server, session.channel(), "new_oids", 1)
    assert isinstance(answer, Failure)
    assert answer.name == "ReadOnlyError"
