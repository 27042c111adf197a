"""Several processes' views of one cache, and the history that judges what they read.

A `World` has servers, whose commits form a tree: a server that is restored, or another
one with a copy of the data, goes on from an earlier commit. A tid names a commit and
with it all that came before, so a view's history is known by its position.

A view is a `DiskCache` of its own. Nothing happens by itself: its writer thread is
replaced, and every step (a change that arrives, an answer on its way, a flush, a crash)
is a method of `World`, to be called in any order, or in the middle of another one
(`amid`). After any of it, what a view reads must be what its history says (`check`).
Used by tests/client/test_disk_cache_views.py.
"""

import copy
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import lmdb
import pytest
from ZODB.utils import p64, u64

from zeolith.client import cache_file, cache_files, cache_place, disk_cache
from zeolith.client.cache_file import CacheFile, Foreign
from zeolith.client.cache_place import CachePlace
from zeolith.client.changes import Change
from zeolith.client.disk_cache import DiskCache
from zeolith.client.tids import MAX_TID, Z64, following

from .cache_files import damaging

SHOP = b"s" * 16
OIDS = [p64(number) for number in (7, 8, 9)]
KB = 1024
# Far above what a small test keeps: nothing is evicted before a test says so.
CACHE_BYTES = 1024 * KB
# Tids of what is committed after another restore lie between those that were lost.
BRANCHES = 64
# These happen alone: in a process that has begun, or with the place locked.
_WHOLE = ("_open", "_begin", "__init__", "reset")
_TRACED = tuple(
    f"client/{name}.py" for name in ("disk_cache", "cache_file", "cache_backlog")
)


class WriterByHand:
    """In the place of a writer thread: it writes when a test says so.

    What is asked for while it writes is done later; who waits for it gives up at once.
    """

    def __init__(self, flush: Callable[[], bool]):
        self._flush = flush
        self._is_busy = False
        self._jobs: list[Callable[[], Any]] = []

    def due(self, is_urgent: bool = True) -> None:
        pass

    def have_done(self, job: Callable[[], Any]) -> Any:
        if self._is_busy:
            self._jobs.append(job)
            raise TimeoutError("it writes")
        return job()

    def flush(self) -> None:
        if self._is_busy:
            return
        self._is_busy = True
        try:
            self._flush()
            while self._jobs:
                with suppress(Foreign, lmdb.Error):
                    self._jobs.pop(0)()
        finally:
            self._is_busy = False

    def close(self) -> bool:
        self.flush()
        return True


class Commit(NamedTuple):
    """A transaction in the tree of all that was ever committed."""

    tid: bytes
    parent: bytes
    records: dict[bytes, bytes]


class Answer(NamedTuple):
    """What a server has answered, and when it was asked."""

    oid: bytes
    tid: bytes
    end: bytes | None
    data: bytes
    as_of: bytes
    history: int


class View:
    """One process."""

    def __init__(self, cache: DiskCache):
        self.cache = cache
        # The server it is connected to.
        self.server: int | None = None
        self.answers: list[Answer] = []
        # While it asks which of its revisions are current.
        self.listed: list[tuple[bytes, bytes]] | None = None
        # Its position's lock is held.
        self.is_moving = False

    @property
    def position(self) -> bytes:
        return self.cache.valid_through


Method = Callable[..., None]


def moves(method: Method) -> Method:
    """A step that holds the lock of the view's position: one at a time."""

    @functools.wraps(method)
    def move(world: "World", view: View, *args: Any, **options: Any) -> None:
        if view.is_moving:
            return
        view.is_moving = True
        try:
            method(world, view, *args, **options)
        finally:
            view.is_moving = False

    return move


