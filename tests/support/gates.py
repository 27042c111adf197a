"""Places where a thread stops until the test lets it go on.

A gate is open until the test closes it. Whoever comes to a closed gate says so
(`reached`) and waits; a thread that nobody lets go fails instead of waiting for ever.
"""

import threading
from collections.abc import Callable
from typing import Any

WAIT_S = 30
GRACE_S = 0.1


class Gate:
    """One such place."""

    def __init__(self) -> None:
        self._is_open = threading.Event()
        self._is_open.set()
        self._reached = threading.Semaphore(0)

    def shut(self) -> None:
        """Whoever comes from now on has to wait."""
        self._is_open.clear()

    def open(self) -> None:
        """Let everybody go on, those too who come later."""
        self._is_open.set()

    def wait_until_reached(self) -> None:
        """Return when one more thread has come to the gate and waits."""
        assert self._reached.acquire(timeout=WAIT_S), "nobody came to the gate"

    def pass_through(self) -> None:
        """Go through the gate, when it is open."""
        if not self._is_open.is_set():
            self._reached.release()
            assert self._is_open.wait(WAIT_S), "nobody opened the gate"

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, entered through the gate."""

        def gated(*args: Any, **kwargs: Any) -> Any:
            self.pass_through()
            return function(*args, **kwargs)

        return gated

    def after(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, left through the gate."""

        def gated(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self.pass_through()
            return result

        return gated


class Background:
    """A call in a thread of its own, whose end the test waits for."""

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any):
        self._function = function
        self._args = args
        self._kwargs = kwargs
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        """Whether the call has returned or raised."""
        return not self._thread.is_alive()

    def returns_soon(self) -> bool:
        """Whether the call returns within a moment.

        A call that waits for the test cannot; one that ought to wait, and does not, has
        its moment to show it.
        """
        self._thread.join(GRACE_S)
        return not self._thread.is_alive()

    def result(self) -> Any:
        """What the call returned; raises what it raised."""
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), f"{self._function} does not return"
        if self._error is not None:
            raise self._error
        return self._value

    def error(self) -> BaseException:
        """What the call raised; it must have."""
        try:
            value = self.result()
        except BaseException as error:
            return error
        raise AssertionError(f"{self._function} returned {value!r}")

    def _run(self) -> None:
        try:
            self._value = self._function(*self._args, **self._kwargs)
        except BaseException as error:
            self._error = error
