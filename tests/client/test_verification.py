"""What of a cache is still right, and what history it is of: asked of a server."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from zeolith.client import cache as cache_module
from zeolith.client.cache import MemoryCache
from zeolith.client.changes import Change
from zeolith.client.dial import Wish, dial
from zeolith.client.errors import ChannelLost
from zeolith.client.position import Position
from zeolith.client.session import Session
from zeolith.client.tids import Z64, following
from zeolith.client.verification import Verified, verify
from zeolith.protocol.limits import DEFAULT

from ..support.gates import Background
from ..support.script import Act, Held, ScriptedServer, oid, tid

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

A, B, C = oid(1), oid(2), oid(3)
# Where the client is, and where the server is.
AT, NOW = tid(5), tid(9)
WISH = Wish("1", False, None, None, None, AT)


class Told:
    """A ZODB database."""

    def __init__(self) -> None:
        self.log: list[Any] = []

    def invalidate(self, tid: bytes, oids: list[bytes]) -> None:
        self.log.append((tid, oids))

    # The name is ZODB's.
    def invalidateCache(self) -> None:
        self.log.append("everything")


class Client:
    """A position at AT, a cache that belongs to it, and who listens."""

    def __init__(self, cache: MemoryCache | None = None) -> None:
        self.cache = MemoryCache() if cache is None else cache
        self.position = Position(self.cache)
        self.told = Told()
        self.position.adopt(Nobody(), tid(3), [])
        self.position.register(self.told)
        source = Nobody()
        changes = [Change(tid(3), tid(4), [], None), Change(tid(4), AT, [], None)]
        self.position.adopt(source, AT, changes)
        self.position.leave(source)
        self.told.log.clear()

    def keep(self, *oids: bytes) -> None:
        for each in oids:
            self.cache.store(each, tid(2), None, b"data of " + each, AT)

    def has(self, oid: bytes) -> bool:
        """Whether the object is in the cache for the present."""
        assert self.position.tid is not None
        return self.cache.load(oid, following(self.position.tid)) is not None


class Nobody:
    def close(self, reason: str) -> None:
        raise AssertionError(reason)


@pytest.fixture
def client() -> Client:
    return Client()


@contextmanager
def session_of(server: ScriptedServer, client: Client) -> Iterator[Session]:
    """A session whose welcome could not say what has changed."""
    server.last_tid = NOW
    server.hello = {"changes": None}
    session = Session(dial(server.address, WISH, DEFAULT), DEFAULT)
    client.position.await_verification(session)
    try:
        yield session
    finally:
        session.discard("the test is over")


@pytest.fixture
def session(server: ScriptedServer, client: Client) -> Iterator[Session]:
    with session_of(server, client) as session:
        yield session


def verified(session: Session, client: Client) -> Verified | None:
    return verify(session, client.position, client.cache, DEFAULT)


def test_what_is_current_is_kept_and_the_rest_dropped(server, session, client):
    client.keep(A, B, C)
    server.answers["verify"] = lambda revisions: [NOW, [B]]
    assert verified(session, client) == Verified(3, 1)
    assert server.asked("verify") == [[[[each, tid(2)] for each in (A, B, C)]]]
    assert client.position.tid == client.cache.valid_through == NOW
    assert client.has(A)
    assert not client.has(B)
    assert client.has(C)
    # What ZODB has in memory nobody has asked for.
    assert client.told.log == ["everything"]


def test_revisions_that_have_ended_are_not_asked_for(server, session, client):
    client.cache.store(A, tid(2), tid(4), b"old", AT)
    assert verified(session, client) == Verified(0, 0)
    assert server.asked("verify") == []
    assert client.position.tid == NOW
    assert client.cache.load(A, tid(4)) == (b"old", tid(2), tid(4))


def test_many_are_asked_for_in_batches_that_do_not_wait_for_each_other(
    server, session, client, monkeypatch
):
    monkeypatch.setattr(cache_module, "BATCH_MAX", 10)
    oids = [oid(n) for n in range(1, 96)]
    client.keep(*oids)
    gate = threading.Event()
    changed = oids[::7]

    def answer(revisions: list[Any]) -> Any:
        stale = [each for each, _tid in revisions if each in changed]
        return Held(gate, [NOW, stale])

    server.answers["verify"] = answer
    verifying = Background(verified, session, client)
    server.wait_for("verify")
    gate.set()
    assert verifying.result() == Verified(95, len(changed))
    assert [len(batch) for (batch,) in server.asked("verify")] == [10] * 9 + [5]
    assert [each for each in oids if not client.has(each)] == changed


def test_changes_that_come_meanwhile_are_applied_afterwards(server, session, client):
    client.keep(A, B)
    server.answers["verify"] = lambda revisions: [NOW, []]

    def come(_tids: Any) -> Any:
        changes = [Change(NOW, tid(10), [A], None), Change(tid(10), tid(11), [], None)]
        client.position.receive(session, changes)
        assert client.position.tid == AT, "it was applied at once"
        return [AT, Z64]

    server.answers["last_known"] = come
    verified(session, client)
    assert client.told.log == ["everything", (tid(10), [A]), (tid(11), [])]
    assert client.position.tid == tid(11)
    assert not client.has(A)
    assert client.has(B)


def test_nothing_is_asked_while_a_lock_is_held(server, session, client):
    """Others read the position, and apply what they have to, while it lasts."""
    gate = threading.Event()
    client.keep(A)
    server.answers["verify"] = Held(gate, [NOW, []])
    verifying = Background(verified, session, client)
    server.wait_for("verify")
    assert Background(lambda: client.position.tid).result() == AT
    assert Background(client.cache.load, A, tid(6)).result() is not None
    gate.set()
    verifying.result()


def test_an_answer_from_before_is_not_kept(server, session, client):
    """It would be neither asked for nor dropped."""
    history = client.cache.history

    def arrive(_revisions: Any) -> Any:
        client.cache.store(B, tid(2), None, b"old", AT, history)
        return [NOW, []]

    client.keep(A)
    server.answers["verify"] = arrive
    assert verified(session, client) == Verified(1, 0)
    assert not client.has(B)


def test_a_server_that_is_lost_meanwhile_changes_nothing(server, session, client):
    client.keep(A)
    server.answers["verify"] = Act.HANG_UP
    with pytest.raises(ChannelLost):
        verified(session, client)
    assert client.position.tid == client.cache.valid_through == AT
    assert client.told.log == []
    client.position.leave(session)
    # The next one knows what has changed.
    next_ = Nobody()
    client.position.adopt(next_, tid(6), [Change(AT, tid(6), [B], None)])
    assert client.told.log == [(tid(6), [B])]
    assert client.has(A)


def test_what_came_of_a_session_that_was_replaced_is_of_no_use(server, session, client):
    client.keep(A)

    def replaced(_revisions: Any) -> Any:
        client.position.leave(session)
        return [NOW, []]

    server.answers["verify"] = replaced
    verified(session, client)
    assert client.position.tid == client.cache.valid_through == AT


# A history that the server does not have


def test_our_position_and_some_before_it_are_asked_for(server, session, client):
    verified(session, client)
    assert server.asked("last_known") == [[[AT, tid(4), tid(3)]]]


def test_after_a_restore_what_came_later_is_forgotten(server, session, client, caplog):
    client.keep(A)
    client.cache.store(B, tid(4), None, b"lost", AT)
    client.cache.store(C, tid(2), tid(4), b"ended by what was lost", AT)
    server.answers["last_known"] = [tid(3), Z64]
    assert verified(session, client) is None
    assert client.position.tid == client.cache.valid_through == tid(3)
    assert client.has(A)
    assert not client.has(B)
    assert not client.has(C)
    assert client.told.log == ["everything"]
    assert session.ended is not None
    assert server.asked("verify") == []
    [critical] = [each for each in caplog.records if each.levelname == "CRITICAL"]
    assert "restored from an older copy" in critical.message
    assert tid(3).hex() in critical.message
    # It feeds nothing any more: the next hello is from there.
    client.position.receive(session, [Change(tid(3), tid(9), [A], None)])
    assert client.position.tid == tid(3)


def test_with_nothing_in_common_everything_is_dropped(server, session, client):
    client.keep(A)
    server.answers["last_known"] = [None, Z64]
    assert verified(session, client) == Verified(0, 0)
    assert client.position.tid == NOW
    assert len(client.cache) == 0
    assert client.told.log == ["everything"]
    client.position.receive(session, [Change(NOW, tid(10), [A], None)])
    assert client.position.tid == tid(10)


@pytest.mark.parametrize("known", [None, tid(3)])
def test_what_a_pack_may_have_removed_was_not_lost(server, session, client, known):
    """The server looked only down to where it was packed."""
    client.keep(A)
    server.answers["last_known"] = [known, AT]
    assert verified(session, client) == Verified(1, 0)
    assert client.position.tid == NOW
    assert client.has(A)


# Several processes


class Shared(MemoryCache):
    """A cache of several processes; another one is inside first."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = threading.Lock()

    def verifying(self) -> Any:
        return self.inside


def test_one_process_verifies_for_all(server):
    client = Client(Shared())
    client.keep(A, B)
    assert isinstance(client.cache, Shared)
    with session_of(server, client) as session:
        with client.cache.inside:
            waiting = Background(verified, session, client)
            assert not waiting.returns_soon()
            client.cache.verified(tid(8), [B])
        assert waiting.result() is None
        assert session.ended is not None
    assert server.requests == []
    assert client.position.tid == tid(8)
    assert client.told.log == ["everything"]
    assert client.has(A)
    assert not client.has(B)


def test_a_cache_that_was_dropped_is_verified_at_once(server, session, client):
    client.cache.valid_through = Z64
    assert verified(session, client) == Verified(0, 0)
    assert client.position.tid == NOW


def test_tids_beyond_what_may_be_asked_are_not(server, session, client):
    limits = DEFAULT.__class__(last_known_max=2)
    verify(session, client.position, client.cache, limits)
    assert server.asked("last_known") == [[[AT, tid(4)]]]
