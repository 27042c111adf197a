"""Running a bank: the Data.fs, the programs that work on it, the judgement."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .bank import COMMITTED, UNKNOWN
from .waiting import wait_until

ROOT = Path(__file__).parents[2]
END_TIMEOUT_S = 60


def run_module(name: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """A program of tests/support, a warning being an error in it."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", f"tests.support.{name}", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


class Bank:
    """A Data.fs in `folder`, and the programs that work on it."""

    def __init__(
        self,
        folder: Path,
        *,
        programs: int,
        threads: int,
        cache: Path | None = None,
        may_be_refused: bool = False,
    ):
        self._folder = folder
        # For reasons of the server's own; see `refusals`.
        self._may_be_refused = may_be_refused
        # A directory that all programs share.
        self._cache = cache
        self._addresses: tuple[tuple[str, int], ...] = ()
        self.workers = [
            [f"p{program}t{thread}" for thread in range(threads)]
            for program in range(programs)
        ]
        self._running: list[tuple[subprocess.Popen[str], IO[bytes]]] = []
        # What the programs have seen, once they have ended.
        self.counts: Counter[str] = Counter()

    def make(self, path: Path, objects: int) -> None:
        """Write the Data.fs, without zeolith."""
        names = [name for program in self.workers for name in program]
        _run_plain("make", str(path), str(objects), *names)

    def judge(self, path: Path) -> dict[str, int]:
        """Compare the Data.fs with the journals, without zeolith; returns counts."""
        counts, wrongs = self.examine(path)
        assert not wrongs, "\n".join([str(counts), *wrongs])
        return counts

    def examine(self, path: Path) -> tuple[dict[str, int], list[str]]:
        """As `judge`, but only says what is wrong: see `bank.judge`."""
        journals = map(str, self.journals())
        counts, wrongs = json.loads(_run_plain("judge", str(path), *journals))
        return counts, wrongs

    def conclude(self, path: Path, fault: str, times: int) -> dict[str, int]:
        """The end of a work with faults: a row of the table, and nothing wrong in it.

        Prints the row of docs/reliability.md; returns the counts of `bank.judge`.
        """
        counts, wrongs = self.examine(path)
        complaints = self.complaints()
        seen_wrong = len(complaints.splitlines())
        print({**self.counts, **counts})
        print_row(
            fault,
            times,
            counts.get(COMMITTED, 0),
            counts["lost"],
            counts["torn"],
            self.counts["snapshots"],
            seen_wrong,
        )
        assert not wrongs, "\n".join([str(counts), *wrongs])
        assert not complaints
        # What is in the file beyond the acknowledged is what nobody knew of.
        strange = counts["transactions"] - counts[COMMITTED]
        assert 0 <= strange <= counts.get(UNKNOWN, 0)
        return counts

    def journals(self) -> list[Path]:
        return [
            self._folder / f"{name}.journal"
            for program in self.workers
            for name in program
        ]

    def committed(self) -> list[int]:
        """How many commits each worker was told of so far."""
        return [
            # A key is acknowledged once, and this is asked all the time.
            journal.read_text().count(f"{COMMITTED} ") if journal.exists() else 0
            for journal in self.journals()
        ]

    def wait_for_commits(
        self, count: int, what: str, *, program: int | None = None
    ) -> None:
        """Wait until every worker, of one program or all, has committed so often."""
        wait_until(
            self.have_committed(count, program),
            f"{count} commits of every worker {what}",
            END_TIMEOUT_S,
        )

    def have_committed(
        self, count: int, program: int | None = None
    ) -> Callable[[], bool]:
        """Tells whether every worker has committed so many times from now on."""
        threads = len(self.workers[0])
        its = slice(None)
        if program is not None:
            its = slice(program * threads, (program + 1) * threads)
        before = self.committed()[its]

        def all_have() -> bool:
            self._check_that_all_run()
            return all(
                now >= then + count
                for now, then in zip(self.committed()[its], before, strict=True)
            )

        return all_have

    @contextmanager
    def open(self, *addresses: tuple[str, int]) -> Iterator[None]:
        """Let the programs work within a with block; they must end well.

        The first program works at the first address, and so on in turn.
        """
        self._addresses = addresses
        for number in range(len(self.workers)):
            self._running.append(self._start(number))
        try:
            yield
            (self._folder / "stop").touch()
            for program, _errors in self._running:
                self._collect(program)
        finally:
            for program, complaints in self._running:
                program.kill()
                program.communicate()
                complaints.close()

    def kill(self, number: int) -> None:
        """Kill a program, wherever it is, and begin it again."""
        program, errors = self._running[number]
        assert program.poll() is None, self.stderr_text()
        program.kill()
        program.communicate()
        errors.close()
        self._running[number] = self._start(number)

    def _start(self, number: int) -> tuple[subprocess.Popen[str], IO[bytes]]:
        host, port = self._addresses[number % len(self._addresses)]
        # Every other one has so small a cache that it forgets all the time.
        cache_bytes = 20_000_000 if number % 2 else 200_000
        if self._cache is not None:
            cache_bytes = 4_000_000
        errors = (self._folder / f"p{number}.stderr").open("ab")
        program = run_module(
            "bank_worker",
            f"{host}:{port}",
            str(self._folder),
            str(cache_bytes),
            "-" if self._cache is None else str(self._cache),
            "patient" if self._may_be_refused else "strict",
            *self.workers[number],
            stderr=errors,
        )
        return program, errors

    def complaints(self) -> str:
        """What the workers saw that may not be."""
        return "".join(
            path.read_text() for path in sorted(self._folder.glob("*.wrong"))
        )

    def refusals(self) -> Counter[str]:
        """What the server gave as the reasons why it refused, and how often."""
        return Counter(
            line
            for path in sorted(self._folder.glob("*.refusals"))
            for line in path.read_text().splitlines()
        )

    def stderr_text(self) -> str:
        return "".join(
            path.read_text() for path in sorted(self._folder.glob("p*.stderr"))
        )

    def _collect(self, program: subprocess.Popen[str]) -> None:
        said, _nothing = program.communicate(timeout=END_TIMEOUT_S)
        assert program.returncode == 0, self.stderr_text()
        self.counts.update(json.loads(said))

    def _check_that_all_run(self) -> None:
        for program, _errors in self._running:
            assert program.poll() is None, self.stderr_text()


def print_row(fault: str, *figures: int) -> None:
    """A row of the table of docs/reliability.md, on a line of its own."""
    print("\n|", " | ".join([fault, *map(str, figures)]), "|")


def _run_plain(*arguments: str) -> str:
    program = run_module("bank", *arguments, stderr=subprocess.PIPE)
    said, complained = program.communicate()
    assert program.returncode == 0, complained
    return said
