"""A storage of another server: what is passed on, and what is said while it is away."""

from typing import Any

import pytest
from transaction.interfaces import TransientError
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import (
    ConflictError,
    ReadOnlyError,
    StorageError,
    StorageTransactionError,
    Unsupported,
)
from ZODB.tests.hexstorage import HexStorage

from zeolith.storage.adapted import AdaptedStorage
from zeolith.storage.database import (
    Conflict,
    LogEntry,
    OutcomeUnknown,
    Revision,
    Standing,
    Unavailable,
    Unresolved,
    Voted,
    WouldBlock,
)
from zeolith.storage.feed import Told
from zeolith.storage.relayed import RelayedStorage, is_remote
from zeolith.storage.tids import MAX_TID, Z64, following

from .transactions import ROOT, A, plain, store, transaction, undo

DATABASE_ID = b"d" * 16
T1 = following(Z64)


class Away(StorageError, TransientError):
    """What a client raises that has no server."""


class Client:
    """A storage with a server far away, which is a MappingStorage."""

    def __init__(self) -> None:
        self.mapping = MappingStorage()
        self.connected = True
        self.read_only = False
        # How often something was asked for in vain.
        self.waits = 0
        self.finish_error: Exception | None = None
        self.checked: list[tuple[bytes, bytes]] = []

    def is_connected(self) -> bool:
        return self.connected

    def isReadOnly(self) -> bool:
        return self.read_only

    def registerDB(self, db: Any) -> None:
        self.db = db

    def supportsUndo(self) -> bool:
        return True

    def loadBefore(self, oid: bytes, before: bytes) -> Any:
        self.reach()
        return self.mapping.loadBefore(oid, before)

    def checkCurrentSerialInTransaction(
        self, oid: bytes, serial: bytes, _transaction: Any
    ) -> None:
        self.checked.append((oid, serial))

    def tpc_finish(self, transaction: Any, callback: Any) -> bytes:
        if self.finish_error is not None:
            raise self.finish_error
        tid: bytes = self.mapping.tpc_finish(transaction, callback)
        return tid

    def reach(self) -> None:
        if not self.connected:
            self.waits += 1
            raise Away("no server")

    def __len__(self) -> int:
        return len(self.mapping)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.mapping, name)


class Known(Client):
    """A client that knows relays."""

    def __init__(self) -> None:
        super().__init__()
        self.database_id = DATABASE_ID
        self.in_place = True
        self.conflicts: list[list[bytes]] = []
        self.resolved: dict[bytes, bytes] | None = None
        self.cached: tuple[bytes, bytes, bytes | None] | None = None
        self.entries = [[T1, b"user", b"description", b"no pickle", 7]]
        self.answer: tuple[str, bytes | None] = ("committed", T1)

    def for_relay(self) -> "Known":
        return self

    def identity(self) -> tuple[bytes, int]:
        return self.database_id, 3

    def is_in_place(self, _tid: bytes) -> bool:
        return self.in_place

    def load_cached(self, _oid: bytes, _before: bytes) -> Any:
        return self.cached

    def new_oids(self, count: int) -> list[bytes]:
        return [A] * count

    def history(self, _oid: bytes, size: int) -> list[list[Any]]:
        return self.entries[:size]

    def undo_log(self, _before: bytes | None, size: int) -> list[list[Any]]:
        return self.entries[:size]

    def outdated(self, revisions: Any) -> list[bytes]:
        self.reach()
        return [oid for oid, tid in revisions if tid != T1]

    def outcome(self, *_question: Any) -> tuple[str, bytes | None]:
        self.reach()
        return self.answer

    def vote(self, metadata: Any) -> Any:
        self.reach()
        if not self.conflicts:
            self.mapping.tpc_vote(metadata)
        return (None if self.conflicts else T1, [], self.conflicts)

    def resolve(self, metadata: Any, resolutions: dict[bytes, bytes]) -> Any:
        self.resolved = resolutions
        self.mapping.tpc_vote(metadata)
        return (T1, list(resolutions), [])


@pytest.fixture
def known() -> Known:
    return Known()


@pytest.fixture
def database(known: Known) -> RelayedStorage:
    return RelayedStorage("main", known)


@pytest.fixture
def stranger() -> Client:
    return Client()


