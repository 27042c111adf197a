"""A bank whose books must balance, kept by several programs at once.

The plain half: it makes the Data.fs and judges it afterwards, with ZODB alone; the
programs that work on it in between are `bank_worker`. Run as a program, in a process
in which zeolith cannot be imported::

    python -m tests.support.bank make Data.fs OBJECTS
    python -m tests.support.bank judge Data.fs JOURNAL...

What is in the root, and what always holds:

`accounts`   IOBTree, number -> amount. A transfer changes two of them; the sum is
             `TOTAL` in every snapshot.
`entries`    OOBTree, key -> PersistentMapping with the `key` and the `amount`. Every
             transaction adds one, a new object under a key that no other transaction
             uses. The key is the transaction's description, too.
`things`     IOBTree, number -> PersistentMapping with an `n`. Thing 2k and thing
             2k + 1 are twins: their `n` is the same in every snapshot.
`pairs`      how many twins there are.
`marks`      PersistentMapping, worker -> list of `MARKS` PersistentMappings. Every
             transaction of the worker writes its key into all of them.

A worker's journal is a line an attempt: `committed`, `refused` or `unknown`, the key,
the amount. A refused one is nowhere in the file, a committed one is there once and
whole, an unknown one is one of the two. A worker that may be killed writes `unknown`
before it tries, and then what became of it: the last line of a key counts.
"""

import io
import json
import pickle
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import transaction
from BTrees.IOBTree import IOBTree
from BTrees.OOBTree import OOBTree
from persistent.mapping import PersistentMapping
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage

ACCOUNTS = 500
AMOUNT = 100
TOTAL = ACCOUNTS * AMOUNT
MARKS = 4
OBJECTS_A_TRANSACTION = 5000

COMMITTED = "committed"
REFUSED = "refused"
UNKNOWN = "unknown"


class Line(NamedTuple):
    """What became of an attempt, as the worker was told."""

    outcome: str
    key: str
    amount: int


def read_journal(path: Path) -> Iterator[Line]:
    """The last line of each key, but for one that is being written."""
    text = path.read_text() if path.exists() else ""
    found = {}
    for line in text[: text.rfind("\n") + 1].splitlines():
        outcome, key, amount = line.split()
        found[key] = Line(outcome, key, int(amount))
    yield from found.values()


# Making


