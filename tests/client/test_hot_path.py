"""What a load costs: one send, one receive, no lock that others hold, nobody woken.

And a commit: one of each, if nobody else takes part in it.
"""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import transaction
from ZODB import DB
from ZODB.utils import p64, z64

from zeolith.client import round_trip
from zeolith.client.round_trip import RoundTrip
from zeolith.client.storage import ClientStorage
from zeolith.client.tids import MAX_TID
from zeolith.protocol.compiled import SWITCH, compiled_module

from ..support.script import tid
from ..support.serving import ServerProcess
from .conftest import client_threads

LOADS = 300
OIDS = [p64(number) for number in range(1, LOADS + 1)]
# A program that loads absent objects, of which no answer is kept, between two calls
# that stand out in a list of its system calls.
PROGRAM = f"""
import os, sys
from ZODB.POSException import POSKeyError
from zeolith.client.storage import ClientStorage
from zeolith.client.tids import MAX_TID

storage = ClientStorage(sys.argv[1])
storage.ping()
os.getpgid(0)
for number in range({LOADS}):
    try:
        storage.loadBefore(b"absentee", MAX_TID)
    except POSKeyError:
        pass
os.getpgid(0)
storage.close()
"""
# Of memory, and of time where the kernel does not give it without a call.
UNRELATED = {"brk", "mmap", "munmap", "mremap", "madvise", "clock_gettime"}
# Of a thread that stays awake for a moment, in case the answer comes.
WATCHING = {"sched_yield"}
SENDING = {"send", "sendto"}
RECEIVING = {"recv", "recvfrom"}


class Counting:
    """A socket that counts what is asked of it."""

    def __init__(self, sock: Any):
        self._sock = sock
        self.asked: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        self.asked[name] += 1
        return getattr(self._sock, name)


class Untouchable:
    """A lock, or a condition, that nobody may take."""

    def __enter__(self) -> None:
        raise AssertionError("a lock was taken")

    def __exit__(self, *_error: object) -> None:
        raise AssertionError("a lock was released")

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} of a lock")


def test_a_load_is_one_send_and_one_receive_and_takes_no_lock_of_the_connection(
    server, monkeypatch
):
    server.answers["load"] = [b"data", tid(1), None, tid(1)]
    storage = ClientStorage(server.address)
    storage.ping()
    session = storage.current_session
    assert session is not None
    (channel,) = session._pool.channels
    counting: Any = Counting(channel._socket)
    opened = len(server.hellos)
    with monkeypatch.context() as patched:
        patched.setattr(channel, "_socket", counting)
        patched.setattr(channel, "_round_trip", RoundTrip(counting))
        patched.setattr(session, "_lock", Untouchable())
        patched.setattr(session._pool, "_lock", Untouchable())
        patched.setattr(storage.position, "_lock", Untouchable())
        patched.setattr(storage.position, "_condition", Untouchable())
        patched.setattr(storage._connector, "_changed", Untouchable())
        for oid in OIDS:
            assert storage.loadBefore(oid, MAX_TID) == (b"data", tid(1), None)
    storage.close()
    assert counting.asked == {"sendall": LOADS, "recv": LOADS}
    assert len(server.hellos) == opened


# In a process of its own


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    with ServerProcess(tmp_path) as server:
        yield server.listening[0]


@pytest.mark.parametrize(
    ("is_own", "round_trips"), [(True, 1), (False, 2)], ids=["own", "of a manager"]
)
def test_a_commit_of_the_threads_own_transaction_is_one_round_trip(
    endpoint, monkeypatch, nothing_left_behind, is_own, round_trips
):
    storage = ClientStorage(endpoint)
    db = DB(storage)
    manager = transaction.manager if is_own else transaction.TransactionManager()
    root = db.open(manager).root()
    root["count"] = 0
    manager.commit()
    session = storage.current_session
    assert session is not None
    (channel,) = session._pool.channels
    counting: Any = Counting(channel._socket)
    with monkeypatch.context() as patched:
        patched.setattr(channel, "_socket", counting)
        patched.setattr(channel, "_round_trip", RoundTrip(counting))
        root["count"] = 1
        manager.commit()
    db.close()
    assert counting.asked == {"sendall": round_trips, "recv": round_trips}