def told_by(database: AdaptedStorage) -> list[Told | None]:
    told: list[Told | None] = []
    database.follow(told.append)
    return told


def test_a_client_of_a_server_is_told_from_other_storages(known):
    assert is_remote(known)
    assert is_remote(HexStorage(known))
    assert not is_remote(MappingStorage())


# Identity


def test_the_identity_is_the_upstreams(database, known):
    assert (database.database_id, database.epoch) == (DATABASE_ID, 3)
    known.database_id = b"e" * 16
    assert database.standing() == Standing(Z64, b"e" * 16, 3)


def test_a_stranger_is_another_database_after_each_fresh_start(stranger):
    database = RelayedStorage("main", stranger)
    ids = {database.database_id, *(database.standing()[1] for _ in range(3))}
    assert len(ids) == 4


def test_whether_it_is_read_only_is_the_upstreams_affair(database, known):
    assert not database.is_read_only
    known.read_only = True
    assert database.is_read_only
    with pytest.raises(ReadOnlyError):
        database.new_oids(1)
    with pytest.raises(ReadOnlyError):
        database.vote(transaction())


# Reading


def test_the_loop_gets_what_is_at_hand_and_nothing_else(database, known):
    with pytest.raises(WouldBlock):
        database.load_nowait(A, MAX_TID)
    known.cached = (b"data", T1, None)
    assert database.load_nowait(A, MAX_TID) == Revision(b"data", T1, None)


def test_what_is_at_hand_below_a_wrapper_is_not_the_wrappers(known):
    known.cached = (b"data", T1, None)
    with pytest.raises(WouldBlock):
        RelayedStorage("main", HexStorage(known)).load_nowait(A, MAX_TID)


def test_logs_and_oids_are_passed_on(database):
    entry = LogEntry(T1, b"user", b"description", b"no pickle", 7)
    assert database.history(A, 5) == [entry]
    database.supports_undo = True
    assert database.undo_log(None, 5) == [entry]
    assert database.new_oids(2) == [A, A]
    assert database.new_oids(0) == []


def test_which_revisions_are_current_the_upstream_says(known, database):
    assert database.outdated([(A, T1), (ROOT, Z64)]) == [ROOT]
    known.connected = False
    with pytest.raises(Unavailable):
        database.outdated([(A, T1)])


def test_a_stranger_is_asked_for_each_revision():
    database = RelayedStorage("main", Client())
    assert database.outdated([(A, T1)]) == [A]


def test_an_upstream_that_cannot_undo_has_no_undo_log(database):
    database.supports_undo = False
    with pytest.raises(Unsupported):
        database.undo_log(None, 5)


def test_a_stranger_is_asked_by_its_own_methods(stranger):
    database = RelayedStorage("main", stranger)
    assert len(set(database.new_oids(3))) == 3
    finished = commit(database)
    (entry,) = database.history(A, 5)
    assert entry.tid == finished
    assert database.outcome(b"t" * 16, None, Z64) == ("unknown", None)


# Away


def test_only_the_first_waits_for_an_upstream_that_is_away(database, known):
    known.connected = False
    for _ in range(3):
        with pytest.raises(Unavailable, match="away: no server"):
            database.load(A, MAX_TID)
    assert known.waits == 1


def test_an_upstream_that_is_back_is_asked_again(database, known):
    commit(database)
    known.connected = False
    with pytest.raises(Unavailable):
        database.load(A, MAX_TID)
    known.connected = True
    assert database.load(A, MAX_TID)
    known.connected = False
    with pytest.raises(Unavailable):
        database.load(A, MAX_TID)
    assert known.waits == 2


def test_an_error_that_is_no_loss_is_no_loss(database, known):
    def refuse(*_args: Any) -> None:
        raise Away("too slow")

    known.mapping.getTid = refuse
    with pytest.raises(Away, match="too slow"):
        database.get_tid(A)
    with pytest.raises(Away):
        database.get_tid(A)


def test_a_conflict_is_no_loss(database, known):
    def refuse(*_args: Any) -> None:
        raise ConflictError(oid=A)

    known.vote = refuse
    known.connected = False
    with pytest.raises(ConflictError):
        database.vote(transaction(store(A, plain(1))))
    assert known.db is not None


