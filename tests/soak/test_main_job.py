"""What zeolith is for: one Data.fs, four programs that read and write it at once."""

import time
from pathlib import Path

import pytest

from zeolith.client.storage import ClientStorage

from ..support.banking import Bank
from ..support.serving import ServerProcess
from ..support.waiting import wait_until

PROGRAMS = 4


def counters_of(server: ServerProcess) -> dict[str, int]:
    storage = ClientStorage(server.address, read_only=True)
    try:
        counters: dict[str, int] = storage.server_status()["storages"]["1"]["counters"]
        return counters
    finally:
        storage.close()


@pytest.mark.parametrize(
    ("objects", "time_s"),
    [
        pytest.param(2_000, 3, id="short"),
        pytest.param(
            100_000, 60, id="long", marks=[pytest.mark.slow, pytest.mark.timeout(300)]
        ),
    ],
)
def test_four_programs_share_a_data_fs(tmp_path: Path, objects: int, time_s: float):
    bank = Bank(tmp_path, programs=PROGRAMS, threads=2)
    data = tmp_path / "Data.fs"
    bank.make(data, objects)
    with ServerProcess(tmp_path) as server:
        with bank.open(server.address):
            bank.wait_for_commits(1, "at the beginning")
            end = time.monotonic() + time_s
            wait_until(lambda: time.monotonic() > end, "the end", 2 * time_s)
            bank.wait_for_commits(1, "at the end")
        counters = counters_of(server)
        server.terminate()
        assert "Traceback" not in server.stderr_text()
    judged = bank.judge(data)
    print({**bank.counts, **judged, "resolved": counters["conflicts_resolved"]})
    assert not bank.complaints()
    assert judged["objects"] > objects
    assert judged["committed"] == judged["transactions"]
    # Nobody was ever cut off, so there is nothing that nobody knows.
    assert "disconnects" not in bank.counts
    assert "unknown" not in judged
    assert counters["commits"] == judged["committed"]
    assert counters["conflicts_resolved"] > 0
    assert bank.counts["conflicts"] > 0
    assert bank.counts["snapshots"] >= judged["committed"]
