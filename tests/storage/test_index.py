"""The file Data.fs.index, which is right as a whole or is not there."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ZODB.fsIndex import fsIndex

from zeolith.storage import index
from zeolith.storage.index import (
    Buckets,
    IndexChanged,
    load,
    put_places,
    save,
    save_still,
)

from ..support.ids import number
from ..support.payloads import payload_that_makes

MANY = index.COPIED_MAX + 1


def oid(bucket: int, place: int = 0) -> bytes:
    return number(bucket * 65536 + place)


def some(count: int) -> fsIndex:
    return fsIndex({oid(n): 1000 + n for n in range(count)})


class Growing:
    """A source to which a commit comes whenever a bucket is copied."""

    def __init__(self, objects: fsIndex, commits: list[list[bytes]]):
        self.objects = objects
        self.position = 5000
        self.commits = commits
        self.dirty: set[bytes] = set()
        self.installed: list[tuple[bytes, int]] = []
        self.copied = 0
        self.error: Exception | None = None
        self.path = Path()

    def commit(self, *oids: bytes) -> None:
        for each in oids:
            self.objects[each] = self.position
            self.position += 100
            self.dirty.add(each[:6])

    def watch(self) -> list[bytes]:
        return list(self.objects._data)

    def bucket(self, prefix: bytes) -> bytes:
        self.copied += 1
        contents: bytes = self.objects._data[prefix].toString()
        if self.commits:
            self.commit(*self.commits.pop(0))
        return contents

    def changed(self, limit: int) -> Buckets | set[bytes]:
        dirty, self.dirty = self.dirty, set()
        if len(dirty) > limit:
            return dirty
        return Buckets(
            self.position,
            [(each, self.objects._data[each].toString()) for each in dirty],
        )

    def install(self, replacement: Path, position: int) -> None:
        if self.error is not None:
            raise self.error
        replacement.replace(self.path)
        self.installed.append((self.path.read_bytes(), position))


def saved(source: Growing, path: Path) -> dict[str, Any]:
    source.path = path
    assert save(source, path) == path.stat().st_size
    found = load(path)
    assert found is not None
    # As FileStorage reads it.
    by_zodb = fsIndex.load(str(path))
    assert by_zodb["pos"] == found.position == source.installed[-1][1]
    assert by_zodb["index"].items() == found.objects.items()
    return {"pos": found.position, "items": found.objects.items()}


def test_an_index_is_saved_and_read(tmp_path):
    for count in (0, 1, 40):
        objects = some(count)
        size = save_still(objects, 2**40, tmp_path / "index")
        assert size == (tmp_path / "index").stat().st_size
        found = load(tmp_path / "index")
        assert found is not None
        assert (found.objects.items(), found.position) == (objects.items(), 2**40)
        source = Growing(objects, [])
        assert saved(source, tmp_path / "other") == {
            "pos": 5000,
            "items": objects.items(),
        }
    assert sorted(os.listdir(tmp_path)) == ["index", "other"]


def test_what_is_committed_meanwhile_is_in_it_as_of_its_position(tmp_path):
    commits = [
        [oid(3)],
        # A bucket that was written already, one that is new, one twice.
        [oid(0, 7), oid(99)],
        [oid(0, 7)],
    ]
    source = Growing(some(5), commits)
    found = saved(source, tmp_path / "index")
    assert found == {"pos": 5400, "items": source.objects.items()}


def test_what_is_committed_while_the_rest_is_written_comes_after_it(tmp_path):
    """Not in the middle: an entry beyond the position would be refused."""
    source = Growing(some(3), [[oid(1)]])
    changed = source.changed

    def changed_and_more(limit: int) -> Buckets | set[bytes]:
        last = changed(limit)
        source.commit(oid(1), oid(2))
        return last

    source.changed = changed_and_more  # type: ignore[method-assign]
    found = saved(source, tmp_path / "index")
    assert found["pos"] == 5100
    assert dict(found["items"])[oid(1)] == 5000
    assert dict(found["items"])[oid(2)] == 1002


def test_few_buckets_are_copied_while_commits_wait(tmp_path):
    everywhere = [oid(n, 1) for n in range(MANY)]
    source = Growing(some(MANY), [[oid(5)], everywhere, [oid(6)]])
    found = saved(source, tmp_path / "index")
    assert found["items"] == source.objects.items()
    # All of them once, and then those that had changed again.
    assert source.copied == 2 * MANY


def test_commits_everywhere_all_the_time_do_not_keep_it_from_ending(tmp_path):
    everywhere = [[oid(n, 1) for n in range(MANY)] for _ in range(10_000)]
    source = Growing(some(MANY), everywhere)
    found = saved(source, tmp_path / "index")
    assert found == {"pos": source.position, "items": source.objects.items()}


@pytest.mark.parametrize("error", [IndexChanged(), OSError("no space")])
def test_if_it_comes_to_nothing_the_old_one_stays(tmp_path, error):
    path = tmp_path / "index"
    save_still(some(3), 77, path)
    source = Growing(some(9), [])
    source.error = error
    with pytest.raises(type(error)):
        save(source, path)
    found = load(path)
    assert found is not None
    assert found.position == 77
    assert os.listdir(tmp_path) == ["index"]


def test_it_is_on_disk_before_it_has_the_name(tmp_path, monkeypatch):
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(fd: int) -> None:
        steps.append("sync")
        fsync(fd)

    def noted_replace(path: Path, target: Path) -> Path:
        steps.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    save_still(some(3), 77, tmp_path / "index")
    source = Growing(some(3), [])
    saved(source, tmp_path / "index")
    # The file, its new name, the folder that has the name.
    assert steps == ["sync", "rename", "sync"] * 2


def test_an_index_that_is_not_there(tmp_path):
    assert load(tmp_path / "index") is None


def test_a_damaged_one_is_an_error(tmp_path):
    path = tmp_path / "index"
    save_still(some(3), 77, path)
    whole = path.read_bytes()
    for content in (b"", whole[:5], whole[:-2], b"text", b"\x80\x03}.", b"\x80\x03N."):
        path.write_bytes(content)
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever pickle raises
            load(path)


def test_nothing_is_made_that_an_index_names(tmp_path):
    """It may have come with a backup, from anybody."""
    path, proof = tmp_path / "index", tmp_path / "was run"
    hostile = payload_that_makes(proof)
    for content in (hostile, pickle.dumps(77, 3) + hostile):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="it names"):
            load(path)
    assert not proof.exists()


_places = st.dictionaries(
    st.builds(oid, st.integers(0, 3), st.integers(0, 2)), st.integers(0, 2**48 - 1)
)


@given(st.lists(_places), st.integers(1, 4))
def test_places_are_put_as_zodb_puts_them(rounds, at_once):
    ours, zodbs = fsIndex(), fsIndex()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(index, "PLACES_AT_ONCE", at_once)
        for places in rounds:
            put_places(ours, places)
            zodbs.update(places)
            assert ours.items() == zodbs.items()