def sleeps_of(threads: Collection[threading.Thread]) -> int:
    """How often ``threads`` of this process fell asleep until now."""
    count = 0
    for thread in threads:
        status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
        count += int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return count


@pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="there is no /proc of Linux"
)
def test_no_other_thread_is_woken_by_a_load(endpoint, nothing_left_behind):
    storage = ClientStorage(endpoint)
    storage.ping()
    # Who runs the tests has threads of its own, which may wake whenever they like.
    others = client_threads()
    before = sleeps_of(others)
    for _ in range(LOADS):
        # Which is a round trip as a load is, and needs no object.
        storage.ping()
    woken = sleeps_of(others) - before
    assert before > 0, "there is no other thread"
    storage.close()
    # A heartbeat may come meanwhile.
    assert woken < LOADS / 50


@pytest.fixture
def strace() -> str:
    """The program that lists system calls, if it may."""
    found = shutil.which("strace")
    if found is None:
        pytest.skip("there is no strace")
    if subprocess.run([found, "-f", "true"], capture_output=True).returncode != 0:
        pytest.skip("strace may not look at processes here")
    return found


@pytest.mark.parametrize("switch", ["0", "1"])
def test_a_load_is_two_system_calls(endpoint, strace, tmp_path, switch):
    """In all threads together, with either half of the round trip.

    What is done for an answer that is not there yet does not count.
    """
    if switch == "1" and round_trip.compiled() is None:
        pytest.skip("there is no compiled module")
    listed = tmp_path / "calls"
    subprocess.run(
        [strace, "-f", "-o", listed, sys.executable, "-c", PROGRAM, endpoint],
        env={**os.environ, SWITCH: switch},
        check=True,
    )
    _before, between, _after = listed.read_text().split("getpgid(0")
    lines = between.splitlines()
    calls = Counter(re.findall(r"^\d+ +(\w+)\(", between, re.MULTILINE))
    # A call that another thread's event interrupts is listed in two lines.
    ended = r"^\d+ +(?:<\.\.\. )?(\w+)(?:\(| resumed)"
    calls -= Counter(
        found[1]
        for line in lines
        if "EAGAIN" in line and (found := re.match(ended, line))
    )
    unrelated = UNRELATED | (WATCHING if switch == "1" else set())
    related = {name: count for name, count in calls.items() if name not in unrelated}
    assert related.keys() <= SENDING | RECEIVING
    # A heartbeat of the other thread's may be among them.
    for names in (SENDING, RECEIVING):
        assert LOADS <= sum(related.get(name, 0) for name in names) <= LOADS + 2


@pytest.mark.parametrize("switch", ["0", "1"])
def test_a_load_is_three_system_calls_of_the_server(
    strace, tmp_path, monkeypatch, switch
):
    """One to receive, one to read the record, one to send; by either of its ways."""
    if switch == "1" and compiled_module("zeolith.server._answering") is None:
        pytest.skip("there is no compiled module")
    monkeypatch.setenv(SWITCH, switch)
    listed = tmp_path / "calls"
    with ServerProcess(tmp_path) as server, client_with_root(server) as storage:
        process = str(server.process.pid)
        tracing = subprocess.Popen(
            [strace, "-f", "-p", process, "-o", listed],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert tracing.stderr is not None
        assert "attached" in tracing.stderr.readline()
        try:
            for _ in range(LOADS):
                storage.cache.forget(z64)
                assert storage.loadBefore(z64, MAX_TID)
        finally:
            tracing.terminate()
            tracing.communicate()
    calls = Counter(re.findall(r"^\d+ +(\w+)\(", listed.read_text(), re.MULTILINE))
    if not calls["preadv2"]:
        pytest.skip("nobody can say here what is in memory")
    # A heartbeat may be among them, and what is in memory is not always to be had.
    for name in ("read", "preadv2", "write"):
        assert LOADS <= calls[name] <= LOADS + 6, calls


@contextmanager
def client_with_root(server: ServerProcess) -> Iterator[ClientStorage]:
    """A storage whose server has an object, the root, of which nothing is cached."""
    storage = ClientStorage(server.address)
    DB(storage).close()
    storage = ClientStorage(server.address)
    yield storage
    storage.close()
