"""Records of a Data.fs, read without a lock: against FileStorage's own answers."""

import errno
import os
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ZODB.FileStorage import FileStorage
from ZODB.FileStorage.format import CorruptedDataError
from ZODB.POSException import POSKeyError

from zeolith.storage import records
from zeolith.storage.database import Revision, WouldBlock
from zeolith.storage.records import (
    HEADER_BYTES,
    NOWAIT,
    NOWAIT_NEWER_MAX,
    Generation,
)
from zeolith.storage.tids import MAX_TID, Z64

from ..support.ids import number
from .histories import (
    MISSING,
    OIDS,
    READ_BYTES,
    histories,
    moments,
    opened,
    outcome,
    write,
)

OID = OIDS[0]
# A flag that is not 0, for the tests that give preadv another meaning.
FLAG = NOWAIT or 8


def one_record(size: int, then: int = 0) -> Any:
    """A history of one object of `size` bytes, and perhaps one behind it."""
    no_texts = {"user": b"", "description": b""}
    history: list[Any] = [(("store", {OID: size}), no_texts)]
    if then:
        history.append((("store", {OIDS[1]: then}), no_texts))
    return history


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[FileStorage]:
    storage = opened(tmp_path / "Data.fs")
    yield storage
    storage.close()


@pytest.fixture
def make(storage: FileStorage) -> Callable[[Any], tuple[Generation, list[bytes]]]:
    def make(history: Any) -> tuple[Generation, list[bytes]]:
        tids = write(storage, history)
        return Generation(storage._file_name, storage._index), tids

    return make


@pytest.fixture
def page_cache(monkeypatch) -> Callable[..., None]:
    """Puts something else in the place of preadv: pieces, nothing, or an error."""

    def install(answer: Callable[[int, int], int]) -> None:
        def preadv(fd: int, buffers: list[bytearray], position: int, flags: int) -> int:
            assert flags == FLAG
            size = answer(position, len(buffers[0]))
            data = os.pread(fd, size, position)
            buffers[0][: len(data)] = data
            return len(data)

        monkeypatch.setattr(os, "preadv", preadv)

    return install


@settings(max_examples=60)
@given(histories)
def test_any_history_reads_as_file_storage_reads_it(tmp_path_factory, history):
    storage = opened(tmp_path_factory.mktemp("records") / "Data.fs")
    try:
        tids = write(storage, history)
        generation = Generation(storage._file_name, storage._index)
        for oid in (*OIDS, MISSING):
            for moment in moments(tids):
                read = outcome(generation.load, oid, moment)
                assert read == outcome(storage.loadBefore, oid, moment)
                with suppress(WouldBlock):
                    assert outcome(generation.load_nowait, oid, moment) == read
            for tid in (Z64, *tids, MAX_TID):
                read = outcome(generation.load_serial, oid, tid)
                assert read == outcome(storage.loadSerial, oid, tid)
            assert outcome(generation.get_tid, oid) == outcome(storage.getTid, oid)
            revisions = [header.tid for header, *_rest in generation.revisions(oid)]
            if revisions:
                history_of = storage.history(oid, 1000)
                assert revisions == [entry["tid"] for entry in history_of]
            else:
                assert oid not in storage._index
        there = {oid for oid in OIDS if type(outcome(storage.getTid, oid)) is bytes}
        current = generation.current_tids([*OIDS, MISSING])
        assert current == {oid: storage.getTid(oid) for oid in there}
        for oid in (*OIDS, MISSING):
            with suppress(WouldBlock):
                assert generation.current_tid_nowait(oid) == current.get(oid)
        generation.close()
    finally:
        storage.close()


@pytest.mark.parametrize(
    "size",
    [
        1,
        READ_BYTES - HEADER_BYTES - 1,
        READ_BYTES - HEADER_BYTES,
        READ_BYTES - HEADER_BYTES + 1,
        READ_BYTES,
        3 * READ_BYTES,
        1_000_000,
    ],
)
@pytest.mark.parametrize("behind", [0, 10_000])
def test_a_record_is_read_whole_whatever_its_size(make, size, behind):
    """At the end of the file, and in its middle."""
    generation, tids = make(one_record(size, behind))
    revision = generation.load(OID, MAX_TID)
    assert revision is not None
    assert len(revision.data) == size
    assert revision.tid == tids[0]
    assert revision.data == generation.load_serial(OID, tids[0])


