"""The environment of a cache file is opened, or given up when somebody else writes."""

import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import lmdb
import pytest

from tests.support.waiting import wait_until
from zeolith.client import cache_environment
from zeolith.client.cache_environment import NAMES, opened

MB = 1024**2
# Writes until it may end.
WRITER = """
import sys
from pathlib import Path
from zeolith.client.cache_environment import opened

env, _dbs = opened(Path(sys.argv[1]), 1_000_000)
with env.begin(write=True):
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.lmdb"


def test_what_was_written_is_there_when_it_is_opened_again(path):
    env, dbs = opened(path, MB)
    assert dbs._fields == NAMES
    with env.begin(write=True) as txn:
        txn.put(b"oid", b"data", db=dbs.current)
    env.close()
    env, dbs = opened(path, MB)
    with env.begin() as txn:
        assert txn.get(b"oid", db=dbs.current) == b"data"
        assert txn.get(b"oid", db=dbs.ended) is None
    env.close()


def test_another_version_is_refused_and_may_be_opened_again(path, monkeypatch):
    env, _dbs = opened(path, MB)
    env.close()
    with monkeypatch.context() as newer:
        newer.setattr(cache_environment, "FORMAT", b"other")
        with pytest.raises(lmdb.VersionMismatchError):
            opened(path, MB)
    env, _dbs = opened(path, MB)
    env.close()


def test_what_is_opened_at_the_last_moment_is_used(path, monkeypatch):
    class Late(Future[Any]):
        """Done after the wait, and before it is given up."""

        def result(self, timeout: float | None = None) -> Any:
            found = super().result()
            if timeout is not None:
                raise TimeoutError
            return found

    monkeypatch.setattr(cache_environment, "Future", Late)
    env, dbs = opened(path, MB)
    with env.begin() as txn:
        assert txn.get(b"oid", db=dbs.current) is None
    env.close()


def test_nobody_waits_long_for_who_writes(path, monkeypatch):
    monkeypatch.setattr(cache_environment, "OPEN_WAIT_S", 0.05)
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdin is not None
        assert writer.stdout.readline() == b"writing\n"
        with pytest.raises(TimeoutError, match="let it go on"):
            opened(path, MB)
        writer.stdin.close()
        # What was given up is closed when that process has ended.
        monkeypatch.setattr(cache_environment, "OPEN_WAIT_S", 30)

        def can_be_opened() -> bool:
            try:
                env, _dbs = opened(path, MB)
            except lmdb.Error:
                return False
            env.close()
            return True

        wait_until(can_be_opened, "a write has ended")
