"""What processes have cost the machine so far, as the kernel counts it.

Processor time comes from the clocks of the processes, which are exact; how it divides
into user and system comes from their statistics, which count in hundredths of a
second. Linux only.
"""

import os
import resource
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Cost:
    """Processor time, and how often a thread went to sleep until something came."""

    cpu_s: float = 0.0
    user_s: float = 0.0
    system_s: float = 0.0
    voluntary_switches: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.cpu_s + other.cpu_s,
            self.user_s + other.user_s,
            self.system_s + other.system_s,
            self.voluntary_switches + other.voluntary_switches,
        )

    def since(self, earlier: "Cost") -> "Cost":
        """What was added to ``earlier``."""
        return Cost(
            self.cpu_s - earlier.cpu_s,
            self.user_s - earlier.user_s,
            self.system_s - earlier.system_s,
            self.voluntary_switches - earlier.voluntary_switches,
        )


def own() -> Cost:
    """The cost of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    user_s, system_s = usage.ru_utime, usage.ru_stime
    return Cost(user_s + system_s, user_s, system_s, usage.ru_nvcsw)


def of_family(pid: int) -> Cost:
    """The cost of a process and of its descendants, those included that have ended."""
    total = Cost()
    for each in family(pid):
        with suppress(OSError):
            total += _of_process(each)
    user_s, system_s = _seconds(pid, 15, 16)
    # A child that has ended counts where its parent waited for it.
    return total + Cost(user_s + system_s, user_s, system_s)


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for parent in found:
        for thread in _threads(parent):
            with suppress(OSError):
                found += map(int, (thread / "children").read_text().split())
    return found


def keep_to(pids: Iterable[int], cores: set[int]) -> None:
    """Let every thread of some processes run on ``cores`` only."""
    for pid in pids:
        for thread in _threads(pid):
            with suppress(OSError):
                os.sched_setaffinity(int(thread.name), cores)


def memory_bytes(pids: Iterable[int]) -> int:
    """Memory of some processes; a page that n processes share counts 1/n for each."""
    total = 0
    for pid in pids:
        lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()
        (kilobytes,) = (line.split()[1] for line in lines if line.startswith("Pss:"))
        total += int(kilobytes) * 1024
    return total


def _of_process(pid: int) -> Cost:
    user_s, system_s = _seconds(pid, 13, 14)
    # The clock of another process, as clock_getcpuclockid(3) numbers it.
    cpu_s = time.clock_gettime((~pid << 3) | 2)
    return Cost(cpu_s, user_s, system_s, sum(map(_switches, _threads(pid))))


def _threads(pid: int) -> list[Path]:
    with suppress(OSError):
        return list((_PROC / str(pid) / "task").iterdir())
    return []


def _switches(thread: Path) -> int:
    with suppress(OSError):
        for line in (thread / "status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                return int(line.split()[1])
    return 0


def _seconds(pid: int, *fields: int) -> tuple[float, ...]:
    # The name, which is the second field, may have spaces in it.
    after_name = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return tuple(int(after_name[field - 2]) / _TICKS_PER_S for field in fields)
