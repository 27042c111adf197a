"""Removing cache files, and nothing else."""

from pathlib import Path

import pytest

from zeolith.client.cache_clearing import clear_place
from zeolith.client.cache_place import CachePlace, Identity

from ..support.cache_files import IDENTITY, opened, written

OTHER = Identity(b"\x0e" * 16, 2)


@pytest.fixture
def place(tmp_path: Path) -> CachePlace:
    directory = tmp_path / "cache"
    for identity in (IDENTITY, OTHER):
        written(directory, through=20, revisions=[], identity=identity)
    place = CachePlace(directory)
    place.remember("1", IDENTITY)
    place.remember("other", OTHER)
    return place


def names(place: CachePlace) -> set[str]:
    return {path.name for path in place.directory.iterdir()}


def test_all_of_it_is_removed(place):
    for _identity, path in place.files():
        path.with_suffix(".hot").write_text("[]")
        path.with_suffix(".hot.warming").write_text("")
    assert clear_place(place, force=False) == []
    assert names(place) == {"lock"}


def test_what_is_something_else_stays(place):
    for name in ("notes.txt", "my.last", "my.lmdb", "other.users"):
        (place.directory / name).write_text("mine")
    clear_place(place, force=True)
    assert names(place) == {"lock", "notes.txt", "my.last", "my.lmdb", "other.users"}


def test_nothing_is_removed_while_one_is_in_use(place):
    with opened(place.directory) as file:
        before = names(place)
        assert clear_place(place, force=False) == [file.path]
        assert names(place) == before
    assert clear_place(place, force=False) == []


def test_by_force_those_in_use_keep_what_they_have(place):
    with opened(place.directory) as file:
        assert clear_place(place, force=True) == [file.path]
        assert names(place) == {"lock"}
        assert file.state() is not None


def test_who_comes_later_begins_anew(place):
    clear_place(place, force=False)
    assert place.last("1") is None
    with opened(place.directory) as file:
        assert file.state() is None


def test_nobody_counts_as_a_user_afterwards(place):
    """To look is not to use."""
    with opened(place.directory):
        clear_place(place, force=False)
    assert clear_place(place, force=False) == []
