"""Waiting for something that another thread or process brings about."""

import asyncio
import time
from collections.abc import Callable

POLL_INTERVAL_S = 0.01


def wait_until(
    condition: Callable[[], object],
    what: str,
    timeout_s: float = 30,
    poll_interval_s: float = POLL_INTERVAL_S,
) -> None:
    """Return when `condition()` is true; fail when it does not become true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"in {timeout_s} s it did not come: {what}"
        time.sleep(poll_interval_s)


async def wait_on_loop(
    condition: Callable[[], object], what: str, timeout_s: float = 30
) -> None:
    """As `wait_until`, for what comes about on the test's own loop."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"in {timeout_s} s it did not come: {what}"
        await asyncio.sleep(POLL_INTERVAL_S)
