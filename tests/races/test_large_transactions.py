"""Transactions of very many objects: memory, other clients, and every way to end."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import ConflictError

from zeolith.client.storage import ClientStorage
from zeolith.protocol.codec import encode
from zeolith.protocol.errors import TransactionTimeout
from zeolith.protocol.limits import Limits
from zeolith.protocol.messages import Notice
from zeolith.storage.preparing import Preparation

from ..support.gates import Background, Gate
from ..support.ids import number, transaction_id
from ..support.inprocess import InProcessServer, client_of, serving
from ..support.records import commit, oid_of, seen
from ..support.serving import ServerProcess
from ..support.waiting import wait_until

SMALL = Limits(staged_memory_bytes_max=20_000, batch_bytes_max=5000)
OBJECTS = 500


@pytest.fixture
def server(tmp_path) -> Iterator[InProcessServer]:
    with serving(tmp_path / "Data.fs", limits=SMALL) as server:
        yield server


@pytest.fixture
def writer(server: InProcessServer) -> Iterator[ClientStorage]:
    with client_of(server, limits=SMALL) as storage:
        yield storage


def many(
    storage: ClientStorage, serial: bytes | None, data: bytes
) -> TransactionMetaData:
    """A transaction of many objects, every second of them stored twice."""
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    # Oids need not be in order.
    for value in reversed(range(1, OBJECTS + 1)):
        if value % 2:
            storage.store(number(value), serial, b"first", "", transaction)
        storage.store(number(value), serial, data * 100, "", transaction)
    return transaction


def spills() -> int:
    names = [os.path.realpath(each) for each in Path("/proc/self/fd").iterdir()]
    # Not those of pytest, nor the one in which a FileStorage puts a transaction.
    return sum("(deleted)" in name for name in names)


def test_a_transaction_larger_than_memory_is_committed_whole(server, writer):
    spills_before = spills()
    transaction = many(writer, None, b"new")
    writer.tpc_vote(transaction)
    tid = writer.tpc_finish(transaction)
    with client_of(server) as other:
        for value in range(1, OBJECTS + 1):
            assert other.load(number(value)) == (b"new" * 100, tid)
        (change,) = server.on_loop(lambda: server.served.changes.since(bytes(8)))
        assert sorted(change.oids) == [number(n) for n in range(1, OBJECTS + 1)]
    wait_until(lambda: spills() <= spills_before, "the file is let go")


def test_nothing_is_left_of_a_large_transaction_that_fails(server, writer):
    transaction = many(writer, None, b"old")
    writer.tpc_vote(transaction)
    first = writer.tpc_finish(transaction)
    spills_before = spills()
    other = TransactionMetaData()
    writer.tpc_begin(other)
    writer.store(number(7), first, b"theirs", "", other)
    writer.tpc_vote(other)
    writer.tpc_finish(other)
    with pytest.raises(ConflictError):
        writer.tpc_vote(many(writer, first, b"mine"))
    wait_until(lambda: spills() <= spills_before, "the file is let go")
    assert writer.load(number(8))[0] == b"old" * 100


@pytest.mark.parametrize("phase", ["staged", "voted"])
def test_nothing_is_left_of_a_large_transaction_whose_client_is_gone(
    server, phase: str
):
    spills_before = spills()
    with client_of(server, limits=SMALL) as gone:
        if phase == "voted":
            gone.tpc_vote(many(gone, None, b"new"))
        else:
            session = gone.current_session
            assert session is not None
            channel = session.borrow()
            for _n in range(30):
                operation = ["store", number(1), bytes(8), b"x" * 5000]
                notice = Notice("stage", [transaction_id(1), [operation]])
                channel.send(encode(notice))
            wait_until(lambda: spills() > spills_before, "it is spilled")
            session.give_back(channel)
    wait_until(lambda: spills() <= spills_before, "the file is let go")
    with client_of(server) as storage:
        commit(storage, x=b"next")


def test_others_go_on_while_a_large_transaction_votes(server, writer, monkeypatch):
    """It sits in a thread of its own; loads and heartbeats do not."""
    commit(writer, other=b"there")
    gate = Gate()
    gate.shut()
    monkeypatch.setattr(Preparation, "vote", gate.before(Preparation.vote))
    transaction = many(writer, None, b"new")
    voting = Background(writer.tpc_vote, transaction)
    gate.wait_until_reached()
    with client_of(server) as other:
        assert seen(other, "other") == b"there"
        # And somebody else may stage as much meanwhile.
        session = other.current_session
        assert session is not None
        channel = session.borrow()
        for _n in range(30):
            operation = ["store", number(1), bytes(8), b"x" * 5000]
            channel.send(encode(Notice("stage", [transaction_id(1), [operation]])))
        channel.call("ping")
        session.give_back(channel)
    gate.open()
    voting.result()
    writer.tpc_finish(transaction)
    assert seen(writer, "other") == b"there"


def test_what_is_staged_and_never_voted_is_not_kept(tmp_path):
    """And what comes of it later is not committed as if it were all."""
    spills_before = spills()
    with (
        serving(
            tmp_path / "Data.fs", limits=SMALL, transaction_timeout_s=0.2
        ) as server,
        client_of(server, limits=SMALL) as storage,
    ):
        session = storage.current_session
        assert session is not None
        channel = session.borrow()
        for _n in range(30):
            operation = ["store", oid_of("x"), bytes(8), b"x" * 5000]
            channel.send(encode(Notice("stage", [transaction_id(1), [operation]])))
        channel.call("ping")

        def is_given_up() -> bool:
            peers = server.on_loop(lambda: list(server.service.peers))
            staged = [peer.transactions.staged for peer in peers]
            return not any(each.is_idle for each in staged if each is not None)

        wait_until(is_given_up, "it is given up")
        wait_until(lambda: spills() <= spills_before, "the file is let go")
        with pytest.raises(TransactionTimeout, match="transaction-timeout"):
            channel.call("vote", transaction_id(1), [b"", b"", b"", None, " "], [])
        channel.call("abort", transaction_id(1))
        session.give_back(channel)
        commit(storage, x=b"next")


def test_an_empty_transaction_is_one(server, writer):
    """As a Data.fs has it: it gets a tid, and everybody hears of it."""
    transaction = TransactionMetaData(description="nothing")
    writer.tpc_begin(transaction)
    assert not writer.tpc_vote(transaction)
    tid = writer.tpc_finish(transaction)
    assert writer.lastTransaction() == tid
    (entry,) = writer.undoLog()
    assert entry["description"] == b"nothing"
    with client_of(server) as other:
        assert other.lastTransaction() == tid
        assert commit(other, x=b"next") > tid


def resident_mib(pid: int, name: str) -> float:
    """A figure of /proc, VmRSS or VmHWM (the most there ever was)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [each for each in lines if each.startswith(name)]
    return int(line.split()[1]) / 1024


@pytest.mark.slow
def test_a_hundred_thousand_objects_take_less_memory_than_they_are_large(tmp_path):
    with ServerProcess(tmp_path) as process:
        storage = ClientStorage(process.address)
        commit(storage, x=b"first")
        pid = process.process.pid
        before = resident_mib(pid, "VmRSS")
        transaction = TransactionMetaData()
        storage.tpc_begin(transaction)
        for value in range(1000, 101_000):
            storage.store(number(value), None, b"%07d" % value * 140, "", transaction)
        storage.tpc_vote(transaction)
        tid = storage.tpc_finish(transaction)
        # Of 95 MiB; most of it is the index of a hundred thousand objects.
        assert resident_mib(pid, "VmHWM") - before < 80
        assert storage.load(number(100_999)) == (b"%07d" % 100_999 * 140, tid)
        storage.close()
