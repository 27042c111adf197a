"""The books of the bank: whoever loses, tears or hides a commit is found out.

Without this nobody would know whether the figures of docs/reliability.md are 0
because nothing is wrong or because nobody looks.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transaction
from persistent.mapping import PersistentMapping
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage

from ..support.bank import make
from ..support.banking import Bank
from ..support.faulty import FaultyServer
from ..support.waiting import wait_until

WORKER = "p0t0"
OBJECTS = 10


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    bank = Bank(tmp_path, programs=1, threads=1)
    make(str(tmp_path / "Data.fs"), OBJECTS, [WORKER])
    return bank


def commit(path: Path, key: str, amount: int, change: Any = None) -> None:
    """What a worker does, by ZODB alone; `change` gets the root before the commit."""
    db = DB(FileStorage(str(path)))
    manager = transaction.TransactionManager()
    manager.get().note(key)
    connection = db.open(manager)
    root = connection.root()
    root["accounts"][1] -= amount
    root["accounts"][2] += amount
    root["entries"][key] = PersistentMapping({"key": key, "amount": amount})
    for thing in (root["things"][2], root["things"][3]):
        thing["n"] += 1
    for mark in root["marks"][WORKER]:
        mark["key"] = key
    if change is not None:
        change(root)
    manager.commit()
    connection.close()
    db.close()


def journal(folder: Path, *lines: str) -> None:
    (folder / f"{WORKER}.journal").write_text("".join(f"{line}\n" for line in lines))


def test_what_is_in_order_is_not_accused(bank: Bank, tmp_path: Path):
    commit(tmp_path / "Data.fs", f"{WORKER}:0", 5)
    commit(tmp_path / "Data.fs", f"{WORKER}:2", 5)
    journal(
        tmp_path,
        f"committed {WORKER}:0 5",
        f"refused {WORKER}:1 3",
        f"unknown {WORKER}:2 5",
    )
    counts, wrongs = bank.examine(tmp_path / "Data.fs")
    assert not wrongs
    assert (counts["committed"], counts["transactions"]) == (1, 2)
    assert (counts["lost"], counts["torn"], counts["untrue"]) == (0, 0, 0)


def test_a_commit_that_is_cut_off_the_file_is_lost(bank: Bank, tmp_path: Path):
    path = tmp_path / "Data.fs"
    commit(path, f"{WORKER}:0", 5)
    size = path.stat().st_size
    commit(path, f"{WORKER}:1", 5)
    with path.open("r+b") as file:
        file.truncate(size)
    Path(f"{path}.index").unlink()
    journal(tmp_path, f"committed {WORKER}:0 5", f"committed {WORKER}:1 5")
    counts, wrongs = bank.examine(path)
    assert (counts["lost"], counts["torn"], counts["untrue"]) == (1, 0, 0)
    assert (
        f"acknowledged and not there: Line(outcome='committed', key='{WORKER}:1'"
        in (wrongs[0])
    )
    with pytest.raises(AssertionError, match="acknowledged and not there"):
        bank.judge(path)


def forget_a_mark(root: Any) -> None:
    mark = root["marks"][WORKER][2]
    mark._p_invalidate()


def forget_an_account(root: Any) -> None:
    root["accounts"][2] -= 5


def forget_a_twin(root: Any) -> None:
    root["things"][3]._p_invalidate()


@pytest.mark.parametrize("forget", [forget_a_mark, forget_an_account, forget_a_twin])
def test_a_commit_that_is_there_in_part_is_torn(
    bank: Bank, tmp_path: Path, forget: Callable[[Any], None]
):
    commit(tmp_path / "Data.fs", f"{WORKER}:0", 5, forget)
    journal(tmp_path, f"committed {WORKER}:0 5")
    counts, wrongs = bank.examine(tmp_path / "Data.fs")
    assert wrongs
    assert counts["lost"] == 0
    assert counts["torn"] > 0


@pytest.mark.parametrize(
    "line", [f"refused {WORKER}:0 5", ""], ids=["refused", "not told"]
)
def test_a_commit_that_should_not_be_there_is_found(
    bank: Bank, tmp_path: Path, line: str
):
    commit(tmp_path / "Data.fs", f"{WORKER}:0", 5)
    journal(tmp_path, line) if line else journal(tmp_path)
    counts, _wrongs = bank.examine(tmp_path / "Data.fs")
    assert (counts["lost"], counts["torn"], counts["untrue"]) == (0, 0, 1)


@pytest.fixture
def working(tmp_path: Path) -> Iterator[tuple[Bank, FaultyServer]]:
    bank = Bank(tmp_path, programs=2, threads=2, may_be_refused=True)
    bank.make(tmp_path / "Data.fs", 100)
    with FaultyServer(tmp_path) as server:
        yield bank, server


def test_a_server_that_acknowledges_and_does_not_write_is_found_out(
    working: tuple[Bank, FaultyServer], tmp_path: Path
):
    bank, server = working
    with bank.open(server.address):
        bank.wait_for_commits(2, "before a lie")
        with server.armed("lie"):
            server.wait_for("a lie")
    server.terminate()
    counts, wrongs = bank.examine(tmp_path / "Data.fs")
    assert counts["lost"] >= 1, wrongs
    with pytest.raises(AssertionError, match="acknowledged and not"):
        bank.conclude(tmp_path / "Data.fs", "lies", 1)


def test_a_server_that_does_not_tell_of_changes_is_found_out(
    working: tuple[Bank, FaultyServer], tmp_path: Path
):
    bank, server = working
    with bank.open(server.address):
        bank.wait_for_commits(2, "before a silence")
        with server.armed("hush"):
            wait_until(bank.complaints, "a complaint")
    with pytest.raises(AssertionError):
        bank.conclude(tmp_path / "Data.fs", "silence", 1)
