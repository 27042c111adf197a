"""Everything that can break around a server, while programs commit.

The programs are those of the bank: each commit is journalled by who made it and
compared with the file afterwards, each snapshot is compared with what must hold in it
(`support/bank`). The server is one that fails when it is told to
(`support/faulty_server`). Every case ends with the same three figures: acknowledged
commits that are lost, transactions that are torn, snapshots that are stale or mixed.

``FAULT_TIMES`` says how many times more, or less, than here each fault is injected.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from socket import socket
from typing import NamedTuple

import pytest
import transaction
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage

from zeolith.client.errors import ClientDisconnected
from zeolith.client.storage import ClientStorage

from ..support.bank import COMMITTED, UNKNOWN, imbalance, read_journal
from ..support.banking import Bank
from ..support.faulty import FaultyServer
from ..support.hindering import few_descriptors, little_memory, standing_still
from ..support.proxy import Direction, Proxy, proxied
from ..support.records import commit, seen
from ..support.waiting import wait_until

OBJECTS = 500
FACTOR = float(os.environ.get("FAULT_TIMES", "1"))
HOUR_S = 3600
CLIENTS = 200
STAYING = ("full", "broken")
BROKEN = "nothing is written any more until a restart"
LARGE_BYTES = 120_000_000
# Of a program that is not heard of any more.
TRANSACTION_TIMEOUT_S = 4
OPTIONS = "index-interval 1s"
IMPATIENT = f"{OPTIONS}\ntransaction-timeout {TRANSACTION_TIMEOUT_S}s"


class Work:
    """A bank at work: one program beside the server, the other behind a proxy."""

    def __init__(self, bank: Bank, server: FaultyServer, proxy: Proxy):
        self.bank = bank
        self.server = server
        self.proxy = proxy
        self.restarts = 0
        self._disasters = 0

    def goes_on(self, what: str, *, commits: int = 1) -> None:
        self.bank.wait_for_commits(commits, what)

    def recovers(self, what: str) -> None:
        """It goes on; whoever operates the server starts it again if it must be."""
        have_committed = self.bank.have_committed(1)

        def goes_on() -> bool:
            if not self.server.is_running():
                self.server.wait_for_death()
                self.server.start()
            elif self.has_a_disaster():
                self.restart()
            return have_committed()

        wait_until(goes_on, what, timeout_s=60)

    def has_a_disaster(self) -> bool:
        """Whether the server has given up writing, since it was started."""
        return self.server.stderr_text().count(BROKEN) > self._disasters

    def wait_for_failures(self, how: str, count: int) -> None:
        """Until the disk has failed so often, or the server has given up writing."""
        failures = f"{how}:"
        wait_until(
            lambda: (
                len(self.server.happened(failures)) >= count or self.has_a_disaster()
            ),
            f"{count} times {how}",
        )

    def restart(self) -> None:
        self.restarts += 1
        if self.restarts % 2:
            self.server.terminate()
        else:
            self.server.kill()
        self.server.start()
        self._disasters = self.server.stderr_text().count(BROKEN)


@contextmanager
def working(
    folder: Path, *, shares_cache: bool = False, options: str = OPTIONS
) -> Iterator[Work]:
    """A bank that is at work, and is judged by `conclude` afterwards."""
    cache = folder / "cache" if shares_cache else None
    bank = Bank(folder, programs=2, threads=2, cache=cache, may_be_refused=True)
    bank.make(folder / "Data.fs", OBJECTS)
    with (
        FaultyServer(folder, options=options) as server,
        proxied(server.address) as proxy,
    ):
        with bank.open(server.address, proxy.address):
            bank.wait_for_commits(1, "before a fault")
            yield Work(bank, server, proxy)
            bank.wait_for_commits(1, "after the last fault")
        server.terminate()


def conclude(work: Work, folder: Path, fault: str, times: int) -> None:
    """The row of the table, and nothing wrong in it."""
    print({"refusals": dict(work.bank.refusals()), "restarts": work.restarts})
    work.bank.conclude(folder / "Data.fs", fault, times)
    said = work.bank.stderr_text()
    assert not [word for word in ("Traceback", "CRITICAL") if word in said], said


def many(times: int) -> int:
    return max(1, round(times * FACTOR))


# The disk


def fail_disk(work: Work, how: str, steps: range) -> int:
    """A write, sync, cut, rename or reservation fails: the first, the second, ..."""
    server = work.server
    for at in steps:
        # One that stays is met by several, or ends all writing.
        wanted = len(server.happened(f"{how}:")) + (3 if how in STAYING else 1)
        server.arm("disk", how=how, at=at)
        work.wait_for_failures(how, wanted)
        server.disarm()
        work.recovers(f"after {how} at step {at}")
    return len(server.happened(f"{how}:"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("how", ["full", "full once", "broken", "broken once", "short"])
def test_a_disk_that_fails_loses_tears_and_ages_nothing(tmp_path: Path, how: str):
    steps = many(60)
    with working(tmp_path) as work:
        times = fail_disk(work, how, range(steps))
    assert times >= steps
    conclude(work, tmp_path, f"disk: {how}", times)
    for said in work.bank.refusals():
        assert REASONS[how.split()[0]] in said
        # Whoever knows that nothing was committed says so.
        assert "nothing" in said or "whether" not in said


REASONS = {
    "full": "No space left",
    "broken": "Input/output error",
    "short": "nobody is refused",
}


def oids_of_things(path: Path) -> list[bytes]:
    """As they are in the file; no zeolith is asked."""
    db = DB(FileStorage(str(path), read_only=True))
    connection = db.open()
    oids = [thing._p_oid for thing in connection.root()["things"].values()]
    connection.close()
    db.close()
    return oids


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_record_that_cannot_be_read_fails_alone_and_the_bank_goes_on(tmp_path: Path):
    rounds = many(25)
    with working(tmp_path) as work:
        oids = oids_of_things(tmp_path / "Data.fs")
        server = work.server
        for oid in random.Random(rounds).sample(oids, rounds):
            before = len(server.happened("cannot be read"))
            with server.armed("read", oid=oid.hex()):
                server.wait_for("cannot be read", before)
                work.goes_on("while a record cannot be read", commits=2)
            work.goes_on("when it can be read again")
        times = len(server.happened("cannot be read"))
    conclude(work, tmp_path, "a record that cannot be read", times)
    refusals = work.bank.refusals()
    assert refusals
    assert all("Input/output error" in said for said in refusals), refusals


# What runs out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_without_descriptors_tells_no_lie(tmp_path: Path):
    rounds = many(20)
    with working(tmp_path) as work:
        pid = work.server.process.pid
        for number in range(rounds):
            with few_descriptors(pid, left=number % 4) as most, ExitStack() as stack:
                for _ in range(10):
                    stranger = stack.enter_context(socket())
                    stranger.setblocking(False)
                    with suppress(BlockingIOError):
                        stranger.connect(work.server.address)
                wait_for_descriptors(pid, most - 1)
                work.goes_on("without descriptors", commits=2)
            other = ClientStorage(work.server.address, wait_timeout=30)
            other.close()
    conclude(work, tmp_path, "no descriptors", rounds)


def wait_for_descriptors(pid: int, count: int) -> None:
    """Wait until the process has used so many."""
    open_files = Path(f"/proc/{pid}/fd")
    wait_until(lambda: len(os.listdir(open_files)) >= count, "all are in use")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_request_without_memory_fails_alone_and_the_bank_goes_on(tmp_path: Path):
    rounds = many(20)
    with working(tmp_path) as work, ExitStack() as stack:
        large = ClientStorage(work.server.address, cache_size=1_000_000)
        stack.callback(large.close)
        commit(large, large=bytes(LARGE_BYTES))
        pid = work.server.process.pid
        for _ in range(rounds):
            with little_memory(pid, left_bytes=LARGE_BYTES // 4):
                with pytest.raises(Exception, match="MemoryError"):
                    seen(large, "large")
                work.goes_on("without memory", commits=2)
            assert len(seen(large, "large")) == LARGE_BYTES
    conclude(work, tmp_path, "no memory for a request", rounds)


# The clock


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_clock_that_jumps_an_hour_loses_tears_and_ages_nothing(tmp_path: Path):
    jumps = many(40)
    with working(tmp_path) as work:
        for number in range(jumps):
            work.server.arm("clock", jump_s=HOUR_S * (-1) ** number)
            work.goes_on(f"after jump {number}", commits=2)
            if number % 5 == 4:
                # The next one looks for itself where the log ends.
                work.restart()
                work.goes_on("after a start at another time")
        work.server.disarm()
    conclude(work, tmp_path, "clock: an hour forward or back", jumps)
    # Nobody but those whom it has met at a restart.
    assert all("the server is stopping" in said for said in work.bank.refusals())


# Those who stand still, and those who are slow


def stop(work: Work, duration_s: float) -> None:
    with standing_still(work.server.process.pid):
        # Not as a synchronisation: the time is the fault.
        time.sleep(duration_s)
    work.goes_on(f"after {duration_s} s of standing still")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("duration_s", "times"), [(1, 30), (60, 3)])
def test_a_server_that_stands_still_tells_no_lie(
    tmp_path: Path, duration_s: float, times: int
):
    """In a minute heartbeats are missed, and timeouts pass."""
    with working(tmp_path, shares_cache=True) as work:
        for _ in range(many(times)):
            stop(work, duration_s)
    conclude(work, tmp_path, f"SIGSTOP for {duration_s} s", many(times))
    if duration_s > 30:
        assert work.bank.counts["disconnects"] + work.bank.counts["unknown"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_half_open_connections_hold_nobody_up_and_tell_no_lie(tmp_path: Path):
    """One program's connections swallow everything; the other one goes on."""
    rounds, silenced = many(6), 0
    with working(tmp_path, options=IMPATIENT) as work:
        for number in range(rounds):
            silenced += work.proxy.silence()
            work.bank.wait_for_commits(5, "beside it", program=0)
            # By then it has found out, by the silence alone.
            work.goes_on(f"after silence {number}")
            work.proxy.end_silence()
    assert silenced >= rounds
    conclude(work, tmp_path, "half-open connections", silenced)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_slow_readers_hold_nobody_up_and_see_nothing_stale(tmp_path: Path):
    """Some bytes at a time; and, in between, nothing for longer than a timeout."""
    rounds = many(15)
    with working(tmp_path, options=IMPATIENT) as work:
        for number in range(rounds):
            work.proxy.slow_down(Direction.TO_CLIENT, 2000, 0.002)
            work.goes_on(f"while one is slow, round {number}")
            work.proxy.stall(Direction.TO_CLIENT)
            wait_until(lambda: work.proxy.held_back(Direction.TO_CLIENT), "an answer")
            work.bank.wait_for_commits(5, "beside one who does not read", program=0)
            work.proxy.restore_passage()
            work.goes_on(f"after round {number}")
    conclude(work, tmp_path, "slow readers", 2 * rounds)


