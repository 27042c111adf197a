"""What processes cost, as the kernel counts it."""

import mmap
import os
import subprocess
import sys
import time

import pytest

from . import costs
from .costs import Cost

# Has a child that computes until it is told to end, and waits for it.
PARENT = """
import os, sys, time
child = os.fork()
if child == 0:
    ended = time.process_time() + 0.2
    while time.process_time() < ended:
        pass
    print("computed", flush=True)
    sys.stdin.read()
    os._exit(0)
os.waitpid(child, 0)
print("waited", flush=True)
time.sleep(60)
"""


def test_costs_are_added_and_taken_off():
    one = Cost(1.0, 0.75, 0.25, 3)

    assert one + one == Cost(2.0, 1.5, 0.5, 6)
    assert (one + one).since(one) == one


def test_our_own_processor_time_is_counted():
    before = costs.own()
    ended_s = time.process_time() + 0.05
    while time.process_time() < ended_s:
        pass

    assert costs.own().since(before).cpu_s >= 0.04


def test_a_child_counts_while_it_runs_and_after_it_has_ended():
    with subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        assert parent.stdout.readline() == "computed\n"
        assert len(costs.family(parent.pid)) == 2
        running = costs.of_family(parent.pid)
        parent.stdin.close()
        assert parent.stdout.readline() == "waited\n"
        ended = costs.of_family(parent.pid)
        assert costs.family(parent.pid) == [parent.pid]
        parent.kill()

    assert running.cpu_s >= 0.2
    # What has ended is counted in hundredths of a second.
    assert ended.cpu_s >= 0.18


def test_memory_grows_with_what_is_held():
    noise = os.urandom(20_000_000)
    before_bytes = costs.memory_bytes([os.getpid()])
    # Not of what an earlier test has let go.
    with mmap.mmap(-1, 20_000_000, mmap.MAP_PRIVATE) as held:
        held.write(noise)
        grown_bytes = costs.memory_bytes([os.getpid()]) - before_bytes
        assert grown_bytes == pytest.approx(len(held), rel=0.5)
