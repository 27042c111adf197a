"""A server with faults, in a process of its own::

    python -m tests.support.faulty_server FOLDER serve -C server.conf

It is the program of zeolith.server, around some of whose functions, and around whose
system calls, something stands that fails when it is told to. FOLDER/plan.json says
what is to fail; it may be replaced at any time, and what is counted is counted from
then on. Every fault that happened is a line of FOLDER/happened, written before it
does. The test's half is `faulty`.

Plans, by their "kind"; without a file nothing fails:

disk     "how": see `DISK_WAYS`, "at": which write, sync, cut, reservation or rename of
         the server is the first to fail
read     "oid": whose record cannot be read, in hexadecimal
clock    "jump_s": how far the clock is from the right time
kill     "phase": see `PHASES`, "at": the server kills itself (SIGKILL) in the first
         run through the phase that comes so far: before this call of a function of
         zeolith, or before or after this system call. A run that ends before is a line
         "passed STEPS" of FOLDER/happened.
lie      commits are acknowledged and not written
hush     clients are not told of half of the objects that a commit changes
"""

import builtins
import errno
import io
import json
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

# What a disk does: at one step, whatever it is; or from it on, and one that is full
# takes nothing more, but cuts and syncs.
DISK_WAYS = {
    "full": errno.ENOSPC,
    "full once": errno.ENOSPC,
    "broken": errno.EIO,
    "broken once": errno.EIO,
    "short": 0,
}
# In which function, of which class or module, a phase is done.
PHASES = {
    "vote": "zeolith.server.committer:Committer.vote",
    "vote in a thread": "zeolith.storage.preparing:Preparation.vote",
    "finish": "zeolith.server.committer:Committer.finish",
    "append": "zeolith.storage.appending:Appender.append",
    "announce": "zeolith.server.committer:Committer._appended",
    "pack": "zeolith.storage.packing:FilePack.run",
    "index save": "zeolith.storage.index:save",
    "index save at the end": "zeolith.storage.index:save_still",
}
# By these a database takes more room.
_GROWING = ("pwrite", "pwritev", "write", "reserve", "link")
# Whose calls of system calls are counted.
_CALLERS = ("zeolith.", "ZODB.")


