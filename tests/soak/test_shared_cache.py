"""Programs that share a cache on disk and are killed, while they commit.

None of them sees a stale or a torn object: the books of the bank balance in every
snapshot, whoever is killed in the middle of a write to the cache. ``SHARED_CACHE_S``
says for how long (seconds), ``SHARED_CACHE_SEED`` who is killed when.
"""

import os
import random
import time
from pathlib import Path

import pytest

from ..support.banking import Bank
from ..support.serving import ServerProcess

OBJECTS = 500
PROGRAMS = 8
# Two of them are killed again and again.
MORTALS = 2
DURATION_S = float(os.environ.get("SHARED_CACHE_S", "60"))


@pytest.mark.parametrize(
    "duration_s",
    [
        pytest.param(2, id="short"),
        pytest.param(
            DURATION_S,
            id="long",
            marks=[pytest.mark.slow, pytest.mark.timeout(DURATION_S + 300)],
        ),
    ],
)
def test_programs_that_share_a_cache_and_are_killed_see_nothing_wrong(
    tmp_path: Path, duration_s: float
):
    seed = int(os.environ.get("SHARED_CACHE_SEED") or random.randrange(10**6))
    print("seed", seed)
    chance = random.Random(seed)
    programs = PROGRAMS if duration_s > 10 else 4
    bank = Bank(tmp_path, programs=programs, threads=1, cache=tmp_path / "cache")
    bank.make(tmp_path / "Data.fs", OBJECTS)
    with ServerProcess(tmp_path) as server:
        with bank.open(server.address):
            bank.wait_for_commits(1, "before a kill")
            end = time.monotonic() + duration_s
            number = 0
            while time.monotonic() < end or number < 3:
                # Not as a synchronisation: a kill comes at any moment.
                time.sleep(chance.uniform(0.02, 0.5))
                bank.kill(chance.randrange(MORTALS))
                number += 1
                if number % 8 == 3:
                    server.kill()
                    server.restart()
                if number % 4 == 0:
                    bank.wait_for_commits(1, f"after kill {number}")
        server.terminate()
    judged = bank.judge(tmp_path / "Data.fs")
    print({**bank.counts, **judged, "kills": number})
    assert not bank.complaints()
    said = bank.stderr_text()
    assert not [word for word in ("Traceback", "CRITICAL") if word in said], said
    assert bank.counts["errors"] == 0, said
    assert bank.counts["hits"] > bank.counts["misses"] / 2, "the cache is of no use"
    assert bank.counts["aside"] == 0, said
