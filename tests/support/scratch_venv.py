"""Environments of their own for applications that the tests do not depend on.

They take a while to make, so they are kept: in ``var`` of the checkout. What is tested
there is this checkout.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
INSTALL_TIMEOUT_S = 800


class NotInstallable(Exception):
    """It cannot be installed; the text says why."""


def scratch_venv(folder: Path, *requirements: str) -> Path:
    """`folder`, with `requirements` and this checkout; raises NotInstallable."""
    if not (folder / "bin" / "python").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        run([sys.executable, "-m", "venv", str(folder)])
    # Quick if it is there already, and right if another checkout was.
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", *requirements, "--editable", str(ROOT)])
    return folder


def run(command: list[str]) -> None:
    """Run a program; raises NotInstallable with its last line if it fails."""
    try:
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            timeout=INSTALL_TIMEOUT_S,
        )
    except subprocess.CalledProcessError as error:
        raise NotInstallable(error.stderr.strip().splitlines()[-1]) from error
    except subprocess.TimeoutExpired as error:
        raise NotInstallable(
            f"{command[0]} takes longer than {INSTALL_TIMEOUT_S} s"
        ) from error
