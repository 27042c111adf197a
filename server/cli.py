"""The ``zeolith`` command.

Exit codes: 0 it worked; 1 it could not be done (no answer, an address in use, a file
that is locked); 2 the command line or the configuration is wrong; 3 a pack was given
up by Ctrl-C. A mistake of the
operator's is one line on standard error, never a traceback.
"""

import json
import logging
import sys
import time
from importlib.metadata import entry_points
from typing import Any, NoReturn

import click

from zeolith.protocol.addresses import Address, format_address, parse_address
from zeolith.protocol.login import NO_CREDENTIALS, Credentials
from zeolith.protocol.tls import ClientTls
from zeolith.server import config, daemon, keyring, probe
from zeolith.server.access import NOBODY
from zeolith.server.access_cli import token, user
from zeolith.server.key_files import KeyFileError
from zeolith.server.listener import ListenError
from zeolith.server.login_options import login_options, taken_credentials
from zeolith.server.pack_command import pack_storage
from zeolith.server.tls import warning
from zeolith.server.tls_options import tls_options
from zeolith.storage.opening import OpeningError

_ANSWER_TIMEOUT_S = 5.0
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _AddressType(click.ParamType[Address]):
    name = "address"

    def convert(self, value: Any, _parameter: Any, _context: Any) -> Address:
        try:
            return parse_address(value)
        except ValueError as error:
            self.fail(str(error))


_ADDRESS = _AddressType()


class _Program(click.Group):
    """Our commands, and those that other packages bring, which we do not import.

    An entry point of the group ``zeolith.commands`` is a click command; it is loaded
    when somebody wants it.
    """

    def list_commands(self, context: click.Context) -> list[str]:
        brought = entry_points(group="zeolith.commands").names
        return sorted({*super().list_commands(context), *brought})

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        own = super().get_command(context, name)
        if own is not None:
            return own
        for found in entry_points(group="zeolith.commands", name=name):
            command: click.Command = found.load()
            return command
        return None


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="zeolith")
def main() -> None:
    """zeolith: a client-server object database for Python."""


@main.command()
@click.option("-C", "--configure", "path", metavar="FILE", help="Configuration file.")
@click.option(
    "--address",
    "addresses",
    multiple=True,
    type=_ADDRESS,
    help="Without a file: host:port or a socket's path; may be repeated.",
)
@click.option(
    "--path", "data_path", metavar="DATA.FS", help="Without a file: the data."
)
@click.option("--blob-dir", metavar="DIR", help="Without a file: where blobs are.")
@click.option(
    "--insecure",
    "is_insecure",
    is_flag=True,
    help="Without a file: listen also where other machines can connect.",
)
def serve(
    path: str | None,
    addresses: tuple[Address, ...],
    data_path: str | None,
    blob_dir: str | None,
    is_insecure: bool,
) -> None:
    """Serve storages until told to stop (SIGTERM, or Ctrl-C)."""
    if bool(path) == bool(data_path):
        raise click.UsageError(
            "give either a configuration file (-C) or the data (--path)"
        )
    if path and (addresses or blob_dir or is_insecure):
        raise click.UsageError(
            "--address, --blob-dir and --insecure belong to --path, not to -C"
        )
    logging.basicConfig(format=_LOG_FORMAT, level=logging.INFO, stream=sys.stderr)
    # It logs a traceback for a file that is locked; we say it in a line.
    logging.getLogger("zc.lockfile").setLevel(logging.CRITICAL)
    try:
        if path:
            options = config.read_file(path)
        else:
            assert data_path
            options = config.quick_options(
                list(addresses), data_path, blob_dir, is_insecure=is_insecure
            )
        config.refuse_exposed(options)
        daemon.run(options, click.echo, lambda: _reread(path))
    except config.ConfigError as error:
        _exit(2, error)
    except (OpeningError, ListenError, KeyFileError) as error:
        _exit(1, error)


@main.command("check-config")
@click.option("-C", "--configure", "path", metavar="FILE", required=True)
def check_config(path: str) -> None:
    """Say whether a configuration file can be used; opens nothing."""
    try:
        options = config.read_file(path)
        config.refuse_exposed(options)
        keyring.load(options.access)
    except (config.ConfigError, KeyFileError) as error:
        _exit(2, error)
    if options.tls is not None:
        text = warning(options.tls.options, time.time())
        if text is not None:
            click.echo(f"warning: {text}", err=True)
    for address in options.addresses:
        click.echo(f"address {format_address(address)}")
    for name in options.storages:
        click.echo(f"storage {name}")


