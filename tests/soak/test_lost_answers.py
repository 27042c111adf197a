"""What a program is told of a commit when the connection breaks in the middle of it.

`storage` reaches the server through a proxy, `witness` reaches it directly. Each test
breaks the connection at a place of its own; the last one at every place there is.
"""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import transaction
from BTrees.Length import Length
from transaction import TransactionManager
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.POSException import POSKeyError
from ZODB.utils import p64, u64, z64

from zeolith.client.errors import ClientDisconnected, CommitOutcomeUnknown
from zeolith.client.storage import ClientStorage

from ..support.banking import print_row
from ..support.proxy import Direction, Proxy, proxied
from ..support.serving import ServerProcess
from ..support.waiting import wait_until

OBJECTS = 3


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path) as started:
        yield started


@pytest.fixture
def proxy(server: ServerProcess) -> Iterator[Proxy]:
    with proxied(server.address) as started:
        yield started


@pytest.fixture
def storage(proxy: Proxy) -> Iterator[ClientStorage]:
    opened = ClientStorage(proxy.address)
    yield opened
    # Whatever the proxy does now, closing must not wait for it.
    opened.close()


@pytest.fixture
def witness(server: ServerProcess) -> Iterator[ClientStorage]:
    opened = ClientStorage(server.address)
    yield opened
    opened.close()


@pytest.fixture
def in_background(proxy: Proxy) -> Iterator[Callable[..., Future[Any]]]:
    with ThreadPoolExecutor() as pool:
        yield pool.submit
        # Whoever still waits in a test that failed need not do so for long.
        proxy.cut()
        proxy.restore()


class Attempt:
    """A transaction that writes `data` to new objects.

    `is_alone`: it votes and finishes in one, as if nobody else took part in it.
    """

    def __init__(self, storage: ClientStorage, data: bytes, *, is_alone: bool = False):
        self.storage = storage
        self.data = data
        self.is_alone = is_alone
        self.metadata = TransactionMetaData()
        self.oids = [storage.new_oid() for _ in range(OBJECTS)]
        # What tpc_finish called back with.
        self.told: list[bytes] = []

    def vote(self) -> None:
        self.storage.tpc_begin(self.metadata)
        for oid in self.oids:
            self.storage.store(oid, z64, self.data, "", self.metadata)
        if self.is_alone:
            self.storage.commit_to_vote(self.metadata).vote_and_finish()
        else:
            self.storage.tpc_vote(self.metadata)

    def finish(self) -> bytes:
        tid: bytes = self.storage.tpc_finish(self.metadata, self.told.append)
        return tid

    def commit(self) -> bytes:
        """Vote and finish as ZODB does."""
        try:
            self.vote()
            return self.finish()
        except BaseException:
            self.storage.tpc_abort(self.metadata)
            raise

    def is_there(self, storage: Any) -> bool:
        """Whether `storage` has it now; it must have all or nothing."""
        before = p64(u64(storage.lastTransaction()) + 1)
        found = {data_before(storage, oid, before) for oid in self.oids}
        assert found in ({self.data}, {None})
        return found == {self.data}


def data_before(storage: Any, oid: bytes, before: bytes) -> bytes | None:
    try:
        found = storage.loadBefore(oid, before)
    except POSKeyError:
        return None
    return found and bytes(found[0])


def can_commit(storage: ClientStorage) -> bool:
    """Whether nothing is in the way of the next transaction."""
    attempt = Attempt(storage, b"next")
    try:
        return attempt.commit() == attempt.told[0]
    except ClientDisconnected:
        # That the session is gone may come to be known only now.
        return False


def assert_in_file(server: ServerProcess, attempt: Attempt, is_there: bool) -> None:
    """Stop the server and read what it has written without it."""
    server.terminate()
    data = FileStorage(str(server.data_path), read_only=True)
    try:
        assert attempt.is_there(data) is is_there
    finally:
        data.close()


