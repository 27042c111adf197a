"""Cache files with known contents, and ways to damage them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
from ZODB.utils import p64

from zeolith.client.cache_backlog import Batch, Revision
from zeolith.client.cache_file import CacheFile
from zeolith.client.cache_place import CachePlace, Identity
from zeolith.client.changes import Change

IDENTITY = Identity(b"\x0d" * 16, 1)
CACHE_BYTES = 10 * 1024**2


@contextmanager
def opened(directory: Path, identity: Identity = IDENTITY) -> Iterator[CacheFile]:
    """The file of a database, in use."""
    place = CachePlace(directory)
    with place.locked():
        file = CacheFile(place.path_of(identity), CACHE_BYTES)
    try:
        yield file
    finally:
        file.close()


def revision(oid: int, tid: int, end: int | None, data: bytes, as_of: int) -> Revision:
    return Revision(
        p64(oid), p64(tid), None if end is None else p64(end), data, p64(as_of)
    )


def written(
    directory: Path,
    *,
    through: int,
    revisions: Sequence[Revision],
    changes: Sequence[tuple[int, list[int]]] = (),
    identity: Identity = IDENTITY,
) -> Path:
    """A file that began at ``through``, got ``revisions``, then ``changes``."""
    with opened(directory, identity) as file:
        state = file.start(p64(through), None)
        base = p64(through)
        file.extend(state.lineage, Batch(base, (), revisions, {}))
        told, since = [], through
        for tid, oids in changes:
            told.append(Change(p64(since), p64(tid), list(map(p64, oids)), None))
            since = tid
        file.extend(state.lineage, Batch(base, told, (), {}))
        return file.path


@contextmanager
def damaging(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A write transaction on ``path`` and what is in it, by name."""
    names = ("current", "ended", "order", "recent", "changes", "meta")
    with lmdb.open(str(path), subdir=False, max_dbs=len(names)) as env:
        dbs = {name: env.open_db(name.encode()) for name in names}
        with env.begin(write=True) as txn:
            yield txn, dbs
