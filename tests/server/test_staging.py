"""What is staged: in memory up to a bound, then in a file, and never left behind."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from ZODB.POSException import StorageTransactionError

from zeolith.protocol.errors import Overloaded
from zeolith.protocol.limits import Limits
from zeolith.server import staging
from zeolith.server.staging import (
    OPERATION_BYTES,
    Spill,
    Spilled,
    Staged,
    Stock,
    joined,
)
from zeolith.server.workers import Workers

from ..support.gates import Gate
from ..support.ids import number, transaction_id

LIMITS = Limits(staged_memory_bytes_max=10_000)


class Socket:
    """What is read, and whether anything is."""

    def __init__(self) -> None:
        self.holds = 0

    def hold_reading(self) -> None:
        self.holds += 1

    def let_read(self) -> None:
        self.holds -= 1


def store(value: int, size: int = 5000) -> list[Any]:
    return ["store", number(value), number(0), bytes([value]) * size]


# pytest has some of its own.
_OPEN_BEFORE = [0]


def open_files() -> int:
    """Files without a name that this process has open."""
    names = [os.path.realpath(each) for each in Path("/proc/self/fd").iterdir()]
    return sum("(deleted)" in name for name in names) - _OPEN_BEFORE[0]


@pytest.fixture
async def workers() -> AsyncIterator[Workers]:
    _OPEN_BEFORE[0] = 0
    _OPEN_BEFORE[0] = open_files()
    workers = Workers(asyncio.get_running_loop(), "test")
    yield workers
    assert await workers.close(10)
    assert open_files() == 0, "a file is left open"


@pytest.fixture
def socket() -> Socket:
    return Socket()


@pytest.fixture
def stock() -> Iterator[Stock]:
    stock = Stock(LIMITS.staged_bytes_max)
    yield stock
    assert stock.bytes == 0, "some of what was staged is counted for ever"
    assert stock.memory_bytes == 0


@pytest.fixture
async def staged(socket, workers, stock) -> AsyncIterator[Staged]:
    staged = Staged(transaction_id(1), socket, workers, LIMITS, stock)
    yield staged
    # Once more does no harm.
    staged.discard()


async def sealed(staged: Staged) -> tuple[list[Any], Exception | None]:
    """The operations of a transaction at its vote, and what is wrong with them."""
    done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    staged.seal(lambda *answer: done.set_result(answer))
    operations, error = await asyncio.wait_for(done, 30)
    # Twice, for a vote reads them several times.
    assert list(operations) == list(operations)
    assert len(operations) == len(list(operations)) or error
    return list(operations), error


async def test_little_stays_in_memory(staged):
    staged.add([store(1)])
    assert await sealed(staged) == ([store(1)], None)
    assert open_files() == 0


async def test_much_is_the_same_in_a_file(staged):
    operations = [
        store(1),
        ["check", number(2), number(1)],
        ["undo", number(7)],
        ["restore", number(4), number(5), None, None],
        *map(store, range(2, 50)),
    ]
    for n in range(0, len(operations), 2):
        staged.add(operations[n : n + 2])
    assert await sealed(staged) == (operations, None)
    assert open_files() == 1
    staged.discard()
    staged.discard()


async def test_a_client_that_is_faster_than_the_disk_is_held(
    staged, socket, workers, monkeypatch
):
    gate = Gate()
    gate.shut()
    append = staging._append

    def append_later(*args: Any) -> Spill:
        gate.pass_through()
        return append(*args)

    monkeypatch.setattr(staging, "_append", append_later)
    staged.add([store(n) for n in range(3)])
    assert socket.holds == 0
    staged.add([store(3)])
    assert socket.holds == 0, "there is room for as much again"
    staged.add([store(4), store(5)])
    # What had been read already.
    staged.add([store(6)])
    assert socket.holds == 1
    gate.open()
    operations, error = await sealed(staged)
    assert error is None
    assert operations == [store(n) for n in range(7)]
    assert socket.holds == 0
    staged.discard()


async def test_a_disk_that_fails_is_told_at_the_vote(staged, socket, monkeypatch):
    def fail(*_args: Any) -> None:
        raise OSError(28, "No space left on device")

    staged.add([store(n) for n in range(3)])
    monkeypatch.setattr(os, "pwrite", fail)
    for n in range(20):
        staged.add([store(n)])
    operations, error = await sealed(staged)
    assert isinstance(error, OSError)
    assert operations == []
    assert socket.holds == 0
    staged.discard()


@pytest.mark.parametrize("size", [3, 30])
async def test_nothing_is_left_of_what_was_given_up_while_it_was_written(
    staged, socket, workers, size: int
):
    for n in range(size):
        staged.add([store(n)])
    staged.discard()
    # It was let go on the loop, after the write.
    await workers.stage(lambda: None)
    await asyncio.sleep(0)
    assert socket.holds == 0


async def test_a_transaction_is_bounded_whether_in_memory_or_not(workers, socket):
    room = 10 * (5000 + OPERATION_BYTES)
    limits = Limits(staged_memory_bytes_max=10_000, transaction_bytes_max=room)
    staged = Staged(transaction_id(1), socket, workers, limits, Stock(10**6))
    staged.add([store(n) for n in range(10)])
    with pytest.raises(StorageTransactionError, match="transaction_bytes_max"):
        staged.add([["undo", number(1)]])
    staged.discard()


@pytest.mark.parametrize("size", [10, 5000])
async def test_all_transactions_together_are_bounded(workers, socket, size):
    """Wherever it is kept: memory, or a file."""
    stock = Stock(10 * (size + OPERATION_BYTES))
    one, other = (
        Staged(transaction_id(n), socket, workers, LIMITS, stock) for n in (1, 2)
    )
    one.add([store(n, size) for n in range(6)])
    other.add([store(n, size) for n in range(4)])
    other.add([["undo", number(1)]])
    other.add([store(5, size)])
    operations, error = await sealed(other)
    assert operations == []
    assert isinstance(error, Overloaded)
    assert "staged_bytes_max" in str(error)
    assert stock.bytes == 6 * (size + OPERATION_BYTES)
    other.discard()
    await sealed(one)
    one.discard()
    assert stock.bytes == 0


async def test_when_all_have_much_in_memory_each_keeps_little(workers, socket, stock):
    kept = 20 * (5000 + OPERATION_BYTES)
    limits = Limits(all_staged_memory_bytes_max=kept)
    one, other = (
        Staged(transaction_id(n), socket, workers, limits, stock) for n in (1, 2)
    )
    one.add([store(n) for n in range(20)])
    assert stock.memory_bytes == kept
    assert not one.is_writing
    other.add([store(n) for n in range(5)])
    assert not other.is_writing, "it has only a little"
    other.add([store(n) for n in range(10)])
    assert other.is_writing
    assert stock.memory_bytes == kept
    operations, error = await sealed(other)
    assert len(operations) == 15
    assert error is None
    assert len((await sealed(one))[0]) == 20
    assert stock.memory_bytes == kept, "until the transaction ends"
    for each in (one, other):
        each.discard()
    assert stock.memory_bytes == 0


async def test_what_was_dropped_is_not_counted(staged, stock):
    staged.add([store(1)])
    assert stock.bytes == 5000 + OPERATION_BYTES
    staged.expire(30)
    assert stock.bytes == 0
    staged.add([store(1)])
    assert stock.bytes == 0


async def test_the_names_of_files_are_counted(workers, socket):
    limits = Limits(transaction_bytes_max=10_000)
    staged = Staged(transaction_id(1), socket, workers, limits, Stock(10**6))
    shared = ["store_shared_blob", number(1), number(0), b"record", "x" * 10_000]
    with pytest.raises(StorageTransactionError, match="transaction_bytes_max"):
        staged.add([shared])


async def test_only_what_waits_for_its_client_is_idle(staged):
    assert not staged.is_idle
    staged.add([store(1)])
    assert staged.is_idle
    staged.add([store(2), store(3)])
    assert not staged.is_idle, "it is being written"
    await sealed(staged)
    staged.discard()
    assert not staged.is_idle


def test_the_vote_has_operations_of_its_own():
    spill = Spill()
    spill.write([store(1)])
    all_of_them = joined(Spilled(spill, 1, [store(2)]), [store(3)])
    assert list(all_of_them) == [store(1), store(2), store(3)]
    assert len(all_of_them) == 3
    assert store(1) in all_of_them
    assert joined([store(1)], [store(2)]) == [store(1), store(2)]
    spill.close()
    spill.close()


def test_two_may_read_a_spill_at_once():
    spill = Spill()
    spill.write([store(1), store(2)])
    spill.write([store(3)])
    first, second = iter(spill), iter(spill)
    assert [next(first), next(second), next(first)] == [store(1), store(1), store(2)]
    assert list(second) == [store(2), store(3)]
    assert list(first) == [store(3)]
    spill.close()


def test_a_file_that_was_cut_off_is_an_error():
    spill = Spill()
    spill.write([store(1)])
    os.ftruncate(spill._file.fileno(), 100)
    with pytest.raises(OSError, match="lost its end"):
        list(spill)
    spill.close()
