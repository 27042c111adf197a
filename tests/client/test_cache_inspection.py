"""What is found in a cache file, and what is found to be wrong with it."""

import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import pytest
from ZODB.utils import p64, u64

from zeolith.client.cache_backlog import Batch, Revision
from zeolith.client.cache_file import CacheFile, State
from zeolith.client.cache_inspection import DamagedFile, Inspection, Kept
from zeolith.client.cache_values import encode
from zeolith.client.changes import Change

from ..support.cache_files import damaging, opened, revision, written

A, B = p64(1), p64(2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A at 10 and 30, B at 20 and, closed by the server's answer, at 5."""
    return written(
        tmp_path,
        through=20,
        revisions=[
            revision(1, 10, None, b"first", 20),
            revision(2, 20, None, b"second", 20),
            revision(2, 5, 12, b"before", 20),
        ],
        changes=[(30, [1, 3])],
    )


def findings(path: Path) -> list[str]:
    with Inspection(path) as file:
        return list(file.findings())


def value(oid: int, tid: int, data: bytes = b"data") -> bytes:
    return encode(p64(oid), p64(tid), data)


def test_what_is_kept_is_told(path):
    with Inspection(path) as file:
        assert list(file.current()) == [Kept(B, p64(20), None, b"second", True)]
        assert list(file.ended()) == [
            Kept(A, p64(10), p64(30), b"first", True),
            Kept(B, p64(5), p64(12), b"before", True),
        ]
        assert (file.count("current"), file.count("ended")) == (1, 2)
        assert file.state is not None
        assert file.state.through == p64(30)
        assert 0 < file.used_bytes <= os.path.getsize(path)
        assert file.pids() == []


def test_nothing_is_wrong_with_what_a_cache_has_written(path):
    assert findings(path) == []


def test_nothing_is_wrong_with_a_file_that_nobody_has_written_to(tmp_path):
    with opened(tmp_path) as file:
        path = file.path
    assert findings(path) == []
    with Inspection(path) as inspection:
        assert inspection.state is None


def test_a_revision_from_after_through_may_overlap_with_nothing(tmp_path):
    """The server was ahead: what it has answered ends and begins later."""
    path = written(
        tmp_path,
        through=20,
        revisions=[
            revision(1, 10, None, b"open", 20),
            revision(1, 10, 40, b"open", 50),
            revision(1, 40, 45, b"later", 50),
            revision(2, 40, None, b"later, too", 50),
        ],
    )
    assert findings(path) == []


def put(name: str, key: bytes, data: bytes) -> Any:
    def damage(txn: Any, dbs: dict[str, Any]) -> None:
        txn.put(key, data, db=dbs[name])

    return damage


def drop(name: str, key: bytes | None = None) -> Any:
    def damage(txn: Any, dbs: dict[str, Any]) -> None:
        if key is None:
            txn.drop(dbs[name], delete=False)
        else:
            assert txn.delete(key, db=dbs[name])

    return damage


DAMAGES = [
    (put("current", b"short", value(1, 1)), "current: the entry .* has no form"),
    (put("current", A, b"short"), "current: the entry .* has no form"),
    (put("ended", A, value(1, 10)), "ended: the entry .* has no form"),
    (put("order", b"short", A + B), "order: the entry .* has no form"),
    (put("recent", A, b"short"), "recent: the entry .* has no form"),
    (put("changes", A, b"something"), "changes: the entry .* has no form"),
    (put("current", B, value(2, 20)[:-1] + b"!"), f"{B.hex()} is damaged"),
    (put("ended", A + p64(30), value(2, 10)), f"{A.hex()} is damaged"),
    (put("recent", A, p64(31)), "recent: .* after through"),
    (put("changes", p64(31), b""), "changes: .* after through"),
    (drop("changes", p64(30)), "changes: through, .* is not there"),
    (put("recent", B, p64(25)), "is open, but was changed at"),
    (put("ended", B + p64(4), value(2, 5)), "ended before it began"),
    (put("ended", B + p64(8), value(2, 3)), "ended at .* after revision"),
    (put("ended", B + p64(22), value(2, 15)), "overlaps with the open one"),
    (put("ended", B + p64(25), value(2, 20)), "overlaps with the open one"),
    (drop("order"), "would never be evicted"),
    (drop("meta", b"state"), "there is something, but no state"),
    (
        put("meta", b"state", p64(1) + p64(30) + p64(31)),
        "since .* is after through",
    ),
]


@pytest.mark.parametrize(("damage", "finding"), DAMAGES, ids=range(len(DAMAGES)))
def test_each_damage_is_found(path, damage, finding):
    with damaging(path) as (txn, dbs):
        damage(txn, dbs)
    found = findings(path)
    assert found
    assert any(re.search(finding, line) for line in found), found


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (put("meta", b"format", b"another"), "of another version"),
        (put("meta", b"state", b"short"), "its state is damaged"),
    ],
)
def test_what_nothing_can_be_told_of(path, damage, complaint):
    with damaging(path) as (txn, dbs):
        damage(txn, dbs)
    with pytest.raises(DamagedFile, match=complaint):
        Inspection(path)


def test_a_file_that_is_cut_short_is_found_out_before_it_is_read(path):
    os.truncate(path, os.path.getsize(path) - 4096)
    with pytest.raises(DamagedFile, match="its end is missing"):
        Inspection(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"", "it is empty"), (b"no database" * 1000, "MDB_INVALID")],
)
def test_a_file_that_is_something_else(tmp_path, content, complaint):
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=complaint):
        Inspection(path)


