"""Packing a Data.fs while everybody works: the server's part.

``packer`` writes the new file in a process of its own. A thread of the server (the
packing thread, one at a time for a file) tells it how far the log is finished, and
in the end puts the new file in the place of the old one:

1. rounds: the packer copies what was committed since, until little is left;
2. its index is read from the file that it wrote: in the server nothing is computed;
3. commits are held, by FileStorage's commit lock; the packer copies the rest, and says
   where the objects of these last rounds are;
4. *the swap*: the old index is moved away, the old file gets the name ``.old`` too (a
   hard link), the new one takes the name ``Data.fs`` by a rename, the directory is
   synced, and FileStorage gets the new file and index. Commits go on;
5. the blobs that are superfluous are removed (``superfluous``), then the old file.

Loads are never held: ``records.Generation`` keeps the old file and index for those who
are reading it.

Files beside ``Data.fs`` while a pack is under way, in the order in which they come:
``.pack``, ``.pack.removed`` (the blobs that go), ``.pack.index``, and for the swap
``.index.old``. Whether the swap has happened says ``.pack`` alone: it is gone with the
swap, and of a pack that is given up it is removed last. ``clean_up`` puts in order what
a crash has left, at the next start, before the Data.fs is opened.
"""

import json
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ZODB.blob import remove_committed_dir
from ZODB.FileStorage.FileStorage import FileStorageError
from ZODB.fsIndex import fsIndex

from zeolith.storage.commit import FUTURE_MAX_S
from zeolith.storage.index import load as load_index
from zeolith.storage.pack_progress import Packed, Packing
from zeolith.storage.records import Generation
from zeolith.storage.superfluous import remove_blobs
from zeolith.storage.syncing import sync_path
from zeolith.storage.tids import Z64, tid_at

logger = logging.getLogger(__name__)

# With less than this to copy commits may be held.
CLOSE_BYTES = 256 * 1024
# Who commits faster than the packer copies is held for what is left after these.
ROUNDS_MAX = 20
# A packer that does not do its last step in this time is given up: commits wait.
HOLD_TIMEOUT_S = 20.0
_READ_BYTES = 65536


