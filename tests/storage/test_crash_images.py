"""Whatever a crash leaves of the writes of a busy run, ZODB finds what was committed.

The run is recorded below Python, and cut at every boundary and inside every write that
was not synced; see support/crash_images for what is an image. Each is opened by plain
ZODB: everything acknowledged is there, nothing is torn, nothing refused is there, and
the index is right. Some are opened by a FileStore, too, and written to.
"""

import errno
import os
import random
from collections.abc import Iterator
from io import DEFAULT_BUFFER_SIZE
from typing import Any

import pytest

from zeolith.storage import appending
from zeolith.storage.filestore import FileStore
from zeolith.storage.tids import following

from ..support.crash_images import (
    Checker,
    Recorder,
    RecordingDisk,
    append,
    images,
)
from ..support.ids import number
from .transactions import plain, store, transaction, undo

OBJECTS = 6
SIZES = (1, 20, 90, 400, 5000)
# More than FileStorage writes at once.
LARGE = 3 * DEFAULT_BUFFER_SIZE
# Every so many images one is opened by a FileStore, too.
SERVED_EVERY = 50


class FailingDisk(RecordingDisk):
    """Fails once, at the next write, as it is told; what it took it has recorded."""

    def __init__(self, recorder: Recorder):
        super().__init__(recorder)
        self.next_error: int | None = None
        self.takes_bytes: int | None = None

    def write(self, fd: int, buffers: Any, position: int) -> int:
        size, self.takes_bytes = self.takes_bytes, None
        error, self.next_error = self.next_error, None
        if size is not None:
            buffers = [b"".join(map(bytes, buffers))[:size]]
        written = super().write(fd, buffers, position)
        if error is not None:
            raise OSError(error, os.strerror(error))
        return written


class BusyRun:
    """Transactions of all kinds, one group after the other."""

    def __init__(self, folder: Any, monkeypatch: Any, seed: int):
        self.random = random.Random(seed)
        self.database = FileStore("main", str(folder / "Data.fs"))
        # By description, what each transaction writes; None: an undo.
        self.sent: dict[bytes, dict[bytes, bytes] | None] = {}
        self._tids: dict[bytes, bytes] = {}
        # Objects that came later.
        self._stored: set[bytes] = set()
        self._monkeypatch = monkeypatch
        self.recorder: Recorder | None = None
        self._commit([self._transaction(range(OBJECTS))])
        self.recorder = Recorder(self.database, monkeypatch)
        self.disk = FailingDisk(self.recorder)
        file: Any = self.database._file
        file.disk = file.room._disk = self.disk
        self.recorder.told(self.sent)

    def group(self, size: int) -> None:
        """Some transactions that share no object, appended together."""
        numbers = self.random.sample(range(OBJECTS), self.random.randint(size, OBJECTS))
        self._commit([self._transaction(numbers[n::size]) for n in range(size)])

    def group_in_pieces(self, size: int) -> None:
        with self._monkeypatch.context() as patch:
            patch.setattr(appending, "AT_ONCE_BYTES_MAX", 100)
            patch.setattr(appending, "PIECE_BYTES", 300)
            self.group(size)

    def group_of_which_the_disk_takes_a_part(self, size: int) -> None:
        self.disk.takes_bytes = self.random.randrange(1, 300)
        self.group(size)

    def group_that_the_disk_refuses(self, size: int) -> None:
        """After it took a part of it, perhaps."""
        self.disk.next_error = errno.ENOSPC
        self.disk.takes_bytes = self.random.choice([None, None, 1, 200, 3000])
        self.group(size)
        self.disk.takes_bytes = None

    def undo(self, *, is_given_up: bool = False) -> None:
        """By FileStorage, of the last transaction."""
        last = max(self._tids, key=lambda name: self._tids[name])
        name = b"%d undoes %s" % (len(self.sent), last)
        self.sent[name] = None
        self.database.vote(transaction(undo(self._tids[last]), description=name))
        if is_given_up:
            self.database.abort()
            self._tell(refused=[name])
        else:
            self._tids[name] = self.database.finish().tid
            self._tell([name])

    def alone(self, size: int) -> None:
        """By FileStorage, a transaction that brings its tid, in several writes."""
        copied = self._transaction(self.random.sample(range(OBJECTS), size))
        oid, data = number(OBJECTS), plain("y" * LARGE)
        self.sent[copied.description][oid] = data  # type: ignore[index]
        serial = self.database.get_tid(oid) if oid in self._stored else bytes(8)
        self._stored.add(oid)
        copied.operations.append(store(oid, data, serial))
        copied.tid = following(self.database._file.lastTransaction())
        self.database.vote(copied)
        self._tids[copied.description] = self.database.finish().tid
        self._tell([copied.description])

    def save_index(self) -> None:
        assert self.recorder is not None
        self.database._file._save_index()
        self.recorder.index_was_saved()

    def _transaction(self, numbers: Any) -> Any:
        name = b"%d" % len(self.sent)
        records = {
            number(each): plain("x" * self.random.choice(SIZES)) for each in numbers
        }
        self.sent[name] = records
        database = self.database
        return transaction(
            *(
                store(oid, data, database.get_tid(oid) if self._tids else bytes(8))
                for oid, data in records.items()
            ),
            description=name,
        )

    def _commit(self, group: list[Any]) -> None:
        outcomes = append(self.database, group)
        committed, refused = [], []
        for each, outcome in zip(group, outcomes, strict=True):
            if isinstance(outcome, Exception):
                refused.append(each.description)
            else:
                committed.append(each.description)
                self._tids[each.description] = outcome.tid
        self._tell(committed, refused)

    def _tell(self, committed: Any = (), refused: Any = ()) -> None:
        if self.recorder is not None:
            self.recorder.told(committed, refused)


