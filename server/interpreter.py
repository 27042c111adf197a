"""How the interpreter is set up for a loop that shares it with threads.

Called once, by the daemon, when the databases are open and before the loop runs. The
defaults of Python are for programs that want most of it done; the server wants that
what takes microseconds, a load, need not wait for what takes seconds, a large vote.
"""

import gc
import sys

# How long a thread that computes keeps the interpreter when the loop wants it; 5 ms is
# the default. A load may need it three times. While a vote of 100,000 objects went
# on, a tenth of them took 3-6 ms; with this it is less than 2, and the vote takes as
# long.
SWITCH_INTERVAL_S = 0.0005
# The operations of a large vote are hundreds of thousands of lists, and none of them is
# in a cycle. With the default of 700 they were all looked at six times, for 5-30 ms
# each, in which nothing else runs; with this, never.
ALLOCATIONS_BETWEEN_COLLECTIONS = 10_000


def share_interpreter() -> None:
    """Let the loop have the interpreter soon, and nobody hold it for long."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.set_threshold(ALLOCATIONS_BETWEEN_COLLECTIONS, *gc.get_threshold()[1:])
    # What there is now, modules and databases, stays: it need not be looked at again.
    gc.collect()
    gc.freeze()
