"""A pack replaces the file under those who use it, whole or not at all."""

import builtins
import errno
import itertools
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ZODB.FileStorage import FileStorage
from ZODB.FileStorage.FileStorage import FileIterator, FileStorageError
from ZODB.POSException import POSKeyError

from zeolith.storage import packer, packing
from zeolith.storage.filestore import FileStore
from zeolith.storage.pack_progress import PackCancelled, Packing
from zeolith.storage.packing import PackerProcess
from zeolith.storage.tids import MAX_TID

from ..support.gates import Background, Gate
from ..support.ids import number
from .transactions import ROOT, A, B, C, plain, references, store, undo
from .transactions import transaction as transaction_of

SOON_S = 1
# What takes a descriptor.
OPENING = ((builtins, "open"), (os, "open"))


def commit(database: FileStore, *operations: Any) -> bytes:
    database.vote(transaction_of(*operations))
    return database.finish().tid


def fill(database: FileStore) -> bytes:
    """Two revisions of ROOT, which refers to A; B is garbage."""
    first = commit(database, store(ROOT, references(A, B)), store(A, plain("a")))
    commit(database, store(B, plain("garbage" * 100)))
    return commit(database, store(ROOT, references(A), first))


def data_of(database: FileStore, oid: bytes, before: bytes = MAX_TID) -> bytes:
    revision = database.load(oid, before)
    assert revision is not None
    return revision.data


def pack(database: FileStore, **options: Any) -> Any:
    return database.pack(time.time() + SOON_S, **options)


def names(folder: Path) -> set[str]:
    return {
        path.name.removeprefix("Data.fs")
        for path in folder.iterdir()
        if path.suffix not in (".lock", ".tmp")
    }


def records_of(path: Path) -> dict[bytes, bytes]:
    """All current records as plain ZODB has them, with whatever index is there."""
    storage = FileStorage(str(path))
    try:
        found = {oid: storage.load(oid)[0] for oid in storage._index}
        fresh = FileStorage(str(path), read_only=True)
        assert dict(storage._index.items()) == dict(fresh._index.items())
        fresh.close()
        return found
    finally:
        storage.close()


# What it comes to


def test_what_is_old_and_garbage_goes_and_the_old_file_is_kept(database, tmp_path):
    last = fill(database)
    before = database.info()[0]
    packed = pack(database)
    assert packed.has_changed
    assert packed.size_before == before > packed.size_after == database.info()[0]
    assert database.get_tid(ROOT) == last
    with pytest.raises(POSKeyError):
        database.load(B, MAX_TID)
    assert names(tmp_path) == {"", ".zeolith", ".recent", ".index", ".old"}
    assert (tmp_path / "Data.fs.old").stat().st_size == before
    database.close()
    assert set(records_of(tmp_path / "Data.fs")) == {ROOT, A}


def test_the_new_file_is_as_secret_as_the_old_one(database, tmp_path):
    fill(database)
    (tmp_path / "Data.fs").chmod(0o600)
    pack(database)
    assert (tmp_path / "Data.fs").stat().st_mode & 0o777 == 0o600


def test_the_old_file_goes_too_if_it_is_not_wanted(open_store, tmp_path):
    database = open_store(pack_keep_old=False)
    fill(database)
    pack(database)
    assert names(tmp_path) == {"", ".zeolith", ".recent", ".index"}


@pytest.mark.parametrize(
    ("options", "gc", "has_garbage"),
    [
        ({}, None, False),
        ({}, False, True),
        ({"pack_gc": False}, None, True),
        ({"pack_gc": False}, True, False),
    ],
)
def test_garbage_goes_if_it_shall(open_store, options, gc, has_garbage):
    database = open_store(**options)
    fill(database)
    assert pack(database, gc=gc).has_changed
    if has_garbage:
        assert data_of(database, B)
    else:
        with pytest.raises(POSKeyError):
            database.load(B, MAX_TID)


def test_the_last_tid_does_not_go_back_with_the_last_transaction(open_store, tmp_path):
    """Clients compare theirs with it; that of garbage counts like any other."""
    database = open_store()
    fill(database)
    last = commit(database, store(C, plain("nobody refers to it")))
    pack(database)
    assert database.committed(last) is True
    database.close()
    again = open_store()
    assert again.last_changes()[0] == last
    assert [each.tid for each in FileIterator(str(tmp_path / "Data.fs"))][-1] == last
    second = pack(again)
    assert not second.has_changed
    assert data_of(again, ROOT) == references(A)


