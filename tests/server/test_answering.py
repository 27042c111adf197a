"""The short way of a load: what it answers is what the general way answers.

``generally`` is put together of the pieces of the general way, which have tests of
their own against FileStorage, the general codec and the table of methods.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ZODB.FileStorage import FileStorage

from zeolith.protocol.codec import encode
from zeolith.protocol.compiled import SWITCH
from zeolith.protocol.limits import Limits
from zeolith.protocol.loads import decode_load, encode_load, encode_loaded
from zeolith.protocol.messages import Reply, Request
from zeolith.server import answering
from zeolith.server.served import Served
from zeolith.server.service import Service
from zeolith.storage.changes import Changes
from zeolith.storage.filestore import FileStore
from zeolith.storage.records import HEADER_BYTES, NOWAIT, Generation
from zeolith.storage.tids import MAX_TID, Z64

from ..protocol.strategies import EDGES, calls, changed, damaged, messages, numbers
from ..storage.histories import (
    MISSING,
    OIDS,
    READ_BYTES,
    histories,
    moments,
    opened,
    write,
)
from ..storage.transactions import store, transaction
from ..support.ids import number
from ..support.memory import UNHURRIED, MemoryClient, MemorySession
from ..support.model import HandWorkers, publish

COMPILED = answering._compiled
OID = OIDS[0]
# As in the C source: what is read of a record at first, and data of which the length
# takes more than two bytes.
START_BYTES = 1024
DATA_BYTES_MAX = 0xFFFF
AS_OF = b"as-of-56"


def can_tell(folder: Path) -> bool:
    """Whether the file system of ``folder`` can say what is in memory."""
    path = folder / "anything"
    path.write_bytes(b"anything")
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(fd, [bytearray(1)], 0, NOWAIT) == 1
    except OSError:
        return False
    finally:
        os.close(fd)


@pytest.fixture(autouse=True)
def is_possible(tmp_path: Path) -> None:
    if COMPILED is None:
        pytest.skip("there is no compiled module")
    if not NOWAIT or not can_tell(tmp_path):
        pytest.skip("nobody can say here what is in memory")


def shortly(
    frame: bytes, generation: Generation, *, last: int = 0, horizon: bytes = MAX_TID
) -> tuple[int, bytes] | None:
    assert COMPILED is not None
    place = generation.fd, generation.buckets
    answered: tuple[int, bytes] | None
    answered = COMPILED.answer(frame, last, *place, horizon, AS_OF)
    return answered


def generally(
    frame: bytes, generation: Generation, *, last: int = 0, horizon: bytes = MAX_TID
) -> tuple[int, bytes] | None:
    """What the short way may answer; None for what is an error, or no load."""
    request = decode_load(frame)
    if request is None or request.id <= last:
        return None
    oid, before = request.args
    try:
        found = generation.load(oid, min(before, horizon))
    except KeyError:
        return None
    if found is None:
        return None
    sent = encode_loaded(request.id, (*found, AS_OF))
    return None if sent is None else (request.id, sent)


def loaded_shortly(
    oid: bytes, generation: Generation, before: bytes = MAX_TID
) -> tuple[bytes, bytes, None] | None:
    assert COMPILED is not None
    found: tuple[bytes, bytes, None] | None
    found = COMPILED.load(oid, before, generation.fd, generation.buckets)
    return found


def load(oid: bytes = OID, before: bytes = MAX_TID, number: int = 1) -> bytes:
    frame = encode_load(number, [oid, before])
    assert frame is not None
    return frame


# One call against the pieces of the general way

# Around where msgpack, and where reading takes another step.
SIZES = [1, 255, 256, 500, DATA_BYTES_MAX]
SIZES += [START_BYTES - HEADER_BYTES + more for more in (-1, 0, 1)]
LONGER = 3 * START_BYTES

Write = Callable[..., tuple[Generation, list[bytes]]]


@pytest.fixture
def write_records(tmp_path: Path) -> Iterator[Write]:
    """Makes a Data.fs of which each transaction stores one record, of a size."""
    storage: FileStorage = opened(tmp_path / "Data.fs")

    def write_records(*stores: tuple[bytes, int]) -> tuple[Generation, list[bytes]]:
        texts = {"user": b"", "description": b""}
        tids = write(storage, [(("store", {o: size}), texts) for o, size in stores])
        return Generation(storage._file_name, storage._index), tids

    yield write_records
    storage.close()


@settings(max_examples=60)
@given(histories, numbers)
def test_any_history_is_answered_as_the_general_way_answers_it(
    tmp_path_factory, history, last
):
    storage = opened(tmp_path_factory.mktemp("answering") / "Data.fs")
    try:
        tids = write(storage, history)
        generation = Generation(storage._file_name, storage._index)
        for oid in (*OIDS, MISSING):
            for before in moments(tids):
                for horizon in (MAX_TID, *tids[-2:]):
                    asked = load(oid, before, min(last + 1, 2**64 - 1))
                    known = shortly(asked, generation, last=last, horizon=horizon)
                    if known is not None:
                        assert known == generally(
                            asked, generation, last=last, horizon=horizon
                        )
                found = loaded_shortly(oid, generation, before)
                assert found is None or found == generation.load(oid, before)
        generation.close()
    finally:
        storage.close()


@given(numbers)
@pytest.mark.parametrize("size", SIZES)
def test_current_records_are_answered(tmp_path_factory, size, asked):
    storage = opened(tmp_path_factory.mktemp("answering") / "Data.fs")
    try:
        texts = {"user": b"", "description": b""}
        write(storage, [(("store", {o: size}), texts) for o in OIDS])
        generation = Generation(storage._file_name, storage._index)
        for oid in OIDS:
            frame = load(oid, MAX_TID, asked)
            # First, for it reads into memory what the kernel may have let go of.
            expected = generally(frame, generation)
            known = shortly(frame, generation, last=asked - 1)
            assert known is not None
            assert known == expected
            assert loaded_shortly(oid, generation) == generation.load(oid, MAX_TID)
        generation.close()
    finally:
        storage.close()


def test_the_answer_is_bounded_by_what_is_announced(write_records):
    generation, (first, second) = write_records((OID, 50), (OIDS[1], 50))
    assert shortly(load(OIDS[1]), generation, horizon=second) is None
    assert shortly(load(OID), generation, horizon=second) is not None
    assert shortly(load(OID, before=first), generation) is None
    assert shortly(load(OID, before=second), generation) is not None


def test_what_is_older_missing_or_large_is_left_to_the_general_way(write_records):
    large = DATA_BYTES_MAX + 1
    generation, tids = write_records((OID, 50), (OID, 60), (OIDS[1], large))
    assert generally(load(before=tids[1]), generation) is not None
    assert shortly(load(before=tids[1]), generation) is None
    assert loaded_shortly(OID, generation, tids[1]) is None
    # Of the last one the bucket is not there either.
    for oid in (OIDS[1], MISSING, b"\xff" * 8):
        assert shortly(load(oid), generation) is None
        assert loaded_shortly(oid, generation) is None


@pytest.mark.parametrize("last", [1, 7, 2**64 - 1])
def test_a_number_that_was_used_is_left_to_the_general_way(write_records, last):
    generation, _tids = write_records((OID, 50))
    assert shortly(load(number=last), generation, last=last) is None
    assert shortly(load(number=last), generation, last=last - 1) is not None
    assert shortly(encode(Request(0, "load", [OID, OID])), generation) is None


@pytest.mark.parametrize("asked", EDGES)
def test_a_request_of_which_one_byte_is_another(write_records, asked):
    generation, _tids = write_records(*[(oid, 50) for oid in OIDS])
    answered = 0
    for frame in changed(load(OIDS[3], MAX_TID, asked)):
        known = shortly(frame, generation)
        if known is not None:
            answered += 1
            assert known == generally(frame, generation)
    # Another number, oid or moment is as good.
    assert answered


@settings(max_examples=300)
@given(
    st.data(),
    damaged(st.builds(load, st.sampled_from(OIDS), st.just(MAX_TID), numbers))
    | messages.map(encode)
    | calls("client", answers=True).map(lambda call: encode(Request(1, *call)))
    | st.binary(max_size=45),
)
def test_what_is_answered_was_a_load(shared_generation, data, frame):
    last = data.draw(st.just(0) | numbers)
    known = shortly(frame, shared_generation, last=last)
    if known is not None:
        assert known == generally(frame, shared_generation, last=last)


@pytest.fixture(scope="module")
def shared_generation(tmp_path_factory) -> Iterator[Generation]:
    storage = opened(tmp_path_factory.mktemp("answering") / "Data.fs")
    texts = {"user": b"", "description": b""}
    write(storage, [(("store", {oid: 50}), texts) for oid in OIDS])
    yield Generation(storage._file_name, storage._index)
    storage.close()


# What the file and the index may say


@pytest.mark.parametrize(
    "left",
    [0, 10, HEADER_BYTES, HEADER_BYTES + 49, START_BYTES, HEADER_BYTES + LONGER - 1],
)
@pytest.mark.parametrize("size", [50, LONGER])
def test_a_file_that_ends_in_a_record_is_left_to_the_general_way(
    write_records, tmp_path, size, left
):
    generation, _tids = write_records((OID, size))
    position = generation._find(OID)
    whole = HEADER_BYTES + size
    os.truncate(tmp_path / "Data.fs", position + min(left, whole - 1))
    assert shortly(load(), generation) is None
    assert loaded_shortly(OID, generation) is None
    os.truncate(tmp_path / "Data.fs", position + whole)


@pytest.mark.parametrize(
    "length", [0, 51, READ_BYTES, DATA_BYTES_MAX, 2**32, 2**63, 2**64 - HEADER_BYTES]
)
def test_a_length_beyond_what_was_read_is_left_to_the_general_way(
    write_records, tmp_path, length
):
    generation, _tids = write_records((OID, 50))
    at = generation._find(OID) + HEADER_BYTES - 8
    path = tmp_path / "Data.fs"
    # Nothing is behind the record.
    os.truncate(path, at + 8 + 50)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(length.to_bytes(8, "big"))
    assert shortly(load(), generation) is None
    assert loaded_shortly(OID, generation) is None


def test_a_record_of_another_object_is_left_to_the_general_way(write_records):
    generation, _tids = write_records((OID, 50), (OIDS[1], 50))
    generation.buckets = {OID[:6]: {OID[6:]: generation._find(OIDS[1]).to_bytes(6)}}
    assert shortly(load(), generation) is None


@pytest.mark.parametrize(
    "buckets",
    [
        {},
        None,
        7,
        {OID[:6]: None},
        {OID[:6]: {}},
        {OID[:6]: {OID[6:]: None}},
        {OID[:6]: {OID[6:]: bytes(6)}},
        {OID[:6]: {OID[6:]: b"\xff" * 6}},
        {OID[:6]: {OID[6:]: 4}},
    ],
)
def test_an_index_that_is_none_is_left_to_the_general_way(write_records, buckets):
    generation, _tids = write_records((OID, 50))
    generation.buckets = buckets
    assert shortly(load(), generation) is None
    assert loaded_shortly(OID, generation) is None


@pytest.mark.parametrize("size", [5, 7])
def test_a_position_is_six_bytes(write_records, size):
    generation, _tids = write_records((OID, 50))
    place = generation._find(OID).to_bytes(6) + b"x"
    generation.buckets = {OID[:6]: {OID[6:]: place[:6]}}
    assert shortly(load(), generation) is not None
    generation.buckets = {OID[:6]: {OID[6:]: place[:size]}}
    assert shortly(load(), generation) is None


def test_a_file_that_is_closed_is_left_to_the_general_way(write_records):
    generation, _tids = write_records((OID, 50))
    generation.close()
    assert shortly(load(), generation) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {1: -1},
        {1: 2**64},
        {1: "1"},
        {2: "1"},
        {2: 2**80},
        {2: 2**31},
        {4: Z64[:7]},
        {4: None},
        {5: bytearray(8)},
        {5: Z64 + b"1"},
    ],
)
def test_a_caller_who_is_wrong_is_told(write_records, wrong):
    assert COMPILED is not None
    generation, _tids = write_records((OID, 50))
    right = [load(), 0, generation.fd, generation.buckets, MAX_TID, AS_OF]
    arguments: Any = [wrong.get(at, value) for at, value in enumerate(right)]
    with pytest.raises((TypeError, OverflowError)):
        COMPILED.answer(*arguments)
    with pytest.raises(TypeError):
        COMPILED.answer(*arguments[:-1])


@pytest.mark.parametrize("wrong", [{0: Z64[:7]}, {0: None}, {1: "tid"}, {2: 2**31}])
def test_a_caller_who_is_wrong_about_one_object_is_told(write_records, wrong):
    assert COMPILED is not None
    generation, _tids = write_records((OID, 50))
    right = [OID, MAX_TID, generation.fd, generation.buckets]
    arguments: Any = [wrong.get(at, value) for at, value in enumerate(right)]
    with pytest.raises((TypeError, OverflowError)):
        COMPILED.load(*arguments)
    with pytest.raises(TypeError):
        COMPILED.load(*arguments[:-1])


@pytest.mark.parametrize("data", [None, "text", bytearray(load()), memoryview(load())])
def test_only_bytes_are_looked_at(write_records, data):
    generation, _tids = write_records((OID, 50))
    assert shortly(data, generation) is None


def test_no_other_thread_runs_meanwhile(write_records):
    """A thread that computes would not give the interpreter back for long."""
    generation, _tids = write_records((OID, LONGER))
    may_run = threading.Lock()
    ran = threading.Event()
    frame = load()

    def run() -> None:
        with may_run:
            ran.set()

    before_s = sys.getswitchinterval()
    may_run.acquire()
    other = threading.Thread(target=run)
    other.start()
    # Nobody takes the interpreter from a thread that does not give it.
    sys.setswitchinterval(1000)
    try:
        may_run.release()
        answers: list[Any] = [shortly(frame, generation) for _ in range(1000)]
        answers += [loaded_shortly(OID, generation) for _ in range(1000)]
        has_run = ran.is_set()
    finally:
        sys.setswitchinterval(before_s)
    other.join()
    assert None not in answers
    assert not has_run


def test_nothing_is_kept(write_records, tmp_path):
    generation, _tids = write_records((OID, 50), (OIDS[1], LONGER))
    # Its data are not there.
    os.truncate(tmp_path / "Data.fs", generation._find(OIDS[1]) + START_BYTES)
    cut_off = load(OIDS[1])
    things = [
        load(number=1000),
        MAX_TID,
        AS_OF,
        generation.buckets,
        generation.buckets[OID[:6]],
    ]
    missing = load(MISSING)
    before = [sys.getrefcount(each) for each in things]
    blocks = sys.getallocatedblocks()
    for _ in range(1000):
        assert shortly(things[0], generation) is not None
        assert shortly(missing, generation) is None
        assert shortly(cut_off, generation) is None
        assert loaded_shortly(OID, generation) is not None
        assert loaded_shortly(MISSING, generation) is None
        assert loaded_shortly(OIDS[1], generation) is None
        assert shortly(b"something else", generation) is None
    assert [sys.getrefcount(each) for each in things] == before
    assert sys.getallocatedblocks() - blocks < 500


# In a server


@pytest.fixture
def database(tmp_path: Path) -> Iterator[FileStore]:
    database = FileStore("1", str(tmp_path / "Served.fs"))
    yield database
    database.close()


def commit(database: FileStore, *operations: Any) -> bytes:
    database.vote(transaction(*operations))
    return database.finish().tid


class Serving:
    """A service of a Data.fs, with workers that wait for the test."""

    def __init__(self, database: FileStore, limits: Limits = UNHURRIED):
        last_tid, _changes = database.last_changes()
        self.workers = HandWorkers()
        self.served = Served(
            database,
            self.workers,
            Changes(last_tid),
            info=database.info(),
            is_read_only=False,
            limits=limits,
        )
        self.session = MemorySession(Service({"1": self.served}, limits), limits)

    def channel(self, *, is_short: bool = True) -> MemoryClient:
        channel = self.session.channel()
        assert channel.peer.answer is not None
        if not is_short:
            channel.peer.answer = None
        return channel


def not_asked(*_args: Any) -> None:
    raise AssertionError("the general way was taken")


async def test_a_load_on_a_channel_goes_the_short_way(database, monkeypatch):
    tid = commit(database, store(OID, b"data"))
    monkeypatch.setattr(database, "load_nowait", not_asked)
    serving = Serving(database)
    channel = serving.channel()
    for _ in range(3):
        writes = channel.transport.writes
        assert channel.value(channel.ask("load", OID, MAX_TID)) == [
            b"data",
            tid,
            None,
            tid,
        ]
        assert channel.transport.writes == writes + 1
    assert serving.served.counters.loads == 3
    # What does not wait for an answer keeps nothing open.
    assert not channel.peer.connection.open_requests


async def test_what_is_not_announced_does_not_exist(database):
    first = commit(database, store(OID, b"data"))
    serving = Serving(database)
    channel = serving.channel()
    second = commit(database, store(OID, b"newer", first), store(OIDS[1], b"new"))
    assert channel.value(channel.ask("load", OID, MAX_TID)) == [
        b"data",
        first,
        second,
        first,
    ]
    assert channel.failure(channel.ask("load", OIDS[1], MAX_TID)).name == "POSKeyError"
    publish(serving.served, second, [OID, OIDS[1]])
    for oid, data in ((OID, b"newer"), (OIDS[1], b"new")):
        assert channel.value(channel.ask("load", oid, MAX_TID)) == [
            data,
            second,
            None,
            second,
        ]


async def test_after_a_pack_the_new_file_is_read(database, monkeypatch):
    old = commit(database, store(OID, b"old"))
    new = commit(database, store(OID, b"data", old))
    serving = Serving(database)
    channel = serving.channel()
    before = database.near()
    assert before is not None
    fd = before.fd
    assert channel.value(channel.ask("load", OID, MAX_TID))[0] == b"data"
    database.pack(time.time() + 1, gc=False)
    assert database.near() is not before
    del before
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    monkeypatch.setattr(database, "load_nowait", not_asked)
    loaded = channel.value(channel.ask("load", OID, MAX_TID))
    assert loaded == [b"data", new, None, new]


async def test_what_is_not_in_memory_is_read_in_a_thread(database, monkeypatch):
    tid = commit(database, store(OID, b"data"))
    serving = Serving(database)
    channel = serving.channel()
    with monkeypatch.context() as patched:
        patched.setattr(database.near(), "fd", -1)
        later = channel.ask("load", OID, MAX_TID)
    assert channel.answer(later) is None
    assert channel.peer.connection.open_requests == {later}
    # What is asked later may be answered sooner.
    sooner = channel.ask("load", OID, MAX_TID)
    assert channel.value(sooner) == [b"data", tid, None, tid]
    await serving.workers.work()
    assert channel.value(later) == [b"data", tid, None, tid]


async def test_a_batch_of_loads_is_answered_in_one_write(database):
    tid = commit(database, store(OID, b"data"))
    channel = Serving(database).channel()
    writes = channel.transport.writes
    arguments = [OID, MAX_TID]
    asked = [channel.connection.request("load", arguments, 0.0) for _ in range(2)]
    channel.send(b"".join(asked))
    assert channel.received() == [
        Reply(each, [b"data", tid, None, tid]) for each in (1, 2)
    ]
    assert channel.transport.writes == writes + 1


async def test_an_answer_beyond_the_limit_of_a_frame_is_a_failure(database):
    commit(database, store(OID, bytes(1200)))
    limits = replace(
        UNHURRIED,
        hello_frame_bytes_max=1000,
        frame_bytes_max=1000,
        batch_bytes_max=1000,
    )
    channel = Serving(database, limits).channel()
    assert "too large" in channel.failure(channel.ask("load", OID, MAX_TID)).text


async def test_a_peer_that_reads_nothing_is_cut_off(database):
    commit(database, store(OID, bytes(1000)))
    limits = replace(UNHURRIED, lag_bytes_max=2000, output_bytes_max=5000)
    channel = Serving(database, limits).channel()
    channel.transport.stop_reading()
    for _ in range(8):
        channel.ask("load", OID, MAX_TID)
    assert channel.transport.is_closing()


async def test_many_loads_go_the_short_way(database, monkeypatch):
    first = commit(database, store(OID, b"data"), store(OIDS[1], b"other"))
    second = commit(database, store(OID, b"newer", first))
    serving = Serving(database)
    channel = serving.channel()
    asked: list[bytes] = []

    def generally(oid: bytes, before: bytes) -> Any:
        asked.append(oid)
        return database.load(oid, before)

    monkeypatch.setattr(database, "load_nowait", generally)
    many = channel.ask("load_many", [OID, MISSING, OIDS[1]], MAX_TID)
    other = [b"other", first, None]
    assert channel.value(many) == [second, [[b"newer", second, None], None, other]]
    assert asked == [MISSING]
    # The older one of two is none of its.
    many = channel.ask("load_many", [OIDS[1], OID], second)
    assert channel.value(many) == [second, [other, [b"data", first, second]]]
    assert asked == [MISSING, OID]
    assert serving.served.counters.loads == 5


async def test_of_many_loads_what_is_not_announced_does_not_exist(database):
    first = commit(database, store(OID, b"data"))
    serving = Serving(database)
    second = commit(database, store(OID, b"newer", first), store(OIDS[1], b"new"))
    channel = serving.channel()
    many = channel.ask("load_many", [OID, OIDS[1]], MAX_TID)
    assert channel.value(many) == [first, [[b"data", first, second], None]]


async def test_many_loads_of_what_is_not_in_memory_are_made_in_a_thread(
    database, monkeypatch
):
    tid = commit(database, store(OID, b"data"))
    serving = Serving(database)
    channel = serving.channel()
    with monkeypatch.context() as patched:
        patched.setattr(database.near(), "fd", -1)
        many = channel.ask("load_many", [OID], MAX_TID)
    assert channel.answer(many) is None
    await serving.workers.work()
    assert channel.value(many) == [tid, [[b"data", tid, None]]]


async def test_storages_that_are_not_a_file_have_no_short_way(database, monkeypatch):
    tid = commit(database, store(OID, b"data"))
    monkeypatch.setattr(database, "near", lambda: None)
    serving = Serving(database)
    channel = serving.channel()
    assert channel.value(channel.ask("load", OID, MAX_TID))[1] == tid
    many = channel.ask("load_many", [OID], MAX_TID)
    assert channel.value(many) == [tid, [[b"data", tid, None]]]
    assert serving.served.counters.loads == 2


async def test_without_the_compiled_module_there_is_no_short_way(database, monkeypatch):
    tid = commit(database, store(OID, b"data"))
    monkeypatch.setattr(answering, "_compiled", None)
    channel = Serving(database).session.channel()
    assert channel.peer.answer is None
    assert channel.value(channel.ask("load", OID, MAX_TID))[1] == tid
    many = channel.ask("load_many", [OID], MAX_TID)
    assert channel.value(many) == [tid, [[b"data", tid, None]]]


def test_a_server_with_the_switch_has_no_short_way():
    script = "from zeolith.server import answering; assert answering._compiled is None"
    environment = {**os.environ, SWITCH: "0"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


# The conversation: either way it is the same

oids = st.sampled_from([*OIDS, MISSING])
asked: st.SearchStrategy[tuple[str, list[Any]]] = (
    st.tuples(oids, st.sampled_from([MAX_TID, MAX_TID, number(2)])).map(
        lambda args: ("load", list(args))
    )
    | oids.map(lambda oid: ("get_tid", [oid]))
    | st.just(("ping", []))
)
# How many bytes of the next are sent at once, and by how much its number is wrong.
whole = st.just((1000, 0))
steps = st.lists(
    st.tuples(asked, whole | whole | st.tuples(st.integers(1, 50), st.just(0)))
    | st.tuples(asked, st.tuples(st.just(1000), st.integers(-1, 1))),
    max_size=8,
)


def told(channel: MemoryClient) -> tuple[Any, ...]:
    """All that can be known of a channel, but for what it has sent."""
    connection = channel.peer.connection
    return (
        connection.state,
        str(connection.error),
        set(connection.open_requests),
        connection.last_request,
        connection.rcvd_at,
        connection.sent_at,
        connection.is_inside_frame,
        channel.transport.is_closing(),
        channel.transport.writes,
    )


@settings(max_examples=80)
@given(steps)
async def test_a_channel_is_in_the_same_state_either_way(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("answering")
    database = FileStore("1", str(folder / "Served.fs"))
    try:
        commit(database, *[store(oid, b"data of " + oid) for oid in OIDS])
        serving = Serving(database)
        ends = [serving.channel(), serving.channel(is_short=False)]
        for end in ends:
            end.peer.connection.rcvd_at = end.peer.connection.sent_at = 0.0
        for now, ((method, arguments), (cut, wrong)) in enumerate(steps, 1):
            frame = encode(Request(max(0, now + wrong), method, arguments))
            for end in ends:
                end.peer._now = partial(float, now)
                for piece in (frame[:cut], frame[cut:]):
                    if piece and not end.transport.is_closing():
                        end.send(piece)
            assert told(ends[0]) == told(ends[1])
            assert ends[0].transport.take() == ends[1].transport.take()
        await serving.workers.work()
        assert told(ends[0]) == told(ends[1])
        assert ends[0].transport.take() == ends[1].transport.take()
    finally:
        database.close()
