import errno
import os
from collections.abc import Sequence

import pytest
from ZODB.FileStorage.FileStorage import FileStorageQuotaError

from zeolith.storage.disk import Disk
from zeolith.storage.room import AHEAD_BYTES, Room


class SmallDisk(Disk):
    """A disk with so much room behind position 0, and a diary."""

    def __init__(self, room_bytes: int, can_reserve: bool = True):
        self.room_bytes = room_bytes
        self.can_reserve = can_reserve
        self.reserved: list[tuple[int, int]] = []
        self.cut: list[int] = []

    def write(
        self, fd: int, buffers: Sequence[bytes | memoryview], position: int
    ) -> int:
        raise AssertionError("a room writes nothing")

    def truncate(self, fd: int, size: int) -> None:
        self.cut.append(size)

    def reserve(self, fd: int, position: int, size: int) -> bool:
        if not self.can_reserve:
            return False
        if position + size > self.room_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.reserved.append((position, size))
        return True


class File:
    def __init__(self, disk: Disk, quota_bytes: int | None = None):
        self.end = 100
        self.room = Room(disk, self.duplicate, lambda: self.end, quota_bytes)

    def duplicate(self) -> tuple[int, int]:
        return os.open(os.devnull, os.O_RDWR), self.end


def test_nothing_is_there_before_the_disk_was_asked():
    file = File(SmallDisk(10**9))
    assert not file.room.take(10, 10)
    file.room.make(10, 10)
    assert file.room.take(10, 10)


def test_more_is_reserved_than_is_wanted_so_that_few_have_to_ask():
    disk = SmallDisk(10**9)
    file = File(disk)
    file.room.make(1000, 1000)
    assert disk.reserved == [(100, 1000 + AHEAD_BYTES)]
    assert file.room.take(AHEAD_BYTES, AHEAD_BYTES)
    assert not file.room.take(1, 1)


def test_what_is_taken_is_there_again_when_it_was_given_back():
    file = File(SmallDisk(10**9))
    file.room.make(1000, 1000)
    assert file.room.take(AHEAD_BYTES, AHEAD_BYTES)
    file.room.give_back(1000)
    assert file.room.take(1000, 1000)
    assert not file.room.take(1, 1)


def test_a_file_that_grows_uses_up_what_is_reserved():
    file = File(SmallDisk(10**9))
    file.room.make(1000, 1000)
    file.end += 1000
    file.room.give_back(1000)
    assert file.room.take(AHEAD_BYTES, AHEAD_BYTES)
    assert not file.room.take(1, 1)


def test_a_disk_nearly_full_gives_what_is_wanted_and_no_more():
    disk = SmallDisk(1100)
    file = File(disk)
    file.room.make(1000, 1000)
    assert disk.reserved == [(100, 1000)]


def test_a_full_disk_is_told_and_nothing_is_taken():
    disk = SmallDisk(1100)
    file = File(disk)
    with pytest.raises(OSError, match="No space left"):
        file.room.make(1001, 1001)
    file.room.make(1000, 1000)


def test_a_disk_that_fails_otherwise_is_told_at_once():
    disk = SmallDisk(10**9)
    file = File(disk)

    def fail(*_args: object) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    disk.reserve = fail  # type: ignore[assignment,method-assign]
    with pytest.raises(OSError, match="Input/output error"):
        file.room.make(10, 10)


def test_where_nothing_can_be_reserved_everything_is_taken_unasked():
    file = File(SmallDisk(0, can_reserve=False))
    assert not file.room.take(10, 10)
    file.room.make(10, 10)
    assert file.room.take(10**9, 10**9)


@pytest.mark.parametrize("way", ["take", "make"])
def test_a_quota_counts_the_file_and_all_who_have_voted(way):
    file = File(SmallDisk(10**9), quota_bytes=1000)
    file.room.make(800, 800)
    getattr(file.room, way)(100, 100)
    with pytest.raises(FileStorageQuotaError):
        getattr(file.room, way)(1, 1)
    file.room.give_back(800)
    getattr(file.room, way)(800, 800)


def test_after_the_file_was_cut_nothing_is_reserved():
    file = File(SmallDisk(10**9))
    file.room.make(10, 10)
    file.room.forget()
    assert not file.room.take(10, 10)


def test_at_the_end_the_disk_gets_back_what_was_reserved():
    disk = SmallDisk(10**9)
    file = File(disk)
    file.room.release()
    assert disk.cut == []
    file.room.make(10, 10)
    file.room.release()
    assert disk.cut == [100]


def test_the_quota_says_where_the_last_record_may_begin():
    """As FileStorage has it."""
    file = File(SmallDisk(10**9), quota_bytes=1000)
    file.room.make(5000, 900)
    file.room.give_back(5000)
    with pytest.raises(FileStorageQuotaError):
        file.room.make(5000, 901)


def test_what_was_reserved_in_a_file_that_is_replaced_does_not_count():
    disk = SmallDisk(10**9)
    file = File(disk)
    reserve = disk.reserve

    def replaced(fd: int, position: int, size: int) -> bool:
        file.room.forget()
        return reserve(fd, position, size)

    disk.reserve = replaced  # type: ignore[method-assign]
    file.room.make(10, 0)
    assert not file.room.take(10, 0)


def test_a_file_that_a_pack_made_smaller_meanwhile_is_asked_for_no_more_than_wanted():
    disk = SmallDisk(1000)
    file = File(disk)
    file.end = 900

    def smaller() -> tuple[int, int]:
        return os.open(os.devnull, os.O_RDWR), 100

    file.room._duplicate = smaller
    file.room.make(50, 50)
    assert disk.reserved == [(100, 50)]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_without_a_descriptor_to_ask_with_nobody_is_refused(number):
    """And the next one asks again."""
    disk = SmallDisk(10**9)
    file = File(disk)
    duplicate = file.room._duplicate

    def fails() -> tuple[int, int]:
        raise OSError(number, os.strerror(number))

    file.room._duplicate = fails
    file.room.make(10, 0)
    assert not disk.reserved
    assert not file.room.take(10, 0)
    file.room._duplicate = duplicate
    file.room.make(10, 0)
    assert disk.reserved == [(100, 20 + AHEAD_BYTES)]