def test_the_index_that_a_pack_leaves_is_used_at_the_next_start(database, tmp_path):
    fill(database)
    pack(database)
    # As after a crash: nothing is saved at the end.
    copy = tmp_path / "copy"
    copy.mkdir()
    for suffix in ("", ".index"):
        shutil.copy(tmp_path / f"Data.fs{suffix}", copy)
    storage = FileStorage(str(copy / "Data.fs"))
    assert storage._used_index
    assert set(storage._index) == {ROOT, A}
    storage.close()


def test_a_pack_finds_out_that_there_is_nothing_to_do(database, tmp_path):
    assert not pack(database).has_changed
    fill(database)
    assert pack(database).has_changed
    assert not pack(database).has_changed
    assert not database.pack(1_000_000_000.0).has_changed
    assert names(tmp_path) >= {"", ".zeolith", ".recent", ".index"}
    assert not [name for name in names(tmp_path) if ".pack" in name]


def test_a_pack_to_the_day_after_tomorrow_is_refused(database):
    fill(database)
    with pytest.raises(FileStorageError, match="in the future"):
        database.pack(time.time() + 2 * 86400)


def test_a_reference_to_nothing_is_told_by_its_oid(database):
    commit(database, store(ROOT, references(number(77))))
    commit(database, store(A, plain(1)))
    with pytest.raises(FileStorageError, match="0x000000000000004d is referred to"):
        pack(database)
    assert data_of(database, A) == plain(1)
    assert pack(database, gc=False)


def test_what_cannot_be_read_is_not_taken_for_something_without_references(database):
    """As where clients convert records, and the server was not told how."""
    commit(database, store(ROOT, b".h" + references(A).hex().encode()))
    commit(database, store(A, plain(1)))
    before = time.time() + SOON_S
    with pytest.raises(FileStorageError, match="oid 0000000000000000 is no pickle"):
        database.pack(before)
    assert data_of(database, A) == plain(1)
    assert database.pack(before, gc=False)


@pytest.mark.skipif(not packer._MEMORY.exists(), reason="only Linux tells")
def test_a_record_that_asks_for_all_memory_does_not_get_it(database):
    """Five bytes that make the memo of ZODB's unpickler 32 GB large."""
    hostile = references(A)[:-1] + b"r\xff\xff\xff\x7f."
    commit(database, store(ROOT, hostile))
    commit(database, store(A, plain(1)))
    before = time.time() + SOON_S
    with pytest.raises(FileStorageError, match=r"0000000000000000 .* \(MemoryError"):
        database.pack(before)
    assert data_of(database, A) == plain(1)
    assert database.pack(before, gc=False)


# While it goes on


@pytest.fixture
def gate(monkeypatch) -> Iterator[Gate]:
    """Between the packer's first report and what is done with it."""
    gate = Gate()
    catch_up = packing.FilePack._catch_up
    monkeypatch.setattr(packing.FilePack, "_catch_up", gate.before(catch_up))
    gate.shut()
    yield gate
    gate.open()


def test_what_is_committed_meanwhile_is_there_afterwards(database, gate, tmp_path):
    root = fill(database)
    background = Background(pack, database)
    gate.wait_until_reached()
    tid = commit(database, store(A, plain("new"), database.get_tid(A)))
    commit(database, store(ROOT, references(A, C), root), store(C, plain("c")))
    last = commit(database, undo(tid))
    gate.open()
    assert background.result().has_changed
    assert data_of(database, A) == plain("a")
    assert data_of(database, A, last) == plain("new")
    assert next(iter(database.undo_log(None, 9))).tid == last
    after = commit(database, store(B, plain("b")))
    assert database.get_tid(B) == after
    database.close()
    assert records_of(tmp_path / "Data.fs") == {
        ROOT: references(A, C),
        A: plain("a"),
        B: plain("b"),
        C: plain("c"),
    }


