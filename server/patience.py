"""How long the server has waited for a client that holds what others may want.

Pure: the time comes in as ``now`` (seconds of a steady clock). Invariant: time counts
only while the server waits for the client, and all of it counts: who is asked several
times has one timeout, not several.
"""


class Patience:
    """The waiting for one client."""

    __slots__ = ("_began_at", "_taken_s")

    def __init__(self) -> None:
        # None while the server works for the client.
        self._began_at: float | None = None
        # What it has taken before that.
        self._taken_s = 0.0

    def begins(self, now: float) -> None:
        """The server waits from now on."""
        self._began_at = now

    def pauses(self, now: float) -> None:
        """The server works for the client again; harmless if it did already."""
        if self._began_at is not None:
            self._taken_s += now - self._began_at
            self._began_at = None

    def ends(self) -> None:
        """The server will not wait for it any more."""
        self._began_at = None

    def is_over(self, now: float, timeout_s: float) -> bool:
        """Whether the server waits, and has done so for ``timeout_s`` in all."""
        if self._began_at is None:
            return False
        return self._taken_s + now - self._began_at >= timeout_s
