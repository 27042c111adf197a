"""A blob cache's directory: whose it is, what is in it, what the dead leave behind."""

import os
import shutil
import signal
import stat
import subprocess
import sys

import pytest
from ZODB.blob import FilesystemHelper
from ZODB.utils import p64

from zeolith.client import blob_directory
from zeolith.client.blob_directory import BlobDirectory
from zeolith.client.file_locks import open_lockable, release, try_lock

from ..support.gates import Background

OID, TID = p64(0x1234), p64(5)


@pytest.fixture
def directory(tmp_path):
    made = BlobDirectory(tmp_path / "cache")
    made.claim()
    return made


def put(directory, oid, tid, data=b"data", idle_s=0):
    path = directory.blob_path(oid, tid)
    directory.make_room_for(path)
    with open(path, "wb") as file:
        file.write(data)
    used = os.stat(path).st_mtime - idle_s
    os.utime(path, (used, used))
    return path


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_it_is_made_and_private(tmp_path):
    BlobDirectory(tmp_path / "var" / "cache").claim()
    assert mode(tmp_path / "var" / "cache") == 0o700


def test_an_empty_directory_is_taken_and_becomes_private(tmp_path):
    (tmp_path / "lost+found").mkdir()
    tmp_path.chmod(0o755)
    BlobDirectory(tmp_path).claim()
    assert mode(tmp_path) == 0o700


def test_it_is_known_again(directory):
    path = put(directory, OID, TID)
    again = BlobDirectory(directory.path)
    again.claim()
    assert again.blob_path(OID, TID) == path
    assert [path for _mtime, _size, path in again.blobs()] == [path]


def test_a_relative_path_is_that_of_the_beginning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = BlobDirectory("cache")
    monkeypatch.chdir("/")
    directory.claim()
    assert directory.path == str(tmp_path / "cache")


@pytest.mark.parametrize("layout", ["bushy", "lawn"])
def test_the_blob_directory_of_a_server_is_refused_and_left_alone(tmp_path, layout):
    FilesystemHelper(str(tmp_path), layout).create()
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match=f"layout '{layout}'"):
        BlobDirectory(tmp_path).claim()
    assert sorted(os.listdir(tmp_path)) == before


def test_the_cache_of_other_software_is_refused(tmp_path):
    (tmp_path / ".layout").write_text("zeocache")
    with pytest.raises(ValueError, match="zeocache"):
        BlobDirectory(tmp_path).claim()


def test_a_directory_with_anything_else_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"no blob cache and not empty.*thesis\.txt"):
        BlobDirectory(tmp_path).claim()
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="not a directory"):
        BlobDirectory(tmp_path / "file").claim()


def test_the_directory_of_another_user_is_refused(directory, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ValueError, match="belongs to the user"):
        directory.claim()


def test_a_server_refuses_a_blob_cache(directory):
    with pytest.raises(KeyError, match=blob_directory.LAYOUT):
        FilesystemHelper(directory.path)


def test_many_may_claim_a_new_directory_at_once(tmp_path):
    claims = [Background(BlobDirectory(tmp_path / "new").claim) for _ in range(10)]
    for claim in claims:
        claim.result()


def test_a_claim_that_was_overtaken_knows_the_other_for_one_of_its_kind(
    tmp_path, monkeypatch
):
    """The other process comes after the look for the marker, before the next look."""
    list_names = os.listdir

    def overtaken(path):
        monkeypatch.setattr(os, "listdir", list_names)
        BlobDirectory(path).claim()
        return list_names(path)

    monkeypatch.setattr(os, "listdir", overtaken)
    BlobDirectory(tmp_path).claim()
    assert sorted(os.listdir(tmp_path / "tmp")) == []


def test_files_of_other_names_are_not_counted(directory):
    path = put(directory, OID, TID)
    beside = os.path.dirname(path)
    for name in ("notes.txt", "0.0.blob", os.path.basename(path) + ".bak"):
        with open(os.path.join(beside, name), "wb") as file:
            file.write(b"mine")
    os.mkdir(path.replace("0005.blob", "0006.blob"))
    assert [path for _mtime, _size, path in directory.blobs()] == [path]


def test_a_directory_that_somebody_removed_is_made_again(directory):
    os.rename(directory.path, directory.path + ".old")
    directory.make_room_for(directory.part_path(OID, TID))
    assert os.path.isdir(directory.parts)
    assert mode(directory.path) == 0o700
    BlobDirectory(directory.path).claim()


