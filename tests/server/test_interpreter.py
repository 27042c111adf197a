import subprocess
import sys

PROGRAM = """
import gc, sys
from zeolith.server.interpreter import SWITCH_INTERVAL_S, share_interpreter

def collections(work):
    before = sum(each["collections"] for each in gc.get_stats()[1:])
    work()
    return sum(each["collections"] for each in gc.get_stats()[1:]) - before

def vote():
    return [["store", bytes(8), bytes(8), b""] for _ in range(100_000)]

class Cycle:
    pass

def leak():
    for _ in range(200_000):
        cycle = Cycle()
        cycle.itself = cycle

def cycles():
    return sum(type(each) is Cycle for each in gc.get_objects())

without = collections(vote)
assert without > 10, without
share_interpreter()
assert abs(sys.getswitchinterval() - SWITCH_INTERVAL_S) < 1e-6
assert gc.get_freeze_count() > 1000
with_it = collections(vote)
assert with_it <= 2, with_it
# Garbage is still found.
leak()
assert cycles() < 100_000, cycles()
"""


def test_a_large_vote_does_not_stop_everything_to_look_for_garbage():
    # In a process of its own, for it is meant for all of it.
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