def test_an_object_that_did_not_exist_yet_is_none(make):
    generation, tids = make(one_record(10))
    assert generation.load(OID, tids[0]) is None
    assert generation.load(OID, number(int.from_bytes(tids[0], "big") + 1)) is not None


def test_an_object_that_never_existed_is_an_error(make):
    generation, _tids = make(one_record(10))
    for read in (
        lambda: generation.load(MISSING, MAX_TID),
        lambda: generation.load_serial(MISSING, Z64),
        lambda: generation.get_tid(MISSING),
    ):
        with pytest.raises(POSKeyError) as raised:
            read()
        assert raised.value.args == (MISSING,)


def test_an_old_revision_is_read_on_the_loop_if_it_is_small_and_not_long_ago(
    make, page_cache
):
    page_cache(lambda _position, size: size)
    history = one_record(READ_BYTES) + one_record(READ_BYTES + 1) * NOWAIT_NEWER_MAX
    generation, tids = make(history)
    assert len(generation.load_serial(OID, tids[0], FLAG)) == READ_BYTES
    with pytest.raises(WouldBlock):
        generation.load_serial(OID, tids[1], FLAG)


def test_a_snapshot_of_long_ago_is_not_looked_for_on_the_loop(make, page_cache):
    """A reader may ask for it, of an object that has changed any number of times."""
    page_cache(lambda _position, size: size)
    generation, tids = make(one_record(10) * (NOWAIT_NEWER_MAX + 2))
    assert generation.load(OID, tids[2], FLAG).tid == tids[1]
    with pytest.raises(WouldBlock):
        generation.load(OID, tids[1], FLAG)
    assert generation.load(OID, tids[1]).tid == tids[0], "elsewhere one may wait"


# Many tids at once


def side_by_side(count: int, size: int) -> Any:
    """A history of one transaction with `count` records of `size` bytes."""
    stores = {number(each): size for each in range(1, count + 1)}
    return [(("store", stores), {"user": b"", "description": b""})]


@pytest.fixture
def reads(page_cache) -> list[tuple[int, int]]:
    """(position, size) of each read."""
    seen: list[tuple[int, int]] = []

    def answer(position: int, size: int) -> int:
        seen.append((position, size))
        return size

    page_cache(answer)
    return seen


def test_tids_of_records_that_lie_side_by_side_are_read_at_once(make, reads):
    generation, (tid,) = make(side_by_side(100, 500))
    oids = [number(each) for each in range(100, 0, -1)]
    assert generation.current_tids([*oids, MISSING, *oids], FLAG) == dict.fromkeys(
        oids, tid
    )
    assert len(reads) == 1


def test_what_is_read_at_once_is_bounded(make, reads):
    generation, (tid,) = make(side_by_side(1000, 500))
    oids = [number(each) for each in range(1, 1001)]
    assert generation.current_tids(oids, FLAG) == dict.fromkeys(oids, tid)
    assert 1 < len(reads) < 20
    assert max(size for _position, size in reads) < 66_000


def test_large_records_between_two_headers_are_not_read(make, reads):
    generation, (tid,) = make(side_by_side(3, 9000))
    oids = [number(each) for each in (1, 2, 3)]
    assert generation.current_tids(oids, FLAG) == dict.fromkeys(oids, tid)
    assert [size for _position, size in reads] == [HEADER_BYTES + 8] * 3


def test_no_tids_are_nothing_to_read(make, reads):
    generation, _tids = make(one_record(10))
    assert generation.current_tids([], FLAG) == {}
    assert generation.current_tids([MISSING], FLAG) == {}
    assert not reads


