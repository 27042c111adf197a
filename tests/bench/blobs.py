"""Two uploads at once: how fast, how much memory, and what the others notice.

Run as ``python -m tests.bench.blobs``. Each peer has a server process of its own with
a blob directory. Two client processes, each with a blob cache, commit a blob of the
given size at the same moment, and then read the other's; a third client loads a record
again and again, before and meanwhile. Memory is the peak of the resident set, which
the kernel keeps, less what the process had before.

The figure is that of the whole commit, from the file in the client's temporary
directory to the answer of tpc_finish. zeolith has the blobs on the disk by then, ZEO in
the memory of the kernel.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from ZODB.blob import Blob
from ZODB.Connection import TransactionMetaData
from ZODB.tests.StorageTestBase import zodb_pickle
from ZODB.utils import z64

from . import servers

MEGABYTE = 1024 * 1024
ANSWER_S = 900
WARM_UP_S = 2.0
PEERS = ("zeo", "zeolith")
_context = multiprocessing.get_context("spawn")


def main() -> int:
    """Measure each peer and print a table."""
    options = _options()
    size = options.megabytes * MEGABYTE
    free = shutil.disk_usage(options.directory or tempfile.gettempdir()).free
    # At the server and in two caches, of two blobs, and something to spare.
    if free < 7 * size:
        print(f"{free // MEGABYTE} MB are free, {7 * options.megabytes} are needed")
        return 1
    print(f"| {options.megabytes} MB, twice | " + " | ".join(options.peers) + " |")
    print("| --- |" + " --- |" * len(options.peers))
    found: dict[str, list[dict[str, float]]] = {peer: [] for peer in options.peers}
    for round_ in range(options.rounds):
        for at in range(len(options.peers)):
            peer = options.peers[(round_ + at) % len(options.peers)]
            with tempfile.TemporaryDirectory("-blobs", dir=options.directory) as folder:
                found[peer].append(_measure(peer, Path(folder), size))
    for row in found[options.peers[0]][0]:
        values = (median(each[row] for each in found[peer]) for peer in options.peers)
        print(f"| {row} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.blobs", description=__doc__
    )
    parser.add_argument("--megabytes", type=int, default=1024, help="of each upload")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--peers", type=lambda text: text.split(","), default=list(PEERS)
    )
    parser.add_argument("--directory", help="where everything is")
    return parser.parse_args()


def _measure(peer: str, folder: Path, size: int) -> dict[str, float]:
    with _serving(peer, folder) as running:
        assert running.process is not None
        _touch_memory(folder, size)
        loader = _start(_load, running.endpoint)
        time.sleep(WARM_UP_S)
        loader[0].send("before")
        before = loader[0].recv()
        clients = [
            _start(_upload, running.endpoint, str(folder / f"client{number}"), size)
            for number in range(2)
        ]
        for pipe, _process in clients:
            assert pipe.recv() == "ready"
        memory = _peak_bytes(running.process.pid)
        began_s = time.monotonic()
        loader[0].send("go on")
        loader[0].recv()
        for pipe, _process in clients:
            pipe.send("go")
        uploads = [_answer(pipe) for pipe, _process in clients]
        uploaded_s = time.monotonic() - began_s
        loader[0].send("meanwhile")
        meanwhile = loader[0].recv()
        grown = _peak_bytes(running.process.pid) - memory
        # Each reads what the other wrote.
        began_s = time.monotonic()
        for number, (pipe, _process) in enumerate(clients):
            pipe.send(uploads[1 - number][0])
        downloads = [_answer(pipe) for pipe, _process in clients]
        downloaded_s = time.monotonic() - began_s
        loader[0].send(None)
        for pipe, process in (*clients, loader):
            process.join(ANSWER_S)
            pipe.close()
    return {
        "upload, MB/s": 2 * size / MEGABYTE / uploaded_s,
        "download, MB/s": 2 * size / MEGABYTE / downloaded_s,
        "server's memory, MB more": grown / MEGABYTE,
        "a client's memory, MB more": max(each[1] for each in uploads) / MEGABYTE,
        "the same when it loads": max(each for each in downloads) / MEGABYTE,
        "another's load before, median ms": before[0],
        "another's load before, 99 % ms": before[1],
        "another's load meanwhile, median ms": meanwhile[0],
        "another's load meanwhile, 99 % ms": meanwhile[1],
        "another's load meanwhile, longest ms": meanwhile[2],
    }


@contextmanager
def _serving(peer: str, folder: Path) -> Iterator[servers.Running]:
    (folder / "server").mkdir()
    with servers.running_with_blobs(peer, folder / "server") as found:
        yield found


def _touch_memory(folder: Path, size: int) -> None:
    """Have the kernel use the memory that files will take.

    In a virtual machine, memory that was never used costs its first user dearly; it is
    the same for everybody after this.
    """
    block = bytes(MEGABYTE)
    with (folder / "touched").open("wb") as file:
        for _ in range(7 * size // MEGABYTE):
            file.write(block)
    (folder / "touched").unlink()


def _start(target: Any, *args: Any) -> tuple[Pipe, Any]:
    ours, theirs = _context.Pipe()
    process = _context.Process(target=target, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def _answer(pipe: Pipe) -> Any:
    assert pipe.poll(ANSWER_S), "no answer"
    return pipe.recv()


def _peak_bytes(pid: int | str = "self") -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel tells no peak")


def _upload(pipe: Pipe, endpoint: servers.Endpoint, folder: str, size: int) -> None:
    storage = endpoint.open(blob_dir=folder)
    path = os.path.join(storage.temporaryDirectory(), "uncommitted")
    block = os.urandom(MEGABYTE)
    with open(path, "wb") as file:
        for _ in range(size // MEGABYTE):
            file.write(block)
        os.fsync(file.fileno())
    transaction = TransactionMetaData()
    oid = storage.new_oid()
    pipe.send("ready")
    pipe.recv()
    memory = _peak_bytes()
    storage.tpc_begin(transaction)
    storage.storeBlob(oid, z64, zodb_pickle(Blob()), path, "", transaction)
    storage.tpc_vote(transaction)
    tid = storage.tpc_finish(transaction)
    pipe.send(((oid, tid), _peak_bytes() - memory))
    other = pipe.recv()
    memory = _peak_bytes()
    found = storage.loadBlob(*other)
    assert os.path.getsize(found) == size
    pipe.send(_peak_bytes() - memory)
    storage.close()


def _load(pipe: Pipe, endpoint: servers.Endpoint) -> None:
    """Load a record until told; each message but None is answered with the times."""
    storage = endpoint.open()
    transaction = TransactionMetaData()
    oid = storage.new_oid()
    storage.tpc_begin(transaction)
    storage.store(oid, z64, zodb_pickle(Blob()), "", transaction)
    storage.tpc_vote(transaction)
    tid = storage.tpc_finish(transaction)
    took_ms: list[float] = []
    while True:
        if pipe.poll():
            if pipe.recv() is None:
                break
            pipe.send(
                (median(took_ms), quantiles(took_ms, n=100)[98], max(took_ms))
                if len(took_ms) > 1
                else (0, 0, 0)
            )
            took_ms.clear()
        began = time.perf_counter()
        # What no client caches.
        storage.loadSerial(oid, tid)
        took_ms.append((time.perf_counter() - began) * 1000)
        time.sleep(0.001)
    storage.close()


if __name__ == "__main__":
    sys.exit(main())
