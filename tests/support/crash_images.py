"""What a crash may leave of a file, and whether ZODB still finds everything in it.

A `Recorder` writes down what is done to a Data.fs: each write, sync and truncation,
whoever does it (the server's Disk, FileStorage's buffered file), and when transactions
were acknowledged or refused. From that come images: the file as a crash at some moment
may leave it. All that was done before the last sync is in it; of what was done since
then, either a beginning, the last write perhaps in part (in order), or any subset, one
of them perhaps in part (reordered). A `Checker` opens each image with plain ZODB.
"""

import io
import random
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import combinations
from pathlib import Path
from struct import unpack_from
from typing import Any, NamedTuple

from ZODB.FileStorage import FileStorage
from ZODB.FileStorage.format import DATA_HDR_LEN, TRANS_HDR, TRANS_HDR_LEN

from zeolith.storage.disk import Disk
from zeolith.storage.filestore import FileStore

from ..storage.transactions import plain, store, transaction
from .ids import number

# Every byte of a write that is not longer than this is a place to cut.
CUT_EVERYWHERE_BYTES = 300
RANDOM_CUTS = 4
SUBSETS_MAX = 64
CUTS_OF_A_SUBSET = 8
# Nobody uses it but the check whether an image can be written to.
PROBE = number(2**40)


class Write(NamedTuple):
    """Bytes that were written."""

    position: int
    data: bytes


class Truncate(NamedTuple):
    """The file was cut."""

    size: int


class Sync(NamedTuple):
    """Everything before it is on the disk."""


class Told(NamedTuple):
    """Clients were told that these were committed, or that these were not."""

    committed: tuple[bytes, ...] = ()
    refused: tuple[bytes, ...] = ()


class IndexSaved(NamedTuple):
    """A saved index is beside the file from now on."""

    data: bytes


Operation = Write | Truncate
Event = Operation | Sync | Told | IndexSaved


class Image(NamedTuple):
    """A file after a crash."""

    content: bytes
    # Descriptions of transactions: they must be there, they must not.
    committed: frozenset[bytes]
    refused: frozenset[bytes]
    saved_index: bytes | None
    how: str


class Recorder:
    """Everything that is done to the file of one FileStore from now on."""

    def __init__(self, database: FileStore, monkeypatch: Any):
        self.events: list[Event] = []
        self._path = Path(database._path)
        self.base = self._path.read_bytes()
        file = database._file
        file.disk = file.room._disk = RecordingDisk(self)
        for name in ("_file", "_tfile"):
            opened = getattr(file, name)
            raw = RecordingFile(opened.name, "r+b")
            raw.recorder = self if name == "_file" else None
            opened.close()
            setattr(file, name, io.BufferedRandom(raw))
        file._tfmt._file = file._tfile
        module = sys.modules[FileStorage.__module__]
        monkeypatch.setattr(module, "fsync", lambda _fd: self.events.append(Sync()))

    def told(
        self, committed: Iterable[bytes] = (), refused: Iterable[bytes] = ()
    ) -> None:
        self.events.append(Told(tuple(committed), tuple(refused)))

    def index_was_saved(self) -> None:
        self.events.append(IndexSaved(Path(f"{self._path}.index").read_bytes()))


class RecordingDisk(Disk):
    """Has everything recorded."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self._recorder = recorder

    def write(self, fd: int, buffers: Sequence[Any], position: int) -> int:
        size = super().write(fd, buffers, position)
        data = b"".join(map(bytes, buffers))[:size]
        self._recorder.events.append(Write(position, data))
        return size

    def sync(self, fd: int) -> None:
        self._recorder.events.append(Sync())

    def truncate(self, fd: int, size: int) -> None:
        super().truncate(fd, size)
        self._recorder.events.append(Truncate(size))


class RecordingFile(io.FileIO):
    """A file below Python's buffers."""

    recorder: Recorder | None

    def write(self, data: Any) -> int:
        position = self.tell()
        size = super().write(data)
        if self.recorder is not None:
            self.recorder.events.append(Write(position, bytes(data[:size])))
        return size

    def truncate(self, size: int | None = None) -> int:
        size = super().truncate(size)
        if self.recorder is not None:
            self.recorder.events.append(Truncate(size))
        return size


# Images