class Faults:
    """What is to fail now, and what has failed."""

    def __init__(self, folder: Path):
        self._plan_path = folder / "plan.json"
        self._happened_path = folder / "happened"
        self._version: tuple[int, int] | None = None
        self._plan: dict[str, Any] = {}
        self._count = 0
        self._lock = threading.Lock()

    def plan(self, kind: str) -> dict[str, Any] | None:
        """The plan, if it is of this kind; any thread."""
        try:
            found = os.stat(self._plan_path)
        except FileNotFoundError:
            return None
        version = found.st_mtime_ns, found.st_ino
        with self._lock:
            if version != self._version:
                self._plan = json.loads(self._plan_path.read_text())
                self._version, self._count = version, 0
            return self._plan if self._plan["kind"] == kind else None

    def next_step(self) -> int:
        """Which one it is since the plan was made."""
        with self._lock:
            self._count += 1
            return self._count - 1

    def happens(self, text: str) -> None:
        """Tell the test; when this returns, the test will know."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        descriptor = os.open(self._happened_path, flags, 0o600)
        try:
            os.write(descriptor, text.encode() + b"\n")
        finally:
            os.close(descriptor)


class Disk:
    """The system calls by which a server writes; any thread."""

    def __init__(self, faults: Faults):
        self._faults = faults
        # Of each file, by its inode, what is on the disk for sure.
        self._synced_bytes: dict[int, int] = {}

    def install(self) -> None:
        for name in ("pwrite", "ftruncate", "replace", "rename", "link"):
            setattr(os, name, self._failing(name, getattr(os, name)))
        for name in ("fsync", "fdatasync"):
            setattr(os, name, self._syncing(name, getattr(os, name)))
        os.pwritev = self._writing(os.pwritev)
        builtins.open = io.open = self._opening(builtins.open)

    def install_in_zeolith(self) -> None:
        """What is called without Python."""
        disk = import_module("zeolith.storage.disk").Disk
        disk.reserve = self._failing("reserve", disk.reserve)

    def step(self, name: str) -> bool:
        """Raises OSError if this one is to fail; whether it is to be done in part."""
        plan = self._faults.plan("disk")
        if plan is None:
            return False
        how, at = plan["how"], plan["at"]
        if how == "short" and name != "pwritev":
            return False
        if how == "full" and name not in _GROWING:
            return False
        number = self._faults.next_step()
        stays = how in ("full", "broken")
        if number < at or (number > at and not stays):
            return False
        self._faults.happens(f"{how}: {name}")
        if how == "short":
            return True
        raise OSError(DISK_WAYS[how], os.strerror(DISK_WAYS[how]))

    def _failing(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(real)
        def failing(*args: Any, **options: Any) -> Any:
            self.step(name)
            return real(*args, **options)

        return failing

    def _syncing(self, name: str, real: Callable[[int], None]) -> Callable[[int], None]:
        """A kernel may drop what it could not write, and say so only once."""

        def syncing(fd: int) -> None:
            before = os.fstat(fd)
            try:
                self.step(name)
            except OSError:
                synced_bytes = self._synced_bytes.get(before.st_ino)
                if name == "fdatasync" and synced_bytes is not None:
                    os.truncate(fd, synced_bytes)
                raise
            real(fd)
            self._synced_bytes[before.st_ino] = before.st_size

        return syncing

    def _writing(self, real: Callable[..., int]) -> Callable[..., int]:
        def writing(fd: int, buffers: Any, *rest: Any) -> int:
            if self.step("pwritev"):
                data = b"".join(map(bytes, buffers))
                buffers = [data[: max(1, len(data) // 2)]]
            return real(fd, buffers, *rest)

        return writing

    def _opening(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Files of a database, which Python would write to below our hands."""
        disk = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                disk.step("write")
                return super().write(data)

            def truncate(self, size: int | None = None) -> int:
                disk.step("truncate")
                return super().truncate(size)

        def opening(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            is_ours = not isinstance(file, int) and "Data.fs" in os.fspath(file)
            if not is_ours or mode not in ("r+b", "w+b", "wb") or args or options:
                return real(file, mode, *args, **options)
            raw = Raw(file, mode.replace("b", ""))
            return io.BufferedWriter(raw) if mode == "wb" else io.BufferedRandom(raw)

        return opening


class Reading:
    """The system calls by which records are read, and one that cannot be."""

    def __init__(self, faults: Faults):
        self._faults = faults
        # The one that was opened last is the one in use.
        self._generation: Callable[[], Any] = lambda: None

    def install(self) -> None:
        os.preadv = self._reading(os.preadv, self._shortened_buffers)
        os.pread = self._reading(os.pread, lambda _size, left: left)

    def install_in_zeolith(self) -> None:
        generation_class = import_module("zeolith.storage.records").Generation
        real = generation_class.__init__

        def opened(generation: Any, *args: Any) -> None:
            real(generation, *args)
            self._generation = weakref.ref(generation)

        generation_class.__init__ = opened

    def _reading(
        self, real: Callable[..., Any], shortened: Callable[[Any, int], Any]
    ) -> Callable[..., Any]:
        def reading(fd: int, what: Any, position: int, *flags: int) -> Any:
            bad_at = self._bad_place()
            if bad_at is None:
                return real(fd, what, position, *flags)
            if bad_at <= position < bad_at + 42:
                self._faults.happens("cannot be read")
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if position < bad_at < position + _size(what):
                # A kernel gives what comes before the page that it cannot read.
                what = shortened(what, bad_at - position)
            return real(fd, what, position, *flags)

        return reading

    def _bad_place(self) -> int | None:
        plan = self._faults.plan("read")
        generation = self._generation()
        if plan is None or generation is None:
            return None
        place: int | None = generation.position_of(bytes.fromhex(plan["oid"]))
        return place

    @staticmethod
    def _shortened_buffers(buffers: list[Any], left: int) -> list[Any]:
        return [memoryview(buffers[0])[:left]]


def _size(what: Any) -> int:
    return what if isinstance(what, int) else sum(map(len, what))


class Death:
    """Comes after so many steps of a phase."""

    def __init__(self, faults: Faults, phase: str, left: int):
        self._faults = faults
        self._phase = phase
        self._left = left
        self.steps = 0

    def __call__(self, frame: FrameType, event: str, called: Any) -> None:
        """Called for every call in the phase; see sys.setprofile."""
        name = frame.f_globals.get("__name__", "")
        if event == "call":
            is_step = name.startswith("zeolith.")
        else:
            is_step = event in ("c_call", "c_return") and _is_system_call(called)
            is_step = is_step and name.startswith(_CALLERS)
        if not is_step:
            return
        self.steps += 1
        if self._left:
            self._left -= 1
            return
        sys.setprofile(None)
        what = frame.f_code.co_qualname if event == "call" else called.__name__
        self._faults.happens(f"killed in {self._phase}: {event} {what}")
        os.kill(os.getpid(), signal.SIGKILL)


def _is_system_call(called: Any) -> bool:
    owner = getattr(called, "__self__", None)
    return getattr(called, "__module__", "") == "posix" or isinstance(owner, io.IOBase)


def kill_in_phases(faults: Faults) -> None:
    for phase, place in PHASES.items():
        module_name, _colon, names = place.partition(":")
        owner: Any = import_module(module_name)
        *classes, name = names.split(".")
        for each in classes:
            owner = getattr(owner, each)
        setattr(owner, name, _phase(faults, phase, getattr(owner, name)))


def _phase(faults: Faults, phase: str, real: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(real)
    def passing(*args: Any, **options: Any) -> Any:
        plan = faults.plan("kill")
        if plan is None or plan["phase"] != phase or sys.getprofile() is not None:
            return real(*args, **options)
        death = Death(faults, phase, plan["at"])
        sys.setprofile(death)
        try:
            return real(*args, **options)
        finally:
            sys.setprofile(None)
            faults.happens(f"passed {death.steps}")

    return passing


def let_clock_jump(faults: Faults) -> None:
    real = time.time

    def now_s() -> float:
        plan = faults.plan("clock")
        return real() + (plan["jump_s"] if plan else 0)

    time.time = now_s


def let_it_lie(faults: Faults) -> None:
    """For the test of the test: a server that is not to be trusted."""
    appending = import_module("zeolith.storage.appending")
    served = import_module("zeolith.server.served").Served
    append, announce = appending.Appender.append, served.append

    def append_or_lie(appender: Any, group: Any, tid_floor: bytes) -> Any:
        if not faults.plan("lie"):
            return append(appender, group, tid_floor)
        tid, outcomes = max(tid_floor, appender._file._ltid), []
        for preparation in group:
            tid = appending.next_tid(time.time(), tid)
            outcomes.append(appending.Finished(tid, list(preparation.written)))
            faults.happens("a lie")
        return outcomes

    def append_or_hush(served: Any, tid: bytes, oids: Any, transaction: Any) -> Any:
        if faults.plan("hush"):
            faults.happens("a silence")
            oids = sorted(oids)[::2]
        return announce(served, tid, oids, transaction)

    appending.Appender.append = append_or_lie
    served.append = append_or_hush


def main(folder: str, *arguments: str) -> None:
    faults = Faults(Path(folder))
    disk, reading = Disk(faults), Reading(faults)
    # Before anybody imports them by name.
    disk.install()
    reading.install()
    let_clock_jump(faults)
    disk.install_in_zeolith()
    reading.install_in_zeolith()
    kill_in_phases(faults)
    let_it_lie(faults)
    # Worth saving at any time, so that there are many of these to be killed in.
    indexed: Any = import_module("zeolith.storage.indexed")
    indexed.GROWTH_MIN_BYTES, indexed.GROWTH_MIN_OF_INDEX = 1, 0
    # Reserved in small pieces, so that many a vote has to wait for the disk.
    room: Any = import_module("zeolith.storage.room")
    room.AHEAD_BYTES = 50_000
    daemon: Any = import_module("zeolith.server.daemon")
    daemon.TICK_INTERVAL_S = 0.1
    sys.argv = ["zeolith", *arguments]
    import_module("zeolith.server.cli").main()


if __name__ == "__main__":
    main(*sys.argv[1:])