def test_committed_and_the_answer_lost_is_told_as_committed(
    server, proxy, storage, witness, in_background
):
    attempt = Attempt(storage, b"once")
    attempt.vote()
    proxy.stall(Direction.TO_CLIENT)
    finishing = in_background(attempt.finish)
    wait_until(lambda: attempt.is_there(witness), "the commit")
    proxy.cut()
    proxy.restore()
    tid = finishing.result()
    assert attempt.told == [tid]
    assert storage.lastTransaction() >= tid
    assert storage.load(attempt.oids[0]) == (b"once", tid)
    assert can_commit(storage)
    assert_in_file(server, attempt, True)


def test_a_finish_that_never_arrived_is_told_as_not_committed(
    server, proxy, storage, witness, in_background
):
    attempt = Attempt(storage, b"never")
    attempt.vote()
    proxy.stall(Direction.TO_SERVER)
    finishing = in_background(attempt.finish)
    wait_until(lambda: proxy.held_back(Direction.TO_SERVER), "the finish")
    proxy.cut()
    proxy.restore()
    with pytest.raises(ClientDisconnected):
        finishing.result()
    storage.tpc_abort(attempt.metadata)
    assert not attempt.told
    assert not attempt.is_there(storage)
    assert can_commit(storage)
    assert can_commit(witness)
    assert_in_file(server, attempt, False)


@pytest.mark.parametrize("is_alone", [False, True], ids=["two_phases", "at_once"])
def test_a_finish_that_arrives_too_late_commits_nothing(
    server, proxy, storage, witness, in_background, is_alone
):
    """The client was told that it is not committed; that stays true."""
    # There is a channel, and nothing of it is stalled on its way to the server.
    assert can_commit(storage)
    attempt = Attempt(storage, b"late", is_alone=is_alone)
    if not is_alone:
        attempt.vote()
    proxy.stall(Direction.TO_SERVER)
    finishing = in_background(attempt.commit if is_alone else attempt.finish)
    wait_until(lambda: proxy.held_back(Direction.TO_SERVER), "the finish")
    storage.new_addr(server.address)
    proxy.cut_clients()
    with pytest.raises(ClientDisconnected):
        finishing.result()
    proxy.restore()
    wait_until(lambda: proxy.connections() == 0, "the end of the old connections")
    assert not attempt.is_there(witness)
    assert can_commit(storage)
    assert_in_file(server, attempt, False)


def test_a_vote_whose_answer_is_lost_holds_nobody_up(
    server, proxy, storage, witness, in_background
):
    attempt = Attempt(storage, b"voted")
    proxy.stall(Direction.TO_CLIENT)
    voting = in_background(attempt.commit)
    wait_until(lambda: proxy.held_back(Direction.TO_CLIENT), "the answer to the vote")
    proxy.cut()
    proxy.restore()
    with pytest.raises(ClientDisconnected):
        voting.result()
    assert can_commit(witness)
    assert can_commit(storage)
    assert_in_file(server, attempt, False)


def test_nothing_of_a_lost_session_goes_on_in_the_next(server, proxy, storage):
    attempt = Attempt(storage, b"old")
    attempt.vote()
    proxy.cut()
    wait_until(lambda: can_commit(storage), "a new session")
    with pytest.raises(ClientDisconnected):
        attempt.finish()
    storage.tpc_abort(attempt.metadata)
    assert_in_file(server, attempt, False)


def test_the_successor_of_a_killed_server_knows_what_was_committed(
    server, proxy, storage, witness, in_background
):
    attempt = Attempt(storage, b"survives")
    attempt.vote()
    proxy.stall(Direction.TO_CLIENT)
    finishing = in_background(attempt.finish)
    wait_until(lambda: attempt.is_there(witness), "the commit")
    server.kill()
    server.restart()
    proxy.cut()
    proxy.restore()
    tid = finishing.result()
    assert attempt.told == [tid]
    assert storage.load(attempt.oids[0]) == (b"survives", tid)
    assert_in_file(server, attempt, True)


