"""The thread of a cache that writes to its file.

To write may mean to wait for another process, which may have been stopped; so whoever
must not wait hands over what is to be done. The thread is started when it is first
needed and never again after ``close``. ``flush`` is called a moment after ``due``, so
that what comes together is written together.
"""

import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TypeVar

# How long what is to be written waits for more.
FLUSH_WAIT_S = 0.02
# After an error.
RETRY_WAIT_S = 5.0
# Whoever needs the thread waits no longer for it.
WAIT_S = 10.0

Value = TypeVar("Value")
_Job = Callable[[], object] | None


def _due() -> None:
    """Stands in the queue for something to be written."""


class Writer:
    """Calls ``flush``, which returns whether it succeeded, and does jobs."""

    def __init__(self, flush: Callable[[], bool]):
        self._flush = flush
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_due = False
        self._is_closed = False

    def due(self) -> None:
        """There is something to write; any thread, and costs next to nothing."""
        if not self._is_due and not self._is_closed:
            self._is_due = True
            self._jobs.put(_due)
            self._wake()

    def have_done(self, job: Callable[[], Value]) -> Value:
        """What ``job`` returns, or raises, in the thread.

        Raises TimeoutError after WAIT_S, and at once if the thread has been closed.
        """
        if self._is_closed:
            raise TimeoutError("it has been closed")
        done: SimpleQueue[tuple[Value, None] | tuple[None, BaseException]]
        done = SimpleQueue()

        def run() -> None:
            try:
                done.put((job(), None))
            except BaseException as error:  # noqa: BLE001 - it is raised by who waits
                done.put((None, error))

        self._jobs.put(run)
        self._wake()
        try:
            value, error = done.get(timeout=WAIT_S)
        except Empty:
            raise TimeoutError("another process keeps it locked") from None
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def close(self) -> bool:
        """Flush for the last time; whether the thread has ended within WAIT_S."""
        self._is_closed = True
        self._jobs.put(None)
        self._wake()
        thread = self._thread
        assert thread is not None
        thread.join(WAIT_S)
        return not thread.is_alive()

    def _wake(self) -> None:
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=self._run, name="zeolith-cache", daemon=True
                    )
                    self._thread.start()

    def _run(self) -> None:
        due_at: float | None = None
        while True:
            left_s = None if due_at is None else max(0, due_at - time.monotonic())
            try:
                job = self._jobs.get(timeout=left_s)
            except Empty:
                due_at = None
                # What comes from now on may be too late for this time.
                self._is_due = False
                if not self._flush():
                    self._is_due = True
                    due_at = time.monotonic() + RETRY_WAIT_S
                continue
            if job is None:
                self._flush()
                return
            if job is _due:
                due_at = due_at or time.monotonic() + FLUSH_WAIT_S
            else:
                job()
