"""The files of users and of tokens: read, changed and written, by one at a time.

Each is a JSON object: what it is, a secret (users), and an entry for each user or
token. No password and no token can be found out from them, only tried. The server
reads them, in a thread that may wait; the commands ``zeolith user`` and ``zeolith
token`` change them, under a lock, and put a new file in place of the old, so that
whoever reads sees the one or the other. They are their owner's alone (0600).
"""

import fcntl
import json
import os
import secrets
import tempfile
from base64 import b64decode, b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from zeolith.server.access import ITERATIONS, Grants, Identity, User, parse_grants

USERS, TOKENS = "users", "tokens"
# A file is of this kind and of this version of it.
_FORMAT = "zeolith {kind}, 1"
_SECRET_BYTES = 32
_TOKEN_BYTES = 32
_TOKEN_NAME_BYTES = 4
FILE_BYTES_MAX = 64 * 1024 * 1024
NAME_CHARS_MAX = 64


class KeyFileError(Exception):
    """A file cannot be used, or what was asked of it not done; the text is one line."""


# Reading


def read_users(path: Path) -> tuple[dict[str, User], bytes]:
    """The users in the file at ``path``, and its secret; raises KeyFileError."""
    document = _read(path, USERS)
    try:
        users = {name: _user(name, entry) for name, entry in document[USERS].items()}
        return users, bytes.fromhex(document["secret"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise KeyFileError(f"{path}: it is damaged: {error!r}") from error


def read_tokens(path: Path) -> dict[str, Identity]:
    """The tokens in the file at ``path``, by their names; raises KeyFileError."""
    document = _read(path, TOKENS)
    try:
        return {name: _token(name, entry) for name, entry in document[TOKENS].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise KeyFileError(f"{path}: it is damaged: {error!r}") from error


def _read(path: Path, kind: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
        document = json.loads(data)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise KeyFileError(f"{path}: it is damaged: {error}") from error
    wanted = _FORMAT.format(kind=kind)
    if not isinstance(document, dict) or document.get("format") != wanted:
        raise KeyFileError(f"{path}: it is no file of {wanted!r}")
    return document


def _user(name: str, entry: dict[str, Any]) -> User:
    salt, stored_key, server_key = (
        b64decode(entry[key], validate=True)
        for key in ("salt", "stored_key", "server_key")
    )
    iterations = entry["iterations"]
    if type(iterations) is not int:
        raise TypeError(f"{name}: iterations")
    identity = Identity("user", name, _grants(entry), stored_key)
    return User(identity, salt, stored_key, server_key, iterations)


def _token(name: str, entry: dict[str, Any]) -> Identity:
    key, expires_s = bytes.fromhex(entry["sha256"]), entry["expires"]
    if expires_s is not None and type(expires_s) not in (int, float):
        raise TypeError(f"{name}: expires")
    return Identity("token", name, _grants(entry), key, expires_s)


def _grants(entry: dict[str, Any]) -> Grants:
    return parse_grants(entry["roles"])


# Changing


def add_user(path: Path, name: str, password: str, grants: Grants) -> None:
    """Make a user; the file too, if there is none. Raises KeyFileError."""
    _check_name(name)
    entry = {"roles": _written(grants), **_keys(password)}
    with _changing(path, USERS) as document:
        if name in document[USERS]:
            raise KeyFileError(f"{path}: there is a user {name} already")
        document[USERS][name] = entry


def set_password(path: Path, name: str, password: str) -> None:
    """Give a user another password; raises KeyFileError."""
    keys = _keys(password)
    with _changing(path, USERS, must_be=name) as document:
        document[USERS][name].update(keys)


def set_roles(path: Path, name: str, grants: Grants) -> None:
    """Give a user other roles; raises KeyFileError."""
    with _changing(path, USERS, must_be=name) as document:
        document[USERS][name]["roles"] = _written(grants)


def remove_user(path: Path, name: str) -> None:
    """Forget a user; raises KeyFileError."""
    with _changing(path, USERS, must_be=name) as document:
        del document[USERS][name]


def create_token(
    path: Path, label: str, grants: Grants, expires_s: float | None, now_s: float
) -> str:
    """Make a token and return it, which nobody can do again; raises KeyFileError."""
    with _changing(path, TOKENS) as document:
        tokens = document[TOKENS]
        while (name := secrets.token_hex(_TOKEN_NAME_BYTES)) in tokens:
            continue
        token = f"{name}.{secrets.token_urlsafe(_TOKEN_BYTES)}"
        tokens[name] = {
            "roles": _written(grants),
            "label": label,
            "sha256": sha256(token.encode()).hexdigest(),
            "created": now_s,
            "expires": expires_s,
        }
    return token


def revoke_token(path: Path, name: str) -> None:
    """Forget a token; raises KeyFileError."""
    with _changing(path, TOKENS, must_be=name) as document:
        del document[TOKENS][name]


def label_of_tokens(path: Path) -> dict[str, str]:
    """What each token is for, by its name; raises KeyFileError."""
    return {
        name: str(entry.get("label", ""))
        for name, entry in _read(path, TOKENS)[TOKENS].items()
    }


def _check_name(name: str) -> None:
    """Names that need no quoting anywhere, and of which no two look the same."""
    if not (
        name.isascii()
        and 0 < len(name) <= NAME_CHARS_MAX
        and all(each.isalnum() or each in "._-@" for each in name)
    ):
        raise KeyFileError(
            f"{name!r} is no name for a user: it has letters of English, digits and"
            f" any of ._-@, not more than {NAME_CHARS_MAX}"
        )


def _written(grants: Grants) -> str:
    return " ".join(map(str, grants)) or "none"


def _keys(password: str) -> dict[str, Any]:
    from scramp import ScramException, ScramMechanism

    if not password:
        raise KeyFileError("the password is empty")
    try:
        made = ScramMechanism("SCRAM-SHA-256").make_auth_info(
            password, iteration_count=ITERATIONS, salt=secrets.token_bytes(16)
        )
    except ScramException as error:
        raise KeyFileError(f"the password cannot be used: {error}") from None
    salt, stored_key, server_key, iterations = made
    return {
        "salt": b64encode(salt).decode(),
        "stored_key": b64encode(stored_key).decode(),
        "server_key": b64encode(server_key).decode(),
        "iterations": iterations,
    }


@contextmanager
def _changing(
    path: Path, kind: str, must_be: str | None = None
) -> Iterator[dict[str, Any]]:
    """What the file holds, to be changed, and written if nothing is raised."""
    try:
        with _locked(path):
            if path.exists() or must_be is not None:
                document = _read(path, kind)
            else:
                document = _empty(kind)
            if must_be is not None and must_be not in document[kind]:
                raise KeyFileError(f"{path}: there is no {must_be}")
            yield document
            _replace(path, json.dumps(document, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror or error}") from error


def _empty(kind: str) -> dict[str, Any]:
    document: dict[str, Any] = {"format": _FORMAT.format(kind=kind), kind: {}}
    if kind == USERS:
        document["secret"] = secrets.token_hex(_SECRET_BYTES)
    return document


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Not the file itself is locked, for it is replaced."""
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _replace(path: Path, text: str) -> None:
    """Put a new file in place of the old one, of the same owner."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            # mkstemp makes it 0600. Whoever administers may be somebody else than the
            # server, which must go on reading it.
            if path.exists():
                was = path.stat()
                if (was.st_uid, was.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(file.fileno(), was.st_uid, was.st_gid)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