class World:
    """Servers, and the views of one cache directory."""

    # How often the machine was started.
    boots = 1

    def __init__(self, directory: Path, views: int = 3):
        self._directory = directory
        self.commits: dict[bytes, Commit] = {Z64: Commit(Z64, Z64, {})}
        self.heads = [Z64, Z64]
        self._branches = 0
        self._branch_of = [0, 0]
        self.hits = 0
        self._is_amid = False
        self.views: list[View] = []
        self.commit(0, OIDS)
        self.heads[1] = self.heads[0]
        for _ in range(views):
            self.views.append(self._new_view())

    def close(self) -> None:
        for view in self.views:
            self._kill(view)

    # The servers

    def commit(self, server: int, oids: Iterable[bytes]) -> bytes:
        """A transaction that writes ``oids``; returns its tid."""
        head = self.heads[server]
        step = u64(head) // BRANCHES + 1
        branch = self._branch_of[server]
        tid = p64(step * BRANCHES + branch)
        while tid in self.commits or tid <= head:
            step += 1
            tid = p64(step * BRANCHES + branch)
        records = {oid: b"%s of %d" % (oid.hex().encode(), u64(tid)) for oid in oids}
        self.commits[tid] = Commit(tid, head, records)
        self.heads[server] = tid
        return tid

    def restore(self, server: int, back: int) -> None:
        """Go on from an earlier commit; whoever was connected has lost it."""
        head = self.heads[server]
        for _ in range(back):
            if self.commits[head].parent != Z64:
                head = self.commits[head].parent
        self._branches = (self._branches + 1) % BRANCHES
        self._branch_of[server] = self._branches
        self.heads[server] = head
        for view in self.views:
            if view.server == server:
                view.server = None

    def chain(self, tid: bytes) -> list[Commit]:
        """All that leads to ``tid``, the latest first."""
        found = []
        while tid != Z64:
            found.append(self.commits[tid])
            tid = self.commits[tid].parent
        return found

    def is_known(self, tid: bytes, server: int) -> bool:
        return any(tid == commit.tid for commit in self.chain(self.heads[server]))

    def changes(self, server: int, after: bytes) -> list[Change] | None:
        """What a server tells of the time after ``after``; None if it cannot."""
        if not self.is_known(after, server):
            return None
        found = []
        for tid, parent, records in self.chain(self.heads[server]):
            if tid == after:
                break
            found.append(Change(parent, tid, list(records), None))
        return found[::-1]

    def revision(
        self, oid: bytes, before: bytes, at: bytes
    ) -> tuple[bytes, bytes, bytes | None] | None:
        """What is right for ``before`` in the history that leads to ``at``."""
        end = None
        for tid, _parent, records in self.chain(at):
            if oid in records:
                if tid < before:
                    return records[oid], tid, end
                end = tid
        return None

    # The views

    def _new_view(self) -> View:
        view = View.__new__(View)
        cache = DiskCache(
            CachePlace(self._directory), "1", CACHE_BYTES, self._ask_for(view)
        )
        view.__init__(cache)  # type: ignore[misc]
        return view

    def _ask_for(self, view: View) -> Callable[[bytes], list[Change] | None]:
        def ask(after: bytes) -> list[Change] | None:
            if view.server is None:
                raise ConnectionError("there is no server")
            return self.changes(view.server, after)

        return ask

    @moves
    def connect(self, view: View, server: int, *, is_replayed: bool = True) -> None:
        """A new session: the changes since the view's position, or what can be had."""
        cache = view.cache
        cache.identify(SHOP, 1)
        # Who loads meanwhile has no session: it is used when it is adopted.
        view.server = None
        view.listed = None
        at = view.position
        head, branch = self.heads[server], self._branch_of[server]
        if at == Z64:
            cache.forget_all(head)
        elif not self.is_known(at, server):
            for tid in cache.known_tids():
                if tid != Z64 and self.is_known(tid, server):
                    cache.cut_back(tid)
                    break
            else:
                cache.forget_all(head)
        elif not is_replayed:
            cache.forget_all(head)
        if self._branch_of[server] == branch:
            # Else it was restored meanwhile, and the session is lost.
            view.server = server

    def disconnect(self, view: View) -> None:
        view.server = None
        view.listed = None

    @moves
    def advance(self, view: View, count: int = 1) -> None:
        """The next changes arrive."""
        if view.server is None or view.listed is not None:
            return
        changes = (self.changes(view.server, view.position) or [])[:count]
        if changes:
            view.cache.apply(changes)

    def ask(self, view: View, oid: bytes, back: int) -> None:
        """Load something for a snapshot; the answer is on its way now."""
        if view.server is None:
            return
        head = self.heads[view.server]
        before = following(view.position)
        if back < 0:
            # Whatever is current at the server.
            before = MAX_TID
        for commit in self.chain(view.position)[:back]:
            before = commit.tid
        found = self.revision(oid, before, head)
        if found is not None:
            data, tid, end = found
            answer = Answer(oid, tid, end, data, head, view.cache.history)
            view.answers.append(answer)

    def deliver(self, view: View, which: int) -> None:
        """An answer reaches the cache, however late."""
        if view.answers:
            oid, tid, end, data, as_of, history = view.answers.pop(
                which % len(view.answers)
            )
            view.cache.store(oid, tid, end, data, as_of, history)

    def load(self, view: View, oid: bytes) -> None:
        """A load whose answer comes at once."""
        self.ask(view, oid, 0)
        self.deliver(view, -1)

    def write(self, view: View, oids: Iterable[bytes]) -> None:
        """A transaction of the view's own."""
        if view.server is None or view.listed is not None:
            return
        history = view.cache.history
        tid = self.commit(view.server, oids)
        self.advance(view, len(self.commits))
        if view.position >= tid:
            view.cache.store_committed(tid, self.commits[tid].records, history)

    def flush(self, view: View) -> None:
        view.cache._writer.flush()  # type: ignore[attr-defined]

    def fail_to_write(self, view: View) -> None:
        """A flush while the disk is full."""

        def fail(*_args: Any) -> None:
            raise lmdb.DiskError("for a test")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CacheFile, "_put_state", fail)
            self.flush(view)

    def damage(self, view: View, oid: bytes, place: int) -> None:
        """A byte of an open revision is not what was written."""
        file: Any = view.cache._file
        if file is None:
            return
        with file._write() as txn:
            value = bytearray(txn.get(oid, b"", file._current))
            if value:
                value[place] ^= 1
                txn.put(oid, bytes(value), db=file._current)

    def reboot(self) -> None:
        """The machine stops, and some of what was written was not on the disk yet.

        The file says where it stands, and of objects that have changed it has what was
        before.
        """
        file: Any = next((each.cache._file for each in self.views), None)
        if self._is_amid or file is None:
            return
        file._presence.leave = lambda _sync: file._presence.abandon()
        for view in self.views:
            self._kill(view)
        with damaging(file.path) as (txn, dbs), txn.cursor(dbs["ended"]) as cursor:
            for key, value in cursor:
                txn.put(key[:8], value, db=dbs["current"])
        World.boots += 1
        self.views = [self._new_view() for _ in self.views]

    def forget(self, view: View, oid: bytes) -> None:
        """What it has of an object turned out to be of no use."""
        view.cache.forget(oid)
        if not self._is_amid:
            assert view.cache.load(oid, following(view.position)) is None

    def go_aside(self, view: View) -> None:
        """For whatever reason: it comes back when it connects again."""
        view.cache._go_aside("for a test")

    def evict(self, view: View, count: int) -> None:
        """Make room, for whatever reason."""
        file: Any = view.cache._file
        if file is None:
            return
        with file._write() as txn, txn.cursor(file._order) as cursor:
            for _ in range(count):
                if not cursor.first() or cursor.key() == _last(txn, file):
                    return
                where = cursor.value()
                cursor.delete()
                file._drop_one(txn, where[:8], where[8:])

    def begin_verification(self, view: View) -> None:
        """The server has forgotten what changed: the view lists what it has."""
        if view.server is not None and self.is_known(view.position, view.server):
            view.listed = [
                pair for batch in view.cache.open_revisions() for pair in batch
            ]

    @moves
    def end_verification(self, view: View) -> None:
        """The server has said what is current."""
        listed, view.listed = view.listed, None
        if view.server is None or listed is None:
            return
        head = self.heads[view.server]
        stale = set()
        for oid, tid in listed:
            found = self.revision(oid, MAX_TID, head)
            if found is None or found[1] != tid:
                stale.add(oid)
        view.cache.verified(head, stale)

    @moves
    def forget_all(self, view: View) -> None:
        """The server cannot tell what changed, and nothing is verified."""
        if view.server is not None:
            view.listed = None
            view.cache.forget_all(self.heads[view.server])

    def reopen(self, view: View, *, is_killed: bool) -> None:
        """The process ends, and another one begins."""
        if view not in self.views:
            return
        if is_killed:
            self._kill(view)
        else:
            view.cache.close()
        new = self._new_view()
        if view in self.views:
            self.views[self.views.index(view)] = new
        else:
            # It has ended otherwise meanwhile.
            self._kill(new)

    @moves
    def fork(self, view: View, other: View) -> None:
        """``other`` ends; in its place there is a child of ``view``."""
        if view is other or not {view, other} <= set(self.views):
            return
        place = self.views.index(other)
        self._kill(other)
        child = View(copy.copy(view.cache))
        child.cache._ask = self._ask_for(child)
        child.cache.reset(view.position)
        if self.views[place] is not other:
            self._kill(self.views[place])
        self.views[place] = child

    def _kill(self, view: View) -> None:
        view.cache._let_go()

    # What they read

    def check(self, view: View, oid: bytes, before: bytes) -> None:
        """Raise AssertionError if the view reads what is not in its history."""
        self._judge(oid, before, view.cache.load(oid, before), view.position)

    def check_all(self, view: View) -> None:
        """Check all snapshots of the view's history, from now on backwards."""
        befores = [following(view.position)]
        befores += [commit.tid for commit in self.chain(view.position)[:4]]
        for oid in OIDS:
            for before in befores:
                self.check(view, oid, before)
            found = view.cache.load(oid, MAX_TID)
            assert found is None, "nobody knows what is not there yet"

    def load_amid(
        self, view: View, oid: bytes, line: int, steps: Iterable[Callable[[], Any]]
    ) -> None:
        """Load ``oid`` while ``steps`` happen, as if in another thread.

        If the view goes elsewhere meanwhile it may see what is right there.
        """
        places = [view.position]

        def do_all() -> None:
            for step in steps:
                step()
                places.append(view.position)

        before = following(view.position)
        with self.amid(view, line, do_all):
            found = view.cache.load(oid, before)
        self._judge(oid, before, found, *places)

    @contextmanager
    def amid(self, view: View, line: int, step: Callable[[], Any]) -> Iterator[None]:
        """Do ``step`` in the middle of what is done: at the ``line``-th line of it."""
        cache = view.cache
        seen = 0

        def trace(frame: FrameType, event: str, _arg: Any) -> Any:
            nonlocal seen
            if event == "call":
                code = frame.f_code
                is_ours = code.co_filename.endswith(_TRACED)
                return trace if is_ours and code.co_name not in _WHOLE else None
            if event == "line":
                seen += 1
                file: Any = cache._file
                is_free = not (
                    any(each.cache._lock.locked() for each in self.views)
                    or cache_files._open.lock.locked()
                    or (file is not None and file._writing.locked())
                )
                if seen > line and is_free:
                    seen = -(10**9)
                    sys.settrace(None)
                    step()
            return trace

        before = sys.gettrace()
        self._is_amid = True
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(before)
            self._is_amid = False

    def _judge(self, oid: bytes, before: bytes, found: Any, *places: bytes) -> None:
        if found is None:
            return
        self.hits += 1
        assert any(self._is_right(oid, before, found, at) for at in places), (
            f"{u64(oid)} before {u64(before)} is {found} at {list(map(u64, places))},"
            f" not {self.revision(oid, before, places[0])}"
        )

    def _is_right(self, oid: bytes, before: bytes, found: Any, at: bytes) -> bool:
        wanted = self.revision(oid, before, at)
        if wanted is None or wanted[:2] != found[:2]:
            return False
        # It may know of an end that lies ahead.
        return wanted[2] == found[2] or (wanted[2] is None and found[2] > at)


def _last(txn: Any, file: Any) -> bytes:
    with txn.cursor(file._order) as cursor:
        cursor.last()
        return bytes(cursor.key())


@contextmanager
def by_hand() -> Iterator[pytest.MonkeyPatch]:
    """Within it the writers of all new caches write when a test says so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_cache, "Writer", WriterByHand)
        # Hundreds of files are made, and none of them is to last.
        patch.setattr("zeolith.client.cache_place.os.fsync", lambda fd: None)
        patch.setattr(cache_place, "boot_id", lambda: b"boot %d" % World.boots)
        # What is forgotten by and by is forgotten soon.
        patch.setattr(cache_file, "RECENT_OIDS_MAX", 3)
        patch.setattr(cache_file, "CHANGES_MAX", 12)
        patch.setattr(cache_file, "REVISIONS_MAX", 3)
        patch.setattr(cache_file, "BATCH_MAX", 2)
        yield patch