def test_another_lmdb_database_is_no_cache(tmp_path):
    path = tmp_path / "other"
    with lmdb.open(str(path), subdir=False) as env, env.begin(write=True) as txn:
        txn.put(b"key", b"value")
    with pytest.raises(DamagedFile, match="it is no cache file"):
        Inspection(path)


READING = """
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zeolith.client.cache_file import CacheFile
from zeolith.client.cache_place import CachePlace

file = CacheFile(Path(sys.argv[1]), 1000000)
print(file.state() is not None, flush=True)
sys.stdin.read()
"""


@contextmanager
def reader(path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that has read the file, and has it open."""
    with subprocess.Popen(
        [sys.executable, "-c", READING, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"True\n"
        yield process


def test_a_file_in_use_is_told_and_not_disturbed(path):
    with reader(path) as process:
        before = path.read_bytes()
        with Inspection(path) as file:
            assert file.pids() == [process.pid]
            assert list(file.findings()) == []
        assert path.read_bytes() == before
    with Inspection(path) as file:
        assert file.pids() == []


def test_who_was_killed_uses_nothing(path):
    with reader(path) as process, reader(path) as killed:
        killed.kill()
        killed.wait()
        with Inspection(path) as file:
            assert file.pids() == [process.pid]


class History:
    """Commits of a server, and what it answers."""

    def __init__(self, chance: random.Random):
        self.chance = chance
        self.changes = [(5, list(OIDS))]

    def commit(self) -> None:
        tid = self.changes[-1][0] + self.chance.randrange(1, 4)
        self.changes.append((tid, self.chance.sample(OIDS, 3)))

    def tids(self, oid: int | None = None) -> list[int]:
        return [tid for tid, oids in self.changes if oid is None or oid in oids]

    def told(self, since: int) -> list[Change]:
        """Some of the changes after ``since``."""
        later = [each for each in self.changes if each[0] > since]
        told = []
        for tid, oids in later[: self.chance.randrange(len(later) + 1)]:
            told.append(Change(p64(since), p64(tid), list(map(p64, oids)), None))
            since = tid
        return told

    def answer(self) -> Revision:
        """To a load of some snapshot, as of some tid that need not be the last."""
        # Most answers are not late.
        lately = self.tids()[-self.chance.choice([1, 3, 100]) :]
        oid, as_of = self.chance.choice(OIDS), self.chance.choice(lately)
        before = self.chance.randrange(6, as_of + 2)
        known = [tid for tid in self.tids(oid) if tid <= as_of]
        start = max(tid for tid in known if tid < before)
        end = min((tid for tid in known if tid >= before), default=None)
        data = b"x" * self.chance.randrange(1, 3000)
        return revision(oid, start, end, data, as_of)


OIDS = range(1, 40)


def restore(file: CacheFile, history: History, through: int) -> State:
    """The server has an older copy, and goes another way."""
    tid = history.chance.choice([tid for tid in history.tids() if tid < through][-5:])
    gone = [each for each in history.tids() if each > tid]
    history.changes = [each for each in history.changes if each[0] <= tid]
    history.changes.append((max([tid, *gone]) + 1, [1]))
    return file.cut_back(p64(tid), [p64(each) for each in (*gone, through)])


def verify(file: CacheFile, history: History) -> State:
    """The server does not know the way, and says what of the cache is current."""
    last, mark = history.tids()[-1], file.mark()
    stale = [
        oid
        for batch in file.open_revisions()
        for oid, tid in batch
        if p64(history.tids(u64(oid))[-1]) != tid
    ]
    way = [p64(each) for each in history.tids()]
    return file.verified(mark, p64(last), stale, way)


def assert_is_true(path: Path, history: History) -> None:
    """What is in the file is what the server has."""
    with Inspection(path) as file:
        assert file.state is not None
        through = u64(file.state.through)
        for kept in file.ended():
            tids = history.tids(u64(kept.oid))
            assert kept.end is not None
            assert tids[tids.index(u64(kept.tid)) + 1] == u64(kept.end)
        for kept in file.current():
            tids, tid = history.tids(u64(kept.oid)), u64(kept.tid)
            assert tid in tids
            assert not any(tid < each <= through for each in tids)


@pytest.mark.parametrize("cache_bytes", [40_000, 10**7])
@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_wrong_after_any_history(tmp_path, seed, cache_bytes):
    history = History(random.Random(seed))
    chance = history.chance
    with opened(tmp_path) as file:
        file.cache_bytes = cache_bytes
        state = file.start(p64(5), None)
        for _ in range(400):
            for _ in range(chance.randrange(3)):
                history.commit()
            through = u64(state.through)
            answers = [history.answer() for _ in range(chance.randrange(10))]
            told = history.told(through)
            batch = Batch(p64(through), told, answers, {p64(chance.choice(OIDS)): 1})
            state, _evicted = file.extend(state.lineage, batch)
            through = u64(state.through)
            if chance.random() < 0.03:
                state = restore(file, history, through)
            elif chance.random() < 0.03:
                state = verify(file, history)
        for _ in range(10):
            history.commit()
        if seed % 2:
            restore(file, history, u64(state.through))
        else:
            verify(file, history)
        path = file.path
    assert findings(path) == []
    assert_is_true(path, history)
