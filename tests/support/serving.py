"""A server as a process of its own, on a port of its own, in a folder of its own.

A warning is an error in it, and what it writes to standard error is in the file
`stderr.log` of its folder, which outlives a restart.
"""

import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

READY_TIMEOUT_S = 20
EXIT_TIMEOUT_S = 20

FILESTORAGE = """\
<filestorage 1>
  path Data.fs
</filestorage>
"""
ANY_PORT = "127.0.0.1:0"


class ServerProcess:
    """A server that a test starts, stops, kills and starts again.

    `options` are lines of the section `<zeolith>`, `storages` the sections after it;
    `conf` is a whole file in their place. Paths in them are relative to `directory`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        conf: str | None = None,
        storages: str = FILESTORAGE,
        options: str = "",
    ):
        self.directory = directory
        self._conf = conf or (
            f"<zeolith>\naddress {ANY_PORT}\n{options}\n</zeolith>\n{storages}\n"
        )
        self._process: subprocess.Popen[str] | None = None
        # As printed: host:port, or the path of a Unix socket.
        self.listening: list[str] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if not self.is_running():
            return
        if error is None:
            self.terminate()
        else:
            self.kill()

    @property
    def module(self) -> list[str]:
        """What is run, and its first arguments."""
        return ["zeolith.server"]

    @property
    def environment(self) -> dict[str, str] | None:
        """None: that of the tests."""
        return None

    @property
    def address(self) -> tuple[str, int]:
        """Where a client reaches it by TCP; a restart does not change it."""
        (first, *_) = (where for where in self.listening if not where.startswith("/"))
        host, port = first.rsplit(":", 1)
        return host, int(port)

    @property
    def process(self) -> subprocess.Popen[str]:
        assert self._process is not None, "the server was never started"
        return self._process

    @property
    def conf_path(self) -> Path:
        return self.directory / "server.conf"

    @property
    def data_path(self) -> Path:
        return self.directory / "Data.fs"

    def start(self) -> None:
        """Return when clients can connect."""
        assert not self.is_running(), "the server runs already"
        self.conf_path.write_text(self._conf)
        command = [sys.executable, "-W", "error", "-m", *self.module]
        with self._stderr_path.open("ab") as stderr:
            self._process = subprocess.Popen(
                [*command, "serve", "-C", str(self.conf_path)],
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self._wait_for_ready(self._process)
        # Whatever port was free the first time is taken again the next time.
        for where in self.listening:
            self._conf = self._conf.replace(ANY_PORT, where, 1)

    def rewrite(self, old: str, new: str) -> None:
        """Change the configuration file, for a SIGHUP or the next start."""
        assert old in self._conf, f"{old!r} is not in the configuration"
        self._conf = self._conf.replace(old, new)
        self.conf_path.write_text(self._conf)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def terminate(self) -> None:
        """Stop it as an operator does; it must end well."""
        self.process.terminate()
        self.wait_for_end()

    def wait_for_end(self) -> None:
        """Wait for a server that was told to stop; it must end well."""
        try:
            code = self.process.wait(EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"it does not stop:\n{self.stderr_text()}") from None
        self._close()
        assert code == 0, f"exit status {code}:\n{self.stderr_text()}"

    def kill(self) -> None:
        """Stop it as a power failure does."""
        self.process.kill()
        self.process.wait()
        self._close()

    def restart(self) -> None:
        """Start it again where it was; stop it first if it still runs."""
        if self.is_running():
            self.terminate()
        self.start()

    def wait_for_death(self) -> None:
        """Wait for a server that ends by itself, however."""
        self.process.wait(EXIT_TIMEOUT_S)
        self._close()

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stderr_text(self) -> str:
        return self._stderr_path.read_text(errors="replace")

    @property
    def _stderr_path(self) -> Path:
        return self.directory / "stderr.log"

    def _wait_for_ready(self, process: subprocess.Popen[str]) -> None:
        # A killed process closes its end of the pipe, which ends the loop below.
        too_late = threading.Timer(READY_TIMEOUT_S, process.kill)
        too_late.start()
        self.listening = []
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line == "ready\n":
                    return
                assert line.startswith("listening on "), line
                self.listening.append(line.removeprefix("listening on ").strip())
        finally:
            too_late.cancel()
            too_late.join()
        code = process.wait()
        self._close()
        raise AssertionError(
            f"no server, exit status {code}:\n{self._conf}\n{self.stderr_text()}"
        )

    def _close(self) -> None:
        assert self.process.stdout is not None
        self.process.stdout.close()