def test_tids_of_what_is_not_in_memory_would_block(make, page_cache):
    generation, _tids = make(side_by_side(2, 100))

    def answer(position: int, size: int) -> int:
        raise OSError(errno.EAGAIN, "it is on the disk")

    page_cache(answer)
    with pytest.raises(WouldBlock):
        generation.current_tids([number(1), number(2)], FLAG)
    with pytest.raises(WouldBlock):
        generation.current_tid_nowait(number(1))


def test_tids_are_found_however_short_the_reads_are(make, page_cache):
    generation, (tid,) = make(side_by_side(3, 100))
    page_cache(lambda _position, _size: 7)
    oids = [number(each) for each in (1, 2, 3)]
    assert generation.current_tids(oids, FLAG) == dict.fromkeys(oids, tid)
    assert generation.current_tid_nowait(number(1)) == tid


@pytest.mark.parametrize("oids", [[1], [1, 2]])
def test_an_index_that_points_elsewhere_is_noticed(make, storage, oids):
    generation, _tids = make(side_by_side(2, 100))
    storage._index[number(1)] += 1
    with pytest.raises(CorruptedDataError):
        generation.current_tids(map(number, oids))
    with pytest.raises(CorruptedDataError):
        generation.current_tid_nowait(number(1))


@pytest.mark.parametrize("cut_bytes", [20, 150])
def test_a_file_that_ends_in_a_header_is_noticed(make, storage, cut_bytes):
    generation, _tids = make(side_by_side(2, 10))
    os.truncate(storage._file_name, storage.getSize() - cut_bytes)
    with pytest.raises(CorruptedDataError):
        generation.current_tids([number(1), number(2)])


# What the page cache can say


@pytest.mark.parametrize(
    "number", [errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO]
)
def test_what_is_not_in_memory_would_block(make, page_cache, number):
    generation, _tids = make(one_record(10))

    def answer(_position: int, _size: int) -> int:
        raise OSError(number, os.strerror(number))

    page_cache(answer)
    with pytest.raises(WouldBlock):
        generation.load(OID, MAX_TID, FLAG)


@pytest.mark.parametrize("size", [10, READ_BYTES, 50_000])
def test_who_may_wait_does_not_ask_the_page_cache(make, page_cache, size):
    generation, _tids = make(one_record(size))

    def answer(_position: int, _size: int) -> int:
        raise AssertionError("asked for what is in memory")

    page_cache(answer)
    revision = generation.load(OID, MAX_TID)
    assert revision is not None
    assert len(revision.data) == size


@settings(max_examples=50)
@given(st.integers(1, 10_000), st.lists(st.integers(1, 5000), min_size=1, max_size=5))
def test_short_reads_are_put_together(tmp_path_factory, size, pieces):
    """What is in memory may end anywhere; then the rest is asked for."""
    storage = opened(tmp_path_factory.mktemp("records") / "Data.fs")
    write(storage, one_record(size, 100))
    generation = Generation(storage._file_name, storage._index)
    served = 0

    def preadv(fd: int, buffers: list[bytearray], position: int, _flags: int) -> int:
        nonlocal served
        least = HEADER_BYTES if served == 0 else 1
        wanted = min(len(buffers[0]), max(pieces[served % len(pieces)], least))
        served += 1
        data = os.pread(fd, wanted, position)
        buffers[0][: len(data)] = data
        return len(data)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "preadv", preadv)
        revision = generation.load(OID, MAX_TID, FLAG)
    assert revision == Revision(*storage.loadBefore(OID, MAX_TID))
    generation.close()
    storage.close()


@pytest.mark.parametrize("in_memory", [1, HEADER_BYTES, HEADER_BYTES + 7, READ_BYTES])
def test_a_record_of_which_the_rest_is_not_in_memory_would_block(
    make, page_cache, in_memory
):
    generation, _tids = make(one_record(3 * READ_BYTES))
    start = generation.index[OID]

    def answer(position: int, size: int) -> int:
        left = start + in_memory - position
        if left <= 0:
            raise OSError(errno.EAGAIN, "not in memory")
        return min(size, left)

    page_cache(answer)
    with pytest.raises(WouldBlock):
        generation.load(OID, MAX_TID, FLAG)


