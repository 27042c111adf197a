"""What is to be on the disk is brought there, and nothing stays open."""

import os
from pathlib import Path

import pytest

from zeolith.storage.syncing import sync_path


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc here")
def test_a_file_and_a_directory_are_synced_and_closed(tmp_path, monkeypatch):
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    file = tmp_path / "file"
    file.write_bytes(b"data")
    before = open_files()
    sync_path(file)
    sync_path(tmp_path)
    assert synced == [str(file), str(tmp_path)]
    assert open_files() == before


def test_an_error_of_the_disk_is_raised(tmp_path, monkeypatch):
    def fail(_descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        sync_path(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_path(tmp_path / "nothing")