# Many at once


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_200_clients_that_reconnect_at_once_see_nothing_stale(tmp_path: Path):
    rounds = many(5)
    with working(tmp_path) as work, ExitStack() as stack:
        crowd = [
            stack.enter_context(client(work.proxy.address)) for _ in range(CLIENTS)
        ]
        for number in range(rounds):
            if number % 2:
                work.proxy.cut()
            else:
                work.server.kill()
                work.server.start()
            # The other program conflicts with this one nearly always: what it hears of
            # it comes through a proxy that has one interpreter with all the clients.
            work.bank.wait_for_commits(1, f"while {CLIENTS} reconnect", program=0)
            last = last_of(work.bank, "p0t0")
            with ThreadPoolExecutor(20) as pool:
                for wrong in pool.map(lambda db, last=last: look(db, last), crowd):
                    assert wrong is None
    conclude(work, tmp_path, f"{CLIENTS} clients reconnect at once", rounds)


@contextmanager
def client(address: tuple[str, int]) -> Iterator[DB]:
    db = DB(ClientStorage(address, wait_timeout=60, cache_size=1_000_000))
    try:
        yield db
    finally:
        db.close()


def last_of(bank: Bank, worker: str) -> int:
    """The number of the last commit that a worker was told of."""
    (journal,) = (path for path in bank.journals() if path.stem == worker)
    return max(
        int(line.key.split(":")[1])
        for line in read_journal(journal)
        if line.outcome == COMMITTED
    )


