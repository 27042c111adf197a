"""What the section ``<access>`` says and its files hold, as an Access; and renewed.

``load`` reads everything, for the start and for SIGHUP. ``Keyring.renew`` reads again
what has changed since; a file that cannot be used is complained of once, and what was
known before stays. Both wait for the disk; ``KeyWatch`` has them do so in a thread, and
belongs to the loop.
"""

import asyncio
import logging
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from zeolith.server.access import OPEN, Access, Grants, Identity
from zeolith.server.key_files import KeyFileError, read_tokens, read_users

logger = logging.getLogger(__name__)

# What says whether a file is another one: when it was written, its size and number.
_Mark = tuple[int, int, int] | None


@dataclass(frozen=True)
class AccessOptions:
    """What the section ``<access>`` says."""

    anonymous: Grants = ()
    users: Path | None = None
    tokens: Path | None = None
    certificates: tuple[Identity, ...] = ()

    @property
    def has_login(self) -> bool:
        """Whether there is a way to say who one is."""
        return bool(self.users or self.tokens or self.certificates)


def load(options: AccessOptions | None) -> Access:
    """The Access that ``options`` describe; without any it is open.

    Raises KeyFileError.
    """
    if options is None:
        return OPEN
    users, secret = ({}, b"") if options.users is None else read_users(options.users)
    if users:
        # It takes a tenth of a second, which the first login must not take of the loop.
        import_module("scramp")
    return Access(
        anonymous=options.anonymous,
        certificates={each.name: each for each in options.certificates},
        users=users,
        tokens={} if options.tokens is None else read_tokens(options.tokens),
        secret=secret,
    )


class Keyring:
    """The Access in force, and the files it came from."""

    def __init__(self, options: AccessOptions | None):
        """Raises KeyFileError."""
        self._options = options
        self._marks = self._look()
        self.access = load(options)
        self._warn_of_readers()

    @property
    def has_files(self) -> bool:
        """Whether there is anything that may change by itself."""
        return bool(self._files())

    def renew(self) -> Access | None:
        """The new Access if a file has changed and can be used, else None."""
        marks = self._look()
        if marks == self._marks:
            return None
        # Before it is read: if it changes meanwhile, it is read again.
        self._marks = marks
        try:
            self.access = load(self._options)
        except KeyFileError as error:
            logger.error("what was known of users and tokens stays: %s", error)
            return None
        self._warn_of_readers()
        logger.info("users and tokens were read again")
        return self.access

    def _files(self) -> list[Path]:
        if self._options is None:
            return []
        return [path for path in (self._options.users, self._options.tokens) if path]

    def _look(self) -> list[_Mark]:
        return [_mark(path) for path in self._files()]

    def _warn_of_readers(self) -> None:
        for path in self._files():
            if stat.S_IMODE(os.stat(path).st_mode) & 0o077:
                logger.warning("%s can be read by others: chmod 600 %s", path, path)


def _mark(path: Path) -> _Mark:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


class KeyWatch:
    """Keeps what a server knows of users and tokens in step with its files."""

    def __init__(self, keyring: Keyring, apply: Callable[[Access], None]):
        """``apply`` is called on the loop with each new Access."""
        self._keyring = keyring
        self._apply = apply
        self._is_looking = False

    def tick(self) -> None:
        """Have the files looked at, unless that is being done, or there are none."""
        if self._is_looking or not self._keyring.has_files:
            return
        self._is_looking = True
        keyring = self._keyring
        loop = asyncio.get_running_loop()
        looking = loop.run_in_executor(None, keyring.renew)
        looking.add_done_callback(lambda done: self._looked(keyring, done))

    def configure(self, options: AccessOptions | None) -> None:
        """Go by ``options`` from soon on, if their files can be used."""
        loop = asyncio.get_running_loop()
        reading = loop.run_in_executor(None, Keyring, options)
        reading.add_done_callback(self._configured)

    def _looked(
        self, keyring: Keyring, looking: "asyncio.Future[Access | None]"
    ) -> None:
        self._is_looking = False
        if looking.cancelled():
            return
        if error := looking.exception():
            logger.error("users and tokens could not be looked at: %s", error)
        elif (access := looking.result()) and keyring is self._keyring:
            self._apply(access)

    def _configured(self, reading: "asyncio.Future[Keyring]") -> None:
        if reading.cancelled():
            return
        if error := reading.exception():
            logger.error("what was known of users and tokens stays: %s", error)
        else:
            self._keyring = reading.result()
            self._apply(self._keyring.access)
