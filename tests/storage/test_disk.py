import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from zeolith.storage.disk import Disk


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield opened
    os.close(opened)


def test_what_is_written_is_at_its_position(disk, fd):
    assert disk.write(fd, [b"abc", memoryview(b"def")], 2) == 6
    disk.sync(fd)
    assert os.pread(fd, 100, 0) == b"\0\0abcdef"


def test_a_file_is_cut(disk, fd):
    disk.write(fd, [b"abcdef"], 0)
    disk.truncate(fd, 2)
    assert os.pread(fd, 100, 0) == b"ab"


def test_what_is_reserved_does_not_change_the_size(disk, fd):
    disk.write(fd, [b"abc"], 0)
    if not disk.reserve(fd, 3, 1_000_000):
        pytest.skip("this file system reserves nothing")
    was = os.fstat(fd)
    assert was.st_size == 3
    assert was.st_blocks * 512 >= 1_000_000
    disk.truncate(fd, 3)
    assert os.fstat(fd).st_blocks * 512 < 100_000


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_that_cannot_reserve_is_no_error(disk, fd, number, monkeypatch):
    answer(disk, number, monkeypatch)
    assert not disk.reserve(fd, 0, 10)


def test_a_full_disk_is_an_error(disk, fd, monkeypatch):
    answer(disk, errno.ENOSPC, monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        disk.reserve(fd, 0, 10)


def test_a_system_without_the_call_reserves_nothing(disk, fd):
    disk._fallocate = None
    assert not disk.reserve(fd, 0, 10)


def answer(disk: Disk, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says that it does not reserve, and why."""

    def fallocate(*_args: Any) -> int:
        monkeypatch.setattr("ctypes.get_errno", lambda: number)
        return -1

    disk._fallocate = fallocate
