"""Zope as processes of its own, in an environment of its own.

Zope is large, so its environment is made once and kept: in the folder that the
environment variable ZEOLITH_ZOPE_VENV names, else in `var/zope-venv` of the checkout.
What is tested there is this checkout.
"""

import base64
import os
import re
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
import uuid
from html import unescape
from pathlib import Path
from types import TracebackType
from typing import Self

from .scratch_venv import ROOT, run, scratch_venv
from .waiting import wait_until

# Where the undo form is.
DATABASE = "/Control_Panel/Database/main"
USER = "admin:secret"
START_TIMEOUT_S = 120
REQUEST_TIMEOUT_S = 60
_TRANSACTION = re.compile(r'name="transaction_info:list"\s+value="([^"]+)"')


def environment() -> Path:
    """The folder of an environment with Zope; raises NotInstallable."""
    folder = Path(os.environ.get("ZEOLITH_ZOPE_VENV", ROOT / "var" / "zope-venv"))
    return scratch_venv(folder, "Zope[wsgi]")


class Zope:
    """A Zope whose database is storage 1 of the server at `address`."""

    def __init__(self, venv: Path, home: Path, address: tuple[str, int]):
        self._venv = venv
        self._home = home
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self._make_instance(address)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(START_TIMEOUT_S)

    def start(self) -> Self:
        """Return when it answers."""
        with (self._home / "stderr.log").open("wb") as stderr:
            self._process = subprocess.Popen(
                [self._venv / "bin" / "runwsgi", self._home / "etc" / "zope.ini"],
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
            )
        wait_until(self._answers, "an answer of Zope", START_TIMEOUT_S)
        return self

    def log_text(self) -> str:
        return (self._home / "stderr.log").read_text(errors="replace")

    # As a browser

    def get(self, path: str) -> bytes:
        """The page at `path`; raises HTTPError."""
        return self._request(path, None, {})

    def has(self, path: str) -> bool:
        """Whether there is a page at `path`."""
        try:
            self.get(path)
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            return False
        return True

    def post(self, path: str, **fields: str) -> bytes:
        """What comes of a form that is sent to `path`."""
        return self._request(path, urllib.parse.urlencode(fields).encode(), {})

    def upload(self, path: str, data: bytes, **fields: str) -> bytes:
        """What comes of a form with a file, which is its field `file`."""
        boundary = uuid.uuid4().hex
        parts = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"'
            f"\r\n\r\n{value}\r\n".encode()
            for name, value in fields.items()
        ]
        parts.append(
            f'--{boundary}\r\nContent-Disposition: form-data; name="file";'
            ' filename="upload.bin"\r\nContent-Type: application/octet-stream'
            "\r\n\r\n".encode()
            + data
            + f"\r\n--{boundary}--\r\n".encode()
        )
        kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        return self._request(path, b"".join(parts), kind)

    def undoable(self) -> list[str]:
        """What the undo form offers, newest first, as it is to be sent back."""
        page = self.get(f"{DATABASE}/manage_UndoForm").decode()
        return [unescape(each) for each in _TRANSACTION.findall(page)]

    def undo(self, transaction: str) -> None:
        """Send the undo form for one of `undoable`."""
        fields = {"transaction_info:list": transaction}
        page = self.post(f"{DATABASE}/manage_undo_transactions", **fields).decode()
        assert "Error" not in page, page

    def _request(self, path: str, data: bytes | None, headers: dict[str, str]) -> bytes:
        request = urllib.request.Request(f"http://127.0.0.1:{self._port}{path}", data)
        secret = base64.b64encode(USER.encode()).decode()
        request.add_header("Authorization", f"Basic {secret}")
        for name, value in headers.items():
            request.add_header(name, value)
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
            body: bytes = response.read()
        return body

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log_text()
        try:
            self.get("/manage_main")
        except (ConnectionError, urllib.error.URLError) as error:
            if isinstance(error, urllib.error.HTTPError):
                raise AssertionError(self.log_text()) from error
            return False
        return True

    def _make_instance(self, address: tuple[str, int]) -> None:
        make = str(self._venv / "bin" / "mkwsgiinstance")
        run([make, "-d", str(self._home), "-u", USER])
        conf = self._home / "etc" / "zope.conf"
        # The very lines that are given to people.
        ours = (ROOT / "deploy" / "clients" / "zope.conf").read_text()
        host, port = address
        ours = ours.replace("server 127.0.0.1:8100", f"server {host}:{port}")
        text, replaced = re.subn(
            r"<zodb_db main>.*?</zodb_db>", lambda _: ours, conf.read_text(), flags=re.S
        )
        # The other one is a comment.
        assert replaced == 1
        conf.write_text(text)
        ini = self._home / "etc" / "zope.ini"
        ini.write_text(ini.read_text().replace("port = 8080", f"port = {self._port}"))
