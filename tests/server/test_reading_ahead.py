"""What a client that reads ahead is answered: the rest only if it costs nothing."""

from dataclasses import replace
from typing import Any

import pytest
from BTrees.OOBTree import OOTreeSet
from ZODB.DB import DB
from ZODB.POSException import POSKeyError

from zeolith.protocol.references import link_of
from zeolith.server.loading import PREFETCHED, Found
from zeolith.server.reading_ahead import load_ahead
from zeolith.storage.database import WouldBlock

from ..support.ids import number
from ..support.memory import UNHURRIED, MemorySession
from ..support.model import ModelServer

A, B, C, D = map(number, range(1, 5))
T1 = number(1000)
LATEST = b"\x7f" + b"\xff" * 7


def linked_with(oid: bytes) -> bytes:
    """The record of a bucket before that of ``oid``."""
    return b"\x80\x03cm\nBucket\nq\x00.\x80\x03)C\x08" + oid + b"q\x01h\x00\x86Q\x86."


class Records(dict[bytes, bytes | Exception]):
    """Loads by oid; an error is raised."""

    def load(self, oid: bytes, _before: bytes) -> Found | None:
        record = self.get(oid, POSKeyError(oid))
        if isinstance(record, Exception):
            raise record
        return record, T1, None


def ahead(
    records: Records, oids: list[bytes], links: int = 0, bytes_max: int = 10_000
) -> tuple[list[Any], list[bytes]]:
    """The data of what was asked for, and the oids of what is linked."""
    loaded, linked = load_ahead(records.load, oids, LATEST, links, bytes_max)
    for oid, data, tid, end in linked:
        assert (data, tid, end) == records.load(oid, LATEST)
    return [found and found[0] for found in loaded], [oid for oid, *_ in linked]


def chain(*oids: bytes) -> Records:
    records = Records(zip(oids, map(linked_with, oids[1:]), strict=False))
    records[oids[-1]] = b"the last"
    return records


def test_what_was_asked_for_is_answered_in_order():
    records = Records({A: b"a", B: b"b"})
    assert ahead(records, [B, C, A]) == ([b"b", None, b"a"], [])
    assert ahead(records, []) == ([], [])


def test_links_are_followed_from_the_last_one():
    records = chain(A, B, C, D)
    assert ahead(records, [A], links=2)[1] == [B, C]
    assert ahead(records, [A], links=10)[1] == [B, C, D]
    assert ahead(records, [A, B], links=1)[1] == [C]
    assert ahead(records, [A])[1] == []


def test_a_circle_of_links_ends():
    records = Records({A: linked_with(B), B: linked_with(A)})
    assert ahead(records, [A], links=5)[1] == [B, A, B, A, B]


@pytest.mark.parametrize("error", [POSKeyError(C), WouldBlock()])
def test_a_link_to_what_cannot_be_had_ends_the_answer(error):
    records = chain(A, B, C, D)
    records[C] = error
    assert ahead(records, [A], links=9)[1] == [B]


def test_what_is_not_in_memory_ends_the_answer():
    records = Records({A: b"a", B: WouldBlock(), C: b"c"})
    assert ahead(records, [A, B, C], links=9) == ([b"a"], [])


def test_but_nobody_does_without_the_first():
    with pytest.raises(WouldBlock):
        ahead(Records({A: WouldBlock(), B: b"b"}), [A, B])


def test_nothing_makes_the_answer_longer_than_was_asked_for():
    records = Records({A: bytes(60), B: bytes(60), C: b"c"})
    assert ahead(records, [A, B, C], bytes_max=100) == ([bytes(60)], [])
    assert ahead(records, [A, B, C], bytes_max=120) == ([bytes(60)] * 2, [])
    size = len(linked_with(A))
    records = chain(A, B, C, D)
    assert ahead(records, [A], links=9, bytes_max=3 * size - 1)[1] == [B]
    assert ahead(records, [A], links=9, bytes_max=3 * size)[1] == [B, C]


