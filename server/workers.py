"""The threads that may wait for a disk, on behalf of a loop that may not.

Each database has one writer thread, which does what is written to the file in the order
in which the loop asked for it, a few that vote, a few reader threads, a few that write
blobs, one that spills what is staged, one that looks back in the log, and one for a
pack. Called on the loop; what is
handed over runs in a thread, and the future's callbacks run on the loop again.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

READERS = 4
# A vote may be large; the next one is not to wait for it.
VOTERS = 4
# Of their own, for a sync of a large file may take long.
BLOB_WRITERS = 4

Args = ParamSpec("Args")
Value = TypeVar("Value")
_Step = tuple[Callable[..., Any], tuple[Any, ...], "asyncio.Future[Any]"]


class _Crew:
    """Threads that take one step after the other from one queue.

    What an executor does, with half the hand-overs: every commit passes here.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str, threads: int):
        self._loop = loop
        self._steps: SimpleQueue[_Step | None] = SimpleQueue()
        self._is_stopped = False
        self.threads = [
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self.threads:
            thread.start()

    def submit(self, step: Callable[..., Any], *args: Any) -> "asyncio.Future[Any]":
        """Called on the loop."""
        if self._is_stopped:
            raise RuntimeError("the worker was stopped")
        ended = self._loop.create_future()
        self._steps.put((step, args, ended))
        return ended

    def stop(self) -> None:
        """Let the threads end after the steps they have."""
        self._is_stopped = True
        for _thread in self.threads:
            self._steps.put(None)

    def _run(self) -> None:
        while (next_step := self._steps.get()) is not None:
            step, args, ended = next_step
            value, error = None, None
            try:
                value = step(*args)
            except BaseException as raised:  # noqa: BLE001 - it is the futures
                error = raised
            try:
                self._loop.call_soon_threadsafe(_settle, ended, value, error)
            except RuntimeError:
                # The loop was closed without us: nobody waits for the step any more.
                return
            # Or they would be kept until the next step: a failed one's traceback holds
            # all records of its transaction.
            del next_step, step, args, ended, value, error


def _settle(ended: "asyncio.Future[Any]", value: Any, error: Any) -> None:
    if ended.cancelled():
        return
    if error is None:
        ended.set_result(value)
    else:
        ended.set_exception(error)


class Workers:
    """The threads of one database; each starts when there is work for it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str):
        self._loop = loop
        self._writer = _Crew(loop, f"{name}-writer", 1)
        self._voters = _Crew(loop, f"{name}-voter", VOTERS)
        self._readers = ThreadPoolExecutor(READERS, f"{name}-reader")
        self._blob_writers = ThreadPoolExecutor(BLOB_WRITERS, f"{name}-blobs")
        self._aside = ThreadPoolExecutor(1, f"{name}-aside")
        self._history = ThreadPoolExecutor(1, f"{name}-history")
        # Of its own: a vote may take longer than a client waits for what it sends.
        self._stager = ThreadPoolExecutor(1, f"{name}-stager")

    def write(
        self, step: Callable[Args, Value], *args: Args.args, **kwargs: Args.kwargs
    ) -> "asyncio.Future[Value]":
        """Run ``step`` in the writer thread, after everything asked for before."""
        assert not kwargs
        return self._writer.submit(step, *args)

    def vote(
        self, step: Callable[Args, Value], *args: Args.args, **kwargs: Args.kwargs
    ) -> "asyncio.Future[Value]":
        """Run ``step`` of a vote in a thread, beside other votes."""
        assert not kwargs
        return self._voters.submit(step, *args)

    def read(
        self, step: Callable[Args, Value], *args: Args.args, **kwargs: Args.kwargs
    ) -> "asyncio.Future[Value]":
        """Run ``step`` in one of the reader threads."""
        assert not kwargs
        return self._loop.run_in_executor(self._readers, step, *args)

    def write_blobs(
        self, step: Callable[Args, Value], *args: Args.args, **kwargs: Args.kwargs
    ) -> "asyncio.Future[Value]":
        """Run ``step`` in one of the threads that write blobs."""
        assert not kwargs
        return self._loop.run_in_executor(self._blob_writers, step, *args)

    def aside(
        self, step: Callable[Args, Value], *args: Args.args, **kwargs: Args.kwargs
    ) -> "asyncio.Future[Value]":
        """Run ``step``, which may take hours, where nobody else waits for it."""
        assert not kwargs
        return self._loop.run_in_executor(self._aside, step, *args)

    def look_back(
        self, step: Callable[Args, Value], *args: Args.args, **kwargs: Args.kwargs
    ) -> "asyncio.Future[Value]":
        """Run ``step``, which reads much of the log, after others of its kind."""
        assert not kwargs
        return self._loop.run_in_executor(self._history, step, *args)

    def stage(
        self, step: Callable[Args, Value], *args: Args.args, **kwargs: Args.kwargs
    ) -> "asyncio.Future[Value]":
        """Run ``step`` in the thread that keeps what is staged, in order."""
        assert not kwargs
        return self._loop.run_in_executor(self._stager, step, *args)

    async def close(self, timeout_s: float) -> bool:
        """Wait for what is under way, but not for ever; true if nothing is.

        Nothing may be asked for afterwards. Only a pack takes longer than moments; it
        can be given up at any time.
        """
        # The writer's next step may be the abort of what did not finish.
        self._writer.stop()
        self._voters.stop()
        for pool in (self._readers, self._aside, self._history):
            pool.shutdown(wait=False, cancel_futures=True)
        # These remove what was uploaded or staged in vain.
        for pool in (self._blob_writers, self._stager):
            pool.shutdown(wait=False)
        pools = (
            self._readers,
            self._aside,
            self._history,
            self._blob_writers,
            self._stager,
        )
        crews = [*self._writer.threads, *self._voters.threads]
        threads = {*crews, *(each for pool in pools for each in pool._threads)}
        deadline = self._loop.time() + timeout_s
        for thread in threads:
            left_s = max(0.0, deadline - self._loop.time())
            await self._loop.run_in_executor(None, thread.join, left_s)
        return not any(thread.is_alive() for thread in threads)
