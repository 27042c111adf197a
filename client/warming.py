"""After everything cached was dropped: fetch what was used most, before it is needed.

While a storage is used its hits are counted, one in SAMPLE of them, and a list of the
objects that were used most is kept beside the cache file, as JSON: oid in hex and a
score, which fades. When a session begins and the cache is empty, the objects of the
list are loaded, the most used first.

A hundred clients whose caches were dropped at the same moment must not come to the
server at the same moment: each waits for a while that chance decides, one process of a
host does it for all, and in small requests, with a rest after each that is as long as
the request took.

One thread for each storage that has the option, which also saves the list now and then.
``note`` is called by any thread, without a lock: a use that is lost is no loss.
"""

import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from zeolith.client import file_locks

logger = logging.getLogger(__name__)

# A power of two.
SAMPLE = 16
OIDS_MAX = 5000
# What was used before counts for so much less each time that the list is saved.
FADING = 0.8
SAVE_INTERVAL_S = 300.0
JITTER_S = 10.0
REQUEST_OIDS = 100
# A cache with fewer revisions than this part of the list is as good as empty.
COLD = 0.1

# Loads objects into the cache; raises if there is no server.
Load = Callable[[Sequence[bytes]], object]


class Heat:
    """Which objects are used most."""

    def __init__(self) -> None:
        self._uses = 0
        self._scores: dict[bytes, float] = {}

    def note(self, oid: bytes) -> None:
        """``oid`` was read from the cache."""
        self._uses += 1
        if self._uses % SAMPLE == 0:
            self._scores[oid] = self._scores.get(oid, 0.0) + 1.0

    def save(self, path: Path) -> None:
        """Add what was noted to the list at ``path``; raises OSError."""
        noted, self._scores = self._scores, {}
        if not noted:
            return
        with file_locks.locked(f"{path}.lock"):
            scores = {oid: score * FADING for oid, score in read(path).items()}
            for oid, score in noted.items():
                scores[oid] = scores.get(oid, 0.0) + score
            kept = sorted(scores, key=lambda oid: -scores[oid])[:OIDS_MAX]
            fresh = path.with_name(f"{path.name}.new")
            fresh.write_text(json.dumps({oid.hex(): scores[oid] for oid in kept}))
            fresh.replace(path)


def read(path: Path) -> dict[bytes, float]:
    """The list at ``path``, most used first; empty if there is none in order."""
    try:
        found = json.loads(path.read_text())
        scores = {bytes.fromhex(oid): float(score) for oid, score in found.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
    return {oid: score for oid, score in scores.items() if len(oid) == 8}


class WarmUp:
    """The option of one storage."""

    def __init__(self, load: Load, cached: Callable[[], int]):
        """``cached`` returns how many revisions are in the cache."""
        self.heat = Heat()
        self._load = load
        self._cached = cached
        self._reset()

    def _reset(self) -> None:
        self._path: Path | None = None
        self._is_over = threading.Event()
        self._has_session = threading.Event()
        self._thread: threading.Thread | None = None

    def session_began(self, path: Path) -> None:
        """There is a session with the database whose list is at ``path``."""
        self._path = path
        self._has_session.set()
        if self._thread is None and not self._is_over.is_set():
            self._thread = threading.Thread(
                target=self._run, name="zeolith-warm-up", daemon=True
            )
            self._thread.start()

    def forget_parent(self) -> None:
        """In a forked child: the thread is not here."""
        self._reset()

    def close(self) -> None:
        """Save the list; what is being loaded is not waited for."""
        self._is_over.set()
        self._has_session.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        while not self._is_over.is_set():
            if self._has_session.wait(SAVE_INTERVAL_S):
                self._has_session.clear()
                try:
                    self._warm_up()
                except Exception as error:  # noqa: BLE001 - whatever a load may raise
                    logger.info("warming up ended early: %s", error)
            self._save()
        self._save()

    def _save(self) -> None:
        assert self._path is not None, "there was no session"
        try:
            self.heat.save(self._path)
        except OSError as error:
            logger.warning("what is used most is not saved: %s", error)

    def _warm_up(self) -> None:
        path = self._path
        assert path is not None, "there was no session"
        oids = list(read(path))
        if self._cached() >= len(oids) * COLD:
            return
        fd = file_locks.open_lockable(f"{path}.warming", os.O_RDWR | os.O_CREAT)
        try:
            if not file_locks.try_lock(fd):
                # Another process of this host does it.
                return
            if self._is_over.wait(random.uniform(0, JITTER_S)):
                return
            began = time.monotonic()
            loaded = self._load_all(oids)
            logger.info(
                "warmed up: %d objects in %.1f s", loaded, time.monotonic() - began
            )
        finally:
            file_locks.release(fd)

    def _load_all(self, oids: list[bytes]) -> int:
        for start in range(0, len(oids), REQUEST_OIDS):
            began = time.monotonic()
            self._load(oids[start : start + REQUEST_OIDS])
            if self._is_over.wait(time.monotonic() - began):
                return start
        return len(oids)