class PackerProcess:
    """The packer as a child of this process; belongs to the packing thread."""

    def __init__(self, packing: Packing):
        self._packing = packing
        # Where the server finds what it has imported, the packer does too; but not by
        # way of the directory that it happens to be in.
        path = os.pathsep.join(each for each in sys.path if each)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "zeolith.storage.packer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            # What is typed at the server's terminal is the server's. (A session of its
            # own would be scheduled as if it were somebody else.)
            process_group=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin = self._process.stdin
        self._stdout = self._process.stdout
        self._unread = b""

    def order(self, **fields: Any) -> None:
        """Tell the packer something; that it is gone, ``report`` finds out."""
        with suppress(BrokenPipeError):
            self._stdin.write(json.dumps(fields).encode() + b"\n")
            self._stdin.flush()

    def report(self, timeout_s: float | None = None) -> dict[str, Any]:
        """The packer's next report; progress is noted on the way.

        Raises what the packer says, PackCancelled, or FileStorageError if it is gone or
        takes longer than ``timeout_s``.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            said = json.loads(self._line(deadline))
            if "phase" in said:
                packing = self._packing
                packing.phase, packing.fraction = said["phase"], said["fraction"]
                packing.bytes = said["bytes"]
            elif "error" in said:
                self._packing.refuse_if_cancelled()
                if said["errno"] is not None:
                    raise OSError(said["errno"], f"while packing: {said['error']}")
                raise FileStorageError(f"packing failed: {said['error']}")
            else:
                report: dict[str, Any] = said
                return report

    def _line(self, deadline: float | None) -> bytes:
        while b"\n" not in self._unread:
            if deadline is not None:
                left_s = max(0.0, deadline - time.monotonic())
                poll = select.poll()
                poll.register(self._stdout.fileno(), select.POLLIN)
                if not poll.poll(left_s * 1000):
                    raise FileStorageError("packing failed: the packer does not answer")
            data = os.read(self._stdout.fileno(), _READ_BYTES)
            if not data:
                self._packing.refuse_if_cancelled()
                code = self._process.wait()
                how = f"signal {-code}" if code < 0 else f"exit status {code}"
                raise FileStorageError(f"packing failed: the packer ended by {how}")
            self._unread += data
        line, _newline, self._unread = self._unread.partition(b"\n")
        return line

    def kill(self) -> None:
        """End it at once, from any thread; whoever waits for a report hears of it."""
        self._process.kill()

    def close(self) -> None:
        """End it, wait until it is gone, and let go of it."""
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):
            self._stdin.close()
        self._stdout.close()


class FilePack:
    """One pack of one Data.fs, in the packing thread."""

    def __init__(self, file: Any, packing: Packing):
        """``file`` is a FileStorage."""
        self._file = file
        self._packing = packing
        self._path: str = file._file_name
        self._blob_dir: str | None = file.blob_dir

    def run(self, time_s: float, gc: bool | None) -> Packed:
        """Pack to ``time_s``; ``gc`` None: as the storage's options say.

        Raises FileStorageError (another pack is under way, the time is in the future,
        the packer failed), PackCancelled, OSError (above all a full disk). Whatever is
        raised, the database is what it was, or it is packed.
        """
        if time_s > time.time() + FUTURE_MAX_S:
            raise FileStorageError("the pack time is in the future")
        with self._alone():
            packing = self._packing
            size = packing.bytes_total = self._file.getSize()
            stop = tid_at(time_s)
            if stop == Z64:
                raise FileStorageError("Invalid pack time")
            if not len(self._file):
                return Packed(False, size, size)
            clear(self._path)
            finish_leftovers(self._file)
            self._make_room()
            if gc is None:
                gc = bool(self._file._pack_gc)
            try:
                has_changed = self._pack(stop, gc)
            finally:
                packing.is_cancellable = False
                clear(self._path)
            return Packed(has_changed, size, self._file.getSize())

    @contextmanager
    def _alone(self) -> Iterator[None]:
        file = self._file
        with file._lock:
            if file._pack_is_in_progress:
                raise FileStorageError("another pack is under way (Already packing)")
            file._pack_is_in_progress = True
        try:
            yield
        finally:
            with file._lock:
                file._pack_is_in_progress = False

    def _make_room(self) -> None:
        """Remove what the last pack has kept, as ZODB does, before the disk is full."""
        _remove(self._path + ".old")
        if self._blob_dir and os.path.exists(self._blob_dir + ".old"):
            remove_committed_dir(self._blob_dir + ".old")

    def _pack(self, stop: bytes, gc: bool) -> bool:
        process = PackerProcess(self._packing)
        try:
            self._packing.begins(process)
            process.order(
                path=self._path,
                stop=stop.hex(),
                gc=gc,
                end=self._file.getSize(),
                blobs=self._blob_dir is not None,
            )
            report = process.report()
            if "nothing" in report:
                logger.info("%s: %s", self._path, report["nothing"])
                return False
            index, report = self._catch_up(process, report)
            old = self._replace(process, index, report)
        finally:
            process.close()
        self._packing.phase = "removing what is old"
        finish_leftovers(self._file)
        # Nothing of it was written since. Whoever is last to close the old file may
        # wait for the file system to free it: not the loop.
        with suppress(OSError):
            old[1].close()
        del old
        return True

    def _catch_up(
        self, process: PackerProcess, report: dict[str, Any]
    ) -> tuple[fsIndex, dict[str, Any]]:
        """Have all but a little copied; returns the index, and what is copied."""
        rounds = 0
        while self._left(report) and rounds < ROUNDS_MAX:
            process.order(end=self._file.getSize(), save_index=False, urgent=False)
            report = process.report()
            rounds += 1
        self._packing.phase = "catching up"
        process.order(end=self._file.getSize(), save_index=True, urgent=False)
        report = process.report()
        saved = load_index(Path(self._path + ".pack.index"))
        assert saved is not None, "the packer has said that it is there"
        index: fsIndex = saved.objects
        rounds = 0
        while self._left(report) and rounds < ROUNDS_MAX:
            report = self._round(process, index)
            rounds += 1
        return index, report

    def _round(self, process: PackerProcess, index: fsIndex) -> dict[str, Any]:
        """Have what was committed meanwhile copied, now with the server's priority."""
        process.order(end=self._file.getSize(), save_index=False, urgent=True)
        report = process.report()
        _take_over(index, report)
        return report

    def _left(self, report: dict[str, Any]) -> bool:
        return bool(self._file.getSize() - report["copied"] > CLOSE_BYTES)

    def _replace(
        self, process: PackerProcess, index: fsIndex, report: dict[str, Any]
    ) -> list[Any]:
        """Hold commits, have the rest copied, and swap; returns what is replaced."""
        for rounds_left in reversed(range(ROUNDS_MAX)):
            with self._file._commit_lock:
                # Others may have had the lock before, and for long.
                if not (rounds_left and self._left(report)):
                    old = self._replace_held(process, index)
                    break
            report = self._round(process, index)
        clear(self._path)
        return old

    def _replace_held(self, process: PackerProcess, index: fsIndex) -> list[Any]:
        since = time.monotonic()
        file = self._file
        process.order(end=file.getSize(), save_index=False, urgent=True)
        report = process.report(HOLD_TIMEOUT_S)
        _take_over(index, report)
        self._packing.is_past_cancelling()
        with file._files.write_lock(), file._lock:
            old = self._swap(index, report["size"])
        held_ms = (time.monotonic() - since) * 1000
        logger.info("%s: packed; commits were held for %.0f ms", self._path, held_ms)
        return old

    def _swap(self, index: fsIndex, size: int) -> list[Any]:
        """Put the new file in the place of the old one; under all of the locks."""
        file, path = self._file, self._path
        # Whatever can fail comes before the rename; to get a descriptor, too, can.
        with ExitStack() as opened, _directory(path) as directory:
            new = opened.enter_context(open(path + ".pack", "r+b"))
            try:
                generation = Generation(path + ".pack", index)
                if new.seek(0, os.SEEK_END) != size:
                    raise FileStorageError("packing failed: the new file is incomplete")
                if os.path.exists(path + ".index"):
                    # It would be believed if positions happened to agree.
                    os.replace(path + ".index", path + ".index.old")
                if file.pack_keep_old:
                    _keep_old(path)
                os.replace(path + ".pack", path)
            except BaseException:
                clear(path)
                raise
            opened.pop_all()
            new.raw.name = path  # type: ignore[attr-defined]
            old = [file.generation, file._file]
            file._files.empty()
            file._file = new
            file.renew(generation)
            file._pos = size
            os.fsync(directory)
        return old


