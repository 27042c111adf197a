"""Where each object's current record is, and the file ``Data.fs.index`` that says so.

FileStorage's own format, so that it can read ours and we its: the pickle of a
position, one of (prefix, bucket) for every bucket, one of None. An index is right only
as a whole: every transaction before the position is in it, and none after, or
FileStorage's check of the last records would refuse it.

``save`` writes one that is right while transactions are committed. ``Source`` is how it
asks for what must not change under its hands; the owner serialises the calls of
``save``. Called from worker threads, by ``indexed`` and ``filestore``.
"""

import os
import pickle
from collections import defaultdict
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from BTrees.fsBTree import fsBucket
from ZODB.fsIndex import ensure_bytes, fsIndex

from zeolith.storage.syncing import sync_path

# So many buckets are copied at most while commits wait: 32 MB, ten milliseconds.
COPIED_MAX = 64
# After so many rounds commits wait after all, or the file would have all of it often.
ROUNDS_MAX = 3

_PROTOCOL = 3
# So many places are put in order together: they take memory meanwhile.
PLACES_AT_ONCE = 5000


class Index(NamedTuple):
    """A saved index: what is before ``position`` of the file."""

    objects: Any
    position: int


class Buckets(NamedTuple):
    """The buckets that changed, as long as the log ended at ``position``."""

    position: int
    buckets: list[tuple[bytes, bytes]]


class IndexChanged(Exception):
    """Another file has taken the place of the one whose index is saved."""


class Source(Protocol):
    """An index that changes while it is saved."""

    def watch(self) -> list[bytes]:
        """From now on remember which prefixes change; returns all that there are."""

    def bucket(self, prefix: bytes) -> bytes:
        """The bucket as it is now, whatever is happening to it."""

    def changed(self, limit: int) -> Buckets | set[bytes]:
        """What has changed since it was asked last.

        The buckets and the end of the log at one moment, if there are no more than
        ``limit``, otherwise only their prefixes. Raises IndexChanged.
        """

    def install(self, replacement: Path, position: int) -> None:
        """Let ``replacement``, which is on disk, be the index; IndexChanged."""


def load(path: Path) -> Index | None:
    """The index that is saved at ``path``; None if there is none.

    Raises whatever reading a damaged pickle raises. Nothing that the file names is
    made: it may have come from elsewhere, with a backup.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    with file:
        unpickler = _NamelessUnpickler(file)
        position = unpickler.load()
        if type(position) is not int:
            raise ValueError("it is of an old format")
        objects = fsIndex()
        while bucket := unpickler.load():
            prefix, places = map(ensure_bytes, bucket)
            objects._data[prefix] = fsBucket().fromString(places)
    return Index(objects, position)


class _NamelessUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"it names {module[:80]}.{name[:80]}")


def save(source: Source, path: Path) -> int:
    """Save the index at ``path`` while it changes; returns its size in bytes.

    Every bucket is written as it is when its turn comes. Those which have changed by
    then are written again, and again, until few are left; these, and the position that
    goes with all of them, are taken in one moment. Who reads the file takes the last of
    several buckets with the same prefix. Raises OSError and IndexChanged, and then
    leaves everything as it was.
    """
    replacement = path.with_name(path.name + ".new")
    try:
        with replacement.open("wb") as file:
            file.write(_position_pickle(0))
            prefixes: Iterable[bytes] = source.watch()
            for left in reversed(range(ROUNDS_MAX)):
                _write(file, ((prefix, source.bucket(prefix)) for prefix in prefixes))
                last = source.changed(COPIED_MAX if left else 2**48)
                if isinstance(last, Buckets):
                    break
                prefixes = last
            assert isinstance(last, Buckets)
            _write(file, last.buckets)
            file.write(pickle.dumps(None, _PROTOCOL))
            size = file.tell()
            file.seek(0)
            file.write(_position_pickle(last.position))
            _sync(file)
        source.install(replacement, last.position)
    except BaseException:
        replacement.unlink(missing_ok=True)
        raise
    sync_path(path.parent)
    return size


def save_still(index: Any, position: int, path: Path) -> int:
    """Save an index that nobody changes meanwhile; its size in bytes; OSError."""
    # Not the name that a save in the background may be writing to.
    replacement = path.with_name(path.name + ".index_tmp")
    with replacement.open("wb") as file:
        file.write(_position_pickle(position))
        _write(file, ((key, bucket.toString()) for key, bucket in index._data.items()))
        file.write(pickle.dumps(None, _PROTOCOL))
        _sync(file)
        size = file.tell()
    replacement.replace(path)
    sync_path(path.parent)
    return size


def put_places(objects: fsIndex, places: dict[bytes, int]) -> None:
    """Let ``objects`` say that these are there now: oid -> position.

    As ``fsIndex.update`` does, with one call for all of a bucket: a third of the time.
    """
    rest = iter(places.items())
    while some := tuple(islice(rest, PLACES_AT_ONCE)):
        _put_some(objects._data, some)


def _put_some(buckets: Any, places: tuple[tuple[bytes, int], ...]) -> None:
    pairs: defaultdict[bytes, list[tuple[bytes, bytes]]] = defaultdict(list)
    for oid, position in places:
        pairs[oid[:6]].append((oid[6:], position.to_bytes(6, "big")))
    for prefix, of_bucket in pairs.items():
        bucket = buckets.get(prefix)
        if bucket is None:
            # Filled before anybody finds it: nobody meets an empty one.
            bucket = fsBucket()
            bucket.update(of_bucket)
            buckets[prefix] = bucket
        else:
            bucket.update(of_bucket)


def _position_pickle(position: int) -> bytes:
    """Always 13 bytes, so that it can be overwritten: LONG1 of eight bytes."""
    return b"\x80\x03\x8a\x08" + position.to_bytes(8, "little") + b"."


def _write(file: Any, buckets: Iterable[tuple[bytes, bytes]]) -> None:
    for item in buckets:
        file.write(pickle.dumps(item, _PROTOCOL))


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
