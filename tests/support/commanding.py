"""The `zeolith` command, run to its end."""

import subprocess
import sys
from pathlib import Path
from typing import Any

END_TIMEOUT_S = 30


def zeolith(*arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run the command, a warning being an error in it."""
    # But for the files that a FileStorage leaves open when it cannot be opened.
    warnings = ["-W", "error", "-W", "ignore::ResourceWarning"]
    return subprocess.run(
        [sys.executable, *warnings, "-m", "zeolith.server", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=END_TIMEOUT_S,
        check=False,
        **options,
    )


def complaint(done: "subprocess.CompletedProcess[str]") -> str:
    """The one line that a command that failed has said."""
    assert not done.stdout, done.stdout
    (line,) = done.stderr.splitlines()
    return line.removeprefix("zeolith: ")


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