def test_but_the_first_may_be_larger():
    records = Records({A: bytes(600), B: b"b"})
    assert ahead(records, [A, B], bytes_max=100) == ([bytes(600)], [])


def test_a_tree_is_followed_to_its_end():
    db = DB(None)
    connection = db.open()
    tree = connection.root()["tree"] = OOTreeSet(f"key {n:05}" for n in range(1000))
    connection.transaction_manager.commit()
    buckets = [tree._firstbucket]
    while buckets[-1]._next is not None:
        buckets.append(buckets[-1]._next)
    load = db.storage.loadBefore
    oids = [each._p_oid for each in buckets]
    _loaded, linked = load_ahead(load, oids[:1], LATEST, 1000, 10**6)
    assert [oid for oid, *_revision in linked] == oids[1:]
    assert link_of(linked[-1][1]) is None
    connection.close()
    db.close()


# Over the wire


@pytest.fixture
async def server() -> ModelServer:
    server = ModelServer()
    server.commit(A, linked_with(B))
    server.commit(B, linked_with(C))
    server.commit(C, b"the last")
    return server


def asked(server: ModelServer, *wish: Any) -> tuple[Any, int]:
    channel = MemorySession(server.service).channel()
    return channel, channel.ask("load_ahead", *wish)


async def test_an_answer_says_as_of_when_it_is_true(server):
    channel, request = asked(server, [A], LATEST, 1, 1000)
    last = server.served.changes.last_tid
    assert channel.value(request) == [
        last,
        [[linked_with(B), number(1), None]],
        [[B, linked_with(C), number(2), None]],
    ]
    assert server.served.counters.loads == 2


async def test_what_was_not_announced_is_not_shown(server):
    """The storage has it already, the loop has not heard of it yet."""
    last = server.served.changes.last_tid
    for oid in (A, B):
        server.database.put(oid, number(9), b"not announced")
    channel, request = asked(server, [A], LATEST, 1, 1000)
    as_of, (found,), (linked,) = channel.value(request)
    assert as_of == last
    assert found == [linked_with(B), number(1), number(9)]
    assert linked == [B, linked_with(C), number(2), number(9)]


async def test_what_is_read_from_the_disk_is_read_in_a_thread(server):
    server.database.would_block = True
    channel, request = asked(server, [A, B], LATEST, 5, 1000)
    as_of = server.served.changes.last_tid
    assert channel.answer(request) is None
    server.commit(A, b"more")
    await server.workers.work()
    told, loaded, linked = channel.value(request)
    assert told == as_of
    assert [data for data, _tid, _end in loaded] == [linked_with(B), linked_with(C)]
    assert linked == []
    assert server.database.prefetched == [[A, B]]


@pytest.mark.parametrize("would_block", [False, True])
async def test_nobody_holds_up_the_loop_or_a_thread_for_long(would_block):
    server = ModelServer(limits=replace(UNHURRIED, load_ahead_max=3))
    for n in range(1, 9):
        server.commit(number(n), linked_with(number(n + 1)))
    server.database.would_block = would_block
    oids = [number(n) for n in range(1, 6)]
    channel, request = asked(server, oids, LATEST, 2**62, 2**62)
    await server.workers.work()
    _as_of, loaded, linked = channel.value(request)
    assert len(loaded) == 3 < PREFETCHED
    assert len(linked) == (0 if would_block else 3)


async def test_an_answer_is_no_larger_than_the_server_allows():
    server = ModelServer(limits=replace(UNHURRIED, batch_bytes_max=1000))
    for n in range(5):
        server.commit(number(n), bytes(400))
    oids = [number(n) for n in range(5)]
    channel, request = asked(server, oids, LATEST, 0, 2**62)
    _as_of, loaded, _linked = channel.value(request)
    assert len(loaded) == 2
