import asyncio
from dataclasses import replace
from typing import Any

import pytest
from ZODB.POSException import ConflictError

from zeolith.protocol.limits import DEFAULT
from zeolith.protocol.messages import Failure, Goodbye, Notice, Reply, Welcome
from zeolith.protocol.methods import METHODS, VERSION
from zeolith.protocol.roles import CHANGING
from zeolith.server.committer import Phase
from zeolith.server.loading import PREFETCHED
from zeolith.storage.database import Conflict, Transaction, Unresolved

from ..support.ids import number, transaction_id
from ..support.memory import UNHURRIED, MemoryClient, MemorySession
from ..support.model import ModelDatabase, ModelServer, publish

OID = number(1)
TRANSACTION = transaction_id(1)
METADATA: list[Any] = [b"user", b"description", b"", None, " "]
STORE = ["store", OID, number(0), b"data"]
LATEST = b"\x7f" + b"\xff" * 7
CONFLICT = Conflict(OID, number(2), number(1), b"committed", b"old", b"new")

# Some arguments for each method that a client may call.
ARGUMENTS: dict[str, list[Any]] = {
    "ping": [],
    "status": [],
    "load": [OID, LATEST],
    "load_many": [[OID], LATEST],
    "load_ahead": [[OID], LATEST, 1, 1000],
    "load_serial": [OID, number(1)],
    "load_blob": [OID, number(1), 0, 100],
    "get_tid": [OID],
    "history": [OID, 1],
    "undo_log": [None, 1],
    "transactions": [None, None, None],
    "records": [None],
    "info": [],
    "changes_since": [number(0)],
    "last_known": [[number(1)]],
    "verify": [[[OID, number(1)]]],
    "outcome": [TRANSACTION, None, number(0)],
    "new_oids": [1],
    "stage": [TRANSACTION, []],
    "blob_chunk": [TRANSACTION, 0, b"data"],
    "vote": [TRANSACTION, METADATA, []],
    "commit": [TRANSACTION, METADATA, [], number(0)],
    "resolve": [TRANSACTION, []],
    "finish": [TRANSACTION, number(0)],
    "abort": [TRANSACTION],
    "pack": [0.0, None],
    "pack_progress": [],
    "pack_cancel": [],
}
CALLABLE = [method.name for method in METHODS.values() if method.sender == "client"]
READING = [name for name in CALLABLE if METHODS[name].role not in CHANGING]


@pytest.fixture
async def server() -> ModelServer:
    server = ModelServer()
    server.commit(OID, b"data")
    return server


@pytest.fixture
async def session(server: ModelServer) -> MemorySession:
    return MemorySession(server.service)


@pytest.fixture
async def channel(session: MemorySession) -> MemoryClient:
    return session.channel()


async def called(server: ModelServer, client: MemoryClient, method: str) -> Any:
    """The answer to ``method``, or what ended the socket."""
    if METHODS[method].answers:
        request = client.ask(method, *ARGUMENTS[method])
        await server.workers.work()
        await asyncio.sleep(0)
        await server.workers.work()
        return client.answer(request)
    client.tell(method, *ARGUMENTS[method])
    return client.received()[-1] if client.transport.is_closing() else None


def is_refused(answer: Any, text: str) -> bool:
    return isinstance(answer, Failure | Goodbye) and text in answer.text


# Who may do what


def test_all_methods_have_arguments_to_be_tried_with():
    assert sorted(ARGUMENTS) == sorted(CALLABLE)
    for method, arguments in ARGUMENTS.items():
        METHODS[method].check(arguments)


@pytest.mark.parametrize("method", CALLABLE)
async def test_a_read_only_session_can_only_read(server, method):
    session = MemorySession(server.service, read_only=True)
    answer = await called(server, session.channel(), method)
    may = METHODS[method].role not in CHANGING
    assert is_refused(answer, "read-only") is not may
    if not may:
        assert not server.database.steps


@pytest.mark.parametrize("method", CALLABLE)
async def test_a_server_that_is_read_only_has_only_readers(method):
    server = ModelServer(is_read_only=True)
    server.database.put(OID, number(1), b"data")
    session = MemorySession(server.service, read_only=True)
    answer = await called(server, session.channel(), method)
    assert is_refused(answer, "read-only") is not (method in READING)


@pytest.mark.parametrize("method", CALLABLE)
async def test_a_channel_without_a_session_can_only_ping_and_ask_for_the_status(
    server, method
):
    client = MemoryClient(server.service)
    client.hello(kind="channel", storage=None, read_only=True)
    answer = await called(server, client, method)
    assert is_refused(answer, "needs a session") is not (method in ("ping", "status"))
    assert not server.database.steps


@pytest.mark.parametrize("method", CALLABLE)
async def test_a_session_that_may_write_can_do_everything(server, session, method):
    answer = await called(server, session.channel(), method)
    assert not is_refused(answer, "read-only")
    assert not is_refused(answer, "needs a session")


# Hello


