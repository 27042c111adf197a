"""Servers that are killed and connections that are cut, while programs commit.

Whatever happens, what a program was told of a commit is true: committed is in the
file, refused is not, nothing is there in part, and unknown is told only when nobody
can know.
"""

import random
from pathlib import Path

import pytest

from ..support.banking import Bank
from ..support.proxy import Direction, Proxy, proxied
from ..support.serving import ServerProcess

OBJECTS = 500
# More than a few commits take, so that a cut hits one of several.
CUT_BYTES_MAX = 20_000


def few_or_many(few: int, many: int) -> pytest.MarkDecorator:
    marks = [pytest.mark.slow, pytest.mark.timeout(600)]
    times = [pytest.param(few, id="few"), pytest.param(many, id="many", marks=marks)]
    return pytest.mark.parametrize("times", times)


@few_or_many(3, 40)
def test_a_killed_server_loses_no_acknowledged_commit(tmp_path: Path, times: int):
    bank = Bank(tmp_path, programs=2, threads=2)
    bank.make(tmp_path / "Data.fs", OBJECTS)
    with ServerProcess(tmp_path) as server:
        with bank.open(server.address):
            bank.wait_for_commits(1, "before a kill")
            for number in range(times):
                server.kill()
                server.restart()
                # The same programs with the same storages: they reconnect alone.
                bank.wait_for_commits(1, f"after kill {number}")
        server.terminate()
    check(bank, tmp_path / "Data.fs", "`kill -9` of the server", times)
    # A kill between two commits is nothing that a program notices.
    assert bank.counts["disconnects"] >= times // 5
    # The next server knows what became of everything.
    assert "unknown" not in bank.counts


@few_or_many(10, 300)
def test_a_cut_connection_tells_no_lie(tmp_path: Path, times: int):
    bank = Bank(tmp_path, programs=2, threads=2)
    bank.make(tmp_path / "Data.fs", OBJECTS)
    chance = random.Random(times)
    with ServerProcess(tmp_path) as server, proxied(server.address) as proxy:
        with bank.open(proxy.address):
            bank.wait_for_commits(1, "before a cut")
            for number in range(times):
                cut(proxy, chance)
                bank.wait_for_commits(1, f"after cut {number}")
        server.terminate()
        assert "Traceback" not in server.stderr_text()
    check(
        bank, tmp_path / "Data.fs", "connections cut after any number of bytes", times
    )
    # The server was always there to be asked.
    assert "unknown" not in bank.counts


@few_or_many(3, 40)
def test_cuts_and_kills_together_tell_no_lie(tmp_path: Path, times: int):
    bank = Bank(tmp_path, programs=2, threads=2)
    bank.make(tmp_path / "Data.fs", OBJECTS)
    chance = random.Random(times)
    with ServerProcess(tmp_path) as server, proxied(server.address) as proxy:
        with bank.open(proxy.address):
            bank.wait_for_commits(1, "before a cut")
            for number in range(times):
                cut(proxy, chance)
                server.kill()
                server.restart()
                bank.wait_for_commits(1, f"after kill {number}")
        server.terminate()
    check(bank, tmp_path / "Data.fs", "both", times)


def cut(proxy: Proxy, chance: random.Random) -> None:
    """Cut all connections after some bytes more, wherever in a message that is."""
    way = chance.choice(list(Direction))
    proxy.cut_after(chance.randrange(CUT_BYTES_MAX), way)
    assert proxy.was_cut.wait(30), "nobody sends anything any more"


def check(bank: Bank, data: Path, fault: str, times: int) -> None:
    bank.conclude(data, fault, times)
    said = bank.stderr_text()
    assert not [word for word in ("Traceback", "ERROR", "CRITICAL") if word in said]