@main.command()
@click.argument("address", type=_ADDRESS)
@click.option(
    "--timeout", default=_ANSWER_TIMEOUT_S, show_default=True, help="Seconds."
)
@tls_options
def ping(address: Address, timeout: float, tls: ClientTls | None) -> None:
    """Say whether a server answers at ADDRESS: exit code 0 if so, 1 if not."""
    _ask(address, "ping", timeout, tls)
    click.echo(f"{format_address(address)} answers")


@main.command()
@click.argument("address", type=_ADDRESS)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option(
    "--timeout", default=_ANSWER_TIMEOUT_S, show_default=True, help="Seconds."
)
@login_options
@tls_options
def status(
    address: Address,
    as_json: bool,
    timeout: float,
    tls: ClientTls | None,
    **options: Any,
) -> None:
    """Show storages, clients and transactions of the server at ADDRESS."""
    state = _ask(address, "status", timeout, tls, taken_credentials(options))
    if as_json:
        click.echo(json.dumps(state, indent=2))
    else:
        click.echo("\n".join(_lines(state)))


@main.command()
@click.argument("address", type=_ADDRESS)
@click.option(
    "--storage",
    default=config.DEFAULT_STORAGE,
    show_default=True,
    metavar="NAME",
    help="Which one.",
)
@click.option(
    "--days",
    type=click.FloatRange(min=0),
    help="Keep what was current in the last N days (1).",
)
@click.option(
    "--at", metavar="TIME", help="Keep it since TIME: 2026-01-31 or with T04:30."
)
@click.option("--gc/--no-gc", default=None, help="Remove garbage too, or not.")
@click.option("--cancel", is_flag=True, help="Give up the pack under way instead.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
@click.option(
    "--timeout", default=_ANSWER_TIMEOUT_S, show_default=True, help="Seconds."
)
@login_options
@tls_options
def pack(address: Address, **options: Any) -> None:
    """Pack a storage of the server at ADDRESS.

    Exit code 0 if it is packed or there is nothing to pack, 1 if it could not be done,
    2 for a wrong command line, 3 if Ctrl-C has given it up.
    """
    credentials = taken_credentials(options)
    sys.exit(pack_storage(address, credentials=credentials, **options))


main.add_command(user)
main.add_command(token)


def _ask(
    address: Address,
    method: str,
    timeout_s: float,
    tls: ClientTls | None,
    credentials: Credentials = NO_CREDENTIALS,
) -> Any:
    try:
        return probe.ask(address, method, timeout_s, tls, credentials)
    except probe.NoAnswer as error:
        _exit(1, error)


def _lines(state: dict[str, Any]) -> list[str]:
    lines = [
        f"zeolith {state['version']}, process {state['pid']},"
        f" up {state['uptime_s']:.0f} s, {state['connections']} connections"
    ]
    for name, storage in state["storages"].items():
        counters = storage["counters"]
        lines += [
            "",
            f"storage {name}: {storage['objects']} objects,"
            f" {storage['size_bytes']} bytes, last transaction {storage['last_tid']}"
            + (", read-only" if storage["read_only"] else ""),
            "  " + ", ".join(f"{value} {key}" for key, value in counters.items()),
        ]
        if storage["broken"]:
            lines.append(f"  BROKEN, nothing is written: {storage['broken']}")
        packing = storage.get("pack")
        if packing:
            lines.append(
                f"  being packed: {packing['phase']}, {packing['fraction']:.0%},"
                f" for {packing['who']}"
            )
        lines += [
            f"  in transaction: {holder['client']} ({holder['phase']},"
            f" {holder['operations']} operations)"
            for holder in storage["transactions"]
        ]
        lines += [
            f"  waiting for objects of others: {waiting['client']}"
            for waiting in storage["waiting"]
        ]
        lines += [
            f"  client {client['address']}"
            + (f" {client['label']}" if client["label"] else "")
            + (f" as {client['identity']}" if client["identity"] != str(NOBODY) else "")
            + (" read-only" if client["read_only"] else "")
            + f", {client['channels']} channels"
            for client in storage["clients"]
        ]
    return lines


def _reread(path: str | None) -> config.Options | None:
    """For SIGHUP: the options anew; a mistake is logged and changes nothing."""
    if path is None:
        return None
    try:
        return config.read_file(path)
    except config.ConfigError as error:
        logging.getLogger(__name__).error("the configuration is not used: %s", error)
        return None


def _exit(code: int, error: Exception) -> NoReturn:
    click.echo(f"zeolith: {error}", err=True)
    sys.exit(code)
