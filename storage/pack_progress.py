"""What others may know of a pack that is under way, and do to it: give it up.

Made by whoever asks for a pack, written by the thread that does it (``packing``), read
by the loop. Any thread may cancel.
"""

import threading
import time
from typing import Any, NamedTuple, Protocol

from ZODB.FileStorage.FileStorage import FileStorageError


class Process(Protocol):
    """What does the work elsewhere."""

    def kill(self) -> None:
        """End it at once; harmless when it has ended."""


class Packed(NamedTuple):
    """What a pack has come to."""

    # False: there was nothing to remove.
    has_changed: bool
    size_before: int
    size_after: int


class PackCancelled(FileStorageError):
    """Somebody did not want the pack any more."""


class Packing:
    """One pack, as others may see it, and stop it; any thread may."""

    def __init__(self, who: str = ""):
        self.who = who
        self.started = time.time()
        self.phase = "starting"
        self.fraction = 0.0
        # How far the old file is read, and how long it was at the start.
        self.bytes = 0
        self.bytes_total = 0
        # False once it is too late, and for storages that pack by themselves.
        self.is_cancellable = True
        self._lock = threading.Lock()
        self._reason: str | None = None
        self._process: Process | None = None

    def cancel(self, reason: str) -> bool:
        """Give the pack up; false if it cannot be given up (any more)."""
        with self._lock:
            if not self.is_cancellable:
                return False
            self._reason = self._reason or reason
            if self._process is not None:
                self._process.kill()
        return True

    def refuse_if_cancelled(self) -> None:
        """Raise PackCancelled if so."""
        if self._reason is not None:
            raise PackCancelled(self._reason)

    def begins(self, process: Process) -> None:
        """``process`` does it; it is killed when the pack is cancelled."""
        with self._lock:
            self._process = process
            if self._reason is not None:
                process.kill()

    def is_past_cancelling(self) -> None:
        """From here on it is done to the end; raises PackCancelled if it is not."""
        with self._lock:
            self.refuse_if_cancelled()
            self.is_cancellable = False
            self._process = None

    def describe(self) -> dict[str, Any]:
        """For the wire and for ``zeolith status``."""
        return {
            "phase": self.phase,
            "fraction": round(self.fraction, 4),
            "bytes": self.bytes,
            "bytes_total": self.bytes_total,
            "started": self.started,
            "who": self.who,
        }