def test_the_successor_of_a_killed_server_knows_what_was_not_committed(
    server, proxy, storage, witness, in_background
):
    attempt = Attempt(storage, b"perishes")
    attempt.vote()
    proxy.stall(Direction.TO_SERVER)
    finishing = in_background(attempt.finish)
    wait_until(lambda: proxy.held_back(Direction.TO_SERVER), "the finish")
    server.kill()
    proxy.cut()
    server.restart()
    proxy.restore()
    with pytest.raises(ClientDisconnected):
        finishing.result()
    assert can_commit(witness)
    assert_in_file(server, attempt, False)


def test_the_successor_knows_it_also_after_others_have_committed(
    server, proxy, storage, witness, in_background
):
    """Then the question is not about the last transaction any more."""
    attempt = Attempt(storage, b"survives")
    attempt.vote()
    proxy.stall(Direction.TO_CLIENT)
    finishing = in_background(attempt.finish)
    wait_until(lambda: attempt.is_there(witness), "the commit")
    server.kill()
    server.restart()
    wait_until(witness.is_connected, "a new session of the witness")
    assert all(can_commit(witness) for _ in range(5))
    proxy.cut()
    proxy.restore()
    assert attempt.told == [finishing.result()]
    assert_in_file(server, attempt, True)


def test_a_server_that_does_not_come_back_leaves_the_outcome_unknown(
    server, proxy, in_background
):
    storage = ClientStorage(proxy.address, wait_timeout=1)
    attempt = Attempt(storage, b"unknown")
    attempt.vote()
    proxy.stall(Direction.TO_SERVER)
    finishing = in_background(attempt.finish)
    wait_until(lambda: proxy.held_back(Direction.TO_SERVER), "the finish")
    server.kill()
    proxy.refuse()
    proxy.cut()
    with pytest.raises(CommitOutcomeUnknown):
        finishing.result()
    storage.tpc_abort(attempt.metadata)
    storage.close()


def test_a_database_that_forgets_leaves_the_outcome_unknown(tmp_path):
    """A MappingStorage is another one after a restart; nobody knows about the old."""
    with (
        ServerProcess(tmp_path, storages="<mappingstorage 1/>") as server,
        proxied(server.address) as proxy,
        ThreadPoolExecutor() as pool,
    ):
        storage = ClientStorage(proxy.address)
        attempt = Attempt(storage, b"unknown")
        attempt.vote()
        proxy.stall(Direction.TO_SERVER)
        finishing = pool.submit(attempt.finish)
        wait_until(lambda: proxy.held_back(Direction.TO_SERVER), "the finish")
        server.kill()
        proxy.cut()
        server.restart()
        proxy.restore()
        with pytest.raises(CommitOutcomeUnknown):
            finishing.result()
        storage.tpc_abort(attempt.metadata)
        storage.close()


def test_objects_and_storage_agree_after_a_lost_answer(
    proxy, storage, witness, in_background
):
    """What ZODB has in memory is what was committed, for all its connections."""
    db = DB(storage)
    # Or the other one might find no root, and neither be able to make it.
    caught_up = storage.lastTransaction()
    wait_until(lambda: witness.lastTransaction() >= caught_up, "the root")
    other_db = DB(witness)
    writer = db.open(TransactionManager())
    reader = db.open(TransactionManager())
    assert "n" not in reader.root()
    writer.root()["n"] = 0
    writer.transaction_manager.commit()
    writer.root()["n"] = 1
    writer.transaction_manager.get().join(StallingManager(proxy))
    committing = in_background(writer.transaction_manager.commit)

    def others_see_it() -> bool:
        with other_db.transaction() as other:
            return bool(other.root().get("n") == 1)

    wait_until(others_see_it, "the commit")
    proxy.cut()
    proxy.restore()
    committing.result()
    for each in (writer, reader):
        each.transaction_manager.begin()
        assert each.root()["n"] == 1
    writer.root()["n"] = 2
    writer.transaction_manager.commit()
    reader.transaction_manager.begin()
    assert reader.root()["n"] == 2
    for each in (writer, reader):
        each.close()
    db.close()
    other_db.close()