@pytest.mark.parametrize("when", ["low", "urgent"])
def test_whatever_is_committed_between_the_rounds_is_copied(
    database, monkeypatch, tmp_path, when
):
    """Every transaction that a round could overlook, before and after the index."""
    monkeypatch.setattr(packing, "CLOSE_BYTES", 0)
    fill(database)
    count = iter(range(1, 1000))
    order = PackerProcess.order

    def order_late(self: PackerProcess, **fields: Any) -> None:
        order(self, **fields)
        held = database._file._commit_lock.locked()
        is_late = fields.get("urgent") or fields.get("save_index")
        if bool(is_late) is (when == "urgent") and not held:
            n = next(count)
            if n < 10:
                commit(database, store(number(100 + n), plain(n)))

    monkeypatch.setattr(PackerProcess, "order", order_late)
    assert pack(database).has_changed
    made = {number(100 + n): plain(n) for n in range(1, min(10, next(count)))}
    assert made
    for oid, data in made.items():
        assert data_of(database, oid) == data
    database.close()
    assert (
        records_of(tmp_path / "Data.fs")
        == {
            ROOT: references(A),
            A: plain("a"),
        }
        | made
    )


def test_an_undo_of_what_is_being_removed_gives_the_pack_up(database, gate):
    """Its data are in a revision that the new file has not got."""
    commit(database, store(ROOT, references(A)))
    first = commit(database, store(A, plain("first")))
    second = commit(database, store(A, plain("second"), first))
    background = Background(pack, database)
    gate.wait_until_reached()
    commit(database, undo(second))
    gate.open()
    assert "undone meanwhile" in str(background.error())
    assert data_of(database, A) == plain("first")
    assert pack(database).has_changed
    assert data_of(database, A) == plain("first")


def test_who_had_the_lock_before_is_copied_without_it(database, monkeypatch):
    """Commits wait for what one of them takes, not for what many took meanwhile."""
    monkeypatch.setattr(packing, "CLOSE_BYTES", 1000)
    fill(database)
    replace, hold = packing.FilePack._replace, packing.FilePack._replace_held
    left: list[int] = []

    def commit_first(self: Any, *args: Any) -> Any:
        commit(database, store(C, plain("x" * 100_000)))
        return replace(self, *args)

    def note(self: Any, process: Any, index: Any) -> Any:
        left.append(index.get(C, 0))
        return hold(self, process, index)

    monkeypatch.setattr(packing.FilePack, "_replace", commit_first)
    monkeypatch.setattr(packing.FilePack, "_replace_held", note)
    assert pack(database).has_changed
    # It was copied, and its place known, before.
    assert left[0] > 0
    assert data_of(database, C) == plain("x" * 100_000)


def test_one_pack_at_a_time(database, gate):
    fill(database)
    background = Background(pack, database)
    gate.wait_until_reached()
    with pytest.raises(FileStorageError, match="another pack is under way"):
        pack(database)
    gate.open()
    assert background.result().has_changed


def test_a_vote_before_the_swap_finishes_before_it(database, gate):
    fill(database)
    background = Background(pack, database)
    gate.wait_until_reached()
    database.vote(transaction_of(store(C, plain("c"))))
    gate.open()
    assert not background.returns_soon()
    assert data_of(database, ROOT) == references(A)
    tid = database.finish().tid
    assert background.result().has_changed
    assert database.get_tid(C) == tid


def test_somebody_can_look_how_far_it_is(database, gate):
    fill(database)
    course = Packing("somebody")
    background = Background(pack, database, packing=course)
    gate.wait_until_reached()
    told = course.describe()
    assert told["who"] == "somebody"
    assert told["bytes_total"] == database.info()[0]
    assert 0 <= told["fraction"] <= 1
    gate.open()
    background.result()


# Given up


def is_as_it_was(database: FileStore, folder: Path) -> bool:
    """Nothing is left of the pack, and the next one succeeds."""
    assert not [name for name in names(folder) if ".pack" in name]
    assert data_of(database, B)
    commit(database, store(number(9), plain(9)))
    assert pack(database).has_changed
    return True


def processes_of(monkeypatch: Any) -> list[Any]:
    """The packers that are started from now on."""
    processes: list[Any] = []
    begins = Packing.begins

    def note(self: Packing, process: PackerProcess) -> None:
        processes.append(process)
        begins(self, process)

    monkeypatch.setattr(Packing, "begins", note)
    return processes


