"""The thread of a cache that writes to its file.

To write may mean to wait for another process, which may have been stopped; so whoever
must not wait hands over what is to be done. The thread is started when it is first
needed and never again after ``close``. ``flush`` is called a while after ``due``, so
that what comes together is written together: soon for what others would have to load,
later for what they hear of themselves.
"""

import threading
import time
from collections.abc import Callable
from math import inf
from queue import Empty, SimpleQueue
from typing import TypeVar

# How long what is to be written waits for more, if others want it, and if not.
FLUSH_WAIT_S = 0.005
LATER_WAIT_S = 0.1
# After an error.
RETRY_WAIT_S = 5.0
# Whoever needs the thread waits no longer for it.
WAIT_S = 10.0

Value = TypeVar("Value")
# What is to be done; in how many seconds to flush; None at the end.
_Job = Callable[[], object] | float | None


class Writer:
    """Calls ``flush``, which returns whether it succeeded, and does jobs."""

    def __init__(self, flush: Callable[[], bool]):
        self._flush = flush
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._thread: threading.Thread | None = None
        # The shortest wait that was asked for since the last flush.
        self._wait_s = inf
        self._is_closed = False

    def due(self, is_urgent: bool = True) -> None:
        """There is something to write; any thread, and costs next to nothing."""
        wait_s = FLUSH_WAIT_S if is_urgent else LATER_WAIT_S
        if wait_s < self._wait_s and not self._is_closed:
            self._wait_s = wait_s
            self._jobs.put(wait_s)
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
        due_at = inf
        while True:
            left_s = None if due_at == inf else max(0, due_at - time.monotonic())
            try:
                job = self._jobs.get(timeout=left_s)
            except Empty:
                due_at = inf
                # What comes from now on may be too late for this time.
                self._wait_s = inf
                if not self._flush():
                    self._wait_s = 0
                    due_at = time.monotonic() + RETRY_WAIT_S
                continue
            if job is None:
                self._flush()
                return
            if callable(job):
                job()
            else:
                due_at = min(due_at, time.monotonic() + job)
