"""What is in a cache file, and whether it is right, for ``zeolith cache``.

A file is only read, in one snapshot, also while processes use it: nothing is dropped
or repaired, as those do who open it to use it. While a snapshot is read, the pages that
it has are not used again, so the file may grow a little. ``findings`` are in the words
of client/cache_file.py. Called by one thread.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import lmdb

from zeolith.client.cache_counts import LoadCounts, stored_loads
from zeolith.client.cache_environment import FORMAT, MAP_BYTES_MIN, NAMES
from zeolith.client.cache_file import State
from zeolith.client.cache_values import DATA, TID, is_whole

_HEADER_BYTES = 12


class DamagedFile(Exception):
    """Nothing of the file can be read; the text says why."""


class Kept(NamedTuple):
    """A revision in the file."""

    oid: bytes
    tid: bytes
    # None if it is open.
    end: bytes | None
    data: bytes
    is_whole: bool


class Inspection:
    """One snapshot of one file."""

    def __init__(self, path: Path):
        """Raises DamagedFile; OSError if the file cannot be read."""
        if not path.stat().st_size:
            raise DamagedFile("it is empty")
        try:
            self._env = lmdb.open(
                str(path),
                subdir=False,
                readonly=True,
                create=False,
                max_dbs=len(NAMES),
                map_size=max(MAP_BYTES_MIN, 4 * path.stat().st_size),
                readahead=False,
            )
        except lmdb.Error as error:
            raise DamagedFile(str(error)) from error
        try:
            self._begin(path)
        except BaseException:
            self._env.close()
            raise

    def _begin(self, path: Path) -> None:
        env = self._env
        self._page_bytes = int(env.stat()["psize"])
        pages = int(env.info()["last_pgno"]) + 1
        # Afterwards, for it may grow. To read what is not there would be a signal.
        if path.stat().st_size < pages * self._page_bytes:
            raise DamagedFile("its end is missing")
        try:
            dbs = {name: env.open_db(name.encode(), create=False) for name in NAMES}
            self._txn = env.begin()
        except lmdb.Error as error:
            raise DamagedFile(f"it is no cache file: {error}") from error
        self._dbs: dict[str, Any] = dbs
        found = self._txn.get(b"format", db=dbs["meta"])
        if found != FORMAT:
            raise DamagedFile("it is of another version of zeolith")
        stored = self._txn.get(b"state", db=dbs["meta"])
        if stored is not None and len(stored) != 24:
            raise DamagedFile("its state is damaged")
        # None: nothing was ever kept.
        self.state: State | None = None if stored is None else State.parse(stored)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._txn.abort()
        self._env.close()

    @property
    def used_bytes(self) -> int:
        """The pages that hold something, in bytes."""
        pages = 0
        for db in self._dbs.values():
            stat = self._txn.stat(db)
            pages += stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
        return int(pages * self._page_bytes)

    def pids(self) -> list[int]:
        """Of other processes that read the file, or did and still have it open."""
        lines = self._env.readers().splitlines()[1:]
        found = {int(line.split()[0]) for line in lines if line.split()}
        return sorted(pid for pid in found - {os.getpid()} if _is_alive(pid))

    def loads(self) -> LoadCounts:
        """Of all processes, since the file was made, as far as they have told."""
        return stored_loads(self._txn, self._dbs["meta"])

    def count(self, name: str) -> int:
        """How many entries ``name`` ("current", "ended", ...) has."""
        return int(self._txn.stat(self._dbs[name])["entries"])

    def current(self) -> Iterator[Kept]:
        """The open revisions, by oid; what has no form of one is left out."""
        for key, value in self._items("current"):
            if len(key) == 8 and len(value) >= _HEADER_BYTES:
                yield _kept(key, None, value)

    def ended(self) -> Iterator[Kept]:
        """The others, by oid and end."""
        for key, value in self._items("ended"):
            if len(key) == 16 and len(value) >= _HEADER_BYTES:
                yield _kept(key[:8], key[8:], value)

    def findings(self) -> Iterator[str]:
        """A line for everything that is not as it must be."""
        try:
            yield from self._misshapen()
            yield from self._wrong_changes()
            yield from self._wrong_revisions()
        except lmdb.Error as error:
            yield f"the rest cannot be read: {error}"

    def _items(self, name: str) -> Iterator[tuple[bytes, bytes]]:
        with self._txn.cursor(self._dbs[name]) as cursor:
            yield from cursor

    def _misshapen(self) -> Iterator[str]:
        shapes = {
            "current": (8, range(_HEADER_BYTES + 1, 2**32)),
            "ended": (16, range(_HEADER_BYTES + 1, 2**32)),
            "order": (8, range(16, 17)),
            "recent": (8, range(8, 9)),
            "changes": (8, range(1)),
        }
        for name, (key_bytes, value_bytes) in shapes.items():
            for key, value in self._items(name):
                if len(key) != key_bytes or len(value) not in value_bytes:
                    yield f"{name}: the entry {key.hex()} has no form of one"

    def _wrong_changes(self) -> Iterator[str]:
        state = self.state
        if state is None:
            for name in NAMES[:-1]:
                if self.count(name):
                    yield f"{name}: there is something, but no state of the file"
            return
        through = state.through
        if state.since > through:
            yield f"since {state.since.hex()} is after through {through.hex()}"
        for oid, tid in self._items("recent"):
            if tid > through:
                yield f"recent: {oid.hex()} has changed at {tid.hex()}, after through"
        last = b""
        for last, _nothing in self._items("changes"):
            if last > through:
                yield f"changes: {last.hex()} is after through"
        if last < through:
            yield f"changes: through, {through.hex()}, is not there"

    def _wrong_revisions(self) -> Iterator[str]:
        in_line = {value for _number, value in self._items("order")}
        current = {kept.oid: kept.tid for kept in self.current()}
        for kept in self.current():
            yield from self._wrong(kept, in_line)
            yield from self._overlooked_change(kept)
        before = None
        for kept in self.ended():
            yield from self._wrong(kept, in_line)
            end = kept.end or b""
            if end <= kept.tid:
                yield f"{_name(kept)} ended before it began, at {end.hex()}"
            if before and before.oid == kept.oid and (before.end or b"") > kept.tid:
                yield f"{_name(before)} ended at {before.end!r}, after {_name(kept)}"
            yield from self._overlapping(kept, end, current.get(kept.oid))
            before = kept

    def _wrong(self, kept: Kept, in_line: set[bytes]) -> Iterator[str]:
        if not kept.is_whole:
            yield f"{_name(kept)} is damaged"
        if kept.oid + kept.tid not in in_line:
            yield f"{_name(kept)} would never be evicted"

    def _overlooked_change(self, kept: Kept) -> Iterator[str]:
        changed = self._txn.get(kept.oid, db=self._dbs["recent"])
        if changed is not None and changed > kept.tid:
            yield f"{_name(kept)} is open, but was changed at {changed.hex()}"

    def _overlapping(
        self, kept: Kept, end: bytes, current_tid: bytes | None
    ) -> Iterator[str]:
        """What is open is good from its tid to ``through``, or at its tid alone."""
        if current_tid is None or self.state is None:
            return
        known_until = max(current_tid, self.state.through)
        # The same revision, whose end is after ``through``, may be there twice.
        is_same = kept.tid == current_tid and end > self.state.through
        if end > current_tid and kept.tid <= known_until and not is_same:
            yield f"{_name(kept)} overlaps with the open one of {current_tid.hex()}"


def _kept(oid: bytes, end: bytes | None, value: bytes) -> Kept:
    return Kept(oid, value[TID], end, value[DATA], is_whole(oid, value))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _name(kept: Kept) -> str:
    return f"revision {kept.tid.hex()} of object {kept.oid.hex()}"
