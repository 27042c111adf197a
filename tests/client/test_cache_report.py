"""What a process of its own tells of a cache file."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import lmdb
import pytest
from persistent.TimeStamp import TimeStamp
from ZODB.utils import p64

from zeolith.client import cache_report
from zeolith.client.cache_inspection import DamagedFile
from zeolith.client.cache_report import examine, findings, summary
from zeolith.client.tids import MAX_TID

from ..support.cache_files import IDENTITY, damaging, revision, written

ORDER = b"\x80\x03cshop.models\nOrder\n." + b"\x80\x03N."
BUCKET = b"\x80\x03cBTrees.OOBTree\nOOBucket\n." + b"\x80\x03N." * 50


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(
        tmp_path,
        through=20,
        revisions=[
            *(revision(oid, 10, None, ORDER, 20) for oid in range(5)),
            *(revision(oid, 15, None, BUCKET, 20) for oid in range(5, 8)),
            revision(9, 2, 12, ORDER, 20),
        ],
    )


def test_a_summary_counts_by_class_and_imports_none(path):
    told = summary(path)
    assert told["classes"] == {
        "BTrees.OOBTree.OOBucket": {"revisions": 3, "data_bytes": 3 * len(BUCKET)},
        "shop.models.Order": {"revisions": 6, "data_bytes": 6 * len(ORDER)},
    }
    assert next(iter(told["classes"])) == "BTrees.OOBTree.OOBucket"
    assert (told["revisions"], told["open"]) == (9, 8)
    assert told["data_bytes"] == 3 * len(BUCKET) + 6 * len(ORDER)
    assert (told["database_id"], told["epoch"]) == (IDENTITY.database_id.hex(), 1)
    assert told["file_bytes"] == os.path.getsize(path) >= told["used_bytes"] > 0
    assert told["oldest"]["tid"] == p64(2).hex()
    assert told["newest"]["tid"] == p64(15).hex()
    assert told["valid_through"]["tid"] == p64(20).hex()
    assert told["pids"] == []
    assert json.loads(json.dumps(told)) == told
    assert not any(name.startswith("shop") for name in sys.modules)


def test_the_time_of_a_tid_is_told(tmp_path):
    tid = TimeStamp(2026, 11, 21, 10, 20, 30.5).raw()
    path = written(tmp_path, through=int.from_bytes(tid, "big"), revisions=[])
    told = summary(path)
    assert told["valid_through"] == {
        "tid": tid.hex(),
        "time": "2026-11-21 10:20:30 UTC",
    }
    assert told["oldest"] is told["newest"] is None


def test_the_strangest_tid_has_a_time(tmp_path):
    path = written(tmp_path, through=int.from_bytes(MAX_TID, "big"), revisions=[])
    assert summary(path)["valid_through"]["tid"] == MAX_TID.hex()


def test_another_process_tells_the_same(path):
    assert examine("summary", path) == summary(path)
    assert examine("findings", path) == []


def test_too_many_findings_are_cut_off(path, monkeypatch):
    with damaging(path) as (txn, dbs):
        txn.drop(dbs["order"], delete=False)
    assert len(findings(path)) == 9
    monkeypatch.setattr(cache_report, "FINDINGS_MAX", 4)
    assert len(findings(path)) == 5
    assert findings(path)[-1] == "and there is more"


def test_what_cannot_be_read_is_a_finding_and_no_summary(path):
    path.write_bytes(b"")
    assert examine("findings", path) == ["it is empty"]
    with pytest.raises(DamagedFile, match=r"^it is empty$"):
        examine("summary", path)


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(DamagedFile, match=r"^No such file or directory$"):
        examine("summary", tmp_path / f"{'0d' * 16}-1.lmdb")


def test_a_signal_is_a_finding(path, monkeypatch):
    """As a damaged page may end in one."""
    run = subprocess.run

    def killed(_command, **options):
        kill = f"import os; os.kill(os.getpid(), {int(signal.SIGBUS)})"
        return run([sys.executable, "-c", kill], **options)

    monkeypatch.setattr(subprocess, "run", killed)
    with pytest.raises(DamagedFile, match="to read it ends with SIGBUS"):
        examine("findings", path)


def test_overwritten_pages_are_told_whatever_they_do(path):
    data = bytearray(path.read_bytes())
    for start in range(8192, len(data), 4096):
        data[start : start + 4096] = b"\xff" * 4096
    path.write_bytes(data)
    with suppress(DamagedFile):
        assert examine("findings", path)


@pytest.mark.parametrize("error", [DamagedFile, lmdb.Error, OSError])
def test_the_process_tells_an_error_in_a_line(path, monkeypatch, error):
    def fail(_path: Path) -> None:
        raise error("something is wrong")

    monkeypatch.setitem(cache_report._LOOKS, "summary", fail)
    monkeypatch.setattr(sys, "argv", ["cache_report", "summary", str(path)])
    with pytest.raises(SystemExit) as caught:
        cache_report.main()
    assert caught.value.code == "something is wrong"
