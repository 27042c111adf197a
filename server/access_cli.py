"""``zeolith user`` and ``zeolith token``: the files of users and tokens.

They work on files, not on a server: a running one sees by itself that a file has
changed. A password comes from a file, from the environment or from a terminal; a token
is printed once. Exit codes are those of the program.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from getpass import getpass
from itertools import product
from pathlib import Path

import click

from zeolith.protocol.credentials import PASSWORD_VARIABLE, InFile
from zeolith.protocol.login import LoginError
from zeolith.protocol.roles import AccessRole
from zeolith.server import key_files
from zeolith.server.access import Grant, Grants
from zeolith.server.key_files import KeyFileError

_DAY_S = 86400

_Command = Callable[..., None]
_file = click.argument("file", type=click.Path(path_type=Path))
_name = click.argument("name")
_password_option = click.option(
    "--password-file", metavar="PATH", help="Where the password is, in the first line."
)


def _role_options(command: _Command) -> _Command:
    for option in (
        click.option(
            "--storage",
            "storages",
            multiple=True,
            metavar="NAME",
            help="On this storage; may be repeated (without: on all).",
        ),
        click.option(
            "--role",
            "roles",
            multiple=True,
            required=True,
            type=click.Choice([*(role.value for role in AccessRole), "none"]),
            help="What it may do; may be repeated.",
        ),
    ):
        command = option(command)
    return command


@click.group()
def user() -> None:
    """Users, who log in with a password."""


@user.command("add")
@_role_options
@_password_option
@_file
@_name
def add_user(
    file: Path,
    name: str,
    roles: tuple[str, ...],
    storages: tuple[str, ...],
    password_file: str | None,
) -> None:
    """Add user NAME to FILE, which is made if it is not there."""
    grants = _grants(roles, storages)
    with _mistakes():
        key_files.add_user(file, name, _new_password(name, password_file), grants)


@user.command("passwd")
@_password_option
@_file
@_name
def change_password(file: Path, name: str, password_file: str | None) -> None:
    """Give user NAME of FILE another password; who used the old one is let go."""
    with _mistakes():
        key_files.set_password(file, name, _new_password(name, password_file))


@user.command("roles")
@_role_options
@_file
@_name
def change_roles(
    file: Path, name: str, roles: tuple[str, ...], storages: tuple[str, ...]
) -> None:
    """Give user NAME of FILE these roles in place of those it has."""
    with _mistakes():
        key_files.set_roles(file, name, _grants(roles, storages))


@user.command("remove")
@_file
@_name
def remove_user(file: Path, name: str) -> None:
    """Remove user NAME from FILE; whoever is logged in as that is let go."""
    with _mistakes():
        key_files.remove_user(file, name)


@user.command("list")
@_file
def list_users(file: Path) -> None:
    """Show the users in FILE and their roles."""
    with _mistakes():
        users, _secret = key_files.read_users(file)
    for name, known in sorted(users.items()):
        click.echo(f"{name}: {_shown(known.identity.grants)}")


@click.group()
def token() -> None:
    """Tokens: who has one is let in."""


@token.command("create")
@_role_options
@click.option(
    "--expires",
    required=True,
    metavar="WHEN",
    help="90d, a day like 2027-01-31 (UTC), or never.",
)
@click.option("--label", default="", help="What it is for.")
@_file
def create_token(
    file: Path,
    roles: tuple[str, ...],
    storages: tuple[str, ...],
    expires: str,
    label: str,
) -> None:
    """Make a token and print it: nobody can show it again. FILE is made if need be."""
    now_s = time.time()
    expires_s = _moment_s(expires, now_s)
    grants = _grants(roles, storages)
    with _mistakes():
        click.echo(key_files.create_token(file, label, grants, expires_s, now_s))


@token.command("list")
@_file
def list_tokens(file: Path) -> None:
    """Show the tokens in FILE: name, roles, end, and what they are for."""
    with _mistakes():
        tokens = key_files.read_tokens(file)
        labels = key_files.label_of_tokens(file)
    for name, known in sorted(tokens.items()):
        line = f"{name}: {_shown(known.grants)}, {_end(known.expires_s)}"
        click.echo(line + (f", {labels[name]}" if labels.get(name) else ""))


@token.command("revoke")
@_file
@_name
def revoke_token(file: Path, name: str) -> None:
    """Forget the token of that NAME, which is what stands before its point."""
    with _mistakes():
        key_files.revoke_token(file, name.partition(".")[0])


def _grants(roles: tuple[str, ...], storages: tuple[str, ...]) -> Grants:
    if "none" in roles:
        if len(roles) > 1 or storages:
            raise click.UsageError("none goes with no other role and no storage")
        return ()
    return tuple(
        Grant(AccessRole(role), storage)
        for role, storage in product(roles, storages or (None,))
    )


def _shown(grants: Grants) -> str:
    return ", ".join(map(str, grants)) or "none"


def _end(expires_s: float | None) -> str:
    if expires_s is None:
        return "never ends"
    moment = datetime.fromtimestamp(expires_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"{'has ended' if expires_s <= time.time() else 'ends'} {moment}"


def _moment_s(text: str, now_s: float) -> float | None:
    if text == "never":
        return None
    if days := re.fullmatch(r"(\d{1,5})d", text):
        return now_s + int(days[1]) * _DAY_S
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise click.UsageError(
            f"{text!r} is no end: write 90d, a day like 2027-01-31, or never"
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _new_password(name: str, password_file: str | None) -> str:
    """Raises LoginError for a file of no use, KeyFileError if there is none."""
    if password_file is not None:
        return InFile(password_file).read()
    if given := os.environ.get(PASSWORD_VARIABLE):
        return given
    if not _is_terminal():
        raise KeyFileError(
            f"there is no terminal to ask for the password of {name}: give"
            f" --password-file, or set {PASSWORD_VARIABLE}"
        )
    password = getpass(f"New password of {name}: ")
    if getpass("Once more: ") != password:
        raise KeyFileError("the two passwords are not the same")
    return password


def _is_terminal() -> bool:
    return sys.stdin.isatty()


@contextmanager
def _mistakes() -> Iterator[None]:
    """What is wrong is one line, and the exit code 1."""
    try:
        yield
    except (KeyFileError, LoginError) as error:
        click.echo(f"zeolith: {error}", err=True)
        sys.exit(1)
