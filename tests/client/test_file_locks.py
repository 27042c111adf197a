"""Locks on files: between threads, between processes, across a fork."""

import os
import signal
import subprocess
import sys

import pytest

from zeolith.client.file_locks import (
    is_still_at,
    locked,
    open_lockable,
    release,
    try_lock,
)

from ..support.gates import Background

HOLDER = """
import os, sys, time
from zeolith.client.file_locks import open_lockable, try_lock
assert try_lock(open_lockable(sys.argv[1], os.O_RDWR | os.O_CREAT))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "file")


def opened(path):
    return open_lockable(path, os.O_RDWR | os.O_CREAT)


def test_two_that_open_the_same_file_exclude_each_other(path):
    first, second = opened(path), opened(path)
    assert try_lock(first)
    assert not try_lock(second)
    release(first)
    assert try_lock(second)
    release(second)


def test_whoever_lets_go_unlocks_though_a_copy_is_open(path):
    first, second = opened(path), opened(path)
    assert try_lock(first)
    copy = os.dup(first)
    release(first)
    assert try_lock(second)
    release(second)
    os.close(copy)


def test_shared_locks_exclude_only_the_other_kind(path):
    fds = [opened(path) for _ in range(3)]
    assert try_lock(fds[0], shared=True)
    assert try_lock(fds[1], shared=True)
    assert not try_lock(fds[2])
    for fd in fds:
        release(fd)


def test_a_file_is_known_again_unless_it_was_replaced(path):
    fd = opened(path)
    assert is_still_at(path, fd)
    os.unlink(path)
    assert not is_still_at(path, fd)
    other = opened(path)
    assert not is_still_at(path, fd)
    release(fd)
    release(other)


def test_whoever_wants_a_held_lock_waits(path):
    def hold():
        with locked(path):
            return True

    with locked(path):
        waiting = Background(hold)
        assert not waiting.returns_soon()
    assert waiting.result()


def test_the_lock_of_a_killed_process_is_free(path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        fd = opened(path)
        assert not try_lock(fd)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert try_lock(fd)
        release(fd)


def test_a_forked_child_keeps_no_lock_of_its_parent(path):
    """Seen from a third process, after the parent has died without unlocking."""
    program = f"""
import os, time
from zeolith.client.file_locks import open_lockable, try_lock
assert try_lock(open_lockable({path!r}, os.O_RDWR | os.O_CREAT))
reading, writing = os.pipe()
if os.fork() == 0:
    print("forked", flush=True)
    os.read(0, 1)
    os._exit(0)
os.kill(os.getpid(), 9)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"forked\n"
        parent.wait()
        fd = opened(path)
        assert try_lock(fd), "the child, which lives, holds the lock"
        release(fd)
