"""Where the time goes: what one operation of a row costs server and clients.

Each row is run up to three times, with a server of its own each: once with nothing
but the kernel's own counts, once below strace, which counts system calls and slows
everything down, and once with the server below cProfile, which does the same.
"""

import os
import pstats
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import costs, profiled, table
from .crews import Measured
from .rows import Scale, Trial
from .servers import PROFILED, Observer, Running, title

FUNCTIONS_SHOWN = 15
CALLS_SHOWN = 6
CALLS = "system calls of the server"
# How long a program that looks at a server may take to begin or to end.
TOOL_S = 30

# A fresh server of a peer, below cProfile if a file is given.
Fresh = Callable[[str, Path | None], AbstractContextManager[Running]]


@dataclass(frozen=True, slots=True)
class Profile:
    """One row of one peer: figures by title, and functions by their own time."""

    figures: dict[str, str]
    functions: list[tuple[str, ...]] = field(default_factory=list)


def markdown(
    trial: Trial, peers: list[str], scale: Scale, fresh: Fresh, folder: Path
) -> str:
    """Tables of what the operations of ``trial`` cost."""
    found = {
        peer: _profile(trial, peer, scale, fresh, folder / f"{peer}.profile")
        for peer in peers
        if peer in trial.peers
    }
    lines = [f"### {', '.join(row.title for row in trial.rows)}", ""]
    names = list(dict.fromkeys(key for each in found.values() for key in each.figures))
    cells = [["per operation", *map(title, found)]]
    for name in names:
        cells.append([name, *(each.figures.get(name, "-") for each in found.values())])
    lines.append(table.aligned(cells, words=1))
    for peer, each in found.items():
        if each.functions:
            header = f"{title(peer)}'s loop, below cProfile", "own time", "us", "calls"
            lines += ["", table.aligned([header, *each.functions], words=1)]
    return "\n".join(lines)


def _profile(
    trial: Trial, peer: str, scale: Scale, fresh: Fresh, file: Path
) -> Profile:
    with fresh(peer, None) as running:
        looking = _Looking()
        trial.run(replace(running, observer=looking), scale)
    figures = _per_operation(looking.measured)
    if running.process is None:
        return Profile(figures)
    if shutil.which("strace"):
        with fresh(peer, None) as running:
            tracing = _Tracing(file.with_suffix(".strace"))
            trial.run(replace(running, observer=tracing), scale)
        figures |= _calls_per_operation(tracing.calls(), tracing.measured)
    else:
        figures[CALLS] = "no strace here"
    if peer not in PROFILED:
        return Profile(figures)
    with fresh(peer, file) as running:
        sampling = _Sampling(file)
        trial.run(replace(running, observer=sampling), scale)
    return Profile(figures, _functions(file, sampling.measured.work.operations))


def _per_operation(measured: Measured) -> dict[str, str]:
    count = measured.work.operations
    found: dict[str, str] = {}
    for who, cost in (("server", measured.server), ("clients", measured.clients)):
        found |= {
            f"CPU of the {who}, us": f"{cost.cpu_s / count * 1e6:.1f}",
            f"- {who}, user": f"{cost.user_s / count * 1e6:.1f}",
            f"- {who}, system": f"{cost.system_s / count * 1e6:.1f}",
            f"voluntary switches of the {who}": (
                f"{cost.voluntary_switches / count:.2f}"
            ),
        }
    return found


def _calls_per_operation(calls: dict[str, int], measured: Measured) -> dict[str, str]:
    count = measured.work.operations
    if not calls:
        return {CALLS: "strace saw none"}
    often = sorted(calls.items(), key=lambda each: -each[1])[:CALLS_SHOWN]
    found = {CALLS: f"{sum(calls.values()) / count:.2f}"}
    for name, number in often:
        if number / count >= 0.01:
            found[f"- {name}"] = f"{number / count:.2f}"
    return found


def _functions(file: Path, operations: int) -> list[tuple[str, ...]]:
    """The name, own time as a share, and own time and calls per operation."""
    # What pstats has: (file, line, name) -> (_, calls, own time, _, _).
    stats = pstats.Stats(str(file)).stats  # type: ignore[attr-defined]
    total_s = sum(each[2] for each in stats.values()) or 1.0
    found: list[tuple[str, ...]] = []
    for where, each in sorted(stats.items(), key=lambda pair: -pair[1][2]):
        calls, own_s = each[1], each[2]
        shares = f"{own_s / total_s:.1%}", f"{own_s / operations * 1e6:.1f}"
        found.append((_name(*where), *shares, f"{calls / operations:.2f}"))
    return found[:FUNCTIONS_SHOWN]


def _name(file: str, line: int, name: str) -> str:
    if file == "~":
        return f"`{name}`"
    return f"`{'/'.join(Path(file).parts[-2:])}:{line} {name}`"


class _Looking(Observer):
    """Remembers the last that was measured."""

    def __init__(self) -> None:
        self._measured: Measured | None = None

    @property
    def measured(self) -> Measured:
        """What the last crew did.

        Raises:
            ValueError: There was none.
        """
        if self._measured is None:
            raise ValueError("nothing was measured")
        return self._measured

    def saw(self, measured: Measured) -> None:
        self._measured = measured


class _Tracing(_Looking):
    """Has strace count the system calls of the server."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    @contextmanager
    def watch(self, running: Running) -> Iterator[None]:
        assert running.process is not None
        pids = costs.family(running.process.pid)
        command = ["strace", "-c", "-f", "-o", str(self._file)]
        command += [f"--attach={pid}" for pid in pids]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
            assert strace.stderr is not None
            for _pid in pids:
                # It says of each process that it is attached.
                strace.stderr.readline()
            try:
                yield
            finally:
                strace.send_signal(signal.SIGINT)
                strace.communicate(timeout=TOOL_S)

    def calls(self) -> dict[str, int]:
        """How many calls were counted, by name; none if strace was not allowed to."""
        return parsed_calls(self._file.read_text()) if self._file.exists() else {}


def parsed_calls(text: str) -> dict[str, int]:
    """The calls by name in the table that ``strace -c`` writes."""
    found = {}
    for line in text.splitlines():
        # % time, seconds, usecs/call, calls, [errors], name
        cells = line.split()
        if len(cells) in (5, 6) and cells[3].isdigit() and cells[-1] != "total":
            found[cells[-1]] = int(cells[3])
    return found


class _Sampling(_Looking):
    """Has a server that runs below cProfile begin and end its profile."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    @contextmanager
    def watch(self, running: Running) -> Iterator[None]:
        assert running.process is not None
        # A trial may have several crews; the last one counts.
        began = Path(f"{self._file}.began")
        for old in (began, self._file):
            old.unlink(missing_ok=True)
        os.kill(running.process.pid, profiled.BEGIN)
        _wait_for(began)
        try:
            yield
        finally:
            os.kill(running.process.pid, profiled.END)
            _wait_for(self._file)


def _wait_for(file: Path) -> None:
    deadline_s = time.monotonic() + TOOL_S
    while not file.exists():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"the server has not written {file.name}")
        time.sleep(0.01)
