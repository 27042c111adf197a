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

    async def close(self) -> None:
        """Wait for what is under way; nothing may be asked for afterwards."""
        for executor in (self._writer, self._readers):
            await self._loop.run_in_executor(None, executor.shutdown)