@pytest.mark.parametrize("step", ["_pack", "_catch_up", "_replace"])
def test_a_pack_can_be_given_up_until_the_swap(database, monkeypatch, tmp_path, step):
    fill(database)
    course = Packing()
    call = getattr(packing.FilePack, step)

    def cancel_first(self: Any, *args: Any) -> Any:
        assert course.cancel("we have second thoughts")
        return call(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(packing.FilePack, step, cancel_first)
        with pytest.raises(PackCancelled, match="second thoughts"):
            pack(database, packing=course)
    assert not course.cancel("too late")
    assert is_as_it_was(database, tmp_path)


def test_a_packer_that_is_killed_leaves_everything_as_it_was(
    database, gate, monkeypatch, tmp_path
):
    fill(database)
    processes = processes_of(monkeypatch)
    background = Background(pack, database)
    gate.wait_until_reached()
    os.kill(processes[0]._process.pid, signal.SIGKILL)
    gate.open()
    assert "ended by signal 9" in str(background.error())
    assert is_as_it_was(database, tmp_path)


def test_a_packer_that_does_not_answer_does_not_hold_commits_for_ever(
    database, monkeypatch, tmp_path
):
    fill(database)
    replace = packing.FilePack._replace

    def stop_first(self: Any, process: Any, *others: Any) -> Any:
        os.kill(process._process.pid, signal.SIGSTOP)
        return replace(self, process, *others)

    with monkeypatch.context() as patch:
        patch.setattr(packing.FilePack, "_replace", stop_first)
        patch.setattr(packing, "HOLD_TIMEOUT_S", 0.05)
        with pytest.raises(FileStorageError, match="does not answer"):
            pack(database)
    assert is_as_it_was(database, tmp_path)


def test_a_full_disk_is_told_and_the_database_goes_on(database, monkeypatch, tmp_path):
    """A limit of the packer's file size stands for the disk."""
    root = fill(database)
    large = store(C, plain("x" * 100_000))
    commit(database, large, store(ROOT, references(A, C), root))
    course = Packing()
    begins = Packing.begins

    def limit_first(self: Packing, process: Any) -> None:
        resource = pytest.importorskip("resource")
        limits = (50_000, 50_000)
        resource.prlimit(process._process.pid, resource.RLIMIT_FSIZE, limits)
        begins(self, process)

    with monkeypatch.context() as patch:
        patch.setattr(Packing, "begins", limit_first)
        with pytest.raises(OSError, match="while packing: File too large") as caught:
            pack(database, packing=course)
    assert caught.value.errno == errno.EFBIG
    assert not [name for name in names(tmp_path) if ".pack" in name]
    assert pack(database).has_changed


@pytest.mark.parametrize("left", range(6))
def test_too_few_descriptors_for_the_swap_leave_one_whole_database(
    open_store, monkeypatch, tmp_path, left
):
    """All of them but ``left`` are taken when it begins; a server has many clients."""
    database = open_store()
    fill(database)
    swap = packing.FilePack._swap
    opened = itertools.count()

    def swap_with_few(self: Any, *args: Any) -> Any:
        with monkeypatch.context() as patch:
            for module, name in OPENING:
                patch.setattr(module, name, partial(open_one, getattr(module, name)))
            return swap(self, *args)

    def open_one(really: Any, *args: Any, **options: Any) -> Any:
        if next(opened) >= left:
            raise OSError(errno.EMFILE, "Too many open files")
        return really(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(packing.FilePack, "_swap", swap_with_few)
        with suppress(OSError):
            pack(database)
    commit(database, store(C, plain("c")))
    assert data_of(database, C) == plain("c")
    assert data_of(database, A) == plain("a")
    database.close()
    assert records_of(tmp_path / "Data.fs").keys() >= {ROOT, A, C}


def test_a_packer_without_a_server_ends_by_itself(database, gate, monkeypatch):
    fill(database)
    processes = processes_of(monkeypatch)
    background = Background(pack, database)
    gate.wait_until_reached()
    (process,) = processes
    process._stdin.close()
    assert process._process.wait(30) == 0
    process._stdin = open(os.devnull, "wb")  # noqa: SIM115
    gate.open()
    assert "the packer ended" in str(background.error())


# A crash at every step


class Crash(BaseException):
    """The server dies here; nothing that it would do afterwards happens."""


class Steps:
    """Counts what is done to the files, and dies at a step, before or after it."""

    NAMES = ("replace", "link", "remove", "fsync")

    def __init__(self, monkeypatch: Any, dies_at: int, *, after: bool):
        self.count = 0
        self.dies_at = dies_at
        self.after = after
        self.is_dead = False
        for name in self.NAMES:
            monkeypatch.setattr(os, name, self._step(getattr(os, name)))

    def _step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            if self.is_dead:
                raise Crash
            dies = self.count == self.dies_at
            self.count += 1
            if dies and not self.after:
                self.is_dead = True
                raise Crash
            try:
                return function(*args, **kwargs)
            finally:
                if dies:
                    self.is_dead = True
                    raise Crash

        return step


def make_packed(folder: Path) -> dict[bytes, bytes]:
    """A database that was packed once, with something to pack; what it has."""
    database = FileStore("main", str(folder / "Data.fs"))
    root = fill(database)
    pack(database)
    commit(database, store(ROOT, references(A, C), root), store(C, plain("c")))
    database.close()
    return {ROOT: references(A, C), A: plain("a"), C: plain("c")}


def crash(folder: Path, at: int, *, after: bool, links: bool) -> bool:
    """Pack a database, dying at step ``at``; whether it came so far."""
    database = FileStore("main", str(folder / "Data.fs"))
    with pytest.MonkeyPatch.context() as patch:
        steps = Steps(patch, at, after=after)
        if not links:

            def no_link(*_args: Any) -> None:
                raise OSError(errno.EPERM, "no hard links here")

            patch.setattr(os, "link", no_link)
        with suppress(Crash):
            pack(database)
    # What is on the disk now is what the next start finds.
    copy = folder / "crashed"
    copy.mkdir()
    for path in folder.glob("Data.fs*"):
        if path.suffix not in (".lock", ".tmp"):
            shutil.copy(path, copy)
    if (folder / "Data.fs.old").exists() and (folder / "Data.fs").exists():
        old, new = (copy / name for name in ("Data.fs.old", "Data.fs"))
        if os.path.samefile(folder / "Data.fs", folder / "Data.fs.old"):
            old.unlink()
            os.link(new, old)
    database._file._file.close()
    database.close()
    return steps.is_dead


# What a crash leaves open, only the end of the process would close.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("after", "links"), [(False, True), (True, True), (False, False)]
)
def test_a_server_that_dies_at_any_step_leaves_a_whole_database(tmp_path, after, links):
    (tmp_path / "packed").mkdir()
    whole = make_packed(tmp_path / "packed")
    for at in range(100):
        folder = tmp_path / str(at)
        shutil.copytree(tmp_path / "packed", folder)
        came_so_far = crash(folder, at, after=after, links=links)
        crashed = folder / "crashed"
        if links:
            # Plain ZODB needs no repair; it opens a copy, as the operator might.
            plainly = folder / "plainly"
            shutil.copytree(crashed, plainly)
            assert records_of(plainly / "Data.fs") == whole, at
        started = FileStore("main", str(crashed / "Data.fs"))
        assert {oid: data_of(started, oid) for oid in whole} == whole, at
        left = names(crashed) - {"", ".zeolith", ".recent", ".index", ".old"}
        assert not left, (at, left)
        commit(started, store(B, plain("b")))
        if at % 3 == 0:
            assert pack(started).has_changed, at
        started.close()
        assert records_of(crashed / "Data.fs").keys() - {B} == whole.keys(), at
        if not came_so_far:
            break
    assert at > 8


def test_a_database_between_two_names_gets_its_own_back(tmp_path):
    """As ZODB's own pack, too, may leave it."""
    database = FileStore("main", str(tmp_path / "Data.fs"))
    fill(database)
    database.close()
    (tmp_path / "Data.fs").rename(tmp_path / "Data.fs.old")
    (tmp_path / "Data.fs.pack").write_bytes(b"whole or not")
    again = FileStore("main", str(tmp_path / "Data.fs"))
    assert data_of(again, B)
    again.close()
    assert names(tmp_path) == {"", ".zeolith", ".recent", ".index"}


def test_an_old_file_alone_is_not_taken_for_the_database(tmp_path):
    (tmp_path / "Data.fs.old").write_bytes(b"of last year")
    FileStore("main", str(tmp_path / "Data.fs")).close()
    assert (tmp_path / "Data.fs.old").read_bytes() == b"of last year"


def test_a_file_that_another_server_packs_is_left_alone(database, gate, tmp_path):
    fill(database)
    background = Background(pack, database)
    gate.wait_until_reached()
    with pytest.raises(Exception, match="lock"):
        FileStore("other", str(tmp_path / "Data.fs"))
    gate.open()
    assert background.result().has_changed


def test_a_read_only_start_repairs_nothing(tmp_path):
    database = FileStore("main", str(tmp_path / "Data.fs"))
    fill(database)
    database.close()
    (tmp_path / "Data.fs.pack").write_bytes(b"under way elsewhere")
    FileStore("main", str(tmp_path / "Data.fs"), read_only=True).close()
    assert (tmp_path / "Data.fs.pack").exists()
