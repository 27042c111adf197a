"""Where a client has its password or token from: files, the environment, a terminal.

``credentials_of`` turns the options that a client and the commands have in common into
``login.Credentials``. Used in the thread that connects. Nothing here is ever part of a
URI or of a command line, which others can read; nor of a log, a repr or an error.
"""

import os
import stat
import sys
from getpass import getpass
from pathlib import Path

from zeolith.protocol.login import (
    NO_CREDENTIALS,
    Credentials,
    LoginError,
    Password,
    Secret,
    Token,
)

PASSWORD_VARIABLE = "ZEOLITH_PASSWORD"
TOKEN_VARIABLE = "ZEOLITH_TOKEN"
SECRET_BYTES_MAX = 1024


class Given(Secret):
    """One that a program has."""

    def __init__(self, secret: str):
        self._secret = secret

    def read(self) -> str:
        """It."""
        return self._secret


class InFile(Secret):
    """The first line of a file, as it is when somebody logs in."""

    def __init__(self, path: str):
        self._path = Path(path)

    def __repr__(self) -> str:
        return f"<InFile {self._path}>"

    def read(self) -> str:
        """Without its line's end; raises LoginError for a file that is of no use."""
        try:
            with self._path.open("rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise LoginError(f"{self._path} is no regular file")
                data = file.read(SECRET_BYTES_MAX + 1)
            lines = data.decode().splitlines()
        except OSError as error:
            raise LoginError(f"{self._path}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise LoginError(f"{self._path} holds no text") from None
        if len(data) > SECRET_BYTES_MAX:
            raise LoginError(f"{self._path} is longer than any password or token")
        if not lines or not lines[0]:
            raise LoginError(f"{self._path}: its first line is empty")
        return lines[0]


class Asked(Secret):
    """One that a person is asked for, once."""

    def __init__(self, question: str):
        self._question = question
        self._answer: str | None = None

    def read(self) -> str:
        """The answer; raises LoginError if there is none."""
        if self._answer is None:
            try:
                self._answer = getpass(self._question)
            except (EOFError, KeyboardInterrupt):
                raise LoginError("no password was given") from None
        return self._answer


def credentials_of(
    username: str | None = None,
    password: str | None = None,
    password_file: str | None = None,
    token_file: str | None = None,
    *,
    may_ask: bool = False,
) -> Credentials:
    """Who the options say that one is; the environment has what they leave open.

    A password is looked for where a ``username`` is given: in the options, then in
    ZEOLITH_PASSWORD, then, if one ``may_ask`` and there is a terminal, there. Without
    a name it is a token: of the option, then of ZEOLITH_TOKEN. Raises ValueError for
    options that contradict each other or lack something.
    """
    if token_file is not None and (username or password or password_file):
        raise ValueError("a token stands for itself: give no user and no password")
    if username is None:
        if password is not None or password_file is not None:
            raise ValueError("a password is of no use without username")
        return _token(token_file)
    if password is not None and password_file is not None:
        raise ValueError("give password or password_file, not both")
    return Password(username, _password(username, password, password_file, may_ask))


def _token(token_file: str | None) -> Credentials:
    if token_file is not None:
        return Token(InFile(token_file))
    token = os.environ.get(TOKEN_VARIABLE)
    return Token(Given(token)) if token else NO_CREDENTIALS


def _password(
    username: str, password: str | None, password_file: str | None, may_ask: bool
) -> Secret:
    if password is not None:
        return Given(password)
    if password_file is not None:
        return InFile(password_file)
    if secret := os.environ.get(PASSWORD_VARIABLE):
        return Given(secret)
    if may_ask and sys.stdin.isatty():
        return Asked(f"Password of {username}: ")
    raise ValueError(
        f"there is no password for {username}: name a file that holds it, or put it"
        f" into {PASSWORD_VARIABLE}"
    )
