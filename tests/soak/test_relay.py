"""Programs at a server and at a relay of it share one Data.fs."""

import time
from pathlib import Path

import pytest

from ..support.banking import Bank
from ..support.serving import ServerProcess
from ..support.waiting import wait_until

PROGRAMS = 4


def relay_of(server: ServerProcess, folder: Path) -> ServerProcess:
    folder.mkdir()
    host, port = server.address
    section = f"<upstream 1>\nserver {host}:{port}\nwait-timeout 10\n</upstream>\n"
    return ServerProcess(folder, storages=f"%import zeolith.client.upstream\n{section}")


def wait_for(time_s: float) -> None:
    end = time.monotonic() + time_s
    wait_until(lambda: time.monotonic() > end, "the end", 2 * time_s)


@pytest.mark.parametrize(
    ("objects", "time_s"),
    [
        pytest.param(1_000, 1, id="short"),
        pytest.param(
            50_000, 60, id="long", marks=[pytest.mark.slow, pytest.mark.timeout(300)]
        ),
    ],
)
def test_programs_here_and_behind_a_relay_share_a_data_fs(
    tmp_path: Path, objects: int, time_s: float
):
    bank = Bank(tmp_path, programs=PROGRAMS, threads=2)
    bank.make(tmp_path / "Data.fs", objects)
    with ServerProcess(tmp_path) as server:
        with (
            relay_of(server, tmp_path / "relay") as relay,
            bank.open(server.address, relay.address),
        ):
            bank.wait_for_commits(1, "at the beginning")
            wait_for(time_s)
            bank.wait_for_commits(1, "at the end")
        server.terminate()
        assert "Traceback" not in server.stderr_text() + relay.stderr_text()
    judged = bank.judge(tmp_path / "Data.fs")
    print({**bank.counts, **judged})
    assert not bank.complaints()
    assert judged["committed"] == judged["transactions"]
    # Nobody was ever cut off, so there is nothing that nobody knows.
    assert "disconnects" not in bank.counts
    assert "unknown" not in judged
    assert bank.counts["conflicts"] > 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_books_balance_whoever_is_killed(tmp_path: Path):
    """In turn the server and the relay die in the middle of everything."""
    bank = Bank(tmp_path, programs=PROGRAMS, threads=2)
    bank.make(tmp_path / "Data.fs", 2_000)
    with ServerProcess(tmp_path) as server:
        with (
            relay_of(server, tmp_path / "relay") as relay,
            bank.open(server.address, relay.address),
        ):
            for victim in (server, relay) * 5:
                bank.wait_for_commits(5, "before somebody is killed")
                victim.kill()
                victim.start()
            bank.wait_for_commits(5, "at the end")
        assert "Traceback" not in server.stderr_text() + relay.stderr_text()
    judged = bank.judge(tmp_path / "Data.fs")
    print({**bank.counts, **judged})
    assert not bank.complaints()
    # What is in the file beyond the acknowledged is what nobody knew of.
    strange = judged["transactions"] - judged["committed"]
    assert 0 <= strange <= judged.get("unknown", 0)
    assert bank.counts["disconnects"] > 0
