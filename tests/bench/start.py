"""How long a server takes to start, and how much memory it has then.

    python -m tests.bench.start --objects 1000000

A Data.fs of so many objects is opened with its whole index, with one that is a little
older than the file (as after a crash), and without one: by ``zeolith serve``, until it
is ready, and by a process that does nothing but open a FileStorage of plain ZODB, until
it is open. Both times begin with the process. Peers and indexes take turns in every
round, the file is in the page cache, and the figures are medians.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage.FileStorage import FileStorage
from ZODB.utils import p64, z64

from .dataset import payload

OBJECTS_PER_TRANSACTION = 100
# Of the log, not in the stale index: as much as the server leaves unsaved for ever.
STALE_BYTES = 10 * 1000**2

OPEN_FILE_STORAGE = """\
import sys
from ZODB.FileStorage.FileStorage import FileStorage
storage = FileStorage(sys.argv[1])
print("ready", flush=True)
sys.stdin.read()
"""
CASES = ("whole index", "index 10 MB behind", "no index")


@click.command()
@click.option("--objects", default=1_000_000, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--directory", type=click.Path(path_type=Path), help="Where the data is.")
def main(objects: int, rounds: int, directory: Path | None) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory(dir=directory) as name:
        folder = Path(name)
        make(folder, objects)
        size_mb = (folder / "Data.fs").stat().st_size / 10**6
        print(f"{objects:,} objects, {size_mb:,.0f} MB, {rounds} rounds")
        print("| | FileStorage, s | zeolith, s | FileStorage, MB | zeolith, MB |")
        print("| --- | ---: | ---: | ---: | ---: |")
        found = [[started(folder, case) for case in CASES] for _ in range(rounds)]
        for case, *of_rounds in zip(CASES, *found, strict=True):
            figures = [statistics.median(each) for each in zip(*of_rounds, strict=True)]
            seconds, megabytes = figures[0::2], figures[1::2]
            cells = [f"{each:.2f}" for each in seconds]
            cells += [f"{each:.0f}" for each in megabytes]
            print(f"| {case} | {' | '.join(cells)} |", flush=True)


def make(folder: Path, objects: int) -> None:
    """Write the file, and the two indexes under names of their own."""
    path = folder / "Data.fs"
    storage = FileStorage(str(path))
    record_bytes = 42 + len(payload())
    fresh = max(1, min(objects // 2, STALE_BYTES // record_bytes))
    insert(storage, range(1, objects - fresh + 1))
    storage.close()
    shutil.copy(f"{path}.index", folder / CASES[1])
    storage = FileStorage(str(path))
    insert(storage, range(objects - fresh + 1, objects + 1))
    storage.close()
    shutil.copy(f"{path}.index", folder / CASES[0])
    # Or a sync of whoever is measured would wait for these.
    os.sync()


def insert(storage: FileStorage, oids: range) -> None:
    """Commit new objects, some in a transaction."""
    for first in range(0, len(oids), OBJECTS_PER_TRANSACTION):
        transaction = TransactionMetaData()
        storage.tpc_begin(transaction)
        for oid in oids[first : first + OBJECTS_PER_TRANSACTION]:
            storage.store(p64(oid), z64, payload(), "", transaction)
        storage.tpc_vote(transaction)
        storage.tpc_finish(transaction)


def started(folder: Path, case: str) -> tuple[float, float, float, float]:
    """Seconds and megabytes of FileStorage, seconds and megabytes of the server."""
    path = str(folder / "Data.fs")
    serve = ["-m", "zeolith.server", "serve", "--address", "127.0.0.1:0"]
    figures: list[float] = []
    for arguments in (["-c", OPEN_FILE_STORAGE, path], [*serve, "--path", path]):
        Path(f"{path}.index").unlink(missing_ok=True)
        if (folder / case).exists():
            shutil.copy(folder / case, f"{path}.index")
        with ready([sys.executable, *arguments]) as (took_s, process):
            figures += [took_s, memory_mb(process.pid)]
    return figures[0], figures[1], figures[2], figures[3]


@contextmanager
def ready(command: list[str]) -> Iterator[tuple[float, subprocess.Popen[str]]]:
    """A process that has said that it is ready, and how long it took."""
    began = time.monotonic()
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line == "ready\n":
                    break
            else:
                raise RuntimeError(process.stderr.read() if process.stderr else "")
            yield time.monotonic() - began, process
        finally:
            process.kill()


def memory_mb(pid: int) -> float:
    """The resident set of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 10**6
    raise RuntimeError("the process has no memory")


if __name__ == "__main__":
    main()
