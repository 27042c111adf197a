"""A program that reads and writes a bank (see `bank`) through a server, until told.

    python -m tests.support.bank_worker ADDRESS FOLDER CACHE_BYTES CACHE PATIENCE
        WORKER...

CACHE is a directory that the programs share, or "-": then each caches in memory. With
one a program may be killed, and begun again.

PATIENCE is "strict", or "patient": then the server may refuse, for its disk is full,
say. What it said goes to FOLDER/WORKER.refusals.

Each WORKER is a thread with a ZODB connection of its own; all share one
ClientStorage. A worker journals in FOLDER/WORKER.journal, and its complaints about
what it has seen go to FOLDER/WORKER.wrong; it ends when FOLDER/stop exists. What it
saw is counted and printed at the end as JSON.

What a worker sees must be consistent, and must not go back: each worker's marks carry
the number of its last transaction, and its own are of the last that it was told of.
"""

import json
import logging
import random
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import transaction
from persistent.mapping import PersistentMapping
from ZODB.DB import DB
from ZODB.POSException import ConflictError, POSKeyError, StorageError

from zeolith.client.disk_cache import DiskCache
from zeolith.client.errors import ClientDisconnected, CommitOutcomeUnknown
from zeolith.client.storage import ClientStorage

from .bank import (
    ACCOUNTS,
    COMMITTED,
    REFUSED,
    UNKNOWN,
    imbalance,
    mistaken_entry,
    read_journal,
    unlike_marks,
    unlike_twins,
)

PAIRS_READ = 20
TRANSFER_MAX = 10
LARGE_SHARE = 0.02
LARGE_BYTES_MAX = 300_000