# Outcomes


def test_the_upstream_knows_what_became_of_a_transaction(database):
    assert database.outcome(b"t" * 16, T1, Z64) == ("committed", T1)


def test_another_database_knows_nothing_of_it(database, known):
    known.answer = ("not committed", None)
    known.database_id = b"e" * 16
    assert database.outcome(b"t" * 16, T1, Z64) == ("unknown", None)


def test_an_upstream_that_is_away_cannot_say(database, known):
    known.connected = False
    with pytest.raises(Unavailable):
        database.outcome(b"t" * 16, T1, Z64)


# Committing


def commit(database: RelayedStorage, *operations: list[Any]) -> bytes:
    voted = database.vote(transaction(*(operations or [store(A, plain(1))])))
    assert isinstance(voted, Voted)
    return database.finish().tid


def test_a_commit_is_told_in_the_callback_of_finish(database):
    told = told_by(database)
    one = transaction(store(A, plain(1)), store(ROOT, plain(2)))
    assert database.vote(one) == Voted(T1, [])
    finished = database.finish()
    assert finished.oids == [A, ROOT]
    assert told == [Told(finished.tid, [A, ROOT], one.id)]


def test_a_commit_out_of_its_place_is_left_to_the_upstream_to_tell(database, known):
    told = told_by(database)
    known.in_place = False
    commit(database)
    assert told == []


def test_a_read_is_checked_by_the_upstream(database, known):
    commit(database, ["check", ROOT, T1], store(A, plain(1)))
    assert known.checked == [(ROOT, T1)]


def test_a_copied_transaction_keeps_its_tid(database, known):
    begun: list[Any] = []
    known.tpc_begin = lambda metadata, *rest: begun.append(rest)
    known.mapping.store = known.mapping.tpc_vote = lambda *_args: None
    database.vote(transaction(store(A, plain(1)), tid=T1, status="p"))
    assert begun == [(T1, "p")]


def test_conflicts_go_down_and_resolutions_up(database, known):
    conflict = [A, T1, Z64, b"committed", b"old", b"new"]
    known.conflicts = [conflict]
    unresolved = database.vote(transaction(store(A, plain(1))))
    assert unresolved == Unresolved([Conflict(*conflict)])
    assert database.resolve({A: b"merged"}) == Voted(T1, [A])
    assert known.resolved == {A: b"merged"}
    assert database.finish().oids == [A]


def test_a_stranger_votes_in_its_own_way(stranger):
    database = RelayedStorage("main", stranger)
    stranger.mapping.tpc_vote = lambda _metadata: [ROOT]
    assert database.vote(transaction(store(A, plain(1)))) == Voted(None, [ROOT])
    assert database.finish().oids == [A, ROOT]


def test_an_undo_is_refused_where_there_is_none(database):
    with pytest.raises(Unsupported):
        database.vote(transaction(undo(T1)))


@pytest.mark.parametrize(
    "error", [Away("nothing was committed"), StorageTransactionError("too late")]
)
def test_an_error_that_says_that_nothing_was_committed_is_passed_on(
    database, known, error
):
    known.finish_error = error
    database.vote(transaction(store(A, plain(1))))
    with pytest.raises(type(error), match=str(error)):
        database.finish()


def test_any_other_error_of_finish_leaves_the_outcome_open(database, known):
    known.finish_error = StorageError("it may have been")
    database.vote(transaction(store(A, plain(1))))
    with pytest.raises(OutcomeUnknown, match="it may have been"):
        database.finish()
    known.finish_error = None
    database.abort()


def test_a_vote_that_fails_leaves_nothing_behind(database, known):
    known.connected = False
    with pytest.raises(Unavailable):
        database.vote(transaction(store(A, plain(1))))
    known.connected = True
    commit(database)


def test_size_and_length_are_those_of_before_while_it_is_away(database, known):
    commit(database)
    info = database.info()
    assert info[1] == 1
    known.connected = False
    known.mapping.close()
    assert database.info() == info


def test_catching_up_is_the_upstreams_affair(database, known, stranger):
    asked: list[str] = []
    known.catch_up = lambda: asked.append("catch up")
    database.catch_up()
    RelayedStorage("main", stranger).catch_up()
    assert asked == ["catch up"]
