"""The process that packs a Data.fs: ``python -m zeolith.storage.packer``.

Started by ``packing`` for one pack. It reads the Data.fs without any lock, up to a
position that the server names, and writes ``Data.fs.pack``, the index of it and the
list of blobs that go. The garbage collection and the format are ZODB's (``fspack``).
What it needs of memory and of Python's lock is gone with it, or not the server's.

The talk is one JSON object a line. The server writes the job, then orders; the packer
writes progress at any time, and one report when the job, and then each order, is done:

    {"path": , "stop": hex tid, "gc": bool, "end": position, "blobs": bool}
    {"end": position, "save_index": bool, "urgent": bool}

    {"phase": , "fraction": , "bytes": }        progress
    {"copied": position, "size": , "changed": hex}   done; changed: the oids, each with
                                                its position, since the index was saved
    {"nothing": text}                           there is nothing to pack, and no .pack
    {"error": text, "errno": number or null}    given up

``end`` is always the end of a finished transaction. The end of the standard input is
the end of the packer: the server is gone, or has no use for it.

Two threads. The long work is done in one that the system schedules after everybody
else's; the main thread, whose priority is the server's, waits for orders and does the
urgent ones itself, for then commits wait.
"""

import json
import os
import resource
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ZODB.FileStorage.FileStorage import RedundantPackWarning
from ZODB.FileStorage.format import CorruptedDataError
from ZODB.FileStorage.fspack import GC, FileStoragePacker, PackCopier, PackError
from ZODB.fsIndex import fsIndex
from ZODB.serialize import referencesf

from zeolith.storage.blobs import is_blob_record
from zeolith.storage.syncing import sync_path

PROGRESS_INTERVAL_S = 0.25
# Written to disk this often, so that no sync at the end holds up those of commits.
SYNC_BYTES = 32 * 1024 * 1024
_COPY_BUFFER_BYTES = 256 * 1024
NICE = 19
# To look for the references of some records may take so much: the largest have 256 MB.
REFERENCES_BYTES_MAX = 1024**3
_MEMORY = Path("/proc/self/statm")
# Where each phase begins, of the whole. A guess: it is for a progress bar.
_BEGINS = {"reading": 0.0, "collecting": 0.3, "copying": 0.5, "catching up": 0.95}
_ENDS = {"reading": 0.3, "collecting": 0.5, "copying": 0.95, "catching up": 1.0}


class Progress:
    """Says how far the pack is, not more often than somebody would look."""

    def __init__(self) -> None:
        self._said_at = 0.0
        self._fraction = 0.0

    def at(self, phase: str, done: float, whole: float, position: int) -> None:
        """``done`` of ``whole`` of ``phase``, for which ``position`` was read."""
        now = time.monotonic()
        if now - self._said_at < PROGRESS_INTERVAL_S:
            return
        self._said_at = now
        part = min(1.0, done / whole) if whole else 1.0
        begin, end = _BEGINS[phase], _ENDS[phase]
        self._fraction = max(self._fraction, begin + part * (end - begin))
        say(phase=phase, fraction=round(self._fraction, 4), bytes=position)


class _NotAPickle(Exception):
    """A record in which references cannot be looked for."""


def _bound_memory(more: int | None) -> None:
    """Let the process take so many bytes more than it has; None: any number.

    Five bytes of a record are enough to have the unpickler take all memory there is.
    """
    _soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = hard
    if more is not None:
        try:
            pages = int(_MEMORY.read_bytes().split()[0])
        except OSError:
            # Only Linux tells.
            return
        limit = pages * resource.getpagesize() + more
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _references(record: bytes) -> Any:
    try:
        return referencesf(record)
    except Exception as error:
        raise _NotAPickle(f"{type(error).__name__}: {error}") from error