def test_parts_that_nobody_downloads_are_removed(directory):
    part = directory.part_path(OID, TID)
    fd = open_lockable(part, os.O_RDWR | os.O_CREAT)
    assert try_lock(fd)
    directory.remove_leftovers()
    assert os.path.exists(part)
    release(fd)
    directory.remove_leftovers()
    assert not os.path.exists(part)


def test_each_process_has_a_temporary_directory_of_its_own(directory):
    mine = directory.temporary()
    assert directory.temporary() == mine
    assert os.stat(mine).st_dev == os.stat(directory.path).st_dev
    other = BlobDirectory(directory.path)
    other.claim()
    assert other.temporary() != mine
    assert os.path.isdir(mine)


def test_a_forked_child_has_a_temporary_directory_of_its_own(directory):
    """And leaves its parent's alone, when it closes and when it starts another."""
    program = f"""
import os
from zeolith.client.blob_directory import BlobDirectory
directory = BlobDirectory({directory.path!r})
mine = directory.temporary()
child = os.fork()
if child == 0:
    directory.forget_parent()
    assert directory.temporary() != mine
    directory.close()
    BlobDirectory({directory.path!r}).claim()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert directory.temporary() == mine
assert os.path.isdir(mine)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_an_empty_temporary_directory_goes_at_close(directory):
    mine = directory.temporary()
    directory.close()
    assert os.listdir(os.path.dirname(mine)) == []
    directory.close()


def test_a_temporary_directory_in_use_stays_at_close(directory):
    mine = directory.temporary()
    with open(os.path.join(mine, "BUC"), "wb"):
        pass
    directory.close()
    BlobDirectory(directory.path).claim()
    assert os.listdir(mine) == ["BUC"]
    # That is the parent's, to a forked child.
    blob_directory.forget_given_up()
    assert directory.temporary() != mine


def test_what_is_in_use_at_close_costs_no_more_the_next_time(tmp_path):
    """Opening and closing again and again takes no more directories and descriptors."""
    found = set()
    descriptors = len(os.listdir("/proc/self/fd"))
    for count in range(5):
        again = BlobDirectory(tmp_path / "cache")
        again.claim()
        found.add(mine := again.temporary())
        with open(os.path.join(mine, f"BUC{count}"), "w"):
            again.close()
    assert len(found) == 1
    assert len(os.listdir("/proc/self/fd")) == descriptors + 1
    shutil.rmtree(mine)
    assert again.temporary() != mine
    again.close()
    assert os.listdir(tmp_path / "cache" / "tmp") == [os.path.basename(mine) + ".lock"]
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_temporary_directory_that_somebody_removed_is_made_again(directory):
    mine = directory.temporary()
    os.rmdir(mine)
    assert os.path.isdir(directory.temporary())


def test_temporary_files_of_the_dead_are_removed_at_the_next_start(directory):
    program = f"""
import sys, os
from zeolith.client.blob_directory import BlobDirectory
directory = BlobDirectory({directory.path!r})
directory.claim()
open(os.path.join(directory.temporary(), "BUC"), "w").close()
print("ready", flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        tmp = os.path.join(directory.path, "tmp")
        BlobDirectory(directory.path).claim()
        assert len(os.listdir(tmp)) == 2
        process.send_signal(signal.SIGKILL)
        process.wait()
        BlobDirectory(directory.path).claim()
        assert os.listdir(tmp) == []


def test_temporary_files_that_cannot_be_removed_are_tried_again(directory, monkeypatch):
    dead = os.path.join(directory.path, "tmp", "1-dead")
    os.mkdir(dead)
    with open(dead + ".lock", "wb"):
        pass
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
        directory.remove_leftovers()
    assert os.path.exists(dead + ".lock")
    directory.remove_leftovers()
    assert os.listdir(os.path.dirname(dead)) == []


@pytest.fixture
def boots(directory, tmp_path, monkeypatch):
    """Call it to reboot the host."""

    def boot(name):
        (tmp_path / "boot_id").write_text(name)
        monkeypatch.setattr(blob_directory, "_BOOT_ID", str(tmp_path / "boot_id"))

    boot("first")
    directory.claim()
    return boot


def test_blobs_that_a_crash_may_have_cut_short_go_at_the_next_boot(directory, boots):
    put(directory, OID, p64(1), idle_s=1)
    put(directory, OID, p64(2), idle_s=blob_directory.UNWRITTEN_S - 1)
    old = put(directory, OID, p64(3), idle_s=blob_directory.UNWRITTEN_S + 10)
    directory.claim()
    assert len(list(directory.blobs())) == 3
    boots("second")
    directory.claim()
    assert [path for _mtime, _size, path in directory.blobs()] == [old]
    directory.claim()
    assert [path for _mtime, _size, path in directory.blobs()] == [old]
