"""A cache file as LMDB has it: opened, with its named databases.

Used by CacheFile when it opens its file, in whichever thread opens a storage; the place
is locked. What is in the databases is said in cache_file.

To get a database that can be written to is itself to write, LMDB has it, so it waits
for whoever writes now. He may have been stopped for ever: it is tried in a thread of
its own, and given up after ``OPEN_WAIT_S``.
"""

import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import lmdb

from zeolith.client.cache_place import FILE_MODE

FORMAT = b"2"
# Reserved in the address space, not on the disk: no process meets a file that is larger
# than what it has mapped.
MAP_BYTES_MIN = 16 * 1024**3
READERS_MAX = 2000
# Who writes needs some milliseconds.
OPEN_WAIT_S = 2.0
# In the order of Databases.
NAMES = ("current", "ended", "order", "recent", "changes", "meta")


class Databases(NamedTuple):
    """LMDB's handles of what is in a file."""

    current: Any
    ended: Any
    order: Any
    recent: Any
    changes: Any
    meta: Any


def opened(path: Path, cache_bytes: int) -> tuple[lmdb.Environment, Databases]:
    """The environment ``path``, made if it is not there, to read and to write.

    Raises lmdb.Error if it is none of this version, and TimeoutError, an OSError, if
    another process writes to it and does not come to an end.
    """
    env = lmdb.open(
        str(path),
        map_size=max(MAP_BYTES_MIN, 4 * cache_bytes),
        subdir=False,
        mode=FILE_MODE,
        max_dbs=len(NAMES),
        max_readers=READERS_MAX,
        max_spare_txns=16,
        readahead=False,
        sync=False,
        metasync=False,
    )
    found: Future[Databases] = Future()
    threading.Thread(
        target=_find, args=(env, found), name="zeolith-cache-opening", daemon=True
    ).start()
    try:
        return env, found.result(OPEN_WAIT_S)
    except TimeoutError:
        if not found.cancel():
            # It has come to an end just now.
            return env, found.result()
        raise TimeoutError(
            f"another process has been writing to {path} for {OPEN_WAIT_S:g} s; if it"
            " was stopped, let it go on, or end it"
        ) from None


def _find(env: lmdb.Environment, found: "Future[Databases]") -> None:
    """Answer ``found``, and close ``env`` if there is nobody or nothing to answer."""
    try:
        env.reader_check()
        with env.begin(write=True) as txn:
            dbs = Databases(*(env.open_db(name.encode(), txn) for name in NAMES))
            if txn.get(b"format", FORMAT, dbs.meta) != FORMAT:
                raise lmdb.VersionMismatchError("it is of another version")
            txn.put(b"format", FORMAT, db=dbs.meta)
    except BaseException as error:  # noqa: BLE001 - it is raised by who waits
        env.close()
        if found.set_running_or_notify_cancel():
            found.set_exception(error)
        return
    if found.set_running_or_notify_cancel():
        found.set_result(dbs)
    else:
        env.close()