class _Collection(GC):
    """ZODB's garbage collection, which says how far it is."""

    progress: Progress
    # Records whose references were followed.
    _followed = 0

    def checkTxn(self, th: Any, pos: int) -> None:
        """Called for each transaction that is read."""
        self.progress.at("reading", pos, self.eof, pos)
        super().checkTxn(th, pos)

    def findrefs(self, pos: int) -> Any:
        """Called for each object that is reachable."""
        if self._followed % 1024 == 0:
            _bound_memory(REFERENCES_BYTES_MAX)
        self._followed += 1
        objects = len(self.oid2curpos) if self._followed % 1024 == 0 else 0
        if objects:
            self.progress.at("collecting", self._followed, objects, self.eof)
        try:
            return super().findrefs(pos)
        except _NotAPickle as error:
            raise PackError(
                f"the record of oid {self._read_data_header(pos).oid.hex()} is no"
                f" pickle ({error}), so it is not known what it refers to. If clients"
                " convert records, configure the server with the wrapper that knows"
                " how, or pack without garbage collection (pack-gc false)"
            ) from error


class _Copier(PackCopier):
    """Copies what was committed after the pack time."""

    def _resolve_backpointer(self, prev_txn: Any, oid: bytes, data: Any) -> int:
        try:
            position: int = super()._resolve_backpointer(prev_txn, oid, data)
        except PackError:
            position = 0
        if prev_txn is not None and not position:
            raise PackError(
                "a transaction that was undone meanwhile needs a revision that the"
                " pack removes; nothing was packed, pack again"
            )
        return position


class _Index(fsIndex):
    """An index that remembers what was added to it since it was saved."""

    changed: dict[bytes, int] | None = None

    def update(self, mapping: Any) -> None:
        """Called with the records of each transaction that was copied."""
        if self.changed is not None:
            self.changed.update(mapping)
        super().update(mapping)


class _NoLock:
    """In the place of the storage's lock, which is in another process."""

    def acquire(self) -> None:
        """Nobody else is here."""

    def release(self) -> None:
        """Nobody else is here."""


class _Snapshot:
    """What ZODB's packer wants to know of the storage."""

    # The list of blobs is not where ZODB puts it; see Packer.
    blob_dir = None
    is_blob_record = staticmethod(is_blob_record)

    def __init__(self, path: str, end: int):
        self._file = self
        self.name = path
        self._end = end
        self._lock = self._commit_lock = _NoLock()

    def getSize(self) -> int:
        """The end of what is committed."""
        return self._end


class Packer(FileStoragePacker):
    """ZODB's packer, in steps, up to ends that it is told."""

    _file: Any

    def __init__(self, job: dict[str, Any]):
        path = job["path"]
        stop = bytes.fromhex(job["stop"])
        super().__init__(_Snapshot(path, job["end"]), referencesf, stop, job["gc"])
        self.progress = Progress()
        self.gc = _Collection(self._file, job["end"], stop, job["gc"], _references)
        self.gc.progress = self.progress
        self.index = _Index()
        self._wants_blobs = job["blobs"]
        self._copied = 0
        self._synced = 0

    def copy_to_pack_time(self) -> bool:
        """Collect garbage and copy what was committed up to the pack time.

        False if nothing would be gained; then nothing was written.
        """
        try:
            self.gc.findReachable()
        finally:
            _bound_memory(None)
        self._reopen()
        self._tfile = open(self._path + ".pack", "w+b")  # noqa: SIM115
        # Whoever may not read the old file may not read the new one.
        os.fchmod(self._tfile.fileno(), os.stat(self._path).st_mode & 0o7777)
        if self._wants_blobs:
            # After the .pack: a list without it is that of a pack which is over.
            self.pack_blobs = True
            name = self._path + ".pack.removed"
            self.blob_removed = open(name, "wb")  # noqa: SIM115
        self._file.seek(0)
        self._tfile.write(self._file.read(self._metadata_size))
        self._copier = _Copier(self._tfile, self.index, self.tindex)
        self._copied, size = self.copyToPacktime()
        self._sync()
        if self.blob_removed is not None:
            self.blob_removed.flush()
            os.fsync(self.blob_removed.fileno())
        return bool(self._copied != size)

    def copyDataRecords(self, pos: int, th: Any) -> tuple[int, int]:
        """Called for each transaction up to the pack time."""
        self.progress.at("copying", pos, self.file_end, pos)
        end = pos + th.tlen + 8
        new_position, position = super().copyDataRecords(pos, th)
        if not new_position and end >= self.file_end:
            # Of the last transaction at least the tid stays: it is what clients
            # compare theirs with, and it must not go back.
            th.status = "p"
            new_position = self._tfile.tell()
            self._tfile.write(th.asString())
        self._sync(SYNC_BYTES)
        return new_position, position

    def copy_rest(self, end: int) -> None:
        """Copy what was committed since, up to ``end``."""
        # What is in the buffer may be of before it was finished.
        self._reopen()
        while self._copied < end:
            self.progress.at("copying", self._copied, end, self._copied)
            self._copied = self.copyOne(self._copied)
            self._sync(SYNC_BYTES)
        self._sync()

    def save_index(self) -> None:
        """Save the index of what is copied, and remember what comes later."""
        name = self._path + ".pack.index"
        self.index.save(self._tfile.tell(), name)
        sync_path(name)
        self.index.changed = {}

    def report(self) -> None:
        """Say that an order is done."""
        changed = self.index.changed or {}
        words = [oid + place.to_bytes(8, "big") for oid, place in changed.items()]
        changed.clear()
        text = b"".join(words).hex()
        say(copied=self._copied, size=self._tfile.tell(), changed=text)

    def _reopen(self) -> None:
        self._file.close()
        self._file = open(self._path, "rb", _COPY_BUFFER_BYTES)  # noqa: SIM115

    def _sync(self, at_least: int = 0) -> None:
        size = self._tfile.tell()
        if size - self._synced >= at_least:
            self._tfile.flush()
            os.fsync(self._tfile.fileno())
            self._synced = size


