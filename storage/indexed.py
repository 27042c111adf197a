"""A FileStorage that starts fast after a crash, too.

FileStorage saves its index when it is closed and after a pack, and reads the rest of
the file slowly. This one has it saved at any time, while transactions are committed
(``save_index_if_grown``, in any worker thread), and reads what is missing with
``scanning``. Both only do sooner what FileStorage does: whether a saved index is
believed, its own check of the last records decides, and what is not in order at the
end of the file, its own recovery.

Everything that says what the index is as of now happens under FileStorage's ``_lock``,
under which a commit becomes durable and a pack swaps the files.
"""

import logging
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ZODB.FileStorage import FileStorage
from ZODB.fsIndex import fsIndex

from zeolith.storage import index, scanning

logger = logging.getLogger(__name__)

# How much of the log may be missing from the saved index for ever: it is read in less
# than a second.
GROWTH_MIN_BYTES = 10 * 1000**2
# And this part of the index's own size: writing it is work, too.
GROWTH_MIN_OF_INDEX = 0.25
LOCK_TIMEOUT_S = 5.0


class IndexedFile(FileStorage):
    """A FileStorage with an index that is saved at any time, and read fast."""

    # Which index was saved: a pack makes another one. Where in the log it ends, and
    # the size of the file.
    _saved_index: Any = None
    _saved_upto = 0
    _saved_bytes = 0
    # The prefixes that changed since a save in the background asked, if there is one.
    _changed: set[bytes] | None = None
    _is_closed = False
    # Set by FileStorage.__init__; here for the type checker.
    _file: Any

    def __init__(self, path: str, **options: Any):
        self._reads_all = options.get("stop") is None
        self._saving = threading.Lock()
        super().__init__(path, **options)

    def save_index_if_grown(self) -> bool:
        """Save the index if that is worth it; false if it is not, or not now.

        Commits go on meanwhile. Raises OSError.
        """
        if not self._has_grown() or not self._saving.acquire(blocking=False):
            return False
        try:
            self._saved_bytes = index.save(_Source(self), self._index_path)
        except index.IndexChanged:
            return False
        finally:
            with self._lock:
                self._changed = None
            self._saving.release()
        return True

    def close(self) -> None:
        """Release the files and save the index."""
        self._is_closed = True
        super().close()

    @property
    def _index_path(self) -> Path:
        return Path(f"{self._file_name}.index")

    def _has_grown(self) -> bool:
        if self._is_read_only or self._is_closed:
            return False
        grown_bytes = self._pos
        # If it is another one, a pack could not save it.
        if self._index is self._saved_index:
            grown_bytes -= self._saved_upto
        return grown_bytes >= max(
            GROWTH_MIN_BYTES, self._saved_bytes * GROWTH_MIN_OF_INDEX
        )

    def _restore_index(self) -> tuple[Any, int, bytes] | None:
        """Called once, at opening: the index, how far it goes, the last tid in it.

        What was read is not saved at once: a sync can take longer than the scan.
        """
        restored = self._load_index()
        if not self._reads_all:
            return restored
        found, start, tid = restored or (fsIndex(), len(scanning.MAGIC), None)
        scanned = scanning.scan(self._file.fileno(), self._file_name, found, start)
        last_tid = scanned.tid or tid
        return None if last_tid is None else (found, scanned.position, last_tid)

    def _load_index(self) -> tuple[Any, int, bytes] | None:
        restored = self._load_what_fits()
        if restored is None and not self._is_read_only:
            # FileStorage would save another one now. If this one is of a history that
            # was replaced, from a backup, say, the new history may come to fit it at
            # the end, where alone it is checked.
            with suppress(OSError):
                self._index_path.unlink(missing_ok=True)
        return restored

    def _load_what_fits(self) -> tuple[Any, int, bytes] | None:
        try:
            saved = index.load(self._index_path)
            if saved is None:
                return None
            tid = self._sane(saved.objects, saved.position)
        except Exception as error:  # noqa: BLE001 - what a damaged pickle raises
            # The file itself has everything.
            logger.warning("%s is not used: %s", self._index_path, _line(error))
            return None
        if not tid:
            # _sane has said that the index is ignored.
            return None
        self._saved_index, self._saved_upto = saved
        self._saved_bytes = self._index_path.stat().st_size
        return saved.objects, saved.position, tid

    def _save_index(self) -> None:
        """Called at opening, by close, and by FileStorage's own pack under the lock.

        Not being able to is no reason for any of them to fail.
        """
        if self._is_read_only:
            return
        # A commit that hangs in a dying disk has it; close must end nevertheless.
        if not self._lock.acquire(timeout=LOCK_TIMEOUT_S):
            self._warn("a commit hangs")
            return
        try:
            self._saved_bytes = index.save_still(
                self._index, self._pos, self._index_path
            )
            self._saved_index, self._saved_upto = self._index, self._pos
        except OSError as error:
            self._warn(error)
        finally:
            self._lock.release()

    def _warn(self, reason: object) -> None:
        logger.warning("%s is not saved: %s", self._index_path, reason)

    def _finish_finish(self, tid: bytes) -> None:
        """Called by tpc_finish, under the lock."""
        self.will_change(self._tindex)
        super()._finish_finish(tid)

    def will_change(self, oids: Iterable[bytes]) -> None:
        """These get other places in the index; called under the lock."""
        if self._changed is not None:
            self._changed.update(oid[:6] for oid in oids)


class _Source:
    """The index of an IndexedFile as index.save wants it; see index.Source."""

    def __init__(self, file: IndexedFile):
        self._file = file
        self._lock = file._lock
        self._index = file._index

    def watch(self) -> list[bytes]:
        with self._lock:
            self._check()
            self._file._changed = set()
            return list(self._index._data)

    def bucket(self, prefix: bytes) -> bytes:
        # One call into BTrees, during which nothing else runs.
        contents: bytes = self._index._data[prefix].toString()
        return contents

    def changed(self, limit: int) -> index.Buckets | set[bytes]:
        with self._lock:
            self._check()
            changed = self._file._changed or set()
            self._file._changed = set()
            if len(changed) > limit:
                return changed
            return index.Buckets(
                self._file._pos, [(each, self.bucket(each)) for each in sorted(changed)]
            )

    def install(self, replacement: Path, position: int) -> None:
        with self._lock:
            self._check()
            replacement.replace(self._file._index_path)
            self._file._saved_index = self._index
            self._file._saved_upto = position

    def _check(self) -> None:
        if self._file._index is not self._index or self._file._is_closed:
            raise index.IndexChanged


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