async def test_one_welcome_tells_everything_a_client_must_know(server):
    session = MemorySession(server.service, label="zope-3")
    token = session.welcome.pop("session")
    assert len(token) == 16
    assert session.welcome == {
        "version": VERSION,
        "capabilities": [],
        "database_id": b"model-database-1",
        "epoch": 1,
        "last_tid": number(1),
        "changes": [],
        "name": "1",
        "size": 0,
        "length": 0,
        "interfaces": ["IStorage"],
        "supports_undo": False,
        "read_only": False,
        "roles": ["admin", "pack", "read", "undo", "write"],
        "proof": None,
    }


async def test_every_session_has_a_token_of_its_own(server):
    tokens = {MemorySession(server.service).welcome["session"] for _ in range(10)}
    assert len(tokens) == 10


@pytest.mark.parametrize(
    ("fields", "reason", "text"),
    [
        ({"version": VERSION + 1}, "version", "this server speaks version"),
        ({"storage": "2"}, "storage", "there is no storage '2' here, only '1'"),
        ({"storage": None}, "storage", "there is no storage None"),
        ({"kind": "channel", "session": bytes(16)}, "session", "has ended"),
    ],
)
async def test_a_hello_is_refused_with_a_reason(server, fields, reason, text):
    client = MemoryClient(server.service)
    refusal = client.hello(**fields)
    assert isinstance(refusal, Failure)
    assert refusal.name == "HelloRefused"
    assert refusal.attributes == {"reason": reason}
    assert text in refusal.text
    await asyncio.sleep(0)
    assert client.transport.is_lost
    assert not server.service.sessions


async def test_a_version_that_is_no_number_is_another_version(server):
    client = MemoryClient(server.service)
    refusal = client.hello(version="\N{SNOWMAN}" * 1000)
    assert isinstance(refusal, Failure)
    assert refusal.attributes == {"reason": "version"}
    assert len(refusal.text) < 200


async def test_a_hello_of_another_version_may_have_other_fields(server):
    client = MemoryClient(server.service)
    now = asyncio.get_running_loop().time()
    client.send(client.connection.hello({"version": 99, "kind": "stream"}, now))
    (refusal,) = client.received()
    assert isinstance(refusal, Failure)
    assert refusal.attributes == {"reason": "version"}


async def test_a_writer_is_refused_where_nothing_is_written():
    server = ModelServer(is_read_only=True)
    refusal = MemoryClient(server.service).hello()
    assert isinstance(refusal, Failure)
    assert refusal.attributes == {"reason": "read-only"}
    assert "read_only_fallback" in refusal.text


async def test_a_read_only_database_makes_a_read_only_storage():
    server = ModelServer(ModelDatabase(is_read_only=True))
    assert isinstance(MemoryClient(server.service).hello(), Failure)
    session = MemorySession(server.service, read_only=True)
    assert session.welcome["read_only"] is True
    assert "admin" in session.welcome["roles"]


async def test_nobody_is_welcome_in_a_server_that_stops(server):
    server.service.is_stopping = True
    refusal = MemoryClient(server.service).hello()
    assert isinstance(refusal, Failure)
    assert refusal.attributes == {"reason": "stopping"}


async def test_a_returning_client_gets_the_changes_it_has_missed(server):
    tids = [server.commit(number(n), b"more") for n in (5, 6)]
    session = MemorySession(server.service, position=number(1))
    assert session.welcome["last_tid"] == tids[-1]
    assert session.welcome["changes"] == [
        [number(1), tids[0], [number(5)], None],
        [tids[0], tids[1], [number(6)], None],
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"database_id": b"another-database"},
        {"epoch": 2},
        {"position": LATEST},
    ],
)
async def test_a_client_of_another_history_must_start_afresh(server, fields):
    hello = {
        "position": number(1),
        "database_id": b"model-database-1",
        "epoch": 1,
        **fields,
    }
    session = MemorySession(server.service, **hello)
    assert session.welcome["changes"] is None
    assert session.welcome["last_tid"] == number(1)


async def test_tids_that_a_client_has_seen_are_not_given_again(server):
    """The server was restored from an older copy than the client knows."""
    session = MemorySession(server.service, position=number(50))
    assert session.welcome["changes"] is None
    await server.workers.work()
    channel = session.channel()
    vote = channel.ask("vote", TRANSACTION, METADATA, [["store", *new(9)]])
    await server.workers.work()
    assert channel.value(vote) == ["voted", number(51), []]


async def test_a_client_from_the_future_cannot_use_up_the_tids(server):
    MemorySession(server.service, position=LATEST)
    await server.workers.work()
    assert server.database.tid_floor == number(0)


async def test_following_and_the_last_tid_are_one_step(server):
    """Between the answer to a hello and the first change nothing is missing."""
    sessions = []
    tids = []
    for n in range(5):
        sessions.append(MemorySession(server.service))
        tids.append(server.commit(number(10 + n), b"more"))
    for n, session in enumerate(sessions):
        received = session.stream.changes()
        assert [change[1] for change in received] == tids[n:]
        assert received[0][0] == session.welcome["last_tid"]


# Loads


def new(value: int) -> list[bytes]:
    return [number(value), number(0), b"data"]