def say(**fields: Any) -> None:
    """Tell the server something."""
    # One write: both threads talk.
    os.write(1, json.dumps(fields).encode() + b"\n")


def _be_humble() -> None:
    """Let everybody else go first; for the calling thread only, where there is Linux.

    The input and output of a thread have the priority that follows from it.
    """
    if sys.platform == "linux":
        # A container may forbid it.
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
            os.nice(NICE)


def _give_up(error: BaseException) -> None:
    text = str(error)
    if isinstance(error, CorruptedDataError):
        text = f"the Data.fs is damaged: {text}"
    elif isinstance(error, KeyError):
        text = (
            f"object 0x{error.args[0].hex()} is referred to and is not there;"
            " pack without garbage collection, or mend the database"
        )
    elif isinstance(error, OSError):
        text = error.strerror or text
    elif not isinstance(error, PackError):
        text = repr(error)
    say(error=text, errno=getattr(error, "errno", None))


def _work(packer: Packer, orders: "SimpleQueue[dict[str, Any]]") -> None:
    """The long work, and the orders that may wait."""
    _be_humble()
    try:
        if not packer.copy_to_pack_time():
            say(nothing="nothing can be removed")
            return
        packer.report()
        while True:
            _obey(packer, orders.get())
    except RedundantPackWarning:
        say(nothing="it is packed up to a later time already")
    except BaseException as error:  # noqa: BLE001 - it is told
        _give_up(error)


def _obey(packer: Packer, order: dict[str, Any]) -> None:
    packer.copy_rest(order["end"])
    if order["save_index"]:
        packer.save_index()
    packer.report()


def main() -> None:
    """Do the job that the standard input says."""
    job = json.loads(sys.stdin.readline())
    orders: SimpleQueue[dict[str, Any]] = SimpleQueue()
    try:
        packer = Packer(job)
        threading.Thread(target=_work, args=(packer, orders), daemon=True).start()
        for line in sys.stdin:
            order = json.loads(line)
            if order["urgent"]:
                _obey(packer, order)
            else:
                orders.put(order)
    except BaseException as error:  # noqa: BLE001 - it is told
        _give_up(error)
    # Not by way of the other thread, which may be in the middle of anything.
    os._exit(0)


if __name__ == "__main__":
    main()
