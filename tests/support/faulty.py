"""The test's half of `faulty_server`: a server that is told what is to fail."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .serving import ServerProcess
from .waiting import wait_until

ROOT = Path(__file__).parents[2]


class FaultyServer(ServerProcess):
    """A server as a process of its own, with faults."""

    @property
    def module(self) -> list[str]:
        return ["tests.support.faulty_server", str(self.directory)]

    @property
    def environment(self) -> dict[str, str]:
        # It is started where its files are, not where the tests are.
        path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}

    def arm(self, kind: str, **plan: str | int) -> None:
        """From now on this fails; see `faulty_server`."""
        new = self.directory / "plan.new"
        new.write_text(json.dumps({"kind": kind, **plan}))
        new.replace(self._plan_path)

    def disarm(self) -> None:
        """From now on nothing fails."""
        self._plan_path.unlink(missing_ok=True)

    @contextmanager
    def armed(self, kind: str, **plan: str | int) -> Iterator[None]:
        self.arm(kind, **plan)
        try:
            yield
        finally:
            self.disarm()

    def happened(self, text: str = "") -> list[str]:
        """The faults so far whose line begins like this."""
        path = self.directory / "happened"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(text)]

    def wait_for(self, text: str, more_than: int = 0) -> None:
        """Wait until so many such faults have happened, and one more."""
        wait_until(lambda: len(self.happened(text)) > more_than, text, timeout_s=60)

    def wait_until_dead_or(self, text: str, count: int) -> None:
        """Wait until it has ended, or so many such faults have happened in all."""
        wait_until(
            lambda: not self.is_running() or len(self.happened(text)) >= count,
            f"the end of the server, or {count} times {text}",
            timeout_s=60,
        )

    @property
    def _plan_path(self) -> Path:
        return self.directory / "plan.json"