async def test_a_load_names_the_tid_as_of_which_it_is_true(server, channel):
    server.commit(number(2), b"other")
    load = channel.ask("load", OID, LATEST)
    assert channel.value(load) == [b"data", number(1), None, number(2)]
    server.commit(OID, b"more")
    older = channel.ask("load", OID, number(3))
    assert channel.value(older) == [b"data", number(1), number(3), number(3)]


async def test_what_is_not_there_is_an_error_and_what_is_younger_is_nothing(
    server, channel
):
    absent = channel.ask("load", number(9), LATEST)
    assert channel.failure(absent).name == "POSKeyError"
    assert channel.answer(absent) is None
    younger = channel.ask("load", OID, number(1))
    assert channel.value(younger) == [None, None, None, number(1)]


async def test_a_load_does_not_show_what_was_not_announced(server, channel):
    """The storage has it already, the loop has not heard of it yet."""
    server.database.put(OID, number(2), b"not announced")
    load = channel.ask("load", OID, LATEST)
    many = channel.ask("load_many", [OID], LATEST)
    assert channel.value(load) == [b"data", number(1), number(2), number(1)]
    assert channel.value(many) == [number(1), [[b"data", number(1), number(2)]]]
    publish(server.served, number(2), [OID])
    load = channel.ask("load", OID, LATEST)
    assert channel.value(load)[0] == b"not announced"


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("before", [number(1), LATEST])
async def test_an_object_that_was_not_announced_is_not_there(
    server, channel, before, waits
):
    """And not: younger. The snapshot in which it is there has not been yet."""
    server.database.would_block = waits
    server.database.put(number(9), number(2), b"not announced")
    load = channel.ask("load", number(9), before)
    await server.workers.work()
    assert channel.failure(load).name == "POSKeyError"
    publish(server.served, number(2), [number(9)])
    load = channel.ask("load", number(9), number(1))
    await server.workers.work()
    assert channel.value(load) == [None, None, None, number(2)]


@pytest.mark.parametrize("method", ["load", "load_many"])
async def test_a_load_that_waits_is_as_of_the_moment_it_was_asked(
    server, channel, method
):
    server.database.would_block = True
    wanted = OID if method == "load" else [OID]
    load = channel.ask(method, wanted, LATEST)
    assert channel.answer(load) is None
    server.commit(OID, b"more")
    await server.workers.read_step()
    if method == "load":
        *revision, as_of = channel.value(load)
    else:
        as_of, (revision,) = channel.value(load)
    assert as_of == number(1)
    assert revision == [b"data", number(1), number(2)]


async def test_a_load_that_waits_can_fail(server, channel):
    server.database.would_block = True
    load = channel.ask("load", number(9), LATEST)
    await server.workers.read_step()
    assert channel.failure(load).name == "POSKeyError"


async def test_a_load_that_waits_holds_up_nobody(server, session, channel):
    server.database.would_block = True
    load = channel.ask("load", OID, LATEST)
    server.database.would_block = False
    other = session.channel()
    assert other.value(other.ask("load", OID, LATEST))[0] == b"data"
    assert channel.value(channel.ask("ping")) is None
    await server.workers.read_step()
    assert channel.value(load)[0] == b"data"


async def test_many_loads_skip_what_is_not_there(server, channel):
    many = channel.ask("load_many", [number(9), OID], LATEST)
    assert channel.value(many) == [number(1), [None, [b"data", number(1), None]]]


async def test_many_loads_end_when_the_answer_is_large():
    limits = replace(UNHURRIED, batch_bytes_max=1000, load_many_max=5)
    server = ModelServer(limits=limits)
    for n in range(5):
        server.commit(number(n), bytes(600))
    channel = MemorySession(server.service, limits).channel()
    oids = [number(n) for n in range(5)]
    many = channel.ask("load_many", oids, LATEST)
    _as_of, loaded = channel.value(many)
    assert len(loaded) == 2
    too_many = channel.ask("load_many", [*oids, OID], LATEST)
    assert "more than 5 oids" in channel.failure(too_many).text


@pytest.mark.parametrize("would_block", [False, True])
async def test_many_loads_do_not_hold_up_the_loop(would_block):
    limits = replace(UNHURRIED, load_many_max=9, load_many_answered_max=3)
    server = ModelServer(limits=limits)
    server.commit(OID, b"data")
    server.database.would_block = would_block
    channel = MemorySession(server.service, limits).channel()
    # What is not there is work, too.
    oids = [*[number(n) for n in range(7, 15)], OID]
    loaded: dict[bytes, Any] = {}
    answers = []
    while oids:
        many = channel.ask("load_many", oids, LATEST)
        await server.workers.work()
        _as_of, revisions = channel.value(many)
        answers.append(len(revisions))
        loaded.update(zip(oids, revisions, strict=False))
        del oids[: len(revisions)]
    assert answers == [3, 3, 3]
    assert loaded.pop(OID) == [b"data", number(1), None]
    assert set(loaded.values()) == {None}
    assert server.served.counters.loads == 9