class Worker:
    """One who reads, transfers and journals, in a thread of its own."""

    def __init__(
        self,
        db: DB,
        folder: Path,
        name: str,
        *,
        may_be_killed: bool,
        may_be_refused: bool,
    ):
        self._may_be_killed = may_be_killed
        # Besides conflicts and lost connections.
        self._refusals = (StorageError, OSError) if may_be_refused else ()
        self.name = name
        self.counts: Counter[str] = Counter()
        self._db = db
        self._folder = folder
        self._random = random.Random(name)
        self._stop_path = folder / "stop"
        # The number of the last transaction that was seen of each worker.
        self._seen: dict[str, int] = {}
        # Of its own, those that may be the last.
        self._own: set[int] = set()

    def run(self) -> None:
        try:
            self._run()
        finally:
            # A worker that fails is the end of the work, not a slower one.
            self._stop_path.touch()

    def _run(self) -> None:
        # In the thread's own transaction nobody else takes part, and it votes and
        # finishes in one; of another's this is not known.
        managers = [transaction.TransactionManager(), transaction.manager]
        journal_path = self._folder / f"{self.name}.journal"
        # Line buffered: what is told is on its way at once.
        with journal_path.open("a", buffering=1) as journal:
            for number in self._numbers(sum(1 for _ in read_journal(journal_path))):
                key = f"{self.name}:{number}"
                amount = self._random.randrange(1, TRANSFER_MAX)
                if self._may_be_killed:
                    journal.write(f"{UNKNOWN} {key} {amount}\n")
                manager = self._random.choice(managers)
                outcome = self._attempt(manager, key, amount)
                journal.write(f"{outcome} {key} {amount}\n")
                self.counts[outcome] += 1
                if outcome == COMMITTED:
                    self._own = {number}
                elif outcome == UNKNOWN:
                    self._own.add(number)

    def _numbers(self, number: int) -> Iterator[int]:
        while not self._stop_path.exists():
            yield number
            number += 1

    def _attempt(
        self, manager: transaction.TransactionManager, key: str, amount: int
    ) -> str:
        """One transaction; returns what became of it."""
        begun = manager.begin()
        begun.note(key)
        try:
            connection = self._db.open(manager)
            try:
                root = connection.root()
                self._look(root)
                self._write(root, key, amount)
                manager.commit()
            finally:
                manager.abort()
                connection.close()
        except ConflictError:
            self.counts["conflicts"] += 1
            return REFUSED
        except ClientDisconnected:
            self.counts["disconnects"] += 1
            return REFUSED
        except CommitOutcomeUnknown:
            return UNKNOWN
        except POSKeyError as error:
            # Nothing is ever removed.
            self._complain(f"torn: {error!r}")
            return REFUSED
        except self._refusals as error:
            self.counts["refusals"] += 1
            with (self._folder / f"{self.name}.refusals").open("a") as refusals:
                refusals.write(f"{type(error).__name__}: {error}\n")
            return REFUSED
        return COMMITTED

    def _look(self, root: Any) -> None:
        """Every snapshot is a consistent one."""
        pairs = root["pairs"]
        for _ in range(PAIRS_READ // 2):
            self._complain(unlike_twins(root, self._random.randrange(pairs)))
        self._complain(imbalance(root))
        for worker in root["marks"]:
            self._complain(unlike_marks(root, worker))
            last_key = root["marks"][worker][0]["key"]
            if last_key:
                self._complain(mistaken_entry(root, last_key))
                self._complain(self._stale(worker, int(last_key.split(":")[1])))
        for _ in range(PAIRS_READ // 2):
            self._complain(unlike_twins(root, self._random.randrange(pairs)))
        self.counts["snapshots"] += 1
        if self._random.random() < 0.05:
            # Ask the storage again for everything.
            root._p_jar.cacheMinimize()

    def _stale(self, worker: str, number: int) -> str | None:
        """What is wrong with ``number`` being the last that is seen of ``worker``."""
        before = self._seen.get(worker, number)
        self._seen[worker] = number
        if number < before:
            return f"stale: after {worker}:{before} {self.name} saw {worker}:{number}"
        if worker == self.name and self._own and number not in self._own:
            return f"stale: {worker} saw its own {number}, and not of {self._own}"
        if worker == self.name:
            # What nobody could know of may be committed yet, by a server that stood
            # still.
            self._own = {own for own in self._own if own >= number}
        return None

    def _complain(self, wrong: str | None) -> None:
        if wrong is not None:
            self.counts["wrong"] += 1
            with (self._folder / f"{self.name}.wrong").open("a") as complaints:
                complaints.write(f"{wrong}\n")

    def _write(self, root: Any, key: str, amount: int) -> None:
        giver, taker = self._random.sample(range(ACCOUNTS), 2)
        root["accounts"][giver] -= amount
        root["accounts"][taker] += amount
        root["entries"][key] = PersistentMapping({"key": key, "amount": amount})
        things = root["things"]
        pair = self._random.randrange(root["pairs"])
        # Now and then a large record, which takes a while to be written.
        is_large = self._random.random() < LARGE_SHARE
        size = self._random.randrange(LARGE_BYTES_MAX) if is_large else 0
        for thing in (things[2 * pair], things[2 * pair + 1]):
            thing["n"] += 1
            thing["padding"] = bytes(size)
        for mark in root["marks"][self.name]:
            mark["key"] = key


def main(
    address: str,
    folder: str,
    cache_bytes: str,
    cache: str,
    patience: str,
    *names: str,
) -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    # A finish that is refused is daily work here, and the end of the world to it.
    logging.getLogger("txn").setLevel(logging.CRITICAL + 1)
    if patience == "patient":
        # So is a load that fails.
        logging.getLogger("ZODB.Connection").setLevel(logging.CRITICAL + 1)
    storage = ClientStorage(
        address,
        cache=None if cache == "-" else cache,
        cache_size=int(cache_bytes),
        client_label=names[0],
    )
    db = DB(storage)
    workers = [
        Worker(
            db,
            Path(folder),
            name,
            may_be_killed=cache != "-",
            may_be_refused=patience == "patient",
        )
        for name in names
    ]
    with ThreadPoolExecutor(len(workers)) as pool:
        running = [pool.submit(worker.run) for worker in workers]
    counts: Counter[str] = Counter()
    for worker, ended in zip(workers, running, strict=True):
        ended.result()
        counts.update(worker.counts)
    if isinstance(storage.cache, DiskCache):
        counts["hits"] = storage.cache.hits
        counts["misses"] = storage.cache.misses
        counts["errors"] = storage.cache.errors
        counts["aside"] = storage.cache.is_aside
    db.close()
    print(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
