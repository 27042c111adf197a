"""The threads that may wait for a disk, on behalf of a loop that may not.

Each database has one writer thread, which does the steps of a commit in the order in
which the loop asked for them, and a few reader threads. Called on the loop; what is
handed over runs in a thread, and the future's callbacks run on the loop again.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

READERS = 4

Args = ParamSpec("Args")
Value = TypeVar("Value")


class Workers:
    """The writer thread and the reader threads of one database."""

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str):
        self._loop = loop
        self._writer = ThreadPoolExecutor(1, f"{name}-writer")
        self._readers = ThreadPoolExecutor(READERS, f"{name}-reader")

    def write(
        self, step: Callable[Args, Value], *args: Args.args, **kwargs: Args.kwargs
    ) -> "asyncio.Future[Value]":
        """Run ``step`` in the writer thread, after everything asked for before."""
        assert not kwargs
        return self._loop.run_in_executor(self._writer, step, *args)

    def read(
        self, step: Callable[Args, Value], *args: Args.args, **kwargs: Args.kwargs
    ) -> "asyncio.Future[Value]":
        """Run ``step`` in one of the reader threads."""
        assert not kwargs
        return self._loop.run_in_executor(self._readers, step, *args)

    async def close(self, timeout_s: float) -> bool:
        """Wait for what is under way, but not for ever; true if nothing is.

        Nothing may be asked for afterwards. Only a pack takes longer than moments; it
        can be given up at any time.
        """
        for executor in (self._writer, self._readers):
            executor.shutdown(wait=False, cancel_futures=True)
        threads = {*self._writer._threads, *self._readers._threads}
        deadline = self._loop.time() + timeout_s
        for thread in threads:
            left_s = max(0.0, deadline - self._loop.time())
            await self._loop.run_in_executor(None, thread.join, left_s)
        return not any(thread.is_alive() for thread in threads)