class StallingManager:
    """Takes part in a transaction, and holds back answers from its vote on."""

    transaction_manager = None

    def __init__(self, proxy: Proxy):
        self._proxy = proxy

    def sortKey(self) -> str:
        # After every storage, so they have voted.
        return "~"

    def tpc_vote(self, _transaction: Any) -> None:
        self._proxy.stall(Direction.TO_CLIENT)

    def abort(self, _transaction: Any) -> None:
        pass

    tpc_begin = commit = tpc_finish = tpc_abort = abort


every_way = pytest.mark.parametrize(
    "way", list(Direction), ids=lambda way: way.name.lower()
)


@every_way
@pytest.mark.parametrize("is_alone", [False, True], ids=["two_phases", "at_once"])
def test_a_commit_cut_at_any_byte_is_told_truthfully(
    server, proxy, storage, witness, way, is_alone
):
    """Cut after 0 bytes of a commit, after 1, after 2, ... until it passes.

    What was told is compared with what others see, with what the client itself sees,
    and in the end with the file: all of the three figures of the bank.
    """
    told = []
    for size in itertools.count():
        wait_until(lambda: can_commit(storage), "a session")
        data = b"%s %d" % (way.name.encode(), size)
        attempt = Attempt(storage, data, is_alone=is_alone)
        proxy.cut_after(size, way)
        try:
            attempt.commit()
        except ClientDisconnected:
            told.append((attempt, False))
        else:
            told.append((attempt, True))
        if proxy.is_cut_due():
            break
    proxy.restore()
    # Before the commit nothing is answered whose loss could prevent it.
    is_sure = is_alone and way is Direction.TO_CLIENT
    outcomes = {True} if is_sure else {True, False}
    assert {is_there for _attempt, is_there in told} == outcomes
    for attempt, is_there in told:
        assert attempt.is_there(witness) is is_there, attempt.data
        assert len(attempt.told) == is_there
        assert attempt.is_there(storage) is is_there
    server.terminate()
    file = FileStorage(str(server.data_path), read_only=True)
    assert [attempt.is_there(file) for attempt, _ in told] == [
        is_there for _, is_there in told
    ]
    file.close()
    committed = sum(is_there for _attempt, is_there in told)
    print_row(
        f"cut at every byte {way.value}{' at once' if is_alone else ''}",
        len(told) - 1,
        committed,
        0,
        0,
        2 * len(told),
        0,
    )


@every_way
def test_what_the_server_merged_is_seen_whatever_was_cut(proxy, storage, witness, way):
    """Cut after 0 bytes of the thread's transaction, after 1, after 2, ...

    It is alone in it, and another one has counted before: if the answer is lost, the
    objects in memory are not what the server has made of them.
    """
    db = DB(storage)
    caught_up = storage.lastTransaction()
    wait_until(lambda: witness.lastTransaction() >= caught_up, "the root")
    other_db = DB(witness)
    root = db.open().root()
    root["count"] = Length()
    transaction.commit()
    expected, outcomes = 0, set()
    for size in itertools.count():
        wait_until(lambda: can_commit(storage), "a session")
        transaction.begin()
        root["count"].change(1)
        with other_db.transaction() as other:
            other.root()["count"].change(1)
        proxy.cut_after(size, way)
        try:
            transaction.commit()
        except ClientDisconnected:
            transaction.abort()
            outcomes.add("not committed")
            expected += 1
        else:
            outcomes.add("committed")
            expected += 2
        if is_over := proxy.is_cut_due():
            proxy.restore()
        wait_until(lambda: can_commit(storage), "the next session")
        transaction.begin()
        assert root["count"]() == expected, size
        with other_db.transaction() as other:
            assert other.root()["count"]() == expected, size
        if is_over:
            break
    assert outcomes == {"committed", "not committed"}
    db.close()
    other_db.close()