def test_the_loop_asks_the_kernel_and_gets_an_answer_or_would_block(make):
    """Whatever this machine's file system can say of its page cache."""
    generation, _tids = make(one_record(3 * READ_BYTES))
    try:
        revision = generation.load(OID, MAX_TID, NOWAIT)
    except WouldBlock:
        return
    assert revision == generation.load(OID, MAX_TID)


def test_what_is_near_is_read_at_once_and_kept(make, page_cache, monkeypatch):
    monkeypatch.setattr(records, "NOWAIT", FLAG)
    reads: list[int] = []

    def whole(position: int, size: int) -> int:
        reads.append(position)
        return size

    page_cache(whole)
    generation, tids = make([*one_record(10, 20), *one_record(2 * READ_BYTES)])
    second = generation.load_nowait(OIDS[1], MAX_TID)
    assert reads == [generation.index[OIDS[1]]]
    assert second == generation.load(OIDS[1], MAX_TID)
    # The buffer is used again, for a longer record and for an older one.
    for moment in (MAX_TID, tids[2], tids[0]):
        assert generation.load_nowait(OID, moment) == generation.load(OID, moment)
    assert second == generation.load(OIDS[1], MAX_TID)
    assert type(second.data) is bytes


@pytest.mark.parametrize("error", [errno.EAGAIN, errno.EOPNOTSUPP, errno.EIO])
def test_what_is_not_near_would_block(make, page_cache, monkeypatch, error):
    monkeypatch.setattr(records, "NOWAIT", FLAG)

    def refuse(_position: int, _size: int) -> int:
        raise OSError(error, os.strerror(error))

    page_cache(refuse)
    generation, _tids = make(one_record(10))
    with pytest.raises(WouldBlock):
        generation.load_nowait(OID, MAX_TID)


@pytest.mark.parametrize("near", [0, 10, HEADER_BYTES, HEADER_BYTES + 50])
def test_what_is_near_in_part_is_read_whole(make, page_cache, monkeypatch, near):
    monkeypatch.setattr(records, "NOWAIT", FLAG)
    pieces = iter([near])
    page_cache(lambda _position, size: next(pieces, size))
    generation, _tids = make(one_record(100))
    assert generation.load_nowait(OID, MAX_TID) == generation.load(OID, MAX_TID)


def test_without_that_flag_a_load_reads_as_any(make, monkeypatch):
    monkeypatch.setattr(records, "NOWAIT", 0)
    monkeypatch.setattr(os, "preadv", None)
    generation, _tids = make(one_record(100))
    assert generation.load_nowait(OID, MAX_TID) == generation.load(OID, MAX_TID)


def test_objects_are_found_as_the_index_finds_them(make):
    generation, _tids = make(one_record(10, 20))
    index = generation.index
    for far in (b"\0" * 5 + b"\1\0\0", b"\xff" * 8):
        # In a bucket that is new since the file was opened.
        index[far] = 2**48 - 1
        assert generation._find(far) == index.get(far)
    for oid in (*OIDS, MISSING):
        assert generation._find(oid) == index.get(oid)
    del index[OID]
    assert generation._find(OID) is None


# Damage


def test_a_record_of_another_object_is_damage(make, storage):
    generation, _tids = make(one_record(10, 10))
    wrong = {OID: storage._index[OIDS[1]]}
    for load in ("load", "load_nowait"):
        with pytest.raises(CorruptedDataError):
            getattr(Generation(storage._file_name, wrong), load)(OID, MAX_TID)
    assert generation.load(OID, MAX_TID)


@pytest.mark.parametrize("left", [0, 10, HEADER_BYTES, HEADER_BYTES + 50])
def test_a_file_that_ends_in_a_record_is_damage(make, tmp_path, left):
    generation, _tids = make(one_record(100))
    path = tmp_path / "cut.fs"
    whole = Path(tmp_path / "Data.fs").read_bytes()
    path.write_bytes(whole[: generation.index[OID] + left])
    cut = Generation(str(path), generation.index)
    for load in (cut.load, cut.load_nowait):
        with pytest.raises(CorruptedDataError):
            load(OID, MAX_TID)
    cut.close()


