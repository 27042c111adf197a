"""Removing cache files, for ``zeolith cache clear``.

While it is done nobody can begin to use one: that is done under the lock of the place.
Whoever uses one keeps what he has open, as the file system has it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zeolith.client.cache_place import CachePlace, Presence


def clear_place(place: CachePlace, *, force: bool) -> list[Path]:
    """Remove all cache files of ``place``, and what belongs to them.

    Returns those that are in use; if there are such and without ``force``, nothing is
    removed. Raises OSError.
    """
    with place.locked():
        paths = [path for _identity, path in place.files()]
        with _visited(paths) as used:
            if force or not used:
                _remove(place, paths)
    return used


@contextmanager
def _visited(paths: list[Path]) -> Iterator[list[Path]]:
    """Those that somebody uses; the others cannot be used meanwhile."""
    visits: list[Presence] = []
    try:
        visits += map(Presence, paths)
        yield [
            path
            for path, visit in zip(paths, visits, strict=True)
            if not visit.is_alone
        ]
    finally:
        for visit in visits:
            visit.abandon()


def _remove(place: CachePlace, paths: list[Path]) -> None:
    names = {path.name for path in paths}
    for last in place.directory.glob("*.last"):
        if last.read_text(errors="replace") in names:
            last.unlink()
    for path in paths:
        # All that bears its name: LMDB's lock, marks, the list of what is used most.
        for each in place.directory.glob(f"{path.stem}.*"):
            each.unlink(missing_ok=True)
