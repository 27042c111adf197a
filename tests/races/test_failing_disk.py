"""A disk that fails at every step of a busy server once: the first, the second, ...

Whatever it does, who commits is told the truth: committed, not committed and why, or
that nobody knows, and then the server says that it writes no more. What was
acknowledged is there after a restart, what was refused is not, and until a disaster
the server goes on. Steps are writes, syncs, truncations and reservations of room, by
the server's Disk and by FileStorage's own file.
"""

import errno
import io
import itertools
import os
import shutil
import sys
from base64 import encodebytes
from collections.abc import Callable
from enum import Enum
from typing import Any

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.POSException import POSKeyError, StorageError, StorageSystemError

from zeolith.client.errors import CommitOutcomeUnknown
from zeolith.client.storage import ClientStorage
from zeolith.storage import appending
from zeolith.storage.disk import Disk

from ..storage.transactions import plain
from ..support.gates import Background
from ..support.inprocess import InProcessServer, client_of, serving
from ..support.records import oid_of

SIZES = (30, 2000, 9000)


class Fault(Enum):
    """What the disk does: an error, a part of a write; at one step or from it on."""

    FULL = "full"
    FULL_ONCE = "full once"
    BROKEN = "broken"
    BROKEN_ONCE = "broken once"
    SHORT = "short"


