import os

import pytest

from zeolith.storage.recent import SLOTS, RecentIds

from ..support.ids import number, transaction_id


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "Data.fs")


def noted(first: int, count: int) -> list[tuple[bytes, bytes]]:
    return [(number(n), transaction_id(n)) for n in range(first, first + count)]


def reopened(path: str) -> RecentIds:
    ids = RecentIds(path)
    ids.close()
    return ids


def test_what_was_noted_is_known_after_a_restart(path):
    ids = RecentIds(path)
    ids.note(noted(1, 1))
    ids.note(noted(2, 3))
    ids.close()
    again = reopened(path)
    assert [again.id_of(number(n)) for n in range(6)] == [
        None,
        *(transaction_id(n) for n in range(1, 5)),
        None,
    ]


@pytest.mark.parametrize("at_once", [1, 7, SLOTS, SLOTS + 5])
def test_the_last_ones_are_kept_and_the_file_does_not_grow(path, at_once):
    ids = RecentIds(path)
    last = 2 * SLOTS + 3
    for first in range(1, last, at_once):
        ids.note(noted(first, at_once))
    ids.close()
    again = reopened(path)
    newest = first + at_once - 1
    kept = range(newest - SLOTS + 1, newest + 1)
    assert all(again.id_of(number(n)) == transaction_id(n) for n in kept)
    assert again.id_of(number(newest - SLOTS)) is None
    assert os.path.getsize(f"{path}.recent") == SLOTS * 24


def test_noting_goes_on_where_it_ended(path):
    for n in range(1, 4):
        ids = RecentIds(path)
        ids.note(noted(n, 1))
        ids.close()
    assert all(reopened(path).id_of(number(n)) for n in (1, 2, 3))


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 24, os.urandom(1000)])
def test_a_damaged_file_does_no_harm(path, content):
    with open(f"{path}.recent", "wb") as file:
        file.write(content)
    ids = RecentIds(path)
    ids.note(noted(1, 1))
    ids.close()
    assert reopened(path).id_of(number(1)) == transaction_id(1)


def test_a_disk_that_takes_nothing_is_told_once_and_in_nobodys_way(
    path, monkeypatch, caplog
):
    ids = RecentIds(path)

    def full(*_args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        ids.note(noted(1, 1))
        ids.note(noted(2, 1))
    assert caplog.text.count("No space left") == 1
    ids.note(noted(3, 1))
    ids.close()
    again = reopened(path)
    assert again.id_of(number(1)) is None
    assert again.id_of(number(3)) == transaction_id(3)


def test_who_only_reads_makes_and_writes_nothing(path):
    RecentIds(path, is_read_only=True).note(noted(1, 1))
    assert not os.path.exists(f"{path}.recent")
    RecentIds(path).note(noted(1, 1))
    reader = RecentIds(path, is_read_only=True)
    reader.note(noted(2, 1))
    assert reader.id_of(number(1)) == transaction_id(1)
    assert reopened(path).id_of(number(2)) is None