@pytest.mark.parametrize("method", ["history", "undo_log"])
async def test_logs_are_bounded(method):
    limits = replace(UNHURRIED, log_entries_max=3)
    server = ModelServer(limits=limits)
    for _ in range(5):
        server.commit(OID, b"data")
    channel = MemorySession(server.service, limits).channel()
    arguments = [OID, 99] if method == "history" else [None, 99]
    log = channel.ask(method, *arguments)
    await server.workers.work()
    entries = channel.value(log)
    assert [entry[0] for entry in entries] == [number(n) for n in (5, 4, 3)]


async def test_oids_given_out_at_once_are_bounded():
    limits = replace(UNHURRIED, new_oids_max=3)
    server = ModelServer(limits=limits)
    channel = MemorySession(server.service, limits).channel()
    oids = channel.ask("new_oids", 1000)
    await server.workers.work()
    assert channel.value(oids) == [number(n) for n in (1, 2, 3)]


async def test_changes_since_a_position_are_told(server, channel):
    tid = server.commit(number(5), b"more")
    since = channel.ask("changes_since", number(1))
    assert channel.value(since) == [tid, [[number(1), tid, [number(5)], None]]]
    unknown = channel.ask("changes_since", number(77))
    assert channel.value(unknown) == [tid, None]


async def test_an_unexpected_error_is_answered_and_logged(
    server, channel, caplog, monkeypatch
):
    def fail(*_args: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(server.database, "load_nowait", fail)
    monkeypatch.setattr(server.database, "get_tid", fail)
    at_once = channel.ask("load", OID, LATEST)
    later = channel.ask("get_tid", OID)
    await server.workers.work()
    for request in (at_once, later):
        failure = channel.failure(request)
        assert (failure.name, failure.text) == ("RuntimeError", "a bug")
    assert "192.0.2.7:4567 failed" in caplog.text
    assert channel.value(channel.ask("ping")) is None


async def test_a_status_that_cannot_be_told_is_an_error(server, channel, monkeypatch):
    def fail() -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(server.database, "info", fail)
    status = channel.ask("status")
    for _ in range(3):
        await asyncio.sleep(0)
        await server.workers.work()
    assert "the disk is gone" in channel.failure(status).text


# Commits


async def test_a_transaction_is_voted_and_finished(server, session, channel):
    other = MemorySession(server.service)
    vote = channel.ask("vote", TRANSACTION, METADATA, [["store", *new(5)]])
    await server.workers.work()
    assert channel.value(vote) == ["voted", number(2), []]
    finish = channel.ask("finish", TRANSACTION, number(1))
    await server.workers.work()
    assert channel.value(finish) == [number(2), []]
    change = [number(1), number(2), [number(5)], TRANSACTION]
    assert other.stream.received() == [Notice("changes", [[change]])]
    # It was told with the answer.
    assert not session.stream.received()


async def test_metadata_reach_the_database_as_they_are(server, channel, monkeypatch):
    voted = []
    vote = server.database.vote

    def remember(transaction: Transaction) -> Any:
        voted.append(transaction)
        return vote(transaction)

    monkeypatch.setattr(server.database, "vote", remember)
    metadata = [b"\xff user", b"\x00 description", b"\x80\x03any bytes", None, " "]
    channel.ask("vote", TRANSACTION, metadata, [["store", *new(5)]])
    await server.workers.work()
    (transaction,) = voted
    assert [
        transaction.user,
        transaction.description,
        transaction.extension,
        transaction.tid,
        transaction.status,
    ] == metadata


async def test_what_was_staged_is_part_of_the_vote(server, channel):
    for n in (5, 6):
        channel.tell("stage", TRANSACTION, [["store", *new(n)]])
    vote = channel.ask("vote", TRANSACTION, METADATA, [["store", *new(7)]])
    await server.workers.work()
    assert channel.value(vote)[0] == "voted"
    channel.ask("finish", TRANSACTION, number(1))
    await server.workers.work()
    assert server.served.changes.since(number(1))[0].oids == [
        number(n) for n in (5, 6, 7)
    ]


async def test_what_was_staged_for_another_transaction_is_not(server, channel):
    channel.tell("stage", transaction_id(2), [["store", *new(5)]])
    channel.ask("vote", TRANSACTION, METADATA, [["store", *new(7)]])
    await server.workers.work()
    channel.ask("finish", TRANSACTION, number(1))
    await server.workers.work()
    assert server.served.changes.since(number(1))[0].oids == [number(7)]


async def test_a_transaction_belongs_to_its_channel(server, session, channel):
    """Another one, of the same session even, cannot touch it."""
    other = session.channel()
    channel.ask("vote", TRANSACTION, METADATA, [["store", *new(5)]])
    await server.workers.work()
    finish = other.ask("finish", TRANSACTION, number(1))
    resolve = other.ask("resolve", TRANSACTION, [])
    abort = other.ask("abort", TRANSACTION)
    await server.workers.work()
    assert other.failure(finish).name == "StorageTransactionError"
    assert other.failure(resolve).name == "StorageTransactionError"
    assert other.value(abort) is None
    assert server.committer.holders[0].phase is Phase.VOTED
    finish = channel.ask("finish", TRANSACTION, number(1))
    await server.workers.work()
    assert channel.value(finish)[0] == number(2)


async def test_a_channel_carries_one_transaction_at_a_time(server, channel):
    first = channel.ask("vote", TRANSACTION, METADATA, [["store", *new(5)]])
    second = channel.ask("vote", transaction_id(2), METADATA, [["store", *new(6)]])
    assert "another transaction" in channel.failure(second).text
    await server.workers.work()
    assert channel.value(first)[0] == "voted"


async def test_an_abort_is_answered_and_the_channel_is_free(server, channel):
    channel.ask("vote", TRANSACTION, METADATA, [["store", *new(5)]])
    await server.workers.work()
    abort = channel.ask("abort", TRANSACTION)
    assert channel.answer(abort) is None
    await server.workers.work()
    assert channel.value(abort) is None
    again = channel.ask("vote", transaction_id(2), METADATA, [["store", *new(5)]])
    await server.workers.work()
    assert channel.value(again)[0] == "voted"


async def test_an_abort_before_the_vote_forgets_what_was_staged(server, channel):
    channel.tell("stage", TRANSACTION, [["store", *new(5)]])
    assert channel.value(channel.ask("abort", TRANSACTION)) is None
    channel.ask("vote", TRANSACTION, METADATA, [])
    await server.workers.work()
    channel.ask("finish", TRANSACTION, number(1))
    await server.workers.work()
    assert server.served.changes.since(number(1))[0].oids == []


async def test_a_conflict_is_told_with_oid_and_serials(server, channel):
    store = ["store", OID, number(7), b"data"]
    vote = channel.ask("vote", TRANSACTION, METADATA, [store])
    await server.workers.work()
    failure = channel.failure(vote)
    assert failure.name == ConflictError.__name__
    assert failure.attributes["oid"] == OID
    assert failure.attributes["serials"] == [number(1), number(7)]


async def test_a_conflict_can_be_resolved_by_the_client(server, channel):
    server.database.unresolved = Unresolved([CONFLICT])
    vote = channel.ask("vote", TRANSACTION, METADATA, [STORE])
    await server.workers.work()
    assert channel.value(vote) == ["conflicts", [list(CONFLICT)]]
    resolve = channel.ask("resolve", TRANSACTION, [[OID, b"resolved"]])
    await server.workers.work()
    assert channel.value(resolve) == ["voted", number(2), [OID]]


async def test_conflicts_that_are_too_large_to_tell_end_the_transaction():
    limits = replace(UNHURRIED, frame_bytes_max=64 * 1024, batch_bytes_max=1024)
    server = ModelServer(limits=limits)
    large = CONFLICT._replace(committed=bytes(30_000), old=bytes(40_000))
    server.database.unresolved = Unresolved([large])
    channel = MemorySession(server.service, limits).channel()
    vote = channel.ask("vote", TRANSACTION, METADATA, [STORE])
    await server.workers.work()
    assert "too large" in channel.failure(vote).text
    assert not server.committer.holders
    assert not server.database.is_in_transaction


async def test_the_answer_to_finish_brings_the_other_changes(server, session, channel):
    channel.ask("vote", TRANSACTION, METADATA, [["store", *new(5)]])
    await server.workers.work()
    tid = server.commit(number(6), b"of another")
    finish = channel.ask("finish", TRANSACTION, number(1))
    await server.workers.work()
    own, before = channel.value(finish)
    assert before == [[number(1), tid, [number(6)], None]]
    assert [change[1] for change in session.stream.changes()] == [tid]
    assert own > tid


async def test_a_finish_from_a_forgotten_position_says_so(server, channel):
    channel.ask("vote", TRANSACTION, METADATA, [["store", *new(5)]])
    await server.workers.work()
    finish = channel.ask("finish", TRANSACTION, number(77))
    await server.workers.work()
    assert channel.value(finish) == [number(2), None]


async def test_what_an_answer_could_not_tell_is_told_on_the_stream(
    server, session, channel
):
    """The position is forgotten, or the channel is lost."""
    channel.ask("vote", TRANSACTION, METADATA, [["store", *new(5)]])
    await server.workers.work()
    channel.ask("finish", TRANSACTION, number(77))
    await server.workers.work()
    assert [change[1] for change in session.stream.changes()] == [number(2)]
    channel.ask("vote", TRANSACTION, METADATA, [["store", *new(6)]])
    await server.workers.work()
    channel.ask("finish", TRANSACTION, number(2))
    await channel.lose()
    await server.workers.work()
    assert server.served.changes.last_tid == number(3)
    assert [change[1] for change in session.stream.changes()] == [number(3)]


async def test_a_disaster_is_told_to_the_one_who_finishes(server, channel):
    server.database.finish_error = OSError("the disk is gone")
    channel.ask("vote", TRANSACTION, METADATA, [["store", *new(5)]])
    await server.workers.work()
    finish = channel.ask("finish", TRANSACTION, number(1))
    await server.workers.work()
    assert channel.failure(finish).name == "StorageSystemError"
    # What is there can still be read.
    assert channel.value(channel.ask("load", OID, LATEST))[0] == b"data"


# Vote and finish in one


async def test_a_transaction_is_committed_at_once(server, session, channel):
    other = MemorySession(server.service)
    for n in (5, 6):
        channel.tell("stage", TRANSACTION, [["store", *new(n)]])
    commit = channel.ask(
        "commit", TRANSACTION, METADATA, [["store", *new(7)]], number(1)
    )
    await server.workers.work()
    assert channel.value(commit) == ["committed", number(2), [], []]
    oids = [number(n) for n in (5, 6, 7)]
    change = [number(1), number(2), oids, TRANSACTION]
    assert other.stream.received() == [Notice("changes", [[change]])]
    # It was told with the answer.
    assert not session.stream.received()
    assert not server.committer.holders


async def test_the_answer_brings_the_changes_since_before_the_vote(
    server, session, channel
):
    blocker = MemorySession(server.service).channel()
    blocker.ask("vote", transaction_id(2), METADATA, [["store", *new(5)]])
    await server.workers.work()
    store = ["store", *new(6)]
    commit = channel.ask("commit", TRANSACTION, METADATA, [store], number(1))
    await server.workers.work()
    assert channel.answer(commit) is None
    blocker.ask("finish", transaction_id(2), number(1))
    await server.workers.work()
    change = [number(1), number(2), [number(5)], transaction_id(2)]
    assert channel.value(commit) == ["committed", number(3), [], [change]]


async def test_more_changes_than_a_frame_holds_come_over_the_stream():
    """They must not make a failure of what is committed."""
    limits = replace(UNHURRIED, frame_bytes_max=64 * 1024, batch_bytes_max=1024)
    server = ModelServer(limits=limits)
    server.commit(OID, b"data")
    session = MemorySession(server.service, limits)
    channel = session.channel()
    position = server.served.changes.last_tid
    tids = [server.commit(number(n), b"") for n in range(2, 2000)]
    session.stream.received()
    commit = channel.ask("commit", TRANSACTION, METADATA, [], position)
    await server.workers.work()
    _committed, tid, _resolved, changes = channel.value(commit)
    assert tid > tids[-1]
    assert changes is None
    assert [change[1] for change in session.stream.changes()][-1] == tid


async def test_what_must_be_resolved_first_is_finished_later(server, channel):
    server.database.unresolved = Unresolved([CONFLICT])
    commit = channel.ask("commit", TRANSACTION, METADATA, [STORE], number(1))
    await server.workers.work()
    assert channel.value(commit) == ["conflicts", [list(CONFLICT)]]
    resolve = channel.ask("resolve", TRANSACTION, [[OID, b"resolved"]])
    await server.workers.work()
    assert channel.value(resolve) == ["voted", number(2), [OID]]
    finish = channel.ask("finish", TRANSACTION, number(1))
    await server.workers.work()
    assert channel.value(finish) == [number(2), []]


async def test_what_does_not_get_a_vote_is_not_finished(server, channel):
    store = ["store", OID, number(7), b"data"]
    commit = channel.ask("commit", TRANSACTION, METADATA, [store], number(1))
    await server.workers.work()
    assert channel.failure(commit).name == ConflictError.__name__
    assert server.served.changes.last_tid == number(1)
    assert not server.committer.holders


async def test_of_what_got_no_vote_nobody_need_ask_what_became(server, channel):
    """A system's error would say so, if it came from the finish."""
    server.database.finish_error = OSError("the disk is gone")
    for n, failure in enumerate(("StorageSystemError", "StorageError"), 5):
        commit = channel.ask(
            "commit", transaction_id(n), METADATA, [["store", *new(n)]], number(1)
        )
        await server.workers.work()
        assert channel.failure(commit).name == failure


@pytest.mark.parametrize("method", ["vote", "commit"])
async def test_what_comes_after_its_client_was_told_that_it_is_not_there_is_refused(
    server, session, channel, method
):
    asking = session.channel()
    outcome = asking.ask("outcome", TRANSACTION, None, number(1))
    assert asking.value(outcome) == ["not committed", None]
    arguments = [TRANSACTION, METADATA, [["store", *new(5)]], number(1)]
    late = channel.ask(method, *arguments[: 3 if method == "vote" else 4])
    await server.workers.work()
    assert channel.failure(late).name == "StorageTransactionError"
    assert server.served.changes.last_tid == number(1)
    # Others are not meant.
    other = channel.ask("commit", transaction_id(2), *arguments[1:])
    await server.workers.work()
    assert channel.value(other)[0] == "committed"


@pytest.mark.parametrize("steps", [0, 1, 2])
async def test_a_channel_lost_meanwhile_leaves_all_or_nothing(
    server, session, channel, steps
):
    channel.ask("commit", TRANSACTION, METADATA, [["store", *new(5)]], number(1))
    for _ in range(steps):
        await server.workers.write_step()
    await channel.lose()
    asking = session.channel()
    outcome = asking.ask("outcome", TRANSACTION, None, number(1))
    await server.workers.work()
    # It has voted after the first step; from then on it is on its way to the disk.
    assert asking.value(outcome) == (
        ["committed", number(2)] if steps else ["not committed", None]
    )
    assert not server.committer.holders


# What became of it


async def commit(server: ModelServer, channel: MemoryClient, id_: bytes) -> bytes:
    channel.ask("vote", id_, METADATA, [["store", *new(5)]])
    await server.workers.work()
    channel.ask("finish", id_, number(1))
    await server.workers.work()
    return server.served.changes.last_tid


async def test_the_outcome_of_a_commit_is_known(server, session, channel):
    tid = await commit(server, channel, TRANSACTION)
    asking = session.channel()
    outcome = asking.ask("outcome", TRANSACTION, None, number(1))
    assert asking.value(outcome) == ["committed", tid]


async def test_the_outcome_of_what_was_never_finished_is_known(
    server, session, channel
):
    await commit(server, channel, TRANSACTION)
    asking = session.channel()
    for position in (number(1), server.served.changes.last_tid):
        outcome = asking.ask("outcome", transaction_id(2), None, position)
        assert asking.value(outcome) == ["not committed", None]


async def test_the_outcome_waits_for_a_finish_under_way(server, session, channel):
    channel.ask("vote", TRANSACTION, METADATA, [["store", *new(5)]])
    await server.workers.work()
    channel.ask("finish", TRANSACTION, number(1))
    await channel.lose()
    asking = session.channel()
    outcome = asking.ask("outcome", TRANSACTION, None, number(1))
    assert asking.answer(outcome) is None
    await server.workers.work()
    assert asking.value(outcome) == ["committed", number(2)]


async def test_asking_for_the_outcome_settles_it(server, session, channel):
    """The finish may still be on its way: it must not arrive after the answer."""
    channel.ask("vote", TRANSACTION, METADATA, [["store", *new(5)]])
    await server.workers.work()
    asking = session.channel()
    outcome = asking.ask("outcome", TRANSACTION, None, number(1))
    finish = channel.ask("finish", TRANSACTION, number(1))
    await server.workers.work()
    assert asking.value(outcome) == ["not committed", None]
    assert channel.failure(finish).name == "StorageTransactionError"
    assert server.served.changes.last_tid == number(1)


@pytest.mark.parametrize(
    ("tid", "outcome"),
    [
        (number(1), ["committed", number(1)]),
        (number(3), ["not committed", None]),
        (None, ["unknown", None]),
    ],
)
async def test_an_outcome_of_long_ago_is_looked_up_in_the_log(
    server, channel, tid, outcome
):
    asked = channel.ask("outcome", TRANSACTION, tid, number(77))
    await server.workers.work()
    assert channel.value(asked) == outcome


# The end of a socket


async def phase_of(
    phase: Phase, server: ModelServer, channel: MemoryClient
) -> tuple[MemorySession | None, MemoryClient]:
    """Bring the transaction of ``channel`` into ``phase``."""
    blocker = None
    if phase is Phase.WAITING:
        blocker = MemorySession(server.service)
        blocking = blocker.channel()
        blocking.ask("vote", transaction_id(9), METADATA, [["store", *new(9)]])
        await server.workers.work()
    if phase is Phase.RESOLVING:
        server.database.unresolved = Unresolved([CONFLICT])
    channel.ask("vote", TRANSACTION, METADATA, [["store", *new(5)]])
    if phase not in (Phase.WAITING, Phase.VOTING):
        await server.workers.work()
    server.database.unresolved = None
    if phase in (Phase.FINISHING, Phase.ENDED):
        channel.ask("finish", TRANSACTION, number(1))
    if phase is Phase.ABORTING:
        channel.ask("abort", TRANSACTION)
    if phase is Phase.ENDED:
        await server.workers.work()
    commit = channel.peer.transactions.commit
    assert commit is not None
    assert commit.phase is phase
    return blocker, channel


REASONS = ["the channel breaks", "the stream breaks", "an offence", "silence"]


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize("phase", list(Phase))
async def test_nothing_is_left_of_a_client_whatever_it_was_doing(server, phase, reason):
    session = MemorySession(server.service)
    channel = session.channel()
    blocker, _channel = await phase_of(phase, server, channel)
    if reason == "the channel breaks":
        await channel.lose()
    elif reason == "the stream breaks":
        await session.stream.lose()
    elif reason == "an offence":
        channel.send(b"\xff" * 8)
    else:
        session.stream.peer.connection.rcvd_at -= DEFAULT.heartbeat_timeout_s + 1
        server.service.tick(asyncio.get_running_loop().time())
    for _ in range(3):
        await asyncio.sleep(0)
    if blocker is not None:
        await blocker.stream.lose()
    await server.workers.work()
    for _ in range(3):
        await asyncio.sleep(0)
    await server.workers.work()
    assert not server.committer.holders
    assert not server.committer.waiting
    assert not server.database.is_in_transaction
    assert channel.peer not in server.service.peers
    if reason in ("the stream breaks", "silence"):
        assert not server.service.sessions
        assert not server.service.peers
        assert not server.served.followers
    is_committed = phase in (Phase.FINISHING, Phase.ENDED)
    assert (number(5) in server.database.revisions) is is_committed
    # Another client commits as if nothing had been.
    other = MemorySession(server.service).channel()
    vote = other.ask("vote", transaction_id(3), METADATA, [["store", *new(6)]])
    await server.workers.work()
    assert other.value(vote)[0] == "voted"


async def test_a_lost_channel_ends_no_session(server, session, channel):
    await channel.lose()
    assert server.service.sessions
    other = session.channel()
    assert other.value(other.ask("ping")) is None


async def test_a_channel_cannot_join_a_session_that_has_ended(server, session):
    await session.stream.lose()
    client = MemoryClient(server.service)
    refusal = client.hello(kind="channel", session=session.welcome["session"])
    assert isinstance(refusal, Failure)
    assert refusal.attributes == {"reason": "session"}


async def test_waiting_until_everybody_has_gone(server, session, channel):
    waiting = asyncio.ensure_future(server.service.wait_until_empty(60))
    for client in (channel, session.stream):
        await asyncio.sleep(0)
        assert not waiting.done()
        await client.lose()
    await waiting


async def test_who_does_not_go_is_cut_off(server, session, channel):
    channel.transport.stop_reading()
    channel.ask("ping")
    for peer in tuple(server.service.peers):
        peer.hang_up("stopping")
    await server.service.wait_until_empty(0.001)
    await asyncio.sleep(0)
    assert channel.transport.is_lost
    assert not server.service.peers


async def test_a_reply_and_a_welcome_are_what_their_names_say(server, session):
    channel = session.channel()
    channel.ask("ping")
    assert channel.received() == [Reply(1, None)]
    assert isinstance(MemoryClient(server.service).hello(), Welcome)


# A database that is another server's


@pytest.fixture
async def relayed(server: ModelServer) -> ModelServer:
    server.database.tells_own = True
    return server


async def test_the_outcome_is_asked_of_whoever_knows(relayed, session, channel):
    relayed.database.known = ("committed", number(7))
    position = relayed.served.changes.last_tid
    asked = channel.ask("outcome", TRANSACTION, None, position)
    await relayed.workers.work()
    assert channel.value(asked) == ["committed", number(7)]


async def test_an_own_commit_is_announced_by_whoever_tells_it(relayed, channel):
    vote = channel.ask("vote", TRANSACTION, METADATA, [["store", *new(5)]])
    await relayed.workers.work()
    assert channel.value(vote)[0] == "voted"
    finish = channel.ask("finish", TRANSACTION, number(1))
    # Told, with one before it and one behind it, while the writer is at work.
    for value, transaction in ((2, None), (3, TRANSACTION), (4, None)):
        publish(relayed.served, number(value), [OID], transaction)
    relayed.database.last_tid = number(2)
    await relayed.workers.work()
    tid, others = channel.value(finish)
    assert tid == number(3)
    assert [change[1] for change in others] == [number(2), number(4)]
    assert relayed.served.changes.last_tid == number(4)


async def test_an_own_commit_that_is_not_told_yet_has_nothing_before_it(
    relayed, channel
):
    channel.ask("vote", TRANSACTION, METADATA, [["store", *new(5)]])
    await relayed.workers.work()
    finish = channel.ask("finish", TRANSACTION, number(1))
    await relayed.workers.work()
    assert channel.value(finish) == [number(2), None]
    assert relayed.served.changes.last_tid == number(1)


async def test_nobody_comes_while_a_storage_starts_afresh(server, session, channel):
    server.served.is_starting_afresh = True
    server.service.end_sessions(server.served, "it starts afresh")
    assert not server.service.sessions
    assert "afresh" in channel.goodbye().reason
    late = MemoryClient(server.service).hello()
    assert isinstance(late, Failure)
    assert late.attributes == {"reason": "stopping"}
    joining = MemoryClient(server.service)
    refused = joining.hello(kind="channel", session=session.welcome["session"])
    assert isinstance(refused, Failure)
    assert refused.attributes == {"reason": "session"}


async def test_many_loads_that_wait_are_prepared_at_once(server, channel):
    server.database.would_block = True
    asked = channel.ask("load_many", [OID, OID], LATEST)
    await server.workers.work()
    assert len(channel.value(asked)[1]) == 2
    assert server.database.prefetched == [[OID, OID]]


async def test_whoever_asks_for_changes_gets_those_that_are_still_on_their_way(
    relayed, channel
):
    asked = channel.ask("changes_since", number(1))
    assert channel.answer(asked) is None
    publish(relayed.served, number(2), [OID])
    await relayed.workers.work()
    assert relayed.database.steps == ["catch up"]
    last_tid, changes = channel.value(asked)
    assert last_tid == number(2)
    assert [change[1] for change in changes] == [number(2)]


async def test_no_more_is_prepared_than_goes_into_the_answer():
    server = ModelServer(limits=replace(UNHURRIED, batch_bytes_max=500))
    oids = [number(each) for each in range(1, 1 + 3 * PREFETCHED)]
    for oid in oids:
        server.commit(oid, b"four")
    server.database.would_block = True
    channel = MemorySession(server.service).channel()
    asked = channel.ask("load_many", oids, LATEST)
    await server.workers.work()
    assert len(channel.value(asked)[1]) == 126
    prepared = server.database.prefetched
    assert prepared == [oids[:PREFETCHED], oids[PREFETCHED : 2 * PREFETCHED]]