def images(recorder: Recorder, *, reordered: bool, seed: int = 0) -> Iterator[Image]:
    """Every image that differs from all before; ``seed`` is for the random cuts."""
    randomly = random.Random(seed)
    seen: set[bytes] = set()
    for moment in _moments(recorder):
        made = (
            _reordered(moment, randomly) if reordered else _in_order(moment, randomly)
        )
        for content, how in made:
            digest = blake2b(content)
            for told in (moment.committed, moment.refused):
                digest.update(repr(sorted(told)).encode())
            if digest.digest() not in seen:
                seen.add(digest.digest())
                yield Image(
                    content,
                    moment.committed,
                    moment.refused,
                    moment.saved_index,
                    f"{moment.how}: {how}",
                )


class _Moment(NamedTuple):
    """When a crash might come."""

    # What is on the disk for sure, and what was done since.
    durable: bytes
    pending: list[Operation]
    committed: frozenset[bytes]
    refused: frozenset[bytes]
    saved_index: bytes | None
    how: str


def _moments(recorder: Recorder) -> Iterator[_Moment]:
    """The last ones before something becomes durable, or known."""
    durable, pending = bytearray(recorder.base), list[Operation]()
    committed, refused = frozenset[bytes](), frozenset[bytes]()
    index = None
    for count, event in enumerate([*recorder.events, Sync()]):
        if not isinstance(event, Write | Truncate):
            how = f"before {type(event).__name__} {count}"
            yield _Moment(bytes(durable), list(pending), committed, refused, index, how)
        if isinstance(event, Sync):
            for operation in pending:
                _apply(durable, operation)
            pending.clear()
        elif isinstance(event, Told):
            committed |= frozenset(event.committed)
            refused |= frozenset(event.refused)
        elif isinstance(event, IndexSaved):
            index = event.data
        else:
            pending.append(event)


def _in_order(moment: _Moment, randomly: random.Random) -> Iterator[tuple[bytes, str]]:
    content = bytearray(moment.durable)
    yield bytes(content), "nothing of it"
    for count, operation in enumerate(moment.pending, 1):
        if isinstance(operation, Write):
            for cut in cuts(operation.data, randomly):
                cut_off = bytearray(content)
                _apply(cut_off, Write(operation.position, operation.data[:cut]))
                yield bytes(cut_off), f"{count - 1} writes and {cut} bytes"
        _apply(content, operation)
        yield bytes(content), f"{count} writes"


def _reordered(moment: _Moment, randomly: random.Random) -> Iterator[tuple[bytes, str]]:
    for subset in _subsets(len(moment.pending), randomly):
        chosen = [moment.pending[each] for each in subset]
        yield _applied(moment.durable, chosen), f"writes {subset}"
        for count, operation in enumerate(chosen):
            if not isinstance(operation, Write):
                continue
            places = cuts(operation.data, randomly)
            for cut in randomly.sample(places, min(CUTS_OF_A_SUBSET, len(places))):
                part = Write(operation.position, operation.data[:cut])
                with_part = [*chosen[:count], part, *chosen[count + 1 :]]
                yield (
                    _applied(moment.durable, with_part),
                    f"writes {subset}, of the {count}. {cut} bytes",
                )


def _subsets(count: int, randomly: random.Random) -> Iterator[tuple[int, ...]]:
    if 2**count <= SUBSETS_MAX:
        for size in range(count + 1):
            yield from combinations(range(count), size)
        return
    yield tuple(range(count))
    for one in range(count):
        # The most dangerous: one is missing, or one alone is there.
        yield tuple(each for each in range(count) if each != one)
        yield (one,)
    for _ in range(SUBSETS_MAX):
        yield tuple(each for each in range(count) if randomly.random() < 0.5)


def _applied(content: bytes, operations: Iterable[Operation]) -> bytes:
    result = bytearray(content)
    for operation in operations:
        _apply(result, operation)
    return bytes(result)


def _apply(content: bytearray, operation: Operation) -> None:
    if isinstance(operation, Truncate):
        missing = operation.size - len(content)
        content[operation.size :] = bytes(max(0, missing))
        return
    position, data = operation
    if position > len(content):
        # What was not written reads as zeros.
        content.extend(bytes(position - len(content)))
    content[position : position + len(data)] = data