def look(db: DB, last: int) -> str | None:
    """What is wrong with what a client sees that has reconnected."""

    def number() -> int:
        manager.begin()
        key: str = connection.root()["marks"]["p0t0"][0]["key"]
        return int(key.split(":")[1]) if key else -1

    manager = transaction.TransactionManager()
    connection = db.open(manager)
    try:
        # It was committed before, so it will be seen soon, and then always.
        wait_until(lambda: number() >= last, "what was committed before")
        return imbalance(connection.root())
    finally:
        manager.abort()
        connection.close()


# Killed, at every step


def kill_at_every_step(
    work: Work, phase: str, steps: range, *, passes: int = 20
) -> tuple[int, bool]:
    """At the first, the second ... until no run through the phase has so many.

    How often it was killed, and whether the end of the phase was reached.
    """
    server = work.server
    for kills, at in enumerate(steps):
        passed = len(server.happened("passed"))
        server.arm("kill", phase=phase, at=at)
        with provoked(work, phase):
            server.wait_until_dead_or("passed", passed + passes)
            server.disarm()
        work.recovers(f"the bank goes on after the kill at step {at} of {phase}")
        if len(server.happened("killed")) == kills:
            return kills, True
    return len(steps), False


@contextmanager
def provoked(work: Work, phase: str) -> Iterator[None]:
    """While the phase is gone through: most are by any commit."""
    if phase == "index save at the end":
        work.server.send(signal.SIGTERM)
    if phase != "pack":
        yield
        return
    with ThreadPoolExecutor(1) as pool:
        packing = pool.submit(pack, work.server.address, PHASES[phase].passes)
        yield
        packing.result()