class FailingDisk(Disk):
    """Counts its steps, and fails at the one that it is told."""

    def __init__(self, fault: Fault, fails_at: int):
        super().__init__()
        self._fault = fault
        self._fails_at = fails_at
        self._count = 0
        self.failures = 0
        # What is on the disk for sure; `put_on` says what it is at first.
        self._synced_bytes = 0

    def has(self, size_bytes: int) -> None:
        self._synced_bytes = size_bytes

    def write(self, fd: int, buffers: Any, position: int) -> int:
        if self._is_short():
            data = b"".join(map(bytes, buffers))
            buffers = [data[: max(1, len(data) // 2)]]
        return super().write(fd, buffers, position)

    def sync(self, fd: int) -> None:
        """A kernel may drop what it could not write, and say so only once."""
        try:
            self.step()
        except OSError:
            os.ftruncate(fd, self._synced_bytes)
            raise
        self._synced_bytes = os.fstat(fd).st_size

    def truncate(self, fd: int, size: int) -> None:
        self.step()
        super().truncate(fd, size)

    def reserve(self, fd: int, position: int, size: int) -> bool:
        self.step()
        return super().reserve(fd, position, size)

    def step(self) -> None:
        """Raises OSError if it is the one, or after it if the fault stays."""
        fault = self._fault
        if fault is Fault.SHORT:
            return
        self._count += 1
        stays = fault in (Fault.FULL, Fault.BROKEN)
        if self._count < self._fails_at:
            return
        if self._count == self._fails_at or stays:
            self.failures += 1
            is_full = fault in (Fault.FULL, Fault.FULL_ONCE)
            number = errno.ENOSPC if is_full else errno.EIO
            raise OSError(number, os.strerror(number))

    def is_repaired(self) -> None:
        self._fails_at = sys.maxsize

    def _is_short(self) -> bool:
        if self._fault is not Fault.SHORT:
            self.step()
            return False
        self._count += 1
        if self._count != self._fails_at:
            return False
        self.failures += 1
        return True


class FileOnDisk(io.FileIO):
    """FileStorage's file on such a disk."""

    disk: FailingDisk

    def write(self, data: Any) -> int:
        self.disk.step()
        return super().write(data)

    def truncate(self, size: int | None = None) -> int:
        self.disk.step()
        return super().truncate(size)


def put_on(disk: FailingDisk, server: InProcessServer, monkeypatch: Any) -> None:
    """From now on the server's file is on ``disk``."""
    file: Any = server.database._file  # type: ignore[attr-defined]
    file.disk = file.room._disk = disk
    raw = FileOnDisk(file._file_name, "r+b")
    raw.disk = disk
    file._file.close()
    disk.has(os.path.getsize(file._file_name))
    file._file = io.BufferedRandom(raw)
    module = sys.modules[FileStorage.__module__]
    monkeypatch.setattr(module, "fsync", disk.sync)


class Attempt:
    """A transaction that writes objects of its own, and what its client was told."""

    def __init__(self, storage: ClientStorage, name: str):
        self.storage = storage
        self.oids = [oid_of(f"{name}{n}") for n in range(len(SIZES))]
        self.metadata = TransactionMetaData()
        # None: nobody knows.
        self.is_committed: bool | None = False
        self.error: BaseException | None = None

    def data(self, n: int) -> bytes:
        return plain(f"{self.oids[n].hex()} {'x' * SIZES[n]}")

    def vote(self) -> "Attempt":
        self.storage.tpc_begin(self.metadata)
        for n, oid in enumerate(self.oids):
            self.storage.store(oid, None, self.data(n), "", self.metadata)
        self._do(self.storage.tpc_vote)
        return self

    def finish(self) -> None:
        if self.error is None:
            tid = self._do(self.storage.tpc_finish)
            if tid is not None:
                self.is_committed, self.tid = True, tid

    def _do(self, step: Callable[[Any], Any]) -> Any:
        try:
            return step(self.metadata)
        except (StorageError, OSError) as error:
            self.error = error
            self.is_committed = (
                None if isinstance(error, CommitOutcomeUnknown) else False
            )
            self.storage.tpc_abort(self.metadata)

    def is_in(self, storage: Any) -> bool:
        """Whether it is there; whole, or not at all."""
        found = []
        for oid in self.oids:
            try:
                found.append(storage.load(oid)[0])
            except POSKeyError:
                continue
        assert found in ([], [self.data(n) for n in range(len(SIZES))]), "it is torn"
        return bool(found)


class Undo(Attempt):
    """The undo of another attempt; it has no objects of its own."""

    def __init__(self, storage: ClientStorage, undone: Attempt):
        super().__init__(storage, "undo")
        self._undone = undone

    def vote(self) -> "Undo":
        self.storage.tpc_begin(self.metadata)
        self.storage.undo(encodebytes(self._undone.tid).rstrip(), self.metadata)
        self._do(self.storage.tpc_vote)
        return self

    def is_in(self, storage: Any) -> bool:
        return not self._undone.is_in(storage)


def busy(storages: list[ClientStorage], name: str) -> list[Attempt]:
    """Commits of all kinds: alone, together, large, and an undo."""
    first, second = storages
    attempts = [Attempt(first, f"{name}a").vote()]
    attempts[0].finish()
    # Voted side by side, finished while the disk is busy.
    together = [
        Attempt(each, f"{name}b{n}") for n, each in enumerate([first, second] * 2)
    ]
    for each in together:
        each.vote()
    for finishing in [Background(each.finish) for each in together]:
        finishing.result()
    attempts += together
    undone = next((each for each in attempts if each.is_committed), None)
    if undone is not None:
        undo = Undo(second, undone).vote()
        undo.finish()
        if undo.is_committed is not False:
            attempts.remove(undone)
        attempts.append(undo)
    attempts.append(Attempt(first, f"{name}c").vote())
    attempts[-1].finish()
    return attempts


def check_told(server: InProcessServer, attempts: list[Attempt], disk: Any) -> bool:
    """Errors say why; returns whether the server has given up writing."""
    is_broken = server.on_loop(lambda: server.served.committer.broken) is not None
    if not disk.failures:
        assert all(each.is_committed for each in attempts), "refused without a cause"
        assert not is_broken
    for each in attempts:
        if each.error is not None:
            assert os.strerror(errno.ENOSPC) in str(each.error) or os.strerror(
                errno.EIO
            ) in str(each.error), repr(each.error)
        if each.is_committed is None:
            assert is_broken, "nobody knows, and the server goes on"
    return is_broken


def check_goes_on(storage: ClientStorage, is_broken: bool) -> Attempt:
    """The next transaction is committed, or refused with the reason."""
    last = Attempt(storage, "last").vote()
    last.finish()
    if is_broken:
        assert isinstance(last.error, StorageSystemError)
        assert "nothing is written any more until a restart" in str(last.error)
        assert storage.server_status()["storages"]["1"]["broken"]
    else:
        assert last.is_committed, repr(last.error)
    return last


def check_contents(storage: Any, attempts: list[Attempt]) -> None:
    for each in attempts:
        if each.is_committed is not None:
            assert each.is_in(storage) is each.is_committed, (each.oids, each.error)
        else:
            each.is_in(storage)


def run_on(disk: FailingDisk, folder: Any, monkeypatch: Any, rounds: int) -> None:
    """Be busy on ``disk``, and compare what clients were told with what is there."""
    path = folder / "Data.fs"
    with monkeypatch.context() as patch:
        # So that a group of several goes in pieces, and one of one does not.
        patch.setattr(appending, "AT_ONCE_BYTES_MAX", 25_000)
        patch.setattr(appending, "PIECE_BYTES", 10_000)
        with serving(path) as server, client_of(server) as first:
            before = Attempt(first, "before").vote()
            before.finish()
            put_on(disk, server, patch)
            with client_of(server) as second:
                attempts = [before]
                for count in range(rounds):
                    attempts += busy([first, second], str(count))
                is_broken = check_told(server, attempts, disk)
                disk.is_repaired()
                attempts.append(check_goes_on(second, is_broken))
                if not is_broken:
                    check_contents(second, attempts)
    copy = folder / "copy"
    copy.mkdir()
    shutil.copy(path, copy)
    plain_storage = FileStorage(str(copy / "Data.fs"))
    check_contents(plain_storage, attempts)
    plain_storage.close()
    with serving(path) as server, client_of(server) as storage:
        check_contents(storage, attempts)
        check_goes_on(storage, False)


def run_at_every_step(
    fault: Fault, tmp_path: Any, monkeypatch: Any, rounds: int
) -> int:
    """Fail at the first step, at the second, ... until nothing fails any more."""
    for fails_at in itertools.count(1):
        folder = tmp_path / str(fails_at)
        folder.mkdir()
        disk = FailingDisk(fault, fails_at)
        try:
            run_on(disk, folder, monkeypatch, rounds)
        except BaseException as error:
            error.add_note(f"{fault} at step {fails_at}")
            raise
        if not disk.failures:
            print(f"{fault}: {fails_at} steps")
            return fails_at
    raise AssertionError


@pytest.mark.parametrize("fault", Fault)
def test_a_disk_that_fails_at_any_step_loses_nothing(tmp_path, monkeypatch, fault):
    assert run_at_every_step(fault, tmp_path, monkeypatch, rounds=1) > 5


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", Fault)
def test_a_disk_that_fails_later_loses_nothing(tmp_path, monkeypatch, fault):
    assert run_at_every_step(fault, tmp_path, monkeypatch, rounds=6) > 30