def make(path: str, objects: int, workers: Iterable[str]) -> None:
    """Write a Data.fs with that many objects, and the bank among them."""
    db = DB(FileStorage(path, create=True))
    connection = db.open()
    root = connection.root()
    root["accounts"] = IOBTree(dict.fromkeys(range(ACCOUNTS), AMOUNT))
    root["entries"] = OOBTree()
    things = root["things"] = IOBTree()
    # To count a BTree is to load all of it.
    root["pairs"] = objects // 2
    root["marks"] = PersistentMapping(
        {
            worker: [PersistentMapping({"key": ""}) for _ in range(MARKS)]
            for worker in workers
        }
    )
    for number in range(objects):
        things[number] = PersistentMapping({"n": number // 2})
        if number % OBJECTS_A_TRANSACTION == 0:
            transaction.commit()
            connection.cacheMinimize()
    transaction.commit()
    connection.close()
    db.close()


# What always holds


def imbalance(root: Any) -> str | None:
    """What is wrong with the accounts in this snapshot."""
    total = sum(root["accounts"].values())
    return None if total == TOTAL else f"the sum is {total}, not {TOTAL}"


def unlike_twins(root: Any, pair: int) -> str | None:
    """What is wrong with a pair of things in this snapshot."""
    one, other = (root["things"][2 * pair + which]["n"] for which in (0, 1))
    return None if one == other else f"twins {pair} are {one} and {other}"


def unlike_marks(root: Any, worker: str) -> str | None:
    """What is wrong with the marks of a worker in this snapshot."""
    keys = {mark["key"] for mark in root["marks"][worker]}
    return None if len(keys) == 1 else f"the marks of {worker} are {keys}"


def mistaken_entry(root: Any, key: str) -> str | None:
    """What is wrong with the entry under `key` in this snapshot."""
    entry = root["entries"].get(key)
    found = None if entry is None else entry["key"]
    return None if found == key else f"under {key} is the entry {found}"


# Judging


class Verdict:
    """What a Data.fs, compared with the journals, is accused of.

    A kind of fault is a set of keys, or of places, so that none is counted twice.
    """

    KINDS = ("lost", "torn", "untrue")

    def __init__(self) -> None:
        self._found: dict[str, dict[str, str]] = {kind: {} for kind in self.KINDS}

    def accuse(self, kind: str, which: str, text: str | None) -> None:
        """``text`` says what is wrong with ``which``; None: nothing is."""
        if text is not None:
            self._found[kind].setdefault(which, text)

    def counts(self) -> dict[str, int]:
        """How many of each kind."""
        return {kind: len(found) for kind, found in self._found.items()}

    def texts(self) -> list[str]:
        """What is wrong, in words."""
        return [
            f"{kind}: {text}"
            for kind, found in self._found.items()
            for text in found.values()
        ]


def judge(path: str, journals: Iterable[Path]) -> tuple[dict[str, int], list[str]]:
    """Compare a Data.fs with what the workers were told; counts, and what is wrong.

    `lost`    acknowledged, and not in the file, or not in its log
    `torn`    there in part, or not in agreement with the rest of its snapshot
    `untrue`  refused and there, there and nobody was told anything, there twice
    """
    lines = [line for journal in journals for line in read_journal(journal)]
    outcomes = Counter(line.outcome for line in lines)
    verdict = Verdict()
    storage = FileStorage(path, read_only=True)
    db = DB(storage)
    connection = db.open()
    try:
        root = connection.root()
        objects = len(storage)
        judge_snapshot(root, verdict)
        judge_entries(root, lines, verdict)
        logged = judge_log(storage, root, lines, verdict)
    finally:
        connection.close()
        db.close()
    counts = {**outcomes, "objects": objects, "transactions": logged}
    return {**counts, **verdict.counts()}, verdict.texts()


def judge_snapshot(root: Any, verdict: Verdict) -> None:
    """The last snapshot is a consistent one."""
    verdict.accuse("torn", "accounts", imbalance(root))
    for pair in range(root["pairs"]):
        verdict.accuse("torn", f"twins {pair}", unlike_twins(root, pair))
    for worker in root["marks"]:
        verdict.accuse("torn", f"marks {worker}", unlike_marks(root, worker))
    for name in ("accounts", "entries", "things"):
        root[name]._check()


def judge_entries(root: Any, lines: list[Line], verdict: Verdict) -> None:
    """What was acknowledged is there, what was refused is not, and nothing else is."""
    entries = {key: entry["amount"] for key, entry in root["entries"].items()}
    for key in entries:
        verdict.accuse("torn", key, mistaken_entry(root, key))
    told = {line.key: line for line in lines}
    assert len(told) == len(lines), "a key was used twice"
    for line in lines:
        is_there = entries.get(line.key) == line.amount
        if line.outcome == COMMITTED and not is_there:
            verdict.accuse("lost", line.key, f"acknowledged and not there: {line}")
        if line.outcome == REFUSED and line.key in entries:
            verdict.accuse("untrue", line.key, f"refused and there: {line}")
    for key in entries.keys() - told.keys():
        verdict.accuse("untrue", key, f"{key} is there, and nobody was told anything")


def judge_log(
    storage: FileStorage, root: Any, lines: list[Line], verdict: Verdict
) -> int:
    """Each transaction of the log is whole, and is there once.

    A pack leaves of a transaction what is not superfluous, and the entry never is.
    """
    marks = {
        mark._p_oid: worker for worker, each in root["marks"].items() for mark in each
    }
    found: Counter[str] = Counter()
    for logged in storage.iterator():
        key = logged.description.decode()
        if key.count(":") != 1:
            continue
        found[key] += 1
        written = {
            record.oid: state_of(record.data)["data"]["key"]
            for record in logged
            if record.oid in marks
        }
        worker = key.split(":")[0]
        whole = {oid: key for oid, owner in marks.items() if owner == worker}
        is_packed = logged.status == "p"
        is_whole = written.items() <= whole.items() if is_packed else written == whole
        if not is_whole:
            verdict.accuse("torn", key, f"{key} is there in part: {written}")
    for key, times in found.items():
        if times > 1:
            verdict.accuse("untrue", key, f"{key} was committed {times} times")
    for line in lines:
        if line.outcome == REFUSED and line.key in found:
            verdict.accuse("untrue", line.key, f"refused and logged: {line}")
        if line.outcome == COMMITTED and line.key not in found:
            verdict.accuse("lost", line.key, f"acknowledged and not logged: {line}")
    return found.total()


class _WithoutReferences(pickle.Unpickler):
    def persistent_load(self, _reference: Any) -> None:
        return None


def state_of(data: bytes) -> Any:
    """The state in a record, references left out."""
    unpickler = _WithoutReferences(io.BytesIO(data))
    unpickler.load()
    return unpickler.load()


def main(arguments: list[str]) -> None:
    # From here on every import of zeolith fails.
    sys.modules["zeolith"] = None  # type: ignore[assignment]
    match arguments:
        case ["make", path, objects, *workers]:
            make(path, int(objects), workers)
        case ["judge", path, *journals]:
            print(json.dumps(judge(path, map(Path, journals))))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
