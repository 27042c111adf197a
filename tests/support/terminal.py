"""A Python session in a process of its own, driven from outside.

Run as a program it reads pieces of source from standard input, a line of JSON each,
runs each as the interactive interpreter would, and answers with what was printed.
"""

import code
import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).parents[2]


class Terminal:
    """Such a session, as the test sees it."""

    def __init__(self, directory: Path):
        command = [sys.executable, "-W", "error", __file__]
        self._process = subprocess.Popen(
            command,
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._process.kill()
        self._process.communicate()
        assert error is not None or self._process.returncode == 0

    def run(self, source: str) -> str:
        """Everything that `source` prints, a traceback included."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(source) + "\n")
        self._process.stdin.flush()
        answer: str = json.loads(self._process.stdout.readline())
        return answer


def main() -> None:
    console = code.InteractiveInterpreter({"__name__": "__main__"})
    for line in sys.stdin:
        printed = io.StringIO()
        with redirect_stdout(printed), redirect_stderr(printed):
            console.runsource(json.loads(line))
        print(json.dumps(printed.getvalue()), flush=True)


if __name__ == "__main__":
    main()
