"""The options of commands that speak TLS with a server.

They are called like the arguments of a client. A command that has them gets one
argument, ``tls``; a mistake ends it like any other of the command line.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from zeolith.protocol.tls import TlsFiles, TlsMistake, client_tls


def tls_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` the options, and itself what they mean as ``tls``."""

    @wraps(command)
    def run(
        *args: Any,
        tls: bool,
        tls_server_name: str | None,
        tls_verify: bool,
        **options: Any,
    ) -> None:
        files = TlsFiles(*(options.pop(name) for name in TlsFiles._fields))
        try:
            means = client_tls(
                None, tls or None, files, tls_server_name, verifies=tls_verify
            )
        except TlsMistake as mistake:
            raise click.UsageError(str(mistake)) from mistake
        command(*args, tls=means, **options)

    for option in reversed(_OPTIONS):
        option(run)
    return run


_OPTIONS = [
    click.option("--tls", is_flag=True, help="Speak TLS, as any of these says, too."),
    click.option(
        "--tls-ca", metavar="FILE", help="Who may have signed (the system's)."
    ),
    click.option("--tls-certificate", metavar="FILE", help="To show to the server."),
    click.option("--tls-key", metavar="FILE", help="Its key, if not in the same file."),
    click.option("--tls-key-password-file", metavar="FILE", help="Its password."),
    click.option("--tls-server-name", metavar="NAME", help="In its certificate."),
    click.option(
        "--tls-verify/--no-tls-verify",
        default=True,
        help="Whether the server must prove who it is (the default).",
    ),
]
