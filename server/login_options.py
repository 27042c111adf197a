"""The options by which a command says who it is, the same for all that connect.

There is none for a password or a token itself: others can read a command line.
"""

from collections.abc import Callable
from typing import Any

import click

from zeolith.protocol.credentials import credentials_of
from zeolith.protocol.login import Credentials


def login_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give ``command`` the options; it takes them with ``taken_credentials``."""
    for option in (
        click.option(
            "--token-file", metavar="FILE", help="Be whom the token in FILE makes one."
        ),
        click.option(
            "--password-file", metavar="FILE", help="Where that user's password is."
        ),
        click.option("--username", metavar="NAME", help="Be this user."),
        click.option("--password", hidden=True, expose_value=False, callback=_refuse),
        click.option("--token", hidden=True, expose_value=False, callback=_refuse),
    ):
        command = option(command)
    return command


def taken_credentials(options: dict[str, Any]) -> Credentials:
    """What a command's ``options`` say of who it is, taken out of them.

    Asks for a password if there is a terminal. Raises click.UsageError.
    """
    try:
        return credentials_of(
            username=options.pop("username"),
            password_file=options.pop("password_file"),
            token_file=options.pop("token_file"),
            may_ask=True,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _refuse(_context: click.Context, option: click.Parameter, value: Any) -> None:
    if value is not None:
        raise click.UsageError(
            f"a {option.name} on a command line can be read by everybody on this"
            f" machine: put it into a file (--{option.name}-file), or into"
            f" ZEOLITH_{str(option.name).upper()}"
        )