def cuts(data: bytes, randomly: random.Random) -> list[int]:
    """Where to cut ``data``: everywhere, or around what ZODB looks at."""
    if len(data) <= CUT_EVERYWHERE_BYTES:
        return list(range(1, len(data)))
    places = {
        1,
        len(data) - 1,
        *(randomly.randrange(len(data)) for _ in range(RANDOM_CUTS)),
    }
    for boundary in _boundaries(data):
        places |= {boundary - 1, boundary, boundary + 1}
    return sorted(place for place in places if 0 < place < len(data))


def _boundaries(data: bytes) -> Iterator[int]:
    """Where headers, records and tails begin and end, if it begins a transaction."""
    position = 0
    while position + TRANS_HDR_LEN <= len(data):
        _tid, length, status, *texts = unpack_from(TRANS_HDR, data, position)
        if status not in (b" ", b"c") or length < TRANS_HDR_LEN:
            return
        yield from (position, position + 16, position + 17)
        end = position + length
        position += TRANS_HDR_LEN + sum(texts)
        while position < min(end, len(data) - DATA_HDR_LEN):
            yield from (position, position + DATA_HDR_LEN)
            (size,) = unpack_from(">Q", data, position + DATA_HDR_LEN - 8)
            position += DATA_HDR_LEN + (size or 8)
        yield from (end, end + 8)
        position = end + 8


# What must be in an image


class Checker:
    """Opens images in a folder of its own."""

    def __init__(self, folder: Path, sent: dict[bytes, dict[bytes, bytes] | None]):
        """``sent``: what each transaction writes, by its description.

        None: whatever it is, as an undo's.
        """
        self._folder = folder
        self._sent = sent
        self.count = 0

    def check(self, image: Image, *, with_index: bool, also_served: bool) -> None:
        """Raise AssertionError if anything is missing, torn, or too much."""
        self.count += 1
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        path = self._folder / "Data.fs"
        path.write_bytes(image.content)
        if with_index and image.saved_index is not None:
            Path(f"{path}.index").write_bytes(image.saved_index)
        try:
            found = self._opened_by_zodb(path)
            self._compare(image, found)
            if also_served:
                path.write_bytes(image.content)
                self._opened_by_us(path, found)
        except Exception as error:
            raise AssertionError(f"{image.how} ({with_index=}): {error!r}") from error

    def _opened_by_zodb(self, path: Path) -> list[tuple[bytes, dict[bytes, bytes]]]:
        storage = FileStorage(str(path))
        try:
            found, last, tids = [], {}, []
            for each in storage.iterator():
                records = {record.oid: record.data for record in each}
                found.append((each.description, records))
                last.update(dict.fromkeys(records, each.tid))
                tids.append(each.tid)
            assert tids == sorted(set(tids)), "tids do not grow"
            assert len(storage) == len(last), "the index has another length"
            current = dict(pair for _name, records in found for pair in records.items())
            for oid, tid in last.items():
                assert storage.load(oid) == (current[oid], tid), f"{oid.hex()} differs"
            return found
        finally:
            storage.close()

    def _compare(self, image: Image, found: list[tuple[bytes, Any]]) -> None:
        names = [name for name, _records in found]
        missing = image.committed.difference(names)
        assert not missing, f"committed and not there: {missing}"
        too_much = image.refused.intersection(names)
        assert not too_much, f"refused and there: {too_much}"
        assert len(names) == len(set(names)), "something is there twice"
        for name, records in found:
            sent = self._sent[name]
            assert sent is None or sent == records, f"{name!r} is torn: {records}"

    def _opened_by_us(self, path: Path, found: list[Any]) -> None:
        """A FileStore finds the same, and what it appends is found by ZODB."""
        database = FileStore("main", str(path))
        try:
            probe = transaction(store(PROBE, plain("probe")), description=b"probe")
            append(database, [probe])
        finally:
            database.close()
        assert self._opened_by_zodb(path) == [
            *found,
            (b"probe", {PROBE: plain("probe")}),
        ]


def append(database: FileStore, group: Sequence[Any]) -> list[Any]:
    """Vote and finish ``group`` together; the outcomes."""
    prepared = [database.prepare(each) for each in group]
    for each in prepared:
        each.vote({})
    try:
        return database.append(prepared)
    finally:
        for each in prepared:
            each.end()
