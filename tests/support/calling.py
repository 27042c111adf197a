"""A call that another thread makes, while the test's thread looks on."""

import threading
from collections.abc import Callable
from typing import Any


class InThread:
    """`function(*args, **kwargs)` in a thread; `result` is what became of it."""

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any):
        self._call = function, args, kwargs
        self._value: Any = None
        self._error: BaseException | None = None
        # A call that never ends makes its test fail, not the whole run hang.
        self._thread = threading.Thread(target=self._run, name="in-thread", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def result(self, timeout_s: float = 30) -> Any:
        """What the function returned or raised; fails if it does not end."""
        self._thread.join(timeout_s)
        assert self.is_done, f"{self._call[0]} still waits"
        if self._error is not None:
            raise self._error
        return self._value

    def _run(self) -> None:
        function, args, kwargs = self._call
        try:
            self._value = function(*args, **kwargs)
        except BaseException as error:
            self._error = error