def pack(address: tuple[str, int], times: int) -> None:
    """Pack, again and again, as long as the server is there."""
    storage = ClientStorage(address, wait_timeout=1)
    try:
        with suppress(ClientDisconnected):
            for _ in range(times):
                storage.pack(time.time())
    finally:
        storage.close()


class Phase(NamedTuple):
    """One of `faulty_server.PHASES`."""

    # Every so manieth step is tried, each time others.
    stride: int
    # So many runs without a step say that there is none.
    passes: int = 20
    # Whether the programs have a cache on disk together, or each its own in memory.
    shares_cache: bool = False


PHASES = {
    # Votes that merge states take many more steps than others, and are few.
    "vote": Phase(8, passes=100),
    "vote in a thread": Phase(6),
    "finish": Phase(1, shares_cache=True),
    "append": Phase(2, shares_cache=True),
    "announce": Phase(8, shares_cache=True),
    "pack": Phase(4, passes=3),
    "index save": Phase(2, passes=3),
    # The server ends in any case.
    "index save at the end": Phase(2, passes=10_000),
}


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("phase", PHASES)
def test_a_server_killed_at_any_step_of_a_phase_loses_nothing(
    tmp_path: Path, phase: str
):
    """At each of them with ``FAULT_TIMES=8``."""
    stride = max(1, round(PHASES[phase].stride / FACTOR))
    steps = range(random.randrange(stride), 10_000, stride)
    print(phase, steps)
    with working(tmp_path, shares_cache=PHASES[phase].shares_cache) as work:
        kills, is_over = kill_at_every_step(
            work, phase, steps, passes=PHASES[phase].passes
        )
    assert is_over
    assert kills > 3 or FACTOR < 1
    conclude(work, tmp_path, f"killed in any step: {phase}", kills)
    # The next server knows what became of everything.
    assert not work.bank.counts[UNKNOWN]


# A few of each, for every run of the tests


@pytest.mark.timeout(120)
def test_a_few_faults_of_each_kind_lose_tear_and_age_nothing(tmp_path: Path):
    with working(tmp_path, shares_cache=True) as work:
        times = sum(
            fail_disk(work, how, range(1, 2))
            for how in ("full", "broken once", "short")
        )
        for phase in ("vote", "append", "announce"):
            kills, _is_over = kill_at_every_step(work, phase, range(5, 6))
            times += kills
        for jump_s in (HOUR_S, -HOUR_S):
            with work.server.armed("clock", jump_s=jump_s):
                work.goes_on("after a jump of the clock")
        stop(work, 0.3)
    assert times >= 6
    conclude(work, tmp_path, "a few of each", times + 3)
