"""Files that are used while they are damaged: a Data.fs, and a cache.

A target damages a small file, the same each time, as its bytes say, and uses it as its
owner would. LMDB trusts the pages of its file, so a page that is damaged may end the
process with a signal: ``cache_page`` tries each in a process of its own.
"""

import faulthandler
import os
import shutil
import signal
import tempfile
import traceback
from functools import cache
from pathlib import Path

import lmdb
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.FileStorage.format import CorruptedDataError
from ZODB.POSException import POSError
from ZODB.utils import p64

from zeolith.client.cache_file import CacheFile
from zeolith.client.cache_inspection import DamagedFile, Inspection
from zeolith.storage.filestore import FileStore
from zeolith.storage.tids import MAX_TID

from ..support.cache_files import CACHE_BYTES, revision, written
from .choices import Choices, changed

OBJECTS = 6
# What stands beside a cache that was closed.
CLEAN = b"clean"
# How a child ends: all right, or with an error that is none of those expected.
_RIGHT, _WRONG = 0, 1
# LMDB does not check its pages: these are what the kernel or itself ends it with.
SIGNALS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE}


@cache
def a_data_fs() -> bytes:
    """A Data.fs with a few transactions and objects."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "Data.fs"
        db = DB(FileStorage(str(path)))
        connection = db.open()
        for number in range(OBJECTS):
            connection.root()[f"key {number}"] = type(connection.root())()
            connection.transaction_manager.commit()
        db.close()
        return path.read_bytes()


def data_fs(data: bytes) -> None:
    """A Data.fs with damaged records: it is refused, or the rest of it is served."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "Data.fs"
        shutil.copy(_an_index(), f"{path}.index")
        path.write_bytes(changed(a_data_fs(), Choices(data)))
        try:
            store = FileStore("1", str(path))
        except (POSError, CorruptedDataError, OSError, ValueError):
            # One line for the operator; see storage/opening.py.
            return
        try:
            for oid in range(1 + OBJECTS):
                _load(store, p64(oid))
        finally:
            store.close()


def _load(store: FileStore, oid: bytes) -> None:
    for load in (store.load_nowait, store.load):
        try:
            load(oid, MAX_TID)
        except (POSError, CorruptedDataError, OSError):
            continue


@cache
def _an_index() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="zeolith-fuzz-"))
    path = folder / "Data.fs"
    path.write_bytes(a_data_fs())
    FileStorage(str(path)).close()
    return Path(f"{path}.index")


@cache
def a_cache() -> bytes:
    """A cache with open and ended revisions, small ones and one of several pages."""
    with tempfile.TemporaryDirectory() as folder:
        path = written(
            Path(folder),
            through=20,
            revisions=[
                *(revision(n, 10, None, b"data %d" % n, 20) for n in range(40)),
                revision(50, 5, 15, b"was", 20),
                revision(51, 10, None, b"large" * 3000, 20),
            ],
            changes=[(30, [1, 2])],
        )
        return path.read_bytes()


def _values() -> list[tuple[int, int]]:
    """Where the values of revisions are in the file."""
    whole = a_cache()
    found = []
    for data in (*(b"data %d" % n for n in range(10, 40)), b"large" * 3000):
        at = whole.find(data)
        assert at > 0
        found.append((at - 16, at + len(data)))
    return found


def cache_record(data: bytes) -> None:
    """A cache whose revisions are damaged, not its pages: misses, and told."""
    choices = Choices(data)
    damaged = bytearray(a_cache())
    values = _values()
    while choices:
        start, end = values[choices.number() % len(values)]
        damaged[start + choices.number(2) % (end - start)] = choices.number()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "damaged.cache"
        path.write_bytes(damaged)
        path.with_suffix(".users").write_bytes(CLEAN)
        wrong = use(path)
        assert bool(wrong) == (bytes(damaged) != a_cache()), "damage that is not told"


def cache_page(data: bytes) -> None:
    """A cache with any bytes damaged: nothing comes out of it that was not put in.

    But for a signal, which only LMDB could prevent.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "damaged.cache"
        path.write_bytes(changed(a_cache(), Choices(data)))
        path.with_suffix(".users").write_bytes(CLEAN)
        child = os.fork()
        if not child:
            _use_and_end(path)
        _pid, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        ended_by.append(os.WTERMSIG(status))
        assert os.WTERMSIG(status) in SIGNALS | {signal.SIGALRM}, status
    else:
        ended_by.append(0)
        assert os.WEXITSTATUS(status) == _RIGHT, "see what the child has printed"


# How the children of ``cache_page`` have ended.
ended_by: list[int] = []


def _use_and_end(path: Path) -> None:
    status = _WRONG
    # It is expected here, and would be told as the end of the tests.
    faulthandler.disable()
    for number in SIGNALS:
        # A fuzzer has handlers of its own.
        signal.signal(number, signal.SIG_DFL)
    try:
        # Pages that lead to each other lead nowhere.
        signal.alarm(5)
        use(path)
        status = _RIGHT
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def use(path: Path) -> list[str]:
    """Read all of it, by its owner's way and by the inspector's; what was found."""
    wrong: list[str] = []
    try:
        with Inspection(path) as inspection:
            wrong += inspection.findings()
    except (DamagedFile, lmdb.Error, OSError) as error:
        return [*wrong, str(error)]
    try:
        file = CacheFile(path, CACHE_BYTES)
    except (lmdb.Error, OSError) as error:
        return [*wrong, str(error)]
    try:
        for oid in range(52):
            try:
                _state, tid, _end, found = file.find(p64(oid), p64(2**40))
            except lmdb.Error as error:
                wrong.append(str(error))
                continue
            expected = {b"", b"data %d" % oid, b"was", b"large" * 3000}
            assert found in expected, found
            assert len(tid) == 8
    finally:
        file.close()
    return wrong
