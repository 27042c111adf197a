"""How much others notice of a pack: `python -m tests.bench.pack`.

A Data.fs of 500,000 revisions, half of them current, is packed while one client loads
and another commits, each with a short pause after each call, so that the machine is
busy and not full. What they measure before the pack and during it is compared, for
zeolith and for ZEO in turns; a figure is the median of the rounds.
"""

import argparse
import multiprocessing
import random
import shutil
import statistics
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import transaction
from persistent.list import PersistentList
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.FileStorage.FileStorage import FileStorage
from ZODB.serialize import referencesf
from ZODB.utils import maxtid

from . import dataset
from .servers import Endpoint, Running, memory_mb, running, title
from .table import machine

PEERS = ("zeolith", "zeo")
LOAD_PAUSE_S = 0.001
COMMIT_PAUSE_S = 0.02
QUIET_S = 10.0
LOOK_INTERVAL_S = 0.05
# When a call began, and how long it took.
Sample = tuple[float, float]


def make(path: Path, revisions: int) -> None:
    """Items on shelves, each of them written twice."""
    db = DB(FileStorage(str(path)), cache_size=2 * dataset.ITEMS_PER_SHELF)
    shelves = revisions // 2 // dataset.ITEMS_PER_SHELF
    with db.transaction() as connection:
        connection.root()["shelves"] = PersistentList()
    for _ in range(shelves):
        with db.transaction() as connection:
            connection.root()["shelves"].append(dataset.new_shelf())
    for number in range(shelves):
        with db.transaction() as connection:
            for item in dataset.shelf(connection, number):
                item["data"] = dataset.payload()
    db.close()


def all_oids(path: Path) -> list[bytes]:
    """The oids of the items, and a few others."""
    storage = FileStorage(str(path), read_only=True)
    oids = list(storage._index)
    storage.close()
    return oids


def load(endpoint: Endpoint, oids: list[bytes], stop: Event, to: Connection) -> None:
    """Load records that are in no cache, one after the other."""
    random.shuffle(oids)
    samples: list[Sample] = []
    to.send("ready")
    while not stop.is_set():
        storage = endpoint.open()
        for oid in oids:
            if stop.is_set():
                break
            begun = time.monotonic()
            storage.loadBefore(oid, maxtid)
            samples.append((begun, time.monotonic() - begun))
            time.sleep(LOAD_PAUSE_S)
        storage.close()
    to.send(samples)


def write(storage: Any, oid: bytes, tid: bytes, data: bytes) -> bytes:
    """Commit a new revision of the object, whose last one is ``tid``; its tid."""
    meta = TransactionMetaData()
    storage.tpc_begin(meta)
    storage.store(oid, tid, data, "", meta)
    storage.tpc_vote(meta)
    written: bytes = storage.tpc_finish(meta)
    return written


def commit(endpoint: Endpoint, oids: list[bytes], stop: Event, to: Connection) -> None:
    """Write one record after the other, each in a transaction."""
    storage = endpoint.open()
    data, tid = storage.load(oids[-1])
    samples: list[Sample] = []
    to.send("ready")
    while not stop.is_set():
        begun = time.monotonic()
        tid = write(storage, oids[-1], tid, data)
        samples.append((begun, time.monotonic() - begun))
        time.sleep(COMMIT_PAUSE_S)
    storage.close()
    to.send(samples)


def round_of(
    peer: str, folder: Path, data: Path, oids: list[bytes]
) -> dict[str, float]:
    """One pack by one peer; the figures of it."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with running(peer, folder, data) as server:
        clients = []
        for work in (load, commit):
            here, there = context.Pipe()
            process = context.Process(
                target=work, args=(server.endpoint, oids, stop, there)
            )
            process.start()
            clients.append((process, here))
        for _process, pipe in clients:
            assert pipe.recv() == "ready"
        time.sleep(1.0)
        quiet_from = time.monotonic()
        time.sleep(QUIET_S)
        before_mb = memory_mb(server)
        begun = time.monotonic()
        peak_mb = packed(server)
        ended = time.monotonic()
        stop.set()
        samples = [pipe.recv() for _process, pipe in clients]
        for process, _pipe in clients:
            process.join()
        figures = {
            "pack, s": ended - begun,
            "server before, MB": before_mb,
            "server at most, MB": peak_mb,
            "server after, MB": memory_mb(server),
        }
    for what, taken in zip(("load", "commit"), samples, strict=True):
        figures |= compared(what, taken, quiet_from, begun, ended)
    return figures


def packed(server: Running) -> float:
    """Pack; returns the most memory that the server had meanwhile."""
    storage = server.endpoint.open()
    try:
        packing = threading.Thread(
            target=storage.pack, args=(time.time(), referencesf), daemon=True
        )
        packing.start()
        peak_mb = 0.0
        while packing.is_alive():
            peak_mb = max(peak_mb, memory_mb(server))
            packing.join(LOOK_INTERVAL_S)
        return peak_mb
    finally:
        storage.close()


def compared(
    what: str, samples: list[Sample], quiet_from: float, begun: float, ended: float
) -> dict[str, float]:
    """The calls before the pack, and those that met it, in milliseconds."""
    quiet = [took for at, took in samples if quiet_from <= at and at + took < begun]
    during = [took for at, took in samples if at + took >= begun and at < ended]
    figures = {}
    for when, times in (("without", quiet), ("with", during)):
        cuts = statistics.quantiles(times, n=100)
        figures[f"{what} p50 {when}, ms"] = cuts[49] * 1000
        figures[f"{what} p99 {when}, ms"] = cuts[98] * 1000
        figures[f"longest {what} {when}, ms"] = max(times) * 1000
    figures[f"{what} p99, with / without"] = (
        figures[f"{what} p99 with, ms"] / figures[f"{what} p99 without, ms"]
    )
    return figures


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--revisions", type=int, default=500_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--directory", help="where the data is")
    options = parser.parse_args()
    peers = options.peers.split(",")
    found: dict[str, list[dict[str, float]]] = {peer: [] for peer in peers}
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        folder = Path(name)
        (folder / "made").mkdir()
        data = folder / "made" / "Data.fs"
        make(data, options.revisions)
        oids = all_oids(data)
        transaction.abort()
        for number in range(options.rounds):
            for peer in peers if number % 2 == 0 else reversed(peers):
                place = folder / f"{peer}{number}"
                found[peer].append(round_of(peer, place, data, list(oids)))
                shutil.rmtree(place)
    show(peers, found)


def show(peers: list[str], found: dict[str, list[dict[str, Any]]]) -> None:
    """Print the medians as a table of Markdown."""
    print(machine())
    print()
    print("| | " + " | ".join(map(title, peers)) + " |")
    print("| :-- |" + " --: |" * len(peers))
    for key in found[peers[0]][0]:
        medians = [statistics.median(each[key] for each in found[p]) for p in peers]
        print(f"| {key} | " + " | ".join(f"{each:.2f}" for each in medians) + " |")


if __name__ == "__main__":
    main()
