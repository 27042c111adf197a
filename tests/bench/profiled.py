"""Runs a module as a program that two signals profile: one starts, one ends it.

Run by path: ``python -P profiled.py FILE MODULE ARGUMENT...``. The profile is of the
main thread, which is where a server's loop is. While it does not run, it costs
nothing. FILE is there when the profile is complete, FILE.began when it has begun.
"""

import cProfile
import os
import runpy
import signal
import sys

BEGIN, END = signal.SIGRTMIN + 1, signal.SIGRTMIN + 2


def main() -> None:
    """Take what is ours off the command line, and become the module."""
    file, module = sys.argv[1:3]
    sys.argv[:] = sys.argv[2:]
    profile = cProfile.Profile()

    def begin(*_signal: object) -> None:
        with open(f"{file}.began", "w"):
            profile.enable()

    def end(*_signal: object) -> None:
        profile.disable()
        profile.dump_stats(f"{file}.part")
        os.replace(f"{file}.part", file)

    signal.signal(BEGIN, begin)
    signal.signal(END, end)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