def test_a_large_record_that_is_cut_is_damage(make, tmp_path):
    generation, _tids = make(one_record(3 * READ_BYTES))
    path = tmp_path / "cut.fs"
    whole = Path(tmp_path / "Data.fs").read_bytes()
    path.write_bytes(whole[: generation.index[OID] + 2 * READ_BYTES])
    cut = Generation(str(path), generation.index)
    for load in (cut.load, cut.load_nowait):
        with pytest.raises(CorruptedDataError):
            load(OID, MAX_TID)
    cut.close()


def damaged(tmp_path: Path, generation: Generation, at: int, found: bytes) -> Any:
    """A copy in which these bytes of the record of OID are others."""
    path = tmp_path / "damaged.fs"
    whole = bytearray(Path(tmp_path / "Data.fs").read_bytes())
    place = generation.index[OID] + at
    whole[place : place + len(found)] = found
    path.write_bytes(whole)
    return Generation(str(path), generation.index)


@pytest.mark.parametrize("length", [2**21, 2**32, 2**40, 2**62, 2**64 - 1])
def test_a_length_that_cannot_be_takes_no_memory(make, tmp_path, length):
    """Of a record that a disk has damaged; to read it would take the whole server."""
    generation, _tids = make(one_record(100))
    wrong = damaged(tmp_path, generation, 34, struct.pack(">Q", length))
    tracemalloc.start()
    try:
        for load in (wrong.load, wrong.load_nowait):
            with pytest.raises(CorruptedDataError):
                load(OID, MAX_TID)
        _now, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1_000_000
    wrong.close()


@pytest.mark.parametrize("where", ["itself", "later", "beyond every file"])
def test_a_record_that_leads_to_itself_is_damage(make, tmp_path, where):
    """Older revisions would be looked for, for ever."""
    generation, _tids = make(one_record(100))
    at = generation.index[OID]
    previous = {"itself": at, "later": at + 50, "beyond every file": 2**64 - 1}[where]
    wrong = damaged(tmp_path, generation, 16, struct.pack(">Q", previous))
    with pytest.raises(CorruptedDataError):
        wrong.load(OID, bytes(7) + b"\x01")
    with pytest.raises(CorruptedDataError):
        list(wrong.revisions(OID))
    wrong.close()


def test_a_large_record_is_inside_its_transaction(make, tmp_path):
    """A length that is wrong, but not beyond the end of the file."""
    generation, _tids = make(one_record(2**21, 2**22))
    assert len(generation.load(OID, MAX_TID).data) == 2**21
    wrong = damaged(tmp_path, generation, 34, struct.pack(">Q", 2**22))
    for load in (wrong.load, wrong.load_nowait):
        with pytest.raises(CorruptedDataError):
            load(OID, MAX_TID)
    wrong.close()


# Descriptors


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_generation_closes_its_file_once(make):
    generation, _tids = make(one_record(10))
    fd = generation.fd
    assert is_open(fd)
    generation.close()
    assert not is_open(fd)
    # Somebody else may have that number now.
    taken = os.open(os.devnull, os.O_RDONLY)
    generation.close()
    assert is_open(taken)
    os.close(taken)


def test_the_last_reader_closes_the_door(make):
    generation, _tids = make(one_record(10))
    fd = generation.fd
    del generation
    assert not is_open(fd)


def test_a_duplicate_outlives_its_generation(make):
    generation, _tids = make(one_record(10))
    fd = generation.duplicate()
    generation.close()
    assert os.pread(fd, 4, 0) == b"FS30"
    os.close(fd)


def test_a_file_that_is_not_there_leaves_no_generation(tmp_path):
    with pytest.raises(FileNotFoundError):
        Generation(str(tmp_path / "Data.fs"), {})


def test_the_old_file_goes_on_being_read_when_another_took_its_name(make, tmp_path):
    generation, _tids = make(one_record(10))
    (tmp_path / "other.fs").write_bytes(b"something else")
    (tmp_path / "other.fs").rename(tmp_path / "Data.fs")
    assert generation.load(OID, MAX_TID) is not None


def test_the_layout_is_that_of_zodb():
    assert records._HEADER.size == HEADER_BYTES
