"""The packer's process: what it says, and that it ends with its server."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ZODB.FileStorage import FileStorage

from zeolith.storage import packer
from zeolith.storage.filestore import FileStore
from zeolith.storage.packer import Progress
from zeolith.storage.tids import tid_at

from .transactions import ROOT, A, plain, references, store
from .transactions import transaction as transaction_of

WAIT_S = 30


class Talk:
    """The server's end of the talk."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "zeolith.storage.packer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def say(self, **fields: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(fields) + "\n")
        self.process.stdin.flush()

    def report(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        while True:
            said: dict[str, Any] = json.loads(self.process.stdout.readline())
            if "phase" not in said:
                return said


@pytest.fixture
def talk() -> Iterator[Talk]:
    talk = Talk()
    with talk.process:
        yield talk
        talk.process.kill()


@pytest.fixture
def path(tmp_path) -> Path:
    """A Data.fs with an old revision and a current one."""
    database = FileStore("main", str(tmp_path / "Data.fs"))
    for_root, for_a = store(ROOT, plain("old" * 100)), store(A, plain(1))
    database.vote(transaction_of(for_root, for_a))
    tid = database.finish().tid
    database.vote(transaction_of(store(ROOT, references(A), tid)))
    database.finish()
    database.close()
    return tmp_path / "Data.fs"


def job(path: Path, **others: Any) -> dict[str, Any]:
    return {
        "path": str(path),
        "stop": tid_at(time.time() + 1).hex(),
        "gc": True,
        "end": path.stat().st_size,
        "blobs": False,
        **others,
    }


def test_a_job_and_its_orders(talk, path):
    end = path.stat().st_size
    talk.say(**job(path))
    report = talk.report()
    assert report["copied"] == end
    assert report["changed"] == ""
    talk.say(end=end, save_index=True, urgent=False)
    assert talk.report() == report
    talk.say(end=end, save_index=False, urgent=True)
    assert talk.report() == report
    new = path.with_name("Data.fs.pack")
    assert new.stat().st_size == report["size"] < end
    path.with_name("Data.fs.pack.index").rename(new.with_name("Data.fs.pack.index_"))
    new.rename(path)
    path.with_name("Data.fs.pack.index_").rename(path.with_name("Data.fs.index"))
    storage = FileStorage(str(path))
    assert storage._used_index
    assert storage.load(A)[0] == plain(1)
    storage.close()


def test_nothing_to_do_is_said(talk, path):
    talk.say(**job(path, stop=tid_at(1_000_000_000).hex()))
    assert "nothing" in talk.report()


def test_an_error_is_said_with_its_number(talk, path):
    path.with_name("Data.fs.pack").mkdir()
    talk.say(**job(path))
    report = talk.report()
    assert report == {"error": "Is a directory", "errno": 21}


def test_damage_is_said(talk, path):
    content = bytearray(path.read_bytes())
    content[4 + 16] = ord("x")
    path.write_bytes(content)
    talk.say(**job(path))
    assert "invalid transaction status" in talk.report()["error"]


def test_it_ends_with_its_server(talk, path):
    talk.say(**job(path))
    talk.report()
    talk.process.stdin.close()
    assert talk.process.wait(WAIT_S) == 0


def test_progress_only_grows_and_is_not_said_all_the_time(monkeypatch):
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(packer, "say", lambda **fields: said.append(fields))
    now = iter([100.0, 100.1, 101.0, 102.0, 103.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    progress = Progress()
    progress.at("reading", 50, 100, 50)
    progress.at("reading", 60, 100, 60)
    progress.at("copying", 0, 100, 0)
    progress.at("reading", 99, 100, 99)
    progress.at("catching up", 0, 0, 0)
    assert [each["fraction"] for each in said] == [0.15, 0.5, 0.5, 1.0]