GROUPS = ("group", "group_of_which_the_disk_takes_a_part", "group_in_pieces")
REFUSED = "group_that_the_disk_refuses"


def go(run: BusyRun, steps: int, *, with_undo: bool) -> None:
    """The first steps are the same for all: every kind once."""
    for name in (*GROUPS, REFUSED, *GROUPS[:1], REFUSED, *GROUPS):
        getattr(run, name)(run.random.choice([1, 2, 3]))
    for _ in range(steps):
        chance = run.random.random()
        if with_undo and chance < 0.3:
            run.undo(is_given_up=chance < 0.1)
        elif chance < 0.1 or (with_undo and chance < 0.4):
            run.save_index()
        else:
            name = run.random.choice((*GROUPS, REFUSED))
            getattr(run, name)(run.random.choice([1, 2, 3, 6]))


@pytest.fixture
def run(tmp_path, monkeypatch, request) -> Iterator[BusyRun]:
    run = BusyRun(tmp_path, monkeypatch, request.param)
    yield run
    run.database.close()


def check_all(run: BusyRun, folder: Any, *, reordered: bool, sample: int = 1) -> int:
    """Check every ``sample``-th image; how many were checked."""
    assert run.recorder is not None
    checker = Checker(folder / "image", run.sent)
    for count, image in enumerate(images(run.recorder, reordered=reordered)):
        if count % sample == 0:
            checker.check(
                image,
                with_index=bool(count // sample % 2),
                also_served=count // sample % SERVED_EVERY == 0,
            )
    print(f"{checker.count} images")
    return checker.count


@pytest.mark.parametrize("run", [1], indirect=True)
@pytest.mark.parametrize(
    ("reordered", "sample"), [(False, 5), (True, 3)], ids=["in order", "reordered"]
)
def test_a_crash_leaves_every_acknowledged_transaction_whole(
    run, tmp_path, reordered, sample
):
    """A sample of the images."""
    go(run, 4, with_undo=False)
    run.alone(2)
    run.group(2)
    run.alone(1)
    assert check_all(run, tmp_path, reordered=reordered, sample=sample) > 50


@pytest.mark.parametrize("run", [1], indirect=True)
def test_a_crash_around_an_undo_leaves_every_acknowledged_transaction(run, tmp_path):
    """FileStorage writes it, in places that were written before."""
    run.group(2)
    run.save_index()
    run.undo()
    run.undo(is_given_up=True)
    run.group(2)
    run.undo()
    assert check_all(run, tmp_path, reordered=False, sample=4) > 50


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("run", range(2, 8), indirect=True)
def test_a_crash_in_a_longer_run_loses_nothing(run, tmp_path):
    """Every image, in order, with undos in between."""
    go(run, 40, with_undo=True)
    assert check_all(run, tmp_path, reordered=False) > 1000


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("run", range(2, 8), indirect=True)
def test_a_crash_of_a_disk_that_reorders_loses_nothing(run, tmp_path):
    """Every image, in any order."""
    go(run, 40, with_undo=False)
    for _ in range(10):
        run.alone(2)
        run.group(2)
    assert check_all(run, tmp_path, reordered=True) > 500
