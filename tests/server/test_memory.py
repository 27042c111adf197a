import subprocess
import sys

PROGRAM = """
from zeolith.server.memory import MAPPED_BYTES, keep_freed_memory

def faults():
    with open("/proc/self/stat") as file:
        return int(file.read().rpartition(")")[2].split()[7])

def churn():
    before = faults()
    for _ in range(100):
        buffers = [bytearray(MAPPED_BYTES // 4) for _ in range(12)]
        del buffers
    return faults() - before

without = churn()
assert keep_freed_memory()
churn()
assert churn() < without / 2, without
"""


def test_buffers_are_made_of_memory_that_was_used_before():
    # In a process of its own, for it cannot be taken back.
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
