"""The cache files of a process: each is opened once."""

import os

import pytest

from zeolith.client import cache_files


def test_who_names_the_same_file_gets_the_same_one(tmp_path):
    first = cache_files.acquire(tmp_path / "x.lmdb", 1_000_000)
    second = cache_files.acquire(tmp_path / "." / "x.lmdb", 2_000_000)
    assert first is second
    assert first.cache_bytes == 2_000_000, "the larger size counts"
    cache_files.release(first)
    assert len(second) == 0, "somebody has it open yet"
    cache_files.release(second)
    third = cache_files.acquire(tmp_path / "x.lmdb", 1_000_000)
    assert third is not first
    cache_files.release(third)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_opens_it_anew_and_leaves_its_parents_open(tmp_path):
    parents = cache_files.acquire(tmp_path / "x.lmdb", 1_000_000)
    parents.start(b"\0" * 7 + b"\1", None)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            cache_files.release(parents)
            childs = cache_files.acquire(tmp_path / "x.lmdb", 1_000_000)
            code = 0 if childs is not parents and childs.state() is not None else 2
            cache_files.release(childs)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert parents.state() is not None
    cache_files.release(parents)