def finish_leftovers(file: Any) -> None:
    """Remove the blobs of a pack that is over, or was when the server died."""
    path: str = file._file_name
    try:
        if file.blob_dir is not None and not os.path.exists(path + ".pack"):
            remove_blobs(file, path + ".pack.removed")
        _remove(path + ".pack.removed")
    except OSError as error:
        # They take room, and are in nobody's way.
        logger.warning("%s: superfluous blobs are still there: %s", path, error)


def clean_up(path: str) -> None:
    """Put in order what a crash has left of a pack; before the Data.fs is opened.

    The caller has the lock file. What is left to do afterwards, ``finish_leftovers``
    does.
    """
    if os.path.exists(path + ".pack"):
        logger.warning("%s: a pack was cut short; nothing was packed", path)
    clear(path)


def clear(path: str) -> None:
    """Remove what belongs to a pack that is over, by success or not.

    The list of blobs stays after success; ``finish_leftovers`` needs it.
    """
    index = path + ".index"
    if not os.path.exists(path + ".pack"):
        if not os.path.exists(index):
            _rename_if_there(path + ".pack.index", index)
        _remove(path + ".pack.index")
        _remove(index + ".old")
        return
    if not os.path.exists(path):
        # Only where there are no hard links, and then both are whole, for commits were
        # held. Without a .pack it is not ours to say what an .old is.
        _rename_if_there(path + ".old", path)
    elif os.path.exists(path + ".old") and os.path.samefile(path, path + ".old"):
        _remove(path + ".old")
    if not os.path.exists(index):
        _rename_if_there(index + ".old", index)
    for suffix in (".index.old", ".pack.index", ".pack.removed"):
        _remove(path + suffix)
    sync_path(os.path.dirname(path))
    _remove(path + ".pack")


@contextmanager
def _directory(path: str) -> Iterator[int]:
    directory = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        yield directory
    finally:
        os.close(directory)


def _keep_old(path: str) -> None:
    try:
        os.link(path, path + ".old")
    except OSError as error:
        logger.info("%s: no hard link (%s), so it is renamed", path, error)
        os.replace(path, path + ".old")


def _take_over(index: fsIndex, report: dict[str, Any]) -> None:
    changed = bytes.fromhex(report["changed"])
    for start in range(0, len(changed), 16):
        place = int.from_bytes(changed[start + 8 : start + 16], "big")
        index[changed[start : start + 8]] = place


def _rename_if_there(source: str, target: str) -> None:
    with suppress(FileNotFoundError):
        os.replace(source, target)


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.remove(path)
